"""The command line: parse, call one function, print. One file for each noun.

Nothing heavy is imported before a command needs it: help and errors have to come at once.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from penstock import errors
from penstock.cli import cancel, config, db, demo, doctor, explain, resume, run, runs, server, spool
from penstock.cli.layout import clean

__all__ = ["app", "main"]

app = typer.Typer(
    name="penstock",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("cancel")(cancel.cancel)
app.command("resume")(resume.resume)
app.command("explain")(explain.explain)
app.add_typer(runs.app, name="runs")
app.add_typer(server.app, name="server", help="Serve the record of this machine.")
app.command("doctor")(doctor.doctor)
app.add_typer(db.app, name="db")
app.add_typer(spool.app, name="spool")
app.add_typer(config.app, name="config")


def _version(wanted: bool) -> None:
    if wanted:
        import penstock

        print(f"penstock {penstock.__version__}")
        raise typer.Exit


@app.callback()
def penstock_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Flows over large data on threads, processes, Dask and Ray, with a record of every run."""


def main() -> None:
    """Run the command line; an error of ours is one sentence, and never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that knows no "≤" must not end a command
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except errors.PenstockError as error:
        print(f"penstock: {clean(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, errors.ConfigurationError) else 1)
