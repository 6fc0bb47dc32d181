"""The run config: the leaderboard template's keys, parsed once into typed, checked values.

Dataclasses and not pydantic's models: those took as many lines (flat keys to nested settings, one
line an error, no false for a 0), and one more library in the code that every hospital approves.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from app.errors import AppError

_T = TypeVar("_T")
_log = logging.getLogger("flwr")  # Flower's own: it reaches `flwr log`

# Flower's strategies that can be named, each with the fewest replies it makes sense of: a median
# of two is their mean, a trimmed mean (a fifth off each end) trims from five on, and Krum bears
# one bad reply among 2 * 1 + 3.
STRATEGIES = {"FedAvg": 1, "FedMedian": 3, "FedTrimmedAvg": 5, "Krum": 5}

# Former names of settings: taken, with a warning, until version RENAMED_UNTIL. pyproject.toml holds
# each one as "" (not given), because a SuperLink refuses every name that does not stand there.
RENAMED = {
    "rounds.silence-s": "rounds.heartbeat-timeout-s",
    "rounds.pause-s": "rounds.max-wait-s",
    "replies.set-aside-after": "replies.quarantine-after",
}
RENAMED_UNTIL = "0.2.0"


def _setting(key: str, expected: str, valid: Callable[[Any], bool]) -> Any:
    """Declare a field that is read from ``key`` and must satisfy ``valid``."""
    return field(metadata={"key": key, "expected": expected, "valid": valid})


def _positive(value: float) -> bool:
    return value > 0


def _named(value: str) -> bool:
    return bool(value.strip())


@dataclass(frozen=True)
class LoraSettings:
    """The adapter: low-rank matrices beside the projections of every layer (LoRA, 2106.09685)."""

    r: int = _setting("model.lora.peft-lora-r", "a whole number above 0", _positive)
    alpha: int = _setting("model.lora.peft-lora-alpha", "a whole number above 0", _positive)
    dropout: float = _setting(
        "model.lora.dropout", "a number from 0 to below 1", lambda v: 0 <= v < 1
    )
    target_modules: str = _setting(
        "model.lora.target-modules", "module names separated by commas, e.g. q_proj,v_proj", _named
    )

    @property
    def modules(self) -> tuple[str, ...]:
        """The target modules, one name each."""
        return tuple(name.strip() for name in self.target_modules.split(",") if name.strip())


@dataclass(frozen=True)
class ModelSettings:
    """The base model and how it is held in memory."""

    lora: LoraSettings
    name: str = _setting(
        "model.name",
        "a hub name (HuggingFaceTB/SmolLM2-135M-Instruct), local/NAME or an absolute path",
        _named,
    )
    quantization: int = _setting(
        "model.quantization", "4 or 8 (bitsandbytes) or 0 (none)", lambda v: v in (0, 4, 8)
    )
    gradient_checkpointing: bool = _setting(
        "model.gradient-checkpointing", "true or false", lambda _: True
    )


@dataclass(frozen=True)
class TrainSettings:
    """What one institution does in one round."""

    seed: int = _setting("train.seed", "a whole number from 0", lambda v: v >= 0)
    dynamic_data_seed: bool = _setting("train.dynamic-data-seed", "true or false", lambda _: True)
    save_every_round: int = _setting("train.save-every-round", "a whole number above 0", _positive)
    learning_rate_max: float = _setting("train.learning-rate-max", "a number above 0", _positive)
    learning_rate_min: float = _setting(
        "train.learning-rate-min", "a number from 0", lambda v: v >= 0
    )
    answer_formats: float = _setting(
        "train.answer-formats", "a share of the cards from 0 to 1", lambda v: 0 <= v <= 1
    )
    seq_length: int = _setting("train.seq-length", "a whole number of tokens above 0", _positive)
    batch_size: int = _setting(
        "train.training-arguments.per-device-train-batch-size", "a whole number above 0", _positive
    )
    gradient_accumulation_steps: int = _setting(
        "train.training-arguments.gradient-accumulation-steps", "a whole number above 0", _positive
    )
    max_steps: int = _setting(
        "train.training-arguments.max-steps", "a whole number above 0", _positive
    )
    threads: int = _setting(
        "train.threads",
        "CPU threads of each client, from 0 (0: its node's share)",
        lambda v: v >= 0,
    )

    def __post_init__(self) -> None:
        if self.learning_rate_min > self.learning_rate_max:
            raise AppError(
                "train.learning-rate-min: expected at most train.learning-rate-max "
                f"({self.learning_rate_max:g}), found {self.learning_rate_min:g}",
                "the cosine falls from the maximum in round 1 to the minimum in the last round",
            )

    def learning_rate(self, server_round: int, num_rounds: int) -> float:
        """Cosine annealing by round, constant within one, as the leaderboard's template has it."""
        cosine = math.cos(math.pi * server_round / num_rounds)
        spread = self.learning_rate_max - self.learning_rate_min
        return self.learning_rate_min + 0.5 * spread * (1 + cosine)


