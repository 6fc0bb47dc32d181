"""The SuperLink's state database, backed up before another version of Flower migrates it.

Flower migrates the database when the SuperLink starts, and has no way back. So a copy is made
first, beside the database: ``state.db.before-REVISION``, where REVISION is the one that Flower is
about to migrate to. Rolling back means to stop the SuperLink, put the copy in the database's place
and start the former Flower (docs/upgrading.md).
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common import files
from common.errors import SuperLinkError
from compat import state_database


@dataclass(frozen=True)
class Migration:
    """What Flower is about to do to a database.

    Attributes:
        before: the database's revisions; none for a database that is empty.
        after: those that Flower migrates it to.
        unknown: those of ``before`` that the installed Flower does not know.
    """

    before: frozenset[str]
    after: frozenset[str]
    unknown: frozenset[str]

    @property
    def is_needed(self) -> bool:
        """Whether Flower will migrate a database in which there is something."""
        return bool(self.before) and self.before != self.after


def migration_of(database: Path) -> Migration | None:
    """What the installed Flower will do to a database; None if there is none yet."""
    if not database.exists():
        return None
    before = state_database.revisions_of(database)
    unknown = before - state_database.known_revisions()
    return Migration(before, state_database.newest_revisions(), unknown)


def back_up_before_migration(database: Path) -> Path | None:
    """Copy a database that the installed Flower will migrate.

    Returns:
        The copy; None if no migration is due.

    Raises:
        SuperLinkError: the database was migrated by a newer Flower than the installed one, or the
            copy cannot be written. The database is as it was.
    """
    migration = migration_of(database)
    if migration is None or not migration.is_needed:
        return None
    if migration.unknown:
        raise SuperLinkError(
            f"expected a database that this Flower knows in {database}, found revision "
            f"{', '.join(sorted(migration.unknown))} of a newer one",
            _way_back(database),
        )
    copy = backup_path(database, migration)
    try:
        with files.replacing(copy, files.PRIVATE) as draft:
            _copy(database, draft)
    except (OSError, sqlite3.Error) as error:
        raise SuperLinkError(
            f"expected to back {database} up to {copy} before Flower migrates it, found: {error}",
            f"make room for {database.stat().st_size / 2**20:.0f} MB there; nothing was changed",
        ) from None
    return copy


def backup_path(database: Path, migration: Migration) -> Path:
    """Where the copy goes: a name of its own for each migration, and for each time it is made."""
    copy = database.with_name(f"{database.name}.before-{'-'.join(sorted(migration.after))}")
    if not copy.exists():
        return copy
    return copy.with_name(f"{copy.name}.{datetime.now(UTC):%Y%m%dT%H%M%S}")


def backups_of(database: Path) -> list[Path]:
    """Every copy that was made of a database, oldest first."""
    found = database.parent.glob(f"{database.name}.before-*")
    return sorted(found, key=lambda copy: copy.stat().st_mtime)


def _copy(database: Path, draft: Path) -> None:
    """SQLite's own backup, which takes in what is still in the write-ahead log."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(draft)) as target:
        source.backup(target)


def _way_back(database: Path) -> str:
    copies = backups_of(database)
    if not copies:
        return "start the newer Flower again: docs/upgrading.md"
    return (
        f"start the newer Flower again, or roll back: mv {copies[-1]} {database}, and remove "
        f"{database.name}-wal and {database.name}-shm (docs/upgrading.md)"
    )
