"""Which run waits for which: pure bookkeeping over task runs, no thread, no runner.

A backend that resolves references to unfinished work by itself (`native`) may get a run as soon
as its upstreams were handed out; any other only when they have ended. An edge under
`allow_failure`, or with ``on_skip``, always waits for the end, because only then it is known what to pass on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.engine.annotations import FAILURE, SKIPPED_AS_NONE, SKIPPED_AS_STATE
from penstock.engine.calls import Source, TaskRun
from penstock.engine.states import StateType


@dataclass(slots=True, eq=False)
class Edge:
    """One run waits for another.

    Attributes
    ----------
    run : TaskRun
        The one that waits.
    tolerant : int
        What it accepts besides a value, see `annotations`; if anything, it waits for the end.
    satisfied : bool
        The edge holds the run back no more.
    """

    run: TaskRun
    tolerant: int
    satisfied: bool = False


class Graph:
    """Edges between runs that have not ended."""

    def __init__(self, native: bool) -> None:
        self.native = native

    def add(self, run: TaskRun) -> TaskRun | None:
        """Connect a run to its upstreams.

        Parameters
        ----------
        run : TaskRun
            With its call.

        Returns
        -------
        TaskRun or None
            An upstream that ended without a value, because of which the run can never start.
        """
        if run.call is None and run.mapped is not None and not run.mapped.has_upstreams:
            return None
        for source in sources_of(run):
            upstream = source.run
            if upstream is None or upstream.session is not run.session:
                continue
            run.depth = max(run.depth, upstream.depth + 1)
            if upstream.done:
                if not admits(upstream, source.tolerant):
                    return upstream
                continue
            self._connect(run, upstream, source.tolerant)
        return None

    def _connect(self, run: TaskRun, upstream: TaskRun, tolerant: int) -> None:
        edge = Edge(run, tolerant)
        if upstream.dependants is None:
            upstream.dependants = []
        upstream.dependants.append(edge)
        # A run that has its value already (`hit`) waits for the end of its upstreams: it goes nowhere.
        native = self.native and upstream.items is None and run.hit is None
        if native and upstream.released and not tolerant:
            edge.satisfied = True
        else:
            run.waiting += 1

    def reconnect(self, run: TaskRun) -> TaskRun | None:
        """Have a run wait for those of its upstreams that had ended and are made again.

        Returns
        -------
        TaskRun or None
            An upstream that has ended without a value, because of which the run can never start.
        """
        for source in sources_of(run):
            upstream = source.run
            if upstream is None or upstream.session is not run.session:
                continue
            if upstream.done and not admits(upstream, source.tolerant):
                return upstream
            if not upstream.done and not any(edge.run is run for edge in upstream.dependants or ()):
                self._connect(run, upstream, source.tolerant)
        return None

    @staticmethod
    def hold(run: TaskRun) -> None:
        """Have a run that was handed out wait for the end of those of its upstreams that have not ended."""
        for source in sources_of(run):
            upstream = source.run
            for edge in (upstream.dependants or ()) if upstream is not None else ():
                if edge.run is run and edge.satisfied:
                    edge.satisfied = False
                    run.waiting += 1

    @staticmethod
    def foreign(run: TaskRun) -> list[Source]:
        """Return the upstreams of a run that another session carries."""
        if run.call is None and run.mapped is not None and not run.mapped.has_upstreams:
            return []
        return [s for s in sources_of(run) if s.run is not None and s.run.session is not run.session]

    def released(self, run: TaskRun) -> Iterator[TaskRun]:
        """Yield the runs that nothing holds back any more, now that `run` is handed out."""
        if not self.native or run.items is not None:
            return
        for edge in run.dependants or ():
            if not edge.tolerant and not edge.satisfied and edge.run.hit is None:
                edge.satisfied = True
                edge.run.waiting -= 1
                if edge.run.waiting == 0 and not edge.run.done:
                    yield edge.run

    def ended(self, run: TaskRun) -> tuple[list[TaskRun], list[TaskRun]]:
        """Return the runs that can start, and those that never will, now that `run` has ended."""
        ready, dead = [], []
        for edge in run.dependants or ():
            if edge.run.done:
                continue
            if not admits(run, edge.tolerant):
                dead.append(edge.run)
            elif not edge.satisfied:
                edge.satisfied = True
                edge.run.waiting -= 1
                if edge.run.waiting == 0:
                    ready.append(edge.run)
        run.dependants = None
        return ready, dead

    def recalled(self, run: TaskRun) -> list[TaskRun]:
        """Hold back what was handed out on the strength of an attempt of `run` that is void.

        Returns
        -------
        list of TaskRun
            The runs that were handed out and have to be withdrawn, deeper ones included.
        """
        withdrawn: list[TaskRun] = []
        pending = [run]
        while pending:
            upstream = pending.pop()
            for edge in upstream.dependants or ():
                if edge.tolerant or not edge.satisfied or edge.run.done:
                    continue
                edge.satisfied = False
                edge.run.waiting += 1
                if edge.run.released:
                    edge.run.released = False
                    withdrawn.append(edge.run)
                    pending.append(edge.run)
        return withdrawn


def admits(upstream: TaskRun, tolerant: int) -> bool:
    """Whether a run may start after an upstream that has ended; `allow_failure` never admits a cancelled one."""
    if upstream.completed:
        return True
    if upstream.type is StateType.SKIPPED:
        return bool(tolerant & (SKIPPED_AS_NONE | SKIPPED_AS_STATE))
    return bool(tolerant & FAILURE) and upstream.type is not StateType.CANCELLED


def sources_of(run: TaskRun) -> Iterator[Source]:
    """Yield where a run's values come from, and what it waits for without taking a value."""
    if run.call is not None:
        yield from run.call.sources
        yield from run.call.after
    elif run.mapped is not None and run.mapped.has_upstreams:
        yield from run.mapped.sources(run.index)
