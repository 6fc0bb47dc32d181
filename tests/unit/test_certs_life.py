"""Certificates over time: renewed, rotated, revoked, enrolled, and counted down."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

import certs
from certs import files, keys, pki
from common import certificates
from medfed.commands.certs import app

ROOT = Path(__file__).parents[2]
NAMES = ("supernode-00", "supernode-01")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    certs.issue(tmp_path / "certs", NAMES)
    return tmp_path / "certs"


def ages(folder: Path, name: str, left: timedelta) -> None:
    """Put a certificate in place of ``name`` that has so much left."""
    ca = certificate(folder / "ca.crt")
    ca_key = pki.key_from_pem((folder / "ca.key").read_bytes(), "ca.key")
    key = pki.key_from_pem((folder / f"{name}.key").read_bytes(), name)
    start = datetime.now(UTC) - timedelta(days=100)
    about = {"not_before": start, "lifetime": timedelta(days=100) + left}
    made = (
        pki.new_superlink_certificate(key, ca, ca_key, pki.DEFAULT_SANS, **about)
        if name == "superlink"
        else pki.new_operator_certificate(key, ca, ca_key, **about)
    )
    files.write(folder / f"{name}.crt", pki.certificate_to_pem(made), files.PUBLIC)


def refused(said: str, what, *arguments, **options) -> None:
    with pytest.raises(certs.CertsError, match=said) as caught:
        what(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


# --- the operator ---------------------------------------------------------------------------------


def test_the_operators_certificate_is_a_clients_of_the_operators_role(folder):
    made, ca = certificate(folder / "operator.crt"), certificate(folder / "ca.crt")
    made.verify_directly_issued_by(ca)
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    (unit,) = made.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    assert unit.value == "operator"


def test_no_other_certificate_has_the_operators_role(folder):
    for name in ("ca", "superlink"):
        made = certificate(folder / f"{name}.crt")
        assert made.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME) == []
    usage = certificate(folder / "superlink.crt").extensions
    assert list(usage.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]


# --- renewal and expiry ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["superlink", "operator"])
def test_what_soon_expires_is_renewed_and_nothing_else(folder, name):
    ages(folder, name, timedelta(days=10))
    before = contents(folder)
    (line,) = certs.renew(folder)
    assert "had 9 days left" in line
    after = contents(folder)
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {str(folder / f"{name}.crt")}
    certificate(folder / f"{name}.crt").verify_directly_issued_by(certificate(folder / "ca.crt"))
    assert certs.renew(folder) == []


def test_a_longer_look_ahead_renews_earlier(folder):
    assert certs.renew(folder, timedelta(days=364)) == []
    assert len(certs.renew(folder, timedelta(days=366))) == 2


def test_without_a_ca_nothing_is_renewed(tmp_path):
    refused("the CA's certificate", certs.renew, tmp_path)


@pytest.mark.parametrize(("days", "status"), [(364, 0), (366, 1)])
def test_check_exits_with_1_when_something_expires_within_so_many_days(folder, days, status):
    command = [sys.executable, "-m", "medfed.cli", "certs", "check", f"--within={days}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == status, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] == (status == 0)
    assert {one["name"] for one in told["expiring"]} == (
        {"superlink", "operator"} if status else set()
    )


def test_check_says_what_to_do(folder):
    ages(folder, "superlink", timedelta(days=-1))
    result = CliRunner().invoke(app, ["check", "--within=2000"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert "has expired" in lines[1]
    assert lines[1].endswith(": medfed certs renew")
    assert lines[0].startswith("ca: expires in 182")
    assert lines[0].endswith(": medfed certs rotate-ca begin")


# --- a new CA -------------------------------------------------------------------------------------


def trusts(bundle: bytes, folder: Path) -> bool:
    made = certificate(folder / "superlink.crt")
    return any(certificates.is_issued_by(made, ca) for ca in pki.bundle_from_pem(bundle, "bundle"))


def test_at_no_step_is_anybody_shown_a_certificate_they_do_not_trust(folder):
    first = (folder / "ca.crt").read_bytes()
    certs.begin_rotation(folder)
    both = (folder / "ca.crt").read_bytes()
    assert trusts(first, folder)  # not handed out yet
    assert trusts(both, folder)
    actions = certs.switch_rotation(folder)
    assert [action.split("'")[0] for action in actions] == [
        "renewed the SuperLink",
        "renewed the operator",
    ]
    assert all("it was another CA's" in action for action in actions)
    assert trusts(both, folder)  # everybody has it by now
    assert not trusts(first, folder)
    certs.finish_rotation(folder)
    last = (folder / "ca.crt").read_bytes()
    assert trusts(last, folder)
    assert trusts(both, folder)  # not handed out yet
    assert len(pki.bundle_from_pem(last, "last")) == 1
    assert not (folder / "next-ca.key").exists()
    assert certs.issue(folder, NAMES).actions == ()


def test_the_old_key_is_gone_with_the_switch(folder):
    old = (folder / "ca.key").read_bytes()
    certs.begin_rotation(folder)
    assert (folder / "ca.key").read_bytes() == old
    assert (folder / "next-ca.key").stat().st_mode & 0o777 == 0o600
    certs.switch_rotation(folder)
    assert old not in contents(folder).values()
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600


def test_two_cas_have_two_names(folder):
    certs.begin_rotation(folder)
    first, second = pki.bundle_from_pem((folder / "ca.crt").read_bytes(), "ca.crt")
    assert first.subject != second.subject


def test_both_cas_are_shown_while_one_is_rotated(folder):
    certs.begin_rotation(folder)
    assert [record.name for record in certs.inspect(folder)][:2] == ["ca", "ca (next)"]
    certs.switch_rotation(folder)
    assert [record.name for record in certs.inspect(folder)][:2] == ["ca", "ca (old)"]


def test_steps_come_in_their_order(folder):
    refused("one CA", certs.switch_rotation, folder)
    refused("one CA", certs.finish_rotation, folder)
    certs.begin_rotation(folder)
    refused("a rotation under way", certs.begin_rotation, folder)
    refused("found that the old one does", certs.finish_rotation, folder)
    certs.switch_rotation(folder)
    refused("a rotation under way", certs.begin_rotation, folder)
    certs.finish_rotation(folder)
    certs.begin_rotation(folder)


def test_an_interrupted_step_is_taken_again(folder, monkeypatch):
    real = files.write

    def stop_at(name: str):
        def write(path: Path, content: bytes, mode: int) -> None:
            if path.name == name:
                raise KeyboardInterrupt
            real(path, content, mode)

        return write

    for step, name in ((certs.begin_rotation, "ca.crt"), (certs.switch_rotation, "ca.crt")):
        monkeypatch.setattr(files, "write", stop_at(name))
        with pytest.raises(KeyboardInterrupt):
            step(folder)
        monkeypatch.setattr(files, "write", real)
        step(folder)
    certs.finish_rotation(folder)
    assert trusts((folder / "ca.crt").read_bytes(), folder)


def test_the_superlink_starts_with_either_ca_of_a_rotation(folder):
    from superlink.preflight import check_certificates

    def check() -> None:
        check_certificates(
            *(folder / name for name in ("superlink.crt", "superlink.key", "ca.crt"))
        )

    for step in (certs.begin_rotation, certs.switch_rotation, certs.finish_rotation):
        step(folder)
        check()


def test_the_command_says_what_comes_next(folder):
    for step, said in (
        ("begin", "rotate-ca switch"),
        ("switch", "rotate-ca finish"),
        ("finish", "hand out"),
    ):
        result = CliRunner().invoke(app, ["rotate-ca", step], catch_exceptions=False)
        assert said in result.stdout


# --- institutions that go and come ----------------------------------------------------------------


def own_key(folder: Path, name: str = "sent.pub") -> Path:
    path = folder.parent / name
    path.write_bytes(keys.public_to_openssh(pki.new_key().public_key(), "somebody"))
    return path


def test_a_revoked_institution_is_out_and_issuing_does_not_bring_it_back(folder):
    revoked = certs.revoke(folder, "supernode-00", "left the consortium")
    assert [one.reason for one in certs.revocations(folder)] == ["left the consortium"]
    assert certs.revoked_names(folder) == {"supernode-00"}
    assert certs.issue(folder, NAMES).actions == ()
    assert sorted(path.name for path in (folder / "supernodes").iterdir()) == [
        "supernode-01.key",
        "supernode-01.pub",
    ]
    assert certs.revoke(folder, "supernode-00") == revoked


def test_a_revoked_key_never_comes_back_under_any_name(folder, tmp_path):
    kept = tmp_path / "kept.pub"
    kept.write_bytes((folder / "supernodes/supernode-00.pub").read_bytes())
    certs.revoke(folder, "supernode-00")
    for name in ("supernode-00", "supernode-07"):
        refused("never revoked", certs.enrol, folder, name, kept, readmit=True)
    # Put back by hand, it is still on the list.
    (folder / "supernodes/supernode-00.pub").write_bytes(kept.read_bytes())
    assert certs.revoked_names(folder) == {"supernode-00"}


def test_a_revoked_name_comes_back_only_when_somebody_says_so(folder):
    certs.revoke(folder, "supernode-00")
    refused("not to be revoked", certs.enrol, folder, "supernode-00", own_key(folder))
    certs.enrol(folder, "supernode-00", own_key(folder), readmit=True)
    assert certs.revoked_names(folder) == set()
    certs.revoke(folder, "supernode-00", "again")
    assert [one.reason for one in certs.revocations(folder)] == ["", "again"]


def test_an_institution_is_enrolled_by_the_key_it_made_itself(folder):
    sent = own_key(folder)
    fingerprint = certs.enrol(folder, "klinik-x", sent)
    record = next(one for one in certs.inspect(folder) if one.name == "klinik-x")
    assert record.fingerprint == fingerprint
    assert not (folder / "supernodes/klinik-x.key").exists()
    assert certs.issue(folder, [*NAMES, "klinik-x"]).actions == ()
    assert certs.enrol(folder, "klinik-x", sent) == fingerprint


def test_a_private_key_is_not_taken(folder):
    sent = folder.parent / "sent"
    sent.write_bytes(keys.private_to_openssh(pki.new_key()))
    refused("found a private one", certs.enrol, folder, "klinik-x", sent)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("klinik-x", None, "no such file"),
        ("klinik-x", b"nothing", "OpenSSH public key"),
        ("a/b", b"", "name that can be a file's"),
    ],
)
def test_what_is_no_key_and_no_name_is_refused(folder, name, content, said):
    sent = folder.parent / "sent.pub"
    if content is not None:
        sent.write_bytes(content)
    refused(said, certs.enrol, folder, name, sent)


def test_one_key_is_one_institution(folder):
    taken = folder / "supernodes/supernode-01.pub"
    refused("found the key of supernode-01", certs.enrol, folder, "klinik-x", taken)


def test_another_key_does_not_take_a_name_over(folder):
    refused("no other key of supernode-00", certs.enrol, folder, "supernode-00", own_key(folder))


def test_who_was_never_there_cannot_be_revoked(folder):
    refused("found no such file", certs.revoke, folder, "supernode-07")


def test_a_damaged_list_lets_nobody_in(folder):
    (folder / "revoked.json").write_text("[1]")
    refused("the list of revoked keys", certs.issue, folder, NAMES)
    refused("the list of revoked keys", certs.enrol, folder, "klinik-x", own_key(folder))


def test_the_commands_say_what_is_left_to_do_without_a_superlink(folder):
    run = CliRunner()
    result = run.invoke(app, ["revoke", "supernode-00", "--reason", "x"], catch_exceptions=False)
    assert "no SuperLink runs here" in result.stdout
    sent = own_key(folder)
    arguments = ["enrol", "supernode-00", str(sent), "--readmit"]
    result = run.invoke(app, arguments, catch_exceptions=False)
    assert "enrolled supernode-00 with SHA256:" in result.stdout
