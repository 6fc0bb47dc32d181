"""Local training, ours against the stock pipeline: ``python -m benchmarks.training --json``.

Both train the same cards, in the same order, from the same adapter. Each runs in a process of its
own, so that its peak memory is its own. Stock is what the reference app runs: a transformers
Trainer with padding to the longest card of the batch, logits for every position, and gradient
checkpointing. Dropout is off unless asked for: sample packing draws other dropout masks than
padding, and the losses could not be compared.

Progress goes to stderr, the result to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from app.cards.tokens import Example

EQUAL = 1e-5  # nats; two roundings of the same mathematics may differ by this much
WANTED_SPEED, WANTED_MEMORY = 2.8, 0.35

# hidden, intermediate, layers, heads, key-value heads: SmolLM2's published configurations.
ARCHITECTURES = {"135M": (576, 1536, 30, 9, 3), "360M": (960, 2560, 32, 15, 5)}
VOCABULARY = 49_152

# GB a client at batch 16, seq 512, 4-bit, as the reference published it: a range over its models.
REFERENCE_VRAM_GB = (7.40, 8.09)
REFERENCE_MODELS = {
    "SmolLM2-135M": "135M",
    "SmolLM2-135M-Instruct": "135M",
    "SmolLM2-360M": "360M",
    "SmolLM2-360M-Instruct": "360M",
}

EVENT = "benchmark: "  # prefix of each line that a measuring process prints for its parent

stderr = Console(stderr=True)


@dataclass(frozen=True)
class Job:
    """One pipeline to measure.

    Attributes:
        pipeline: ``ours``, ``stock``, or ``trl`` (the installed TRL's SFTTrainer: padded batches,
            logits in chunks).
        model: a folder with weights; or ``135M`` or ``360M``: that architecture, random weights.
        tokenizer: a folder with a tokenizer.
        cards: a JSON Lines file with instruction, input and output.
        limit: cards to read.
        steps: optimizer steps; the first is not timed.
        batch_size: cards a step.
        seq_length: most tokens a card.
        full_length: repeat each card's tokens up to ``seq_length``: the largest possible batch.
        quantization: 4, 8 or 0.
        dropout: of the adapter.
        checkpointing: gradient checkpointing: activations are recomputed in the backward pass.
        seed: of card order and dropout.
        micro_batch_tokens: ours only; None: the device's default.
    """

    pipeline: str
    model: str
    tokenizer: str
    cards: str
    limit: int
    steps: int
    batch_size: int
    seq_length: int
    full_length: bool
    quantization: int
    dropout: float
    checkpointing: bool
    seed: int
    micro_batch_tokens: int | None = None


Report = Callable[[int, float], None]


def read_examples(job: Job) -> list[Example]:
    """The job's cards, tokenized in the template of the reference."""
    from transformers import AutoTokenizer

    from app.cards.tokens import Example, card_text, tokenize_texts

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(job.tokenizer)
    with Path(job.cards).open() as lines:
        rows = [json.loads(line) for _, line in zip(range(job.limit), lines, strict=False)]
    texts = [card_text(row["input"], row["output"], row["instruction"]) for row in rows]
    examples = tokenize_texts(texts, tokenizer, job.seq_length)
    if not job.full_length:
        return examples
    return [
        Example((ids * (job.seq_length // len(ids) + 1))[: job.seq_length], prompt)
        for ids, prompt in examples
    ]


def load_model(job: Job) -> PeftModel:
    """The base model with a fresh adapter, the same one for every pipeline."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from app.training.device import place

    placement = place({})
    quantization = {
        0: None,
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=placement.dtype),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }[job.quantization]
    with tempfile.TemporaryDirectory() as folder:
        source = job.model
        if source in ARCHITECTURES:
            source = folder
            _save_random_model(job.model, Path(folder), placement.dtype)
        base = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=placement.dtype,
            device_map={"": placement.device},
            quantization_config=quantization,
        )
    base.config.use_cache = False
    non_reentrant = {"use_reentrant": False}
    if job.quantization:
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=job.checkpointing,
            gradient_checkpointing_kwargs=non_reentrant,
        )
    elif job.checkpointing:
        base.gradient_checkpointing_enable(non_reentrant)
    torch.manual_seed(job.seed)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=job.dropout,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def _save_random_model(name: str, folder: Path, dtype: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads = ARCHITECTURES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def train_ours(job: Job, model: PeftModel, examples: list[Example], report: Report) -> None:
    """Our pipeline, as the ClientApp calls it."""
    from app.training.loop import train

    train(
        model,
        examples,
        steps=job.steps,
        batch_size=job.batch_size,
        gradient_accumulation=1,
        learning_rate=2e-4,
        order_seed=job.seed,
        dropout_seed=job.seed,
        micro_batch_tokens=job.micro_batch_tokens,
        on_step=report,
    )


def _arguments(job: Job, device: str) -> dict[str, Any]:
    return {
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch_size,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "seed": job.seed,
        "gradient_checkpointing": job.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
    }


def _reporter(report: Report) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                report(state.global_step, kwargs["logs"]["loss"])

    return Reporter()


def train_stock(job: Job, model: PeftModel, examples: list[Example], report: Report) -> None:
    """The reference's pipeline: Trainer, with the labels of TRL's DataCollatorForCompletionOnlyLM.

    TRL 0.20 removed that collator; ``app.cards.tokens`` gives the same labels.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    end_of_text = model.config.eos_token_id

    def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row.input_ids) for row in rows]
        labels = [one.clone() for one in ids]
        for row, one in zip(rows, labels, strict=True):
            one[: row.prompt_length] = -100
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=end_of_text),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            train_dataset=examples,
            data_collator=collate,
            callbacks=[_reporter(report)],
            args=TrainingArguments(
                output_dir=folder,
                remove_unused_columns=False,
                **_arguments(job, model.device.type),
            ),
        ).train()


