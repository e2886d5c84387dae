"""`penstock explain`: what penstock would do with a flow; no task runs."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.layout import clean, print_json
from penstock.cli.run import RunnerOption, choose_runner, outcome_of, show_error

if TYPE_CHECKING:
    from penstock.cli.target import Target
    from penstock.engine.plan import Plan


def explain(
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
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show the plan of a flow: what goes together, what is lifted, and why not. Its tasks do not run.

    Standard output is the plan's; what the flow prints goes to standard error.
    """
    from penstock.cli.target import Target, pairs

    wanted = Target.parse(target)
    given = pairs(parameter or [])
    choose_runner(runner)
    plans: list[Plan] = []
    with contextlib.redirect_stdout(sys.stderr):
        code, error = outcome_of(lambda: plans.append(_plan(wanted, given)))
    show_error(error, begun=False)  # an error of the user's code keeps its traceback
    if plans and json:
        print_json(plans[0].to_dict())
    elif plans:
        print(clean(plans[0]))
    raise typer.Exit(code)


def _plan(target: Target, given: dict[str, str]) -> Plan:
    from penstock.cli.target import arguments_for

    flow = target.load()
    arguments: dict[str, Any] = arguments_for(flow, given)
    return flow.explain(**arguments)
