"""`medfed run`: follow a run to its end, also one that was cut short and goes on."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from common.errors import SuperLinkError
from medfed import runs
from medfed.paths import Home
from tests.run_records import write_record


class FakeControl:
    """A SuperLink whose ServerApp writes these events as soon as the run starts."""

    def __init__(self, home, *events, away=0):
        self.home, self.events, self.away = home, events, away
        self.overrides = None
        self.others = []

    def start_run(self, fab, overrides, *, simulate=None):
        self.overrides = dict(overrides)
        folder = self.home.runs / "99"
        earlier = self.overrides.get("resume-run")
        if earlier:
            folder.symlink_to(earlier)
        else:
            folder.mkdir(parents=True)
        with (folder / "events.jsonl").open("a") as log:
            log.writelines(json.dumps({"time": 0.0, **event}) + "\n" for event in self.events)
        if any(event["event"] == "finished" for event in self.events):
            (folder / "summary.json").write_text(json.dumps({"rounds": 3, "adapter": "peft_3"}))
        return 99

    def runs(self):
        return self.others

    def run(self, run_id):
        if self.away:
            self.away -= 1
            raise SuperLinkError("nobody answers")
        return SimpleNamespace(finished=True, status="failed", details="it said why")


FINISHED = {"event": "finished", "rounds": 3}
FAILED = {"event": "failed", "reason": "a full disk"}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def start(control, home, **options):
    console = Console(file=io.StringIO())
    outcome = runs.run(control, home, {}, console, **options)
    return outcome, console.file.getvalue()


def cut_short(home):
    folder = write_record(home.runs / "7", ended=False)
    with (folder / "events.jsonl").open("a") as log:
        log.write(json.dumps({"time": 0.0, **FAILED}) + "\n")
    return folder


def test_a_run_that_was_cut_short_goes_on_with_its_own_settings(home):
    cut_short(home)
    control = FakeControl(home, {"event": "resumed", "after_round": 3, "restarts": 0}, FINISHED)
    outcome, shown = start(control, home, resume="7")
    config = json.loads((home.runs / "7" / "config.json").read_text())
    assert control.overrides == {**config, "resume-run": "7"}
    assert outcome.summary["rounds"] == 3
    assert "going on after round 3" in shown


def test_the_last_run_is_meant_by_its_name(home):
    cut_short(home)
    control = FakeControl(home, FINISHED)
    start(control, home, resume="last")
    assert control.overrides["resume-run"] == "7"


def test_a_run_that_ended_well_has_nothing_to_go_on_with(home):
    write_record(home.runs / "7")
    with pytest.raises(runs.RunError, match="run 7 finished"):
        start(FakeControl(home), home, resume="7")


def test_a_run_that_fails_says_how_to_go_on(home):
    with pytest.raises(runs.RunError, match="a full disk") as caught:
        start(FakeControl(home, FAILED), home)
    assert "medfed run --resume 99" in caught.value.hint


def test_a_superlink_that_is_away_for_a_while_is_waited_for(home, monkeypatch):
    monkeypatch.setattr("medfed.follow._ASK_S", 0.0)
    control = FakeControl(home, away=2)
    with pytest.raises(runs.RunError, match="it said why"):
        start(control, home)
    assert control.away == 0


def test_a_superlink_that_stays_away_is_an_error(home, monkeypatch):
    monkeypatch.setattr("medfed.follow._ASK_S", 0.0)
    monkeypatch.setattr(runs, "_AWAY_S", 0.0)
    with pytest.raises(SuperLinkError, match="nobody answers"):
        start(FakeControl(home, away=10**6), home)


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("dataset.name", "perhaps static.dataset.name?"),
        ("train.sead", "perhaps train.seed?"),
        ("xyz", "docs/reference.md lists them"),
    ],
)
def test_a_setting_that_the_app_has_not_is_named_before_anything_starts(home, setting, meant):
    control = FakeControl(home, FINISHED)
    with pytest.raises(runs.RunError, match=f"found {setting}") as caught:
        runs.run(control, home, {setting: "1"}, Console(file=io.StringIO()))
    assert caught.value.hint == meant
    assert control.overrides is None


def test_a_former_name_of_a_setting_is_sent_as_the_current_one_with_a_warning(home):
    control, console = FakeControl(home, FINISHED), Console(file=io.StringIO())
    runs.run(control, home, {"rounds.silence-s": 20}, console)
    assert control.overrides == {"rounds.heartbeat-timeout-s": 20}
    assert "rounds.silence-s is now rounds.heartbeat-timeout-s" in console.file.getvalue()


def test_one_setting_under_both_its_names_is_refused_before_anything_starts(home):
    control = FakeControl(home, FINISHED)
    both = {"rounds.silence-s": 20, "rounds.heartbeat-timeout-s": 30}
    with pytest.raises(runs.RunError, match=r"rounds\.silence-s or .*, found both"):
        runs.run(control, home, both, Console(file=io.StringIO()))
    assert control.overrides is None


def test_a_run_from_before_a_setting_had_its_current_name_goes_on(home):
    folder = cut_short(home)
    config = json.loads((folder / "config.json").read_text())
    config["rounds.silence-s"] = config.pop("rounds.heartbeat-timeout-s") + 7
    (folder / "config.json").write_text(json.dumps(config))
    control = FakeControl(home, FINISHED)
    _, shown = start(control, home, resume="7")
    assert control.overrides["rounds.heartbeat-timeout-s"] == config["rounds.silence-s"]
    assert "rounds.silence-s" not in control.overrides
    assert "is now" not in shown, "nobody gave the former name in this command"


def test_runs_that_go_on_at_the_same_time_are_named(home):
    control = FakeControl(home, FINISHED)
    control.others = [
        SimpleNamespace(run_id=7, finished=False),
        SimpleNamespace(run_id=6, finished=True),
    ]
    _, shown = start(control, home)
    assert "flwr stop 7 local-deployment" in shown
    assert "run 6" not in shown
