"""The base model, as an institution loads it, and the adapter on top of it."""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from app.adapter.layout import FlatArray, Manifest, pack, unpack
from app.adapter.lora import lora_config
from app.config import ModelSettings
from app.errors import AppError
from app.paths import model_folder
from app.seeds import derive
from app.training.device import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

transformers_logging.disable_progress_bar()


def model_source(name: str) -> str:
    """Where ``model.name`` is loaded from: a folder's path, or a name on the hub.

    Raises:
        AppError: if a local folder holds no model.
    """
    return str(model_folder(name) or name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``model.name``; padding is the end of text, as in the template."""
    warm = sys.modules.get("medfed_warm")
    tokenizer = warm.take_tokenizer(model_source(name)) if warm is not None else None
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_source(name), use_fast=True)
        except (OSError, ValueError) as error:
            raise _not_loadable(name, error) from error
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(settings: ModelSettings, placement: Placement) -> PreTrainedModel:
    """Load the frozen base model, ready for an adapter.

    Args:
        settings: which model and which quantization.
        placement: the device and the precision.

    Raises:
        AppError: if there is no such model or the device cannot hold it as asked.
    """
    base = _from_warm_process(settings, placement) or _from_files(settings, placement)
    base.config.use_cache = False
    _keep_weight_layout(base)
    if not settings.quantization:
        base.requires_grad_(False)
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return base
    prepared = prepare_model_for_kbit_training(
        base,
        use_gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return cast(PreTrainedModel, prepared)


def _from_warm_process(settings: ModelSettings, placement: Placement) -> PreTrainedModel | None:
    """The base model that this process inherited from the node's fork server, if it has one.

    The provider is found by the name of a module (``supernode/warm/preload.py``), because the app
    imports no code of the machine it runs on.
    """
    warm = sys.modules.get("medfed_warm")
    if warm is None or placement.device.type != "cpu" or placement.dtype != torch.float32:
        return None
    return cast(
        "PreTrainedModel | None", warm.take(model_source(settings.name), settings.quantization)
    )


def _from_files(settings: ModelSettings, placement: Placement) -> PreTrainedModel:
    quantization = {
        0: None,
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=placement.dtype),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }[settings.quantization]
    try:
        base = AutoModelForCausalLM.from_pretrained(
            model_source(settings.name),
            dtype=placement.dtype,
            device_map={"": placement.device},
            quantization_config=quantization,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loadable(settings.name, error) from error
    return cast(PreTrainedModel, base)


def _keep_weight_layout(base: PreTrainedModel) -> None:
    """Keep 4-bit weights in the layout in which they were loaded, in evaluation mode too.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 converts them at the first forward pass in
    evaluation mode, for a kernel that rounds to bfloat16 and has no gradient. ``state_dict()`` then
    converts them back with the scales transposed, and every later answer is wrong.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


@lru_cache(maxsize=1)
def adapted_model(settings: ModelSettings, placement: Placement) -> PeftModel:
    """The base model with an adapter on it, loaded once per process.

    Simulated nodes share one process, and the coordinator measures after each round. Each of them
    overwrites the whole adapter before use, so nothing is left of the user before.
    """
    return attach_adapter(load_base(settings, placement), settings)


def attach_adapter(base: PreTrainedModel, settings: ModelSettings) -> PeftModel:
    """Put a fresh LoRA adapter on ``base``; ``load_adapter`` then writes the round's weights."""
    return get_peft_model(base, lora_config(settings))


def adapter_state(model: PeftModel) -> dict[str, FlatArray]:
    """The adapter's tensors under PEFT's own names, as float32 arrays on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.float32).numpy()
        for name, tensor in get_peft_model_state_dict(model).items()
    }


def load_adapter(model: PeftModel, flat: FlatArray, manifest: Manifest) -> None:
    """Write a flat global adapter of shape ``(manifest.size,)`` into ``model``.

    Raises:
        AppError: naming the first tensor in which the two layouts differ.
    """
    targets = get_peft_model_state_dict(model)
    Manifest.of(targets).check(manifest)
    with torch.no_grad():
        for name, values in unpack(flat, manifest).items():
            targets[name].copy_(torch.from_numpy(np.array(values)))


def flat_adapter(model: PeftModel) -> FlatArray:
    """The adapter of ``model`` as one flat float32 array."""
    return pack(adapter_state(model))


def initial_adapter(settings: ModelSettings, seed: int) -> tuple[FlatArray, Manifest]:
    """The adapter that round 1 starts from; it needs the architecture and no weights.

    LoRA's own initialisation: A is Kaiming-uniform, B is zero, so the model starts unchanged. The
    seed of each tensor is derived from its name.

    Raises:
        AppError: if there is no such model or it has no module of a target's name.
    """
    model_config = _architecture(settings.name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model_config)
        try:
            peft = attach_adapter(skeleton, settings)
        except ValueError as error:
            raise AppError(
                "model.lora.target-modules: expected names of modules of "
                f"{settings.name}, found {settings.lora.target_modules!r}",
                "q_proj,v_proj are the attention's query and value projections of a Llama",
            ) from error
    manifest = Manifest.of(get_peft_model_state_dict(peft))
    state: dict[str, FlatArray] = {}
    for name, shape in manifest.shapes:
        tensor = torch.zeros(shape)
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(derive(seed, "lora-init", name))
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        state[name] = tensor.numpy()
    return pack(state), manifest


def _architecture(name: str) -> PretrainedConfig:
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(model_source(name)))
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from error


def _not_loadable(name: str, error: Any) -> AppError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return AppError(
        f"model.name: expected a model that can be loaded, found {name!r} ({reason})",
        "check the name, or use local/SmolLM2-135M-Instruct-Q4_1 where there is no hub",
    )
