from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import IidPartitioner

from app.cards import tokens
from app.cards.dataset import HOLDOUT_SHARE, resolve
from app.cards.exam_formats import ENTRANCE_EXAM, EXAMS, STATEMENT, with_answer_formats
from app.cards.partitions import cards_of_node
from app.cards.rows import digest
from app.errors import AppError
from embedded import partitions
from evaluation.task import wrap
from tests.tiny_tokenizer import tiny_tokenizer

CARDS = [
    {
        "instruction": "Answer this question truthfully",
        "input": f"What is {n}?",
        "output": f"A {n}.",
    }
    for n in range(53)
]
# What a table reader that guesses types would turn into something else.
TRAPS = [
    {"instruction": "007", "input": "2020-01-01", "output": "None"},
    {"instruction": "1e5", "input": "NaN", "output": "true"},
    {"instruction": "", "input": "null", "output": "a\u2028b\x85c\r\nd\te"},
    {"instruction": '"', "input": "a,b", "output": " α-synuclein 🩺 "},
]


def write_jsonl(file: Path, rows: list[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    write_jsonl(tmp_path / "datasets" / "cards" / "train.jsonl", CARDS)
    write_jsonl(tmp_path / "datasets" / "cards" / "test.jsonl", TRAPS)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str, str], Path]:
    def make(name: str, text: str) -> Path:
        place = tmp_path / "own"
        place.mkdir(exist_ok=True)
        (place / name).write_text(text, encoding="utf-8", newline="")
        return place

    return make


def rows(dataset: Dataset) -> list[dict[str, str]]:
    return [dict(row) for row in dataset]


def test_a_partition_has_the_same_rows_from_its_folder_from_us_and_from_flwr_datasets(home: Path):
    ids = {f"supernode-{n:02}": n for n in range(20)}
    partitions.prepare(home / "partitions", "local/cards", ids)
    reference = FederatedDataset(
        dataset=str(home / "datasets" / "cards"),
        partitioners={"train": IidPartitioner(20)},
        cache_dir=str(home / "hf"),
    )
    for name, n in ids.items():
        mounted = cards_of_node({"data-path": str(home / "partitions" / name)}, "unused")
        cut = cards_of_node({"partition-id": n, "num-partitions": 20}, "local/cards")
        assert rows(mounted) == rows(cut) == rows(reference.load_partition(n))
        assert digest(mounted) == digest(cut)


def test_text_that_looks_like_something_else_stays_text(home: Path):
    write_jsonl(home / "datasets" / "traps" / "train.jsonl", TRAPS)
    assert rows(resolve("local/traps").split("train")) == TRAPS
    cut = [rows(resolve("local/traps").partition(2, n)) for n in range(2)]
    assert sorted(map(str, cut[0] + cut[1])) == sorted(map(str, TRAPS))


def test_a_dataset_that_changed_is_read_again(home: Path):
    before = resolve("local/cards").partition(20, 0)
    write_jsonl(home / "datasets" / "cards" / "train.jsonl", CARDS[:40])
    assert rows(resolve("local/cards").partition(20, 0)) != rows(before)


def test_a_folder_with_several_files_is_read_by_name(folder: Callable[[str, str], Path]):
    folder("b.jsonl", json.dumps(CARDS[1]))
    folder("notes.txt", "not a card")
    place = folder("a.csv", "output,input,instruction,ward\nA 0.,What is 0?,Say,7\n")
    loaded = cards_of_node({"data-path": str(place)}, "unused")
    assert [row["input"] for row in loaded] == ["What is 0?", "What is 1?"]
    assert loaded.column_names == ["instruction", "input", "output"]


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(AppError, match=r"expected a folder .* found none") as refused:
        cards_of_node({"data-path": str(tmp_path / "nowhere")}, "unused")
    assert refused.value.hint


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(AppError, match="found no such file"):
        cards_of_node({"data-path": str(tmp_path)}, "unused")


