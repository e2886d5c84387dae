"""Suspects: runs that were lost together with others on one worker, and run again apart from them.

Which of several tasks has killed its worker cannot be known. All of them are tried again at no
cost, apart from the rest of the session's work: once beside other suspects, as many as there are
workers; a run that is then lost in company again runs alone.

A suspect waits until the rest of the work that is in flight has ended, and nothing else is sent
meanwhile. For how long is bounded, since a neighbour may run for hours: it goes first
`PATIENCE` seconds at the latest after nothing new was sent. Work in flight never waits for a
suspect: what depends on it was taken back, and a task that waits for children of its own carries
them in a session of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun

PATIENCE = 30.0
"""Seconds that a suspect waits for the rest of the work in flight to end."""


class Quarantine:
    """The suspects of a session (its caller holds the session's lock)."""

    def __init__(self) -> None:
        self._waiting: dict[TaskRun, None] = {}
        self._apart: dict[TaskRun, None] = {}  # sent, and not ended
        self._next: list[TaskRun] = []  # to be sent now
        self._since: float | None = None  # nothing else is sent

    def __contains__(self, run: TaskRun) -> bool:
        """Whether a run is a suspect that has not been sent."""
        return run in self._waiting or run in self._next

    @property
    def holds(self) -> bool:
        """Whether nothing else may be sent."""
        return self._since is not None

    @property
    def waits(self) -> bool:
        """Whether there is anything to decide."""
        return bool(self._waiting or self._apart or self._since is not None)

    @property
    def due(self) -> bool:
        """Whether suspects have to be sent now."""
        return bool(self._next)

    def add(self, run: TaskRun) -> bool:
        """Take a run over if it is a suspect; answer whether it is."""
        if run.suspicions:
            self._waiting[run] = None
        return bool(run.suspicions)

    def discard(self, run: TaskRun) -> None:
        """Let go of a run that is withdrawn or has ended."""
        self._waiting.pop(run, None)
        self._apart.pop(run, None)
        if run in self._next:
            self._next.remove(run)

    def take(self) -> list[TaskRun]:
        """Return what has to be sent now."""
        found, self._next = self._next, []
        self._apart.update(dict.fromkeys(found))
        return found

    def turn(self, in_flight: int, workers: Callable[[], int], now: float | None = None) -> float | None:
        """Decide what comes next, after something has changed.

        Parameters
        ----------
        in_flight : int
            Runs that were sent and have not ended, suspects included.
        workers : callable
            Answers how many suspects may run at a time.
        now : float, optional
            By the monotonic clock.

        Returns
        -------
        float or None
            Seconds after which this has to be asked again, if nothing changes before.
        """
        now = time.monotonic() if now is None else now
        self._apart = {run: None for run in self._apart if not run.done}
        if self._apart or self._next:
            return None
        if not self._waiting:
            self._since = None
            return None
        if self._since is None:
            self._since = now
        left = self._since + PATIENCE - now
        if in_flight and left > 0:
            return left
        first = next(iter(self._waiting))
        alone = first.suspicions > 1
        for run in list(self._waiting)[: 1 if alone else max(workers(), 1)]:
            if run.suspicions > 1 and not alone:
                break
            del self._waiting[run]
            self._next.append(run)
        return None
