"""`penstock resume`: go on with a run whose driver died, or that failed or was cancelled."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock import errors
from penstock.cli.layout import clean, stop

if TYPE_CHECKING:
    from penstock.engine.resumption import Resumption


def resume(
    run: Annotated[
        str, typer.Argument(metavar="ID", help="A flow run: an id, its first or last digits, or a name.")
    ],
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Take the run from a driver that still lives.")
    ] = False,
    rerun: Annotated[
        list[str] | None,
        typer.Option(
            "--rerun",
            metavar="TASK",
            help="Execute this task again although it must not run twice and may have begun. Repeat it.",
        ),
    ] = None,
    runner: Annotated[
        str | None, typer.Option("--runner", metavar="RUNNER", help="Where tasks run; as before by default.")
    ] = None,
    on_server: Annotated[
        bool,
        typer.Option(
            "--on-server", help="Let the server of the run do it, in a process of its own, and return."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no summary.")] = False,
) -> None:
    """Continue a run: task runs with stored results are not executed again.

    The exit code is that of `penstock run`.
    """
    if on_server:
        if takeover or rerun or runner:
            stop("--on-server takes none of --takeover, --rerun and --runner.", 2)
        _leave_to_server(run)
        return
    from penstock.cli.display import Display
    from penstock.cli.run import choose_runner, outcome_of, show_error
    from penstock.cli.target import Target
    from penstock.engine.entry import arguments_of

    told = _told(run)
    entry = told["entry"]
    arguments = arguments_of(entry)
    if not takeover and told["rank"] == 0:
        raise errors.RunOwnedElsewhere(
            f"{told['run_name']} belongs to pid {told['pid']} on {told['host']}; cancel it, or take it with --takeover."
        )
    with contextlib.suppress(OSError):
        os.chdir(entry["cwd"])
    choose_runner(runner or entry["runner"] or None)
    flow = Target(entry["place"], entry["name"]).load()
    resumption = _take(told, takeover, tuple(rerun or ()))
    with Display(sys.stderr, quiet=quiet) as display:
        code, error = outcome_of(lambda: _call(flow, arguments, resumption))
    show_error(error, begun=bool(display.board.began))
    if not quiet:
        print(resumption.past.told(), file=sys.stderr)
    display.finish(f"penstock runs show {resumption.name}")
    raise typer.Exit(code)


def _leave_to_server(text: str) -> None:
    from penstock.api.client import get_client
    from penstock.cli.store import connected, find, person

    with connected() as store:
        found = find(store, text)
    with get_client() as client:
        client.resume(found["id"], by=person())
        print(
            f"the server at {client.url} goes on with {clean(found['name'])}: penstock runs show {clean(found['name'])}"
        )


def _told(text: str) -> dict[str, Any]:
    from penstock.cli.store import connected, find

    with connected() as store:
        found = find(store, text)
        told: dict[str, Any] | None = store.ask({"what": "past", "root": found.get("root", found["id"])})
    if told is None or found["kind"] != "flow" or told["id"] != found["id"]:
        stop(f"{clean(found['name'])} is no root flow run; resume the run that it is part of.")
    if told["type"] in {"COMPLETED", "SKIPPED"}:
        stop(f"{clean(told['run_name'])} has {told['type'].lower()}; there is nothing to resume.")
    return told


def _take(told: dict[str, Any], takeover: bool, rerun: tuple[str, ...]) -> Resumption:
    """Become the owner of the run."""
    from penstock.cli.store import connected
    from penstock.engine.resumption import Resumption
    from penstock.engine.tracking import start_tracking

    writer = start_tracking().begin()
    with connected() as store:
        question = {"root": told["id"], "holder": writer, "takeover": takeover, "epoch": told["epoch"]}
        epoch = store.ask({"what": "take", **question})
    return Resumption(told, epoch, rerun)


def _call(flow: Any, arguments: dict[str, Any], resumption: Resumption) -> None:
    import asyncio

    with resumption.handed_on():
        asyncio.run(flow(**arguments)) if flow.isasync else flow(**arguments)
