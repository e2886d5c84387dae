"""What a session writes down: events in the order of the run, many elements of a map in one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgpack

from penstock.engine import events
from penstock.engine.events import Event
from penstock.engine.summary import describe_all

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun, TaskRun
    from penstock.engine.states import StateType

PRESENT = 0
TERMINAL = 2


class Journal:
    """Makes the events of one session.

    Parameters
    ----------
    publish : callable
        Receives each event, in order.
    """

    def __init__(self, publish: Callable[[Event], None]) -> None:
        self._publish = publish
        self._count = itertools.count(1)
        self._ended: list[tuple[TaskRun, dict[str, Any]]] = []
        self.callbacks: list[Callable[[], None]] = []

    def publish(self, event: Event) -> None:
        """Publish an event under the next number of the session."""
        self._publish(replace(event, rseq=next(self._count)))

    def write(
        self, kind: str, run: str, root: str, body: dict[str, Any], attempt: int = 0, rank: int = 0
    ) -> None:
        """Publish one event."""
        self._publish(Event(kind, run, root, time.time(), body, 1, attempt, rank, next(self._count)))

    # -- runs come into being ------------------------------------------------------------------
    def flow_made(self, flow_run: FlowRun, body: dict[str, Any]) -> None:
        """A flow run exists."""
        self.write("flow_run", flow_run.id, flow_run.root, body)

    def task_made(self, run: TaskRun, parameters: dict[str, Any], parents: list[tuple[str, str]]) -> None:
        """A task run exists."""
        if run.tracked:
            self.write("task_run", run.id, run.root, {**_about(run, parameters), "upstream": parents})

    def map_made(self, run: TaskRun, body: dict[str, Any], parameters: dict[str, Any]) -> None:
        """Elements of a map exist; `run` is any of them."""
        self.write("map_run", str(run.map_id), run.root, {**_about(run, parameters), **body})

    # -- states --------------------------------------------------------------------------------
    def flow_state(self, flow_run: FlowRun, message: str = "", **details: Any) -> None:
        """A flow run is in a new state."""
        position = flow_run.position
        body = {
            "of": "flow",
            "type": str(position.type),
            "name": position.name,
            "message": message,
            **details,
        }
        rank = TERMINAL if flow_run.type.is_final else PRESENT
        self.write("state", flow_run.id, flow_run.root, body, position.attempt, rank)

    def task_state(self, run: TaskRun, **details: Any) -> None:
        """A task run is in a new state, told at once."""
        if run.tracked:
            rank = TERMINAL if run.done and run.type.is_final else PRESENT
            self.write("state", run.id, run.root, _state(run, details), run.attempt, rank)

    def add(self, run: TaskRun, details: dict[str, Any]) -> None:
        """A task run has ended; told with the next `write_out`, together with its neighbours."""
        if run.tracked:
            self._ended.append((run, details))

    def write_out(self) -> None:
        """Publish what has gathered."""
        ended, self._ended = self._ended, []
        groups: dict[tuple[str, StateType, str], list[tuple[TaskRun, dict[str, Any]]]] = {}
        for run, details in ended:
            plain = run.map_id is not None and run.completed
            if not plain:
                self.task_state(run, **details)
                continue
            groups.setdefault((str(run.map_id), run.type, run.state_name), []).append((run, details))
        for (map_id, kind, name), members in groups.items():
            if len(members) == 1:
                self.task_state(members[0][0], **members[0][1])
            else:
                self._write_columns(map_id, kind, name, members)

    def _write_columns(
        self, map_id: str, kind: StateType, name: str, members: list[tuple[TaskRun, dict[str, Any]]]
    ) -> None:
        workers: dict[str, int] = {}
        body: dict[str, Any] = {
            "of": "task",
            "type": str(kind),
            "name": name,
            "index": [run.index for run, _ in members],
            "attempt": [run.attempt for run, _ in members],
            "time": [run.ended for run, _ in members],
            "started": [details.get("started", 0.0) for _, details in members],
            "seconds": [details.get("seconds", 0.0) for _, details in members],
            "nbytes": [run.nbytes for run, _ in members],
            "peak": [details.get("peak", 0) for _, details in members],
            "worker": [workers.setdefault(run.worker, len(workers)) for run, _ in members],
            "workers": list(workers),
        }
        if any("stored" in details for _, details in members):
            body["stored"] = [details.get("stored") for _, details in members]
        rank = TERMINAL if kind.is_final else PRESENT
        self.write("states", map_id, members[0][0].root, body, max(body["attempt"]), rank)

    # -- logs and nested runs ------------------------------------------------------------------
    def lines(self, run: TaskRun, lines: list[Any], dropped: int) -> None:
        """A task run wrote log lines."""
        if lines or dropped:
            self.write("log", run.id, run.root, {"lines": lines, "dropped": dropped})

    def flow_lines(self, run: FlowRun, lines: list[Any]) -> None:
        """The code of a flow wrote log lines."""
        self.write("log", run.id, run.root, {"lines": lines, "dropped": 0})

    def absorb(self, packed: bytes) -> None:
        """Publish the events of the runs that a task made, in their order."""
        for data in msgpack.unpackb(packed):
            self.publish(events.unpack(data))


def _about(run: TaskRun, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "flow_run": run.flow_run.id if run.flow_run else None,
        "parent": run.surrounding.id if run.surrounding else None,
        "task": run.task.name,
        "name": run.name,
        "tags": sorted(run.tags),
        "parameters": describe_all(parameters),
        "child_flow_run": run.child_flow_run,
    }


def _state(run: TaskRun, details: dict[str, Any]) -> dict[str, Any]:
    return {
        "of": "task",
        "type": str(run.type),
        "name": run.state_name,
        "message": run.message,
        "worker": run.worker,
        "nbytes": run.nbytes,
        **details,
    }
