"""Options that several verbs share, so that they mean the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

RunConfig = Annotated[
    list[str] | None,
    typer.Option("--run-config", "-c", help="Overrides, as for flwr run: 'key=value …'."),
]
Demo = Annotated[bool, typer.Option("--demo", help="Short rounds on the embedded model and cards.")]
