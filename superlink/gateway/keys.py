"""Institutions by the key that their requests carry.

Flower's SuperNode sends its public key with every request, as PEM in base64. An institution hands
in the same key in OpenSSH's form, as ``NAME.pub``. The way from one to the other is short enough to
be written down here, so that the gateway's image needs no library for it.
"""

from __future__ import annotations

import base64
import binascii
import struct
from pathlib import Path

from common.errors import SuperLinkError

# What stands before the point of a public key in SubjectPublicKeyInfo (RFC 5480), by OpenSSH curve.
_PREFIXES = {
    b"nistp256": bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200"),
    b"nistp384": bytes.fromhex("3076301006072a8648ce3d020106052b81040022036200"),
    b"nistp521": bytes.fromhex("30819b301006072a8648ce3d020106052b8104002303818600"),
}


def institutions(folder: Path) -> dict[str, str]:
    """Header value → institution, of every ``NAME.pub`` in ``folder``.

    Raises:
        SuperLinkError: the folder is missing, a file is no such key, or two hold the same one.
    """
    if not folder.is_dir():
        raise SuperLinkError(
            f"expected the institutions' public keys in {folder}, found no such folder",
            "`medfed certs issue` makes it; it holds NAME.pub for each institution",
        )
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.pub")):
        value = header_value(path)
        if value in found:
            raise SuperLinkError(
                f"expected a key of its own in {path}, found that of {found[value]}",
                "one key, one institution: ask one of the two for a new key",
            )
        found[value] = path.stem
    return found


def header_value(path: Path) -> str:
    """What Flower's SuperNode sends as ``flwr-public-key`` when its public key is in ``path``.

    Raises:
        SuperLinkError: the file is no OpenSSH public key on a NIST curve.
    """
    try:
        kind, encoded = path.read_bytes().split()[:2]
        name, curve, point = _strings(base64.b64decode(encoded, validate=True))
        if kind != name or name != b"ecdsa-sha2-" + curve or point[0] != 4:
            raise ValueError
        info = _PREFIXES[curve] + point
    except OSError as error:
        raise SuperLinkError(
            f"expected the public key {path}, found: {error.strerror}",
            "it must be readable by the user that runs the gateway",
        ) from None
    except (ValueError, KeyError, IndexError, struct.error, binascii.Error):
        raise SuperLinkError(
            f"expected an OpenSSH public key on a NIST curve in {path}, found something else",
            "ask the institution for its .pub file again",
        ) from None
    text = base64.b64encode(info).decode("ascii")
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    pem = "\n".join(("-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""))
    return base64.b64encode(pem.encode("ascii")).decode("ascii")


def _strings(blob: bytes) -> list[bytes]:
    """The length-prefixed strings of OpenSSH's wire format (RFC 4253, section 5)."""
    found = []
    while blob:
        (length,) = struct.unpack_from(">I", blob)
        if len(blob) < 4 + length:
            raise ValueError
        found.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return found
