"""nginx's configuration, from the templates in ``conf/`` and what is particular to one gateway."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import SuperLinkError

from . import keys

_TEMPLATES = Path(__file__).parent / "conf"
_BLANK = re.compile(r"@([a-z_]+)@")
# The answer to a key that is no institution's; supernode/enrolment.py knows it by these words.
UNKNOWN_KEY = "the gateway knows no institution with this key"
_OPERATORS_ONLY = """\
ssl_client_certificate {ca};
    ssl_verify_client on;
    ssl_verify_depth 2;
    if ($operator = "") {{
        return 403 "expected a certificate of the operator role\\n";
    }}"""


@dataclass(frozen=True)
class Settings:
    """One gateway. Every address is ``HOST:PORT``; None: it has no such listener.

    Args:
        superlink: the SuperLink's address.
        superlink_name: the name that the SuperLink's certificate must carry.
        certificate: the gateway's TLS certificate.
        key: the certificate's private key.
        ca: the CA of the SuperLink's and of the operators' certificates; more than one in a bundle.
        scratch: a folder for what nginx writes while it runs.
        fleet: listener for institutions; passes ``/v1/fleet/`` alone.
        public_keys: the folder with each institution's ``NAME.pub``; needed for ``fleet``.
        operator: listener that passes ``/v1/control/`` alone and asks nobody who they are: for
            addresses that only the coordinator can reach.
        remote_operator: as ``operator``, for any address: it demands a client certificate of the
            operator role.
        health: listener that passes the SuperLink's ``/health`` alone, for the health check.
    """

    superlink: str
    superlink_name: str
    certificate: Path
    key: Path
    ca: Path
    scratch: Path
    fleet: str | None = None
    public_keys: Path | None = None
    operator: str | None = None
    remote_operator: str | None = None
    health: str | None = None

    def files(self) -> list[Path]:
        """What the configuration is made of, to be looked at for changes."""
        institutions = sorted(self.public_keys.glob("*.pub")) if self.public_keys else []
        return [self.certificate, self.key, self.ca, *institutions]


def render(settings: Settings) -> str:
    """The whole configuration.

    Raises:
        SuperLinkError: an institution's key cannot be used.
    """
    common = {
        "superlink": settings.superlink,
        "superlink_name": settings.superlink_name,
        "certificate": _quoted(settings.certificate),
        "key": _quoted(settings.key),
        "ca": _quoted(settings.ca),
        "scratch": str(settings.scratch),
        "unknown_key": UNKNOWN_KEY,
    }
    demand = _OPERATORS_ONLY.format(ca=common["ca"])
    servers = []
    for address, template, own in (
        (settings.fleet, "fleet.conf", {}),
        (settings.operator, "operator.conf", {"listener": "operator", "client_certificates": ""}),
        (
            settings.remote_operator,
            "operator.conf",
            {"listener": "remote-operator", "client_certificates": demand},
        ),
        (settings.health, "health.conf", {}),
    ):
        if address is not None:
            servers.append(_fill(template, {**common, **own, "address": address}))
    known = keys.institutions(settings.public_keys) if settings.public_keys else {}
    # As patterns, for nginx compares plain words without regard to case, and base64 has both.
    institutions = [f'"~^{re.escape(value)}$" {name};' for value, name in known.items()]
    lists = {"institutions": "\n".join(institutions), "servers": "\n".join(servers)}
    return _fill("nginx.conf", {**common, **lists})


def _fill(template: str, values: Mapping[str, str]) -> str:
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    return _BLANK.sub(lambda blank: values.get(blank[1], blank[0]), text)


def _quoted(path: Path) -> str:
    """A path as nginx's configuration takes it.

    Raises:
        SuperLinkError: nginx would read something else.
    """
    text = str(path)
    if set(text) & set('"\\$\r\n'):
        raise SuperLinkError(
            f"expected a path without quotes, backslashes, dollars or line breaks, found {text!r}",
            "move the file, or link to it",
        )
    return f'"{text}"'
