"""The state database is backed up before another Flower migrates it, and a newer one is refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from common import files
from common.errors import SuperLinkError
from compat import state_database
from superlink import __main__ as entrypoint
from superlink import database


def made_at(path: Path, revision: str | None, row: str = "as it was") -> Path:
    """A database at a revision; None: one that Flower has not written yet."""
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("PRAGMA journal_mode = WAL")
        opened.execute("CREATE TABLE run (what TEXT)")
        opened.execute("INSERT INTO run VALUES (?)", (row,))
        if revision is not None:
            opened.execute("CREATE TABLE alembic_version (version_num TEXT)")
            opened.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
        opened.commit()
    return path


def row_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as opened:
        (found,) = opened.execute("SELECT what FROM run").fetchone()
    return str(found)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> str:
    """A Flower whose migrations are: old, then new."""
    monkeypatch.setattr(state_database, "newest_revisions", lambda: frozenset({"new"}))
    monkeypatch.setattr(state_database, "known_revisions", lambda: frozenset({"old", "new"}))
    return "new"


def test_a_database_that_will_be_migrated_is_copied_first(tmp_path, newest):
    path = made_at(tmp_path / "state.db", "old")
    copy = database.back_up_before_migration(path)
    assert copy == tmp_path / "state.db.before-new"
    assert row_of(copy) == "as it was"
    assert state_database.revisions_of(copy) == {"old"}
    assert copy.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.glob("*.partial")] == []


def test_what_is_still_in_the_write_ahead_log_is_in_the_copy(tmp_path, newest):
    path = made_at(tmp_path / "state.db", "old")
    with closing(sqlite3.connect(path)) as still_open:
        still_open.execute("UPDATE run SET what = 'in the log'")
        still_open.commit()
        copy = database.back_up_before_migration(path)
        assert (tmp_path / "state.db-wal").stat().st_size > 0
    assert copy is not None
    assert row_of(copy) == "in the log"


@pytest.mark.parametrize("revision", ["new", None], ids=["up to date", "never migrated"])
def test_a_database_that_needs_no_migration_is_not_copied(tmp_path, newest, revision):
    assert database.back_up_before_migration(made_at(tmp_path / "state.db", revision)) is None
    assert database.backups_of(tmp_path / "state.db") == []


def test_no_database_is_no_migration(tmp_path, newest):
    assert database.back_up_before_migration(tmp_path / "state.db") is None


def test_a_second_upgrade_after_a_rollback_keeps_the_first_copy(tmp_path, newest):
    path = made_at(tmp_path / "state.db", "old")
    first = database.back_up_before_migration(path)
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("UPDATE run SET what = 'later'")
        opened.commit()
    second = database.back_up_before_migration(path)
    assert first is not None
    assert second is not None
    assert (row_of(first), row_of(second)) == ("as it was", "later")


def test_a_database_of_a_newer_flower_is_refused_with_the_way_back(tmp_path, newest):
    path = made_at(tmp_path / "state.db", "old")
    copy = database.back_up_before_migration(path)
    path.unlink()
    made_at(path, "newer still")
    with pytest.raises(SuperLinkError, match="newer still of a newer one") as refused:
        database.back_up_before_migration(path)
    assert f"mv {copy} {path}" in refused.value.hint
    assert row_of(path) == "as it was"


def test_a_copy_that_cannot_be_written_stops_the_start(tmp_path, newest, monkeypatch):
    path = made_at(tmp_path / "state.db", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SuperLinkError, match="No space left"):
        database.back_up_before_migration(path)
    assert database.backups_of(path) == []
    assert list(tmp_path.glob(".*.partial")) == []


def test_the_superlink_does_not_start_on_a_database_of_a_newer_flower(
    tmp_path, monkeypatch, capsys
):
    path = made_at(tmp_path / "state.db", "ffffffffffff")
    monkeypatch.setattr("superlink.preflight.check", lambda settings: None)
    options = {"certificate": "a", "key": "b", "ca": "c", "database": str(path)}
    assert entrypoint.main([f"--{name}={value}" for name, value in options.items()]) == 1
    assert "ffffffffffff of a newer one" in capsys.readouterr().err


def test_flower_migrates_to_revisions_that_it_knows():
    newest = state_database.newest_revisions()
    assert newest
    assert newest < state_database.known_revisions()


def test_a_database_that_flower_makes_is_at_its_newest_revisions(tmp_path):
    from flwr.supercore.state.alembic.utils import run_migrations
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{tmp_path / 'state.db'}")
    run_migrations(engine)
    engine.dispose()
    assert state_database.revisions_of(tmp_path / "state.db") == state_database.newest_revisions()
