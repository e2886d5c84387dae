"""Stop runs: drop what has not started, ask what runs, and say only what is true."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import waiting
from penstock.engine.calls import TaskRun
from penstock.engine.living import living
from penstock.engine.states import StateType, advance
from penstock.runners.base import UNSENT

if TYPE_CHECKING:
    from penstock.engine.session import Session

GRACE = 2.0  # seconds that code which was asked to stop may take before it is ended by force


def cancel_flow(run_id: str, *, force: bool = False) -> bool:
    """Ask a flow run of this process to stop, with its tasks and its nested flows, and nothing else.

    It is CANCELLING until its code has really ended, then CANCELLED; whoever called it gets a
    `CancelledRun`.

    Parameters
    ----------
    run_id : str
        Of the flow run, at the top or nested.
    force : bool
        End the processes that run its tasks.

    Returns
    -------
    bool
        Whether it will stop; False if it is not known here or has ended.
    """
    flow = living.flow(run_id)
    return flow is not None and flow.stop(force=force)


def cancel_run(run_id: str, by: str) -> bool:
    """Do what somebody asks for from outside: stop a run of this process; returns at once.

    It is CANCELLING until its code has ended. Code that does not end within moments is ended by
    force where its process is ours to end, else given up. A flow run within another is cancelled
    alone: its caller gets a `CancelledRun` that says who asked.

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
        aside(lambda: stop(found, patient=True))
    else:
        reason = errors.CancelledRun(f"Cancelled by {by}.").of_run(found.flow_run.id)
        aside(lambda: found.stop(reason))
    return True


def lose(run_id: str, error: errors.RunOwnedElsewhere) -> None:
    """Somebody else has taken a root flow run: end it here; what it still writes down is stale."""
    owned = living.roots.get(run_id)
    if owned is not None and not owned.lost:
        owned.lost = True
        flow = living.flow(run_id)
        if flow is not None:
            aside(lambda: flow.stop(error))


def stop(runs: Sequence[TaskRun], *, force: bool = True, patient: bool = False) -> None:
    """Stop runs within moments: ask, then end the processes that run them, then give up what cannot be interrupted.

    Parameters
    ----------
    runs : sequence of TaskRun
        Of any sessions.
    force : bool
        End processes.
    patient : bool
        Give nothing up: it stays CANCELLING until it ends.
    """
    cancel(runs)
    waiting.wait(runs, GRACE)
    if force:
        cancel(runs, force=True)
        if not patient:
            waiting.wait(runs, GRACE)
    if not patient:
        abandon(runs)


def aside(call: Callable[[], Any]) -> None:
    """Do something that may take seconds in a thread of its own; what it raises concerns nobody."""

    def work() -> None:
        with contextlib.suppress(Exception):
            call()

    threading.Thread(target=work, name="penstock-cancel", daemon=True).start()


def cancel(runs: Sequence[TaskRun], *, force: bool = False) -> bool:
    """Ask runs to stop.

    Parameters
    ----------
    runs : sequence of TaskRun
        Of any sessions; those that have ended are left alone.
    force : bool
        End the processes that run them.

    Returns
    -------
    bool
        Whether any of them will end CANCELLED.
    """
    by_session: dict[Session, list[TaskRun]] = {}
    stopped = False
    for run in runs:
        if not run.done and run.child_flow_run is not None:
            stopped = cancel_flow(run.child_flow_run, force=force) or stopped
        elif not run.done:
            by_session.setdefault(run.carrier, []).append(run)
    for session, members in by_session.items():
        _cancel(session, members, force)
    return stopped or bool(by_session)


def _cancel(session: Session, runs: list[TaskRun], force: bool) -> None:
    sent = []
    with session.changing():
        for run in runs:
            if run.done:
                continue
            if run.key is None or run.ref is None or run.ref.handle is UNSENT:
                session.dispatch.withdraw(run)
                session.endings.settle(run, StateType.CANCELLED, None, "Cancelled before it was sent.")
                continue
            if not run.cancelling:
                run.cancelling = True
                run.position = advance(run.position, StateType.CANCELLING)
                session.journal.task_state(run)
            sent.append(run)
    if not sent:
        return
    refs = {run.ref.key: run.ref for run in sent if run.ref is not None}  # a chunk is stopped once for all
    stopped = set(session.runner.cancel(list(refs.values()), force=force))
    with session.changing():
        for key in stopped:
            session.dispatch.give_up(key)
        for run in sent:
            if run.key in stopped and not run.done:
                session.endings.settle(run, StateType.CANCELLED, None, "Cancelled before it started.")


def cancel_unstarted(runs: Sequence[TaskRun]) -> None:
    """Cancel what has not been sent, or waits for a worker that nobody has; leave the rest alone."""
    unsent = [run for run in runs if run.key is None or run in run.carrier.lookout.unplaced]
    cancel([run for run in unsent if run.child_flow_run is None])


def abandon(runs: Sequence[TaskRun]) -> None:
    """Give runs up that were asked to stop and do not: they are CANCELLED for us."""
    for run in runs:
        session = run.carrier
        with session.changing():
            if not run.done:
                session.dispatch.forget(run)
                session.endings.settle(
                    run, StateType.CANCELLED, None, "Cancelled; its code could not be interrupted."
                )
