"""The model under evaluation: base model, the leaderboard's quantization, and the adapter."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from app.training.model import model_source
from common.errors import EvaluationError
from common.files import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# The leaderboard asks for 4; 0 leaves the weights as they are.
QUANTIZATIONS = (0, 4, 8)


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: the base model's own.
        identity: digest (hex) of everything its answers depend on; part of every journal's key.
        quantization: 0, 4 or 8 bits.
        packed: whether the weights stay quantized and bitsandbytes' own kernels compute on them
            (nothing to do with sample packing).
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    identity: str
    quantization: int
    packed: bool = False


def load_subject(name: str, quantization: int, *, unpack: bool = True) -> Subject:
    """Load a base model and its tokenizer.

    Args:
        name: a hub name, ``local/NAME`` or an absolute path.
        quantization: 4 and 8 are bitsandbytes with its defaults, as on the leaderboard (4 bits:
            FP4 weights, float32 arithmetic); 0 is float32.
        unpack: dequantize 4-bit weights to float32 once, if memory allows. That gives the
            leaderboard's arithmetic (a GPU dequantizes them at every forward pass); bitsandbytes'
            own kernel for newer CPUs computes in bfloat16 instead.

    Raises:
        EvaluationError: no such model, an unsupported quantization, or no device for it.
    """
    if quantization not in QUANTIZATIONS:
        raise EvaluationError(
            f"expected a quantization of 0, 4 or 8 bits, found {quantization}",
            "the leaderboard evaluates with 4",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    config = {
        0: None,
        4: BitsAndBytesConfig(load_in_4bit=True),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }[quantization]
    # With 8 bits the leaderboard computes in float16, which a CPU has no units for.
    if quantization == 8 and device.type == "cuda":
        dtype = torch.float16
    source = model_source(name)
    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, quantization_config=config, device_map={"": device}
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise EvaluationError(
            f"expected a model that can be loaded, found {name!r} ({_first_line(error)})",
            "check the name, or use local/SmolLM2-135M-Instruct-Q4_1 where there is no hub",
        ) from error
    packed = quantization != 0
    if quantization == 4 and unpack and _fits_in_float32(model, device):
        model = _dequantized(model)
        packed = False
    # torch would multiply the last positions of a batch, a strided view, row by row.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: inputs[0].contiguous()
    )
    model.requires_grad_(False)
    identity = _digest("base", _base_identity(source, model), f"{quantization} {packed}")
    return Subject(model.eval(), tokenizer, identity, quantization, packed)


def adapter_base(adapter: Path) -> str:
    """The name of the base model that an adapter was trained on.

    Raises:
        EvaluationError: ``adapter`` is not a PEFT adapter's folder.
    """
    config = adapter / ADAPTER_CONFIG
    hint = "give the folder of a checkpoint: adapter_config.json and adapter_model.safetensors"
    for file in (config, adapter / ADAPTER_WEIGHTS):
        if not file.is_file() or not file.stat().st_size:
            state = "an empty file" if file.is_file() else "no such file"
            raise EvaluationError(f"expected an adapter, found {state} {file}", hint)
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise EvaluationError(f"expected JSON in {config}, found {error}", hint) from error
    return str(base or "")


def with_adapter(
    subject: Subject, adapter: Path, model_name: str, *, any_base: bool = False
) -> Subject:
    """Put a PEFT adapter on a base model, in place: ``subject`` is of no further use afterwards.

    Args:
        subject: a base model from ``load_subject``.
        adapter: a PEFT adapter's folder.
        model_name: name of the base model; its last part must be that of the adapter's base.
        any_base: skip that comparison, for the same base model under another name.

    Raises:
        EvaluationError: no adapter, or an adapter of another model (by name, module or shape).
    """
    base = adapter_base(adapter)
    if not any_base and Path(base).name != Path(model_name).name:
        raise EvaluationError(
            f"expected an adapter of {model_name}, found one of {base or 'an unnamed model'}",
            f"evaluate it with --model {base}, or say --any-base if it is the same model"
            if base
            else "say --any-base if it is of this model",
        )
    weights = adapter / ADAPTER_WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        model = PeftModel.from_pretrained(subject.model, str(adapter))
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise EvaluationError(
            f"expected an adapter that fits {model_name}, found {adapter} ({_first_line(error)})",
            "evaluate it with the model that it was trained on",
        ) from error
    wanted = {key: tuple(t.shape) for key, t in get_peft_model_state_dict(model).items()}
    if wanted != shapes:
        odd = sorted(wanted.items() ^ shapes.items())[0][0]
        raise EvaluationError(
            f"expected an adapter that fits {model_name}, found another layout in {adapter} "
            f"(first at {odd})",
            "evaluate it with the model that it was trained on",
        )
    model.requires_grad_(False)
    identity = _digest(subject.identity, sha256(weights), sha256(adapter / ADAPTER_CONFIG))
    return replace(subject, model=model.eval(), identity=identity)


def _dequantized(model: Any) -> Any:
    """The model with every 4-bit weight dequantized to float32."""
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warning only repeats what was asked for
    try:
        return model.dequantize(dtype=torch.float32)
    finally:
        logger.setLevel(level)


def _fits_in_float32(model: Any, device: torch.device) -> bool:
    """Whether the dequantized weights take at most half of the free memory."""
    needed = 4 * model.num_parameters()
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    return bool(needed <= free / 2)


def _base_identity(source: str, model: Any) -> str:
    folder = Path(source)
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".bin", ".json"})
        return _digest(*(f"{p.name} {sha256(p)}" for p in files))
    # On the hub a commit's id is a digest of all files.
    return f"{source}@{getattr(model.config, '_commit_hash', None)}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
