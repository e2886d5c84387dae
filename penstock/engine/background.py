"""Flows that run beside the code that submits them: each in a thread of its own, on the same runner."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock.engine import ambient, mapping
from penstock.engine.flow_run import steps
from penstock.engine.flow_scope import FlowRunScope
from penstock.engine.futures import PenstockFuture, PenstockFutureList
from penstock.engine.states import StateType
from penstock.engine.steps import drive, drive_awaiting
from penstock.runners.worker.coroutines import close_loop, run_coroutine

if TYPE_CHECKING:
    from penstock.engine.flow import Flow

AT_ONCE = 32
"""Runs of one map that go on at the same time."""


def submit(
    flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wait_for: Any
) -> PenstockFuture[Any]:
    """Start a child flow and return the future of its run."""
    future, work = _prepared(flow, args, kwargs, wait_for)
    if work is not None:
        threading.Thread(target=work, name=f"penstock-{future.name}", daemon=True).start()
    return future


def map_over(
    flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wait_for: Any
) -> PenstockFutureList[Any]:
    """Start a child flow for each element of the iterables among the arguments."""
    scope = ambient.scope_for_submit(flow.name)
    calls = mapping.calls(flow, scope, args, kwargs)
    prepared = [_prepared(flow, some, named, wait_for) for some, named in calls]
    waiting = deque(work for _, work in prepared if work is not None)

    def work_off() -> None:
        while True:
            try:
                work = waiting.popleft()
            except IndexError:
                return
            work()

    for number in range(min(AT_ONCE, len(waiting))):
        threading.Thread(target=work_off, name=f"penstock-{flow.name}-{number}", daemon=True).start()
    return PenstockFutureList(future for future, _ in prepared)


def _prepared(
    flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wait_for: Any
) -> tuple[PenstockFuture[Any], Callable[[], None] | None]:
    """Make the run, and what is to be done in its thread; None if the run is over already."""
    scope = ambient.scope_for_submit(flow.name)
    run = FlowRunScope(flow, scope, args, kwargs)
    row = run.make_in_background()
    future: PenstockFuture[Any] = PenstockFuture(row)
    if scope.session.plans:  # only a run has time that goes by
        row.value = drive(steps(run, wait_for, return_state=False))
        row.position, row.done = row.position.__class__(StateType.COMPLETED, "Completed", 1), True
        return future, None
    surrounding = contextvars.copy_context()

    def work() -> None:
        try:
            surrounding.run(_work, run, wait_for)
        finally:
            close_loop()

    return future, work


def _work(run: FlowRunScope, wait_for: Any) -> None:
    try:
        todo = steps(run, wait_for, return_state=True)
        if run.flow.isasync:
            run_coroutine(drive_awaiting(todo))
        else:
            drive(todo)
    except BaseException as error:  # its run tells; a thread has nobody to raise it to
        run.lost(error)
