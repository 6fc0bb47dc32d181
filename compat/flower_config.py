"""The connections of Flower's own command line, in ``$FLWR_HOME/config.toml``."""

from flwr.cli import flower_config
from flwr.cli.constant import LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE, SuperLinkConnectionTomlKey
from flwr.cli.typing import (
    SimulationBackendConfig,
    SimulationClientResources,
    SuperLinkConnection,
    SuperLinkSimulationOptions,
)

__all__ = [
    "LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE",
    "SimulationBackendConfig",
    "SimulationClientResources",
    "SuperLinkConnection",
    "SuperLinkConnectionTomlKey",
    "SuperLinkSimulationOptions",
    "flower_config",
]
