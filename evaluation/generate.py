"""Greedy answers to many prompts: faster than one prompt at a time, with the same answers.

The leaderboard asks one prompt at a time. This engine is faster and changes no answer:

- All prompts of a benchmark begin with the same instruction. The keys and values of this shared
  prefix are computed once for all batches.
- Sample packing puts prompts of similar length into one forward pass (``evaluation.prompts``).
  Logits are computed only for the last position of each, where the answer's first token is chosen.
- The operations between the matrix products are fused (``app.training.fused``).
- The logits that choose the answer also rank the answers on offer, at no further cost.

A batch rounds the last bits of a logit differently, and so could decide otherwise between two
nearly equal tokens. A prompt whose choice is closer than ``NEAR_TIE`` is therefore asked again,
alone, as the leaderboard's loop asks it: that answer counts, and the report says how many there
were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from app.training.attention import SharedPrefix
from app.training.fused import fused
from common.errors import EvaluationError
from evaluation.model import Subject
from evaluation.prompts import (
    next_token_logits,
    prompt_attention,
    read_prefix,
    why_not_packed,
)
from evaluation.task import wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Logits of a batch differ from those of a prompt alone by rounding, in float32 by some 4e-5
# (measured in docs/evaluation.md). A prompt whose choice is closer than this is asked alone.
NEAR_TIE = 2e-3

# Tokens in one forward pass. A CPU reaches full speed at some hundreds, and more tokens than fit
# its caches make it slower again; a GPU needs more.
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}

# Settings of a model's generation config that make greedy search choose another token than the one
# with the highest logit, each with the values that mean "off".
_PLAIN_GREEDY: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "exponential_decay_length_penalty": (None,),
    "penalty_alpha": (None,),
}


@dataclass(frozen=True)
class Request:
    """One prompt (without chat wrapper) and how many tokens the answer may have."""

    prompt: str
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """A model's answer to one request.

    Attributes:
        output: the generated text.
        scores: unnormalised log-likelihood of each answer on offer, by its first token.
        alone: whether the choice was too close in a batch, so that the prompt was asked alone.
    """

    output: str
    scores: tuple[float, ...]
    alone: bool


def one_by_one(subject: Subject, request: Request) -> str:
    """Answer one prompt as the leaderboard's loop does: no batch, no padding, ``generate``."""
    tokenizer, model = subject.tokenizer, subject.model
    ids = tokenizer.encode(wrap(request.prompt), return_tensors="pt").to(model.device)
    with torch.inference_mode():
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))


def why_one_by_one(subject: Subject) -> str | None:
    """Why this model must be asked one prompt at a time, or None if batches are as good."""
    if subject.quantization == 8:
        return (
            "8-bit arithmetic looks for outliers across a whole batch, so a batch changes answers"
        )
    if subject.packed and subject.model.device.type == "cpu":
        return "bitsandbytes' 4-bit kernel for CPUs rounds to bfloat16, so a batch changes answers"
    config = subject.model.generation_config
    for name, off in _PLAIN_GREEDY.items():
        value = getattr(config, name, None)
        if value not in off:
            return f"its generation config sets {name} to {value}"
    return why_not_packed(subject.model)


def spellings(answer: str) -> list[str]:
    """How an answer may begin: in any usual case, with or without a leading space."""
    forms = [answer] if len(answer) == 1 else [answer, answer.capitalize(), answer.upper()]
    return [*forms, *(f" {form}" for form in forms)]


