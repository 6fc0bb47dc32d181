"""What produced a run: versions, and digests of the model and the data."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from app.adapter import Manifest
from app.config import RunConfig
from app.places import local_folder

PACKAGES = (
    "flwr",
    "flwr-datasets",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
    "tokenizers",
)


def provenance(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What the coordinator knows about the origin of this run's results.

    Cards that only hospitals hold are not here: each reply carries a fingerprint of its own.
    """
    return {
        "app_sha256": folder_digest(Path(__file__).parent, "*.py"),
        "seed": config.train.seed,
        "adapter": {
            "manifest_sha256": manifest.digest,
            "tensors": [name for name, _ in manifest.shapes],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "machine": platform.machine(),
        "model": {"name": config.model.name, **_origin("models", config.model.name)},
        "dataset": {"name": config.dataset_name, **_origin("datasets", config.dataset_name)},
    }


def _origin(kind: str, name: str) -> dict[str, str]:
    folder = local_folder(kind, name)
    if folder is None:
        return {"from": "hub"}
    return {"from": "folder", "sha256": folder_digest(folder)} if folder.is_dir() else {}


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """SHA-256 over the names and contents of the files directly in ``folder``, in order of name."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.glob(pattern) if path.is_file()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{digest}  {file.name}\n".encode())
    return whole.hexdigest()
