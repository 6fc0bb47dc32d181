"""A client of the SuperLink's Control API: register SuperNodes, see who is online, start runs.

Flower's own client, many requests in one process: twenty calls of ``flwr supernode register`` spend
35 s on starting Python, this spends well under a second on the same work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common import files, keys
from common.errors import SuperLinkError
from compat.control_api import (
    HEARTBEAT_PATIENCE,
    CliClientHttpInterceptor,
    ControlHttpClient,
    Fab,
    FlowerError,
    ListNodesRequest,
    ListRunsRequest,
    NodeInfo,
    RegisterNodeRequest,
    RuntimeVersionHttpInterceptor,
    SimulationConfig,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
    fab_to_proto,
    user_config_to_proto,
)

_POLL_S = 0.5


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink knows it.

    Args:
        node_id: its random id at this SuperLink.
        name: the name it was registered under; "" if it was registered without one.
        status: "registered" (never seen), "online" or "offline".
        last_seen: its last heartbeat, or when it was missed, UTC; None if it was never online.
        activated: when it last came online, UTC; None if it never did.
        public_key: PEM (SubjectPublicKeyInfo).
    """

    node_id: int
    name: str
    status: str
    last_seen: datetime | None
    activated: datetime | None
    public_key: bytes

    @property
    def online(self) -> bool:
        """Whether its heartbeats arrive."""
        return self.status == "online"


@dataclass(frozen=True)
class Registration:
    """One SuperNode that may connect.

    Args:
        name: its name.
        node_id: its id at this SuperLink.
        new: True if this call registered it, False if it was registered before.
    """

    name: str
    node_id: int
    new: bool


