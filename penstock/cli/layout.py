"""How things look in text: columns, durations, moments; never a control code that somebody else wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

__all__ = ["clean", "columns", "duration", "human_bytes", "moment", "paint", "print_json", "short_id", "stop"]

_CODES = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_COLOURS = {
    "COMPLETED": "green",
    "FAILED": "red",
    "CRASHED": "magenta",
    "CANCELLED": "yellow",
    "CANCELLING": "yellow",
    "SKIPPED": "cyan",
    "RUNNING": "blue",
}
_LEAST = 8  # characters that a shortened column keeps


def stop(sentence: str, code: int = 1) -> NoReturn:
    """End the command with one sentence on standard error."""
    print(f"penstock: {clean(sentence)}", file=sys.stderr)
    raise typer.Exit(code)


def clean(text: object) -> str:
    """Return a text without control codes: it may come from a user's task, and goes to a terminal."""
    return _CODES.sub("", str(text))


def short_id(run: str) -> str:
    """Return the digits of an id that tell runs apart: the last ones, since the first are the time."""
    return run[-8:]


def duration(seconds: float | None) -> str:
    """Write a duration for people; empty if it is unknown."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def human_bytes(nbytes: float) -> str:
    """Write a number of bytes for people, in binary units."""
    from penstock.engine import summary  # brings the engine along, which `penstock --help` does not need

    return summary.human_bytes(nbytes)


def moment(when: float | None) -> str:
    """Write a time in the local time zone; empty if it is unknown."""
    return "" if when is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def in_colour() -> bool:
    """Whether standard output shows colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, state: str) -> str:
    """Colour a text after a type of state, where colours can be seen."""
    colour = _COLOURS.get(state)
    return typer.style(text, fg=colour) if colour and in_colour() else text


def columns(
    rows: Sequence[Sequence[str]],
    *,
    head: Sequence[str] = (),
    flexible: Sequence[int] = (),
    states: Sequence[str] = (),
) -> list[str]:
    """Align rows of cells.

    Parameters
    ----------
    rows : sequence of sequences of str
        The cells.
    head : sequence of str, optional
        Titles.
    flexible : sequence of int
        Columns that are shortened where a terminal is too narrow; a pipe gets all of the text.
    states : sequence of str, optional
        A type of state for each row, which colours it.
    """
    cells = [[clean(cell) for cell in row] for row in ([head, *rows] if head else rows)]
    widths = [max(map(len, column), default=0) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():
        excess = sum(widths) + 2 * (len(widths) - 1) - shutil.get_terminal_size().columns
        for place in sorted(flexible, key=lambda one: -widths[one]):
            cut = max(0, min(excess, widths[place] - _LEAST))
            widths[place] -= cut
            excess -= cut
    lines = []
    for row in cells:
        fitted = [_fit(cell, width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(fitted).rstrip())
    painted = ["", *states] if head else states
    return [paint(line, state) for line, state in zip(lines, painted, strict=True)] if states else lines


def _fit(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else f"{cell[: width - 1]}…"


def print_json(value: Any) -> None:
    """Print JSON: for a person with line breaks, in a pipe compact."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False, default=str))
