"""What several rooms share: errors, files that are whole or absent, keys, the retry policy."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from common import errors, files, keys
from common.errors import CertsError, SuperNodeError, UserError
from common.retry import RetryPolicy

# --- errors ---


def test_every_rooms_error_is_of_the_one_kind():
    kinds = [one for one in vars(errors).values() if isinstance(one, type)]
    assert len(kinds) == 7
    assert all(issubclass(kind, UserError) for kind in kinds)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CertsError("expected a, found b", "do c"), "error: expected a, found b\nhint: do c\n"),
        (CertsError("expected a, found b"), "error: expected a, found b\n"),
    ],
)
def test_an_error_is_told_as_one_line_and_a_hint(capsys, error, told):
    assert errors.tell(error) == 1
    assert capsys.readouterr().err == told


# --- files ---


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


def test_a_draft_that_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f".file.{os.getpid()}.partial").write_bytes(b"half")
    files.write(tmp_path / "file", b"whole")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_said_in_the_rooms_own_error(tmp_path):
    (tmp_path / "file").write_bytes(b"no folder")
    with pytest.raises(SuperNodeError, match=r"expected to write .*below") as refused:
        files.write_or_say(tmp_path / "file" / "below", b"", error=SuperNodeError)
    assert "writable by this user" in refused.value.hint


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


# --- keys ---


def private_bytes(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_bytes(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def test_a_key_pair_is_read_back():
    key = ec.generate_private_key(ec.SECP384R1())
    private = keys.private_key(private_bytes(key), "file", CertsError, "hint")
    public = keys.public_key(public_bytes(key), "file", CertsError, "hint")
    assert private.public_key() == public == key.public_key()


@pytest.mark.parametrize("read", [keys.private_key, keys.public_key])
def test_what_is_no_key_is_refused_in_the_rooms_own_error_with_its_hint(read):
    with pytest.raises(SuperNodeError, match=r"expected an OpenSSH .* in the file") as refused:
        read(b"no key", "the file", SuperNodeError, "make another")
    assert refused.value.hint == "make another"


def test_a_key_on_no_nist_curve_is_refused():
    key = ed25519.Ed25519PrivateKey.generate()
    for read, content in (
        (keys.private_key, private_bytes(key)),
        (keys.public_key, public_bytes(key)),
    ):
        with pytest.raises(CertsError, match="elliptic-curve key in here, found"):
            read(content, "here", CertsError, "hint")


# --- retry ---


@given(
    st.floats(0.01, 100),
    st.floats(0.01, 1000),
    st.floats(0, 1),
    st.integers(1, 40),
    st.floats(0, 1),
)
def test_waits_double_up_to_the_longest_and_jitter_only_shortens_them(
    first, longest, jitter, count, drawn
):
    policy = RetryPolicy(first, longest, jitter)
    plain = list(itertools.islice(RetryPolicy(first, longest).waits(), count))
    waits = list(
        itertools.islice(policy.waits(lambda low, high: low + drawn * (high - low)), count)
    )
    assert plain[0] == min(first, longest)
    assert all(after == min(2 * before, longest) for before, after in itertools.pairwise(plain))
    for wait, most in zip(waits, plain, strict=True):
        assert (1 - jitter) * most * 0.999999 <= wait <= most * 1.000001
