"""What a run costs in communication: foretold from a model's name, or read from a run's record."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.server.communication import BUDGET_MB, MB
from common.errors import MedfedError
from medfed.paths import Home
from medfed.records import Record
from medfed.runs import default_config

NUMPY_HEADER = 128  # of a .npy of one or two dimensions (NEP 1: padded to a multiple of 64)
FLOAT32 = 4


@dataclass(frozen=True)
class Architecture:
    """What decides the shapes of LoRA's matrices in a Llama.

    Attributes:
        hidden: width of the residual stream.
        layers: how many there are.
        heads: query heads.
        kv_heads: key and value heads, each as wide as a query head.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int

    def outputs(self, module: str) -> int:
        """Width of what a projection of the attention gives, from ``hidden`` numbers.

        Raises:
            CommunicationError: it is none of those.
        """
        narrow = self.hidden // self.heads * self.kv_heads
        widths = {"q_proj": self.hidden, "k_proj": narrow, "v_proj": narrow, "o_proj": self.hidden}
        if module not in widths:
            raise CommunicationError(
                f"expected modules among {', '.join(widths)}, found {module!r}",
                "other adapters' cost is known once they have run: medfed comm RUN",
            )
        return widths[module]


# The published configurations, for machines that reach no hub.
KNOWN = {
    "SmolLM2-135M": Architecture(hidden=576, layers=30, heads=9, kv_heads=3),
    "SmolLM2-360M": Architecture(hidden=960, layers=32, heads=15, kv_heads=5),
    "SmolLM2-1.7B": Architecture(hidden=2048, layers=24, heads=32, kv_heads=32),
}


class CommunicationError(MedfedError):
    """What a run costs cannot be told."""


@dataclass(frozen=True)
class Prediction:
    """The cost of a run that has not run, in bytes of its array records both ways.

    Attributes:
        model: its name.
        rounds: how many.
        clients: institutions a round.
        tensors: of the adapter.
        parameters: of the adapter.
        reference_bytes: as the reference sends it: an array for each tensor.
        flat_bytes: as medfed sends it: one array.
    """

    model: str
    rounds: int
    clients: int
    tensors: int
    parameters: int
    reference_bytes: int
    flat_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, and MB as the leaderboard writes them."""
        return {
            **asdict(self),
            "reference_mb": round(self.reference_bytes / MB, 2),
            "flat_mb": round(self.flat_bytes / MB, 2),
            "budget_mb": BUDGET_MB,
            "within_budget": self.flat_bytes <= BUDGET_MB * MB,
        }


def architecture(home: Home, name: str) -> Architecture:
    """The architecture of a model: a SmolLM2 by name, or a folder of this machine.

    Raises:
        CommunicationError: it is neither.
    """
    bare = name.rpartition("/")[2].removesuffix("-Instruct")
    if bare in KNOWN:
        return KNOWN[bare]
    folder = home.models / name.removeprefix("local/") if name.startswith("local/") else Path(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Architecture(
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            kv_heads=int(config.get("num_key_value_heads", config["num_attention_heads"])),
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise CommunicationError(
            f"expected one of {', '.join(KNOWN)} or a folder with a Llama's config.json, "
            f"found {name!r}",
            "local/NAME is a folder under $MEDFED_HOME/models",
        ) from None


def predict(
    home: Home,
    model: str,
    rounds: int,
    *,
    clients: int,
    rank: int | None = None,
    modules: tuple[str, ...] = (),
) -> Prediction:
    """Foretell the cost of a run; nothing is loaded but a configuration.

    Args:
        home: where ``local/`` models are.
        model: see ``architecture``.
        rounds: how many.
        clients: institutions a round.
        rank: of the adapter; by default the run config's.
        modules: that it adapts; by default the run config's.
    """
    config = default_config()
    rank = rank or int(config["model.lora.peft-lora-r"])
    modules = modules or tuple(str(config["model.lora.target-modules"]).split(","))
    shape = architecture(home, model)
    # Each module has A (rank by input) and B (output by rank).
    one_layer = sum(rank * (shape.hidden + shape.outputs(module.strip())) for module in modules)
    parameters, tensors = shape.layers * one_layer, shape.layers * 2 * len(modules)
    messages = 2 * clients * rounds
    return Prediction(
        model=model,
        rounds=rounds,
        clients=clients,
        tensors=tensors,
        parameters=parameters,
        reference_bytes=messages * (parameters * FLOAT32 + tensors * NUMPY_HEADER),
        flat_bytes=messages * (parameters * FLOAT32 + NUMPY_HEADER),
    )


def of_run(home: Home, record: Record) -> dict[str, Any]:
    """What a run cost: its array records, and what crossed the wire where that is known.

    ``wire`` is over the SuperNodes whose logs are on this machine; None where there are none, as
    in a simulation, where nothing crosses a wire, or where hospitals keep their own.
    """
    total = sum(one.bytes for one in record.rounds)
    wire = wire_of(home, record.run_id)
    return {
        "run_id": record.run_id,
        "rounds": [{"round": one.number, "bytes": one.bytes} for one in record.rounds],
        "bytes": total,
        "mb": round(total / MB, 2),
        "budget_mb": BUDGET_MB,
        "within_budget": total <= BUDGET_MB * MB,
        "wire": wire,
    }


def wire_of(home: Home, run_id: str) -> dict[str, Any] | None:
    """Bytes on the sockets of this machine's SuperNodes in a run (``supernode/wire.py``)."""
    sites: dict[str, dict[str, int]] = defaultdict(lambda: {"sent": 0, "received": 0})
    for log in sorted(home.supernodes.glob("*/flwr/wire.jsonl")):
        for text in log.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line["run_id"] == run_id:
                site = sites[log.parts[-3]]
                site["sent"] += line["sent"]
                site["received"] += line["received"]
    if not sites:
        return None
    total = {way: sum(site[way] for site in sites.values()) for way in ("sent", "received")}
    return {"supernodes": dict(sites), **total, "bytes": total["sent"] + total["received"]}
