"""``medfed evaluate`` and ``medfed score``: the leaderboard's measure and what is behind it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from evaluation.run import Progress

ALL_BENCHMARKS = "pubmedqa,medmcqa,medqa,careqa"


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help="Base model: hub name, local/NAME or a folder. Default: the adapter's."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT adapter folder. Without it: the base model alone.")
    ] = None,
    benchmarks: Annotated[str, typer.Option(help="Benchmarks, comma-separated.")] = ALL_BENCHMARKS,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with BENCHMARK*.jsonl in the sources' schemas. Default: the hub."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N questions of each benchmark.")
    ] = None,
    quantization: Annotated[
        int, typer.Option(help="Bits of the base model: 4 (the leaderboard's rule), 8, or 0: none.")
    ] = 4,
    output: Annotated[
        Path | None, typer.Option(help="Folder of results. Default: evaluations/ in MEDFED_HOME.")
    ] = None,
    run_name: Annotated[
        str | None, typer.Option(help="Goes into file names. Default: the adapter's folder's name.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Evaluate the base model beside the adapter.")
    ] = True,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take an adapter whose base has another name.")
    ] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Compute 4 bits by bitsandbytes' kernels, one by one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Evaluate a model, with or without an adapter, on the leaderboard's medical benchmarks.

    An evaluation that was cut off goes on where it stopped when it is started again.
    """
    from common.errors import EvaluationError
    from evaluation.catalogue import tasks
    from evaluation.sources import find_file
    from medfed.paths import Home

    chosen = tuple(tasks(benchmarks))
    if data is not None:
        for task in chosen:
            find_file(task, data)
    if model is None and adapter is None:
        raise EvaluationError(
            "expected a model to evaluate, found neither --model nor --adapter",
            "e.g. medfed evaluate --adapter runs/RUN/peft_200",
        )
    from app.quiet import quiet_libraries

    quiet_libraries()
    # Everything from here on needs torch, which takes seconds to import.
    from evaluation.model import adapter_base
    from evaluation.run import Plan
    from evaluation.run import evaluate as run

    adapters_model = "" if adapter is None else adapter_base(adapter)
    name = model or adapters_model
    if not name:
        raise EvaluationError(
            f"expected the adapter's base model in {adapter}, found none", "name it with --model"
        )
    plan = Plan(
        model=str(Path(name).resolve()) if Path(name).is_dir() else name,
        adapter=adapter,
        tasks=chosen,
        data=data,
        limit=limit,
        quantization=quantization,
        output=output or Home.from_environment().root / "evaluations",
        run_name=run_name or (adapter.resolve().name if adapter else Path(name).name),
        with_base=base,
        any_base=any_base,
        packed=packed,
    )
    with _progress() as on_progress:
        report = run(plan, on_progress)
    if as_json:
        print(json.dumps(report))
    else:
        _print_table(report, plan.output)


def score(
    benchmark: Annotated[str, typer.Option(help=f"One of {ALL_BENCHMARKS}.")],
    generations: Annotated[Path, typer.Option(help="JSON array or lines of prompt, gold, output.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the score as JSON.")] = False,
) -> None:
    """Score a generation file as the leaderboard does."""
    from evaluation.catalogue import task
    from evaluation.scorer import read_generations
    from evaluation.scorer import score as score_generations

    chosen = task(benchmark)
    result = score_generations(chosen, read_generations(generations, chosen))
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    low, high = result.interval
    print(
        f"{chosen.title}: {100 * result.accuracy:.2f} % of {result.n} "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f})"
    )
    print(f"valid answers: {100 * result.valid:.2f} %")
    print(
        f"always answering {result.trivial_answer!r}: {100 * result.trivial_accuracy:.2f} %"
        f" ({100 * (result.accuracy - result.trivial_accuracy):+.2f} points)"
    )


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A progress bar per benchmark and model, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(file=sys.stderr)) as bars:
        shown: dict[str, Any] = {}

        def on_progress(at: Progress) -> None:
            if at.what not in shown:
                shown[at.what] = bars.add_task(at.what, total=at.total)
            bars.update(shown[at.what], completed=at.done)

        yield on_progress


def _print_table(report: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(value: float) -> str:
        return f"{100 * value:.2f}"

    def interval(figures: dict[str, Any]) -> str:
        low, high = figures["interval_95"]
        return f"{percent(figures['accuracy'])} ({percent(low)} to {percent(high)})"

    table = Table(title=f"{report['model']}, {report['quantization'] or 'no'} bits")
    for heading in ("benchmark", "n", "accuracy %", "valid %", "among options %", "always ..."):
        table.add_column(heading)
    if "base_average" in report:
        table.add_column("base %")
        table.add_column("p (paired)")
    for entry in report["benchmarks"]:
        trivial = entry["trivial_baseline"]
        cells = [
            entry["benchmark"],
            str(entry["n"]),
            interval(entry),
            percent(entry["valid_rate"]),
            interval(entry["among_options"]),
            f"{trivial['answer']!r}: {percent(trivial['accuracy'])}",
        ]
        if "base" in entry:
            p_value = entry["against_base"]["leaderboard"]["p_value"]
            cells += [interval(entry["base"]), f"{p_value:.2g}"]
        table.add_row(*cells)
    average = report["average"]
    last = [
        "average",
        "",
        interval(average),
        "",
        percent(average["among_options"]),
        percent(average["trivial_accuracy"]),
    ]
    if "base_average" in report:
        last += [interval(report["base_average"]), ""]
    table.add_row(*last, end_section=True)
    Console().print(table)
    print(f"generations, accuracies and report_{report['run_name']}.json are in {output}")
