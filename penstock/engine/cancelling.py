"""Stop runs: drop what has not started, ask what runs, and say only what is true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from penstock.engine.calls import TaskRun
from penstock.engine.states import StateType, advance
from penstock.runners.base import UNSENT

if TYPE_CHECKING:
    from penstock.engine.session import Session


class LiveFlow(Protocol):
    """A flow run of this process that has not ended."""

    def stop(self, *, force: bool = False) -> bool:
        """Ask it to stop; answer whether it will."""


_flows: dict[str, LiveFlow] = {}


def enlist(run_id: str, flow: LiveFlow) -> None:
    """Let a flow run be found by its id while it lives."""
    _flows[run_id] = flow


def strike_off(run_id: str) -> None:
    """A flow run has ended."""
    _flows.pop(run_id, None)


def live_flows() -> list[LiveFlow]:
    """Return the flow runs of this process that have not ended."""
    return list(_flows.values())


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
    flow = _flows.get(run_id)
    return flow is not None and flow.stop(force=force)


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
    unsent = [run for run in runs if run.key is None or run in run.carrier.unplaced]
    cancel([run for run in unsent if run.child_flow_run is None])


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
