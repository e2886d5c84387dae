"""`penstock run`: run a flow of a file, show its progress, and end with an exit code that tells how it went."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock import errors
from penstock.cli.layout import clean
from penstock.settings import refresh, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.cli.target import Target
    from penstock.engine.reservation import Reservation

INTERRUPTED, TERMINATED = 130, 143  # what a shell reports of a process that SIGINT or SIGTERM ended

RunnerOption = Annotated[
    str | None,
    typer.Option(
        "--runner",
        metavar="RUNNER",
        help="Where tasks run: auto, threads, processes, dask, ray, sequential, dask://host:port, ray://host:port.",
    ),
]


def run(
    target: Annotated[
        str, typer.Argument(metavar="PATH.py:FLOW", help="A flow in a file, or in a module: pkg.mod:flow.")
    ],
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            metavar="NAME=VALUE",
            help="A parameter of the flow; JSON or text. Repeat it.",
        ),
    ] = None,
    runner: RunnerOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no summary.")] = False,
) -> None:
    """Run a flow.

    The exit code is 0 if the run ends COMPLETED or SKIPPED, 130 or 143 after a signal, else 1.
    """
    from penstock.cli.display import Display
    from penstock.cli.target import Target, pairs

    wanted = Target.parse(target)
    given = pairs(parameter or [])
    sentence = choose_runner(runner)
    if sentence and not quiet:
        print(f"runner: {sentence}", file=sys.stderr)
    from penstock.engine.reservation import Reservation

    with Display(sys.stderr, quiet=quiet) as display:
        row = Reservation(wanted.name, given)
        code, error = outcome_of(lambda: _call(wanted, given, row))
    show_error(error, begun=bool(display.board.began))
    name = display.board.name or row.name
    commands = [f"penstock runs show {name}", f"penstock runs logs {name}"]
    display.finish(*commands[: 2 if display.board.began else 1])
    raise typer.Exit(code)


def choose_runner(wish: str | None) -> str:
    """Put a wish for a runner into force, for all flows that were not told otherwise.

    Returns
    -------
    str
        What "auto" has chosen; else empty.

    Raises
    ------
    ConfigurationError
        If there is no such runner; nothing has been started then.
    """
    from penstock.runners import auto_runner, runner_of

    if wish:
        os.environ["PENSTOCK_RUNNER"] = wish
        refresh()
    if settings().runner == "auto":
        return auto_runner()[1]
    if settings().runner:
        runner_of(settings().runner)
    return ""


def _call(target: Target, given: dict[str, str], row: Reservation) -> None:
    import asyncio

    from penstock.cli.target import arguments_for
    from penstock.engine.signals import watched

    try:
        with watched():  # from here to the flow's own watch a signal must end the row, too
            flow = target.load()
            arguments: dict[str, Any] = arguments_for(flow, given)
    except (KeyboardInterrupt, errors.TerminationSignal):
        row.cancel("Cancelled by a signal before the flow was imported.")
        raise
    except BaseException as error:
        row.fail(error)
        raise
    with row.handed_on():
        asyncio.run(flow(**arguments)) if flow.isasync else flow(**arguments)


def outcome_of(call: Callable[[], object]) -> tuple[int, BaseException | None]:
    """Call what runs a flow; return the exit code and what was raised, unless a signal was the reason."""
    try:
        call()
    except KeyboardInterrupt:
        return INTERRUPTED, None
    except errors.TerminationSignal:
        return TERMINATED, None
    except BaseException as error:  # a flow may also call sys.exit
        return 1, error
    return 0, None


def show_error(error: BaseException | None, *, begun: bool) -> None:
    """Show why a run failed: the traceback of the user's code, or a sentence where it is ours to explain.

    Parameters
    ----------
    error : BaseException or None
        What the call of the flow raised.
    begun : bool
        The user's code was running. If it was not, an error of ours needs no traceback.
    """
    if error is None:
        return
    import traceback

    errors.hide_frames(error)
    if isinstance(error, errors.PenstockError) and not begun:
        print(f"penstock: {clean(error)}", file=sys.stderr)
    else:  # without a frame of the user's the last lines say what there is to say
        print(clean("".join(traceback.format_exception(error))), end="", file=sys.stderr)
