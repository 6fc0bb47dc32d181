"""medfed's ServerApp: the coordinator's side of a run, the same in deployment and simulation."""

from __future__ import annotations

import contextlib
import time
from itertools import islice
from logging import INFO, WARNING

from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from app.adapter import layout
from app.adapter.checkpoint import save_checkpoint
from app.adapter.layout import Manifest
from app.config import RunConfig
from app.errors import AppError, log_app_errors_on_one_line
from app.quiet import quiet_libraries
from app.server.cohort import RunContext
from app.server.communication import Communication
from app.server.institutions import Institutions
from app.server.ledger import Ledger, Saved
from app.server.polling import Mailbox, waits
from app.server.provenance import provenance
from app.server.reply_checks import ReplyChecks
from app.server.rounds import Rounds
from app.server.run_record import RunRecord
from app.server.strategies import strategy as strategy_of

app = ServerApp()

_LONGEST_BACK_OFF_S = 60.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every round: sample, send, wait, check, average, save."""
    log_app_errors_on_one_line()
    quiet_libraries()
    config = RunConfig.parse(context.run_config)
    record = RunRecord.open(context.run_id, config)
    log(INFO, "Run folder: %s", record.folder)
    if record.finished:
        log(INFO, "This run has ended already")
        return
    try:
        _run(context.run_id, grid, config, record)
    except Exception as error:
        with contextlib.suppress(AppError):  # a disk that is full takes no event either
            record.event("failed", reason=str(error))
        raise


def _run(run_id: int, grid: Grid, config: RunConfig, record: RunRecord) -> None:
    from app.server.holdout import Holdout  # torch: only once the config is known to be good
    from app.training.model import initial_adapter

    flat, manifest = initial_adapter(config.model, config.train.seed)
    ledger = Ledger(record.folder / "ledger", manifest)
    saved = ledger.last() or Saved(round=0, flat=flat)
    _go_on(run_id, config, record, ledger, saved, manifest)
    flat = saved.flat
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
    strategy = strategy_of(config.strategy, institutions, config.train.seed)
    strategy.restore(saved.strategy)
    communication = Communication(record.folder / "comm_cost.txt", saved.bytes, saved.lines)
    checks = ReplyChecks(config.replies, config.train, manifest, saved.norms)
    run = RunContext(
        run_id, strategy, checks, config.rounds, manifest, ledger, record, Mailbox(grid)
    )
    run.recall(saved.bad_replies)
    rounds = Rounds(run, communication)

    def measure(server_round: int) -> float | None:
        if holdout is None or not holdout.due(server_round):
            return None
        loss = holdout.loss(flat, manifest)
        record.event("holdout", round=server_round, loss=loss, examples=holdout.examples)
        log(INFO, "[ROUND %d] held-out loss %.4f on %d cards", server_round, loss, holdout.examples)
        return loss

    before, after = saved.holdout_before, saved.holdout_after
    if saved.round == 0:
        before = after = measure(0)
    for server_round in range(saved.round + 1, config.num_rounds + 1):
        result = rounds.run(server_round, flat)
        flat = result.flat
        last = server_round == config.num_rounds
        if last or server_round % config.train.save_every_round == 0:
            folder = record.folder / f"peft_{server_round}"
            save_checkpoint(folder, flat, manifest, config.model)
            record.event("checkpoint", round=server_round, folder=str(folder))
            log(INFO, "[ROUND %d] checkpoint: %s", server_round, folder)
        after = measure(server_round)
        ledger.commit(
            Saved(
                round=server_round,
                flat=flat,
                strategy=strategy.state(),
                bytes=communication.total,
                lines=communication.lines,
                norms=tuple(checks.norms),
                bad_replies=run.bad_replies,
                holdout_before=before,
                holdout_after=after,
                train_loss=result.train_loss,
            )
        )
    record.finish(
        rounds=config.num_rounds,
        adapter=f"peft_{config.num_rounds}",
        adapter_sha256=layout.digest(flat),
        manifest_sha256=manifest.digest,
        bytes=communication.total,
        holdout_loss_before=before,
        holdout_loss_after=after,
    )
    record.event("finished", rounds=config.num_rounds)


def _go_on(
    run_id: int,
    config: RunConfig,
    record: RunRecord,
    ledger: Ledger,
    saved: Saved,
    manifest: Manifest,
) -> None:
    """Note where this run comes from, or that it goes on after its ServerApp was lost.

    Raises:
        AppError: it was lost too often without finishing a round.
    """
    origin = provenance(config, manifest)
    earlier = record.origin()
    if earlier is None:
        record.provenance(origin)
    elif earlier["app_sha256"] != origin["app_sha256"]:
        log(WARNING, "The app is not the one that this run began with: its result has two sources")
        record.event("app-changed", app_sha256=origin["app_sha256"])
    restarts = ledger.started(run_id) - 1
    if restarts > config.rounds.max_restarts:
        raise AppError(
            f"expected a finished round after {config.rounds.max_restarts} restarts, found that "
            f"the ServerApp died again in round {saved.round + 1}",
            "its log and the machine's (out of memory?) say why; then medfed run --resume",
        )
    if record.reopened:
        log(INFO, "Going on after round %d (restart %d)", saved.round, restarts)
        record.event("resumed", after_round=saved.round, restarts=restarts)
    if restarts > 1:
        time.sleep(next(islice(waits(2.0, _LONGEST_BACK_OFF_S), restarts - 2, None)))
