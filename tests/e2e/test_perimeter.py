"""The perimeter, on real containers: who gets through, and who is stopped, where and why.

Three SuperNodes are enough. The attacker is a program in a SuperNode's own container, as that
container's own user: what a hospital can do whose machine is no longer its own. Or it is a program
on this machine that reaches the fleet listener, as a hospital elsewhere does.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import resource
import select
import socket
import ssl
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListNodesResponse,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node as NodeMessage
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

import certs
from certs import pki
from superlink.control import Control
from superlink.gateway.config import UNKNOWN_KEY
from tests.e2e.compose_project import COORDINATOR, NAMES, ComposeProject, until

pytestmark = pytest.mark.containers

SITES = NAMES[:3]
UP = (*COORDINATOR, *SITES)
MB = 1 << 20
HEARTBEAT = "/v1/fleet/send-node-heartbeat"
LIST_NODES = "/v1/control/list-nodes"
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


@dataclass(frozen=True)
class Perimeter:
    """The federation, what its owner knows of it, and a client outside.

    Args:
        project: its Compose project.
        folder: the CA and the operator's certificate, with their keys.
        keys: each site's private key.
        ids: each site's node id.
    """

    project: ComposeProject
    folder: Path
    keys: dict[str, ec.EllipticCurvePrivateKey]
    ids: dict[str, int]

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.crt"))

    def connect(
        self, port: int, context: ssl.SSLContext | None = None
    ) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "localhost", port, timeout=30, context=context or self.trust()
        )

    def ask(
        self,
        port: int,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        context: ssl.SSLContext | None = None,
    ) -> Answer:
        connection = self.connect(port, context)
        try:
            connection.request("POST", path, body, {**PROTOBUF, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, response.read())
        finally:
            connection.close()

    def heartbeat(self, headers: dict[str, str], site: str = SITES[0]) -> Answer:
        request = SendNodeHeartbeatRequest(
            node=NodeMessage(node_id=self.ids[site]), heartbeat_interval=30
        )
        return self.ask(self.project.fleet_port, HEARTBEAT, request.SerializeToString(), headers)

    def sign(self, site: str = SITES[0], late: timedelta = timedelta()) -> dict[str, str]:
        return signed(self.keys[site], late)

    def gateway_log(self, service: str = "gateway") -> str:
        return str(self.project.container(service).logs().decode())


def signed(key: ec.EllipticCurvePrivateKey, late: timedelta = timedelta()) -> dict[str, str]:
    """The headers that Flower's SuperNode sends, by a clock that is ``late``."""
    time = (datetime.now(UTC) - late).isoformat()
    return {
        "flwr-public-key": base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": time,
        "flwr-signature": base64.b64encode(
            key.sign(time.encode(), ec.ECDSA(hashes.SHA256()))
        ).decode(),
    }


