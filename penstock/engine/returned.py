"""What a flow returns while futures are in it: their values stay where they are until somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.engine import conclusion, results, values
from penstock.engine.calls import TaskRun
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.graph import sources_of
from penstock.engine.states import StateType, Stored
from penstock.runners.worker.sizes import size_of


class Returned(Stored):
    """A flow's return value that holds futures."""

    def __init__(self, value: Any, runs: list[TaskRun]) -> None:
        self.value = value
        self.runs = runs
        self._loaded: list[Any] = []

    def load(self) -> Any:
        """Bring the values of the futures here and put them in their places."""
        if self._loaded:
            return self._loaded[0]
        ended = [run for run in self.runs if run.completed or (run.done and run.type is StateType.SKIPPED)]
        found = dict(zip(ended, values.results(ended), strict=True))
        self._loaded = [conclusion.with_values(self.value, found)]
        return self._loaded[0]


def give(row: TaskRun, data: Any) -> None:
    """Make what a flow returned the value of a run; a single future lends its reference."""
    if isinstance(data, Returned):
        run = run_of(data.value)
        lends = run is not None and isinstance(data.value, PenstockFuture) and run.carrier is row.carrier
        if lends and run is not None and run.completed and run.items is None:
            row.ref, row.place, row.value = run.ref, run.place, run.value
            row.nbytes, row.stored, row.worker = run.nbytes, run.stored, run.worker
            return
        row.value = data
        row.nbytes = sum(run.nbytes for run in data.runs)
    else:
        row.value = data
        away = isinstance(data, results.PutAway)
        row.nbytes = data.where["nbytes"] if away else size_of(data)


def with_upstreams(members: Sequence[TaskRun]) -> set[TaskRun]:
    """Return runs and all that they wait for."""
    found: set[TaskRun] = set()
    pending = list(members)
    while pending:
        run = pending.pop()
        if run not in found:
            found.add(run)
            pending.extend(source.run for source in sources_of(run) if source.run is not None)
    return found
