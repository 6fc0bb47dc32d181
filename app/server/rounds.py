"""One round after the other: ask, wait no longer than it makes sense, check, aggregate."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import INFO, WARNING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.common import log
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from app.adapter.layout import FlatArray, Manifest, digest, tensor_digests
from app.config import RoundSettings
from app.errors import AppError
from app.server.communication import MB, Communication, array_bytes
from app.server.institutions import Presence
from app.server.ledger import Ledger, Plan
from app.server.liveness import LOOK_S, RESTARTED, Liveness
from app.server.polling import Mailbox, waits
from app.server.reply_checks import ADAPTER, Accepted, BadReplyError, ReplyChecks
from app.server.run_record import RunRecord
from app.server.strategies import SeededSampling

# Errors that say nothing about the institution's app or data: the same message may well succeed.
_PASSING = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
_MOST_ASKED = 2  # times that one institution is asked in one round
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
    """What all rounds of a run have in common.

    Args:
        run_id: of the Flower run.
        grid: Flower's grid.
        strategy: who is asked, and how replies become one adapter.
        checks: what a reply must be like.
        settings: how long to wait, and what for.
        manifest: the layout of the adapter.
        ledger: where accepted replies are kept.
        record: where events go.
        communication: counts bytes.
        clock: monotonic seconds.
        sleep: what sleeps.
    """

    def __init__(
        self,
        run_id: int,
        grid: Grid,
        strategy: SeededSampling,
        checks: ReplyChecks,
        settings: RoundSettings,
        manifest: Manifest,
        ledger: Ledger,
        record: RunRecord,
        communication: Communication,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.run_id = run_id
        self.strategy = strategy
        self.checks = checks
        self.settings = settings
        self.manifest = manifest
        self.ledger = ledger
        self.record = record
        self.communication = communication
        self.clock, self.sleep = clock, sleep
        self.mailbox = Mailbox(grid, clock=clock, sleep=sleep)
        self.bad_replies: dict[str, int] = {}
        self._late: dict[str, tuple[int, str]] = {}

    def recall(self, bad_replies: dict[str, int]) -> None:
        """Go on counting an earlier ServerApp's bad replies."""
        self.bad_replies = dict(bad_replies)
        most = self.checks.set_aside_after
        self.strategy.set_aside = {name for name, bad in bad_replies.items() if bad >= most}

    def run(self, number: int, before: FlatArray) -> RoundResult:
        """Run one round, or go on with one that another ServerApp began.

        Args:
            number: from 1.
            before: the global adapter.

        Raises:
            AppError: too few institutions gave a usable reply for longer than a run waits, or the
                disk cannot keep what they gave.
        """
        started = self.clock()
        needed = min(self.settings.min_replies, self.strategy.sample_size)
        gathering = _Gathering(self, number, before)
        while len(accepted := gathering.gather()) < needed:
            self._wait_for_more(number, gathering, needed)
        for name in accepted:
            self.checks.norms.append(accepted[name].norm)
        # Floating-point sums depend on their order: by name of institution.
        messages = [accepted[name].message() for name in sorted(accepted)]
        new_arrays, metrics = self.strategy.aggregate_train(number, messages)
        if new_arrays is None or metrics is None:
            raise AppError(
                f"round {number}: the replies could not be aggregated",
                "the lines above say what was inconsistent",
            )
        plan = gathering.plan
        for one_way in (plan.bytes_out, plan.bytes_in):
            self.communication.add(one_way)
        flat = np.asarray(new_arrays[ADAPTER].numpy(), dtype=np.float32)
        loss = float(metrics["train-loss"])  # type: ignore[arg-type]
        total, seconds = plan.bytes_out + plan.bytes_in, self.clock() - started
        self.record.event(
            "round-finished",
            round=number,
            train_loss=loss,
            bytes=total,
            seconds=round(seconds, 3),
            adapter_sha256=digest(flat),
        )
        log(INFO, "[ROUND %d] loss %.4f, %.2f MB, %.1f s", number, loss, total / MB, seconds)
        return RoundResult(flat, loss)

    def late(self, message_id: str, number: int, name: str) -> None:
        """A reply to this message is waited for no longer; if it comes, it is dropped."""
        self._late[message_id] = (number, name)

    def drop(self, reply: Message, now: int) -> None:
        """Log and forget a reply that nobody waits for."""
        number, name = self._late.pop(reply.metadata.reply_to_message_id, (now, "somebody"))
        if reply.has_content():
            log(WARNING, "[ROUND %d] %s replied to round %d, too late: dropped", now, name, number)
            self.record.event("reply-late", round=number, institution=name)

    def _wait_for_more(self, number: int, gathering: _Gathering, needed: int) -> None:
        """Try again: at once a few times, then whenever there is hope, while the run waits.

        Raises:
            AppError: it has waited long enough.
        """
        plan = gathering.plan
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(plan.failed.items()))
        reasons = reasons or "no institution is online"
        short = f"{len(gathering.accepted)} of {needed} needed replies"
        plan.retries += 1
        if plan.retries <= self.settings.retries:
            log(WARNING, "[ROUND %d] %s, trying again: %s", number, short, reasons)
            self.record.event("round-retried", round=number, reason=reasons)
        else:
            waits_for = f"{needed - len(gathering.accepted)} more institutions that can train"
            log(WARNING, "[ROUND %d] paused with %s: waiting for %s. %s", number, short,
                waits_for, reasons)  # fmt: skip
            self.record.event("paused", round=number, waits_for=waits_for, reason=reasons)
        self._pause(number, plan, reasons)
        gathering.begin_again()

    def _pause(self, number: int, plan: Plan, reasons: str) -> None:
        """Wait until another institution comes online, or a while."""
        beyond = max(0, plan.retries - self.settings.retries)
        if not beyond:
            return
        pauses = [min(_FIRST_PAUSE_S * 2.0**n, _LONGEST_PAUSE_S) for n in range(beyond)]
        if sum(pauses) > self.settings.pause_s:
            raise AppError(
                f"round {number}: expected {self.settings.min_replies} usable replies within "
                f"{self.settings.pause_s:g} s of waiting, found fewer ({reasons})",
                "the state is kept: medfed run --resume goes on once the institutions are back",
            )
        before, end = set(self.strategy.institutions.online()), self.clock() + pauses[-1]
        for pause in waits(1.0, 5.0):
            left = end - self.clock()
            if left <= 0 or set(self.strategy.institutions.online()) - before:
                return
            self.sleep(min(pause, left))


