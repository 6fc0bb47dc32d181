"""The demo: a federation of 20 trains the embedded model on the embedded cards."""

from __future__ import annotations

import json

from rich.console import Console

from medfed.runs import Outcome, RunConfig

# Short enough for two cores, long enough for the held-out loss to fall.
CONFIG: RunConfig = {
    "model.name": "local/SmolLM2-135M-Instruct-Q4_1",
    "model.quantization": 0,
    "model.gradient-checkpointing": False,
    "static.dataset.name": "local/hpo-flashcards",
    "train.learning-rate-max": 2e-3,
    "train.learning-rate-min": 5e-4,
    "train.training-arguments.per-device-train-batch-size": 8,
    "train.training-arguments.max-steps": 5,
    "evaluate.holdout-examples": 32,
    "num-server-rounds": 3,
}


def run_demo(rounds: int, as_json: bool) -> None:
    """Prepare, start, train, report, and stop what was started.

    Args:
        rounds: rounds of federated training.
        as_json: print the summary as JSON on stdout.
    """
    from medfed import processes
    from medfed.commands.prepare import prepare_all
    from medfed.paths import Home
    from medfed.runs import run
    from superlink.control import Control

    console = Console(stderr=True)
    home = Home.from_environment()
    prepare_all(home, console)
    with (
        processes.federation(home, console) as address,
        Control(address, home.certs / "ca.crt") as control,
    ):
        outcome = run(control, home, {**CONFIG, "num-server-rounds": rounds}, console)
    report(outcome, as_json)


def report(outcome: Outcome, as_json: bool) -> None:
    """Print what a run gave: on stdout, for people or as JSON."""
    summary = outcome.summary
    if as_json:
        facts = {"run_id": outcome.run_id, "folder": str(outcome.folder), **summary}
        print(json.dumps({**facts, "adapter": str(outcome.adapter)}))
        return
    print(f"run {outcome.run_id}: {summary['rounds']} rounds, {summary['bytes'] / 2**20:.2f} MB")
    before, after = summary["holdout_loss_before"], summary["holdout_loss_after"]
    if before is not None:
        print(f"held-out loss: {before:.4f} before training, {after:.4f} after")
    print(f"adapter: {outcome.adapter} (SHA-256 {summary['adapter_sha256'][:16]}…)")
