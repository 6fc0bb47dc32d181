"""Local training: the loss and gradients of a padded batch, without its padding or its logits.

For one optimizer step a Hugging Face ``Trainer`` computes a mean over the labelled tokens of all
its batches. A sum may be computed in any order, so the same loss and the same gradient come from:

- sample packing instead of padding (``app.training.packing``);
- several micro-batches instead of one batch, so that peak memory follows ``micro_batch_tokens``;
- logits only where there is a label and a few rows at a time, so that peak memory does not follow
  the size of the vocabulary.

The same seeds give the same adapter, bit for bit, on the same kind of machine with the same number
of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from app.errors import AppError
from app.training.attention import (
    KeysAndValues,
    PackedSequences,
    SharedPrefix,
    packed_attention,
)
from app.training.device import PeakMemory, precision_for
from app.training.fused import fused
from app.training.packing import PackedBatch, PrefixGroup, pack

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from app.cards.tokens import Example

# What transformers.TrainingArguments 5.23 does unless told otherwise, and so the reference app.
MAX_GRAD_NORM = 1.0
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
WEIGHT_DECAY = 0.0

# Tokens of a micro-batch: more are a little quicker and take more memory. Measured for a CPU
# (`python -m benchmarks.training --micro-batch-tokens N`), estimated for a GPU.
MICRO_BATCH_TOKENS = {"cpu": 400, "cuda": 2048}

# Tokens that sharing a prefix has to save. The prefix's own forward pass has a fixed cost: a CPU
# reads every weight, a GPU launches every kernel. Estimates.
PREFIX_PASS_COST = {"cpu": 32, "cuda": 512}

# Rows of logits alive at once; a row of SmolLM2's vocabulary is 192 KiB.
LOGIT_ROWS = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True)
class TrainResult:
    """What one round of local training did.

    Attributes:
        loss: mean of ``step_losses``, as the ``train_loss`` of a Hugging Face Trainer.
        step_losses: before each optimizer step, the mean over its labelled tokens, in nats.
        examples: cards trained on, repeats counted.
        tokens: tokens of those cards, prompt and answer; there is no padding to count.
        seconds: wall-clock time of the steps.
        peak_memory_bytes: as ``app.training.device.PeakMemory`` measures it, during the steps.
    """

    loss: float
    step_losses: tuple[float, ...]
    examples: int
    tokens: int
    seconds: float
    peak_memory_bytes: int


def train(
    model: PeftModel,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    gradient_accumulation: int,
    learning_rate: float,
    order_seed: int,
    dropout_seed: int,
    micro_batch_tokens: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train the model's trainable parameters in place for ``steps`` optimizer steps.

    AdamW with a constant learning rate and fresh moments, as in every round of the reference app;
    gradients are clipped to a norm of 1.0.

    Args:
        model: a LoRA adapter on a causal language model, on the device it trains on.
        examples: this institution's cards.
        steps: optimizer steps.
        batch_size: cards a batch.
        gradient_accumulation: batches a step; the loss is the mean over the labelled tokens of
            all of them (transformers since 4.46; before, a mean of the batches' means).
        learning_rate: of every step.
        order_seed: decides which cards make up which step (``step_batches``).
        dropout_seed: decides every dropout mask.
        micro_batch_tokens: most tokens of a micro-batch, by default what suits the device. It
            changes speed and peak memory; of the result only the rounding and the dropout masks.
        on_step: called after each step with its number, from 1, and its loss.

    Raises:
        AppError: there is nothing to train on, or nothing to train; the loss is not finite; or the
            model computes logits or attention in a way that this loop does not reproduce.
    """
    if not examples:
        raise AppError(
            "expected cards to train on, found none in this node's partition",
            "check the node's data-path and partition-id",
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise AppError(
            "expected a model with an adapter to train, found every parameter frozen",
            "attach the adapter with app.training.model.attach_adapter",
        )
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=ADAM_BETAS,
        eps=ADAM_EPSILON,
        weight_decay=WEIGHT_DECAY,
    )
    orders = step_batches(len(examples), batch_size * gradient_accumulation, order_seed)
    losses: list[float] = []
    cards = tokens = 0
    peak = PeakMemory(device)
    started = time.monotonic()
    with _ready(model, training=True) as network, _seeded(dropout_seed, device):
        for step in range(1, steps + 1):
            batch = [examples[index] for index in next(orders)]
            loss = _backward(network, _packed(batch, micro_batch_tokens, device))
            norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            if not (math.isfinite(loss) and torch.isfinite(norm)):
                raise AppError(
                    f"expected a finite loss and gradient, found {loss} and {float(norm)} "
                    f"in step {step}",
                    "lower train.learning-rate-max, or check the adapter that the round began with",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            cards += len(batch)
            tokens += sum(len(example.input_ids) for example in batch)
            if on_step is not None:
                on_step(step, loss)
    return TrainResult(
        loss=sum(losses) / len(losses),
        step_losses=tuple(losses),
        examples=cards,
        tokens=tokens,
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak.bytes(),
    )


def holdout_loss(
    model: PeftModel, examples: Sequence[Example], *, micro_batch_tokens: int | None = None
) -> float:
    """Mean loss a labelled token, in nats, over all of ``examples``, without dropout.

    Raises:
        AppError: no example has a labelled token, or the model is one that ``train`` refuses.
    """
    device = next(model.parameters()).device
    groups = _packed(examples, micro_batch_tokens, device)
    labels = _count_labels(groups)
    total = 0.0
    with torch.no_grad(), _ready(model, training=False) as network:
        for group in groups:
            prefix = SharedPrefix(network, group.prefix).keys_and_values
            total += sum(_summed_loss(network, batch, prefix).item() for batch in group.batches)
    return total / labels


def step_batches(count: int, cards_per_step: int, seed: int) -> Iterator[list[int]]:
    """Yield the indices of each step's cards, without end.

    The order is that of a Hugging Face Trainer whose seed is ``seed`` (accelerate's
    ``SeedableRandomSampler``): epoch ``e`` is a permutation drawn from ``seed + e``, and its last
    step has the cards that are left.
    """
    generator = torch.Generator()
    epoch = 0
    while True:
        generator.manual_seed(seed + epoch)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, cards_per_step):
            yield order[start : start + cards_per_step]
        epoch += 1