@pytest.fixture(scope="module")
def perimeter(provisioned: ComposeProject, tmp_path_factory: pytest.TempPathFactory) -> Perimeter:
    project, folder = provisioned, tmp_path_factory.mktemp("owner")
    project.compose("up", "--detach", *UP, timeout=300)
    until(
        lambda: [project.health().get(service) for service in UP] == ["healthy"] * len(UP),
        120,
        lambda: f"not healthy in time: {project.health()}",
    )
    read = "import sys; print(open(sys.argv[1]).read())"
    for name in ("ca.crt", "ca.key", "operator.crt", "operator.key"):
        content = project.compose(
            *("run", "--rm", "-T", "--entrypoint", "python", "provision"),
            *("-c", read, f"/medfed/certs/{name}"),
        ).stdout
        (folder / name).write_text(content)
        (folder / name).chmod(0o600)
    keys = {}
    for site in SITES:
        text = project.python(site, f"print(open('/site/{site}.key').read())")
        key = load_ssh_private_key(text.encode() + b"\n", None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        keys[site] = key
    with Control(f"localhost:{project.port}", folder / "ca.crt") as control:
        ids = {node.name: node.node_id for node in control.nodes()}
    return Perimeter(project, folder, keys, ids)


# --- the SuperNode's side: who it talks to ---

# Runs in a container of its own in a site's network: HTTPS or HTTP on one port each, by name.
ROGUE = """
import http.server, json, ssl, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_error(404)

def serve(port, certificate, options):
    server = http.server.ThreadingHTTPServer(("", port), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"/rogue/{certificate}.crt", f"/rogue/{certificate}.key")
        if "old" in options:
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()

for port, certificate, options in json.loads(sys.argv[1]):
    threading.Thread(target=serve, args=(port, certificate, options)).start()
"""
# port, certificate, what else; and what the SuperNode says to it
IMPOSTORS = {
    "good": (
        7001,
        "good",
        "",
        "expected a SuperLink's Fleet API at rogue:7001, found HTTP status 404",
    ),
    "wrong CA": (7002, "wrong-ca", "", "found another CA's"),
    "wrong host name": (7003, "wrong-name", "", "found one for other names"),
    "expired": (7004, "expired", "", "found one that has expired"),
    "not yet valid": (7005, "early", "", "found one that is not valid yet"),
    "plain HTTP": (7006, None, "", "found a server that does not speak it"),
    "TLS 1.1": (7007, "good", "old", "TLS handshake: .*PROTOCOL_VERSION"),
}


def server_certificate(
    folder: Path, sans: list[str], start: timedelta = timedelta(), days: int = 1
) -> tuple[bytes, bytes]:
    ca = pki.certificate_from_pem((folder / "ca.crt").read_bytes(), folder)
    ca_key = pki.key_from_pem((folder / "ca.key").read_bytes(), folder)
    key = pki.new_key()
    certificate = pki.new_superlink_certificate(
        key,
        ca,
        ca_key,
        sans,
        not_before=datetime.now(UTC) + start,
        lifetime=timedelta(days=days),
    )
    return pki.certificate_to_pem(certificate), pki.key_to_pem(key)


@pytest.fixture(scope="module")
def impostors(perimeter: Perimeter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    other = tmp_path_factory.mktemp("other")
    certs.issue(other, ())
    day = timedelta(days=1)
    ours = perimeter.folder
    pairs = {
        "good": server_certificate(ours, ["rogue"], -day / 2),
        "wrong-ca": server_certificate(other, ["rogue"], -day / 2),
        "wrong-name": server_certificate(ours, ["gateway"], -day / 2),
        "expired": server_certificate(ours, ["rogue"], -3 * day),
        "early": server_certificate(ours, ["rogue"], day),
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, pair in pairs.items():
            for suffix, content in zip(("crt", "key"), pair, strict=True):
                entry = tarfile.TarInfo(f"rogue/{name}.{suffix}")
                entry.size, entry.uid, entry.mode = len(content), 10001, 0o600
                tar.addfile(entry, io.BytesIO(content))
    plan = [[port, certificate, options] for port, certificate, options, _ in IMPOSTORS.values()]
    client = perimeter.project.client
    network = f"{perimeter.project.name}_{SITES[0]}"
    container = client.containers.create(
        "medfed/gateway:e2e",
        ["-c", ROGUE, json.dumps(plan)],
        entrypoint="python3",
        name=f"{perimeter.project.name}-rogue",
        network=network,
        networking_config={network: client.api.create_endpoint_config(aliases=["rogue"])},
    )
    try:
        container.put_archive("/", archive.getvalue())
        container.start()
        yield
    finally:
        container.remove(force=True)


def start_supernode(project: ComposeProject, service: str, *options: str, code: str = "") -> str:
    """What a second SuperNode in the container says before it gives up (or is made to)."""
    run = code or "from supernode.__main__ import main"
    status, output = project.container(service).exec_run(
        [
            *("timeout", "20", "python", "-c"),
            f"import sys; {run}\nsys.exit(main(sys.argv[1:]))",
            *("--name", service, "--superlink=gateway:8443", "--ca=/site/ca.crt"),
            *(f"--key=/site/{service}.key", "--data=/site/data", "--runtime-port=9199"),
            *("--activation-timeout=1", *options),
        ],
        environment={"FLWR_HOME": "/medfed/second"},
    )
    assert status != 0, "nobody may become a SuperNode here"
    return str(output.decode())


@pytest.fixture(scope="module")
def met(perimeter: Perimeter, impostors: None) -> dict[str, str]:
    """What SuperNode 00 says to each impostor."""

    def meet(port: int) -> str:
        return start_supernode(
            perimeter.project,
            SITES[0],
            f"--superlink=rogue:{port}",
            f"--runtime-port={port + 1000}",
        )

    with ThreadPoolExecutor(2) as pool:
        said = pool.map(meet, [port for port, *_ in IMPOSTORS.values()])
    return dict(zip(IMPOSTORS, said, strict=True))


@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_a_supernode_talks_to_the_federations_gateway_alone(
    met: dict[str, str], impostor: str
) -> None:
    *_, reason = IMPOSTORS[impostor]
    assert re.search(reason, met[impostor]), met[impostor]


# --- the gateway's side: TLS ---


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_the_gateway_speaks_tls_1_2_and_1_3_and_says_why_it_speaks_nothing_else(
    perimeter: Perimeter,
) -> None:
    for port in (perimeter.project.fleet_port, perimeter.project.port):
        for version in ("TLSv1_3", "TLSv1_2", "TLSv1_1"):
            context = perimeter.trust()
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
            if version == "TLSv1_1":
                with pytest.raises(ssl.SSLError, match=r"(?i)protocol[ _]version"):
                    perimeter.ask(port, "/", context=context)
            else:
                assert perimeter.ask(port, "/", context=context).status == 403
        plain = http.client.HTTPConnection("localhost", port, timeout=30)
        plain.request("GET", "/")
        response = plain.getresponse()
        assert (response.status, b"plain HTTP request" in response.read()) == (400, True)
        plain.close()


# --- signatures ---


def test_a_sites_own_signature_is_accepted_and_its_name_is_in_the_log(
    perimeter: Perimeter,
) -> None:
    assert perimeter.heartbeat(perimeter.sign()).status == 200
    lines = [line for line in perimeter.gateway_log().splitlines() if line.startswith("{")]
    asked = [json.loads(line) for line in lines]
    assert {one["institution"] for one in asked if one["superlink"] == "200"} >= set(SITES)


def test_an_unregistered_key_is_refused_at_the_gateway(perimeter: Perimeter) -> None:
    answer = perimeter.heartbeat(signed(ec.generate_private_key(ec.SECP384R1())))
    assert (answer.status, answer.text.strip()) == (401, UNKNOWN_KEY)


def test_a_supernode_with_an_unregistered_key_is_told_so(perimeter: Perimeter) -> None:
    code = f"""
import os, pathlib
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import *
from supernode.__main__ import main
key = ec.generate_private_key(ec.SECP384R1())
place = pathlib.Path("/tmp/{SITES[1]}.key")
place.touch(0o600)
place.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
place.with_suffix(".pub").write_bytes(public)
"""
    said = start_supernode(perimeter.project, SITES[1], f"--key=/tmp/{SITES[1]}.key", code=code)
    assert f"expected the key of {SITES[1]} to be registered" in said


def test_another_institutions_identity_is_refused(perimeter: Perimeter) -> None:
    own, others = perimeter.sign(SITES[0]), perimeter.sign(SITES[1])
    assert perimeter.heartbeat(others, SITES[1]).status == 200
    as_node = perimeter.heartbeat(own, SITES[1])
    claimed = {**perimeter.sign(SITES[0]), "flwr-public-key": others["flwr-public-key"]}
    as_key = perimeter.heartbeat(claimed, SITES[1])
    for answer in (as_node, as_key):
        assert (answer.status, "Invalid SuperNode authentication" in answer.text) == (401, True)


def test_a_supernode_with_another_institutions_key_file_does_not_start(
    perimeter: Perimeter,
) -> None:
    said = start_supernode(perimeter.project, SITES[0], f"--name={SITES[1]}")
    assert f"expected the public key of {SITES[1]}" in said


def test_two_nodes_with_one_key_are_one_too_many(perimeter: Perimeter) -> None:
    said = start_supernode(perimeter.project, SITES[2])
    assert "found that a SuperNode with its key counts as online" in said


def test_a_signature_is_good_once_on_any_path(perimeter: Perimeter) -> None:
    captured = perimeter.sign()
    assert perimeter.heartbeat(captured).status == 200
    again = perimeter.heartbeat(captured)
    assert (again.status, "Replayed SuperNode authentication" in again.text) == (401, True)
    pull = PullMessagesRequest(node=NodeMessage(node_id=perimeter.ids[SITES[0]]))
    elsewhere = perimeter.ask(
        perimeter.project.fleet_port,
        "/v1/fleet/pull-messages",
        pull.SerializeToString(),
        captured,
    )
    assert (elsewhere.status, "Replayed" in elsewhere.text) == (401, True)


def test_a_second_signature_made_out_of_a_captured_one_is_a_replay(perimeter: Perimeter) -> None:
    order = int(
        "ffffffffffffffffffffffffffffffffffffffffffffffff"
        "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
        16,
    )
    captured = perimeter.sign()
    r, s = decode_dss_signature(base64.b64decode(captured["flwr-signature"]))
    twin = base64.b64encode(encode_dss_signature(r, order - s)).decode()
    # It is a good signature: as the first to arrive it is accepted.
    assert perimeter.heartbeat({**captured, "flwr-signature": twin}).status == 200
    answer = perimeter.heartbeat(captured)
    assert (answer.status, "Replayed" in answer.text) == (401, True)


@pytest.mark.parametrize(
    ("late", "status"),
    [(timedelta(minutes=4), 200), (timedelta(minutes=6), 401), (timedelta(minutes=-1), 401)],
)
def test_a_stale_or_future_signature_is_refused(
    perimeter: Perimeter, late: timedelta, status: int
) -> None:
    answer = perimeter.heartbeat(perimeter.sign(late=late))
    assert answer.status == status
    assert ("Invalid SuperNode authentication" in answer.text) == (status == 401)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_supernode_whose_clock_is_off_by_an_hour_is_told_about_its_clock(
    perimeter: Perimeter, hours: int
) -> None:
    code = f"""
import datetime
from flwr.supernode import node_auth_http_interceptor as signer
right = signer.now
signer.now = lambda: right() + datetime.timedelta(hours={hours})
from supernode.__main__ import main
"""
    said = start_supernode(perimeter.project, SITES[2], code=code)
    assert "found it denied" in said
    assert "is this machine's clock right?" in said


# --- which API ---

CALLS = {
    "/v1/control/start-run": StartRunRequest(),
    "/v1/control/stop-run": StopRunRequest(run_id=1),
    "/v1/control/register-node": RegisterNodeRequest(public_key=b"x", name="mallory"),
    "/v1/control/stream-logs": StreamLogsRequest(run_id=1),
    LIST_NODES: ListNodesRequest(),
}
ATTEMPT = """
import base64, json, ssl, sys, http.client
calls = json.loads({calls!r})
context = ssl.create_default_context(cafile="/site/ca.crt")
for path, body, headers in calls:
    connection = http.client.HTTPSConnection("gateway", 8443, timeout=30, context=context)
    connection.request("POST", path, base64.b64decode(body), headers)
    response = connection.getresponse()
    print(response.status, response.read().decode("utf-8", "replace").strip())
"""


def test_a_supernode_cannot_call_the_control_or_the_runtime_api(perimeter: Perimeter) -> None:
    beat = SendNodeHeartbeatRequest(
        node=NodeMessage(node_id=perimeter.ids[SITES[0]]), heartbeat_interval=30
    )
    calls: list[tuple[str, str, dict[str, str]]] = []
    for path, message in {
        HEARTBEAT: beat,
        **CALLS,
        "/v1/runtime/acquire-task": AcquireTaskRequest(),
    }.items():
        body = base64.b64encode(message.SerializeToString()).decode()
        calls.append((path, body, {**PROTOBUF, **perimeter.sign()}))
    said = perimeter.project.python(SITES[0], ATTEMPT.format(calls=json.dumps(calls)))
    first, *rest = said.splitlines()
    assert first.startswith("200"), "its own API, with the same signature, from the same place"
    assert rest == ["403 the gateway passes /v1/fleet/ alone here"] * (len(calls) - 1)


def test_an_operator_on_this_machine_can_call_the_control_api_and_no_other(
    perimeter: Perimeter,
) -> None:
    port = perimeter.project.port
    answer = perimeter.ask(port, LIST_NODES, ListNodesRequest().SerializeToString())
    assert answer.status == 200
    names = {node.name for node in ListNodesResponse.FromString(answer.body).nodes_info}
    assert names >= set(SITES)
    for path in ("/v1/runtime/acquire-task", HEARTBEAT, "/health", "/docs"):
        refused = perimeter.ask(port, path, headers=perimeter.sign())
        assert (refused.status, "passes /v1/control/ alone" in refused.text) == (403, True)


def test_a_remote_operator_needs_a_certificate_of_the_operator_role(
    perimeter: Perimeter, tmp_path: Path
) -> None:
    port = perimeter.project.remote_port
    without = perimeter.ask(port, LIST_NODES)
    assert (without.status, "No required SSL certificate" in without.text) == (400, True)
    certs.issue(tmp_path, ())
    for folder, status in ((perimeter.folder, 200), (tmp_path, 400)):
        certificate = folder / "operator.crt"
        context = perimeter.trust()
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        assert perimeter.ask(port, LIST_NODES, context=context).status == status
        runtime = perimeter.ask(port, "/v1/runtime/acquire-task", context=context)
        assert runtime.status == (403 if status == 200 else 400)
    assert '"operator":"medfed operator","certificate":"SUCCESS"' in perimeter.gateway_log(
        "operator"
    )


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/..%2fcontrol%2flist-nodes",
        "/v1/fleet/%252e%252e/control/list-nodes",
        "/v1/control%2flist-nodes",
        "/v1//control/list-nodes",
        "//v1/control/list-nodes",
        "/v1/fleet//send-node-heartbeat",
        "/v1/fleet/..;/control/list-nodes",
        "/v1/fleet/send-node-heartbeat?/../../control/list-nodes",
        "https://superlink/v1/control/list-nodes",
    ],
)
def test_a_path_by_any_other_spelling_stops_at_the_gateway(perimeter: Perimeter, path: str) -> None:
    answer = perimeter.ask(perimeter.project.fleet_port, path, headers=perimeter.sign())
    assert answer.status in {400, 403}
    assert "nginx" in answer.text or "passes /v1/fleet/ alone" in answer.text


# --- who reaches whom ---

REACH = """
import json, socket
from concurrent.futures import ThreadPoolExecutor

def reach(place):
    try:
        socket.create_connection(place, timeout=5).close()
    except OSError:
        return "not reached"
    return "reached"

places = json.loads({places!r})
print(json.dumps(list(ThreadPoolExecutor(len(places)).map(reach, map(tuple, places)))))
"""
LISTEN = """
import socket, time
server = socket.create_server(("0.0.0.0", 7777))
while True:
    server.accept()
"""


def reach(perimeter: Perimeter, service: str, places: list[tuple[str, int]]) -> list[str]:
    code = REACH.format(places=json.dumps(places))
    found: list[str] = json.loads(perimeter.project.python(service, code))
    return found


def addresses(perimeter: Perimeter, service: str) -> list[str]:
    container = perimeter.project.container(service)
    networks = container.attrs["NetworkSettings"]["Networks"]
    return [network["IPAddress"] for network in networks.values()]


def test_a_site_reaches_the_fleet_listener_and_neither_operator_nor_superlink(
    perimeter: Perimeter,
) -> None:
    gateway = perimeter.project.container("gateway")
    network = f"{perimeter.project.name}_{SITES[0]}"
    near = gateway.attrs["NetworkSettings"]["Networks"][network]["IPAddress"]
    others = [(address, 8443) for address in addresses(perimeter, "gateway") if address != near]
    places = [
        *((name, port) for name in ("operator", "superlink") for port in (8000, 8443)),
        *((address, port) for address in addresses(perimeter, "operator") for port in (8000, 8443)),
        *((address, 8000) for address in addresses(perimeter, "superlink")),
        (near, 8000),
        (near, 8001),
        *others[:3],
    ]
    assert reach(perimeter, SITES[0], [("gateway", 8443), (near, 8443)]) == ["reached"] * 2
    assert reach(perimeter, SITES[0], places) == ["not reached"] * len(places)
    # They are there, and listen: the gateway itself reaches the SuperLink.
    assert reach(perimeter, "gateway", [("superlink", 8000)]) == ["reached"]


def test_no_institution_reaches_another_the_internet_or_this_machine(
    perimeter: Perimeter,
) -> None:
    project = perimeter.project
    (there,) = addresses(perimeter, SITES[1])
    project.container(SITES[1]).exec_run(["timeout", "60", "python", "-c", LISTEN], detach=True)
    until(
        lambda: reach(perimeter, SITES[1], [(there, 7777)]) == ["reached"],
        30,
        lambda: "the other site does not listen to itself",
    )
    with socket.create_server(("", 0)) as here:
        port = int(here.getsockname()[1])
        machine = [(_own_address(), port), (f"{project.subnets}.253.1", port)]
        places = [
            (SITES[1], 7777),
            (there, 7777),
            ("1.1.1.1", 53),
            ("example.org", 443),
            *machine,
            *((f"{project.subnets}.{number}.1", port) for number in (0, 1, 254, 255)),
        ]
        assert reach(perimeter, SITES[0], places) == ["not reached"] * len(places)
        # A container in a network that has a way to this machine does reach it there.
        assert reach(perimeter, "gateway", machine) == ["reached"] * 2


def _own_address() -> str:
    """The address by which this machine leaves for others; nothing is sent."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def test_the_gateway_is_no_road_between_its_networks(perimeter: Perimeter) -> None:
    for service in ("gateway", "operator"):
        forward = "print(open('/proc/sys/net/ipv4/ip_forward').read())"
        assert perimeter.project.python(service, forward) == "0"


# --- too much, too long, too many, nonsense ---


def test_an_oversized_request_is_refused_before_it_is_read(perimeter: Perimeter) -> None:
    connection = perimeter.connect(perimeter.project.fleet_port)
    connection.putrequest("POST", HEARTBEAT)
    for name, value in {**perimeter.sign(), "Content-Length": str(17 * MB)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_an_endless_request_is_cut_off_at_the_gateway(perimeter: Perimeter) -> None:
    context = perimeter.trust()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # where nothing but an answer can be read
    connection = perimeter.connect(perimeter.project.fleet_port, context)
    connection.putrequest("POST", HEARTBEAT)
    for name, value in {**perimeter.sign(), "Transfer-Encoding": "chunked"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    chunk, sent = b"%x\r\n" % MB + bytes(MB) + b"\r\n", 0
    while sent < 200 and not select.select([connection.sock], [], [], 0)[0]:
        connection.send(chunk)
        sent += 1
    assert connection.getresponse().status == 413
    assert 16 <= sent < 200
    connection.close()


@pytest.mark.parametrize("body", [b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", b"{}", b"\x00"])
def test_malformed_protobuf_is_refused_and_harms_nobody(perimeter: Perimeter, body: bytes) -> None:
    answer = perimeter.ask(perimeter.project.fleet_port, HEARTBEAT, body, perimeter.sign())
    assert 400 <= answer.status < 500, answer.text
    assert perimeter.heartbeat(perimeter.sign()).status == 200


def test_a_flood_from_one_institution_is_put_off_and_another_is_served(
    perimeter: Perimeter,
) -> None:
    key = perimeter.sign()["flwr-public-key"]
    one = f"POST {HEARTBEAT} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {key}\r\n"
    at_once = f"{one}Content-Length: 0\r\n\r\n" * 999
    last = f"{one}Connection: close\r\nContent-Length: 0\r\n\r\n"
    answers = b""
    with (
        socket.create_connection(("127.0.0.1", perimeter.project.fleet_port), timeout=60) as raw,
        perimeter.trust().wrap_socket(raw, server_hostname="localhost") as stream,
    ):
        stream.sendall((at_once + last).encode())
        while piece := stream.recv(65536):
            answers += piece
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", answers)
    assert statuses.count(b"503") > 100
    assert perimeter.heartbeat(perimeter.sign(SITES[1]), SITES[1]).status == 200


def test_1000_idle_connections_keep_nobody_out_and_are_hung_up_on(perimeter: Perimeter) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    idle = [
        socket.create_connection(("127.0.0.1", perimeter.project.fleet_port), timeout=30)
        for _ in range(1000)
    ]
    try:
        assert perimeter.heartbeat(perimeter.sign(SITES[1]), SITES[1]).status == 200
        for connection in idle:
            assert connection.recv(1) == b"", "the gateway ends it"
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [perimeter.project.health()[site] for site in SITES] == ["healthy"] * 3


# --- what lies around ---


def test_no_private_key_is_in_an_environment_a_log_an_image_or_what_inspect_shows(
    perimeter: Perimeter,
) -> None:
    project = perimeter.project
    read = "import glob; print(''.join(open(p).read() for p in {places}))"
    texts = [(perimeter.folder / name).read_text() for name in ("ca.key", "operator.key")]
    texts.append(project.python("superlink", read.format(places="['/medfed/certs/superlink.key']")))
    texts += [
        project.python(site, read.format(places="glob.glob('/site/*.key')")) for site in SITES
    ]
    # Two lines of each are enough to know it by, however it may be wrapped.
    secrets = [line for text in texts for line in text.splitlines()[2:4] if len(line) > 30]
    assert len(secrets) >= 5
    for service, container in project.containers(*UP):
        shown = [
            json.dumps(project.client.api.inspect_container(container.id)),
            container.logs().decode("utf-8", "replace"),
            json.dumps(project.client.api.inspect_image(container.image.id)),
            json.dumps(project.client.api.history(container.image.id)),
            project.python(service, "print(open('/proc/1/environ').read())"),
        ]
        for text in shown:
            assert not any(secret in text for secret in secrets), service
            assert "PRIVATE KEY" not in text, service


def test_a_sites_partition_and_key_are_read_only_for_it(perimeter: Perimeter) -> None:
    mounts = perimeter.project.python(SITES[0], "print(open('/proc/mounts').read())")
    options: dict[str, list[str]] = {}
    for line in mounts.splitlines():
        _, place, _, flags, *_ = line.split()
        options[place] = flags.split(",")
    assert "ro" in options["/site"]
    assert "ro" in options["/"]


def test_every_container_has_the_limits_it_was_given(perimeter: Perimeter) -> None:
    code = """
import pathlib
v1 = pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
v2 = pathlib.Path("/sys/fs/cgroup/memory.max")
pids = [pathlib.Path("/sys/fs/cgroup/pids.max"), pathlib.Path("/sys/fs/cgroup/pids/pids.max")]
print((v1 if v1.exists() else v2).read_text(), *(p.read_text() for p in pids if p.exists()))
"""
    for service in UP:
        memory, processes = perimeter.project.python(service, code).split()
        limit = 1024 * MB if service in {"gateway", "operator"} else 8 * 1024 * MB
        assert int(memory) == limit, service
        assert int(processes) == (64 if service in {"gateway", "operator"} else 512), service


# --- the last one: nobody brings this institution back ---

STRAIGHT = """
import base64, http.client, json, ssl
context = ssl.create_default_context(cafile="/certs/ca.crt")
connection = http.client.HTTPSConnection("superlink", 8000, timeout=30, context=context)
connection.request("POST", {path!r}, base64.b64decode({body!r}), json.loads({headers!r}))
print(connection.getresponse().status)
"""


def test_a_revoked_institution_is_put_out_and_does_not_come_back(perimeter: Perimeter) -> None:
    project, gone, stays = perimeter.project, SITES[2], SITES[1]
    assert perimeter.heartbeat(perimeter.sign(gone), gone).status == 200
    command = ("run", "--rm", "-T", "--entrypoint", "python -m medfed.cli", "provision")
    project.compose(*command, "certs", "revoke", gone)
    project.compose("run", "--rm", "-T", "provision", timeout=300)
    project.compose("run", "--rm", "-T", "--no-deps", "register")
    until(
        lambda: UNKNOWN_KEY in perimeter.heartbeat(perimeter.sign(gone), gone).text,
        20,
        lambda: perimeter.gateway_log()[-2000:],
    )
    # Its SuperNode ends, starts anew, and is told why it may not.
    until(
        lambda: b"one that was revoked is never registered again" in project.container(gone).logs(),
        90,
        lambda: str(project.container(gone).logs(tail=20).decode()),
    )
    # The SuperLink behind the gateway refuses it too.
    beat = SendNodeHeartbeatRequest(
        node=NodeMessage(node_id=perimeter.ids[gone]), heartbeat_interval=30
    )
    straight = STRAIGHT.format(
        path=HEARTBEAT,
        body=base64.b64encode(beat.SerializeToString()).decode(),
        headers=json.dumps({**PROTOBUF, **perimeter.sign(gone)}),
    )
    assert project.python("gateway", straight) == "401"
    assert perimeter.heartbeat(perimeter.sign(stays), stays).status == 200
