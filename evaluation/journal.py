"""Answers on disk as they come, so that an evaluation that was cut off goes on where it stopped.

One append-only file per model, adapter, quantisation and set of prompts: its name is the digest of
all that the answers depend on. Another adapter or another question is another file, so a stale
answer cannot be taken for a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import EvaluationError
from evaluation.generate import Answer, Request

# Part of every key: a change to how answers come about must not find old ones.
_VERSION = "1"


class Journal:
    """Answers by request number.

    Args:
        folder: where journals live; made when the first answer is written.
        benchmark: the benchmark's name.
        identity: digest of the model that answers (``Subject.identity``).
        requests: all that is asked, in order.
        answers: the answers on offer, whose scores are kept.
    """

    def __init__(
        self,
        folder: Path,
        benchmark: str,
        identity: str,
        requests: Sequence[Request],
        answers: Sequence[str],
    ) -> None:
        sha = hashlib.sha256()
        for part in (_VERSION, benchmark, identity, *answers):
            sha.update(part.encode() + b"\n")
        for request in requests:
            line = [request.prompt, request.max_new_tokens]
            sha.update(json.dumps(line).encode() + b"\n")
        self.path = folder / f"{benchmark}-{sha.hexdigest()[:20]}.jsonl"

    def read(self) -> dict[int, Answer]:
        """Answers so far; a last line that was cut off is dropped, here and in the file.

        Raises:
            EvaluationError: a line before it is damaged.
        """
        if not self.path.is_file():
            return {}
        whole, _, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.path, len(whole) + 1 if whole else 0)
        found = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                answer = Answer(row["output"], tuple(row["scores"]), bool(row["alone"]))
                found[int(row["n"])] = answer
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(
                    f"expected an answer on line {number} of {self.path}, found {error}",
                    "delete that file: its questions are asked again",
                ) from error
        return found

    def append(self, answers: Mapping[int, Answer]) -> None:
        """Write answers so that a power cut cannot take them back; none is nothing to write."""
        if not answers:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"n": n, "output": a.output, "scores": a.scores, "alone": a.alone})
            for n, a in sorted(answers.items())
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
