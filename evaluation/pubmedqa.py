"""PubMedQA: does this abstract answer its own question with yes, no or maybe? (500 questions)."""

from __future__ import annotations

from evaluation.task import HubSource, Row, Task


class PubMedQA(Task):
    """The labelled test split; the context is the abstract without its conclusion."""

    name = "pubmedqa"
    title = "PubMedQA"
    instruction = (
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
        "following statement is correct? Answer yes, no, or maybe."
    )
    answers = ("yes", "no", "maybe")
    columns = ("QUESTION", "CONTEXTS", "final_decision")
    hub = HubSource("bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source", "test", scripted=True)
    boolean = True

    def ask(self, row: Row) -> str:
        """The abstract's paragraphs, then the question."""
        if isinstance(row["CONTEXTS"], str):
            raise ValueError("CONTEXTS: expected a list of paragraphs, found one text")
        context = "\n".join(row["CONTEXTS"])
        return f"{context}\n{row['QUESTION']}"

    def gold(self, row: Row) -> str:
        """What the annotators decided: yes, no or maybe."""
        return str(row["final_decision"])