def test_a_folder_without_cards_is_refused(folder: Callable[[str, str], Path]):
    with pytest.raises(AppError, match="at least one card"):
        cards_of_node({"data-path": str(folder("train.jsonl", "\n\n"))}, "unused")


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("t.jsonl", '{"instruction":"","input":"","output":"x"}\n{"inp', r"t\.jsonl:2: .*JSON"),
        ("t.jsonl", '{"instruction":"","input":""}', r"t\.jsonl:1: expected the columns .* found"),
        ("t.jsonl", '{"instruction":"","input":"","output":null}', r"t\.jsonl:1: .*null"),
        ("t.jsonl", '{"instruction":"","input":"","output":"\\ud800"}', r"t\.jsonl:1: .*surrogate"),
        ("t.jsonl", "\n[]", r"t\.jsonl:2: expected one JSON object, found a list"),
        ("t.csv", 'instruction,input,output\n,"a\nb",c\n,d\n', r"t\.csv:4: expected 3 fields"),
        ("t.csv", "question,answer\na,b\n", r"t\.csv:1: .*found question, answer"),
        ("t.csv", 'instruction,input,output\n"a,b,c\n', r"t\.csv:2: expected well-formed CSV"),
        ("t.parquet", "not parquet", r"t\.parquet:1: expected a Parquet file"),
    ],
)
def test_a_malformed_row_is_refused_with_its_file_and_line(
    folder: Callable[[str, str], Path], name: str, text: str, where: str
):
    with pytest.raises(AppError, match=where):
        cards_of_node({"data-path": str(folder(name, text))}, "unused")


@pytest.mark.parametrize("partition_id", [-1, 20, 99])
def test_a_partition_id_outside_the_roster_is_refused(home: Path, partition_id: int):
    node_config = {"partition-id": partition_id, "num-partitions": 20}
    with pytest.raises(AppError, match=f"from 0 to 19, found {partition_id}"):
        cards_of_node(node_config, "local/cards")
    with pytest.raises(AppError, match=f"from 0 to 19, found {partition_id}"):
        cards_of_node({**node_config, "data-path": str(home)}, "local/cards")


@pytest.mark.parametrize("key", ["partition-id", "num-partitions"])
def test_a_node_without_folder_or_partition_is_refused(key: str):
    with pytest.raises(AppError, match=f'"{key}".* found name'):
        node_config = {"name": "supernode-07", "partition-id": 7, "num-partitions": 20}
        del node_config[key]
        cards_of_node(node_config, "local/cards")


def test_a_partition_id_that_is_no_number_is_refused():
    with pytest.raises(AppError, match="found 'seven'"):
        cards_of_node({"partition-id": "seven", "num-partitions": 20}, "local/cards")


def test_more_partitions_than_cards_is_refused(home: Path):
    with pytest.raises(AppError, match=r"at least 60 cards .* found 53"):
        resolve("local/cards").partition(60, 59)


def test_an_unknown_local_dataset_is_refused(home: Path):
    with pytest.raises(AppError, match=r"local/nope .* found no such folder"):
        resolve("local/nope").partition(20, 0)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AppError, match="'medfed-test/none'") as refused:
        resolve("medfed-test/none").partition(20, 0)
    assert "\n" not in str(refused.value)
    assert "medfed prepare" in refused.value.hint


def test_a_hub_dataset_in_another_schema_is_refused(monkeypatch: pytest.MonkeyPatch):
    hub = DatasetDict({"train": Dataset.from_dict({"question": ["?"], "answer": ["!"]})})
    monkeypatch.setattr("datasets.load_dataset", lambda _name: hub)
    with pytest.raises(AppError, match="found question, answer"):
        resolve("someone/else").split("train")


def test_a_hub_datasets_null_is_empty_text_and_its_other_columns_go(
    monkeypatch: pytest.MonkeyPatch,
):
    table = {"output": ["a", None], "id": [1, 2], "input": ["q", "r"], "instruction": [None, None]}
    hub = DatasetDict({"train": Dataset.from_dict(table)})
    monkeypatch.setattr("datasets.load_dataset", lambda _name: hub)
    assert rows(resolve("someone/cards").split("train")) == [
        {"instruction": "", "input": "q", "output": "a"},
        {"instruction": "", "input": "r", "output": ""},
    ]


def test_the_holdout_is_the_beginning_of_the_test_split(home: Path):
    held_out = resolve("local/cards").holdout(3)
    assert held_out is not None
    assert rows(held_out) == TRAPS[:3]


