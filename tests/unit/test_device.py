from __future__ import annotations

import os

import pytest
import torch

from app.errors import AppError
from app.training import device
from app.training.device import GIB, PeakMemory, Placement, place, precision_for

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "MEDFED_GPU_MEMORY",
    "OMP_NUM_THREADS",
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """No variables from outside, and none left behind; the threads of before come back."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what place() sets
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu(monkeypatch):
    """CUDA as torch shows it on a machine with one GPU of 80 GiB; returns what was asked of it."""
    asked = {}
    properties = type("Properties", (), {"total_memory": 80 * GIB})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: asked.get("initialized", False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: asked.get("units", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, where: asked.update(fraction=fraction, where=where),
    )
    return asked


def test_a_cpu_computes_in_float32():
    assert precision_for(CPU).dtype == torch.float32


@pytest.mark.parametrize(("units", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_a_gpu_computes_in_bfloat16_where_it_has_units_for_it(gpu, units, dtype):
    gpu["units"] = units
    assert precision_for(torch.device("cuda", 0)).dtype == dtype


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (0.25, 1), (2.5, 2), ("3", 3)])
def test_threads_are_the_whole_cores_of_the_node_s_share(cpus, threads):
    assert place({"cpus": cpus}).threads == threads
    assert torch.get_num_threads() == threads


def test_threads_come_from_the_supernode_s_environment_where_the_config_is_silent(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert place({}).threads == 3
    assert place({"cpus": 2}).threads == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cpus", 0),
        ("cpus", "many"),
        ("cpus", "nan"),
        ("gpu-memory-fraction", 0),
        ("gpu-memory-fraction", 1.5),
        ("gpu-memory-fraction", "half"),
        ("mps-thread-percentage", 101),
    ],
)
def test_a_share_out_of_range_is_refused(key, value):
    with pytest.raises(AppError, match=f"{key}: expected a number .* found {value!r}"):
        place({key: value})


def test_a_gpu_slice_on_a_machine_without_a_gpu_runs_on_the_cpu_share_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placement = place({"gpu-device": "0", "gpu-memory-fraction": 0.1, "cpus": 1})
    assert placement.device == CPU
    assert placement.memory_bytes is None
    assert str(placement).startswith("cpu (this machine shows no GPU), 1 thread, float32 (")


def test_a_gpu_slice_shows_one_device_and_limits_its_memory(gpu):
    placement = place(
        {
            "gpu-device": "MIG-7f3c",
            "gpu-memory-fraction": 0.025,
            "mps-thread-percentage": 20,
            "cpus": 1,
        }
    )
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-7f3c"
    assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "20"
    assert gpu["fraction"] == 0.025
    assert gpu["where"] == placement.device == torch.device("cuda", 0)
    assert placement.memory_bytes == 2 * GIB
    assert str(placement).startswith("NVIDIA H100 (device MIG-7f3c, at most 2.00 GiB), 1 thread")


def test_a_gpu_slice_can_come_from_the_supernode_s_environment(gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("MEDFED_GPU_MEMORY", "0.5")
    assert place({}).memory_bytes == 40 * GIB
    assert gpu["fraction"] == 0.5


def test_a_node_that_is_shown_no_gpu_uses_none(gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert place({}).device == CPU
    assert "fraction" not in gpu


def test_a_gpu_without_a_share_has_no_limit(gpu):
    assert place({}).memory_bytes is None
    assert "fraction" not in gpu


def test_a_slice_that_comes_after_cuda_was_touched_is_refused(gpu):
    gpu["initialized"] = True
    with pytest.raises(AppError, match="CUDA_VISIBLE_DEVICES=1 before this process touches a GPU"):
        place({"gpu-device": "1"})


def sliced():
    return Placement(torch.device("cuda", 0), precision_for(CPU), 1, 2 * GIB, "device 0")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_a_round_that_exceeds_its_slice_is_told_the_slice(gpu, error):
    with (
        pytest.raises(AppError, match=r"needs more than the node's slice of 2\.00 GiB") as caught,
        sliced().enforced(),
    ):
        raise error
    assert "roster" in caught.value.hint


def test_a_cpu_out_of_memory_is_an_error_of_one_line_too():
    with pytest.raises(AppError, match="needs more memory than cpu has free"), place({}).enforced():
        torch.empty(2**60, dtype=torch.uint8)


def test_any_other_failure_passes_unchanged(gpu):
    with pytest.raises(RuntimeError, match="shapes do not match"), sliced().enforced():
        raise RuntimeError("shapes do not match")


def test_the_peak_of_memory_is_seen_though_it_was_freed():
    peak = PeakMemory(CPU)
    before = peak.bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert 60 * 2**20 < peak.bytes() - before < 200 * 2**20


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this kernel keeps its mark"
)
def test_a_new_measurement_forgets_the_peak_before_it():
    peak = PeakMemory(CPU)
    block = torch.ones(128 * 2**20, dtype=torch.uint8)
    del block
    high = peak.bytes()
    assert PeakMemory(CPU).bytes() < high - 120 * 2**20


def test_without_a_proc_file_system_the_peak_is_the_process_s(monkeypatch):
    def missing(*_args):
        raise OSError

    monkeypatch.setattr(device.Path, "read_text", missing)
    monkeypatch.setattr(device.Path, "write_text", missing)
    assert PeakMemory(CPU).bytes() > 2**20
