"""A leaderboard entry out of a run: every rule checked, then packed, or nothing at all."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.adapter.layout import digest, pack
from app.digests import app_digest
from app.server.communication import BUDGET_MB, MB
from common import files
from common.errors import MedfedError
from evaluation.catalogue import tasks
from medfed import parity
from medfed.paths import Home
from medfed.records import Record

# What the leaderboard fixes (flowertune-llm-medical, its README and pyproject.toml).
STATIC = {"static.dataset.name": "medalpaca/medical_meadow_medical_flashcards"}
SUPERNODES = 20
EVALUATION_BITS = 4
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Broken:
    """A rule that does not hold.

    Args:
        rule: its name.
        found: what was expected and found instead.
        hint: how to mend it.
    """

    rule: str
    found: str
    hint: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.rule}: {self.found}"


class SubmissionError(MedfedError):
    """Nothing was packed.

    Args:
        message: what was expected and what was found.
        hint: how to mend it.
        broken: the leaderboard's rules that do not hold, if it is for them.
    """

    def __init__(self, message: str, hint: str, broken: tuple[Broken, ...] = ()) -> None:
        super().__init__(message, hint)
        self.broken = broken


@dataclass(frozen=True)
class Entry:
    """Everything that an entry is made of.

    Args:
        record: the run.
        evaluation: the folder that ``medfed evaluate`` wrote for its last checkpoint.
        report: that evaluation's ``report_*.json``.
        project: the code, a git checkout.
        proof: where a deployment was found equal to the simulation, for a deployment's entry.
    """

    record: Record
    evaluation: Path
    report: dict[str, Any]
    project: Path
    proof: Path | None

    @property
    def checkpoint(self) -> Path:
        """Where the last PEFT checkpoint should be."""
        return self.record.folder / f"peft_{self.record.config['num-server-rounds']}"


def gather(home: Home, record: Record, evaluation: Path, project: Path) -> Entry:
    """Read what belongs to the entry of a run.

    Raises:
        SubmissionError: there is no single evaluation report in ``evaluation``.
    """
    reports = sorted(evaluation.glob("report_*.json"))
    if len(reports) != 1:
        raise SubmissionError(
            f"expected one report_*.json in {evaluation}, found {len(reports)}",
            f"medfed evaluate --adapter {record.folder}/peft_N --output {evaluation}",
        )
    proof = None
    if record.engine == "deployment":
        proof = parity.proof_of(home, record.provenance["app_sha256"])
    report = json.loads(reports[0].read_text(encoding="utf-8"))
    return Entry(record, evaluation, report, project, proof)


def broken_rules(entry: Entry) -> list[Broken]:
    """Every rule that the entry breaks; empty if it may be packed."""
    return [
        *_of_the_run(entry.record),
        *_of_the_checkpoint(entry),
        *_of_the_evaluation(entry),
        *_of_the_code(entry),
        *_of_the_proof(entry),
    ]


def _of_the_run(record: Record) -> Iterator[Broken]:
    if record.summary is None:
        yield Broken("finished run", f"found no summary in {record.folder}", "let it end first")
    for key, fixed in STATIC.items():
        if record.config.get(key) != fixed:
            yield Broken(
                "static section",
                f"expected {key} = {fixed!r}, found {record.config.get(key)!r}",
                "run again with the section as it stands in pyproject.toml",
            )
    online = [event for event in record.events if event["event"] == "online"]
    known = online[-1]["federation"] if online else []
    if len(known) != SUPERNODES:
        yield Broken(
            "number of SuperNodes",
            f"expected {SUPERNODES}, found {len(known)}",
            "run again with the roster's 20",
        )
    used = sum(one.bytes for one in record.rounds)
    if used > BUDGET_MB * MB:
        yield Broken(
            "communication budget",
            f"expected at most {BUDGET_MB:,} MB, found {used / MB:,.2f} MB",
            "fewer rounds, fewer clients a round or a smaller adapter",
        )


def _of_the_checkpoint(entry: Entry) -> Iterator[Broken]:
    missing = [name for name in ADAPTER_FILES if not (entry.checkpoint / name).is_file()]
    if missing:
        yield Broken(
            "last checkpoint",
            f"expected {entry.checkpoint.name}/ with {', '.join(missing)}, found none",
            "the entry is the adapter of the last round",
        )
        return
    wanted = (entry.record.summary or {}).get("adapter_sha256")
    found = checkpoint_digest(entry.checkpoint)
    if wanted is not None and found != wanted:
        yield Broken(
            "last checkpoint",
            f"expected the adapter {wanted[:16]}… that the run ended with, found {found[:16]}…",
            "it was changed after the run",
        )


def checkpoint_digest(checkpoint: Path) -> str:
    """The digest of a PEFT folder's adapter, as the run's summary has it."""
    from safetensors.numpy import load_file

    return digest(pack(load_file(checkpoint / ADAPTER_FILES[0])))


def _of_the_evaluation(entry: Entry) -> Iterator[Broken]:
    report = entry.report
    evaluate = f"medfed evaluate --adapter {entry.checkpoint} --output {entry.evaluation}"
    if report["quantization"] != EVALUATION_BITS:
        yield Broken(
            "quantisation of the evaluation",
            f"expected {EVALUATION_BITS} bits, found {report['quantization']}",
            f"{evaluate} --quantization {EVALUATION_BITS}",
        )
    wanted = [task.name for task in tasks("pubmedqa,medmcqa,medqa,careqa")]
    there = {one["benchmark"] for one in report["benchmarks"]}
    if missing := [name for name in wanted if name not in there]:
        yield Broken(
            "four accuracies",
            f"expected {', '.join(wanted)}, found none for {', '.join(missing)}",
            f"{evaluate} --benchmarks {','.join(wanted)}",
        )
    if report["limit"] is not None:
        yield Broken(
            "whole benchmarks",
            f"expected every question, found the first {report['limit']} of each",
            f"{evaluate}, without --limit",
        )
    evaluated = Path(str(report["adapter"]))
    same = (evaluated / ADAPTER_FILES[0]).is_file() and (
        checkpoint_digest(evaluated) == (entry.record.summary or {}).get("adapter_sha256")
    )
    if not same:
        yield Broken(
            "evaluated adapter",
            f"expected the run's last checkpoint, found {report['adapter']}",
            evaluate,
        )


def _of_the_code(entry: Entry) -> Iterator[Broken]:
    try:
        changed = _git(entry.project, "status", "--porcelain", "--", "app", "pyproject.toml")
    except (OSError, subprocess.CalledProcessError):
        yield Broken(
            "code at a commit",
            f"expected a git checkout in {entry.project}, found none",
            "submit from a clone of the repository",
        )
        return
    if changed.strip():
        names = ", ".join(line[3:] for line in changed.splitlines()[:3])
        yield Broken("code at a commit", f"found changes in {names}", "commit them, and run again")
    found = app_digest(entry.project / "app")
    if found != entry.record.provenance["app_sha256"]:
        yield Broken(
            "code at a commit",
            f"expected the app that the run ran "
            f"({entry.record.provenance['app_sha256'][:16]}…), found {found[:16]}…",
            "check out the commit of the run, or run again",
        )


def _of_the_proof(entry: Entry) -> Iterator[Broken]:
    if entry.record.engine == "deployment" and entry.proof is None:
        yield Broken(
            "parity",
            "expected a comparison of this app in which deployment and simulation were equal, "
            "found none",
            "medfed parity --engines simulation,processes",
        )


def submit(entry: Entry, target: Path) -> Path:
    """Pack an entry into ``target`` (``.tar.gz``), whole or not at all.

    Raises:
        SubmissionError: a rule is broken.
    """
    if broken := broken_rules(entry):
        raise SubmissionError("; ".join(map(str, broken)), broken[0].hint, tuple(broken))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / target.name.removesuffix(".tar.gz")
        _lay_out(entry, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target) as draft, tarfile.open(draft, "w:gz") as archive:
            archive.add(root, arcname=root.name)
    return target


def _lay_out(entry: Entry, root: Path) -> None:
    root.mkdir()
    code = subprocess.run(
        ["git", "archive", "HEAD", "app", "pyproject.toml", "LICENSE", "requirements"],
        cwd=entry.project,
        capture_output=True,
        check=True,
    )
    with tarfile.open(fileobj=io.BytesIO(code.stdout)) as archive:
        archive.extractall(root, filter="data")
    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    project.write_text(with_config(text, entry.record.config), encoding="utf-8")
    shutil.copytree(entry.checkpoint, root / entry.checkpoint.name)
    shutil.copy(entry.record.folder / "comm_cost.txt", root)
    shutil.copytree(entry.evaluation, root / "benchmarks", ignore=shutil.ignore_patterns(".*"))
    record = root / "run"
    record.mkdir()
    for name in ("config.json", "provenance.json", "events.jsonl", "summary.json"):
        shutil.copy(entry.record.folder / name, record)
    if entry.proof is not None:
        shutil.copy(entry.proof, root)
    commit = _git(entry.project, "rev-parse", "HEAD").strip()
    (root / "README.md").write_text(readme(entry, commit), encoding="utf-8")


def with_config(project: str, config: dict[str, Any]) -> str:
    """``pyproject.toml`` with the run config of a run: the entry's code then gives that run.

    Raises:
        SubmissionError: a setting of the run has no line of its own in the file.
    """
    for key, value in config.items():
        bare = key.removeprefix("static.")
        setting = f"{bare} = {json.dumps(value)}".replace("\\", r"\\")  # not a template of re's
        line = re.compile(rf"^{re.escape(bare)} = .*$", re.MULTILINE)
        project, count = line.subn(setting, project)
        if count != 1:
            raise SubmissionError(
                f"expected one line '{bare} = …' in pyproject.toml, found {count}",
                "the run was of another version of the app",
            )
    tomllib.loads(project)
    return project


def readme(entry: Entry, commit: str) -> str:
    """The entry's README: results, cost, and how to get them again."""
    config, report = entry.record.config, entry.report
    rank, alpha = (config[f"model.lora.peft-lora-{name}"] for name in ("r", "alpha"))
    scores = {one["benchmark"]: one for one in report["benchmarks"]}
    names = [one["benchmark"] for one in report["benchmarks"]]
    low, high = report["average"]["interval_95"]

    def row(label: str, values: list[str]) -> str:
        return f"| {' | '.join([label, *values])} |"

    table = [
        row("", [*names, "Avg"]),
        "|---|" + "---:|" * (len(names) + 1),
        row(
            "accuracy (%)",
            [
                *(f"{100 * scores[name]['accuracy']:.2f}" for name in names),
                f"**{100 * report['average']['accuracy']:.2f}**",
            ],
        ),
        row(
            "95 % interval",
            [
                *(_interval(*scores[name]["interval_95"]) for name in names),
                _interval(low, high),
            ],
        ),
        row(
            "always the same answer",
            [
                *(f"{100 * scores[n]['trivial_baseline']['accuracy']:.2f}" for n in names),
                f"{100 * report['average']['trivial_accuracy']:.2f}",
            ],
        ),
    ]
    used = sum(one.bytes for one in entry.record.rounds) / MB
    proof = (
        "\n`parity.json` shows that this app gives the same adapter, bit for bit, on real "
        "SuperNodes and in simulation.\n"
        if entry.proof is not None
        else ""
    )
    return f"""# FlowerTune LLM, medical: {config["model.name"]}

Federated LoRA (r={rank}, alpha={alpha}) on {SUPERNODES} SuperNodes, \
{config["num-server-rounds"]} rounds, run {entry.record.run_id} ({entry.record.engine}) of commit \
`{commit}`.

{chr(10).join(table)}

Evaluated with the base model in {report["quantization"]} bits, `{entry.checkpoint.name}/` on top. \
The generations are in `benchmarks/`.

Communication: {used:.2f} MB of {BUDGET_MB:,} MB (`comm_cost.txt`).
{proof}
Run it again:

```shell
sh requirements/install.sh python runtime
flwr run . local-simulation
```
"""


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.2f} to {100 * high:.2f}"


def _git(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=project, capture_output=True, text=True, check=True
    )
    return done.stdout
