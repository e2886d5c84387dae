"""Where the values are that calls of a session need, as its runner knows them."""

from __future__ import annotations

import logging
import time
import weakref
from typing import TYPE_CHECKING

from penstock.engine import values
from penstock.engine.calls import Source, TaskRun
from penstock.runners.base import UNSENT, Ref
from penstock.settings import settings

if TYPE_CHECKING:
    from penstock.engine.session import Session

log = logging.getLogger("penstock.flow_runs")


class Locations:
    """Finds the references behind the slots of calls, and brings values to the runner that it lacks.

    Parameters
    ----------
    session : Session
        Whose calls need them.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._crossed: weakref.WeakKeyDictionary[TaskRun, Ref] = weakref.WeakKeyDictionary()

    def reference(self, source: Source) -> Ref:
        """Return the reference behind a slot; a value that lies here is put near the workers."""
        return self.find(source)[0]

    def find(self, source: Source) -> tuple[Ref, int | None]:
        """Return the reference behind a slot, and the place in its value if that is a chunk's.

        A value that lies here is put near the workers.
        """
        if source.ref is not None:
            return source.ref, None
        session = self._session
        run = source.run
        assert run is not None
        if run.session is not session:
            source.ref = self._crossing(run, source.tolerant)
            return source.ref, None
        if run.done and not run.completed:  # `allow_failure`, `on_skip`
            source.ref = session.runner.put([values.stand_in(run, source.tolerant)])[0]
            return source.ref, None
        value = run.value
        if (run.items is not None and value is None) or (run.child_flow_run is not None and run.ref is None):
            (value,) = values.results([run])
        if run.ref is None:
            assert run.done, f"{run.name!r} has no value yet"  # never send None in its place
            run.ref, run.place = session.runner.put([value])[0], -1
        place = run.place if run.place >= 0 else None
        if run.ref.handle is UNSENT:  # goes in the same batch: the backend knows it by its key
            return Ref(run.ref.key, None), place
        return run.ref, place

    def _crossing(self, run: TaskRun, tolerant: int) -> Ref:
        """Bring a value from another session's runner to this one's, once, and say how large it is."""
        session = self._session
        found = self._crossed.get(run)
        if found is None:
            completed = not run.done or run.completed
            value = values.results([run])[0] if completed else values.stand_in(run, tolerant)
            found = session.runner.put([value])[0]
            if completed:
                self._crossed[run] = found
            here, there = session.runner, run.carrier.runner
            if here is not there and run.nbytes >= settings().large_argument:
                text = (
                    f"the value of {run.name!r}, {run.nbytes} bytes, moves from {there.name} to {here.name} "
                    "through the driver"
                )
                log.warning("%s", text)
                if run.flow_run is not None:
                    session.journal.flow_lines(run.flow_run, [[time.time(), "WARNING", text]])
        return found

    def orders(self, source: Source) -> bool:
        """Whether an edge of ``wait_for`` has to be known to the backend."""
        run = source.run
        return (
            run is not None and not run.done and run.session is self._session and self._session.graph.native
        )
