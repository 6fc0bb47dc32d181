"""MedQA: the US Medical Licensing Examination, four options (1,273 questions)."""

from __future__ import annotations

from evaluation.task import LETTERS, HubSource, Row, Task, multiple_choice


class MedQA(Task):
    """The English test split with four options (the instruction speaks of A to E all the same)."""

    name = "medqa"
    title = "MedQA"
    instruction = (
        "You are a medical doctor taking the US Medical Licensing Examination. You need to "
        "demonstrate your understanding of basic and clinical science, medical knowledge, and "
        "mechanisms underlying health, disease, patient care, and modes of therapy. Show your "
        "ability to apply the knowledge essential for medical practice. For the following "
        "multiple-choice question, select one correct answer from A to E. Base your answer on the "
        "current and standard practices referenced in medical guidelines."
    )
    answers = LETTERS
    columns = ("question", "options", "answer")
    hub = HubSource("bigbio/med_qa", "med_qa_en_4options_source", "test", scripted=True)

    def ask(self, row: Row) -> str:
        """The vignette and its options."""
        return multiple_choice(row["question"], [value for _, value in self._options(row)])

    def gold(self, row: Row) -> str:
        """The letter of the first option that says what ``answer`` says."""
        for key, value in self._options(row):
            if value == row["answer"]:
                return key
        return f"none of the options: {row['answer']}"

    def _options(self, row: Row) -> list[tuple[str, str]]:
        """Letter and text of each option: the authors keep an object, the hub a list of pairs."""
        options = row["options"]
        if isinstance(options, dict):
            return [(str(key), str(value)) for key, value in options.items()]
        return [(str(option["key"]), str(option["value"])) for option in options]