@contextmanager
def _ready(model: PeftModel, *, training: bool) -> Iterator[PreTrainedModel]:
    """Set the network inside PEFT's wrapper to run on packed batches; restore it afterwards."""
    network = cast("PreTrainedModel", model.get_base_model())
    _check_head(network)
    mode = model.training
    device = next(model.parameters()).device
    precision = precision_for(device)
    mixed = torch.autocast(
        device.type,
        dtype=precision.dtype,
        enabled=precision.dtype != torch.float32,
        cache_enabled=False,  # it would hold the adapter as it was before the first step
    )
    model.train(training)
    try:
        with packed_attention(network), fused(network), mixed:
            yield network
    finally:
        model.train(mode)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check_head(network: PreTrainedModel) -> None:
    """Refuse logits that are more than a frozen linear map of the last hidden state."""
    head = network.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise AppError(
            "expected a frozen output layer, found one that is trained",
            "leave lm_head and embed_tokens out of model.lora.target-modules",
        )
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(network.config, name, None) not in (None, 1, 1.0):
            raise AppError(
                f"expected logits that are a plain linear map, found {name} in "
                f"{type(network).__name__}",
                "train a model whose head is the usual one (Llama, Mistral, Qwen2, ...)",
            )


def _packed(
    examples: Sequence[Example], micro_batch_tokens: int | None, device: torch.device
) -> list[PrefixGroup]:
    max_tokens = micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
    return pack(examples, max_tokens, PREFIX_PASS_COST[device.type], device)


def _backward(network: PreTrainedModel, groups: Sequence[PrefixGroup]) -> float:
    """Add the gradient of the groups' mean loss to the parameters; return that loss."""
    labels = _count_labels(groups)
    total = 0.0
    for group in groups:
        prefix = SharedPrefix(network, group.prefix)
        for batch in group.batches:
            loss = _summed_loss(network, batch, prefix.keys_and_values) / labels
            torch.autograd.backward(loss)
            total += loss.item()
        prefix.backward()
    return total


def _count_labels(groups: Sequence[PrefixGroup]) -> int:
    labels = sum(len(batch.labels) for group in groups for batch in group.batches)
    if not labels:
        raise AppError(
            "expected cards with an answer to learn from, found only answers that were cut off",
            "raise train.seq-length",
        )
    return labels


def _summed_loss(network: PreTrainedModel, batch: PackedBatch, prefix: KeysAndValues) -> Tensor:
    hidden = (
        network.get_decoder()(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            sequences=PackedSequences(batch.lengths, prefix),
        )
        .last_hidden_state[0]
        .index_select(0, batch.predictors)
    )
    head = network.get_output_embeddings()
    if torch.is_grad_enabled():
        loss: Tensor = _SummedCrossEntropy.apply(hidden, head, batch.labels)  # type: ignore[no-untyped-call]
        return loss
    rows = LOGIT_ROWS[hidden.device.type]
    chunks = zip(hidden.split(rows), batch.labels.split(rows), strict=True)
    losses = [_nll(_log_probabilities(head(part)), labels) for part, labels in chunks]
    return torch.stack(losses).sum()


def _log_probabilities(logits: Tensor) -> Tensor:
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return wide.log_softmax(1)


def _nll(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return nll_loss(log_probabilities, labels, reduction="sum").double()


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross entropy through a frozen head; logits and their gradient exist for one chunk only.

    The head is linear and last, so the gradient towards ``hidden`` is known as soon as the logits
    are. The forward pass computes it, the backward pass scales it, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        rows = LOGIT_ROWS[hidden.device.type]
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                part = hidden[chunk].detach().requires_grad_()
                logits = head(part)
            log_probabilities = _log_probabilities(logits.detach())
            total += _nll(log_probabilities, labels[chunk])
            # In place: a second chunk of this size fits in no cache and costs more than its sums.
            towards_logits = log_probabilities.exp_()
            rows_of_chunk = torch.arange(len(towards_logits), device=towards_logits.device)
            towards_logits[rows_of_chunk, labels[chunk]] -= 1
            (gradient[chunk],) = torch.autograd.grad(logits, part, towards_logits.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None
