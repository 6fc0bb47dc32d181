"""A leaderboard entry: a good run is packed; each broken rule is named, and nothing is."""

from __future__ import annotations

import json
import subprocess
import tarfile
import tomllib

import pytest
from flwr.common.config import flatten_dict
from typer.testing import CliRunner

from app.config import current_names
from app.digests import app_digest
from app.server.communication import BUDGET_MB, MB
from medfed import records
from medfed.cli import app as cli
from medfed.paths import Home
from medfed.runs import PROJECT
from medfed.submission import SubmissionError, broken_rules, gather, submit, with_config
from tests.run_records import NAMES, write_record

BENCHMARKS = ("pubmedqa", "medmcqa", "medqa", "careqa")


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path):
    """A small checkout with what an entry takes from one."""
    folder = tmp_path / "project"
    (folder / "app").mkdir(parents=True)
    (folder / "requirements").mkdir()
    (folder / "app" / "server_app.py").write_text("app = 1\n")
    (folder / "requirements" / "runtime.txt").write_text("flwr==1.41.0\n")
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "pyproject.toml").write_bytes((PROJECT / "pyproject.toml").read_bytes())
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


class Case:
    """A run and its evaluation that satisfy every rule, to be spoilt one way at a time."""

    def __init__(self, tmp_path, project):
        self.home, self.project = Home(tmp_path / "home"), project
        self.evaluation = tmp_path / "evaluation"
        self.options = {"rounds": 3, "app_sha256": app_digest(project / "app")}
        self.report = {
            "model": "m",
            "quantization": 4,
            "limit": None,
            "benchmarks": [
                {
                    "benchmark": name,
                    "accuracy": 0.3,
                    "interval_95": [0.2, 0.4],
                    "trivial_baseline": {"answer": "A", "accuracy": 0.25},
                }
                for name in BENCHMARKS
            ],
            "average": {"accuracy": 0.3, "interval_95": [0.25, 0.35], "trivial_accuracy": 0.25},
        }

    def entry(self, spoil=lambda folder: None):
        folder = write_record(self.home.runs / "7", **self.options)
        report = {"adapter": str(folder / "peft_3"), **self.report}
        self.evaluation.mkdir(exist_ok=True)
        (self.evaluation / "report_x.json").write_text(json.dumps(report))
        for name in BENCHMARKS:
            (self.evaluation / f"acc_{name}_x.txt").write_text("Accuracy: 0.3. ")
            (self.evaluation / f"generation_{name}_x.jsonl").write_text("[]")
        spoil(folder)
        return gather(self.home, records.read(folder), self.evaluation, self.project)


@pytest.fixture
def case(tmp_path, project):
    return Case(tmp_path, project)


def test_a_good_run_is_packed_whole(case, tmp_path):
    packed = submit(case.entry(), tmp_path / "entry.tar.gz")
    with tarfile.open(packed) as archive:
        names = {name.removeprefix("entry/") for name in archive.getnames()}
        readme = archive.extractfile("entry/README.md").read().decode()
        config = tomllib.loads(archive.extractfile("entry/pyproject.toml").read().decode())
        cost = archive.extractfile("entry/comm_cost.txt").read().decode()
    assert {"app/server_app.py", "LICENSE", "requirements/runtime.txt"} <= names
    assert {"peft_3/adapter_model.safetensors", "peft_3/adapter_config.json"} <= names
    assert {f"benchmarks/generation_{name}_x.jsonl" for name in BENCHMARKS} <= names
    assert "parity.json" not in names
    assert "| **30.00** |" in readme
    assert cost.startswith("Communication budget: used ")
    settings = current_names(flatten_dict(config["tool"]["flwr"]["app"]["config"]))
    assert settings == json.loads((case.home.runs / "7" / "config.json").read_text())


def broken_peft(folder):
    (folder / "peft_3" / "adapter_model.safetensors").unlink()


def other_adapter(folder):
    write_record(folder.parent / "other", rounds=3, asked={3: NAMES[:2]})
    theirs = folder.parent / "other" / "peft_3" / "adapter_model.safetensors"
    theirs.replace(folder / "peft_3" / "adapter_model.safetensors")


