"""Rounds of a federated run: who trains, in which order replies are summed, what is kept."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from app import polling
from app.adapter import FlatArray, Manifest, digest, tensor_digests
from app.communication import MB, Communication, array_bytes
from app.errors import AppError
from app.institutions import Institutions
from app.record import RunRecord

ROUND_TIMEOUT_S = 3600.0


class SeededSampling(FedAvg):
    """Flower's FedAvg, sampling and summing by institution instead of by chance of arrival.

    Mix it in before any of Flower's strategies that descend from FedAvg: only who is asked and
    the order of the replies change, not how they are aggregated.
    """

    def __init__(
        self, *, institutions: Institutions, seed: int, sample_size: int, **options: object
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.institutions = institutions
        self.seed = seed
        self.sample_size = sample_size
        self.asked: dict[int, str] = {}
        self._by_message: dict[str, str] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the first ``sample_size`` institutions online in this round's seeded order."""
        online = self.institutions.online()
        order = self.institutions.order(self.seed, server_round)
        chosen = [name for name in order if name in online][: self.sample_size]
        self.asked = {online[name]: name for name in sorted(chosen)}
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(record, list(self.asked), MessageType.TRAIN)

    def in_order(self, replies: Iterable[Message]) -> list[Message]:
        """Replies by name of institution: floating-point sums depend on their order."""
        return sorted(replies, key=self.name_of)

    def sent(self, message_ids: list[str]) -> None:
        """Note the ids of this round's messages, in the order of ``asked``."""
        self._by_message = dict(zip(message_ids, self.asked.values(), strict=True))

    def name_of(self, reply: Message) -> str:
        """The institution that ``reply`` is of.

        By what it replies to: for one that is gone, the SuperLink answers in its own name.
        """
        asked = reply.metadata.reply_to_message_id
        return self._by_message.get(asked, f"node {reply.metadata.src_node_id}")


class SeededFedAvg(SeededSampling, FedAvg):
    """FedAvg (1602.05629), weighted by examples."""


@dataclass(frozen=True)
class RoundResult:
    """What one round gave.

    Attributes:
        flat: the new global adapter.
        train_loss: mean of the institutions' losses, weighted by their examples.
    """

    flat: FlatArray
    train_loss: float


def run_round(
    grid: Grid,
    strategy: SeededSampling,
    record: RunRecord,
    server_round: int,
    arrays: ArrayRecord,
    manifest: Manifest,
    communication: Communication,
) -> RoundResult:
    """Send the global adapter out, wait for the replies, aggregate them.

    Raises:
        AppError: if no institution gave a usable reply.
    """
    started = time.monotonic()
    train_config = ConfigRecord({"manifest": manifest.to_json()})
    messages = list(strategy.configure_train(server_round, arrays, train_config, grid))
    names = list(strategy.asked.values())
    record.event("round-started", round=server_round, institutions=names)
    log(INFO, "[ROUND %d] training at %s", server_round, ", ".join(names))

    arrived = polling.replies(grid, messages, ROUND_TIMEOUT_S, on_push=strategy.sent)
    replies = strategy.in_order(arrived)
    good = [reply for reply in replies if not reply.has_error()]
    for reply in replies:
        _note(reply, strategy.name_of(reply), server_round, record, manifest)
    for name in sorted(set(names) - {strategy.name_of(reply) for reply in replies}):
        log(WARNING, "[ROUND %d] %s sent no reply in %.0f s", server_round, name, ROUND_TIMEOUT_S)
        record.event("reply-missing", round=server_round, institution=name)
    if not good:
        raise AppError(
            f"round {server_round}: expected a trained adapter from {', '.join(names)}, found none",
            "the lines above say why each could not train",
        )

    new_arrays, metrics = strategy.aggregate_train(server_round, good)
    if new_arrays is None or metrics is None:
        raise AppError(
            f"round {server_round}: the replies could not be aggregated",
            "the lines above say what was inconsistent",
        )
    ways = (array_bytes(messages), array_bytes(good))
    for one_way in ways:
        communication.add(one_way)
    loss = float(metrics["train-loss"])  # type: ignore[arg-type]
    if not math.isfinite(loss):
        raise AppError(
            f"round {server_round}: expected a finite training loss, found {loss}",
            "lower train.learning-rate-max",
        )
    seconds = time.monotonic() - started
    flat = np.asarray(new_arrays["adapter"].numpy(), dtype=np.float32)
    record.event(
        "round-finished",
        round=server_round,
        train_loss=loss,
        bytes=sum(ways),
        seconds=round(seconds, 3),
        adapter_sha256=digest(flat),
    )
    log(INFO, "[ROUND %d] loss %.4f, %.2f MB, %.1f s", server_round, loss, sum(ways) / MB, seconds)
    return RoundResult(flat, loss)


def _note(
    reply: Message, name: str, server_round: int, record: RunRecord, manifest: Manifest
) -> None:
    if reply.has_error():
        reason = _said(reply.error.reason or "") or f"error code {reply.error.code}"
        log(WARNING, "[ROUND %d] %s could not train: %s", server_round, name, reason)
        record.event("reply-failed", round=server_round, institution=name, reason=reason)
        return
    metrics = next(iter(reply.content.metric_records.values()))
    flat = np.asarray(reply.content.array_records["arrays"]["adapter"].numpy())
    record.event(
        "reply",
        round=server_round,
        institution=name,
        adapter_sha256=digest(flat),
        tensor_digests=tensor_digests(flat, manifest),
        **{key.replace("-", "_"): value for key, value in sorted(metrics.items())},
    )


def _said(reason: str) -> str:
    """What an institution's app said; Flower wraps it as ``<class 'name'>:<'what was said'>``."""
    wrapped = re.fullmatch(r"<class '[^']*'>:<'(.*)'>", reason, re.DOTALL)
    return wrapped[1] if wrapped else reason
