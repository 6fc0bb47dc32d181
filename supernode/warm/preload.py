"""What the warm process has ready before it forks: imports and base models.

Nothing of this repository and nothing of an app is imported here under a name that an app could
use: the FAB's code must always come from the FAB. An app finds the models without importing this
file, through a module that both know by name::

    warm = sys.modules.get("medfed_warm")
    model = warm.take(source, quantization) if warm is not None else None

``take(source: str, quantization: int) -> PreTrainedModel | None`` gives the model that
``AutoModelForCausalLM.from_pretrained(source, dtype=float32, device_map={"": "cpu"})`` returned, in
evaluation mode, with no gradient asked for, gradient checkpointing untouched, and quantised as
``load_in_4bit`` or ``load_in_8bit`` would when ``quantization`` is 4 or 8. ``None`` when that model
is not there or its files have changed since. The caller owns it: its pages are copied when they
are written to, so nothing it does is seen by another message; a second ``take`` gives ``None``.
``take_tokenizer(source: str) -> PreTrainedTokenizerBase | None`` does the same for its tokenizer.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import SuperNodeError
from compat import clientapp

log = logging.getLogger("supernode.warm")

REGISTRY = "medfed_warm"

# What a ClientApp of this kind imports, down to the modules that would otherwise come in late.
IMPORTS = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors.torch",
    "bitsandbytes",
    "flwr.clientapp",
    *clientapp.MODULES,
)

# Read by libraries when they are imported. A fork keeps only the thread that called it, so no
# library may start any; a CUDA context does not survive one either, so devices are only counted.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
}


@dataclass(frozen=True)
class ModelSource:
    """One base model to have ready.

    Args:
        source: a folder or a hub name, as ``from_pretrained`` takes it.
        quantization: 0, 4 or 8 bits; 0 is none.
    """

    source: str
    quantization: int = 0

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Read ``NAME`` or ``NAME@BITS``; ``local/NAME`` is ``$MEDFED_HOME/models/NAME``.

        Raises:
            SuperNodeError: BITS is not 0, 4 or 8, or a local folder holds no model.
        """
        name, _, bits = text.strip().partition("@")
        if bits not in ("", "0", "4", "8"):
            raise SuperNodeError(
                f"expected a model as NAME or NAME@BITS with 0, 4 or 8 bits, found {text!r}",
                "for example local/SmolLM2-135M-Instruct-Q4_1@4",
            )
        home = Path(os.environ.get("MEDFED_HOME", "~/.medfed")).expanduser()
        if name.startswith("local/"):
            name = str((home / "models" / name.removeprefix("local/")).resolve())
        if name.startswith("/") and not (Path(name) / "config.json").is_file():
            raise SuperNodeError(
                f"expected a model in {name}, found no config.json",
                "medfed prepare fetches the embedded model",
            )
        return cls(name, int(bits or 0))


@dataclass(frozen=True)
class _Ready:
    model: Any
    files: tuple[tuple[str, int, int], ...]


class Registry(ModuleType):
    """The module ``medfed_warm``: see this file's docstring."""

    def __init__(self) -> None:
        super().__init__(REGISTRY)
        self._models: dict[tuple[str, int], _Ready] = {}
        self._tokenizers: dict[str, _Ready] = {}

    def add(self, wanted: ModelSource) -> None:
        """Load a model and its tokenizer.

        Raises:
            OSError, ValueError, ImportError: they cannot be loaded.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        quantization = {
            0: None,
            4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
            8: BitsAndBytesConfig(load_in_8bit=True),
        }[wanted.quantization]
        files = fingerprint(wanted.source)
        model = AutoModelForCausalLM.from_pretrained(
            wanted.source,
            dtype=torch.float32,
            device_map={"": "cpu"},
            quantization_config=quantization,
        )
        model.requires_grad_(False)
        model.eval()
        tokenizer = AutoTokenizer.from_pretrained(
            wanted.source, use_fast=True, padding_side="right"
        )
        self._models[_key(wanted.source), wanted.quantization] = _Ready(model, files)
        self._tokenizers[_key(wanted.source)] = _Ready(tokenizer, files)

    def take(self, source: str, quantization: int = 0) -> Any:
        """Give away the model loaded from ``source``, or ``None``."""
        return _unchanged(source, self._models.pop((_key(source), quantization), None))

    def take_tokenizer(self, source: str) -> Any:
        """Give away the tokenizer loaded from ``source``, or ``None``."""
        return _unchanged(source, self._tokenizers.pop(_key(source), None))

    @property
    def names(self) -> list[str]:
        """What is ready, as ``NAME@BITS``."""
        return [f"{source}@{bits}" for source, bits in self._models]


def _key(source: str) -> str:
    return str(Path(source).resolve()) if source.startswith("/") else source


def _unchanged(source: str, ready: _Ready | None) -> Any:
    if ready is None or ready.files != fingerprint(source):
        return None
    return ready.model


def fingerprint(source: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of a folder's files; empty for a hub name."""
    if not source.startswith("/"):
        return ()
    return tuple(
        (path.name, status.st_size, status.st_mtime_ns)
        for path in sorted(Path(source).iterdir())
        if path.is_file()
        for status in [path.stat()]
    )


def preload(imports: Iterable[str], models: Iterable[ModelSource]) -> Registry:
    """Import and load everything, and make the process fit for forking.

    A library or a model that cannot be loaded is logged and left to the ClientApp that needs it.

    Raises:
        SuperNodeError: the process ended up with a second thread or with CUDA initialised, so a
            forked child could hang.
    """
    os.environ.update(ENVIRONMENT)
    gc.disable()  # until a child turns it on again
    registry = Registry()
    sys.modules[REGISTRY] = registry
    for name in imports:
        started = time.monotonic()
        try:
            importlib.import_module(name)
        except ImportError as error:
            log.warning("cannot import %s, ClientApps will do it themselves: %s", name, error)
            continue
        _stay_single_threaded(name)
        check_fit_for_forking(name)
        log.info("imported %s in %.1f s", name, time.monotonic() - started)
    for wanted in models:
        started = time.monotonic()
        try:
            registry.add(wanted)
            check_fit_for_forking(wanted.source)
        except (OSError, ValueError, ImportError) as error:
            log.warning("cannot load %s, ClientApps will do it: %s", wanted.source, error)
            continue
        log.info(
            "loaded %s at %d bits in %.1f s",
            wanted.source,
            wanted.quantization,
            time.monotonic() - started,
        )
    # Nothing of this is garbage: without it the first collection in each child would write to
    # every object's header and so copy nearly every page.
    gc.collect()
    gc.freeze()
    return registry


def _stay_single_threaded(imported: str) -> None:
    if imported == "torch":
        import torch

        torch.set_num_threads(1)
    elif imported == "transformers":
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def check_fit_for_forking(after: str) -> None:
    """Check what a fork does not survive.

    Args:
        after: what was imported or loaded last.

    Raises:
        SuperNodeError: there is more than one thread, or CUDA is initialised.
    """
    others = [thread.name for thread in threading.enumerate()[1:]]
    tasks = len(list(Path("/proc/self/task").iterdir()))
    if others or tasks > 1:
        raise SuperNodeError(
            f"expected one thread after {after}, found {tasks} {others or ''}".rstrip(),
            "no thread survives a fork: leave it out, naming the others with --import",
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise SuperNodeError(
            f"expected no CUDA after {after}, found it initialised",
            "CUDA does not survive a fork: leave it out, naming the others with --import",
        )
