"""What must not end a run, each on real containers: whatever is killed, cut off or full.

Every run here has the same config, so that wherever the same institutions end up training, the
final adapter must have the same SHA-256 as that of a run which nothing happened to.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from flwr.cli.build import build_fab_from_disk

from app.seeds import derive
from tests.e2e.compose_project import FEDERATION, NAMES, ROOT, ComposeProject, Federation, until
from tests.faults.scenario import ROUNDS, RUNS, Scenario, elapsed

pytestmark = pytest.mark.containers

# What a death may cost a round beyond its training, and a SuperLink's restart until the next round.
DEATH_S, RESTART_S = 15.0, 30.0


@dataclass(frozen=True)
class Undisturbed:
    """The run that nothing happened to."""

    sha256: str
    trainers: list[tuple[str, ...]]


@pytest.fixture(scope="module")
def scenario(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return Scenario(federation.project, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(scenario: Scenario) -> Undisturbed:
    run = scenario.start()
    return Undisturbed(scenario.until_ended(run)["adapter_sha256"], scenario.trainers(run))


@pytest.fixture(scope="module")
def everyone(scenario: Scenario) -> set[str]:
    """Who is online before anything happens (another test may have revoked somebody)."""
    return scenario.online()


@pytest.fixture(autouse=True)
def everyone_is_back(scenario: Scenario, everyone: set[str]) -> Iterator[None]:
    """The next test finds the federation as this one did."""
    yield
    until(
        lambda: scenario.online() == everyone,
        180.0,
        lambda: f"still away: {sorted(everyone - scenario.online())}",
    )


def ends_as_if_nothing_had_happened(
    scenario: Scenario, run: int, undisturbed: Undisturbed, *, failures: int = 0
) -> None:
    summary = scenario.until_ended(run, failures=failures)
    assert scenario.trainers(run) == undisturbed.trainers
    assert summary["adapter_sha256"] == undisturbed.sha256


def noticed_after(scenario: Scenario, run: int, since: float, *kinds: str) -> float:
    """Seconds, by the machine's clock, until the coordinator noticed."""
    first = min(event["time"] for event in scenario.events(run, *kinds))
    print(f"noticed after {first - since:.1f} s")
    return float(first - since)


# --- ClientApps ---


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        pytest.param(0.0, 0, id="before its first heartbeat"),
        pytest.param(1.0, 0, id="in training"),
        pytest.param(1.0, 1, id="while it hands over its reply"),
    ],
)
def test_a_killed_clientapp_is_asked_again_at_once(
    scenario: Scenario, undisturbed: Undisturbed, seconds: float, written: int
):
    victim = undisturbed.trainers[0][0]
    shot = scenario.lie_in_wait(victim, "ClientApp", seconds=seconds, written=written)
    run = scenario.start()
    assert b"killed" in b"".join(shot)
    killed = time.time()
    ends_as_if_nothing_had_happened(scenario, run, undisturbed)
    if not written:  # it may have got its reply out with its last breath
        assert noticed_after(scenario, run, killed, "reply-failed") <= DEATH_S


# --- SuperNodes ---


def test_a_killed_supernode_does_not_stall_the_round(scenario: Scenario, undisturbed: Undisturbed):
    run = scenario.start()
    victim = scenario.first_asked(run)
    scenario.in_training(victim)
    scenario.kill(victim, "-m supernode --")
    killed = time.time()
    scenario.until_ended(run)
    assert noticed_after(scenario, run, killed, "institution-lost", "reply-failed") <= DEATH_S
    replaced = scenario.trainers(run)
    assert len(replaced[0]) == 2
    assert replaced[0] == undisturbed.trainers[0] or victim not in replaced[0]


def test_a_paused_supernode_does_not_stall_the_round(scenario: Scenario):
    run = scenario.start()
    victim = scenario.first_asked(run)
    scenario.in_training(victim)
    container = scenario.project.container(victim)
    container.pause()
    paused = time.time()
    try:
        scenario.until_event(run, "round-finished", round=1)
        assert noticed_after(scenario, run, paused, "institution-lost") <= DEATH_S
        assert victim not in scenario.trainers(run)[0]
    finally:
        container.unpause()
    scenario.until_ended(run)


# --- the network ---


class Cut:
    """A SuperNode's only network, taken away and given back."""

    def __init__(self, scenario: Scenario, service: str) -> None:
        project = scenario.project
        self._network = project.client.networks.get(f"{project.name}_{service}")
        self._container = project.container(service)

    def off(self) -> float:
        self._network.disconnect(self._container)
        return time.monotonic()

    def on(self) -> None:
        self._network.connect(self._container)