class _Gathering:
    """The replies of one round.

    Attributes:
        plan: who was asked; durable.
        accepted: institution → its reply; durable.
    """

    def __init__(self, rounds: Rounds, number: int, before: FlatArray) -> None:
        self._rounds, self._number, self._before = rounds, number, before
        self._flight = rounds.ledger.flight(number)
        self._pending: dict[str, str] = {}  # message id → institution
        self._size = rounds.strategy.sample_size
        institutions = rounds.strategy.institutions
        self._liveness = Liveness(institutions, rounds.settings.silence_s, rounds.clock)
        self.accepted: dict[str, Accepted] = {}
        known = self._flight.plan()
        self.plan = known or Plan(rounds.run_id)
        if known is not None:
            self._go_on()

    def gather(self) -> dict[str, Accepted]:
        """Ask and wait until everyone has replied, is lost, or the time is over."""
        rounds = self._rounds
        end = rounds.clock() + rounds.settings.deadline_s
        if not self._pending and not self.plan.failed and len(self.accepted) < self._size:
            self._choose()
        self._fill_up()
        while self._pending:
            for reply in rounds.mailbox.look(LOOK_S):
                self._take(reply)
            names = set(self._pending.values())
            for name, why in self._liveness.lost(names, self.plan.activated).items():
                self._lost(name, why)
            if rounds.clock() >= end:
                for name in sorted(set(self._pending.values())):
                    why = f"no reply in {rounds.settings.deadline_s:g} s"
                    log(WARNING, "[ROUND %d] %s: %s", self._number, name, why)
                    self._event("reply-missing", name)
                    self._give_up(name, why, replace=False)
        return self.accepted

    def begin_again(self) -> None:
        """Keep what was accepted, and let everyone else be asked anew."""
        self.plan.asked = {name: self.plan.asked[name] for name in self.accepted}
        self.plan.failed.clear()
        self.plan.replacements = 0
        self._flight.note(self.plan)

    def _choose(self) -> None:
        """Ask the first in the seeded order, as many as are missing."""
        missing = self._size - len(self.accepted)
        online = self._rounds.strategy.institutions.online()
        names = self._candidates(online)[:missing]
        together = sorted([*self.accepted, *names])
        self._rounds.record.event("round-started", round=self._number, institutions=together)
        for name in sorted(self.accepted):
            self._note(name)
        log(INFO, "[ROUND %d] training at %s", self._number, ", ".join(names) or "nobody")
        self._ask({name: online[name] for name in sorted(names)})

    def _go_on(self) -> None:
        """Take up a round that an earlier ServerApp began."""
        plan = self.plan
        self.accepted = self._flight.accepted(plan.asked)
        waiting = sorted(set(plan.asked) - set(self.accepted) - set(plan.failed))
        self._rounds.record.event(
            "round-started", round=self._number, institutions=sorted([*self.accepted, *waiting])
        )
        for name in sorted(self.accepted):
            self._note(name)
        log(INFO, "[ROUND %d] goes on: %d replies are kept, waiting for %s", self._number,
            len(self.accepted), ", ".join(waiting) or "nobody")  # fmt: skip
        if plan.run_id == self._rounds.run_id:
            for name in waiting:
                for message_id in plan.asked[name]:
                    self._pending[message_id] = name
                    self._rounds.mailbox.awaited.add(message_id)
            return
        # The replies to another run's messages cannot be had; and who starts another lets it wait
        # as long as the first.
        plan.run_id = self._rounds.run_id
        plan.retries = 0
        for name in waiting:
            plan.asked[name] = []
        online = self._rounds.strategy.institutions.online()
        for name in waiting:
            if name not in online:
                self._give_up(name, "its SuperNode is offline")
        self._ask({name: online[name] for name in waiting if name in online})

    def _candidates(self, online: Mapping[str, Presence]) -> list[str]:
        """Who may still be asked, in the round's seeded order."""
        order = self._rounds.strategy.order(self._number)
        return [name for name in order if name in online and name not in self.plan.asked]

    def _fill_up(self) -> None:
        """Ask others in place of those that are lost, in the seeded order, so many at most."""
        strategy = self._rounds.strategy
        while (
            len(self.accepted) + len(set(self._pending.values())) < self._size
            and self.plan.replacements < self._rounds.settings.replacements
            and (candidates := self._candidates(online := strategy.institutions.online()))
        ):
            name = candidates[0]
            self.plan.replacements += 1
            log(WARNING, "[ROUND %d] asking %s instead", self._number, name)
            self._event("asked", name, because="others are lost")
            self._ask({name: online[name]})

    def _ask(self, institutions: Mapping[str, Presence]) -> None:
        if not institutions:
            return
        rounds = self._rounds
        arrays = ArrayRecord({ADAPTER: Array(self._before)})
        config = ConfigRecord({"manifest": rounds.manifest.to_json()})
        nodes = [presence.node_id for presence in institutions.values()]
        messages = rounds.strategy.messages(self._number, arrays, config, nodes)
        for name, presence in institutions.items():
            self.plan.activated[name] = presence.activated
            self._liveness.watch(name, presence)
        refused = []
        for name, message_id in zip(institutions, rounds.mailbox.send(messages), strict=True):
            self.plan.asked.setdefault(name, [])
            if message_id:
                self.plan.asked[name].append(message_id)
                self._pending[message_id] = name
            else:
                refused.append(name)
        self.plan.bytes_out += array_bytes(messages)
        self._flight.note(self.plan)
        for name in refused:
            self._give_up(name, "the SuperLink refused the message")

    def _take(self, reply: Message) -> None:
        name = self._pending.pop(reply.metadata.reply_to_message_id, None)
        if name is None:
            self._rounds.drop(reply, self._number)
        elif reply.has_error():
            self._failed(name, reply)
        else:
            self._check(name, reply)

    def _check(self, name: str, reply: Message) -> None:
        rounds = self._rounds
        try:
            accepted = rounds.checks.check(reply.content, self._before)
        except BadReplyError as error:
            rounds.bad_replies[name] = bad = rounds.bad_replies.get(name, 0) + 1
            log(WARNING, "[ROUND %d] %s: bad reply (its %d.): %s", self._number, name, bad, error)
            self._event("reply-rejected", name, reason=str(error), bad_replies=bad)
            if bad >= rounds.checks.set_aside_after:
                rounds.strategy.set_aside.add(name)
                log(WARNING, "%s is set aside after %d bad replies", name, bad)
                self._event("set-aside", name, bad_replies=bad)
            self._give_up(name, f"bad reply: {error}")
            return
        self._flight.accept(name, accepted)
        self.accepted[name] = accepted
        self.plan.bytes_in += array_bytes([reply])
        self._forget(name)
        self._note(name)

    def _failed(self, name: str, reply: Message) -> None:
        reason = _said(reply.error.reason or "") or f"error code {reply.error.code}"
        log(WARNING, "[ROUND %d] %s could not train: %s", self._number, name, reason)
        self._event("reply-failed", name, reason=reason)
        if name in self._pending.values():
            return  # it was asked again meanwhile
        if reply.error.code not in _PASSING or not self._ask_again(name, reason):
            self._give_up(name, reason)

    def _lost(self, name: str, why: str) -> None:
        log(WARNING, "[ROUND %d] %s is lost: %s", self._number, name, why)
        self._event("institution-lost", name, reason=why)
        if why != RESTARTED or not self._ask_again(name, why):
            self._give_up(name, why)

    def _ask_again(self, name: str, why: str) -> bool:
        """Ask an institution once more, unless it has had its chances or is offline."""
        online = self._rounds.strategy.institutions.online()
        if len(self.plan.asked[name]) >= _MOST_ASKED or name not in online:
            return False
        self._event("asked", name, because=why)
        self._ask({name: online[name]})
        return True

    def _give_up(self, name: str, why: str, *, replace: bool = True) -> None:
        self._forget(name)
        self.plan.failed[name] = why
        self._flight.note(self.plan)
        if replace:
            self._fill_up()

    def _forget(self, name: str) -> None:
        """Wait no more for what else this institution was asked."""
        for message_id in [one for one, whose in self._pending.items() if whose == name]:
            del self._pending[message_id]
            self._rounds.late(message_id, self._number, name)

    def _note(self, name: str) -> None:
        reply = self.accepted[name]
        self._event(
            "reply",
            name,
            adapter_sha256=digest(reply.flat),
            tensor_digests=tensor_digests(reply.flat, self._rounds.manifest),
            **{key.replace("-", "_"): value for key, value in sorted(reply.metrics.items())},
        )

    def _event(self, kind: str, name: str, **details: object) -> None:
        self._rounds.record.event(kind, round=self._number, institution=name, **details)


def _said(reason: str) -> str:
    """What an institution's app said; Flower wraps it as ``<class 'name'>:<'what was said'>``."""
    wrapped = re.fullmatch(r"<class '[^']*'>:<'(.*)'>", reason, re.DOTALL)
    return wrapped[1] if wrapped else reason