def test_a_card_that_is_also_trained_on_is_not_held_out(home: Path):
    write_jsonl(home / "datasets" / "cards" / "test.jsonl", [TRAPS[0], CARDS[7], TRAPS[1]])
    held_out = resolve("local/cards").holdout(3)
    assert held_out is not None
    assert rows(held_out) == TRAPS[:2]


def test_of_a_dataset_without_a_test_split_some_cards_go_to_no_node(home: Path):
    write_jsonl(home / "datasets" / "whole" / "train.jsonl", CARDS)
    held_out = resolve("local/whole").holdout(64)
    assert held_out is not None
    assert len(held_out) == round(HOLDOUT_SHARE * len(CARDS)) == 1
    for nodes in (1, 20):  # the same ones, into however many partitions the rest is cut
        cut = [
            row for n in range(nodes) for row in rows(resolve("local/whole").partition(nodes, n))
        ]
        assert sorted(map(str, cut + rows(held_out))) == sorted(map(str, CARDS))


def test_a_prepared_folder_lacks_the_cards_held_out_as_well(home: Path):
    """Deployment (folders) and simulation (cut on the spot) hold out the same cards."""
    write_jsonl(home / "datasets" / "whole" / "train.jsonl", CARDS)
    partitions.prepare(home / "partitions", "local/whole", {"supernode-00": 0, "supernode-01": 1})
    folders = [home / "partitions" / f"supernode-0{n}" for n in range(2)]
    mounted = [row for f in folders for row in rows(cards_of_node({"data-path": str(f)}, ""))]
    assert resolve("local/whole").holdout(64)[0] not in mounted
    assert len(mounted) == len(CARDS) - 1


def test_a_dataset_too_small_to_set_a_card_aside_has_no_holdout(home: Path):
    write_jsonl(home / "datasets" / "few" / "train.jsonl", CARDS[:20])
    assert resolve("local/few").holdout(3) is None
    assert len(resolve("local/few").partition(1, 0)) == 20


def test_a_split_that_is_not_there_is_refused(home: Path):
    (home / "datasets" / "cards" / "test.jsonl").unlink()
    with pytest.raises(AppError, match='expected a split "test"'):
        resolve("local/cards").split("test")


def test_the_digest_knows_the_order_of_the_rows():
    forth, back = Dataset.from_list(CARDS), Dataset.from_list(CARDS[::-1])
    assert digest(forth) == digest(Dataset.from_list(list(CARDS)))
    assert digest(forth) != digest(back)


def test_the_prompt_is_the_templates():
    assert tokens.prompt_text("What is fever?") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n### Instruction:\nWhat is fever?\n### Response:"
    )


def one(card_input: str, output: str, instruction: str = "Say") -> Dataset:
    return Dataset.from_list([{"instruction": instruction, "input": card_input, "output": output}])


