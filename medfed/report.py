"""One page about one run: what it was, how it went, what it cost. No network, no script."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from app.server.communication import MB
from common import files
from common.errors import MedfedError
from medfed.communication import of_run
from medfed.paths import Home
from medfed.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPLATE = "report.html.jinja"


class ReportError(MedfedError):
    """There is nothing to report."""


def write(home: Home, record: Record) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into the run's folder; the page's path.

    Raises:
        ReportError: the run has not finished a round.
    """
    if not record.rounds:
        raise ReportError(
            f"expected a finished round in {record.folder}, found none",
            "`medfed report` again once there is one",
        )
    folder = record.folder / "plots"
    pictures = {name: _draw(draw, record) for name, draw in PLOTS.items()}
    for name, picture in pictures.items():
        files.write(folder / f"{name}.png", picture)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template(_TEMPLATE).render(
        run=record,
        facts=facts(home, record),
        plots={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        participation=participation(record),
    )
    path = record.folder / "report.html"
    files.write(path, page.encode())
    return path


def facts(home: Home, record: Record) -> dict[str, Any]:
    """The run in a few numbers, each with its name as people read it."""
    cost = of_run(home, record)
    last = record.rounds[-1]
    measured = [one.holdout_loss for one in record.rounds if one.holdout_loss is not None]
    before = [e["loss"] for e in record.events if e["event"] == "holdout" and e["round"] == 0]
    held_out = f"{before[0]:.4f} → {measured[-1]:.4f}" if before and measured else "not measured"
    found = {
        "engine": record.engine,
        "rounds": f"{last.number} of {record.config['num-server-rounds']}",
        "ended well": "yes" if record.summary else "no",
        "training loss, last round": f"{last.train_loss:.4f}",
        "held-out loss": held_out,
        "seconds in rounds": f"{sum(one.seconds for one in record.rounds):.1f}",
        "communication": f"{cost['mb']:.2f} MB of {cost['budget_mb']:,} MB",
        "adapter SHA-256": last.adapter_sha256,
    }
    if cost["wire"] is not None:
        found["on the wire"] = f"{cost['wire']['bytes'] / MB:.2f} MB with TLS and HTTP"
    return found


def participation(record: Record) -> dict[str, int]:
    """Institution → rounds in which its adapter was summed, those that never took part included."""
    counts = Counter(reply.institution for one in record.rounds for reply in one.replies)
    online = [event["institutions"] for event in record.events if event["event"] == "online"]
    names = {*counts, *(online[0] if online else ())}
    return {name: counts[name] for name in sorted(names)}


def _draw(draw: Callable[[Axes, Record], None], record: Record) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    draw(axes, record)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    # Without the date and the version in it, the same run gives the same file.
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def _loss(axes: Axes, record: Record) -> None:
    numbers = [one.number for one in record.rounds]
    axes.plot(numbers, [one.train_loss for one in record.rounds], label="training")
    held = [(e["round"], e["loss"]) for e in record.events if e["event"] == "holdout"]
    if held:
        axes.plot(*zip(*held, strict=True), marker="o", markersize=3, label="held out")
    axes.set(xlabel="round", ylabel="loss (nats a token)")
    axes.legend(frameon=False)


def _communication(axes: Axes, record: Record) -> None:
    total, sums = 0, []
    for one in record.rounds:
        total += one.bytes
        sums.append(total / MB)
    axes.plot([one.number for one in record.rounds], sums)
    axes.set(xlabel="round", ylabel="MB of adapters, so far", ylim=(0, None))


def _round_time(axes: Axes, record: Record) -> None:
    numbers = [one.number for one in record.rounds]
    training = [_slowest(one.replies) for one in record.rounds]
    rest = [one.seconds - busy for one, busy in zip(record.rounds, training, strict=True)]
    axes.bar(numbers, training, label="slowest client's training")
    axes.bar(numbers, rest, bottom=training, label="everything else")
    axes.set(xlabel="round", ylabel="seconds")
    axes.legend(frameon=False)


def _slowest(replies: tuple[Any, ...]) -> float:
    return max((reply.metrics["train_seconds"] for reply in replies), default=0.0)


def _participation(axes: Axes, record: Record) -> None:
    names = list(participation(record))
    at = [(one.number, names.index(r.institution)) for one in record.rounds for r in one.replies]
    rounds, rows = zip(*at, strict=True)
    axes.scatter(rounds, rows, s=12, marker="s")
    axes.set(xlabel="round", ylabel="institution", ylim=(-0.5, len(names) - 0.5))


PLOTS = {
    "loss": _loss,
    "communication": _communication,
    "round-time": _round_time,
    "participation": _participation,
}
