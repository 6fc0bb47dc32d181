"""Records of runs as the app writes them, made without running anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from app.adapter.layout import Manifest, digest, pack, tensor_digests
from app.server.communication import line
from medfed.runs import default_config

MANIFEST = Manifest((("layer.lora_A.weight", (2, 3)), ("layer.lora_B.weight", (3, 2))))
NAMES = [f"supernode-{number:02d}" for number in range(20)]
BYTES = 4 * (48 + 128)


def adapter(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=MANIFEST.size).astype(np.float32)


def write_record(
    folder: Path,
    *,
    rounds: int = 3,
    engine: str = "simulation",
    app_sha256: str = "a" * 64,
    federation: list[str] = NAMES,
    config: dict[str, object] | None = None,
    replies: dict[tuple[int, str], np.ndarray] | None = None,
    asked: dict[int, list[str]] | None = None,
    ended: bool = True,
) -> Path:
    """A run in which institutions n and n+1 train in round n, or as the arguments say."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = {**default_config(), "num-server-rounds": rounds, **(config or {})}
    origin = {
        "app_sha256": app_sha256,
        "seed": 42,
        "adapter": {
            "manifest_sha256": MANIFEST.digest,
            "tensors": [name for name, _ in MANIFEST.shapes],
        },
        "versions": {"flwr": "1.41.0"},
        "machine": "x86_64",
        "model": {"name": settings["model.name"], "from": "hub"},
        "dataset": {"name": settings["static.dataset.name"], "from": "hub"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "provenance.json").write_text(json.dumps(origin))
    events = [
        {
            "event": "online",
            "institutions": list(federation),
            "federation": list(federation),
            "engine": engine,
        },
        {"event": "holdout", "round": 0, "loss": 3.0, "examples": 8},
    ]
    flat = adapter(0)
    for number in range(1, rounds + 1):
        names = (asked or {}).get(number, NAMES[number : number + 2])
        events.append({"event": "round-started", "round": number, "institutions": names})
        sent = []
        for name in names:
            given = (replies or {}).get((number, name))
            one = adapter(100 * number + NAMES.index(name)) if given is None else given
            sent.append(one)
            events.append(
                {
                    "event": "reply",
                    "round": number,
                    "institution": name,
                    "adapter_sha256": digest(one),
                    "tensor_digests": tensor_digests(one, MANIFEST),
                    "train_loss": 2.0,
                    "train_seconds": 1.0,
                    "num_examples": 10,
                    "partition_fingerprint": NAMES.index(name),
                }
            )
        flat = np.mean(sent, axis=0, dtype=np.float32)
        events.append(
            {
                "event": "round-finished",
                "round": number,
                "train_loss": 2.0 / number,
                "bytes": BYTES,
                "seconds": 1.5,
                "adapter_sha256": digest(flat),
            }
        )
    events.append({"event": "holdout", "round": rounds, "loss": 2.5, "examples": 8})
    with (folder / "events.jsonl").open("w") as log:
        log.writelines(json.dumps({**event, "time": 0.0}) + "\n" for event in events)
    with (folder / "comm_cost.txt").open("w") as log:
        log.writelines(line((way + 1) * BYTES // 2, BYTES // 2) for way in range(2 * rounds))
    checkpoint = folder / f"peft_{rounds}"
    checkpoint.mkdir()
    tensors = {MANIFEST.shapes[0][0]: flat[:6].reshape(2, 3).copy()}
    tensors[MANIFEST.shapes[1][0]] = flat[6:].reshape(3, 2).copy()
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text("{}")
    assert digest(pack(tensors)) == digest(flat)
    if ended:
        summary = {"rounds": rounds, "adapter": checkpoint.name, "adapter_sha256": digest(flat)}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
