"""The embedded model as it is: fetched and converted where it is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedded import flashcards, model
from medfed.paths import Home

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def folder() -> Path:
    home = Home.from_environment()
    model.prepare(home.models)
    return home.models / model.NAME


def test_its_tokenizer_is_smollm2s(folder: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token == "<|im_end|>"
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert tokenizer.encode("\n### Response:") == [198, 3757, 14212, 42]
    # Digits stand alone, and the spaces before one stay together.
    assert tokenizer.tokenize("a  12 mg") == ["a", "ĠĠ", "1", "2", "Ġmg"]
    for text in ("α-synuclein  12 mg/dl\n\n### Response: é", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_it_answers_a_medical_question(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On a busy machine, threads that wait for one another take longer than one alone.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is tachycardia?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = tokenizer.decode(
        loaded.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked.input_ids.shape[1] :]
    )
    torch.set_num_threads(threads)
    assert "heart" in answer.lower()


def test_the_deck_has_16449_cards(tmp_path: Path):
    flashcards.prepare(tmp_path)
    lines = {
        split: (tmp_path / "hpo-flashcards" / f"{split}.jsonl").read_bytes().count(b"\n")
        for split in ("train", "test")
    }
    assert lines == {"train": 15_937, "test": 512}
