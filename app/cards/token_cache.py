"""Tokens on disk: a partition is tokenised once, not once a round."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.paths import medfed_home

_SHA256_BYTES = 32


@dataclass(frozen=True)
class TokenCache:
    """A folder of token lists by key; ``folder`` None keeps nothing.

    A file is the SHA-256 of what follows, then a NumPy archive. One that is damaged reads as
    absent; one that cannot be written is left out: the cache saves time and decides nothing.
    """

    folder: Path | None

    @classmethod
    def usual(cls) -> TokenCache:
        """``$MEDFED_HOME/cache/tokens``, or a private folder among the temporary files.

        The second is for a container, whose root cannot be written.
        """
        wanted = medfed_home() / "cache" / "tokens"
        with contextlib.suppress(OSError):
            wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(wanted, os.W_OK):
                return cls(wanted)
        shared = Path(tempfile.gettempdir()) / f"medfed-tokens-{os.getuid()}"
        with contextlib.suppress(OSError):
            shared.mkdir(exist_ok=True, mode=0o700)
            owner = shared.lstat()
            # The name can be guessed: tokens from a folder that someone else made are not ours.
            private = owner.st_uid == os.getuid() and not owner.st_mode & 0o022
            if stat.S_ISDIR(owner.st_mode) and private:
                return cls(shared)
        return cls(None)

    def read(self, key: str) -> list[tuple[tuple[int, ...], int]] | None:
        """Return what was written under ``key``, (tokens, prompt length) each, or None."""
        file = self._file(key)
        if file is None:
            return None
        try:
            stored = file.read_bytes()
            recorded, payload = stored[:_SHA256_BYTES], stored[_SHA256_BYTES:]
            if hashlib.sha256(payload).digest() != recorded:
                return None
            with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
                ends = np.cumsum(arrays["lengths"]).tolist()
                tokens = arrays["tokens"].tolist()
                prompts = arrays["prompts"].tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        starts = [0, *ends[:-1]]
        return [
            (tuple(tokens[start:end]), prompt)
            for start, end, prompt in zip(starts, ends, prompts, strict=True)
        ]

    def write(self, key: str, examples: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Keep (tokens, prompt length) pairs under ``key``; readers see all of it or nothing."""
        file = self._file(key)
        if file is None or not examples:
            return
        archive = io.BytesIO()
        np.savez(
            archive,
            tokens=np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in examples]),
            lengths=np.asarray([len(ids) for ids, _ in examples], dtype=np.int64),
            prompts=np.asarray([prompt for _, prompt in examples], dtype=np.int32),
        )
        payload = archive.getvalue()
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # mkstemp's file is 0600: tokens are a hospital's text in another spelling.
            handle, name = tempfile.mkstemp(dir=file.parent)
            try:
                with os.fdopen(handle, "wb") as out:
                    out.write(hashlib.sha256(payload).digest() + payload)
                    out.flush()
                    os.fsync(out.fileno())
                Path(name).replace(file)
            except OSError:
                Path(name).unlink(missing_ok=True)

    def _file(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.tokens"
