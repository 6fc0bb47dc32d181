"""A node's slice of its machine: device, precision, CPU threads, GPU memory.

The roster gives each SuperNode a slice. This module enforces it on the process that trains, so that
twenty nodes on one machine each stay within the size they were given.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from app.errors import AppError

GIB = 1024**3


@dataclass(frozen=True)
class Precision:
    """The type that activations are computed in, and why.

    Attributes:
        dtype: of activations, and of base weights that are not quantized. Adapter and optimizer
            are always float32.
        reason: half a sentence for the operator.
    """

    dtype: torch.dtype
    reason: str


def precision_for(device: torch.device) -> Precision:
    """The precision of a device: bfloat16 on a GPU that has units for it, float32 elsewhere.

    A CPU always gets float32, even one with bfloat16 units (AMX, AVX512-BF16): the same rule
    everywhere gives the same numbers on every institution's machine, and the reference's losses.
    """
    if device.type != "cuda":
        return Precision(torch.float32, "a CPU repeats it bit for bit")
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return Precision(torch.bfloat16, "this GPU has bfloat16 units")
    return Precision(torch.float32, "this GPU has no bfloat16 units")


@dataclass(frozen=True)
class Placement:
    """Where this process computes, and its limits.

    Attributes:
        device: the CPU, or the one GPU that this process sees.
        precision: what it computes in.
        threads: CPU threads of torch.
        memory_bytes: the slice of the GPU's memory; None where nothing limits it.
        reason: why this device, half a sentence.
    """

    device: torch.device
    precision: Precision
    threads: int
    memory_bytes: int | None
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations and of base weights that are not quantized."""
        return self.precision.dtype

    def __str__(self) -> str:
        """One line for the log: device, limits, precision, and the reasons."""
        name = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        memory = "" if self.memory_bytes is None else f", at most {self.memory_bytes / GIB:.2f} GiB"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{name} ({self.reason}{memory}), {threads}, {kind} ({self.precision.reason})"

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Turn running out of memory inside the block into an error that names the slice.

        The limits themselves are in force since ``place``.

        Raises:
            AppError: the block needed more memory than there is for it.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise self._out_of_memory() from error

    def _out_of_memory(self) -> AppError:
        if self.memory_bytes is None:
            return AppError(
                f"this round needs more memory than {self.device} has free",
                "lower train.seq-length, use a smaller model, or stop what else runs there",
            )
        return AppError(
            f"this round needs more than the node's slice of {self.memory_bytes / GIB:.2f} GiB",
            "give the node a larger share of the GPU in the roster, or lower train.seq-length",
        )


def place(node_config: Mapping[str, object], threads: int = 0) -> Placement:
    """Choose this process's device and enforce its limits. Call before loading a model.

    Each limit is read from ``node_config`` or, where that has no such key, from the environment
    that the SuperNode gives its ClientApps:

    - ``cpus``, else ``OMP_NUM_THREADS``: threads of torch (whole cores, at least one). ``threads``,
      if the run sets it, overrides both: the number of threads decides how a sum is split and so
      its last bits, and clients whose results are to agree need the same number;
    - ``gpu-device``, else ``CUDA_VISIBLE_DEVICES``: an index or a GPU or MIG UUID; empty: no GPU;
    - ``gpu-memory-fraction``, else ``MEDFED_GPU_MEMORY``: share of that device's memory;
    - ``mps-thread-percentage``: share of its multiprocessors, where NVIDIA's MPS daemon runs.

    On a machine without a GPU a node with a GPU slice runs on its CPU share; ``reason`` says so.

    Raises:
        AppError: a value is out of range, or this process has initialized CUDA already, so that the
            slice can no longer be enforced.
    """
    threads = threads or _threads(node_config)
    torch.set_num_threads(threads)
    asked = str(node_config.get("gpu-device", os.environ.get("CUDA_VISIBLE_DEVICES", "any")))
    share = _share(
        node_config.get("gpu-memory-fraction", os.environ.get("MEDFED_GPU_MEMORY")),
        "gpu-memory-fraction",
        1,
    )
    percentage = _share(node_config.get("mps-thread-percentage"), "mps-thread-percentage", 100)
    _show_only(node_config, percentage)
    if asked == "" or not torch.cuda.is_available():
        reason = "no GPU asked for" if asked == "" else "this machine shows no GPU"
        device = torch.device("cpu")
        return Placement(device, precision_for(device), threads, None, reason)
    device = torch.device("cuda", 0)
    memory = None
    if share is not None:
        torch.cuda.set_per_process_memory_fraction(share, device)
        memory = int(share * torch.cuda.get_device_properties(device).total_memory)
    reason = "the first GPU in sight" if asked == "any" else f"device {asked}"
    return Placement(device, precision_for(device), threads, memory, reason)


def _threads(node_config: Mapping[str, object]) -> int:
    cpus = node_config.get("cpus", os.environ.get("OMP_NUM_THREADS"))
    if cpus is None:
        return torch.get_num_threads()
    try:
        number = float(str(cpus))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise AppError(
            f"cpus: expected a number of CPU cores above 0, found {cpus!r}",
            "mend the node's entry in the roster (or OMP_NUM_THREADS)",
        )
    return max(1, int(number))


def _share(value: object, key: str, most: int) -> float | None:
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise AppError(
            f"{key}: expected a number above 0 and at most {most}, found {value!r}",
            "mend the node's slice in the roster",
        )
    return number


def _show_only(node_config: Mapping[str, object], mps_percentage: float | None) -> None:
    """Hide every GPU but the node's own from CUDA, which reads these variables once."""
    wanted = {}
    if "gpu-device" in node_config:
        wanted["CUDA_VISIBLE_DEVICES"] = str(node_config["gpu-device"])
    if mps_percentage is not None:
        wanted["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{mps_percentage:g}"
    late = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    if late and torch.cuda.is_initialized():
        name, value = next(iter(late.items()))
        raise AppError(
            f"expected {name}={value} before this process touches a GPU, found CUDA in use",
            "call place() first in a fresh process",
        )
    os.environ.update(wanted)


_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or _OUT_OF_MEMORY.search(str(error)) is not None


class PeakMemory:
    """Peak memory of this process on a device since this object was made.

    On a GPU: what torch has reserved there, because a slice has to hold that. On a CPU: the
    resident set, libraries and weights included, by the kernel's high-water mark. Where the kernel
    does not let a process reset that mark, the peak is counted from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset VmHWM
        except OSError:
            return

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(found.group(1)) * 1024
