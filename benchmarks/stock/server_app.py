"""Average as the template does: ``FedAvg.start``, with the clock read after every round."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from app.config import RunConfig
from app.training.device import place
from app.training.model import attach_adapter, load_base

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every round; note how long each took and how long its slowest client trained."""
    config = RunConfig.parse(context.run_config)
    log = Path(os.environ["MEDFED_BENCHMARK_LOG"])
    model = attach_adapter(load_base(config.model, place({})), config.model)
    trained: list[float] = []
    clock = [time.monotonic()]

    def slowest(replies: list[RecordDict], _weighted_by: str) -> MetricRecord:
        seconds = [float(str(reply["metrics"]["train-seconds"])) for reply in replies]
        losses = [float(str(reply["metrics"]["train-loss"])) for reply in replies]
        trained.append(max(seconds))
        return MetricRecord({"train-loss": sum(losses) / len(losses)})

    def after_round(server_round: int, _arrays: ArrayRecord) -> MetricRecord:
        now = time.monotonic()
        if server_round:
            line = {"round": server_round, "seconds": now - clock[0], "training": trained[-1]}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        clock[0] = now
        return MetricRecord()

    FedAvg(
        fraction_train=config.strategy.fraction_train,
        fraction_evaluate=0.0,
        min_available_nodes=20,
        train_metrics_aggr_fn=slowest,
    ).start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=config.num_rounds,
        evaluate_fn=after_round,
    )
