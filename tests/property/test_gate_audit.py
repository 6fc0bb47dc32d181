"""The audit log: whatever is done to it afterwards is found, and a crash is not taken for that."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SuperNodeError
from supernode.gate import audit
from supernode.gate.audit import HEAD, LOG, AuditLog, BrokenChainError, verify

FACTS = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}", fullmatch=True),
    st.one_of(st.integers(), st.text(), st.booleans(), st.none()),
    max_size=3,
).filter(lambda facts: not {"event", "self", "line", "time", "previous"} & set(facts))


def written(folder: Path, facts: list[dict]) -> list[bytes]:
    log = AuditLog(folder)
    for one in facts:
        log.append("message", **one)
    log.close()
    return (folder / LOG).read_bytes().splitlines(keepends=True)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Thousands of examples: what they check does not depend on when bytes reach the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@settings(deadline=None)
@given(st.lists(FACTS, max_size=6))
def test_what_was_written_is_whole_and_reads_back(facts):
    with tempfile.TemporaryDirectory() as name:
        lines = written(Path(name), facts)
        chain = verify(Path(name))
        assert chain.lines == len(facts)
        assert chain.unfinished == 0
        for one, entry in zip(facts, audit.entries(Path(name)), strict=True):
            assert one.items() <= entry.items()
        assert len(lines) == len(facts)


@settings(deadline=None, max_examples=150)
@given(st.lists(FACTS, min_size=2, max_size=6), st.data())
def test_any_changed_byte_is_found(facts, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, facts)
        content = bytearray((folder / LOG).read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        old = bytes(content[at : at + 1])
        content[at] ^= data.draw(st.integers(1, 255))
        (folder / LOG).write_bytes(content)
        with pytest.raises(BrokenChainError) as caught:
            verify(folder)
        line = bytes(content[:at]).count(b"\n") + 1
        moved = b"\n" in (old, bytes(content[at : at + 1]))  # a line more, or one less
        assert caught.value.line - line in ({0, 1} if moved else {0})


@settings(deadline=None, max_examples=100)
@given(st.lists(FACTS, min_size=2, max_size=6), st.data())
def test_any_deleted_doubled_or_swapped_line_is_found(facts, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = written(folder, facts)
        first = data.draw(st.integers(0, len(lines) - 1))
        second = data.draw(st.integers(0, len(lines) - 1).filter(lambda at: at != first))
        what = data.draw(st.sampled_from(["delete", "double", "swap", "cut"]))
        if what == "delete":
            del lines[first]
        elif what == "double":
            lines.insert(first, lines[first])
        elif what == "swap":
            lines[first], lines[second] = lines[second], lines[first]
        else:
            del lines[first:]
        (folder / LOG).write_bytes(b"".join(lines))
        with pytest.raises(BrokenChainError):
            verify(folder)


@settings(deadline=None)
@given(st.lists(FACTS, min_size=1, max_size=4), st.data())
def test_a_crash_in_the_middle_of_a_line_leaves_a_log_that_goes_on(facts, data):
    """The machine stops while the last line is written: before its head, or before its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, facts[:-1])
        head = (folder / HEAD).read_bytes() if (folder / HEAD).exists() else None
        *whole, last = written(folder, facts[-1:])
        kept = data.draw(st.integers(0, len(last)))
        (folder / LOG).write_bytes(b"".join(whole) + last[:kept])
        (folder / HEAD).unlink() if head is None else (folder / HEAD).write_bytes(head)
        torn = 0 if kept == len(last) else kept
        assert verify(folder).unfinished == torn
        log = AuditLog(folder)
        log.append("started")
        log.close()
        events = [
            (entry["event"], entry.get("unfinished-bytes")) for entry in audit.entries(folder)
        ]
        assert (("recovered", torn) in events) == bool(torn)
        assert events[-1] == ("started", None)
        assert verify(folder).unfinished == 0


def test_the_broken_line_is_named(tmp_path):
    lines = written(tmp_path, [{"n": number} for number in range(5)])
    lines[2] = lines[2].replace(b'"n": 2', b'"n": 9')
    (tmp_path / LOG).write_bytes(b"".join(lines))
    with pytest.raises(BrokenChainError, match=rf"{LOG}:3: ") as caught:
        verify(tmp_path)
    assert caught.value.line == 3


def test_a_cut_off_end_is_missed_by_the_head(tmp_path):
    lines = written(tmp_path, [{}] * 5)
    (tmp_path / LOG).write_bytes(b"".join(lines[:3]))
    with pytest.raises(BrokenChainError, match=r"expected 5 lines .* found 3"):
        verify(tmp_path)


@pytest.mark.parametrize("head", [None, b"{}", b'{"lines": 2, "sha256": "' + b"0" * 64 + b'"}'])
def test_a_head_that_is_gone_or_older_or_no_head_is_found(tmp_path, head):
    written(tmp_path, [{}] * 5)
    (tmp_path / HEAD).unlink() if head is None else (tmp_path / HEAD).write_bytes(head)
    with pytest.raises(BrokenChainError):
        verify(tmp_path)


def test_a_log_written_anew_is_whole_but_lacks_the_head_that_was_noted(tmp_path):
    written(tmp_path / "true", [{"n": 1}, {"n": 2}])
    noted = verify(tmp_path / "true").head
    written(tmp_path / "true", [{"n": 3}])
    assert verify(tmp_path / "true", noted).lines == 3
    written(tmp_path / "forged", [{"n": 1}, {"n": 2}, {"n": 3}])
    assert verify(tmp_path / "forged").lines == 3
    with pytest.raises(BrokenChainError, match="expected a line with the noted head"):
        verify(tmp_path / "forged", noted)


def test_a_broken_log_is_not_continued(tmp_path):
    lines = written(tmp_path, [{}] * 3)
    (tmp_path / LOG).write_bytes(lines[0])
    with pytest.raises(BrokenChainError):
        AuditLog(tmp_path)


def test_there_is_one_writer(tmp_path):
    first = AuditLog(tmp_path)
    with pytest.raises(SuperNodeError, match="found that a SuperNode writes it"):
        AuditLog(tmp_path)
    first.close()
    AuditLog(tmp_path).close()


def test_its_files_are_the_sites_own(tmp_path):
    written(tmp_path / "audit", [{}])
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "audit" / LOG).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "audit" / HEAD).stat().st_mode & 0o777 == 0o600


def test_a_line_names_the_one_before(tmp_path):
    lines = written(tmp_path, [{}, {}])
    assert json.loads(lines[0])["previous"] == "0" * 64
    assert json.loads(lines[1])["line"] == 2
