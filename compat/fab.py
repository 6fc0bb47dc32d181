"""Flower App Bundles, as Flower's own command line builds and reads them."""

from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import get_fab_metadata as fab_metadata

__all__ = ["build_fab_from_disk", "fab_metadata"]
