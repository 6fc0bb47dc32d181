"""Flower's strategies, asking and summing by institution instead of by chance of arrival."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from app.config import StrategySettings
from app.server.institutions import Institutions

# What Flower's strategies remember from one round to the next: FedAvgM's momentum, and the moments
# of FedAdam, FedYogi and FedAdagrad.
_MEMORY = ("momentum_vector", "m_t", "v_t")

State = dict[str, npt.NDArray[Any]]


class _Only:
    """A grid in which there are only these nodes."""

    def __init__(self, node_ids: list[int]) -> None:
        self._node_ids = node_ids

    def get_node_ids(self) -> list[int]:
        return self._node_ids


class SeededSampling(FedAvg):
    """Mix it in before any of Flower's strategies that descend from FedAvg.

    Only who is asked changes, not how replies are aggregated.
    """

    def __init__(
        self, *, institutions: Institutions, seed: int, sample_size: int, **options: object
    ) -> None:
        # Flower samples from those that were chosen, so it is to take them all.
        super().__init__(min_available_nodes=1, min_train_nodes=1, **options)  # type: ignore[arg-type]
        self.institutions = institutions
        self.seed = seed
        self.sample_size = sample_size
        self.quarantined: set[str] = set()

    def order(self, server_round: int) -> list[str]:
        """Everyone who may be asked, in this round's seeded order."""
        everyone = self.institutions.order(self.seed, server_round)
        return [name for name in everyone if name not in self.quarantined]

    def messages(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, node_ids: list[int]
    ) -> list[Message]:
        """What the strategy sends these nodes in this round, in their order."""
        chosen = cast(Grid, _Only(node_ids))
        sent = super().configure_train(server_round, arrays, config, chosen)
        return sorted(sent, key=lambda message: node_ids.index(message.metadata.dst_node_id))

    def state(self) -> State:
        """What the strategy remembers from one round to the next, as arrays by name."""
        found: State = {}
        for name in _MEMORY:
            memory = getattr(self, name, None)
            if isinstance(memory, Mapping):
                found |= {f"{name}.{key}": np.asarray(value) for key, value in memory.items()}
            elif memory is not None:
                found |= {f"{name}.{n}": np.asarray(value) for n, value in enumerate(memory)}
        return found

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Remember what ``state`` gave."""
        for name in _MEMORY:
            prefix = f"{name}."
            parts = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            if parts:
                numbered = all(key.isdecimal() for key in parts)
                memory = [parts[str(n)] for n in range(len(parts))] if numbered else parts
                setattr(self, name, memory)


class SeededFedAvg(SeededSampling, FedAvg):
    """FedAvg (1602.05629), weighted by examples."""


class SeededFedMedian(SeededSampling, FedMedian):
    """The median of each parameter (1803.01498)."""


class SeededFedTrimmedAvg(SeededSampling, FedTrimmedAvg):
    """The mean of each parameter without its fifth at either end (1803.01498)."""


class SeededKrum(SeededSampling, Krum):
    """The one reply that lies closest to most of the others (1703.02757)."""


_STRATEGIES: dict[str, type[SeededSampling]] = {
    "FedAvg": SeededFedAvg,
    "FedMedian": SeededFedMedian,
    "FedTrimmedAvg": SeededFedTrimmedAvg,
    "Krum": SeededKrum,
}


def strategy(settings: StrategySettings, institutions: Institutions, seed: int) -> SeededSampling:
    """The strategy that the run config names.

    Raises:
        AppError: there are too few institutions for it.
    """
    options: dict[str, Any] = {"num_malicious_nodes": 1} if settings.name == "Krum" else {}
    return _STRATEGIES[settings.name](
        institutions=institutions,
        seed=seed,
        sample_size=settings.sample_size(len(institutions.known())),
        fraction_evaluate=0.0,
        **options,
    )
