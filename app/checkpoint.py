"""Global adapters on disk, as the folders that PEFT itself reads and writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from app.adapter import FlatArray, Manifest, unpack
from app.config import ModelSettings


def save_checkpoint(
    folder: Path, flat: FlatArray, manifest: Manifest, settings: ModelSettings
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into ``folder``.

    ``PeftModel.from_pretrained(base, folder)`` loads it. The folder appears whole or not at all:
    it is written beside its place, synced, and renamed.
    """
    from app.model import lora_config  # torch and PEFT: only when something is saved

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: np.array(values) for name, values in unpack(flat, manifest).items()}
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    config = lora_config(settings)
    config.inference_mode = True
    config.save_pretrained(str(partial))
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