def first_tokens(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """For each answer the tokens that it may begin with and no other answer may.

    Raises:
        EvaluationError: the tokenizer cannot tell the answers apart by their first token.
    """
    before = wrap("")
    prefix: list[int] = tokenizer.encode(before)
    found: list[set[int]] = []
    for answer in answers:
        tokens = set()
        for spelling in spellings(answer):
            ids: list[int] = tokenizer.encode(before + spelling)
            # A spelling that merges with the wrapper's last token cannot be generated after it.
            if ids[: len(prefix)] == prefix and len(ids) > len(prefix):
                tokens.add(ids[len(prefix)])
        found.append(tokens)
    shared = {t for i, a in enumerate(found) for b in found[i + 1 :] for t in a & b}
    if not all(tokens - shared for tokens in found):
        raise EvaluationError(
            f"expected first tokens that tell {', '.join(answers)} apart, found none in this "
            "tokenizer",
            "use a model whose tokenizer keeps short words whole",
        )
    return [sorted(tokens - shared) for tokens in found]


class Engine:
    """Answers the requests of one benchmark with one model.

    Args:
        subject: the model.
        answers: the answers on offer, scored by their first token.
        batch_tokens: most tokens in one forward pass, by default ``BATCH_TOKENS`` of the device.
        near_tie: difference of two logits below which a prompt is asked alone.
    """

    def __init__(
        self,
        subject: Subject,
        answers: Sequence[str],
        *,
        batch_tokens: int | None = None,
        near_tie: float = NEAR_TIE,
    ) -> None:
        self._subject = subject
        self._model = subject.model
        self._tokenizer = subject.tokenizer
        self._device: torch.device = subject.model.device
        self._batch_tokens = batch_tokens or BATCH_TOKENS[self._device.type]
        self._near_tie = near_tie
        self._first = first_tokens(subject.tokenizer, answers)
        self._alone = why_one_by_one(subject) is not None
        self._ends = _end_tokens(subject.model)

    def answers(
        self, requests: Sequence[Request], skip: frozenset[int] = frozenset()
    ) -> Iterator[dict[int, Answer]]:
        """Answer requests, batch by batch, longest first.

        Args:
            requests: all requests of the benchmark, because they decide the batches.
            skip: numbers of requests that need no answer; the batches are the same without it.

        Yields:
            Answers by request number, after each batch; prompts asked alone come last.
        """
        encoded = [list(self._tokenizer.encode(wrap(request.prompt))) for request in requests]
        shared = 0 if self._alone else shared_prefix(encoded)
        lengths = [len(ids) - shared for ids in encoded]
        batches = [
            numbers
            for numbers in batches_by_length(lengths, 1 if self._alone else self._batch_tokens)
            if not skip.issuperset(numbers)
        ]
        alone = [n for numbers in batches for n in numbers]
        if not self._alone:
            doubtful: set[int] = set()
            for found, close in self._batch_answers(requests, encoded, batches, shared):
                doubtful |= close
                yield found
            alone = [n for n in alone if n in doubtful]
        for n in alone:
            yield {n: self._ask_alone(requests[n], encoded[n])}

    def _batch_answers(
        self,
        requests: Sequence[Request],
        encoded: Sequence[list[int]],
        batches: Sequence[list[int]],
        shared: int,
    ) -> Iterator[tuple[dict[int, Answer], set[int]]]:
        """For each batch its answers, and the numbers of the requests that are too close.

        On a CPU each core runs a batch of its own. Cores that share one batch wait for each other
        at every matrix product; cores with a batch each do not, which matters most on a busy
        machine.
        """
        workers = torch.get_num_threads() if self._device.type == "cpu" else 1

        def ask(numbers: list[int]) -> tuple[dict[int, Answer], set[int]]:
            with torch.inference_mode():
                return self._ask(requests, encoded, numbers, prefix)

        if not batches:
            return
        with (
            prompt_attention(self._model),
            fused(self._model),
            _threads_each(1 if workers > 1 else None),
            ThreadPoolExecutor(workers) as pool,
        ):
            with torch.inference_mode():
                prefix = read_prefix(self._model, encoded[0][:shared])
            yield from pool.map(ask, batches)

    def _ask(
        self,
        requests: Sequence[Request],
        encoded: Sequence[list[int]],
        numbers: Sequence[int],
        prefix: SharedPrefix,
    ) -> tuple[dict[int, Answer], set[int]]:
        """Answer one batch; each further token costs a pass, but nearly all answers have one."""
        generated: dict[int, list[int]] = {n: [] for n in numbers}
        scores: dict[int, tuple[float, ...]] = {}
        found: dict[int, Answer] = {}
        close: set[int] = set()
        while generated:
            rows = [[*encoded[n][prefix.length :], *tokens] for n, tokens in generated.items()]
            logits = next_token_logits(self._model, prefix, rows)
            best = logits.topk(2, dim=-1)
            for row, n in enumerate(list(generated)):
                margins = [best.values[row].tolist()]
                if n not in scores:
                    scores[n] = self._scores(logits[row])
                    margins.append(sorted(scores[n])[-2:])
                generated[n].append(int(best.indices[row, 0]))
                if any(self._too_close(margin) for margin in margins):
                    close.add(n)
                elif self._is_complete(generated[n], requests[n]):
                    found[n] = Answer(self._text(generated[n]), scores[n], alone=False)
            generated = {
                n: tokens for n, tokens in generated.items() if n not in found and n not in close
            }
        return found, close

    def _ask_alone(self, request: Request, ids: list[int]) -> Answer:
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                use_cache=False,
                logits_to_keep=1,
            ).logits
        return Answer(one_by_one(self._subject, request), self._scores(logits[0, -1]), alone=True)

    def _scores(self, logits: Tensor) -> tuple[float, ...]:
        return tuple(float(logits[tokens].float().logsumexp(0)) for tokens in self._first)

    def _too_close(self, values: Sequence[float]) -> bool:
        return abs(values[0] - values[1]) < self._near_tie

    def _is_complete(self, tokens: Sequence[int], request: Request) -> bool:
        return tokens[-1] in self._ends or len(tokens) == request.max_new_tokens

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the prefix that all sequences share; each keeps at least one token of its own."""
    if len(sequences) < 2:
        return 0
    # In lexicographic order, a prefix of the first and the last is a prefix of all.
    ordered = sorted(map(tuple, sequences))
    first, last = ordered[0], ordered[-1]
    limit = min(map(len, sequences)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Pack the numbers of sequences, longest first, into batches of at most ``batch_tokens``.

    A longer sequence is a batch of its own. Equal lengths give equal batches.
    """
    batches: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room < lengths[number] or not batches:
            batches.append([])
            room = batch_tokens
        batches[-1].append(number)
        room -= lengths[number]
    return batches


def _end_tokens(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


@contextmanager
def _threads_each(threads: int | None) -> Iterator[None]:
    """Let each operation use that many threads of torch; None: leave their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