@dataclass(frozen=True)
class Run:
    """A run as the SuperLink knows it.

    Args:
        run_id: its id.
        status: "pending", "starting", "running", or for a finished one "completed", "failed" or
            "stopped".
        details: what the SuperLink says about a failure; "" if nothing.
        bytes_sent: bytes sent to SuperNodes so far.
        bytes_received: bytes received from SuperNodes so far.
    """

    run_id: int
    status: str
    details: str
    bytes_sent: int
    bytes_received: int

    @property
    def finished(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in {"completed", "failed", "stopped"}


class Control:
    """A connection to one SuperLink's Control API, for use in a ``with`` statement.

    Args:
        address: ``HOST:PORT``.
        ca: the federation's CA certificate; None for one on this machine without TLS, as Flower's
            simulation has it.

    Raises:
        SuperLinkError: the CA certificate cannot be read. Every method raises it too when the
            SuperLink cannot be reached, is not this CA's, or refuses.
    """

    def __init__(self, address: str, ca: Path | None = None) -> None:
        self.address = address
        self._ca = ca
        try:
            certificate = None if ca is None else ca.read_bytes()
        except OSError as error:
            raise SuperLinkError(
                f"expected the CA certificate at {ca}, found: {error.strerror}",
                "`medfed certs issue` makes one; a coordinator elsewhere hands it out",
            ) from None
        try:
            self._client = ControlHttpClient.from_server_address(
                address,
                insecure=certificate is None,
                root_certificates=certificate,
                interceptors=[
                    CliClientHttpInterceptor(),
                    RuntimeVersionHttpInterceptor(component_name="flwr CLI"),
                ],
            )
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise SuperLinkError(
                f"expected a PEM certificate in {ca}, found: {error}", "give ca.crt"
            ) from None

    def __enter__(self) -> Self:
        """This client, to be closed at the end of the ``with`` statement."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self._client.close()

    def nodes(self) -> list[Node]:
        """All SuperNodes that may connect, by name. Those that were unregistered are left out."""
        with self._told():
            response = self._client.ListNodes(ListNodesRequest())
        nodes = [_node(info) for info in response.nodes_info if info.status != "unregistered"]
        return sorted(nodes, key=lambda node: (node.name, node.node_id))

    def register(self, public_keys: Mapping[str, Path]) -> list[Registration]:
        """Let SuperNodes connect. A name that is registered with the same key is left as it is.

        Args:
            public_keys: each SuperNode's name and public key (OpenSSH format).

        Raises:
            SuperLinkError: also when a name has another key, or a key another name; nothing has
                been registered then.
        """
        wanted = {name: _public_key(path) for name, path in public_keys.items()}
        known = self.nodes()
        by_name = {node.name: node for node in known if node.name}
        by_key = {node.public_key: node for node in known}
        for name, key in wanted.items():
            self._check_conflicts(name, key, by_name, by_key)
        registrations = []
        for name, key in wanted.items():
            if name in by_name:
                registrations.append(Registration(name, by_name[name].node_id, new=False))
                continue
            with self._told(f"to register {name}"):
                response = self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            registrations.append(Registration(name, int(response.node_id), new=True))
        return registrations

    def unregister(self, public_keys: Iterable[bytes]) -> list[str]:
        """Let the SuperNodes with these keys (PEM) connect no more; the names of those who could.

        What one of them is working on is answered for it with an error: a round goes on.
        """
        unwanted = {key.strip() for key in public_keys}
        gone = [node for node in self.nodes() if node.public_key.strip() in unwanted]
        for node in gone:
            with self._told(f"to unregister {node.name or node.node_id}"):
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        return [node.name or str(node.node_id) for node in gone]

    def _check_conflicts(
        self, name: str, key: bytes, by_name: Mapping[str, Node], by_key: Mapping[bytes, Node]
    ) -> None:
        if name in by_name and by_name[name].public_key != key:
            raise SuperLinkError(
                f"expected {name} to be registered with this key, found it registered with another",
                f"if its key was replaced: flwr supernode unregister {by_name[name].node_id} "
                "local-deployment, then register it again",
            )
        if key in by_key and by_key[key].name != name:
            raise SuperLinkError(
                f"expected the key of {name} to be its own, found it registered as "
                f"{by_key[key].name or by_key[key].node_id}",
                "one key, one SuperNode: issue a key pair for each",
            )

    def wait_online(
        self,
        names: Sequence[str],
        deadline_s: float,
        on_progress: Callable[[list[Node]], None] | None = None,
    ) -> list[Node]:
        """Return the nodes of ``names`` once all of them are online.

        Args:
            names: whom to wait for.
            deadline_s: seconds to wait at most.
            on_progress: called after every look with those of ``names`` that are online; what it
                raises ends the wait.

        Raises:
            SuperLinkError: not all are online at the deadline; the message names who is missing.
        """
        end = time.monotonic() + deadline_s
        before: dict[int, datetime | None] = {}
        while True:
            now = [node for node in self.nodes() if node.online and node.name in set(names)]
            # A SuperNode that asks whether it may connect is online for an instant: look twice.
            online = [node for node in now if before.get(node.node_id) == node.activated]
            before = {node.node_id: node.activated for node in now}
            if on_progress is not None:
                on_progress(online)
            missing = sorted(set(names) - {node.name for node in online})
            if not missing:
                return online
            if time.monotonic() >= end:
                raise SuperLinkError(
                    f"expected {len(names)} SuperNodes online within {deadline_s:.0f} s, found "
                    f"{len(online)}; missing: {', '.join(missing)}",
                    "the log of a missing SuperNode says why",
                )
            time.sleep(_POLL_S)

    def start_run(
        self,
        fab: bytes,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        *,
        simulate: int | None = None,
    ) -> int:
        """Start a run of a built Flower App; the run's id.

        Args:
            fab: the FAB's bytes, for example of ``flwr.cli.build.build_fab_from_disk``.
            run_config: what overrides the FAB's own run config.
            simulate: at a SuperLink that simulates: how many SuperNodes, with one core each.
        """
        import hashlib

        content = Fab(hashlib.sha256(fab).hexdigest(), fab, {})
        request = StartRunRequest(
            fab=fab_to_proto(content),
            override_config=user_config_to_proto(dict(run_config or {})),
        )
        if simulate is not None:
            request.override_federation_config.CopyFrom(
                SimulationConfig(num_supernodes=simulate, client_resources_num_cpus=1)
            )
        with self._told("to start the run"):
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise SuperLinkError(
                f"expected the SuperLink to start the run, found: {response.note or 'no run id'}",
                "its log says why",
            )
        return int(response.run_id)

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        with self._told():
            response = self._client.ListRuns(ListRunsRequest())
        found = sorted(response.run_dict.values(), key=lambda run: str(run.pending_at))
        return [
            Run(
                run_id=int(run.run_id),
                status=str(run.status.sub_status or run.status.status),
                details=str(run.status.details),
                bytes_sent=int(run.bytes_sent),
                bytes_received=int(run.bytes_recv),
            )
            for run in found
        ]

    def run(self, run_id: int) -> Run:
        """One run.

        Raises:
            SuperLinkError: also when there is no such run.
        """
        for run in self.runs():
            if run.run_id == run_id:
                return run
        raise SuperLinkError(f"expected run {run_id} at {self.address}, found no such run")

    def stop_run(self, run_id: int) -> bool:
        """Stop a run; whether there was anything to stop."""
        with self._told(f"to stop run {run_id}"):
            return bool(self._client.StopRun(StopRunRequest(run_id=run_id)).success)

    def logs(self, run_id: int) -> Iterator[str]:
        """The ServerApp's log, piece by piece as it is written, until the run ends."""
        with self._told(f"to send the log of run {run_id}"):
            for response in self._client.StreamLogs(StreamLogsRequest(run_id=run_id)):
                yield str(response.log_output)

    @contextmanager
    def _told(self, what: str = "to answer") -> Iterator[None]:
        """Turn what can go wrong with a request into one line."""
        where = f"the SuperLink at {self.address}"
        try:
            yield
        except httpx.HTTPStatusError as error:
            told = FlowerError.from_json(error.response.text)
            found = told.message if told else f"HTTP status {error.response.status_code}"
            if told and told.public_details:
                found = f"{found} {told.public_details}"
            raise SuperLinkError(f"expected {where} {what}, found: {found}", "") from None
        except httpx.TransportError as error:
            hint = "is it running? `medfed status`, or `docker compose ps`"
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                hint = f"is {self._ca} this federation's CA, and the address in the certificate?"
            raise SuperLinkError(f"expected {where} {what}, found: {error}", hint) from None


def _public_key(path: Path) -> bytes:
    content = files.read(path, SuperLinkError)
    if content is None:
        raise SuperLinkError(
            f"expected the public key {path}, found no such file",
            "`medfed certs issue` makes key pairs; a hospital sends its .pub file",
        )
    key = keys.public_key(content, path, SuperLinkError, "ask for the .pub file again")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _node(info: NodeInfo) -> Node:
    last_seen = None
    if info.status == "online":
        # Not told by Flower, but a heartbeat sets online_until this far into the future.
        seen = info.online_until - HEARTBEAT_PATIENCE * info.heartbeat_interval
        last_seen = datetime.fromtimestamp(seen, UTC)
    elif info.last_deactivated_at:
        last_seen = datetime.fromisoformat(info.last_deactivated_at)
    return Node(
        node_id=int(info.node_id),
        name=str(info.name),
        status=str(info.status),
        last_seen=last_seen,
        activated=(
            datetime.fromisoformat(info.last_activated_at) if info.last_activated_at else None
        ),
        public_key=bytes(info.public_key),
    )