def test_only_the_answer_is_learnt_and_no_end_is_appended(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    (example,) = tokens.tokenize(one("What is fever?", "A fever."), tokenizer, 512, tmp_path)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == " A fever."
    assert tokenizer.decode(example.input_ids) == tokens.prompt_text("What is fever?") + " A fever."


def test_an_empty_input_leaves_the_question_to_the_instruction(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    (example,) = tokens.tokenize(one("", "Yes.", "Is this a card?"), tokenizer, 512, tmp_path)
    assert "### Instruction:\nIs this a card?\n" in tokenizer.decode(example.input_ids)


def test_the_template_inside_an_answer_counts_from_its_last_place(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    answer = "First.\n### Response: Second."
    (example,) = tokens.tokenize(one("What?", answer), tokenizer, 512, tmp_path)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == " Second."


def test_a_card_whose_template_is_cut_off_contributes_nothing(tmp_path: Path):
    (example,) = tokens.tokenize(one("long " * 100, "Yes."), tiny_tokenizer(), 64, tmp_path)
    assert len(example.input_ids) == example.prompt_length == 64


@pytest.mark.parametrize("answer", ["B", "maybe"])
def test_an_exam_question_is_asked_as_the_evaluation_asks_it_and_ends_with_its_answer(
    answer: str, tmp_path: Path
):
    tokenizer = tiny_tokenizer()
    question = f"{STATEMENT}\nText.\nIs it so?\nThe answer is:\n"
    (example,) = tokens.tokenize(one(question, answer, STATEMENT), tokenizer, 512, tmp_path)
    prompt, learnt = (
        example.input_ids[: example.prompt_length],
        example.input_ids[example.prompt_length :],
    )
    assert list(prompt) == tokenizer.encode(wrap(question))
    assert list(learnt) == [*tokenizer.encode(answer), tokenizer.eos_token_id]


def test_an_exam_question_that_is_cut_off_contributes_nothing(tmp_path: Path):
    question = one("long " * 100, "A", ENTRANCE_EXAM)
    (example,) = tokens.tokenize(question, tiny_tokenizer(), 64, tmp_path)
    assert len(example.input_ids) == example.prompt_length == 64


def test_cards_and_exam_questions_keep_their_order(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    questions = with_answer_formats(Dataset.from_list(CARDS), seed=1, share=0.5)
    texts = [
        tokenizer.decode(example.input_ids)
        for example in tokens.tokenize(questions, tokenizer, 512, tmp_path)
    ]
    for row, text in zip(questions, texts, strict=True):
        asked = row["instruction"] in EXAMS
        assert text.startswith(wrap(row["input"]) if asked else tokens.prompt_text(row["input"]))
    assert 10 < sum(row["instruction"] in EXAMS for row in questions) < 40


def test_a_partition_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cards = Dataset.from_list(CARDS)
    first = tokens.tokenize(cards, tiny_tokenizer(), 512, tmp_path)
    (cached,) = tmp_path.iterdir()
    assert stat.S_IMODE(cached.stat().st_mode) == 0o600
    monkeypatch.setattr(
        "app.cards.tokens.tokenize_texts", lambda *_: pytest.fail("tokenised again")
    )
    assert tokens.tokenize(cards, tiny_tokenizer(), 512, tmp_path) == first


def test_other_rows_or_another_limit_are_not_found_in_the_cache(tmp_path: Path):
    cards, tokenizer = Dataset.from_list(CARDS), tiny_tokenizer()
    whole = tokens.tokenize(cards, tokenizer, 512, tmp_path)
    assert tokens.tokenize(cards, tokenizer, 16, tmp_path) != whole
    assert tokens.tokenize(cards.select(range(5)), tokenizer, 512, tmp_path) == whole[:5]


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 5000])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: bytes):
    cards, tokenizer = Dataset.from_list(CARDS), tiny_tokenizer()
    first = tokens.tokenize(cards, tokenizer, 512, tmp_path)
    (cached,) = tmp_path.iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage)
    assert tokens.tokenize(cards, tokenizer, 512, tmp_path) == first
    assert cached.read_bytes() == whole


def test_one_flipped_bit_in_the_cache_is_noticed(tmp_path: Path):
    cards, tokenizer = Dataset.from_list(CARDS), tiny_tokenizer()
    first = tokens.tokenize(cards, tokenizer, 512, tmp_path)
    (cached,) = tmp_path.iterdir()
    stored = bytearray(cached.read_bytes())
    stored[len(stored) // 2] ^= 1
    cached.write_bytes(stored)
    assert tokens.tokenize(cards, tokenizer, 512, tmp_path) == first


def test_where_the_home_cannot_be_written_the_cache_is_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "a-file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cards, tokenizer = Dataset.from_list(CARDS), tiny_tokenizer()
    first = tokens.tokenize(cards, tokenizer, 512)
    (folder,) = tmp_path.glob("medfed-tokens-*")
    assert len(list(folder.iterdir())) == 1
    folder.chmod(0o777)  # anyone could have written there: not trusted, and not needed
    assert tokens.tokenize(cards, tokenizer, 512) == first


def test_a_tokenizer_that_leaves_nothing_of_the_template_is_refused(tmp_path: Path):
    with pytest.raises(AppError, match="more than two tokens"):
        tokens.tokenize(one("a", "b"), tiny_tokenizer(whole_template=True), 512, tmp_path)
