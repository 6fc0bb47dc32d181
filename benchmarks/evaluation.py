"""Our evaluation against the leaderboard's loop: same questions, same model.

    python -m benchmarks.evaluation --model local/SmolLM2-135M-Instruct-Q4_1 --data DIR --json

Both answer the first ``--limit`` questions of each benchmark. The leaderboard's loop encodes,
generates and decodes one prompt at a time. With 4-bit quantization it runs twice: with weights
dequantized to float32 (``float32``: the leaderboard's arithmetic on a GPU, and ours), and with
bitsandbytes' own kernels (``packed``). On a CPU with AVX512-BF16 those compute in bfloat16, so that
answers may differ where two tokens are nearly equal. On a busy machine compare CPU seconds rather
than seconds; the result holds the load average. Progress goes to stderr; ``--json`` prints the
result, ``--save`` writes it under ``results/``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evaluation.catalogue import tasks
from evaluation.generate import NEAR_TIE, Answer, Engine, Request, one_by_one, shared_prefix
from evaluation.model import Subject, load_subject
from evaluation.run import requests_for
from evaluation.sources import rows_of
from evaluation.task import Task, wrap

RESULTS = Path(__file__).parent / "results"

# Prompts of each benchmark that are also scored alone, to measure how far batches move a score.
ROUNDING_PROMPTS = 20


def main() -> None:
    """Measure and print."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    fast = load_subject(options.model, options.quantization)
    loops = {"float32" if options.quantization != 8 else "8-bit": fast}
    if options.quantization == 4:
        loops["packed"] = load_subject(options.model, 4, unpack=False)
    wanted = {name: loops[name] for name in options.loops.split(",") if name in loops}
    load_before = os.getloadavg()[0]
    rows = [
        _compare(task, fast, wanted, options.data, options.limit)
        for task in tasks(options.benchmarks)
    ]
    report = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": [load_before, os.getloadavg()[0]],
        "torch": torch.__version__,
        "model": options.model,
        "quantization": options.quantization,
        "benchmarks": rows,
        "total": _total(rows, list(wanted)),
    }
    if options.save:
        today = datetime.now(UTC).date().isoformat()
        name = f"evaluation-{options.quantization}bit-{today}.json"
        (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n")
    if options.json:
        print(json.dumps(report))
        return
    for row in [*rows, report["total"]]:
        for name, loop in row["loops"].items():
            print(
                f"{row['benchmark']}: n {row['n']}, ours {row['seconds']:.1f} s, {name} loop "
                f"{loop['seconds']:.1f} s: {loop['ratio']:.2f}x "
                f"(CPU time {loop['cpu_ratio']:.2f}x), "
                f"{loop['same']} of {row['n']} answers the same"
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="local/SmolLM2-135M-Instruct-Q4_1")
    parser.add_argument("--data", type=Path, required=True, help="folder of BENCHMARK*.jsonl")
    parser.add_argument("--benchmarks", default="pubmedqa,medmcqa,medqa")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--quantization", type=int, default=4)
    parser.add_argument("--loops", default="float32,packed", help="which loops to compare with")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true", help="keep it under benchmarks/results/")
    return parser.parse_args()


def _compare(
    task: Task, fast: Subject, loops: dict[str, Subject], data: Path, limit: int
) -> dict[str, Any]:
    questions = task.questions(rows_of(task, data), from_hub=False, limit=limit)
    requests = requests_for(questions, fast.tokenizer)
    encoded = [fast.tokenizer.encode(wrap(request.prompt)) for request in requests]
    # Warm up, so that neither side pays for what happens once.
    for subject in (fast, *loops.values()):
        one_by_one(subject, requests[0])
    answers, seconds, cpu = _timed(partial(_all, task, fast, requests))
    row: dict[str, Any] = {
        "benchmark": task.name,
        "n": len(requests),
        "tokens_a_prompt": sum(map(len, encoded)) / len(encoded),
        "shared_tokens": shared_prefix(encoded),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "decided_alone": sum(answer.alone for answer in answers),
        "rounding": _rounding(task, fast, requests[:ROUNDING_PROMPTS], answers),
        "loops": {},
    }
    for name, subject in loops.items():
        outputs, loop_seconds, loop_cpu = _timed(partial(_one_by_one, subject, requests))
        row["loops"][name] = {
            "seconds": loop_seconds,
            "cpu_seconds": loop_cpu,
            "ratio": loop_seconds / seconds,
            "cpu_ratio": loop_cpu / cpu,
            "same": sum(a.output == b for a, b in zip(answers, outputs, strict=True)),
        }
        print(f"{task.name}: {name} loop done", file=sys.stderr)
    return row


def _all(
    task: Task, subject: Subject, requests: list[Request], near_tie: float = NEAR_TIE
) -> list[Answer]:
    found: dict[int, Answer] = {}
    for batch in Engine(subject, task.answers, near_tie=near_tie).answers(requests):
        found |= batch
    return [found[n] for n in range(len(requests))]


def _rounding(
    task: Task, subject: Subject, requests: list[Request], answers: list[Answer]
) -> float:
    """The largest difference of an option's score in ``answers`` from that of its prompt alone."""
    alone = _all(task, subject, requests, near_tie=math.inf)
    pairs = zip(answers, alone, strict=False)  # ``requests`` are the first ones only
    return max(
        abs(one - other) for a, b in pairs for one, other in zip(a.scores, b.scores, strict=True)
    )


def _one_by_one(subject: Subject, requests: list[Request]) -> list[str]:
    return [one_by_one(subject, request) for request in requests]


def _timed(work: Callable[[], list[Any]]) -> tuple[list[Any], float, float]:
    """What ``work`` returns, its wall-clock and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _total(rows: list[dict[str, Any]], loops: list[str]) -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in rows)
    cpu = sum(row["cpu_seconds"] for row in rows)
    total: dict[str, Any] = {
        "benchmark": "all",
        "n": sum(row["n"] for row in rows),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "loops": {},
    }
    for name in loops:
        loop_seconds = sum(row["loops"][name]["seconds"] for row in rows)
        loop_cpu = sum(row["loops"][name]["cpu_seconds"] for row in rows)
        total["loops"][name] = {
            "seconds": loop_seconds,
            "cpu_seconds": loop_cpu,
            "ratio": loop_seconds / seconds,
            "cpu_ratio": loop_cpu / cpu,
            "same": sum(row["loops"][name]["same"] for row in rows),
        }
    return total


if __name__ == "__main__":
    main()