@dataclass(frozen=True)
class StrategySettings:
    """Who takes part in a round, and how their adapters become one."""

    name: str = _setting(
        "strategy.name", f"one of {', '.join(STRATEGIES)}", lambda v: v in STRATEGIES
    )
    fraction_train: float = _setting(
        "strategy.fraction-train", "a number above 0, at most 1", lambda v: 0 < v <= 1
    )
    min_train_nodes: int = _setting("strategy.min-train-nodes", "a whole number above 0", _positive)
    wait_for_nodes_s: float = _setting("strategy.wait-for-nodes-s", "seconds above 0", _positive)

    def sample_size(self, institutions: int) -> int:
        """How many of ``institutions`` train in a round (FedAvg's own rule).

        Raises:
            AppError: too few for the strategy to tell good replies from bad ones.
        """
        size = max(int(institutions * self.fraction_train), self.min_train_nodes)
        if size < (least := STRATEGIES[self.name]):
            raise AppError(
                f"strategy.name: {self.name} expects at least {least} institutions a round, "
                f"found {size}",
                "raise strategy.fraction-train or strategy.min-train-nodes",
            )
        return size


@dataclass(frozen=True)
class RoundSettings:
    """How long a round waits, for whom, and what it does without them."""

    min_replies: int = _setting(
        "rounds.min-replies",
        "a whole number above 0 (never more than are asked)",
        _positive,
    )
    replacements: int = _setting(
        "rounds.replacements",
        "institutions asked in place of lost ones in one round, from 0",
        lambda v: v >= 0,
    )
    deadline_s: float = _setting("rounds.deadline-s", "seconds above 0", _positive)
    heartbeat_timeout_s: float = _setting(
        "rounds.heartbeat-timeout-s",
        "seconds without a heartbeat after which a SuperNode at work counts as lost, from 5 "
        "(medfed's send one every 3 s; Flower's own every 20 s)",
        lambda v: v >= 5,
    )
    retries: int = _setting(
        "rounds.retries", "times a round is tried again at once, from 0", lambda v: v >= 0
    )
    max_wait_s: float = _setting(
        "rounds.max-wait-s",
        "seconds from 0 that a run waits for institutions after that, before it ends",
        lambda v: v >= 0,
    )
    max_restarts: int = _setting(
        "rounds.max-restarts",
        "times from 0 that a ServerApp may die without finishing a round",
        lambda v: v >= 0,
    )


@dataclass(frozen=True)
class ReplySettings:
    """What a reply must be like to be summed."""

    max_num_examples: int = _setting(
        "replies.max-num-examples", "a whole number above 0", _positive
    )
    max_norm_ratio: float = _setting(
        "replies.max-norm-ratio",
        "a number above 1: how much larger an update may be than the median of the last ones",
        lambda v: v > 1,
    )
    quarantine_after: int = _setting(
        "replies.quarantine-after",
        "bad replies above 0 after which an institution is asked no more",
        _positive,
    )


@dataclass(frozen=True)
class EvaluateSettings:
    """What the coordinator measures between rounds."""

    holdout_examples: int = _setting(
        "evaluate.holdout-examples", "a whole number from 0 (0: no held-out loss)", lambda v: v >= 0
    )
    holdout_every_round: int = _setting(
        "evaluate.holdout-every-round", "a whole number above 0", _positive
    )


