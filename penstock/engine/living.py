"""What runs in this process right now: found by id when somebody asks for an end.

Root flow runs are owned: a driver says for them that it lives (`penstock.engine.heartbeat`), and once
it has run tasks outside of flows it says so until its end. Flow runs, whether roots or within others, are registered from their row to their end, so that each can
be cancelled (`penstock.engine.cancelling`).
"""

from __future__ import annotations

import os
import threading
from typing import Protocol

from penstock import errors
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.journal import Journal

__all__ = ["LiveFlow", "Owned", "living"]


class LiveFlow(Protocol):
    """A flow run of this process that has not ended."""

    flow_run: FlowRun

    def stop(self, reason: errors.RunError | None = None, *, force: bool = False) -> bool:
        """Ask it to stop; answer whether it will."""


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
    """The runs of this process that have not ended.

    Attributes
    ----------
    wake : Event
        There is something to say for.
    loose : bool
        This process has run tasks outside of flows.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._roots: dict[str, Owned] = {}
        self._flows: dict[str, LiveFlow] = {}
        self.wake = threading.Event()
        self.loose = False

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
            if not self._roots and not self.loose:
                self.wake.clear()

    def begin_loose(self) -> None:
        """A task is about to run outside of flows."""
        self.loose = True
        self.wake.set()

    @property
    def roots(self) -> dict[str, Owned]:
        """The root flow runs."""
        with self._gate:
            return dict(self._roots)

    def enter(self, flow: LiveFlow) -> None:
        """Let a flow run be found while it lives."""
        with self._gate:
            self._flows[flow.flow_run.id] = flow

    def leave(self, flow: LiveFlow) -> None:
        """A flow run has ended."""
        with self._gate:
            self._flows.pop(flow.flow_run.id, None)

    def flow(self, run_id: str) -> LiveFlow | None:
        """Return a flow run by its id."""
        return self._flows.get(run_id)

    def children(self, flow_run: FlowRun) -> list[LiveFlow]:
        """Return the flow runs directly within one."""
        with self._gate:
            return [flow for flow in self._flows.values() if flow.flow_run.parent is flow_run]

    def find(self, run_id: str) -> LiveFlow | list[TaskRun] | None:
        """Find a flow run, by its own id or that of its row in the parent; a task run (in a list), or what has not ended of a map."""
        with self._gate:
            flows = list(self._flows.values())
        for flow in flows:
            row = flow.flow_run.task_run
            if flow.flow_run.id == run_id or (row is not None and row.id == run_id):
                return flow
        for flow in flows:
            live = list(flow.flow_run.live)
            found = [run for run in live if run.map_id == run_id] or [run for run in live if run.id == run_id]
            if found:
                return found
        return None

    def _forget(self) -> None:
        self.__init__()  # type: ignore[misc] # in a child process nothing of it lives


living = Living()
"""Those of this process."""

os.register_at_fork(after_in_child=living._forget)
