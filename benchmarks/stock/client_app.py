"""Train as the template does: cut, tokenise, load the model, train, send it back."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import TrainingArguments  # noqa: F401 - the template imports it
from trl import SFTTrainer  # noqa: F401 - and this: every cold start pays for both

from app.cards.dataset import resolve
from app.cards.tokens import card_text, tokenize_texts
from app.config import RunConfig
from app.seeds import derive
from app.training import loop
from app.training.device import place
from app.training.model import attach_adapter, load_base, load_tokenizer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round at one institution."""
    config = RunConfig.parse(context.run_config)
    partition_id = int(context.node_config["partition-id"])
    server_round = int(str(message.content.config_records["config"]["server-round"]))
    num_partitions = int(context.node_config["num-partitions"])
    cards = resolve(config.dataset_name).partition(num_partitions, partition_id)
    tokenizer = load_tokenizer(config.model.name)
    texts = [card_text(*row) for row in zip(cards["input"], cards["output"], strict=True)]
    examples = tokenize_texts(texts, tokenizer, config.train.seq_length)
    model = attach_adapter(load_base(config.model, place(context.node_config)), config.model)
    received = message.content.array_records["arrays"].to_torch_state_dict()
    set_peft_model_state_dict(model, received)
    with torch.enable_grad():
        result = loop.train(
            model,
            examples,
            steps=config.train.max_steps,
            batch_size=config.train.batch_size,
            gradient_accumulation=config.train.gradient_accumulation_steps,
            learning_rate=config.train.learning_rate(server_round, config.num_rounds),
            order_seed=derive(config.train.seed, "order", partition_id, server_round),
            dropout_seed=derive(config.train.seed, "dropout", partition_id, server_round),
        )
    metrics = MetricRecord(
        {
            "train-loss": result.loss,
            "train-seconds": result.seconds,
            "num-examples": len(examples),
        }
    )
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
