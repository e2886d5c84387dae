"""The progress of a run, shown while it runs: bars in a terminal, lines in a pipe, figures at the end."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Any, Protocol, Self

from penstock.cli.layout import clean, duration, human_bytes, short_id
from penstock.progress import Board, Group, Progress

__all__ = ["Display", "summary_lines"]

REFRESH = 0.1
LINE_INTERVAL = 5.0  # seconds between two lines about one task name in a pipe
SETTLED = 1.0  # seconds after which a task name whose runs have all ended probably gets no more of them
SHORTEST_SPAN = 0.05  # seconds: a rate over less says nothing
WORTH_A_RATE = 1_000_000  # bytes from which their rate says more than that of the runs
BAR = 20
ROWS_ABOVE = 6  # lines of a terminal that are not bars


class Painter(Protocol):
    """What shows a board."""

    def show(self, board: Board, *, last: bool = False) -> None:
        """Show the board as it is now."""
        ...

    def say(self, text: str) -> None:
        """Write a line that stays."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class Display:
    """Shows the run that the block starts, and sums it up at the end.

    Parameters
    ----------
    stream : file
        Where to; a terminal gets bars, everything else plain lines without control codes.
    root : str, optional
        Id of the run; the first one in the block by default.
    quiet : bool
        Show nothing.
    """

    def __init__(self, stream: IO[str], root: str | None = None, *, quiet: bool = False) -> None:
        self.progress = Progress(root)
        self.board = self.progress.board
        self._painter = None if quiet else _painter(stream)
        self._told: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="penstock-display", daemon=True)

    def __enter__(self) -> Self:
        """Follow the events and begin to draw."""
        self.progress.__enter__()
        if self._painter is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw the end."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.progress.__exit__(kind, error, trace)
        self._draw(last=True)
        if self._painter is not None:
            with contextlib.suppress(OSError):
                self._painter.close()

    def finish(self, *commands: str) -> None:
        """Write the summary and the commands to try next; call it after the block."""
        if self._painter is None or not self.board.name:
            return
        with contextlib.suppress(OSError):
            if self.board.began:  # of a run that never began there are no figures
                for line in summary_lines(self.board):
                    self._painter.say(line)
            elif self.board.state_type == "CANCELLED":
                self._painter.say(f"{self.board.state}: {clean(self.board.message)}")
            for title, command in zip(["next:", *[""] * len(commands)], commands, strict=False):
                self._painter.say(f"{title:<6}{command}")

    def _work(self) -> None:
        while not self._stop.wait(REFRESH):
            self._draw()

    def _draw(self, *, last: bool = False) -> None:
        board = self.progress.look()
        painter = self._painter
        if painter is None:
            return
        try:
            for key, line in _opening(board):
                if key not in self._told:
                    self._told.add(key)
                    painter.say(line)
            painter.show(board, last=last)
        except (OSError, ValueError):  # nobody reads any more; the run goes on
            self._painter = None


def _painter(stream: IO[str]) -> Painter:
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Bars(stream)
    return Lines(stream)


# -- what is said ---------------------------------------------------------------------------


def _opening(board: Board) -> Iterator[tuple[str, str]]:
    if board.name:
        yield "run", f"run {clean(board.name)}  flow {clean(board.flow)}  id {short_id(board.root or '')}"
    if board.runner:
        yield "runner", _where(board.runner)


def _where(runner: dict[str, Any]) -> str:
    workers, threads = int(runner.get("workers") or 1), int(runner.get("threads") or 1)
    name = runner.get("name") or "runner"
    slots = f"{threads} slot{'s' if threads > 1 else ''}"
    parts = [f"{slots} in {workers} workers" if workers > 1 else slots]
    if runner.get("memory"):
        parts.append(human_bytes(runner["memory"]))
    parts += [f"dashboard {runner['dashboard']}"] if runner.get("dashboard") else []
    return clean(f"on {name}: " + ", ".join(parts))


def _cells(group: Group) -> tuple[str, str, str, str, str, str]:
    """Return name, done of total, what did not go well, bytes, rate and time left."""
    odd = [f"{group.failed} failed"] if group.failed else []
    for kind, word in (("CANCELLED", "cancelled"), ("SKIPPED", "skipped"), ("PENDING", "never started")):
        odd += [f"{group.ended[kind]} {word}"] if group.ended.get(kind) else []
    odd += [f"{group.retries} tried again"] if group.retries else []
    odd += [f"{group.running} running"] if group.running else []
    rate = left = ""
    if group.done > 1 and group.span >= SHORTEST_SPAN:
        speed = group.done / group.span
        rate = f"{speed:.1f}/s" if speed < 100 else f"{speed:.0f}/s"
        rate = f"{human_bytes(group.nbytes / group.span)}/s" if group.nbytes >= WORTH_A_RATE else rate
        left = (
            "" if group.is_done else f"eta {duration((group.total - group.done) * group.span / group.done)}"
        )
    size = human_bytes(group.nbytes) if group.nbytes else ""
    return clean(group.name), f"{group.done}/{group.total}", ", ".join(odd), size, rate, left