def test_a_network_cut_of_5_s_is_not_even_noticed(scenario: Scenario, undisturbed: Undisturbed):
    run = scenario.start()
    victim = scenario.first_asked(run)
    scenario.in_training(victim)
    cut = Cut(scenario, victim)
    begun = cut.off()
    try:
        until(lambda: elapsed(begun) >= 5.0, 10.0, lambda: "the clock stands still")
    finally:
        cut.on()
    ends_as_if_nothing_had_happened(scenario, run, undisturbed)
    assert not scenario.events(run, "institution-lost")


def test_a_network_cut_of_60_s_costs_the_institution_its_place_and_then_it_is_back(
    scenario: Scenario,
):
    run = scenario.start()
    victim = scenario.first_asked(run)
    scenario.in_training(victim)
    cut = Cut(scenario, victim)
    begun, since = cut.off(), time.time()
    try:
        scenario.until_event(run, "round-finished", round=1)
        assert noticed_after(scenario, run, since, "institution-lost") <= DEATH_S
        scenario.until_ended(run)
        until(lambda: elapsed(begun) >= 60.0, 65.0, lambda: "the clock stands still")
    finally:
        cut.on()
    # And it is back without anybody's help: the fixture waits for it.
    assert victim not in scenario.trainers(run)[0]


def test_institutions_that_are_cut_off_for_ever_do_not_end_a_run(scenario: Scenario):
    """As many as may be replaced, at once; the run goes on without them to its end."""
    run = scenario.start()
    names = scenario.until_event(run, "round-started", round=1)["institutions"]
    cuts = [Cut(scenario, name) for name in names]
    for cut in cuts:
        cut.off()
    try:
        scenario.until_ended(run)
        assert not any(set(names) & set(trained) for trained in scenario.trainers(run)[:1])
    finally:
        for cut in cuts:
            cut.on()


# --- the coordinator's side ---


def test_a_killed_serverapp_goes_on_by_itself(scenario: Scenario, undisturbed: Undisturbed):
    run = scenario.start()
    scenario.until_event(run, "round-started", round=2)
    scenario.kill("superlink", "flwr-serverapp")
    killed = time.time()
    ends_as_if_nothing_had_happened(scenario, run, undisturbed)
    assert noticed_after(scenario, run, killed, "resumed") <= RESTART_S
    # Nobody trained twice: the resumed ServerApp collects what the first one asked for.
    assert len(scenario.events(run, "reply-failed", "institution-lost", "asked")) == 0


def superlink_is_killed(scenario: Scenario) -> float:
    """Kill it, and wait until it is back; when it was, by the machine's clock."""
    scenario.kill("superlink", "-m superlink --")
    until(lambda: bool(scenario.online()), 90.0, lambda: "the SuperLink is not back")
    return time.time()


def test_a_superlink_killed_at_rest_is_back_with_everybody(scenario: Scenario):
    superlink_is_killed(scenario)
    # That everybody is back is for the fixture to see.


def test_a_superlink_killed_in_training_loses_nothing(scenario: Scenario, undisturbed: Undisturbed):
    run = scenario.start()
    names = scenario.until_event(run, "round-started", round=1)["institutions"]
    scenario.in_training(names[0])
    back = superlink_is_killed(scenario)
    ends_as_if_nothing_had_happened(scenario, run, undisturbed)
    next_round = min(event["time"] for event in scenario.events(run, "round-started")[1:])
    print(f"next round under way {next_round - back:.1f} s after the SuperLink was back")
    assert next_round - back <= RESTART_S


def test_a_superlink_killed_in_aggregation_loses_nothing(
    scenario: Scenario, undisturbed: Undisturbed
):
    run = scenario.start()
    scenario.until_event(run, "reply", round=2)  # the other one comes any moment
    superlink_is_killed(scenario)
    ends_as_if_nothing_had_happened(scenario, run, undisturbed)


def test_a_killed_gateway_is_not_noticed_by_the_run(scenario: Scenario, undisturbed: Undisturbed):
    run = scenario.start()
    names = scenario.until_event(run, "round-started", round=1)["institutions"]
    scenario.in_training(names[0])
    scenario.kill("gateway", "-m superlink.gateway")
    ends_as_if_nothing_had_happened(scenario, run, undisturbed)


def test_a_run_that_an_operator_stopped_goes_on_when_it_is_told_to(
    scenario: Scenario, undisturbed: Undisturbed
):
    stopped = scenario.start()
    scenario.until_event(stopped, "round-finished", round=1)
    scenario.stop(stopped)
    scenario.until_failed(stopped)
    resumed = scenario.start({"resume-run": str(stopped)})
    ends_as_if_nothing_had_happened(scenario, resumed, undisturbed)
    assert len(scenario.events(resumed, "round-finished")) == ROUNDS


# --- bad replies ---