def train_trl(job: Job, model: PeftModel, examples: list[Example], report: Report) -> None:
    """The installed TRL's SFTTrainer, loss on completions only."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = {
        "input_ids": [list(ids) for ids, _ in examples],
        "completion_mask": [[0] * prompt + [1] * (len(ids) - prompt) for ids, prompt in examples],
    }
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=model,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            callbacks=[_reporter(report)],
            args=SFTConfig(
                output_dir=folder,
                completion_only_loss=True,
                max_length=job.seq_length,
                bf16=False,
                **_arguments(job, model.device.type),
            ),
        ).train()


PIPELINES = {"ours": train_ours, "stock": train_stock, "trl": train_trl}


def measure(job: Job, report: Report) -> dict[str, Any]:
    """Run a job in this process and return its figures.

    Examples and tokens per second leave out the first step, in which every pipeline allocates its
    memory. Tokens are those of the cards; padding is not counted.
    """
    from app.training.device import PeakMemory
    from app.training.loop import step_batches

    examples = read_examples(job)
    model = load_model(job)
    losses: list[float] = []
    ends: list[float] = []

    def on_step(step: int, loss: float) -> None:
        ends.append(time.monotonic())
        losses.append(loss)
        report(step, loss)

    peak = PeakMemory(model.device)
    started, busy = time.monotonic(), time.process_time()
    PIPELINES[job.pipeline](job, model, examples, on_step)
    seconds = [end - before for before, end in zip([started, *ends], ends, strict=False)]
    order = step_batches(len(examples), job.batch_size, job.seed)
    batches = [next(order) for _ in range(job.steps)]
    timed = slice(1, None) if job.steps > 1 else slice(None)
    duration = sum(seconds[timed])
    tokens = sum(len(examples[index].input_ids) for batch in batches[timed] for index in batch)
    return {
        "pipeline": job.pipeline,
        "examples_per_s": sum(map(len, batches[timed])) / duration,
        "tokens_per_s": tokens / duration,
        "peak_memory_bytes": peak.bytes(),
        "loss_per_step": losses,
        "seconds_per_step": seconds,
        "cpu_seconds": time.process_time() - busy,
        "gradient_checkpointing": job.checkpointing,
        "dropout": job.dropout,
    }


def compare(stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Compare two measurements of the same cards."""
    pairs = zip(stock["loss_per_step"], ours["loss_per_step"], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    return {
        "speed_ratio": ours["examples_per_s"] / stock["examples_per_s"],
        "memory_ratio": ours["peak_memory_bytes"] / stock["peak_memory_bytes"],
        "loss_difference": difference,
        "equal_loss": difference <= EQUAL,
        "stock": stock,
        "ours": ours,
    }


def machine() -> dict[str, Any]:
    """The machine and the versions of the measurement."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def measure_apart(job: Job, title: str) -> dict[str, Any]:
    """Run a job in a process of its own; show its progress on stderr."""
    command = [sys.executable, "-m", "benchmarks.training", "--job"]
    command.append(json.dumps(dataclasses.asdict(job)))
    with (
        Progress(console=stderr, transient=True) as progress,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        task = progress.add_task(title, total=job.steps)
        result: dict[str, Any] | None = None
        for event in _events(process):
            if "step" in event:
                progress.update(task, completed=event["step"])
            else:
                result = event
        if process.wait() or result is None:
            errors.seek(0)
            raise SystemExit(f"error: {title} failed\n{errors.read()[-2000:]}")
    stderr.print(
        f"{title}: {result['examples_per_s']:.2f} examples/s, "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB, loss {result['loss_per_step'][0]:.6f}"
    )
    return result


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    for line in process.stdout:
        if line.startswith(EVENT):  # libraries print too
            yield json.loads(line.removeprefix(EVENT))


def _work(text: str) -> None:
    def emit(event: dict[str, Any]) -> None:
        print(f"{EVENT}{json.dumps(event)}", flush=True)

    job = Job(**json.loads(text))
    emit(measure(job, lambda step, loss: emit({"step": step, "loss": loss})))


def side_by_side(stock: Job, name: str, *, trl: bool) -> dict[str, Any]:
    """Measure one model: stock, ours without and with dropout and checkpointing, TRL if asked."""
    ours = dataclasses.replace(stock, pipeline="ours", checkpointing=False)
    found = compare(measure_apart(stock, f"{name}, stock"), measure_apart(ours, f"{name}, ours"))
    if not stock.dropout:
        dropped = dataclasses.replace(ours, dropout=0.075)
        found["ours_with_dropout"] = measure_apart(dropped, f"{name}, ours, dropout 0.075")
    recomputed = dataclasses.replace(ours, checkpointing=True)
    found["ours_with_checkpointing"] = measure_apart(recomputed, f"{name}, ours, checkpointing")
    if trl:
        other = dataclasses.replace(stock, pipeline="trl")
        found["trl"] = measure_apart(other, f"{name}, TRL {version('trl')}")
    return found


def gpu_memory(stock: Job) -> list[dict[str, Any]]:
    """Peak GPU memory of one client at 4 bit with 16 cards of full length, and the reference's."""
    worst = dataclasses.replace(
        stock, full_length=True, quantization=4, dropout=0.075, seq_length=512, batch_size=16
    )
    sizes: dict[str, dict[str, Any]] = {}
    for size in ARCHITECTURES:
        job = dataclasses.replace(worst, model=size)
        ours = dataclasses.replace(job, pipeline="ours", checkpointing=False)
        sizes[size] = {
            "stock": measure_apart(job, f"{size}, 4 bit, full cards, stock"),
            "ours": measure_apart(ours, f"{size}, 4 bit, full cards, ours"),
        }
    return [
        {"model": model, "reference_gb": REFERENCE_VRAM_GB, **sizes[size]}
        for model, size in REFERENCE_MODELS.items()
    ]


def show(result: dict[str, Any]) -> None:
    """Print the figures as tables."""
    console = Console()
    table = Table(title=f"Local training on {result['machine']['device']}")
    for heading in ("model", "pipeline", "examples/s", "tokens/s", "peak GB", "first loss"):
        table.add_column(heading)
    for model in ("135M", "360M"):
        for key in ("stock", "trl", "ours", "ours_with_dropout", "ours_with_checkpointing"):
            if found := result.get(model, {}).get(key):
                table.add_row(
                    model,
                    key.replace("_", " "),
                    f"{found['examples_per_s']:.2f}",
                    f"{found['tokens_per_s']:.0f}",
                    f"{found['peak_memory_bytes'] / 1e9:.2f}",
                    f"{found['loss_per_step'][0]:.6f}",
                )
    console.print(table)
    console.print(
        f"135M: {result['speed_ratio']:.2f} times the examples/s (wanted {WANTED_SPEED}), "
        f"{result['memory_ratio']:.2f} of the memory (wanted {WANTED_MEMORY}), "
        f"losses apart by {result['135M']['loss_difference']:.1e}"
    )
    if rows := result.get("gpu_memory"):
        vram = Table(title="GPU memory of one client: 4 bit, 16 cards of 512 tokens")
        for heading in ("model", "reference GB", "stock here GB", "ours GB"):
            vram.add_column(heading)
        for row in rows:
            vram.add_row(
                row["model"],
                "{:.2f}-{:.2f}".format(*row["reference_gb"]),
                f"{row['stock']['peak_memory_bytes'] / 1e9:.2f}",
                f"{row['ours']['peak_memory_bytes'] / 1e9:.2f}",
            )
        console.print(vram)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    home = Path(os.environ.get("MEDFED_HOME", Path.home() / ".medfed"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--model",
        type=Path,
        default=home / "models" / "SmolLM2-135M-Instruct-Q4_1",
        help="folder with the 135M model's weights and tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--cards",
        type=Path,
        default=home / "datasets" / "hpo-flashcards" / "train.jsonl",
        help="JSON Lines with instruction, input, output (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=4, help="of which the first is not timed")
    parser.add_argument("--limit", type=int, default=256, help="cards to read")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dropout", type=float, default=0.0, help="in both pipelines")
    parser.add_argument("--quantization", type=int, choices=(0, 4, 8), default=0)
    parser.add_argument("--micro-batch-tokens", type=int, help="ours only")
    parser.add_argument(
        "--threads", type=int, default=1, help="of each pipeline; a client has one (train.threads)"
    )
    parser.add_argument("--only-135m", action="store_true", help="leave out the 360M architecture")
    parser.add_argument("--trl", action="store_true", help="measure today's SFTTrainer as well")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; if weights or cards are missing, name the command that fetches them."""
    options = _options(arguments)
    if options.job:
        _work(options.job)
        return
    for path in (options.model / "config.json", options.cards):
        if not path.is_file():
            raise SystemExit(f"error: expected {path}, found nothing\nhint: run medfed prepare")
    # The process of each pipeline inherits the number, and torch reads it in this one too.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    stock = Job(
        pipeline="stock",
        model=str(options.model),
        tokenizer=str(options.model),
        cards=str(options.cards),
        limit=options.limit,
        steps=options.steps,
        batch_size=options.batch_size,
        seq_length=512,
        full_length=False,
        quantization=options.quantization,
        dropout=options.dropout,
        checkpointing=True,
        seed=options.seed,
        micro_batch_tokens=options.micro_batch_tokens,
    )
    found: dict[str, Any] = {"135M": side_by_side(stock, "135M", trl=options.trl)}
    if not options.only_135m:
        larger = dataclasses.replace(stock, model="360M")
        found["360M"] = side_by_side(larger, "360M", trl=options.trl)
    about = machine()
    if about["device"] != _cpu_name():
        found["gpu_memory"] = gpu_memory(stock)
    summary = ("speed_ratio", "memory_ratio", "loss_difference", "stock", "ours")
    result = {key: found["135M"][key] for key in summary} | found | {"machine": about}
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