def summary_lines(board: Board) -> list[str]:
    """Return the figures of a run and its first failures, one line each."""
    figures = board.summary()
    end = f"{figures.state} in {duration(figures.wall)}"
    if figures.start >= 0.5:
        end += f", after {duration(figures.start)} to start"
    memory = f"driver {human_bytes(figures.driver_peak)}"
    if figures.in_driver:
        memory += ", where the tasks ran"
    elif figures.worker_peak:
        memory += f", largest worker {human_bytes(figures.worker_peak)}"
    failed = f", {figures.failed} of them failed" if figures.failed else ""
    lines = [end if board.state_type == "COMPLETED" else f"{end}: {clean(figures.message)}".rstrip(": ")]
    for failure in board.failures:
        where = f" (attempt {failure.attempt}, {failure.worker})" if failure.worker else ""
        lines.append(clean(f"  failed      {failure.name}: {failure.message}{where}".replace("\n", " ")))
    lines.append(f"  tasks       {figures.tasks}{failed}")
    if figures.tasks:
        formula = f"(wall × {figures.slots} slots - Σ task time) / tasks"
        lines.append(f"  overhead    {duration(figures.overhead)} per task   {formula}")
    return [
        *lines,
        f"  peak memory {memory}",
        f"  results     {human_bytes(figures.driver_bytes)} came through the driver",
    ]


# -- in a pipe ------------------------------------------------------------------------------


class Lines:
    """One line per task name: when its runs have ended, else every few seconds."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._said: dict[Group, tuple[float, int]] = {}
        self._begun = time.monotonic()

    def say(self, text: str) -> None:
        """Write a line."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def show(self, board: Board, *, last: bool = False) -> None:
        """Write what is due."""
        now = time.monotonic()
        width = max((len(group.name) for group in board.groups.values()), default=0)
        for group in list(board.groups.values()):
            when, done = self._said.get(group, (self._begun, 0))
            if group.done == done and not (last and group not in self._said):
                continue
            settled = group.is_done and done == 0 and time.time() - group.last >= SETTLED
            if last or settled or now - when >= LINE_INTERVAL:
                self._said[group] = (now, group.done)
                name, *cells = _cells(group)
                self.say("  ".join([f"  {name:<{width}}", *filter(None, cells)]))

    def close(self) -> None:
        """Nothing to put right."""


# -- in a terminal --------------------------------------------------------------------------


class Bars:
    """A bar per task name, redrawn in place."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            # What goes into a file must not be diverted to the screen.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()
        self._console.show_cursor(show=True)  # a process that is killed would leave it hidden

    def say(self, text: str) -> None:
        """Write a line above the bars."""
        self._console.print(text, soft_wrap=True)

    def show(self, board: Board, *, last: bool = False) -> None:
        """Draw all bars anew."""
        if not board.made or (last and not board.groups):
            return
        self._live.update(self._table(board, last), refresh=True)

    def _table(self, board: Board, last: bool) -> Any:
        from rich.console import Group as Stack
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        groups = list(board.groups.values())
        room = len(groups) if last else max(3, self._console.size.height - ROWS_ABOVE)
        # Where there is no room for all, those that go on are worth more.
        shown = {id(group) for group in sorted(groups, key=lambda one: (not one.is_done, one.last))[-room:]}
        for group in groups:
            if id(group) in shown:
                name, count, odd, *rest = _cells(group)
                style = "red" if group.failed else "green" if group.is_done else "blue"
                bar = ProgressBar(
                    total=max(group.total, 1), completed=group.done, width=BAR, complete_style=style
                )
                bar.finished_style = style
                table.add_row(f" {name}", bar, count, Text(odd, style="red" if group.failed else ""), *rest)
        if last:
            return table
        hidden = len(groups) - len(shown)
        running = board.most_running()
        notes = [] if board.runner else ["starting"]
        notes += [f"≤ {running} running"] if running else []
        notes += [f"{hidden} more task names"] if hidden else []
        notes.append(duration(time.time() - board.made))
        return Stack(table, Text(f" {' · '.join(notes)}", style="dim"))

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        self._live.stop()