def over_budget(folder):
    events = (folder / "events.jsonl").read_text().splitlines()
    spent = [json.loads(line) for line in events]
    for event in spent:
        if event["event"] == "round-finished":
            event["bytes"] = BUDGET_MB * MB
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in spent))


@pytest.mark.parametrize(
    ("options", "report", "spoil", "rules"),
    [
        ({"config": {"static.dataset.name": "mine"}}, {}, None, ["static section"]),
        ({"federation": NAMES[:19]}, {}, None, ["number of SuperNodes"]),
        ({}, {}, broken_peft, ["last checkpoint", "evaluated adapter"]),
        ({}, {}, other_adapter, ["last checkpoint", "evaluated adapter"]),
        ({}, {}, over_budget, ["communication budget"]),
        ({}, {"quantization": 0}, None, ["quantisation of the evaluation"]),
        ({}, {"limit": 100}, None, ["whole benchmarks"]),
        ({}, {"adapter": "/somewhere/else"}, None, ["evaluated adapter"]),
        ({"app_sha256": "0" * 64}, {}, None, ["code at a commit"]),
        ({"engine": "deployment"}, {}, None, ["parity"]),
    ],
)
def test_each_broken_rule_is_named_and_nothing_is_packed(
    case, tmp_path, options, report, spoil, rules
):
    case.options |= options
    case.report |= report
    entry = case.entry(spoil or (lambda folder: None))
    assert [broken.rule for broken in broken_rules(entry)] == rules
    with pytest.raises(SubmissionError, match=rules[0]):
        submit(entry, tmp_path / "entry.tar.gz")
    assert not list(tmp_path.glob("*entry*"))


def test_a_missing_benchmark_is_named(case):
    case.report["benchmarks"] = case.report["benchmarks"][:3]
    (broken,) = broken_rules(case.entry())
    assert broken.rule == "four accuracies"
    assert "found none for careqa" in broken.found


def test_a_run_that_did_not_end_is_no_entry(case):
    case.options["ended"] = False
    assert broken_rules(case.entry())[0].rule == "finished run"


def test_uncommitted_code_is_named(case):
    (case.project / "app" / "server_app.py").write_text("app = 2\n")
    (changed, _) = broken_rules(case.entry())
    assert changed.found == "found changes in app/server_app.py"


def test_a_deployment_s_entry_carries_the_proof_of_parity(case, tmp_path):
    case.options["engine"] = "deployment"
    proof = case.home.root / "parity" / "20260101T000000Z" / "parity.json"
    proof.parent.mkdir(parents=True)
    content = {
        "equal": True,
        "app_sha256": case.options["app_sha256"],
        "engines": {"simulation": {}, "processes": {}},
    }
    proof.write_text(json.dumps(content))
    packed = submit(case.entry(), tmp_path / "entry.tar.gz")
    with tarfile.open(packed) as archive:
        assert "entry/parity.json" in archive.getnames()


def test_a_setting_without_a_line_of_its_own_is_refused():
    with pytest.raises(SubmissionError, match=r"no\.such\.setting"):
        with_config("a = 1\n", {"no.such.setting": 1})


def test_the_command_names_every_broken_rule_at_once(case, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFED_HOME", str(case.home.root))
    case.options |= {"federation": NAMES[:19], "app_sha256": "0" * 64}
    case.report["quantization"] = 0
    case.entry()
    target = tmp_path / "entry.tar.gz"
    arguments = ["submit", "7", "--evaluation", str(case.evaluation), "--output", str(target)]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 1
    rules = [broken["rule"] for broken in json.loads(done.stdout)["broken"]]
    assert rules[:2] == ["number of SuperNodes", "quantisation of the evaluation"]
    assert "code at a commit" in rules
    assert not target.exists()


def test_without_an_evaluation_there_is_nothing_to_submit(case, tmp_path):
    case.entry()
    (case.evaluation / "report_x.json").unlink()
    with pytest.raises(SubmissionError, match=r"expected one report_\*.json"):
        gather(case.home, records.read(case.home.runs / "7"), case.evaluation, case.project)
