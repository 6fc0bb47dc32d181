"""What a hospital wants to know about its own cards before a run does: can they be used, and how
long are they."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from app.cards.files import BadRow, Card, card_files, scan
from app.cards.tokens import card_text
from app.errors import AppError
from app.paths import local_folder


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of the training texts in tokens, before truncation.

    ``over_seq_length``: the share (0 to 1) that is longer than ``seq_length`` and would be cut.
    """

    mean: float
    p95: int
    max: int
    seq_length: int
    over_seq_length: float


@dataclass(frozen=True)
class DataReport:
    """What a folder or file of cards holds.

    ``rows`` counts every row, ``duplicates`` the cards that repeat an earlier one word for word,
    ``empty_answers`` those without an answer; each of the last kind is also in ``bad_rows``.
    ``tokens`` is None without a tokenizer or without a card that can be used.
    """

    files: tuple[Path, ...]
    rows: int
    empty_answers: int
    duplicates: int
    tokens: TokenLengths | None
    bad_rows: tuple[BadRow, ...]

    def as_json(self) -> dict[str, object]:
        """The report in JSON's own types."""
        return {
            **asdict(self),
            "files": [str(file) for file in self.files],
            "bad_rows": [
                {"file": str(bad.file), "line": bad.line, "reason": bad.reason}
                for bad in self.bad_rows
            ],
        }


def check(
    path: Path,
    token_counts: Callable[[Sequence[str]], Sequence[int]] | None = None,
    seq_length: int = 512,
) -> DataReport:
    """Read every row at ``path`` (a file, or a folder of them) and report on all of them.

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.parquet`` file, or a folder with such files.
        token_counts: how many tokens each of some texts has, in a model's tokenizer.
        seq_length: the run's limit, in tokens.

    Raises:
        AppError: there is nothing to read at ``path``, or no row at all.
    """
    files = [path] if path.is_file() else card_files(path)
    cards: list[Card] = []
    bad: list[BadRow] = []
    rows = empty = 0
    for found in scan(files):
        rows += 1
        if isinstance(found, BadRow):
            bad.append(found)
        elif not found.card.output.strip():
            empty += 1
            bad.append(BadRow(found.file, found.line, 'expected an answer in "output", found none'))
        else:
            cards.append(found.card)
    if not rows:
        raise AppError(f"expected at least one card in {path}, found none", "put some there")
    return DataReport(
        files=tuple(files),
        rows=rows,
        empty_answers=empty,
        duplicates=len(cards) - len(set(cards)),
        tokens=_token_lengths(cards, token_counts, seq_length),
        bad_rows=tuple(bad),
    )


def token_counter(model: str) -> Callable[[Sequence[str]], list[int]]:
    """Count tokens as a model's tokenizer does, without truncation.

    Args:
        model: as in the run config; only its tokenizer is loaded.

    Raises:
        AppError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = local_folder("models", model)
    hint = "check the name, or run `medfed prepare` for the embedded model"
    if folder is not None and not folder.is_dir():
        raise AppError(f"expected a model in {folder}, found no such folder", hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or model), use_fast=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AppError(f"expected the tokenizer of {model}, found none ({reason})", hint) from error

    def count(texts: Sequence[str]) -> list[int]:
        batch = tokenizer(list(texts), return_attention_mask=False, verbose=False)
        return [len(ids) for ids in batch["input_ids"]]

    return count


def _token_lengths(
    cards: Sequence[Card],
    token_counts: Callable[[Sequence[str]], Sequence[int]] | None,
    seq_length: int,
) -> TokenLengths | None:
    if token_counts is None or not cards:
        return None
    texts = [card_text(card.input, card.output, card.instruction) for card in cards]
    lengths = sorted(token_counts(texts))
    return TokenLengths(
        mean=sum(lengths) / len(lengths),
        # The nearest rank: the shortest length that 95 % of the cards do not exceed.
        p95=lengths[-(-95 * len(lengths) // 100) - 1],
        max=lengths[-1],
        seq_length=seq_length,
        over_seq_length=sum(length > seq_length for length in lengths) / len(lengths),
    )
