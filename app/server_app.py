"""medfed's ServerApp: the coordinator's side of a run, the same in deployment and simulation."""

from __future__ import annotations

from logging import INFO

from flwr.app import Array, ArrayRecord, Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from app import adapter
from app.checkpoint import save_checkpoint
from app.communication import Communication
from app.config import RunConfig
from app.errors import log_app_errors_on_one_line
from app.institutions import Institutions
from app.provenance import provenance
from app.quiet import quiet_libraries
from app.record import RunRecord
from app.rounds import SeededFedAvg, run_round

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every round: sample, send, wait, average, save."""
    log_app_errors_on_one_line()
    quiet_libraries()
    config = RunConfig.parse(context.run_config)
    record = RunRecord.create(context.run_id, config)
    log(INFO, "Run folder: %s", record.folder)
    try:
        _run(grid, config, record)
    except Exception as error:
        record.event("failed", reason=str(error))
        raise


def _run(grid: Grid, config: RunConfig, record: RunRecord) -> None:
    from app.holdout import Holdout  # torch: only once the config is known to be good
    from app.model import initial_adapter

    flat, manifest = initial_adapter(config.model, config.train.seed)
    record.provenance(provenance(config, manifest))
    holdout = Holdout.load(config)
    institutions = Institutions(grid)
    online = institutions.wait_for(
        config.strategy.sample_size,
        config.strategy.wait_for_nodes_s,
        lambda now, needed: record.event("waiting", online=now, needed=needed),
    )
    record.event(
        "online",
        institutions=sorted(online),
        federation=sorted(institutions.known()),
        engine="deployment" if institutions.registered else "simulation",
    )
    strategy = SeededFedAvg(
        institutions=institutions,
        seed=config.train.seed,
        sample_size=config.strategy.sample_size(len(institutions.known())),
        fraction_evaluate=0.0,
    )
    communication = Communication(record.folder / "comm_cost.txt")

    def measure(server_round: int) -> float | None:
        if holdout is None or not holdout.due(server_round):
            return None
        loss = holdout.loss(flat, manifest)
        record.event("holdout", round=server_round, loss=loss, examples=holdout.examples)
        log(INFO, "[ROUND %d] held-out loss %.4f on %d cards", server_round, loss, holdout.examples)
        return loss

    before = after = measure(0)
    for server_round in range(1, config.num_rounds + 1):
        arrays = ArrayRecord({"adapter": Array(flat)})
        result = run_round(grid, strategy, record, server_round, arrays, manifest, communication)
        flat = result.flat
        last = server_round == config.num_rounds
        if last or server_round % config.train.save_every_round == 0:
            folder = record.folder / f"peft_{server_round}"
            save_checkpoint(folder, flat, manifest, config.model)
            record.event("checkpoint", round=server_round, folder=str(folder))
            log(INFO, "[ROUND %d] checkpoint: %s", server_round, folder)
        after = measure(server_round)
    record.finish(
        rounds=config.num_rounds,
        adapter=f"peft_{config.num_rounds}",
        adapter_sha256=adapter.digest(flat),
        manifest_sha256=manifest.digest,
        bytes=communication.total,
        holdout_loss_before=before,
        holdout_loss_after=after,
    )
    record.event("finished", rounds=config.num_rounds)
