"""The SuperLink's state database, which Flower migrates by Alembic when the SuperLink starts.

Nothing is changed here: this reads which revision a database has and which ones the installed
Flower knows, so that a backup can be made before a migration and an older Flower is not started on
a newer database. (``flwr/supercore/state/alembic/utils.py``: ``run_migrations``, which upgrades to
"heads" and ends in a traceback where it does not know the database's revision.)
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from alembic.script import ScriptDirectory

_MIGRATIONS = "flwr.supercore.state.alembic"


def revisions_of(database: Path) -> frozenset[str]:
    """The revisions that a database is at; empty for one that no Flower has migrated yet.

    Args:
        database: an SQLite file; it is opened read-only.

    Raises:
        sqlite3.DatabaseError: it is damaged.
    """
    uri = f"{database.resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as opened:
        tables = opened.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'"
        )
        if tables.fetchone() is None:
            return frozenset()
        return frozenset(
            row[0] for row in opened.execute("SELECT version_num FROM alembic_version")
        )


def newest_revisions() -> frozenset[str]:
    """The revisions to which the installed Flower migrates a database."""
    return frozenset(_migrations().get_heads())


def known_revisions() -> frozenset[str]:
    """Every revision that the installed Flower knows; a newer Flower's are not among them."""
    return frozenset(script.revision for script in _migrations().walk_revisions())


def _migrations() -> ScriptDirectory:
    found = find_spec(_MIGRATIONS)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"expected Flower's migrations in {_MIGRATIONS}, found none")
    return ScriptDirectory(next(iter(found.submodule_search_locations)))
