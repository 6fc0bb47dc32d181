"""Keep the libraries' asides out of the log, so that what is left in it is worth reading."""

from __future__ import annotations

import logging
import warnings

# (message, category): said by libraries to their own developers, in every process, in every round.
_ASIDES: tuple[tuple[str, type[Warning]], ...] = (
    (r".*torch\.jit\..* is deprecated.*", DeprecationWarning),
    (r".*is_gradient_checkpointing.* is deprecated.*", FutureWarning),
    (r".*base_model_name_or_path. was renamed.*", UserWarning),
    (r".*override accelerator visible devices.*", FutureWarning),
)


def quiet_libraries() -> None:
    """Silence known asides; every other warning is still shown."""
    for message, category in _ASIDES:
        warnings.filterwarnings("ignore", message=message, category=category)
    # "Failed to load CPU gemm_4bit_forward": an optional kernel from a hub, not installed here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
