"""Writing the site's files: a whole file or nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import SuperNodeError


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write ``path`` so that a reader sees the old file or the new one.

    Raises:
        SuperNodeError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(mode)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SuperNodeError(
            f"expected to write {path}, found: {error.strerror}",
            f"the folder must be writable by this user (uid {os.getuid()})",
        ) from None
