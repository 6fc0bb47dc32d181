"""What Flower's SuperNode is started with: its arguments and its environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import SuperNodeError

from .roster import SuperNodeEntry

# Every library that starts a pool of threads looks at one of these.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
)

DEFAULT_RUNTIME_PORT = 9094
# Has a `flwr-clientapp` that hands each message to the warm process.
WARM_BIN = Path(__file__).parent / "warm" / "bin"


@dataclass(frozen=True)
class Settings:
    """One SuperNode, ready to start.

    Args:
        entry: its line of the roster.
        partition: the id of the partition in ``data``, 0-based.
        num_partitions: how many partitions the data is cut into.
        superlink: ``HOST:PORT`` of the SuperLink.
        ca: the federation's CA certificate.
        key: this SuperNode's private key.
        public_keys: the folder with ``NAME.pub`` (and perhaps those of others).
        data: the folder with its rows.
        runtime_port: the local port on which its ClientApps talk to it.
        use_gpu: give ClientApps the roster's slice of a GPU; else they see no GPU at all.
        site: the folder with this hospital's policy; None: there is no gate.
        audit: the audit log's folder; None: in ``site``.
    """

    entry: SuperNodeEntry
    partition: int
    num_partitions: int
    superlink: str
    ca: Path
    key: Path
    public_keys: Path
    data: Path
    runtime_port: int = DEFAULT_RUNTIME_PORT
    use_gpu: bool = False
    site: Path | None = None
    audit: Path | None = None

    @property
    def name(self) -> str:
        """The SuperNode's name in the roster."""
        return self.entry.name

    @property
    def superlink_host(self) -> str:
        """The host of ``superlink``: the name that the SuperLink's certificate must carry."""
        return split_address(self.superlink)[0]

    @property
    def superlink_port(self) -> int:
        """The port of ``superlink``."""
        return split_address(self.superlink)[1]


def split_address(address: str) -> tuple[str, int]:
    """Take ``HOST:PORT`` (or ``[IPV6]:PORT``) apart.

    Raises:
        SuperNodeError: it has another form.
    """
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SuperNodeError(
            f"expected the SuperLink's address as HOST:PORT, found {address!r}",
            "for example superlink.example.org:8000, without https://",
        )
    return host, int(port)


def node_config(settings: Settings) -> str:
    """The ``--node-config`` text that the ClientApp reads back as ``context.node_config``.

    Raises:
        SuperNodeError: the data path has a quote or line break, which Flower's format cannot carry.
    """
    data = str(settings.data.resolve())
    if any(character in data for character in "\"'\\\r\n"):
        raise SuperNodeError(
            f"expected a data path without quotes, backslashes or line breaks, found {data!r}",
            "Flower's --node-config cannot carry them: move or mount the folder elsewhere",
        )
    return (
        f"partition-id={settings.partition} num-partitions={settings.num_partitions} "
        f'name="{settings.name}" data-path="{data}"'
    )


def arguments(settings: Settings) -> list[str]:
    """The argument list of ``flower-supernode``, its own name first."""
    return [
        "flower-supernode",
        *("--superlink", settings.superlink),
        *("--root-certificates", str(settings.ca)),
        *("--auth-supernode-private-key", str(settings.key)),
        *("--node-config", node_config(settings)),
        *("--host", "127.0.0.1"),
        *("--port", str(settings.runtime_port)),
    ]


def environment(settings: Settings, inherited: Mapping[str, str], programs: Path) -> dict[str, str]:
    """The environment of the SuperNode and of every ClientApp that it starts.

    Args:
        settings: the SuperNode.
        inherited: what to start from, usually ``os.environ``.
        programs: the folder of ``flower-superexec`` and ``flwr-clientapp``, which the SuperNode
            looks up on PATH: first there, so that no other installation is picked up.
    """
    variables = dict(inherited)
    folders = [str(programs), inherited.get("PATH", "")]
    if inherited.get("MEDFED_WARM_SOCKET"):  # ClientApps are forked from the warm process
        folders.insert(0, str(WARM_BIN))
        variables.setdefault("MEDFED_WARM_PYTHON", sys.executable)
    variables["PATH"] = ":".join(filter(None, folders))
    variables["FLWR_TELEMETRY_ENABLED"] = "0"
    variables["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    for name in _THREAD_VARIABLES:
        variables[name] = str(settings.entry.threads)
    gpu = settings.entry.gpu
    if settings.use_gpu and gpu is not None:
        # A container that was lent one device says itself under which number it sees it.
        variables.setdefault("CUDA_VISIBLE_DEVICES", gpu.device)
        variables["MEDFED_GPU_MEMORY"] = f"{gpu.memory:g}"
        if gpu.mps is not None:
            variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(gpu.mps)
    else:
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables.pop("MEDFED_GPU_MEMORY", None)
    return variables
