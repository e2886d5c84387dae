"""One thread that calls functions later: flushes, retry delays, deadlines."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable


class Alarm:
    """One call that is due later; `cancel` takes it back."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call any more."""
        self.call = None


class Clock:
    """Calls functions at their time, in one daemon thread that starts with the first of them."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._wake = threading.Condition()  # a signal may strike in here, and its handler calls us
        self._thread: threading.Thread | None = None

    def call_later(self, delay: float, call: Callable[[], None]) -> Alarm:
        """Call a function after a delay.

        Parameters
        ----------
        delay : float
            Seconds, by the monotonic clock.
        call : callable
            Must be short and must not raise.

        Returns
        -------
        Alarm
            Handle to cancel the call.
        """
        alarm = Alarm(time.monotonic() + delay, call)
        with self._wake:
            heapq.heappush(self._heap, (alarm.due, next(self._order), alarm))
            if self._thread is None:
                self._thread = threading.Thread(target=self._tick, name="penstock-clock", daemon=True)
                self._thread.start()
            elif self._heap[0][2] is alarm:
                self._wake.notify()
        return alarm

    def _tick(self) -> None:
        while True:
            with self._wake:
                while not self._heap or self._heap[0][0] > time.monotonic():
                    pause = self._heap[0][0] - time.monotonic() if self._heap else None
                    self._wake.wait(pause)
                call = heapq.heappop(self._heap)[2].call  # read once: `cancel` may come at any moment
            if call is not None:
                call()
            del call  # what it holds, such as the values of a flow, must not live until the next alarm


clock = Clock()
"""The clock of this process."""


def _after_fork() -> None:  # threads do not survive a fork, their alarms are the parent's
    clock.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_after_fork)
