"""From a card to tokens: the FlowerTune medical template, with loss on the answer alone.

A card that was put as an exam question (``app.cards.exam_formats``) is asked in the exam's wrapper
instead.

The reference trains with TRL's DataCollatorForCompletionOnlyLM. What that does, and this keeps:

- The text is the prompt below; the card's ``instruction`` column is not in it.
- The answer begins after the *last* place where the tokens of the response template stand. The
  first two tokens of the template are left out of the comparison (for a SmolLM2 what remains is
  `` Response:``), so an answer with those tokens inside counts from there only.
- No end-of-text token is appended, and a text longer than ``seq_length`` loses its end.
- Where the template is cut off with it, nothing is left to learn from: no token counts.

An exam's answer is a letter or a word and nothing after it: the prompt is tokenised as the
evaluation tokenises it, the answer follows, and the end of the text is learnt with it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from app.cards.exam_formats import EXAMS, wrapped
from app.cards.rows import digest, rows_of
from app.cards.token_cache import TokenCache
from app.errors import AppError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
RESPONSE_TEMPLATE = "\n### Response:"

# Part of every cache key: a change to the tokenisation below must not find old tokens.
_CACHE_VERSION = "3"


class Example(NamedTuple):
    """One tokenised card.

    ``input_ids``: 1 to seq_length token ids, neither padded nor ended.
    ``prompt_length``: how many of them are the prompt; ``input_ids[prompt_length:]`` are the
    labels. Equal to the length where truncation left no answer.
    """

    input_ids: tuple[int, ...]
    prompt_length: int


def prompt_text(card_input: str, instruction: str = "") -> str:
    """The prompt of a card, up to and including ``### Response:``.

    The question is the card's ``input``; ``instruction`` stands in only where that is empty.
    """
    return f"{PREAMBLE}\n### Instruction:\n{card_input or instruction}{RESPONSE_TEMPLATE}"


def card_text(card_input: str, output: str, instruction: str = "") -> str:
    """The whole training text of a card."""
    return f"{prompt_text(card_input, instruction)} {output}"


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    cache_dir: Path | None = None,
) -> list[Example]:
    """Tokenise every card of ``dataset``, in order, once: the result is kept on disk.

    Args:
        dataset: text columns instruction, input, output. A row whose instruction is one of
            ``app.cards.exam_formats.EXAMS`` is an exam question, its input the whole prompt.
        tokenizer: a fast tokenizer.
        seq_length: the most tokens an example may have.
        cache_dir: where results are kept, by default ``$MEDFED_HOME/cache/tokens``, or a private
            folder among the temporary files where that cannot be written (a container's root).

    Raises:
        AppError: the tokenizer is not a fast one or splits the response template too coarsely.
    """
    cache = TokenCache.usual() if cache_dir is None else TokenCache(cache_dir)
    key = "\n".join(
        (_CACHE_VERSION, digest(dataset), _tokenizer_digest(tokenizer), str(seq_length))
    )
    cached = cache.read(key)
    if cached is not None:
        return [Example(*example) for example in cached]
    rows = list(rows_of(dataset))
    cards = [row for row in rows if row[0] not in EXAMS]
    exam = [row for row in rows if row[0] in EXAMS]
    texts = [card_text(question, output, instruction) for instruction, question, output in cards]
    as_cards = iter(tokenize_texts(texts, tokenizer, seq_length))
    asked = [(prompt, answer) for _, prompt, answer in exam]
    as_exam = iter(tokenize_exam(asked, tokenizer, seq_length))
    examples = [next(as_exam if row[0] in EXAMS else as_cards) for row in rows]
    cache.write(key, examples)
    return examples


def tokenize_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> list[Example]:
    """Tokenise texts of the template in one batch, without a cache.

    Raises:
        AppError: as ``tokenize``.
    """
    if not texts:
        return []
    template = _response_ids(tokenizer)
    batch = tokenizer(
        list(texts),
        truncation=True,
        max_length=seq_length,
        padding=False,
        return_attention_mask=False,
    )
    return [Example(tuple(ids), _prompt_length(ids, template)) for ids in batch["input_ids"]]


def tokenize_exam(
    questions: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> list[Example]:
    """Tokenise exam questions, (prompt without wrapper, answer) each, without a cache.

    A question longer than ``seq_length`` loses its end, and with it what could be learnt from it.
    """
    if not questions:
        return []
    prompts = tokenizer([wrapped(prompt) for prompt, _ in questions])["input_ids"]
    answers = tokenizer([answer for _, answer in questions], add_special_tokens=False)["input_ids"]
    return [
        Example(
            (*prompt, *answer, tokenizer.eos_token_id)[:seq_length], min(len(prompt), seq_length)
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _response_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer.encode(RESPONSE_TEMPLATE, add_special_tokens=False)[2:]
    if not ids:
        raise AppError(
            f"expected more than two tokens for {RESPONSE_TEMPLATE!r}, found none left to search "
            "for in this tokenizer",
            "choose a model whose tokenizer splits the response template into more tokens",
        )
    return ids


def _prompt_length(ids: list[int], template: list[int]) -> int:
    for start in range(len(ids) - len(template), -1, -1):
        if ids[start : start + len(template)] == template:
            return start + len(template)
    return len(ids)


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise AppError(
            f"expected a fast tokenizer, found {type(tokenizer).__name__}",
            "choose a model that ships a tokenizer.json",
        )
    # A tokenizer from a folder is what its file says and what was added since: reading that is
    # quicker than spelling out 49,152 tokens again, in every message.
    file = Path(tokenizer.name_or_path) / "tokenizer.json"
    if file.is_file():
        added = sorted(tokenizer.get_added_vocab().items())
        return hashlib.sha256(file.read_bytes() + repr(added).encode()).hexdigest()
    backend = tokenizer.backend_tokenizer
    # Left over from the last call, and set anew by each: not part of what the tokenizer is.
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()
