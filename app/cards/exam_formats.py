"""Exam questions made from a hospital's own cards, in the leaderboard's answer formats.

A flashcard teaches a model to answer in sentences. The leaderboard's benchmarks ask for a bare
letter, or for yes, no or maybe. A model that has never seen these formats scores near zero,
whatever it knows. A share of a partition's cards can therefore be turned into such questions:

- **choice**: the card's question, with its own answer among the answers of three other cards;
- **statement**: a claim about a subject, to be judged by a text made of cards. The text confirms
  the claim (yes), says something else of the subject (no), or is about another subject (maybe).

The hospital's own cards prove every right answer: no text is falsified and no other data is used.
Letters are drawn uniformly, so that guessing one position gains nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import AppError
from app.seeds import derive

if TYPE_CHECKING:
    from datasets import Dataset

# The leaderboard's wording. evaluation/ keeps a copy of its own on purpose: a change here must not
# change how an entry is measured (a test compares the two).
STATEMENT = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
    "following statement is correct? Answer yes, no, or maybe."
)
ENTRANCE_EXAM = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and standard "
    "practices referenced in medical guidelines."
)
LICENSING_EXAM = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to "
    "demonstrate your understanding of basic and clinical science, medical knowledge, and "
    "mechanisms underlying health, disease, patient care, and modes of therapy. Show your "
    "ability to apply the knowledge essential for medical practice. For the following "
    "multiple-choice question, select one correct answer from A to E. Base your answer on the "
    "current and standard practices referenced in medical guidelines."
)

EXAMS = frozenset({STATEMENT, ENTRANCE_EXAM, LICENSING_EXAM})

LETTERS = "ABCD"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# 84 % of published papers support the hypothesis that they test (Fanelli 2010, PLoS ONE 5(4):
# e10068): a model that cannot tell the answer does best to give the most frequent one.
VERDICTS = {"yes": 0.84, "no": 0.11, "maybe": 0.05}

# How many candidates a choice's wrong answers are picked from, and the most words of an option.
_CANDIDATES = 16
_OPTION_WORDS = 6

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# "Subject is (not) rest." A comma in the subject usually means a clause with another verb.
_CLAIM = re.compile(
    r"(?P<subject>[^,;:()]{3,90}?) (?P<verb>is|are|was|were|can|may|should) "
    r"(?P<negated>not )?(?P<rest>[^;:]{8,220})[.]"
)
_RELATIVE = re.compile(r"\b(that|which|who|when|if|while|because)\b", re.IGNORECASE)
# First words of a sentence that are no names: inside a sentence they lose their capital letter.
_LOWER_CASE_STARTS = _words(
    "a an the this these those some many most all both patients treatment symptoms"
)
_STOP_WORDS = _words(
    "a an the of in on at to for and or with by from as is are was were be been can may should "
    "does do did has have had it its this that these those which what who how why when where "
    "there their some one two common commonly used called known type types"
)


@dataclass(frozen=True)
class _Claim:
    """A sentence that can be asked as a yes/no question."""

    subject: str
    verb: str
    negated: bool
    rest: str

    def question(self, rest: str | None = None) -> str:
        """Ask the claim, without its "not", as a question; ``rest`` replaces its predicate."""
        start, _, others = self.subject.partition(" ")
        if start.lower() in _LOWER_CASE_STARTS:
            start = start.lower()
        subject = f"{start} {others}".strip()
        return f"{self.verb.capitalize()} {subject} {self.rest if rest is None else rest}?"


@dataclass(frozen=True)
class _Card:
    """A card, parsed once for all the questions that it takes part in."""

    question: str
    answer: str
    option: str
    words: frozenset[str]
    claim: _Claim | None


def wrapped(prompt: str) -> str:
    """The prompt in the chat wrapper that the leaderboard's evaluation uses for every model."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


