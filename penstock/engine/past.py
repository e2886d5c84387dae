"""What a flow run did before it is resumed: each call is found again by what it calls, and when.

A flow that is deterministic makes the same calls in the same order, so the k-th call of a task in a
flow run (and, where tasks submit tasks, in a task run) is the k-th call of before: it gets the same
id, its stored result if there is one, else the next attempt. Nothing but the order and the inputs
of calls is compared; the ids of inputs are the same, because they were found in the same way.

That holds for the calls of one lane, the thread or asyncio task in which the code of the flow runs.
Calls from others come in any order: such a call is found again by what it is called with, where the
record tells that in full; another one is a new call, since a result must never go to the wrong one.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import results
from penstock.engine.events import element_id
from penstock.engine.states import Position, StateType
from penstock.engine.summary import describe_all, tells_all
from penstock.runners.worker import result_store
from penstock.runners.worker.result_formats import CommitError

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun, TaskRun

Found = dict[str, Any]
Lane = tuple[int, int]
"""A thread, and the asyncio task that runs in it."""

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def lane() -> Lane:
    """Return where the calling code runs."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return threading.get_ident(), 0
    return threading.get_ident(), id(task)


def is_beside(flow_run: FlowRun | None, around: object) -> bool:
    """Whether a call comes from another lane than that of its flow's code.

    Parameters
    ----------
    flow_run : FlowRun or None
        That it belongs to.
    around : object
        The task run that makes it; None if the code of the flow does.
    """
    return flow_run is not None and around is None and flow_run.lane is not None and lane() != flow_run.lane


