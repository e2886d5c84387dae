"""Wait for runs; inside a task, do here what has not been sent, so that depth never deadlocks.

A task that waits for its child holds a slot. If the child has not left the buffer, the task
takes it back and runs it in place, with its own id, states and record; else the slot is given
back while it waits. So 1,000 levels of nested submits need one worker and no further slot.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from penstock.engine import context, invoke, values
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.graph import sources_of
from penstock.engine.states import StateType, advance
from penstock.runners.base import UNSENT
from penstock.runners.worker.coroutines import in_thread
from penstock.runners.worker.execution import execute
from penstock.runners.worker.failure import Failed
from penstock.runners.worker.interruption import Cancelled, is_signal
from penstock.runners.worker.running import current

if TYPE_CHECKING:
    from penstock.engine.session import Session

HOP = 25  # task runs inside one another on one stack; deeper ones go on in a fresh thread


def wait(
    runs: Sequence[TaskRun],
    timeout: float | None = None,
    *,
    until_failure: bool = False,
    heed: bool = False,
) -> None:
    """Wait until runs have ended, or one has failed; no bytes move.

    Parameters
    ----------
    runs : sequence of TaskRun
        Of any sessions.
    timeout : float, optional
        Seconds for all of them together.
    until_failure : bool
        Return as soon as one has failed.
    heed : bool
        It is user code that waits: end it if the flow around it is to stop.
    """
    flow_run = None
    if heed:
        scope = context.current()
        flow_run = scope.flow_run if scope is not None else None
    deadline = None if timeout is None else time.monotonic() + timeout
    by_session: dict[Session, list[TaskRun]] = {}
    for run in runs:
        by_session.setdefault(run.carrier, []).append(run)
    for session, members in by_session.items():
        _wait(session, members, deadline, until_failure, flow_run)
        if until_failure and any(values.has_failed(run) for run in members):
            return


def _wait(
    session: Session,
    runs: list[TaskRun],
    deadline: float | None,
    until_failure: bool,
    flow_run: FlowRun | None,
) -> None:
    if current() is None:
        session.flush()
        _wait_here(session, runs, deadline, until_failure, flow_run)
        return
    _check(runs)
    while True:
        _do_here(session, runs)
        session.flush()
        pending = [run.ref for run in runs if not run.done and run.ref is not None]
        with contextlib.ExitStack() as stack:
            if not all(run.done for run in runs):
                stack.enter_context(
                    session.runner.blocked([ref for ref in pending if ref.handle is not UNSENT])
                )
            if _wait_here(session, runs, deadline, until_failure, None, inside=True):
                return


def _wait_here(
    session: Session,
    runs: list[TaskRun],
    deadline: float | None,
    until_failure: bool,
    flow_run: FlowRun | None,
    *,
    inside: bool = False,
) -> bool:
    """Wait; inside a task answer False as soon as there is a run that can be done here, such as a retry."""
    position, failures = 0, -1
    with session.changed:
        while True:
            while position < len(runs) and runs[position].done:
                position += 1
            if position == len(runs) and not session.hooks.hold_any(runs):
                return True
            heed_flow(flow_run)
            if until_failure and session.failures != failures:  # looks at all of them only if any failed
                failures = session.failures
                if any(values.has_failed(run) for run in runs):
                    return True
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return True
            if inside and any(run in session.buffer for run in runs):
                return False
            session.changed.wait(left)


def heed_flow(flow_run: FlowRun | None) -> None:
    """End user code whose flow run was asked to stop."""
    if flow_run is not None and flow_run.cancelled:
        raise Cancelled


@contextlib.contextmanager
def slot_given_back(run: TaskRun) -> Iterator[None]:
    """Inside a task, give its slot back while a coroutine awaits a run.

    Also while the run is on its way still: once it has arrived, it may need this very slot. Of
    several coroutines that await at once the first gives the slot back, and the last takes it again.
    """
    running = current()
    if running is None or run.done:
        yield
        return
    if not running.awaits:
        running.gap = run.carrier.runner.blocked([])
        running.gap.__enter__()
    running.awaits += 1
    try:
        yield
    finally:
        running.awaits -= 1
        if not running.awaits:
            gap, running.gap = running.gap, None
            gap.__exit__(None, None, None)


def kept_back(run: TaskRun) -> bool:
    """Whether the task that awaits a run can do it itself: it was not sent, and no other is done here."""
    running = current()
    if running is None or running.helps:
        return False
    with run.carrier.lock:
        running.helps = run.carrier.buffer.discard(run)
    return bool(running.helps)


def is_unsent(run: TaskRun) -> bool:
    """Whether a run waits in the buffer of its session."""
    with run.carrier.lock:
        return run in run.carrier.buffer


def let_go() -> None:
    """The run that was kept back has been done."""
    current().helps = False


def do_one_here(runs: Sequence[TaskRun]) -> None:
    """Inside a task, do the first of the runs here if it has not been sent."""
    if current() is not None:
        _do_here(runs[0].carrier, runs[:1])


def wait_any(runs: Sequence[TaskRun], deadline: float | None) -> None:
    """Inside a task, wait until one of the runs has ended, and do one here if it was not sent.

    Parameters
    ----------
    runs : sequence of TaskRun
        Not done when last looked at.
    deadline : float or None
        By the monotonic clock.
    """
    session = runs[0].carrier

    def ended() -> bool:
        return any(run.done and not session.hooks.holds(run) for run in runs)

    while not ended():
        with session.lock:
            unsent = next((run for run in runs if session.buffer.discard(run)), None)
        session.flush()
        if unsent is not None:
            _run_here(session, unsent)
            continue
        pending = [run.ref for run in runs if run.ref is not None and run.ref.handle is not UNSENT]
        with session.runner.blocked(pending), session.changed:
            while not ended() and not any(run in session.buffer for run in runs):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                session.changed.wait(left)


def surrounds(run: TaskRun, around: TaskRun | None) -> bool:
    """Whether `around`, or a run around it, is `run`."""
    while around is not None:
        if around is run:
            return True
        around = around.surrounding
    return False


def _check(runs: Iterable[TaskRun]) -> None:
    scope = context.current()
    around = scope.task_run if scope is not None else None
    for run in runs:
        if not run.done and surrounds(run, around):
            message = f"deadlock: {run.name!r} waits for itself."
            raise ValueError(message)


def _do_here(session: Session, runs: Sequence[TaskRun]) -> None:
    """Run in place what is not on its way yet; all but the last may go to others first."""
    mine = [run for run in runs if not run.done]
    if len(mine) > 1 and session.runner.info.threads > 1:
        with session.lock:
            kept = session.buffer.discard(mine[-1])
        session.flush()
        mine = mine[-1:] if kept else []
    for run in mine:
        _run_here(session, run)


def _run_here(session: Session, run: TaskRun) -> None:
    for source in list(sources_of(run)):
        if source.run is not None and not source.run.done:
            wait([source.run])
    order = _claim(session, run)
    if order is None:
        return  # it has ended, or is on its way
    call = run.call
    assert call is not None  # a run that was claimed has not ended
    attempt = (order, call.function, call.arguments, values.of_sources(session, call.sources))
    if run.inside % HOP == HOP - 1:  # a fresh thread has a fresh stack
        value, record = in_thread(execute, *attempt)
    else:
        value, record = execute(*attempt)
    session.ended_here(run, value, record)
    error = value.error if isinstance(value, Failed) else None
    if error is not None and is_signal(error):
        raise error
    outer = current()
    if outer is not None and outer.cancelled:  # the request to stop went to the code in place
        raise Cancelled


def _claim(session: Session, run: TaskRun) -> dict[str, object] | None:
    with session.lock:
        call = run.invocation()
        if run.done or run.waiting or call is None or run in session.quarantine:
            return None
        if run.key is not None:
            alone = run.place < 0  # an element that was sent with others cannot be taken back by itself
            if run.ref is None or run.ref.handle is UNSENT:
                return None
            if not alone or not session.runner.take_back(run.ref):
                return None
            session.dispatch.forget(run)
        session.buffer.discard(run)
        for dependant in session.graph.recalled(run):  # they cannot be sent ahead of what is done here
            session.dispatch.withdraw(dependant)
        run.released = True
        run.position = advance(run.position, StateType.RUNNING, None, run.next_attempt)
        order = invoke.work_order(run, call, session.luggage.prints_of(run))
        order["scope"] = session.scope_of(run)
        return order
