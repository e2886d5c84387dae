"""`penstock explain`: what penstock would do with a flow; no task runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from penstock.cli.layout import clean, print_json
from penstock.cli.run import RunnerOption, choose_runner


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
    """Show the plan of a flow: what goes together, what is lifted, and why not. Its tasks do not run."""
    from penstock.cli.target import Target, arguments_for, pairs

    wanted = Target.parse(target)
    given = pairs(parameter or [])
    choose_runner(runner)
    flow = wanted.load()
    arguments: dict[str, Any] = arguments_for(flow, given)
    plan = flow.explain(**arguments)
    if json:
        print_json(plan.to_dict())
    else:
        print(clean(plan))