class Past:
    """The calls that a root flow run, and the flow runs in it, had made.

    Parameters
    ----------
    told : mapping
        What `penstock.api.past.get_past` tells.
    rerun : sequence of str
        Names of tasks that may be executed again although they must not run twice.

    Attributes
    ----------
    reused, again, anew : int
        Task runs whose stored results were taken, those that had begun and are computed again, and calls from
        other lanes that were not found again.
    """

    def __init__(self, told: Mapping[str, Any], rerun: Sequence[str] = ()) -> None:
        self.reused = self.again = self.anew = 0
        self._lost = {run: (attempt, began) for run, attempt, began in lost(told)}
        self._rows = {one["row"] for one in told["flows"] if not one["over"]}
        self._rerun = frozenset(rerun)
        self._open = {one["id"]: one for one in told["flows"] if not StateType(one["type"]).is_final}
        self._gate = threading.Lock()
        self._calls: dict[tuple[str, str, str | None, str], deque[Found]] = {}
        self._orders: dict[str, deque[Found]] = {}  # of the calls in the code of each flow run
        self._maps: dict[str, Found] = {}
        self._beside: dict[tuple[str, str, str], list[Found]] = {}  # calls from other lanes than the flow's
        calls = [{**one, "kind": kind} for kind in ("task", "map", "flow") for one in told[f"{kind}s"]]
        for call in sorted((one for one in calls if not one["over"]), key=lambda one: one["made"]):
            if call["kind"] == "map":
                self._maps[call["id"]] = call
            if call["beside"]:
                self._beside.setdefault((call["kind"], call["flow_run"], call["task"]), []).append(call)
                continue
            key = (call["kind"], call["flow_run"], call["parent"], call["task"])
            self._calls.setdefault(key, deque()).append(call)
            if call["kind"] != "flow" and not call["parent"] and not call.get("child_flow_run"):
                self._orders.setdefault(call["flow_run"], deque()).append(call)

    def told(self) -> str:
        """Say in words what became of the calls of before."""
        anew = f", {self.anew} calls of other threads or asyncio tasks made anew" if self.anew else ""
        return f"{self.reused} task runs reused, {self.again} that had begun computed again{anew}"

    # -- calls ------------------------------------------------------------------------------
    def flow(
        self, parent: FlowRun, around: str | None, name: str, arguments: Mapping[str, Any] | None
    ) -> Found | None:
        """Return the flow run that a call within a flow run was; None if it is a new one."""
        if is_beside(parent, around):
            found = None if arguments is None else self._same("flow", parent, name, arguments, ())
        else:
            found = self._next("flow", parent, around, name)
        if found is not None:
            self._open.pop(found["id"], None)
        return found

    def task(self, run: TaskRun, arguments: Mapping[str, Any], parents: Sequence[tuple[str, str]]) -> bool:
        """Make a new task run the one that it was before; False if it is a new one."""
        flow_run = run.flow_run
        if flow_run is None:
            return False
        if run.child_flow_run is not None:  # stands for a flow run, which was found already
            return run.id in self._rows
        around = run.surrounding.id if run.surrounding is not None else None
        if is_beside(flow_run, around):
            found = self._same("task", flow_run, run.task.name, arguments, parents)
            if found is None:
                return self._is_barred(run, flow_run)
        else:
            found = self._next("task", flow_run, around, run.task.name)
            if found is None:
                return False
            described = describe_all(arguments)
            _compare(flow_run, run.task.name, "upstream", _edges(found["upstream"]), _edges(parents))
            _compare(flow_run, run.task.name, "parameters", _plain(found["parameters"]), _plain(described))
        run._id = found["id"]
        self._revive(run, found)
        return True

    def map(
        self, flow_run: FlowRun, around: str | None, name: str, count: int | None, *, idempotent: bool
    ) -> str | None:
        """Return the id that a map had before; None if it is a new one."""
        if is_beside(flow_run, around):  # what its elements are is nowhere told in full
            if not (idempotent or name in self._rerun) and self._begun("map", flow_run, name):
                raise _diverged(
                    flow_run,
                    f"it maps {name!r}, which must not run twice, from another thread or asyncio task than that of "
                    f"its own code, where calls cannot be told apart (--rerun {name} allows it)",
                )
            return None
        found = self._next("map", flow_run, around, name)
        if found is None:
            return None
        had = len(found["types"])
        if count is not None and count != had:
            _compare(flow_run, name, "number of elements", had, count)
        return str(found["id"])

    def elements(self, runs: Sequence[TaskRun]) -> bool:
        """Make new elements those that they were before; False if any of them is a new one."""
        found = self._maps.get(str(runs[0].map_id))
        if found is None:
            return False
        for run in runs:
            if run.index < len(found["types"]):
                columns = {"type": "types", "attempt": "attempts", "name": "names", "stored": "places"}
                self._revive(run, {name: found[column][run.index] for name, column in columns.items()})
        return runs[-1].index < len(found["types"])

    def _next(self, kind: str, flow_run: FlowRun, around: str | None, name: str) -> Found | None:
        with self._gate:
            waiting = self._calls.get((kind, flow_run.id, around, name))
            found = waiting.popleft() if waiting else None
            if kind != "flow" and around is None:
                self._in_order(flow_run, name, found)
        return found

    def _in_order(self, flow_run: FlowRun, name: str, found: Found | None) -> None:
        """Say where the code of a flow goes another way; that of an async one may depend on what is ready."""
        order = self._orders.get(flow_run.id)
        if not order or _is_coroutine(flow_run):
            return
        if found is None:
            raise _diverged(flow_run, f"it calls {name!r}, where it had called {order[0]['task']!r}")
        if order[0] is not found:
            raise _diverged(flow_run, f"it calls {name!r}, where it had called {order[0]['task']!r} first")
        order.popleft()

    # -- calls from other lanes ---------------------------------------------------------------
    def _same(
        self,
        kind: str,
        flow_run: FlowRun,
        name: str,
        arguments: Mapping[str, Any],
        parents: Sequence[tuple[str, str]],
    ) -> Found | None:
        """Take a call of the same function with the same inputs, where the record tells these in full."""
        described, edges = describe_all(arguments), _edges(parents)
        with self._gate:
            calls = self._beside.get((kind, flow_run.id, name), [])
            for place, found in enumerate(calls if tells_all(arguments) else ()):
                if found["parameters"] == described and (
                    kind == "flow" or _edges(found["upstream"]) == edges
                ):
                    return calls.pop(place)
            self.anew += kind == "task" and bool(calls)
        return None

    def _is_barred(self, run: TaskRun, flow_run: FlowRun) -> bool:
        """End a run that must not run twice, and may be one of those that had begun; else it is a new one."""
        if run.task.options.idempotent or run.task.name in self._rerun:
            return False
        found = self._begun("task", flow_run, run.task.name)
        if found is None:
            return False
        run._id = found["id"]
        self._bar(run, found["attempt"])
        return True

    def _begun(self, kind: str, flow_run: FlowRun, name: str) -> Found | None:
        """Take a call from another lane that may have begun."""
        with self._gate:
            calls = self._beside.get((kind, flow_run.id, name), [])
            for place, found in enumerate(calls):
                if found["id"] in self._lost or found.get("attempt") or any(found.get("attempts", ())):
                    return calls.pop(place)
        return None

    # -- what becomes of them ---------------------------------------------------------------
    def _revive(self, run: TaskRun, found: Mapping[str, Any]) -> None:
        attempt, kind, name = found["attempt"], found["type"], found["name"]
        under_way = self._lost.get(run.id)
        if under_way is not None:
            attempt, kind = under_way[0], "CRASHED"
        untouched = attempt == 0 and kind in {"PENDING", "CANCELLED", "SKIPPED"}
        stored = None if untouched or kind == "SKIPPED" else _stored(run, found)
        if stored is not None:
            self.reused += 1
            run.stored = run.hit = stored
            run.nbytes = int(stored.get("nbytes") or 0)
            if kind != "COMPLETED":
                run.message = "Its result had been stored before its driver died."
                attempt += under_way is None  # that attempt had another end
            run.position, run.done = Position(StateType.COMPLETED, "Completed", max(attempt, 1)), True
            run.call = run.mapped = None
            return
        if untouched or name == "NotReady":
            return
        if not run.task.options.idempotent and run.task.name not in self._rerun:
            self._bar(run, attempt)
            return
        self.again += 1
        run.excuses += attempt  # they cost none of its budgets, and count
        run.position = Position(StateType.PENDING, "Pending", attempt)

    def _bar(self, run: TaskRun, attempt: int) -> None:
        message = (
            f"attempt {attempt} of {run.name!r} may have begun before its driver died, and it must not run twice; "
            f"allow it with --rerun {run.task.name}."
        )
        run.error = errors.CrashedRun(message).of_run(run.id)
        run.position, run.done = Position(StateType.CRASHED, "Crashed", max(attempt, 1)), True
        run.message = message

    def settle(self, run: str) -> tuple[int, str] | None:
        """Return attempt and begin of a run that was under way when the driver died, once."""
        with self._gate:
            return self._lost.pop(run, None)

    @property
    def unsettled(self) -> list[str]:
        """Task runs that were under way, and that nobody has asked for again."""
        with self._gate:
            return list(self._lost)

    @property
    def unsettled_flows(self) -> list[Found]:
        """Nested flow runs that had not ended, and that nobody has called again."""
        return list(self._open.values())

    def left(self, flow_run: FlowRun) -> str:
        """Return which call a flow run had made and has not made again, empty if there is none."""
        order = self._orders.get(flow_run.id)
        return str(order[0]["task"]) if order and not _is_coroutine(flow_run) else ""


