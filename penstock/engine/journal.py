"""What a session writes down: events in the order of the run, many elements of a map in one."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgpack

from penstock.engine import events, results
from penstock.engine.events import Event
from penstock.engine.past import is_beside
from penstock.engine.summary import describe_all

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun, TaskRun
    from penstock.engine.past import Past
    from penstock.engine.states import Position

PRESENT = 0
TERMINAL = 2
_DETAILS = ("started", "seconds", "peak")


class Journal:
    """Makes the events of one session.

    Parameters
    ----------
    publish : callable
        Receives each event, in order.
    """

    def __init__(self, publish: Callable[[Event], None]) -> None:
        self._publish = publish
        self.epoch = 1  # how many owners the run has had
        self.gate = threading.Lock()  # the state of the flow is told, or told once more
        self._count = itertools.count(1)
        self._ended: list[tuple[TaskRun, dict[str, Any]]] = []
        self._completed: list[tuple[Sequence[TaskRun], Sequence[float], Sequence[float], int]] = []
        self._unnamed: dict[str, tuple[float, dict[str, Any]]] = {}
        self._unnamed_maps: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        self._tasks: set[tuple[Any, ...]] = set()
        self.callbacks: list[Callable[[], None]] = []

    def publish(self, event: Event) -> None:
        """Publish an event under the next number of the session."""
        self._publish(replace(event, epoch=self.epoch, rseq=next(self._count)))

    def write(
        self, kind: str, run: str, root: str, body: dict[str, Any], attempt: int = 0, rank: int = 0
    ) -> None:
        """Publish one event."""
        self._publish(Event(kind, run, root, time.time(), body, self.epoch, attempt, rank, next(self._count)))

    # -- runs come into being ------------------------------------------------------------------
    def flow_made(self, flow_run: FlowRun, body: dict[str, Any]) -> None:
        """A flow run exists."""
        self.write("flow_run", flow_run.id, flow_run.root, body)

    def task_made(
        self,
        run: TaskRun,
        parameters: dict[str, Any],
        parents: list[tuple[str, str]],
        named_later: bool = False,
    ) -> None:
        """A task run exists, unless it did before its flow run is resumed; its name may be made only where it runs."""
        past = run.flow_run.past if run.flow_run is not None else None
        if past is not None and run.tracked and past.task(run, parameters, parents):
            self._told_again(run)
            return
        if run.tracked:
            self._task_known(run)
            body = {**_about(run, parameters), "upstream": parents}
            if named_later:
                self._unnamed[run.id] = (time.time(), body)
            self.write("task_run", run.id, run.root, body)

    def named(self, run: TaskRun, name: str) -> None:
        """A worker has made the name of a run: the run is written down anew."""
        run.name = name
        if run.map_id is not None:
            self._element_named(run)
            return
        made, body = self._unnamed.pop(run.id, (0.0, {}))
        if body:
            self.publish(Event("task_run", run.id, run.root, made, {**body, "name": name}))

    def _element_named(self, run: TaskRun) -> None:
        for made, body in self._unnamed_maps.get(str(run.map_id), ()):
            number = run.index - body["start"]
            if 0 <= number < body["count"]:
                own = [[name, runs[number]] for name, runs in body["upstream_elements"] if runs[number]]
                about = {**_about(run, {}), "map": run.map_id, "element": run.index, "upstream": own}
                self.publish(Event("task_run", run.id, run.root, made, about))

    def map_made(
        self, run: TaskRun, body: dict[str, Any], parameters: dict[str, Any], named_later: bool = False
    ) -> None:
        """Elements of a map exist; `run` is any of them; some of their names may be made only where they run."""
        self._task_known(run)
        if named_later:
            self._unnamed_maps.setdefault(str(run.map_id), []).append((time.time(), body))
        self.write("map_run", str(run.map_id), run.root, {**_about(run, parameters), **body})

    def _told_again(self, run: TaskRun) -> None:
        assert run.flow_run is not None and run.flow_run.past is not None  # noqa: PT018 - it was asked
        if not run.completed:
            self.attempt_lost(run.flow_run.past, run.id, run.root, run.message)
        elif run.message:
            run.flow_run.past.settle(run.id)
            self.task_state(run, stored=results.location(run.stored or {}))

    def attempt_lost(self, past: Past, run: str, root: str, message: str = "") -> None:
        """The attempt of a run that was under way has died with the driver."""
        known = past.settle(run)
        if known is not None:
            attempt, began = known
            body = {**_died("task", attempt), "began": began}
            body["message"] = message or body["message"]
            self.write("state", run, root, body, attempt, TERMINAL)

    def flow_lost(self, flow_run: str, row: str, root: str, attempt: int) -> None:
        """A nested flow run, and its row in the parent, have died with the driver."""
        self.write("state", flow_run, root, _died("flow", attempt), attempt, TERMINAL)
        self.write("state", row, root, _died("task", attempt), attempt, TERMINAL)

    def elements_told_again(self, runs: Sequence[TaskRun]) -> bool:
        """Whether elements of a map existed before their flow run is resumed; they are what they were then."""
        past = runs[0].flow_run.past if runs[0].flow_run is not None else None
        if past is None:
            return False
        known = past.elements(runs)
        for run in runs:
            self._told_again(run)
        return known

    def _task_known(self, run: TaskRun) -> None:
        """Say once in a session which code a task is."""
        task = run.task
        key = getattr(task, "task_key", None)
        if key is None:  # the row of a nested flow
            return
        known = (task.name, key, task.options.version)
        if known not in self._tasks:
            self._tasks.add(known)
            body = {
                "task": task.name,
                "key": key,
                "version": task.version,
                "description": task.options.description,
            }
            self.write("task", run.root, run.root, body)

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

    def task_passed(self, run: TaskRun, position: Position, message: str, **details: Any) -> None:
        """A task run was in a state that is over already; nobody has seen it there."""
        if run.tracked:
            body = {
                **_state(run, details),
                "type": str(position.type),
                "name": position.name,
                "message": message,
            }
            self.write("state", run.id, run.root, body, position.attempt, PRESENT)

    def add(self, run: TaskRun, details: dict[str, Any]) -> None:
        """A task run has ended; told with the next `write_out`, together with its neighbours."""
        if run.tracked:
            self._ended.append((run, details))

    def add_completed(
        self, runs: Sequence[TaskRun], started: Sequence[float], seconds: Sequence[float], peak: int
    ) -> None:
        """Elements of one map have completed; told with the next `write_out`, in one event."""
        self._completed.append((runs, started, seconds, peak))

    def write_out(self) -> None:
        """Publish what has gathered."""
        completed, self._completed = self._completed, []
        for runs, started, seconds, peak in completed:
            self._write_columns(runs, started, seconds, [peak] * len(runs))
        ended, self._ended = self._ended, []
        groups: dict[tuple[str, str, bool], list[tuple[TaskRun, dict[str, Any]]]] = {}
        for run, details in ended:
            if run.map_id is not None and run.completed:
                key = (run.map_id, run.state_name, details.get("again", False))
                groups.setdefault(key, []).append((run, details))
            else:
                self.task_state(run, **details)
        for (_, _, again), members in groups.items():
            if len(members) == 1:
                self.task_state(members[0][0], **members[0][1])
            else:
                began, took, most = ([details.get(name, 0) for _, details in members] for name in _DETAILS)
                kept = [details.get("stored") for _, details in members]
                stored = kept if any(kept) else None
                self._write_columns([run for run, _ in members], began, took, most, stored, again=again)

    def _write_columns(
        self,
        runs: Sequence[TaskRun],
        started: Sequence[float],
        seconds: Sequence[float],
        peak: Sequence[int],
        stored: Sequence[str | None] | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Publish that elements of one map have completed, all under one name of state."""
        workers: dict[str, int] = {}
        head = runs[0]
        body: dict[str, Any] = {
            "of": "task",
            "type": str(head.type),
            "name": head.state_name,
            "index": [run.index for run in runs],
            "attempt": [run.attempt for run in runs],
            "time": [run.ended for run in runs],
            "started": started,
            "seconds": seconds,
            "nbytes": [run.nbytes for run in runs],
            "peak": peak,
            "worker": [workers.setdefault(run.worker, len(workers)) for run in runs],
            "workers": list(workers),
        }
        if stored is not None:
            body["stored"] = stored
        if again:
            body["again"] = True
        self.write("states", str(head.map_id), head.root, body, max(body["attempt"]), TERMINAL)

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


def _died(kind: str, attempt: int) -> dict[str, Any]:
    message = f"its driver died (attempt {attempt})"
    return {"of": kind, "type": "CRASHED", "name": "Crashed", "cause": "HeartbeatLost", "message": message}


def _about(run: TaskRun, parameters: dict[str, Any]) -> dict[str, Any]:
    outside = run.flow_run is None and run.surrounding is None
    return {
        **(
            {"host": events.HOST, "pid": os.getpid()} if outside else {}
        ),  # else its flow run tells who drives it
        "flow_run": run.flow_run.id if run.flow_run else None,
        "parent": run.surrounding.id if run.surrounding else None,
        "task": run.task.name,
        "name": run.name,
        "tags": sorted(run.tags),
        "parameters": describe_all(parameters),
        "child_flow_run": run.child_flow_run,
        **({"beside": True} if is_beside(run.flow_run, run.surrounding) else {}),
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
