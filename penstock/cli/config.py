"""`penstock config`: the settings in force, and where each came from."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock.cli.layout import columns, print_json
from penstock.settings import settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def config() -> None:
    """Show the settings."""


@app.command("show")
def show(json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False) -> None:
    """List every setting, its value and where it comes from."""
    rows = settings().describe()
    if json:
        print_json([{"name": name, "value": value, "source": source} for name, value, source in rows])
        return
    for line in columns(rows, head=("setting", "value", "from"), flexible=(1,)):
        print(line)
