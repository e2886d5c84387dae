"""Stop runs: drop what has not started, ask what runs, and say only what is true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.engine.calls import TaskRun
from penstock.engine.states import StateType, advance
from penstock.runners.base import UNSENT

if TYPE_CHECKING:
    from penstock.engine.session import Session


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
    for run in runs:
        if not run.done:
            by_session.setdefault(run.carrier, []).append(run)
    for session, members in by_session.items():
        _cancel(session, members, force)
    return bool(by_session)


def _cancel(session: Session, runs: list[TaskRun], force: bool) -> None:
    sent = []
    with session.changing():
        for run in runs:
            if run.done:
                continue
            if run.key is None or run.ref is None or run.ref.handle is UNSENT:
                session.withdraw(run)
                session.settle(run, StateType.CANCELLED, None, "Cancelled before it was sent.")
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
            session.give_up(key)
        for run in sent:
            if run.key in stopped and not run.done:
                session.settle(run, StateType.CANCELLED, None, "Cancelled before it started.")


def cancel_unstarted(runs: Sequence[TaskRun]) -> None:
    """Cancel what has not been sent, or waits for a worker that nobody has; leave the rest alone."""
    cancel([run for run in runs if run.key is None or run in run.carrier.unplaced])


def abandon(runs: Sequence[TaskRun]) -> None:
    """Give runs up that were asked to stop and do not: they are CANCELLED for us."""
    for run in runs:
        session = run.carrier
        with session.changing():
            if not run.done:
                session.forget(run)
                session.settle(
                    run, StateType.CANCELLED, None, "Cancelled; its code could not be interrupted."
                )
