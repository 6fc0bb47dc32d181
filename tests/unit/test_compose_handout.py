"""What each container is given, and what it is not."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from medfed.handout import HandOutError, Volumes, hand_out
from medfed.paths import Home

NAMES = ("supernode-00", "supernode-01")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    keys = home.certs / "supernodes"
    keys.mkdir(parents=True)
    for name in ("ca.crt", "ca.key", "superlink.crt", "superlink.key"):
        (home.certs / name).write_text(f"content of {name}")
    for name in NAMES:
        (keys / f"{name}.key").write_text(f"private key of {name}")
        (keys / f"{name}.pub").write_text(f"public key of {name}")
        (home.partitions / name).mkdir(parents=True)
        (home.partitions / name / "train.jsonl").write_text(f"rows of {name}")
    return home


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    return Volumes(tmp_path / "sites", tmp_path / "superlink", tmp_path / "public")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_hospital_gets_its_own_key_and_partition_and_no_others(
    home: Home, volumes: Volumes
) -> None:
    hand_out(home, NAMES, volumes)
    for name in NAMES:
        site = volumes.sites / name
        assert tree(site) == {"ca.crt", f"{name}.key", f"{name}.pub", "data/train.jsonl"}
        assert (site / f"{name}.key").read_text() == f"private key of {name}"
        assert (site / "data" / "train.jsonl").read_text() == f"rows of {name}"


def test_private_keys_are_for_their_owner_only(home: Home, volumes: Volumes) -> None:
    hand_out(home, NAMES, volumes)
    keys = [*volumes.sites.rglob("*.key"), *volumes.superlink.rglob("*.key")]
    assert len(keys) == len(NAMES) + 1
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_the_ca_key_goes_nowhere_and_the_public_volume_has_no_private_key(
    home: Home, volumes: Volumes, tmp_path: Path
) -> None:
    hand_out(home, NAMES, volumes)
    assert list(tmp_path.rglob("ca.key")) == [home.certs / "ca.key"]
    assert tree(volumes.public) == {"ca.crt", *(f"supernodes/{name}.pub" for name in NAMES)}


def test_a_second_run_changes_nothing(home: Home, volumes: Volumes, tmp_path: Path) -> None:
    assert hand_out(home, NAMES, volumes) > 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert hand_out(home, NAMES, volumes) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_renewed_certificate_and_a_new_cut_replace_the_old_ones(
    home: Home, volumes: Volumes
) -> None:
    hand_out(home, NAMES, volumes)
    (home.certs / "superlink.crt").write_text("renewed")
    old = home.partitions / NAMES[0] / "train.jsonl"
    old.rename(old.with_name("cut-2.jsonl"))
    assert hand_out(home, NAMES, volumes) == 2
    assert (volumes.superlink / "superlink.crt").read_text() == "renewed"
    assert [path.name for path in (volumes.sites / NAMES[0] / "data").iterdir()] == ["cut-2.jsonl"]


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        ("certs/superlink.key", "medfed certs issue"),
        ("certs/supernodes/supernode-01.pub", "medfed certs issue"),
        ("partitions/supernode-01/train.jsonl", "medfed prepare"),
    ],
)
def test_what_is_missing_is_named_with_the_verb_that_makes_it(
    home: Home, volumes: Volumes, missing: str, hint: str
) -> None:
    (home.root / missing).unlink()
    with pytest.raises(HandOutError) as caught:
        hand_out(home, NAMES, volumes)
    assert str(Path(missing).parent) in str(caught.value)
    assert hint in caught.value.hint


def test_the_key_of_an_institution_that_has_gone_does_not_stay(
    home: Home, volumes: Volumes
) -> None:
    hand_out(home, NAMES, volumes)
    hand_out(home, NAMES[:1], volumes)
    assert [path.stem for path in (volumes.public / "supernodes").iterdir()] == [NAMES[0]]


def test_of_an_institution_that_keeps_its_own_key_the_public_half_is_known(
    home: Home, volumes: Volumes
) -> None:
    (home.certs / "supernodes" / f"{NAMES[0]}.key").unlink()
    (home.certs / "revoked.json").write_text("[]")
    hand_out(home, NAMES, volumes)
    assert not (volumes.sites / NAMES[0]).exists()
    assert (volumes.public / "supernodes" / f"{NAMES[0]}.pub").exists()
    assert (volumes.public / "revoked.json").exists()