def with_answer_formats(dataset: Dataset, *, seed: int, share: float) -> Dataset:
    """Turn a share of a partition's cards into exam questions; the others do not change.

    Args:
        dataset: text columns instruction, input, output; one hospital's cards.
        seed: decides every random choice; each partition needs its own
            (``derive(seed, "formats", id)``).
        share: of the cards, from 0 to 1. A card that fits neither format does not change, nor does
            any card of a hospital with fewer than four different answers.

    Returns:
        As many rows, in the same order and schema. In a row that became a question, ``input`` is
        the whole prompt in the leaderboard's wording, ``output`` a letter, yes, no or maybe, and
        ``instruction`` one of ``EXAMS``.

    Raises:
        AppError: ``share`` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise AppError(
            f"expected a share of cards from 0 to 1, found {share}", "0.75 is three cards of four"
        )
    if not share:
        return dataset
    rows = list(zip(dataset["instruction"], dataset["input"], dataset["output"], strict=True))
    cards = [_parsed(question or instruction, answer) for instruction, question, answer in rows]
    rng = random.Random(derive(seed, "answer-formats"))  # noqa: S311 - not for secrets
    chosen = set(rng.sample(range(len(rows)), round(share * len(rows))))
    out = []
    for number, row in enumerate(rows):
        # A generator of its own for each card: another share changes which cards become questions,
        # not what they become.
        own = random.Random(derive(seed, "answer-formats", number))  # noqa: S311 - not for secrets
        out.append((_as_question(number, cards, own) or row) if number in chosen else row)
    columns = {
        name: [row[i] for row in out] for i, name in enumerate(("instruction", "input", "output"))
    }
    return type(dataset).from_dict(columns, features=dataset.select_columns(list(columns)).features)


def _parsed(question: str, answer: str) -> _Card:
    question, answer = " ".join(question.split()), " ".join(answer.split())
    sentence = _SENTENCE_END.split(answer)[0]
    match = _CLAIM.fullmatch(sentence)
    claim = None
    if match and not _RELATIVE.search(match["subject"]):
        claim = _Claim(match["subject"], match["verb"], bool(match["negated"]), match["rest"])
    return _Card(question, answer, _option(question, sentence), _content_words(question), claim)


def _option(question: str, sentence: str) -> str:
    """An exam option: the first words of a sentence that do not repeat the question."""
    asked = {word.lower() for word in re.findall(r"[\w-]+", question)} | _STOP_WORDS
    words = sentence.rstrip(".!?").split()
    start = 0
    while start < len(words) and re.sub(r"[^\w-]", "", words[start]).lower() in asked:
        start += 1
    kept = (words[start:] or words)[:_OPTION_WORDS]
    while len(kept) > 1 and kept[-1].lower() in _STOP_WORDS:
        kept.pop()
    return " ".join(kept).strip(" ,;:")


def _content_words(text: str) -> frozenset[str]:
    return frozenset(w for w in re.findall(r"[\w-]+", text.lower()) if w not in _STOP_WORDS)


def _as_question(
    number: int, cards: Sequence[_Card], rng: random.Random
) -> tuple[str, str, str] | None:
    """One card as the row of an exam question, or None where it fits no format."""
    # About half of all cards hold a claim, so about a quarter of the questions are statements.
    kind = rng.choice((STATEMENT, STATEMENT, ENTRANCE_EXAM, LICENSING_EXAM))
    asked = _statement(number, cards, rng) if kind == STATEMENT else None
    if asked is None:
        kind = kind if kind != STATEMENT else rng.choice((ENTRANCE_EXAM, LICENSING_EXAM))
        asked = _choice(number, cards, rng)
    if asked is None:
        return None
    body, answer = asked
    return kind, f"{kind}\n{body}\nThe answer is:\n", answer


def _choice(number: int, cards: Sequence[_Card], rng: random.Random) -> tuple[str, str] | None:
    """The card's answer among three others; half of the time those nearest in subject."""
    card = cards[number]
    if not card.question or not card.option:
        return None
    others = rng.sample(range(len(cards)), min(len(cards), 4 * _CANDIDATES))
    first_word = card.question.split()[0].lower()
    # Questions with the same first word ("which", "how") have answers of the same kind; others
    # would give themselves away by their grammar.
    others.sort(key=lambda i: cards[i].question.lower().startswith(first_word), reverse=True)
    wrong: dict[str, frozenset[str]] = {}
    for i in others:
        option = cards[i].option
        # An option that the card's own answer contains would be right too, and so might be the
        # answer of a card that asks the same in other words.
        right = option.lower() in card.answer.lower() or cards[i].words == card.words
        known = option.lower() in (text.lower() for text in wrong)
        if i != number and option and not right and not known:
            wrong[option] = cards[i].words
        if len(wrong) == _CANDIDATES:
            break
    picked = list(wrong)
    if rng.random() < 0.5:
        picked.sort(key=lambda text: len(wrong[text] & card.words), reverse=True)
    if len(picked) < len(LETTERS) - 1:
        return None
    position = rng.randrange(len(LETTERS))
    options = picked[: len(LETTERS) - 1]
    rng.shuffle(options)
    options.insert(position, card.option)
    question = card.question if card.question.endswith(("?", ".")) else f"{card.question}?"
    lettered = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True))
    return f"Question: {question}\n\nOptions:\n{lettered}", LETTERS[position]


def _statement(number: int, cards: Sequence[_Card], rng: random.Random) -> tuple[str, str] | None:
    """A claim of the card, to be judged by a text of two cards' answers."""
    card = cards[number]
    claim = card.claim
    others = [i for i in rng.sample(range(len(cards)), min(len(cards), 64)) if i != number]
    strangers = [cards[i] for i in others if not cards[i].words & card.words]
    if claim is None or len(strangers) < 2:
        return None
    verdict = rng.choices(list(VERDICTS), weights=list(VERDICTS.values()))[0]
    question = claim.question()
    if claim.negated and verdict != "maybe":
        verdict = "no"
    elif verdict == "no":
        # The predicate of another subject, with the same verb, so that the sentence is grammatical.
        same_verb = [c.claim.rest for c in strangers if c.claim and c.claim.verb == claim.verb]
        wrong = [rest for rest in same_verb if rest.lower() not in card.answer.lower()]
        if not wrong:
            return None
        question = claim.question(wrong[0])
    text = [strangers[0].answer, strangers[1].answer if verdict == "maybe" else card.answer]
    rng.shuffle(text)
    context = "\n".join(text)
    return f"{context}\n{question}", verdict
