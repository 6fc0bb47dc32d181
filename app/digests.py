"""Digests of files, by which a result knows what produced it."""

from __future__ import annotations

import hashlib
from pathlib import Path


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """SHA-256 (hex) over the names and contents of files in ``folder``, in order of name.

    Args:
        folder: where they are.
        pattern: which of them, as ``Path.glob`` takes it; by default those directly in it.
    """
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.glob(pattern) if path.is_file()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{digest}  {file.relative_to(folder).as_posix()}\n".encode())
    return whole.hexdigest()


def app_digest(app: Path) -> str:
    """SHA-256 (hex) of the code of a Flower App: every Python file in its folder ``app``."""
    return folder_digest(app, "**/*.py")
