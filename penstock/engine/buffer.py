"""Runs that wait to be sent: when a batch goes out, and what is in it.

A loop of submits would cost the backend a message each; a batch of even ten recovers nearly
all of that. The first run after a pause goes at once, so that a single submit keeps the latency
of the bare backend. Inside a task nothing goes at once: if the task waits for its child within
the next moment, it runs the child itself. A generator that was submitted by itself stays until
somebody looks at a future, or asks for its items, which is possible only before it is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from penstock.engine.calls import TaskRun
from penstock.engine.chunks import Packer
from penstock.engine.clock import Alarm, clock

BATCH = 256
"""Runs that make a full batch."""
PAUSE = 0.003
"""Seconds that a run waits for company."""
ITEMS_PAUSE = 0.1
"""Seconds that a generator waits for somebody who asks for its items."""


class Buffer:
    """Runs in the order in which they became ready; elements of a map wait with their packer.

    Parameters
    ----------
    pump : callable
        Called without arguments, from any thread, when a batch is due.
    """

    def __init__(self, pump: Callable[[], None]) -> None:
        self._runs: dict[TaskRun, None] = {}
        self._packers: dict[Packer, None] = {}  # those in which elements wait
        self._kept: dict[TaskRun, None] = {}  # generators whose items somebody may ask for
        self._everything = False  # these go, too
        self._pump = pump
        self._alarm: Alarm | None = None
        self._last = 0.0
        self.due = False

    def __len__(self) -> int:
        """Count the runs that wait."""
        return len(self._runs) + sum(len(packer.ready) for packer in self._packers)

    def __contains__(self, run: TaskRun) -> bool:
        """Whether a run waits here."""
        return run in _place_of(run, self._runs)

    def add(self, run: TaskRun, *, leading: bool) -> None:
        """Append a run (the caller holds the session's lock).

        Parameters
        ----------
        run : TaskRun
            Ready to be sent.
        leading : bool
            Whether it may go at once if the buffer was idle.
        """
        alone = len(self._runs) == len(self._kept)
        idle = leading and alone and not self._packers and time.monotonic() - self._last > PAUSE
        place = _place_of(run, self._runs)
        place[run] = None
        if place is not self._runs and run.mapped is not None and run.mapped.packer is not None:
            self._packers[run.mapped.packer] = None
        if idle or len(place) >= BATCH:
            self.due = True
        elif self._alarm is None and not self.due:
            self._alarm = clock.call_later(PAUSE, self._time_out)

    def keep(self, run: TaskRun) -> None:
        """Let a generator that waits here wait longer: its items may be asked for (the caller holds the lock)."""
        if run in self._runs:
            self._kept[run] = None
            clock.call_later(ITEMS_PAUSE, self._enough)

    def discard(self, run: TaskRun) -> bool:
        """Take one run out; answer whether it was there."""
        self._kept.pop(run, None)
        place = _place_of(run, self._runs)
        found = place.pop(run, self) is None
        if found and not place and place is not self._runs and run.mapped is not None:
            self._packers.pop(run.mapped.packer, None)  # type: ignore[arg-type] # nothing of it waits any more
        return found

    def flush(self, *, everything: bool = False) -> None:
        """Make whatever may go due; generators that are kept only if somebody looks at a future (`everything`)."""
        self._everything |= everything and bool(self._kept)
        waits = len(self._runs) > len(self._kept) or any(run.dependants for run in self._kept)
        if self._everything or waits or any(packer.has_room for packer in self._packers):
            self.due = True

    def take(self) -> list[TaskRun | list[TaskRun]]:
        """Hand the batch over: runs that go alone, and lists of runs that go together.

        The caller holds the session's lock.
        """
        ready = self._ready()
        batch: list[TaskRun | list[TaskRun]] = list(ready)
        if len(ready) == len(self._runs):
            self._runs.clear()
            self._kept.clear()
        else:
            for run in ready:
                del self._runs[run]
                self._kept.pop(run, None)
        self._everything = False
        for packer in list(self._packers):
            batch.extend(packer.take())
            if not packer.ready:
                del self._packers[packer]
        self.due = False
        self._last = time.monotonic()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        return batch

    def _ready(self) -> Sequence[TaskRun]:
        """Return the runs that go, in order; a generator that others depend on goes with them, as a list."""
        if not self._kept or self._everything:
            return list(self._runs)
        return [run for run in self._runs if run not in self._kept or run.dependants]

    def _time_out(self) -> None:
        self._alarm = None
        self.flush()
        self._pump()

    def _enough(self) -> None:
        self.flush(everything=True)
        self._pump()


def _place_of(run: TaskRun, singles: dict[TaskRun, None]) -> dict[TaskRun, None]:
    packer = run.mapped.packer if run.mapped is not None else None
    return singles if packer is None else packer.ready
