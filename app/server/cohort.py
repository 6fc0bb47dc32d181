"""One round's exchange: ask its institutions, wait as long as it makes sense, check what comes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.common import log

from app.adapter.layout import FlatArray, Manifest, digest, tensor_digests
from app.config import RoundSettings
from app.server.communication import array_bytes
from app.server.institutions import Presence
from app.server.ledger import Ledger, Plan
from app.server.liveness import LOOK_S, RESTARTED, Liveness
from app.server.polling import Mailbox
from app.server.reply_checks import ADAPTER, Accepted, BadReplyError, ReplyChecks
from app.server.run_record import RunRecord
from app.server.selection import Selection
from app.server.strategies import SeededSampling

# Errors that say nothing about the institution's app or data: the same message may well succeed.
# Flower's numbers (flwr/common/constant.py, ErrorCode), which are part of its protocol.
_MESSAGE_UNAVAILABLE, _REPLY_MESSAGE_UNAVAILABLE, _CLIENT_APP_CRASHED = 3, 4, 8
_PASSING = frozenset({_MESSAGE_UNAVAILABLE, _REPLY_MESSAGE_UNAVAILABLE, _CLIENT_APP_CRASHED})


@dataclass
class RunContext:
    """What all rounds of a run share.

    Args:
        run_id: of the Flower run.
        strategy: who is asked, and how replies become one adapter.
        checks: what a reply must be like.
        settings: how long to wait, and what for.
        manifest: the layout of the adapter.
        ledger: where accepted replies are kept.
        record: where events go.
        mailbox: messages and replies.
        clock: monotonic seconds.
        sleep: what sleeps.

    Attributes:
        bad_replies: institution → how many of its replies were rejected in this run.
    """

    run_id: int
    strategy: SeededSampling
    checks: ReplyChecks
    settings: RoundSettings
    manifest: Manifest
    ledger: Ledger
    record: RunRecord
    mailbox: Mailbox
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    bad_replies: dict[str, int] = field(default_factory=dict, init=False)
    _stragglers: dict[str, tuple[int, str]] = field(default_factory=dict, init=False)

    def recall(self, bad_replies: dict[str, int]) -> None:
        """Go on counting an earlier ServerApp's bad replies."""
        self.bad_replies = dict(bad_replies)
        most = self.checks.quarantine_after
        self.strategy.quarantined = {name for name, bad in bad_replies.items() if bad >= most}

    def expect_no_more(self, message_id: str, number: int, name: str) -> None:
        """A reply to this message is waited for no longer; if it comes, it is dropped."""
        self._stragglers[message_id] = (number, name)

    def drop(self, reply: Message, now: int) -> None:
        """Log and forget a straggler's reply, for which nobody waits."""
        message_id = reply.metadata.reply_to_message_id
        number, name = self._stragglers.pop(message_id, (now, "somebody"))
        if reply.has_content():
            log(WARNING, "[ROUND %d] %s replied to round %d, too late: dropped", now, name, number)
            self.record.event("reply-late", round=number, institution=name)


