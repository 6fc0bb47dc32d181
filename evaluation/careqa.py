"""CareQA: Spanish specialised health training exams in English, four options (5,621 questions)."""

from __future__ import annotations

from evaluation.medmcqa import ENTRANCE_EXAM
from evaluation.task import LETTERS, HubSource, Row, Task, multiple_choice


class CareQA(Task):
    """The English closed-ended questions; the leaderboard asks them in MedMCQA's words."""

    name = "careqa"
    title = "CareQA"
    instruction = ENTRANCE_EXAM
    answers = LETTERS
    columns = ("question", "op1", "op2", "op3", "op4", "cop")
    hub = HubSource("HPAI-BSC/CareQA", "CareQA_en", "test", scripted=False)

    def ask(self, row: Row) -> str:
        """The question and its four options."""
        return multiple_choice(row["question"], [row[key] for key in ("op1", "op2", "op3", "op4")])

    def gold(self, row: Row) -> str:
        """The letter of the correct option; ``cop`` counts from 1."""
        position = int(row["cop"]) - 1
        return LETTERS[position] if 0 <= position < len(LETTERS) else f"cop {row['cop']}"
