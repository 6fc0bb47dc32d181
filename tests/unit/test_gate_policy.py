"""policy.toml: what a hospital can say in it, and how it is told that something is wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import SuperNodeError
from supernode.gate import policy

SHA = "ab" * 32
GOOD = f"""\
[reply]
parameters = 4
dtype = "float32"
max-norm = 10
max-bytes = 100
metrics = ["num-examples"]
error-text = false

[[fab]]
sha256 = "{SHA}"
approved-by = "Dr. A"
approved-at = 2026-01-31T12:00:00+01:00
note = "read it"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


def test_a_policy_is_read_into_types(path):
    path.write_text(GOOD)
    found = policy.load(path)
    assert found.reply == policy.ReplyLimits(4, "float32", 10.0, 100, ("num-examples",))
    at = datetime(2026, 1, 31, 11, tzinfo=UTC)
    assert found.approvals == (policy.Approval(SHA, "Dr. A", at, "read it"),)
    assert found.approval(SHA) is not None
    assert found.approval("cd" * 32) is None


def test_a_fresh_policy_is_strict_and_approves_nothing(path):
    policy.create(path, "supernode-07")
    found = policy.load(path)
    assert found.approvals == ()
    assert found.reply.parameters == policy.REFERENCE_PARAMETERS
    assert found.reply.max_bytes < found.reply.parameters * 4 + 100_000
    assert not found.reply.error_text


def test_a_policy_that_is_there_is_not_written_over(path):
    path.write_text(GOOD)
    with pytest.raises(SuperNodeError, match="found one"):
        policy.create(path, "supernode-07")
    assert path.read_text() == GOOD


def test_approving_adds_to_the_end_and_keeps_every_line(path):
    path.write_text(GOOD)
    approval = policy.Approval("cd" * 32, 'Dr. "B"', datetime(2026, 2, 1, tzinfo=UTC))
    assert policy.approve(path, approval)
    assert path.read_text().startswith(GOOD)
    assert policy.load(path).approvals[1] == approval
    assert not policy.approve(path, approval)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    by=st.text(min_size=1).filter(lambda text: "\0" not in text),
    note=st.text(),
    digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
def test_any_approval_reads_back_as_it_was_given(path, by, note, digest):
    path.write_text(GOOD)
    approval = policy.Approval(digest, by, datetime(2026, 2, 1, 3, 4, 5, tzinfo=UTC), note)
    if policy.approve(path, approval):
        assert policy.load(path).approval(digest) == approval


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("parameters = 4", "parameters = 0", 2, "a whole number above 0, found 0"),
        ("parameters = 4", "parameters = true", 2, "a whole number above 0, found True"),
        ("parameters = 4\n", "", 1, "[reply] parameters: expected a whole number"),
        ('dtype = "float32"', 'dtype = "object"', 3, "float16 or float32 or float64"),
        ("max-norm = 10", "max-norm = inf", 4, "a finite number above 0, found inf"),
        ("max-norm = 10", "max-norm = nan", 4, "found nan"),
        ("max-bytes = 100", "max-bytes = 15", 5, "at least the 16 bytes"),
        ('["num-examples"]', '["a", "a"]', 6, "a list of different names"),
        ('["num-examples"]', '"num-examples"', 6, "a list of different names"),
        ("error-text = false", 'error-text = "no"', 7, "true or false, found 'no'"),
        ("error-text = false", "error-text = false\nenforce = false", 8, "found 'enforce'"),
        (SHA, SHA.upper(), 10, "64 lower-case hexadecimal digits"),
        ('"Dr. A"', '""', 11, "who decided it"),
        ("12:00:00+01:00", "12:00:00", 12, "with its zone"),
        ('note = "read it"', "note = 1", 13, "a text, found 1"),
        (
            'note = "read it"',
            f'[[fab]]\nsha256 = "{SHA}"\napproved-by = "B"\napproved-at = 2026-01-31T12:00:00Z',
            14,
            "each FAB once",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(path, old, new, line, said):
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(SuperNodeError) as caught:
        policy.load(path)
    assert str(caught.value).startswith(f"{path}:{line}: "), caught.value
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[reply", "expected TOML"),
        (b"\xff", "expected TOML"),
        (b"", "[reply]: expected such a table, found nothing"),
        (b"reply = 1", "[reply]: expected such a table, found 1"),
        (GOOD.replace("[[fab]]", "[fab]").encode(), "one [[fab]] for each approved FAB"),
        (b"other = 1", "found 'other'"),
    ],
)
def test_what_is_no_policy_is_refused(path, content, said):
    path.write_bytes(content)
    with pytest.raises(SuperNodeError) as caught:
        policy.load(path)
    assert said in str(caught.value)


def test_a_missing_policy_is_an_error_and_never_an_open_gate(path):
    with pytest.raises(SuperNodeError, match="found no such file") as caught:
        policy.load(path)
    assert "medfed site init" in caught.value.hint
