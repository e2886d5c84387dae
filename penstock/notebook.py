"""The progress of a flow below its cell: one output that is replaced, whatever the number of tasks.

A flow that is over in a moment shows nothing, so that a loop of short flows leaves no trail.
"""

from __future__ import annotations

import contextlib
import contextvars
import html
import importlib
import threading
import time
from types import TracebackType
from typing import Any, Self

from penstock.engine.markup import badge
from penstock.progress import Board, Group, Progress

__all__ = ["Shown"]

PATIENCE = 0.5  # seconds that a flow has before it is shown
REFRESH = 0.5  # seconds between two updates
ROWS = 12  # names of tasks that are shown


class Shown:
    """Shows a run in the output of the cell from which it was started.

    Parameters
    ----------
    root : str
        Id of the run.
    """

    def __init__(self, root: str) -> None:
        self._progress = Progress(root)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._output: Any = None
        self._drawn = ""

    def __enter__(self) -> Self:
        """Follow the run."""
        self._progress.__enter__()
        context = contextvars.copy_context()  # tells the kernel which cell an output belongs to
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="penstock-notebook", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the end, if the run has been shown at all."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._progress.__exit__(kind, error, trace)
        if self._output is not None:
            self._draw()

    def _work(self) -> None:
        pause = PATIENCE
        while not self._stop.wait(pause):
            self._draw()
            pause = REFRESH

    def _draw(self) -> None:
        with contextlib.suppress(Exception):  # nobody looks any more; the run goes on
            board = self._progress.look()
            drawn = page(board)
            if drawn == self._drawn:
                return
            self._drawn = drawn
            shown = {"text/html": drawn, "text/plain": line(board)}
            if self._output is None:
                display: Any = importlib.import_module("IPython.display").display
                self._output = display(shown, raw=True, display_id=True)
            else:
                self._output.update(shown, raw=True)


def line(board: Board) -> str:
    """Return the run in one line of text."""
    done = sum(group.done for group in board.groups.values())
    total = sum(group.total for group in board.groups.values())
    return f"{board.flow} {board.name}: {board.state or 'Pending'}, {done} of {total} tasks"


def page(board: Board) -> str:
    """Return the run as HTML: its state and how many of each task's runs have ended.

    Parameters
    ----------
    board : Board
        What is known of the run.
    """
    groups = list(board.groups.values())
    # Where there is no room for all, those that go on are worth more.
    shown = {id(one) for one in sorted(groups, key=lambda one: (one.is_done, -one.last))[:ROWS]}
    rows = "".join(_row(one) for one in groups if id(one) in shown)
    hidden = len(groups) - len(shown)
    more = f"<tr><td>… and {hidden} more</td></tr>" if hidden else ""
    seconds = f"{(board.ended or time.time()) - board.made:.0f} s" if board.made else ""
    state = badge(board.state_type or "PENDING", board.state or "Pending")
    title = f"<b>{html.escape(board.flow)}</b> {html.escape(board.name)} {state} {seconds}"
    return f'<div style="font-family:sans-serif">{title}<table>{rows}{more}</table></div>'


def _row(group: Group) -> str:
    share = 100 * group.done / max(group.total, 1)
    colour = "#c0392b" if group.failed else "#1b7f4b" if group.is_done else "#2461c2"
    bar = (
        '<div style="width:12em;height:.7em;background:#8883">'
        f'<div style="width:{share:.0f}%;height:100%;background:{colour}"></div></div>'
    )
    odd = f"{group.failed} failed" if group.failed else ""
    cells = (html.escape(group.name[:60]), bar, f"{group.done}/{group.total}", odd)
    return "<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>"
