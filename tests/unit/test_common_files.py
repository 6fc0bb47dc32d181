"""common/files.py: a file is the old one or all of the new one, whatever happens."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import files
from common.errors import CertsError, SuperNodeError


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [files.PRIVATE, files.PUBLIC])
@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_file_has_the_mode_that_was_asked_for_whatever_the_umask(tmp_path, mode, mask):
    before = os.umask(mask)
    try:
        files.write(tmp_path / "file", b"content", mode)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "file") == mode


def test_without_a_mode_the_umask_decides(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "file") == 0o640


def test_a_private_file_is_never_open_to_others_on_its_way(tmp_path):
    with files.replacing(tmp_path / "key", files.PRIVATE) as draft:
        assert mode_of(draft) == 0o600


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch, fails):
    path = tmp_path / "file"
    files.write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os if fails == "fsync" else Path, fails, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_the_new_content_is_synced_before_it_takes_the_name_and_the_name_after(
    tmp_path, monkeypatch
):
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    files.write(tmp_path / "file", b"content")
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize("mode", [None, files.PRIVATE])
def test_the_draft_of_a_killed_process_gives_way_with_its_content_and_mode(tmp_path, mode):
    left = tmp_path / ".file.partial"
    left.write_bytes(b"half, and longer than the new file")
    left.chmod(0o666)
    files.write(tmp_path / "file", b"whole", mode)
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert mode_of(tmp_path / "file") == (0o666 & ~umask() if mode is None else mode)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_second_writer_waits_until_the_first_is_done(tmp_path, monkeypatch):
    # Containers that share a volume have the same ids of processes and threads, so only a lock
    # tells the draft of one that writes from that of one that was killed.
    path, asked = tmp_path / "file", threading.Event()
    files.write(path, b"old")
    with ThreadPoolExecutor(1) as threads:
        with files.replacing(path) as draft, draft.open("wb") as first:
            lock = fcntl.flock

            def observed(descriptor: int, operation: int) -> None:
                if threading.current_thread() is not threading.main_thread():
                    asked.set()
                lock(descriptor, operation)

            monkeypatch.setattr(files.fcntl, "flock", observed)
            second = threads.submit(files.write, path, b"second")
            first.write(b"fi")
            assert asked.wait(30)
            first.write(b"rst")
            first.flush()
            assert (draft.read_bytes(), path.read_bytes()) == (b"first", b"old")
        second.result()
    assert path.read_bytes() == b"second"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_draft_that_is_a_link_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"kept")
    (tmp_path / ".file.partial").symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        files.write(tmp_path / "file", b"new")
    assert elsewhere.read_bytes() == b"kept"


def run_elsewhere(code: str, *arguments: object) -> int:
    """Run Python code in a process of its own; the status that it ends with."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        check=False,
    ).returncode


@pytest.mark.parametrize("step", ["os.fsync", "Path.replace"])
def test_a_crash_between_write_and_rename_leaves_the_old_content(tmp_path, step):
    path = tmp_path / "file"
    files.write(path, b"old")
    code = f"""
import os, signal, sys
from pathlib import Path
from common import files
{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write(Path(sys.argv[1]), b"new")
"""
    assert run_elsewhere(code, path) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    files.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_takes_only_a_part_leaves_the_old_content_and_no_draft(tmp_path):
    path = tmp_path / "file"
    files.write(path, b"old")
    code = """
import resource, sys
from pathlib import Path
from common import files
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    files.write(Path(sys.argv[1]), bytes(2**20))
except OSError as error:
    sys.exit(error.errno)
"""
    assert run_elsewhere(code, path) == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_threads_that_write_one_file_at_a_time_leave_it_whole(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([letter]) * 2**16 for letter in b"abcd"]
    together = threading.Barrier(len(contents))

    def write(content: bytes) -> None:
        together.wait()
        for _ in range(25):
            files.write(path, content)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(len(contents)) as threads:
        list(threads.map(write, contents))
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_said_in_the_rooms_own_error(tmp_path):
    (tmp_path / "file").write_bytes(b"no folder")
    with pytest.raises(SuperNodeError, match=r"expected to write .*below") as refused:
        files.write_or_say(tmp_path / "file" / "below", b"", error=SuperNodeError)
    assert "writable by this user" in refused.value.hint


def test_a_file_is_read_and_one_that_is_missing_is_none(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert files.read(tmp_path / "file", CertsError) == b"content"
    assert files.read(tmp_path / "other", CertsError) is None


def test_a_file_that_cannot_be_read_is_said_in_the_rooms_own_error(tmp_path):
    with pytest.raises(SuperNodeError, match=r"expected to read .*Is a directory") as refused:
        files.read(tmp_path, SuperNodeError)
    assert "readable by this user" in refused.value.hint


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content[:-1])
    assert files.sha256(tmp_path / "file") != hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("mode", "refused"), [(0o600, False), (0o400, False), (0o640, True)])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode, refused):
    path = tmp_path / "key"
    path.write_bytes(b"key")
    path.chmod(mode)
    if not refused:
        files.check_private(path, CertsError, "chmod 600")
        return
    with pytest.raises(CertsError, match=r"owner's only \(0600\), found 0640"):
        files.check_private(path, CertsError, "chmod 600")
