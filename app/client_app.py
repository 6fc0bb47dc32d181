"""medfed's ClientApp: what an institution does with the global adapter and its own cards."""

from __future__ import annotations

import time
from logging import INFO

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common import log

from app.adapter import layout
from app.config import RunConfig
from app.errors import log_app_errors_on_one_line
from app.quiet import quiet_libraries
from app.seeds import derive

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node holds: a simulated node has no name to be known by."""
    identity = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
    return Message(RecordDict({"identity": identity}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on this institution's partition and send it back."""
    log_app_errors_on_one_line()
    quiet_libraries()
    started = time.monotonic()
    config = RunConfig.parse(context.run_config)

    from app.cards import rows, tokens  # torch and the rest: only when there is work
    from app.cards.exam_formats import with_answer_formats
    from app.cards.partitions import cards_of_node
    from app.training import loop
    from app.training.device import place
    from app.training.model import adapted_model, flat_adapter, load_adapter, load_tokenizer

    partition_id = int(context.node_config["partition-id"])
    round_config = message.content.config_records["config"]
    server_round = int(str(round_config["server-round"]))
    partition = cards_of_node(context.node_config, config.dataset_name)
    partition = with_answer_formats(
        partition,
        seed=derive(config.train.seed, "formats", partition_id),
        share=config.train.answer_formats,
    )
    tokenizer = load_tokenizer(config.model.name)
    examples = tokens.tokenize(partition, tokenizer, config.train.seq_length)

    placement = place(context.node_config, config.train.threads)
    log(INFO, "%s", placement)
    manifest = layout.Manifest.from_json(str(round_config["manifest"]))
    received = message.content.array_records["arrays"]["adapter"].numpy()
    # The reference trains on the same cards in every round; a fresh order is a setting.
    order_round = server_round if config.train.dynamic_data_seed else 0
    with placement.enforced():
        model = adapted_model(config.model, placement)
        load_adapter(model, received, manifest)
        result = loop.train(
            model,
            examples,
            steps=config.train.max_steps,
            batch_size=config.train.batch_size,
            gradient_accumulation=config.train.gradient_accumulation_steps,
            learning_rate=config.train.learning_rate(server_round, config.num_rounds),
            order_seed=derive(config.train.seed, "order", partition_id, order_round),
            dropout_seed=derive(config.train.seed, "dropout", partition_id, server_round),
        )

    flat = flat_adapter(model)
    metrics = MetricRecord(
        {
            "num-examples": len(examples),
            "partition-fingerprint": rows.fingerprint(partition),
            "train-loss": result.loss,
            "train-seconds": result.seconds,
            "total-seconds": time.monotonic() - started,
            "peak-memory-bytes": result.peak_memory_bytes,
            "slice-memory-bytes": placement.memory_bytes or 0,
            "threads": placement.threads,
        }
    )
    log(INFO, "loss %.4f, adapter %s", result.loss, layout.digest(flat)[:12])
    arrays = ArrayRecord({"adapter": Array(np.ascontiguousarray(flat))})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