@dataclass(frozen=True)
class RunConfig:
    """One run, whole.

    ``dataset.name`` stands in the static section: a leaderboard entry may not change it.
    """

    model: ModelSettings
    train: TrainSettings
    strategy: StrategySettings
    rounds: RoundSettings
    replies: ReplySettings
    evaluate: EvaluateSettings
    dataset_name: str = _setting(
        "static.dataset.name", "a hub name, local/NAME or an absolute path", _named
    )
    num_rounds: int = _setting("num-server-rounds", "a whole number above 0", _positive)
    resume_run: str = _setting(
        "resume-run",
        "the id of a run to go on with, or nothing",
        lambda v: not v or v.isdecimal(),
    )

    @classmethod
    def parse(cls, run_config: Mapping[str, Any]) -> RunConfig:
        """Parse Flower's flat ``context.run_config``.

        Raises:
            AppError: naming the key, what was expected and what was found.
        """
        values = current_names(run_config)
        unknown = sorted(set(values) - set(keys()))
        if unknown:
            close = difflib.get_close_matches(unknown[0], keys(), n=1)
            raise AppError(
                f"{unknown[0]}: unknown setting",
                f"did you mean {close[0]}?" if close else "docs/reference.md lists every setting",
            )
        return _build(cls, values)

    def flat(self) -> dict[str, Any]:
        """What ``parse`` would read this config from: every key with its value."""
        return _flat(self)

    def check_same(self, earlier: Mapping[str, Any]) -> None:
        """Compare with the config of the run that this one goes on with.

        How it waits and what it lets pass may differ: that may be why it goes on.

        Raises:
            AppError: naming the first setting that would make it another run.
        """
        for key, value in self.flat().items():
            if key.startswith(("rounds.", "replies.", "strategy.wait")) or key == "resume-run":
                continue
            if earlier.get(key) != value:
                raise AppError(
                    f"{key}: expected {earlier.get(key)!r} as in the run to go on with, "
                    f"found {value!r}",
                    "medfed run --resume takes the run's own settings; another run starts anew",
                )


def _flat(settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        found |= {item.metadata["key"]: value} if item.metadata else _flat(value)
    return found


def keys(cls: type = RunConfig) -> list[str]:
    """Every key of the run config, in the order of the typed config."""
    found: list[str] = []
    hints = get_type_hints(cls)
    for item in fields(cls):
        found += [item.metadata["key"]] if item.metadata else keys(hints[item.name])
    return found


def current_names(
    values: Mapping[str, Any], warn: Callable[[str], object] = _log.warning
) -> dict[str, Any]:
    """``values`` under the settings' current names.

    A value under a former name replaces the one under the current name: in the flat config that
    Flower hands over, an operator's own value cannot be told from pyproject.toml's default.

    Args:
        values: flat; a former name whose value is "" is not given.
        warn: called with one line for each former name that is given.
    """
    found = {key: value for key, value in values.items() if key not in RENAMED}
    for old, new in RENAMED.items():
        if (value := values.get(old, "")) != "":
            warn(f"{old} is now {new}, which gets its value ({value!r}); the old name goes in "
                 f"version {RENAMED_UNTIL}")  # fmt: skip
            found[new] = value
    return found


def _build(cls: type[_T], values: Mapping[str, Any]) -> _T:
    hints = get_type_hints(cls)
    return cls(
        **{
            item.name: _value(item, hints[item.name], values)
            if item.metadata
            else _build(hints[item.name], values)
            for item in fields(cls)  # type: ignore[arg-type]
        }
    )


def _value(item: Field[Any], kind: type, values: Mapping[str, Any]) -> Any:
    key, expected = item.metadata["key"], item.metadata["expected"]
    if key not in values:
        raise AppError(f"{key}: expected {expected}, found nothing", "add it to pyproject.toml")
    value = values[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # bool is an int to Python; a count of True is a mistake to us.
    if type(value) is not kind or not item.metadata["valid"](value):
        raise AppError(
            f"{key}: expected {expected}, found {value!r}",
            f"correct it in pyproject.toml or in flwr run . -c '{key}=…'",
        )
    return value
