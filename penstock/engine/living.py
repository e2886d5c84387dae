"""What runs in this process right now: found by id when somebody asks for an end from outside.

Root flow runs are owned: a driver says for them that it lives (`penstock.engine.heartbeat`). Flow
runs, whether roots or within others, register while their code runs, so that each can be cancelled.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from penstock import errors
from penstock.engine import cancelling, waiting
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.journal import Journal

__all__ = ["Owned", "Stoppable", "cancel_run", "living"]

GRACE = 2.0  # seconds that code which was asked to stop may take before it is ended by force


class Stoppable(Protocol):
    """The frame around the code of a flow."""

    flow_run: FlowRun
    asked: errors.RunError | None

    def interrupt(self) -> None:
        """Interrupt the code."""
        ...

    def stop(self, error: errors.RunError) -> None:
        """Have the code end soon; what it ends with is the error."""
        ...


class Owned:
    """A root flow run of this process.

    Attributes
    ----------
    flow_run : FlowRun
        The run.
    journal : Journal
        Where its events go; knows the epoch.
    holder : str
        The writer under which its lease is known, empty before the first beat.
    lost : bool
        Somebody else has taken it.
    """

    def __init__(self, flow_run: FlowRun, journal: Journal) -> None:
        self.flow_run = flow_run
        self.journal = journal
        self.holder = ""
        self.lost = False

    def own_again(self, epoch: int, holder: str) -> None:
        """Go on after having been presumed dead: tell the state of the flow once more."""
        with self.journal.gate:
            if not self.flow_run.type.is_final:  # else its last word was told, and still counts
                self.journal.epoch, self.holder = epoch, holder
                self.journal.flow_state(self.flow_run, "Its driver is alive, and has taken it again.")


class Living:
    """The runs of this process that have not ended."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._roots: dict[str, Owned] = {}
        self._flows: dict[str, Stoppable] = {}
        self.wake = threading.Event()  # there is a root

    def own(self, flow_run: FlowRun, journal: Journal) -> Owned:
        """Take note of a root flow run; one that is known under this id stays the same."""
        with self._gate:
            owned = self._roots.get(flow_run.id) or Owned(flow_run, journal)
            owned.flow_run = flow_run
            self._roots[flow_run.id] = owned
        self.wake.set()
        return owned

    def disown(self, run_id: str) -> None:
        """A root flow run has ended."""
        with self._gate:
            self._roots.pop(run_id, None)
            if not self._roots:
                self.wake.clear()

    @property
    def roots(self) -> dict[str, Owned]:
        """The root flow runs."""
        with self._gate:
            return dict(self._roots)

    def enter(self, flow: Stoppable) -> None:
        """The code of a flow begins."""
        with self._gate:
            self._flows[flow.flow_run.id] = flow

    def leave(self, flow: Stoppable) -> None:
        """The code of a flow has ended."""
        with self._gate:
            self._flows.pop(flow.flow_run.id, None)

    @property
    def flows(self) -> list[Stoppable]:
        """The flow runs, inner ones after those around them."""
        with self._gate:
            return list(self._flows.values())

    def within(self, flow_run: FlowRun) -> list[Stoppable]:
        """Return a flow run and those within it, the innermost last."""
        return [flow for flow in self.flows if _is_within(flow.flow_run, flow_run)]

    def find(self, run_id: str) -> Stoppable | list[TaskRun] | None:
        """Find a flow run, a task run (in a list), or what has not ended of a map."""
        flows = self.flows
        for flow in flows:
            row = flow.flow_run.task_run
            if flow.flow_run.id == run_id or (row is not None and row.id == run_id):
                return flow
        for flow in flows:
            live = list(flow.flow_run.live)
            found = [run for run in live if run.map_id == run_id]
            found = found or [run for run in live if (run.map_id is None or run_id) and run.id == run_id]
            if found:
                return found
        return None

    def _forget(self) -> None:
        self.__init__()  # type: ignore[misc] # in a child process nothing of it lives


living = Living()
"""Those of this process."""

os.register_at_fork(after_in_child=living._forget)


def _is_within(inner: FlowRun | None, outer: FlowRun) -> bool:
    while inner is not None:
        if inner is outer:
            return True
        inner = inner.parent
    return False


def cancel_run(run_id: str, by: str) -> bool:
    """Ask a run of this process to stop; returns at once.

    Its code ends as `cancelling` can have it end: until then it is shown CANCELLING. A flow run
    within another is cancelled alone: its caller gets a `CancelledRun`.

    Parameters
    ----------
    run_id : str
        Of a flow run, a task run, an element of a map, or a map.
    by : str
        Who asks, for the record.

    Returns
    -------
    bool
        Whether it runs here.
    """
    found = living.find(run_id)
    if found is None:
        return False
    if isinstance(found, list):
        aside(lambda: _stop(found), "penstock-cancel")
        return True
    found.stop(errors.CancelledRun(f"Cancelled by {by}.").of_run(found.flow_run.id))
    return True


def _stop(runs: list[TaskRun]) -> None:
    """Ask runs to stop; where that does not help, end the processes that run them, if those are ours to end."""
    cancelling.cancel(runs)
    waiting.wait(runs, GRACE)
    cancelling.cancel(runs, force=True)


def lose(run_id: str, error: errors.RunOwnedElsewhere) -> None:
    """Somebody else has taken a root flow run: end it here; what it still writes down is stale."""
    owned = living.roots.get(run_id)
    if owned is not None and not owned.lost:
        owned.lost = True
        found = living.find(run_id)
        if found is not None and not isinstance(found, list):
            found.stop(error)


def aside(call: Callable[[], Any], name: str) -> None:
    """Do something that may take seconds in a thread of its own; what it raises concerns nobody."""

    def work() -> None:
        with contextlib.suppress(Exception):
            call()

    threading.Thread(target=work, name=name, daemon=True).start()