def _is_coroutine(flow_run: FlowRun) -> bool:
    return bool(getattr(flow_run.flow, "isasync", False))


def lost(told: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Return the task runs that were under way when the driver died: id, attempt, what is known of their begin."""
    found = []
    completed = {call["id"] for call in told["tasks"] if call["type"] == "COMPLETED"}
    for call in told["maps"]:
        completed.update(
            element_id(call["id"], n) for n, kind in enumerate(call["types"]) if kind == "COMPLETED"
        )
    for call in told["tasks"]:
        ready = all(run in completed for _, run in call["upstream"])
        found += _lost_one(call["id"], call["type"], call["name"], call["attempt"], ready)
    for call in told["maps"]:
        ready = all(run in completed for _, run in call["upstream"])
        for number, (kind, attempt, name) in enumerate(
            zip(call["types"], call["attempts"], call["names"], strict=True)
        ):
            others = (element_id(other, number + offset) for _, other, offset in call["upstream_maps"])
            own = ready and all(run in completed for run in others)
            found += _lost_one(element_id(call["id"], number), kind, name, attempt, own)
    return found


def _lost_one(run: str, kind: str, name: str, attempt: int, ready: bool) -> list[tuple[str, int, str]]:
    if name == "NotReady" or (kind and StateType(kind).is_final):
        return []
    # That an attempt begins is told only where somebody needs to know: it may have, if it could.
    return [(run, max(attempt, 1), "yes" if attempt else "unknown")] if ready or attempt else []


def _stored(run: TaskRun, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return where the result of a run lies, if its storage has it; nothing is read.

    The record tells where the result of a run is that completed, be it its own or one that was found
    by its cache key. A run that had stored its result, but could not say so any more, is looked up
    where it would have stored it, if that is known here.
    """
    order = results.commit_order(run)
    if order is None:
        return None
    over = found["type"] == "COMPLETED"
    if over and found["stored"]:
        order = results.order_at(found["stored"], order)
    try:
        return result_store.present(order, run.id, anybodys=over)
    except CommitError:
        return None


def _edges(edges: Sequence[Sequence[str]]) -> list[list[str]]:
    return sorted([str(name), str(run)] for name, run in edges)


def _plain(described: Mapping[str, str] | None) -> dict[str, str]:
    if not described or "…" in described:
        return {}
    return {name: _ADDRESS.sub("0x", text) for name, text in described.items()}


def _compare(flow_run: FlowRun, task: str, what: str, before: Any, now: Any) -> None:
    if before != now and (before or what != "parameters"):
        raise _diverged(
            flow_run, f"the {what} of its call of {task!r} were {_short(before)}, and are {_short(now)}"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _diverged(flow_run: FlowRun, what: str) -> errors.RunError:
    message = (
        f"flow run {flow_run.name!r} cannot go on where it stopped: {what}. "
        "Its code, or what it depends on, has changed; run it anew."
    )
    return errors.ResumeDiverged(message).of_run(flow_run.id)
