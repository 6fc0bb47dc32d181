"""MedMCQA: Indian medical entrance exams, four options (4,183 questions)."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import EvaluationError
from evaluation.task import LETTERS, HubSource, Row, Task, multiple_choice

ENTRANCE_EXAM = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and standard "
    "practices referenced in medical guidelines."
)


class MedMCQA(Task):
    """The validation split: the test split's answers were never published."""

    name = "medmcqa"
    title = "MedMCQA"
    instruction = ENTRANCE_EXAM
    answers = LETTERS
    columns = ("question", "opa", "opb", "opc", "opd", "cop")
    hub = HubSource("medmcqa", None, "validation", scripted=False)

    _first = 0

    def understand(self, rows: Sequence[Row], *, from_hub: bool) -> None:
        """Find out whether ``cop`` counts from 0 (the hub) or from 1 (the authors' own files)."""
        seen = {int(row["cop"]) for row in rows}
        if from_hub or (0 in seen and 4 not in seen):
            self._first = 0
        elif 4 in seen and 0 not in seen:
            self._first = 1
        else:
            raise EvaluationError(
                "expected cop of MedMCQA to count from 0 (0 to 3) or from 1 (1 to 4), "
                f"found {', '.join(map(str, sorted(seen)))}",
                "give the whole file: which of the two it is shows from all of its answers",
            )

    def ask(self, row: Row) -> str:
        """The question and its four options."""
        return multiple_choice(row["question"], [row[key] for key in ("opa", "opb", "opc", "opd")])

    def gold(self, row: Row) -> str:
        """The letter of the correct option."""
        position = int(row["cop"]) - self._first
        return LETTERS[position] if 0 <= position < len(LETTERS) else f"cop {row['cop']}"
