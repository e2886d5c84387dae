"""Progress: what a run has done so far, folded from the events of this process while it runs.

The publishing thread only appends to a queue; whoever shows the progress folds the queue into a
`Board` when it wants to look. The same board serves a terminal, a plain pipe and a notebook.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from penstock.engine.events import Event, bus, element_id

__all__ = ["Board", "Failure", "Group", "Progress", "Summary"]

FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED", "SKIPPED"})
FAILURES = 5  # kept in full; all of them are counted
NAMED = 20_000  # elements of a map that are searched for the name of a failed one


@dataclass(slots=True, eq=False)
class Group:
    """All runs of one task name.

    Attributes
    ----------
    name : str
        Of the task, or of a nested flow.
    is_flow : bool
        The runs stand for nested flows.
    total : int
        Runs known so far.
    ended : dict of str to int
        Runs that have ended, by type of state; "PENDING" counts those that will never start.
    running : int
        Runs known to be running; most runners tell of a run only when it has ended.
    retries : int
        Attempts that failed and were followed by another one.
    nbytes : int
        Bytes that the runs returned.
    seconds : float
        Time spent in user code, summed over runs.
    first, last : float
        When the first known run began and the last one ended; 0 while unknown.
    """

    name: str
    is_flow: bool = False
    total: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    running: int = 0
    retries: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def done(self) -> int:
        """How many runs have ended, well or not."""
        return sum(self.ended.values())

    @property
    def failed(self) -> int:
        """How many runs failed or crashed."""
        return self.ended.get("FAILED", 0) + self.ended.get("CRASHED", 0)

    @property
    def is_done(self) -> bool:
        """Whether every known run has ended."""
        return self.done >= self.total

    @property
    def span(self) -> float:
        """Seconds from the begin of the first run to the end of the last one."""
        return max(0.0, self.last - self.first) if self.first else 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A task run that failed or crashed."""

    name: str
    message: str
    worker: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run that has ended.

    Attributes
    ----------
    state, message : str
        Name of the final state, and what it says.
    tasks, failed : int
        Task runs that ended, and those of them that failed or crashed.
    start, wall : float
        Seconds until the runner was ready, and from then to the end.
    overhead : float
        ``(wall × slots - Σ task time) / tasks`` in seconds, never negative: what is not spent in
        user code, waiting for work included.
    slots : int
        Tasks that could run at once.
    driver_peak, worker_peak : int
        Largest memory of the driver, and of any process that ran a task; 0 if unknown.
    driver_bytes : int
        Bytes of results that came to the driver.
    in_driver : bool
        Tasks ran in the driver's own process.
    """

    state: str
    message: str
    tasks: int
    failed: int
    start: float
    wall: float
    overhead: float
    slots: int
    driver_peak: int
    worker_peak: int
    driver_bytes: int
    in_driver: bool


class Board:
    """What is known of one root flow run, folded from its events.

    Parameters
    ----------
    root : str, optional
        Id of the run to follow; the first root flow run that shows up by default.

    Attributes
    ----------
    groups : dict
        One `Group` per task name, in the order of their first runs.
    runner : dict
        Body of the event "runner", empty until it has come.
    failures : list of Failure
        The first few.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root
        self.name = self.flow = ""
        self.state = self.state_type = self.message = ""
        self.made = self.began = self.ended = 0.0
        self.runner: dict[str, Any] = {}
        self.groups: dict[tuple[str, bool], Group] = {}
        self.failures: list[Failure] = []
        self.peak = self.driver_bytes = 0
        self._busy = 0.0
        self._runs: dict[str, Group] = {}
        self._names: dict[str, str] = {}
        self._maps: dict[str, _Map] = {}
        self._maps_at: dict[str, list[_Map]] = {}  # by the time in their ids, which their elements share
        self._running: set[str] = set()
        self._parents: set[str] = set()  # runs that submitted others: their time contains their children's
        self._parents_at: set[str] = set()
        self._fold: dict[str, Callable[[Event], None]] = {
            "flow_run": self._flow_run,
            "task_run": self._task_run,
            "map_run": self._map_run,
            "state": self._state,
            "states": self._states,
            "runner": self._runner,
        }

    def fold(self, events: Iterable[Event]) -> None:
        """Take events in, in their order."""
        for event in events:
            if self.root is None and event.kind == "flow_run" and event.run == event.root:
                self.root = event.root
            handler = self._fold.get(event.kind)
            if handler is not None and event.root == self.root:
                with contextlib.suppress(Exception):  # a display must not fail a run over an odd event
                    handler(event)

    # -- what there is ----------------------------------------------------------------------
    def _flow_run(self, event: Event) -> None:
        if event.run == self.root:
            self.name, self.flow = str(event.body["name"]), str(event.body["flow"])
            self.made = self.made or event.time

    def _runner(self, event: Event) -> None:
        if event.run == self.root:
            self.runner = event.body

    def _task_run(self, event: Event) -> None:
        group = self._group(event)
        self._names[event.run] = str(event.body.get("name") or group.name)
        if event.run not in self._runs and not event.body.get("map"):  # else a worker has made its name
            group.total += 1
            self._runs[event.run] = group

    def _map_run(self, event: Event) -> None:
        body, group = event.body, self._group(event)
        group.total += body["count"]
        found = self._maps.get(event.run)
        if found is None:
            found = self._maps[event.run] = _Map(event.run, group, str(body.get("name") or group.name))
            self._maps_at.setdefault(event.run[:12], []).append(found)
        found.add(body.get("start", 0), body["count"], body.get("names"))

    def _group(self, event: Event) -> Group:
        body = event.body
        key = (str(body["task"]), bool(body.get("child_flow_run")))
        if key not in self.groups:
            self.groups[key] = Group(*key)
        if body.get("parent"):
            self._parents.add(body["parent"])
            self._parents_at.add(body["parent"][:12])
        return self.groups[key]

    # -- what becomes of it -----------------------------------------------------------------
    def _state(self, event: Event) -> None:
        body = event.body
        if body.get("of") == "flow":
            self._flow_state(event)
            return
        if body.get("again"):  # it has been counted
            return
        run, kind, name = event.run, body["type"], body["name"]
        group = self._group_of(run)
        if group is None:
            return
        if name in {"Retrying", "AwaitingRetry"}:
            group.retries += 1
        if kind == "RUNNING" and run not in self._running:
            self._running.add(run)
            group.running += 1
        elif kind != "RUNNING" and run in self._running:
            self._running.discard(run)
            group.running -= 1
        self._spent(group, run, body.get("seconds") or 0.0, body.get("peak") or 0)
        if kind in FINAL or name == "NotReady":
            self._end(group, kind, 1, body.get("nbytes") or 0)
            self._mark(group, body.get("started") or event.time, event.time)
        if kind in {"FAILED", "CRASHED"} and len(self.failures) < FAILURES:
            error = body.get("error") or {}
            text = f"{error['type']}: {error['message']}" if error else str(body.get("message") or "")
            self.failures.append(
                Failure(self._name_of(run), text, str(body.get("worker") or ""), event.attempt)
            )

    def _states(self, event: Event) -> None:
        body, found = event.body, self._maps[event.run]
        if body.get("again"):
            return
        group, count = found.group, len(body["index"])
        for index, seconds, peak in zip(body["index"], body["seconds"], body["peak"], strict=True):
            run = element_id(found.id, index) if found.id[:12] in self._parents_at or self._running else ""
            if run in self._running:
                self._running.discard(run)
                group.running -= 1
            self._spent(group, run, seconds or 0.0, peak or 0)
        self._end(group, body["type"], count, sum(body["nbytes"]))
        begun = [moment for moment in body["started"] if moment]
        self._mark(group, min(begun, default=event.time), max(body["time"]))

    def _flow_state(self, event: Event) -> None:
        if event.run != self.root:
            return
        body = event.body
        self.state, self.state_type, self.message = body["name"], body["type"], str(body.get("message") or "")
        if self.state_type == "RUNNING" and not self.began:
            self.began = event.time
        if self.state_type in FINAL:
            self.ended = event.time
            self.driver_bytes = body.get("driver_bytes") or 0

    def _spent(self, group: Group, run: str, seconds: float, peak: int) -> None:
        group.seconds += seconds
        self.peak = max(self.peak, peak)
        if not group.is_flow and run not in self._parents:
            self._busy += seconds

    @staticmethod
    def _end(group: Group, kind: str, count: int, nbytes: int) -> None:
        group.ended[kind] = group.ended.get(kind, 0) + count
        group.nbytes += nbytes

    @staticmethod
    def _mark(group: Group, begun: float, ended: float) -> None:
        group.first = min(group.first or begun, begun)
        group.last = max(group.last, ended)

    def _group_of(self, run: str) -> Group | None:
        group = self._runs.get(run)
        if group is not None:
            return group
        maps = self._maps_at.get(run[:12], [])
        if len(maps) == 1:  # almost always: no other map was made in that millisecond
            return maps[0].group
        return next((one.group for one in maps if run in one.elements()), None)

    def _name_of(self, run: str) -> str:
        if run in self._names:
            return self._names[run]
        for found in self._maps_at.get(run[:12], []):
            if run not in self._runs and found.count <= NAMED and run in found.elements():
                return found.label(found.elements()[run])
        return self._names.get(run, f"run {run[-8:]}")

    # -- the end ----------------------------------------------------------------------------
    @property
    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self.state_type in FINAL

    @property
    def slots(self) -> int:
        """Tasks that can run at once; 0 while the runner is not known."""
        return int(self.runner.get("threads") or 0)

    def most_running(self) -> int:
        """Return an upper bound of how many task runs are running now."""
        open_runs = sum(group.total - group.done for group in self.groups.values() if not group.is_flow)
        return min(open_runs, self.slots) if self.slots else open_runs

    def summary(self) -> Summary:
        """Compute the figures; of a run that has not ended those of this moment."""
        groups = [group for group in self.groups.values() if not group.is_flow]
        tasks = sum(group.done - group.ended.get("PENDING", 0) for group in groups)
        end = self.ended or time.time()
        wall = max(0.0, end - self.began) if self.began else 0.0
        slots = self.slots or 1
        return Summary(
            state=self.state or "Pending",
            message=self.message,
            tasks=tasks,
            failed=sum(group.failed for group in groups),
            start=max(0.0, (self.began or end) - self.made) if self.made else 0.0,
            wall=wall,
            overhead=max(0.0, wall * slots - self._busy) / tasks if tasks else 0.0,
            slots=slots,
            driver_peak=_own_peak(),
            worker_peak=self.peak,
            driver_bytes=self.driver_bytes,
            in_driver=self.runner.get("name") in {"threads", "sequential"},
        )


