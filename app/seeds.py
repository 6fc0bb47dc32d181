"""Every random choice of a run comes from one seed and a name."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """Return the 63-bit seed of one named choice, e.g. ``derive(42, "sampling", 7)``.

    A hash, not an offset: neighbouring rounds or partitions share no stream, and the order in
    which choices are made does not matter.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