LIES = {
    "NaN": "flat[0] = float('nan')",
    "Inf": "flat[0] = float('inf')",
    "another shape": "flat = flat[:-1]",
    "1000 times too large": "flat = flat * 1000",
    "a false number of examples": "examples = 10**9",
}
SAID = {
    "NaN": "1 that are NaN or infinite",
    "Inf": "1 that are NaN or infinite",
    "another shape": "of shape",
    "1000 times too large": "as far as the recipe can reach",
    "a false number of examples": "found 1000000000",
}
HONEST = "    flat = flat_adapter(model)\n"


@pytest.fixture(scope="module")
def lied_to(
    scenario: Scenario, everyone: set[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, str]]:
    """A run in which every one of the first institutions lies in a way of its own."""
    order = [name for name in first_order() if name in everyone]
    liars = dict(zip(order, LIES, strict=False))
    app = tmp_path_factory.mktemp("liars")
    copy_app(app, {NAMES.index(name): LIES[lie] for name, lie in liars.items()})
    run = scenario.start(
        {"num-server-rounds": 1, "strategy.min-train-nodes": len(LIES) + 2,
         "rounds.min-replies": 2, "rounds.replacements": len(LIES)},
        build_fab_from_disk(app),
    )  # fmt: skip
    scenario.until_ended(run)
    return run, {lie: name for name, lie in liars.items()}


def first_order() -> list[str]:
    """The order in which round 1 asks."""
    order = sorted(NAMES)
    Random(derive(42, "sampling", 1)).shuffle(order)
    return order


def copy_app(folder: Path, lies: dict[int, str]) -> None:
    """The project's app, whose ClientApp lies at some institutions."""
    shutil.copytree(ROOT / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    client = folder / "app" / "client_app.py"
    text = client.read_text(encoding="utf-8")
    assert HONEST in text
    told = HONEST + "    examples = len(examples)\n"
    for partition, lie in lies.items():
        told += f"    if partition_id == {partition}:\n        {lie}\n"
    text = text.replace(HONEST, told).replace(
        '"num-examples": len(examples)', '"num-examples": examples'
    )
    client.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("lie", LIES)
def test_a_bad_reply_is_rejected_by_name_and_does_not_reach_the_model(
    scenario: Scenario, lied_to: tuple[int, dict[str, str]], lie: str
):
    run, liars = lied_to
    (rejected,) = [
        event
        for event in scenario.events(run, "reply-rejected")
        if event["institution"] == liars[lie]
    ]
    assert SAID[lie] in rejected["reason"]
    assert liars[lie] not in scenario.trainers(run)[0]


def test_a_run_with_liars_ends_with_an_adapter_of_the_honest(
    scenario: Scenario, lied_to: tuple[int, dict[str, str]]
):
    run, liars = lied_to
    honest = scenario.trainers(run)[0]
    assert len(honest) == len(LIES) + 2
    assert not set(honest) & set(liars.values())


# --- the disk ---


def test_a_full_volume_is_named_and_the_run_goes_on_once_there_is_room(
    scenario: Scenario, undisturbed: Undisturbed
):
    filler = f"{RUNS}/filler"
    run = scenario.start()
    scenario.until_event(run, "round-finished", round=1)
    fill = f"""
with open("{filler}", "wb", buffering=0) as file:
    try:
        while True:
            file.write(b"0" * 4096)
    except OSError as error:
        print(error.strerror)
"""
    try:
        assert "No space left" in scenario.project.python("superlink", fill)
        reason = scenario.until_failed(run)
        assert "found a full disk" in reason
        assert "medfed run --resume" in reason
    finally:
        scenario.project.python("superlink", f"import os; os.unlink('{filler}')")
    resumed = scenario.start({"resume-run": str(run)})
    ends_as_if_nothing_had_happened(scenario, resumed, undisturbed, failures=1)


# --- everything ---


@pytest.mark.parametrize("end", [("stop", "--timeout", "5"), ("kill",)], ids=["stop", "kill"])
def test_the_whole_project_ended_and_started_again_goes_on(
    scenario: Scenario, undisturbed: Undisturbed, end: tuple[str, ...]
):
    project: ComposeProject = scenario.project
    run = scenario.start()
    names = scenario.until_event(run, "round-started", round=2)["institutions"]
    scenario.in_training(names[0])
    project.compose(*end, timeout=300)
    # By name: the demo of another test would wait for an institution that yet another has revoked.
    project.compose("start", *FEDERATION, timeout=300)
    summary = scenario.until_ended(run)
    trainers = scenario.trainers(run)
    assert trainers[0] == undisturbed.trainers[0], "what was trained before is kept"
    assert [len(names) for names in trainers] == [len(names) for names in undisturbed.trainers]
    # Who took leave before the coordinator was stopped was replaced by it. The killed take none.
    if end == ("kill",):
        assert trainers == undisturbed.trainers, "who had been asked is waited for"
    if trainers == undisturbed.trainers:
        assert summary["adapter_sha256"] == undisturbed.sha256