class Cohort:
    """The institutions of one round, what they were asked and what they replied.

    Args:
        run: what all rounds share.
        number: of the round, from 1.
        before: the global adapter that the round begins with.

    Attributes:
        plan: who was asked; durable.
        accepted: institution → its reply; durable.
    """

    def __init__(self, run: RunContext, number: int, before: FlatArray) -> None:
        self._run, self._number, self._before = run, number, before
        self._in_flight = run.ledger.in_flight(number)
        self._pending: dict[str, str] = {}  # message id → institution
        institutions = run.strategy.institutions
        self._liveness = Liveness(institutions, run.settings.heartbeat_timeout_s, run.clock)
        self.accepted: dict[str, Accepted] = {}
        known = self._in_flight.plan()
        self.plan = known or Plan(run.run_id)
        self._selection = Selection(
            self.plan,
            lambda: run.strategy.order(number),
            run.strategy.sample_size,
            run.settings.replacements,
        )
        if known is not None:
            self._go_on()

    def gather(self) -> dict[str, Accepted]:
        """Ask and wait until everyone has replied, is lost, or the time is over."""
        run = self._run
        end = run.clock() + run.settings.deadline_s
        if not self._pending and not self.plan.failed and self._standing < self._selection.size:
            self._choose()
        self._fill_up()
        while self._pending:
            for reply in run.mailbox.look(LOOK_S):
                self._take(reply)
            names = set(self._pending.values())
            for name, why in self._liveness.lost(names, self.plan.activated).items():
                self._lost(name, why)
            if run.clock() >= end:
                for name in sorted(set(self._pending.values())):
                    why = f"no reply in {run.settings.deadline_s:g} s"
                    log(WARNING, "[ROUND %d] %s: %s", self._number, name, why)
                    self._event("reply-missing", name)
                    self._give_up(name, why, replace=False)
        return self.accepted

    def begin_again(self) -> None:
        """Keep what was accepted, and let everyone else be asked anew."""
        self._selection.begin_again(self.accepted)
        self._in_flight.note(self.plan)

    @property
    def _standing(self) -> int:
        """How many have replied or still may."""
        return len(self.accepted) + len(set(self._pending.values()))

    def _choose(self) -> None:
        """Ask the first in the seeded order, as many as are missing."""
        online = self._run.strategy.institutions.online()
        names = self._selection.first(online, self._standing)
        together = sorted([*self.accepted, *names])
        self._run.record.event("round-started", round=self._number, institutions=together)
        for name in sorted(self.accepted):
            self._note(name)
        log(INFO, "[ROUND %d] training at %s", self._number, ", ".join(names) or "nobody")
        self._ask({name: online[name] for name in sorted(names)})

    def _go_on(self) -> None:
        """Take up a round that an earlier ServerApp began."""
        plan = self.plan
        self.accepted = self._in_flight.accepted(plan.asked)
        waiting = sorted(set(plan.asked) - set(self.accepted) - set(plan.failed))
        self._run.record.event(
            "round-started", round=self._number, institutions=sorted([*self.accepted, *waiting])
        )
        for name in sorted(self.accepted):
            self._note(name)
        log(INFO, "[ROUND %d] goes on: %d replies are kept, waiting for %s", self._number,
            len(self.accepted), ", ".join(waiting) or "nobody")  # fmt: skip
        if plan.run_id == self._run.run_id:
            for name in waiting:
                for message_id in plan.asked[name]:
                    self._pending[message_id] = name
                    self._run.mailbox.awaited.add(message_id)
            return
        # The replies to another run's messages cannot be had; and who starts another lets it wait
        # as long as the first.
        plan.run_id = self._run.run_id
        plan.retries = 0
        for name in waiting:
            plan.asked[name] = []
        online = self._run.strategy.institutions.online()
        for name in waiting:
            if name not in online:
                self._give_up(name, "its SuperNode is offline")
        self._ask({name: online[name] for name in waiting if name in online})

    def _fill_up(self) -> None:
        """Ask others in place of those that are lost, in the seeded order, so many at most."""
        while self._selection.wants_replacement(self._standing):
            online = self._run.strategy.institutions.online()
            name = self._selection.replacement(online)
            if name is None:
                return
            log(WARNING, "[ROUND %d] asking %s instead", self._number, name)
            self._event("asked", name, because="others are lost")
            self._ask({name: online[name]})

    def _ask(self, institutions: Mapping[str, Presence]) -> None:
        if not institutions:
            return
        run = self._run
        arrays = ArrayRecord({ADAPTER: Array(self._before)})
        config = ConfigRecord({"manifest": run.manifest.to_json()})
        nodes = [presence.node_id for presence in institutions.values()]
        messages = run.strategy.messages(self._number, arrays, config, nodes)
        for name, presence in institutions.items():
            self.plan.activated[name] = presence.activated
            self._liveness.watch(name, presence)
        refused = []
        for name, message_id in zip(institutions, run.mailbox.send(messages), strict=True):
            self.plan.asked.setdefault(name, [])
            if message_id:
                self.plan.asked[name].append(message_id)
                self._pending[message_id] = name
            else:
                refused.append(name)
        self.plan.bytes_out += array_bytes(messages)
        self._in_flight.note(self.plan)
        for name in refused:
            self._give_up(name, "the SuperLink refused the message")

    def _take(self, reply: Message) -> None:
        name = self._pending.pop(reply.metadata.reply_to_message_id, None)
        if name is None:
            self._run.drop(reply, self._number)
        elif reply.has_error():
            self._failed(name, reply)
        else:
            self._check(name, reply)

    def _check(self, name: str, reply: Message) -> None:
        run = self._run
        try:
            accepted = run.checks.check(reply.content, self._before)
        except BadReplyError as error:
            run.bad_replies[name] = bad = run.bad_replies.get(name, 0) + 1
            log(WARNING, "[ROUND %d] %s: bad reply (its %d.): %s", self._number, name, bad, error)
            self._event("reply-rejected", name, reason=str(error), bad_replies=bad)
            if bad >= run.checks.quarantine_after:
                run.strategy.quarantined.add(name)
                log(WARNING, "%s is quarantined after %d bad replies", name, bad)
                self._event("quarantined", name, bad_replies=bad)
            self._give_up(name, f"bad reply: {error}")
            return
        self._in_flight.accept(name, accepted)
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
        online = self._run.strategy.institutions.online()
        if not self._selection.may_ask_again(name, online):
            return False
        self._event("asked", name, because=why)
        self._ask({name: online[name]})
        return True

    def _give_up(self, name: str, why: str, *, replace: bool = True) -> None:
        self._forget(name)
        self.plan.failed[name] = why
        self._in_flight.note(self.plan)
        if replace:
            self._fill_up()

    def _forget(self, name: str) -> None:
        """Wait no more for what else this institution was asked."""
        for message_id in [one for one, whose in self._pending.items() if whose == name]:
            del self._pending[message_id]
            self._run.expect_no_more(message_id, self._number, name)

    def _note(self, name: str) -> None:
        reply = self.accepted[name]
        self._event(
            "reply",
            name,
            adapter_sha256=digest(reply.flat),
            tensor_digests=tensor_digests(reply.flat, self._run.manifest),
            **{key.replace("-", "_"): value for key, value in sorted(reply.metrics.items())},
        )

    def _event(self, kind: str, name: str, **details: object) -> None:
        self._run.record.event(kind, round=self._number, institution=name, **details)


def _said(reason: str) -> str:
    """What an institution's app said; Flower wraps it as ``<class 'name'>:<'what was said'>``."""
    wrapped = re.fullmatch(r"<class '[^']*'>:<'(.*)'>", reason, re.DOTALL)
    return wrapped[1] if wrapped else reason
