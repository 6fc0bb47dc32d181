"""``medfed``: the operator's command line.

Start-up imports nothing heavy: every verb imports what it needs when it is called.
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Annotated

import click
import typer

from common.errors import tell
from medfed.commands import (
    certs,
    communication,
    compose,
    connect,
    data,
    demo,
    doctor,
    evaluate,
    federation,
    parity,
    prepare,
    report,
    run,
    site,
    submit,
    tunnel,
    upgrade,
)

app = typer.Typer(
    name="medfed",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(certs.app, name="certs")
app.add_typer(compose.app, name="compose")
app.add_typer(data.app, name="data")
app.add_typer(site.app, name="site")
app.add_typer(upgrade.app, name="upgrade")
app.command("prepare")(prepare.prepare)
app.command("up")(federation.up)
app.command("status")(federation.status)
app.command("down")(federation.down)
app.command("connect")(connect.connect)
app.command("tunnel")(tunnel.tunnel)
app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("parity")(parity.parity)
app.command("comm")(communication.communication)
app.command("report")(report.report)
app.command("submit")(submit.submit)
app.command("evaluate")(evaluate.evaluate)
app.command("score")(evaluate.score)


def _show_version(wanted: bool) -> None:
    if wanted:
        versions = (f"{name} {metadata.version(name)}" for name in ("medfed", "flwr"))
        print(f"{', '.join(versions)}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the versions."),
    ] = False,
) -> None:
    """A federation of hospitals that fine-tunes a language model; their data stays with them."""


def main() -> None:
    """Entry point: errors meant for people come out as one line and a hint, never a traceback."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except click.exceptions.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "hint"):
            raise
        sys.exit(tell(error))


if __name__ == "__main__":
    main()