class _Map:
    """One map: where its elements belong. Their ids are computed only if somebody asks."""

    def __init__(self, map_id: str, group: Group, name: str) -> None:
        self.id = map_id
        self.group = group
        self.name = name
        self.count = 0
        self._pieces: list[tuple[int, int, list[str] | None]] = []
        self._elements: dict[str, int] = {}

    def add(self, start: int, count: int, names: list[str] | None) -> None:
        """Take note of more elements."""
        self.count += count
        self._pieces.append((start, count, names))

    def elements(self) -> dict[str, int]:
        """Return the positions of the elements by their ids."""
        if len(self._elements) < self.count:
            for start, count, _ in self._pieces:
                self._elements.update(
                    (element_id(self.id, index), index) for index in range(start, start + count)
                )
        return self._elements

    def label(self, index: int) -> str:
        """Return the name of an element."""
        for start, count, names in self._pieces:
            if names and start <= index < start + count:
                return str(names[index - start])
        return f"{self.name}-{index}"


class Progress:
    """Follows a run of this process from the moment it is entered.

    Parameters
    ----------
    root : str, optional
        Id of the root flow run; the first one that shows up by default.

    Examples
    --------
    >>> with Progress() as progress:
    ...     my_flow()
    ...     progress.look().summary().tasks
    """

    def __init__(self, root: str | None = None) -> None:
        self.board = Board(root)
        self._events: deque[Event] = deque()
        self._unsubscribe: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        """Subscribe; all that the publishing threads do is to append."""
        self._unsubscribe = bus.subscribe(self._events.append)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Follow no longer."""
        if self._unsubscribe is not None:
            self._unsubscribe()

    def look(self) -> Board:
        """Fold what has come since the last look, in the calling thread; one thread at a time."""
        events = self._events
        self.board.fold(events.popleft() for _ in range(len(events)))
        return self.board


def _own_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # the kernels disagree about the unit
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
