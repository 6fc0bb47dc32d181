"""Global adapters on disk, as the folders that PEFT itself reads and writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from app import durable
from app.adapter.layout import FlatArray, Manifest, unpack
from app.config import ModelSettings


def save_checkpoint(
    folder: Path, flat: FlatArray, manifest: Manifest, settings: ModelSettings
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into ``folder``.

    ``PeftModel.from_pretrained(base, folder)`` loads it. The folder appears whole or not at all:
    it is written beside its place, synced, and renamed.

    Raises:
        AppError: the disk is full or cannot be written.
    """
    from app.adapter.lora import lora_config  # torch and PEFT: only when something is saved

    partial = folder.with_name(folder.name + ".partial")
    tensors = {name: np.array(values) for name, values in unpack(flat, manifest).items()}
    config = lora_config(settings)
    config.inference_mode = True
    with durable.disk(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written = save(tensors, metadata={"format": "pt"})
        durable.write(partial / "adapter_model.safetensors", written)
        config.save_pretrained(str(partial))
        for file in partial.iterdir():
            with file.open("rb") as content:
                os.fsync(content.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        durable.sync_folder(folder.parent)
