"""From one version of Flower to another: what would change, found out without changing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import MedfedError

_CODE = Path(__file__).resolve().parents[1]


class UpgradeError(MedfedError):
    """The environment to go to cannot be asked."""


@dataclass(frozen=True)
class Database:
    """The SuperLink's state database, and what the Flower to go to would do to it.

    Attributes:
        path: the SQLite file.
        size: bytes.
        before: its revisions.
        after: those that it would be migrated to.
        backup: where the SuperLink would copy it first; None: it would not be migrated.
        too_new: whether the Flower to go to does not know its revisions.
    """

    path: str
    size: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    backup: str | None
    too_new: bool


@dataclass(frozen=True)
class Check:
    """What ``medfed upgrade check`` found.

    Attributes:
        now: Flower's version in this environment.
        then: in the environment to go to.
        supported: versions that every hook was read in.
        off: hooks that would be off, and why.
        without: what each of them costs.
        database: the state database; None if there is none.
        obstacles: why this upgrade should not be made as it is.
    """

    now: str
    then: str
    supported: tuple[str, ...]
    off: dict[str, list[str]]
    without: dict[str, str]
    database: Database | None
    obstacles: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same for a script."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for a person."""
        known = "supported" if self.then in self.supported else (
            f"not among those supported ({', '.join(self.supported)})"
        )  # fmt: skip
        found = [f"Flower      {self.now} -> {self.then}, {known}"]
        if not self.off:
            found.append("hooks       all stay active")
        for name, reasons in self.off.items():
            found.append(f"hooks       {name} goes off: {self.without[name]}")
            found += [f"            {reason}" for reason in reasons]
        found += self._database_lines()
        found.append(
            "SuperNodes  may stay on any supported version: they need not be upgraded together"
        )
        if self.obstacles:
            return [*found, *(f"obstacle    {one}" for one in self.obstacles)]
        return [*found, "Nothing is in the way (docs/upgrading.md)."]

    def _database_lines(self) -> list[str]:
        database = self.database
        if database is None:
            return ["database    none yet"]
        if database.too_new:
            return [f"database    {database.path} was migrated by a newer Flower"]
        if database.backup is None:
            return [f"database    {database.path} stays as it is"]
        megabytes = database.size / 2**20
        return [
            f"database    {database.path} ({megabytes:.1f} MB) is migrated at the next start",
            f"            copied first to {database.backup}",
        ]


def check(python: Path | None, database: Path) -> Check:
    """Ask the environment to go to, and look at the database.

    Args:
        python: its interpreter; None: this one.
        database: the SuperLink's; it need not exist.

    Raises:
        UpgradeError: the interpreter cannot be run, or has no Flower.
    """
    from compat import report

    target = _ask(python or Path(sys.executable))
    hooks = [hook for hook in target["hooks"] if not hook["active"]]
    state = _look_at(database, frozenset(target["revisions"]), frozenset(target["all_revisions"]))
    obstacles = [f"{hook['name']} would be off: {hook['without']}" for hook in hooks]
    if state is not None and state.too_new:
        obstacles.append(
            f"{state.path} is at revision {', '.join(state.before)}, which Flower "
            f"{target['flower']} does not know: put the copy back that was made before it was "
            "migrated (docs/upgrading.md)"
        )
    return Check(
        now=report().flower,
        then=target["flower"],
        supported=tuple(target["supported"]),
        off={hook["name"]: list(hook["reasons"]) for hook in hooks},
        without={hook["name"]: hook["without"] for hook in hooks},
        database=state,
        obstacles=tuple(obstacles),
    )


def _look_at(path: Path, after: frozenset[str], known: frozenset[str]) -> Database | None:
    from compat import state_database
    from superlink import database

    if not path.exists():
        return None
    before = state_database.revisions_of(path)
    migration = database.Migration(before, after, before - known)
    return Database(
        path=str(path),
        size=path.stat().st_size,
        before=tuple(sorted(before)),
        after=tuple(sorted(after)),
        backup=str(database.backup_path(path, migration)) if migration.is_needed else None,
        too_new=bool(migration.unknown),
    )


def _ask(python: Path) -> dict[str, Any]:
    command = [str(python), "-m", "compat"]
    try:
        done = subprocess.run(
            command, cwd=_CODE, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode == 0:
            told: dict[str, Any] = json.loads(done.stdout)
            return told
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        reason = str(error)
    raise UpgradeError(
        f"expected {python} to have a Flower, found: {reason}",
        "give the python of an environment with medfed's requirements and another flwr",
    )
