"""What of a reply is summed: everything an institution sends is checked first.

Flower's own aggregation takes any number: one NaN, or one institution that claims a billion
examples, would be the whole model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from app.adapter.layout import FlatArray, Manifest
from app.config import ReplySettings, TrainSettings

ARRAYS, ADAPTER, METRICS = "arrays", "adapter", "metrics"
EXAMPLES, LOSS = "num-examples", "train-loss"

# Norms that the median is taken of, and the fewest of them that mean something.
_RECENT = 20
_ENOUGH = 4
# AdamW moves a parameter by at most (1 - beta1) / sqrt(1 - beta2) learning rates a step
# (Kingma and Ba, 1412.6980, section 2.1), whatever the gradients are.
_ADAM_STEP = (1 - 0.9) / math.sqrt(1 - 0.999)


class BadReplyError(Exception):
    """A reply that must not be summed; the text says what was expected and what was found."""


@dataclass(frozen=True)
class Accepted:
    """A reply that may be summed.

    Attributes:
        flat: the adapter, float32 of shape ``(manifest.size,)``.
        metrics: the numbers that came with it, by name.
        norm: L2 norm of the difference to the global adapter that the round began with.
    """

    flat: FlatArray
    metrics: dict[str, int | float]
    norm: float

    def message(self) -> Message:
        """As Flower's strategies take it."""
        arrays = ArrayRecord({ADAPTER: Array(self.flat)})
        metrics = MetricRecord(dict(self.metrics))
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        return Message(content, dst_node_id=1, message_type=MessageType.TRAIN)


class ReplyChecks:
    """Checks replies against the manifest, the recipe, and what the last replies were like.

    Args:
        settings: the limits.
        train: the recipe: no honest training can move an adapter further than it allows.
        manifest: the layout of the adapter.
        norms: of the updates accepted before, oldest first.
    """

    def __init__(
        self,
        settings: ReplySettings,
        train: TrainSettings,
        manifest: Manifest,
        norms: Iterable[float] = (),
    ) -> None:
        self._settings = settings
        self._manifest = manifest
        steps = train.max_steps * train.learning_rate_max
        self._furthest = steps * _ADAM_STEP * math.sqrt(manifest.size)
        self.norms: deque[float] = deque(norms, maxlen=_RECENT)

    @property
    def quarantine_after(self) -> int:
        """Bad replies after which an institution is asked no more."""
        return self._settings.quarantine_after

    def check(self, content: RecordDict, before: FlatArray) -> Accepted:
        """Check one reply.

        Args:
            content: as it came.
            before: the global adapter that the round began with.

        Raises:
            BadReplyError: it must not be summed.
        """
        metrics = self._metrics(content)
        flat = self._adapter(content)
        norm = float(np.linalg.norm(flat.astype(np.float64) - before))
        if norm > self._furthest:
            raise BadReplyError(
                f"expected an update of norm {self._furthest:.3g} at most, which is as far as the "
                f"recipe can reach, found {norm:.3g}"
            )
        if len(self.norms) >= _ENOUGH:
            limit = self._settings.max_norm_ratio * median(self.norms)
            if norm > limit:
                raise BadReplyError(
                    f"expected an update of norm {limit:.3g} at most, "
                    f"{self._settings.max_norm_ratio:g} times the median of the last "
                    f"{len(self.norms)}, found {norm:.3g}"
                )
        return Accepted(flat, metrics, norm)

    def _metrics(self, content: RecordDict) -> dict[str, int | float]:
        if set(content) != {ARRAYS, METRICS} or METRICS not in content.metric_records:
            found = ", ".join(sorted(content)) or "nothing"
            raise BadReplyError(f"expected the records {ARRAYS} and {METRICS}, found {found}")
        metrics: dict[str, int | float] = {}
        for key, value in content.metric_records[METRICS].items():
            if isinstance(value, list) or not math.isfinite(value):
                raise BadReplyError(f"expected a finite number as {key}, found {value}")
            metrics[key] = value
        examples, most = metrics.get(EXAMPLES), self._settings.max_num_examples
        if not isinstance(examples, int) or not 1 <= examples <= most:
            raise BadReplyError(f"expected {EXAMPLES} from 1 to {most}, found {examples}")
        if LOSS not in metrics:
            raise BadReplyError(f"expected a {LOSS}, found none")
        return metrics

    def _adapter(self, content: RecordDict) -> FlatArray:
        arrays = content.array_records.get(ARRAYS) or ArrayRecord()
        if list(arrays) != [ADAPTER]:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise BadReplyError(f"expected the one array {ADAPTER}, found {found}")
        try:
            flat = np.asarray(arrays[ADAPTER].numpy())
        except Exception as error:  # noqa: BLE001  (NumPy raises what it likes on foreign bytes)
            raise BadReplyError(f"expected an array that NumPy reads, found: {error}") from None
        if flat.dtype != np.float32 or flat.shape != (self._manifest.size,):
            raise BadReplyError(
                f"expected float32 of shape ({self._manifest.size},), "
                f"found {flat.dtype} of shape {flat.shape}"
            )
        if bad := int(np.count_nonzero(~np.isfinite(flat))):
            raise BadReplyError(f"expected finite numbers, found {bad} that are NaN or infinite")
        return flat
