"""The roster: which SuperNodes there are, and what each one may use.

``roster.toml`` is the only place that says so. The Compose file is rendered from it, the process
federation is started from it, and keys, partitions and registrations go by its names.

    [defaults]                                # what a SuperNode has unless it says otherwise
    cpus = 1.0
    gpu = { device = "0", memory = 0.05 }     # used only where GPU slices are switched on

    [[supernode]]
    name = "supernode-00"
    partition = 0
    gpu = { device = "MIG-…", memory = 0.5, mps = 25 }  # or `gpu = false`: never a GPU
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from common.errors import SuperNodeError

DEFAULT_ROSTER = Path(__file__).parent / "roster.toml"

# A name is also a host name, a file name and a Compose service.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DEVICE = re.compile(r"[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+")


@dataclass(frozen=True)
class GpuSlice:
    """A share of one GPU's memory.

    Args:
        device: an index ("0") or a UUID ("GPU-…", "MIG-…"), as ``CUDA_VISIBLE_DEVICES`` takes it.
        memory: the share of that device's memory, 0 < memory <= 1.
        mps: percentage of its multiprocessors, where NVIDIA's MPS daemon runs; None: all of them.
    """

    device: str
    memory: float
    mps: int | None = None


@dataclass(frozen=True)
class SuperNodeEntry:
    """One SuperNode.

    Args:
        name: its name everywhere: key files, partition folder, registration, service.
        partition: the id of the partition it holds, 0-based.
        cpus: CPU cores it may use (may be a fraction).
        gpu: its slice of a GPU where slices are switched on; None: it never sees one.
    """

    name: str
    partition: int
    cpus: float
    gpu: GpuSlice | None

    @property
    def threads(self) -> int:
        """Threads for numerical libraries: the whole cores in ``cpus``, at least one."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Roster:
    """All SuperNodes of the federation, in the order of the file."""

    supernodes: tuple[SuperNodeEntry, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(entry.name for entry in self.supernodes)

    @property
    def num_partitions(self) -> int:
        """How many partitions the data is cut into: one for each SuperNode."""
        return len(self.supernodes)

    def entry(self, name: str) -> SuperNodeEntry:
        """The SuperNode of that name.

        Raises:
            SuperNodeError: the roster has no such name.
        """
        for entry in self.supernodes:
            if entry.name == name:
                return entry
        raise SuperNodeError(
            f"expected a SuperNode of the roster ({_span(self.names)}), found {name!r}",
            "add it to supernode/roster.toml, or use a name that is there",
        )

    def check_partition(self, partition: int) -> int:
        """Give back ``partition`` if the roster has it.

        Raises:
            SuperNodeError: it is outside 0..num_partitions-1.
        """
        if not 0 <= partition < self.num_partitions:
            raise SuperNodeError(
                f"expected a partition id from 0 to {self.num_partitions - 1}, found {partition}",
                "each SuperNode of supernode/roster.toml holds one partition",
            )
        return partition


def load(path: Path | None = None) -> Roster:
    """Read and check a roster (default: the one beside this module).

    Raises:
        SuperNodeError: the file is missing, is not TOML, or breaks a rule (the message says which).
    """
    path = path or DEFAULT_ROSTER
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SuperNodeError(
            f"expected the roster at {path}, found no such file", "pass --roster PATH"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SuperNodeError(
            f"expected a TOML roster in {path}, found: {error}",
            "supernode/roster.toml in the repository is a working example",
        ) from None
    try:
        return parse(document)
    except SuperNodeError as error:
        raise SuperNodeError(f"{path.name}: {error}", error.hint) from None


def parse(document: Mapping[str, Any]) -> Roster:
    """Check a roster that has been read from TOML.

    Raises:
        SuperNodeError: it breaks a rule (the message says which).
    """
    _only(document, {"defaults", "supernode"}, "the roster")
    defaults = document.get("defaults", {})
    _require(isinstance(defaults, Mapping), "[defaults] to be a table", defaults)
    _only(defaults, {"cpus", "gpu"}, "[defaults]")
    tables = document.get("supernode", [])
    _require(isinstance(tables, list) and tables, "at least one [[supernode]]", tables)
    roster = Roster(tuple(_entry(table, defaults, i) for i, table in enumerate(tables)))
    _check_together(roster)
    return roster


def _entry(table: object, defaults: Mapping[str, Any], position: int) -> SuperNodeEntry:
    where = f"[[supernode]] number {position + 1}"
    if not isinstance(table, Mapping):
        raise SuperNodeError(f"expected {where} to be a table, found {table!r}")
    name = table.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SuperNodeError(
            f"expected {where} to have a name of a-z, 0-9 and '-', found {name!r}",
            'for example name = "supernode-00"',
        )
    _only(table, {"name", "partition", "cpus", "gpu"}, name)
    partition = table.get("partition")
    _require(_is_int(partition), f"{name}: partition to be a whole number", partition)
    cpus = table.get("cpus", defaults.get("cpus"))
    _require(_is_number(cpus) and cpus > 0, f"{name}: cpus to be above 0", cpus)
    gpu = _gpu(table.get("gpu", defaults.get("gpu", False)), name)
    return SuperNodeEntry(name=name, partition=int(partition or 0), cpus=float(cpus), gpu=gpu)


def _gpu(value: object, name: str) -> GpuSlice | None:
    if value is False:
        return None
    if not isinstance(value, Mapping):
        raise SuperNodeError(
            f"expected {name}: gpu to be a table or false, found {value!r}",
            'for example gpu = { device = "0", memory = 0.05 }',
        )
    _only(value, {"device", "memory", "mps"}, f"{name}: gpu")
    device, memory = value.get("device"), value.get("memory")
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise SuperNodeError(
            f"expected {name}: gpu.device to be an index or a GPU or MIG UUID, found {device!r}",
            "`nvidia-smi -L` prints both",
        )
    _require(
        _is_number(memory) and 0 < memory <= 1,  # type: ignore[operator]
        f"{name}: gpu.memory to be a share above 0 and up to 1",
        memory,
    )
    mps = value.get("mps")
    if mps is not None and (type(mps) is not int or not 0 < mps <= 100):
        raise SuperNodeError(
            f"expected {name}: gpu.mps to be a whole percentage from 1 to 100, found {mps!r}",
            "leave it out where no MPS daemon runs",
        )
    return GpuSlice(device=device, memory=float(memory), mps=mps)  # type: ignore[arg-type]


def _check_together(roster: Roster) -> None:
    """What no entry can know alone: unique names, a whole set of partitions, room on each GPU."""
    repeated = sorted({name for name in roster.names if roster.names.count(name) > 1})
    if repeated:
        raise SuperNodeError(
            f"expected every name once, found {', '.join(repeated)} more than once",
            "two hospitals cannot share a name: it is their key's and their partition's too",
        )
    partitions = sorted(entry.partition for entry in roster.supernodes)
    if partitions != list(range(roster.num_partitions)):
        raise SuperNodeError(
            f"expected the partitions 0 to {roster.num_partitions - 1}, each once, "
            f"found {', '.join(map(str, partitions))}",
            "every SuperNode holds one partition, and every partition has one SuperNode",
        )
    # Twenty times 0.05 is not 1 in binary; it is in decimal, which is what the file says.
    shares: dict[str, Fraction] = defaultdict(Fraction)
    for entry in roster.supernodes:
        if entry.gpu is not None:
            shares[entry.gpu.device] += Fraction(str(entry.gpu.memory))
    for device, share in shares.items():
        if share > 1:
            raise SuperNodeError(
                f"expected the slices of GPU {device} to add up to at most 1, "
                f"found {float(share):g}",
                "lower gpu.memory, or spread the SuperNodes over more devices",
            )


def _only(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(table) - allowed)
    if unknown:
        raise SuperNodeError(
            f"expected only {', '.join(sorted(allowed))} in {where}, found {', '.join(unknown)}",
            "see the top of supernode/roster.py for the format",
        )


def _require(condition: object, expected: str, found: object) -> None:
    if not condition:
        raise SuperNodeError(
            f"expected {expected}, found {found!r}",
            "see the top of supernode/roster.py for the format",
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _span(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}, {len(names)} in all"
