"""What produced a run: versions, and digests of the model and the data."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import app
from app.adapter.layout import Manifest
from app.cards.dataset import resolve
from app.config import RunConfig
from app.digests import app_digest, folder_digest
from app.paths import local_folder

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
        "app_sha256": app_digest(Path(app.__file__).parent),
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
        "model": {"name": config.model.name, **_origin_of_model(config.model.name)},
        "dataset": {"name": config.dataset_name, **resolve(config.dataset_name).origin()},
    }


def _origin_of_model(name: str) -> dict[str, str]:
    folder = local_folder("models", name)
    if folder is None:
        return {"from": "hub"}
    return {"from": "folder", "sha256": folder_digest(folder)} if folder.is_dir() else {}
