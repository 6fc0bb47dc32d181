"""Run configs, as Flower's own command line reads them."""

from flwr.common.config import flatten_dict, parse_config_args

__all__ = ["flatten_dict", "parse_config_args"]
