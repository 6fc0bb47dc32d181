"""One round after the other: gather replies, wait or retry where they are too few, aggregate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from logging import INFO, WARNING

import numpy as np
from flwr.common import log

from app.adapter.layout import FlatArray, digest
from app.errors import AppError
from app.server.cohort import Cohort, RunContext
from app.server.communication import MB, Communication
from app.server.ledger import Plan
from app.server.polling import waits
from app.server.reply_checks import ADAPTER

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0


@dataclass(frozen=True)
class RoundResult:
    """What one round gave.

    Attributes:
        flat: the new global adapter.
        train_loss: mean of the institutions' losses, weighted by their examples.
    """

    flat: FlatArray
    train_loss: float


class Rounds:
    """Runs one round after the other.

    Args:
        run: what all rounds share.
        communication: counts bytes.
    """

    def __init__(self, run: RunContext, communication: Communication) -> None:
        self._run = run
        self._communication = communication

    def run(self, number: int, before: FlatArray) -> RoundResult:
        """Run one round, or go on with one that another ServerApp began.

        Args:
            number: from 1.
            before: the global adapter.

        Raises:
            AppError: too few institutions gave a usable reply for longer than a run waits, or the
                disk cannot keep what they gave.
        """
        started = self._run.clock()
        needed = min(self._run.settings.min_replies, self._run.strategy.sample_size)
        cohort = Cohort(self._run, number, before)
        while len(accepted := cohort.gather()) < needed:
            self._wait_for_more(number, cohort, needed)
        for name in accepted:
            self._run.checks.norms.append(accepted[name].norm)
        # Floating-point sums depend on their order: by name of institution.
        messages = [accepted[name].message() for name in sorted(accepted)]
        new_arrays, metrics = self._run.strategy.aggregate_train(number, messages)
        if new_arrays is None or metrics is None:
            raise AppError(
                f"round {number}: the replies could not be aggregated",
                "the lines above say what was inconsistent",
            )
        plan = cohort.plan
        for one_way in (plan.bytes_out, plan.bytes_in):
            self._communication.add(one_way)
        flat = np.asarray(new_arrays[ADAPTER].numpy(), dtype=np.float32)
        loss = float(metrics["train-loss"])  # type: ignore[arg-type]
        total, seconds = plan.bytes_out + plan.bytes_in, self._run.clock() - started
        self._run.record.event(
            "round-finished",
            round=number,
            train_loss=loss,
            bytes=total,
            seconds=round(seconds, 3),
            adapter_sha256=digest(flat),
        )
        log(INFO, "[ROUND %d] loss %.4f, %.2f MB, %.1f s", number, loss, total / MB, seconds)
        return RoundResult(flat, loss)

    def _wait_for_more(self, number: int, cohort: Cohort, needed: int) -> None:
        """Try again: at once a few times, then whenever there is hope, while the run waits.

        Raises:
            AppError: it has waited long enough.
        """
        plan = cohort.plan
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(plan.failed.items()))
        reasons = reasons or "no institution is online"
        short = f"{len(cohort.accepted)} of {needed} needed replies"
        plan.retries += 1
        if plan.retries <= self._run.settings.retries:
            log(WARNING, "[ROUND %d] %s, trying again: %s", number, short, reasons)
            self._run.record.event("round-retried", round=number, reason=reasons)
        else:
            waits_for = f"{needed - len(cohort.accepted)} more institutions that can train"
            log(WARNING, "[ROUND %d] paused with %s: waiting for %s. %s", number, short,
                waits_for, reasons)  # fmt: skip
            self._run.record.event("paused", round=number, waits_for=waits_for, reason=reasons)
        self._pause(number, plan, reasons)
        cohort.begin_again()

    def _pause(self, number: int, plan: Plan, reasons: str) -> None:
        """Wait until another institution comes online, or a while."""
        beyond = max(0, plan.retries - self._run.settings.retries)
        if not beyond:
            return
        pauses = list(islice(waits(_FIRST_PAUSE_S, _LONGEST_PAUSE_S), beyond))
        if sum(pauses) > self._run.settings.max_wait_s:
            raise AppError(
                f"round {number}: expected {self._run.settings.min_replies} usable replies within "
                f"{self._run.settings.max_wait_s:g} s of waiting, found fewer ({reasons})",
                "the state is kept: medfed run --resume goes on once the institutions are back",
            )
        before, end = set(self._run.strategy.institutions.online()), self._run.clock() + pauses[-1]
        for pause in waits(1.0, 5.0):
            left = end - self._run.clock()
            if left <= 0 or set(self._run.strategy.institutions.online()) - before:
                return
            self._run.sleep(min(pause, left))
