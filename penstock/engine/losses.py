"""What the loss of an attempt means for its run: who is to blame, and what that costs.

`retries` pays for failures of user code, `crash_retries` for deaths that the run is guilty of. A
run that had not begun, or that was lost by what is no worker's death, pays nothing; one that
died in company is a suspect, see `quarantine`.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import outcomes, remaking
from penstock.engine.executions import spelled, was_executed
from penstock.engine.states import StateType, advance

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.chunks import Chunk
    from penstock.engine.session import Session
    from penstock.runners.base import Report

ROUNDS = 3
"""Losses in company after which a run is held guilty, so that nothing goes on for ever."""
EXCUSES = 20
"""Losses at no cost, of whatever cause, after which a run is given up."""


class Verdict(Enum):
    """What becomes of a run whose attempt was lost."""

    CRASHED = "it has ended"
    CHARGED = "it runs again, at the cost of its budget"
    SUSPECT = "it runs again at no cost, apart from others"
    EXCUSED = "it runs again at no cost"
    UNTOUCHED = "its attempt has not begun: the same attempt is sent again"


def judge(
    cause: Exception, *, idempotent: bool, budget: int, crashes: int, suspicions: int, excuses: int
) -> Verdict:
    """Decide; pure.

    Parameters
    ----------
    cause : Exception
        A `CrashedRun` says by ``began``, ``shared`` and ``excused`` what is known; see there.
    idempotent : bool
        The run may be executed again.
    budget, crashes : int
        `crash_retries`, and how much of it was spent before this loss.
    suspicions, excuses : int
        Losses in company, and losses at no cost, before this one.
    """
    began = getattr(cause, "began", None)
    if getattr(cause, "final", False):
        return Verdict.CRASHED
    if began is False and excuses < EXCUSES:
        return Verdict.UNTOUCHED
    if not idempotent:
        return Verdict.CRASHED
    excused = isinstance(cause, errors.SchedulerLost) or getattr(cause, "excused", False)
    if excused and excuses < EXCUSES:
        return Verdict.EXCUSED
    if getattr(cause, "shared", 0) and suspicions < ROUNDS:
        return Verdict.SUSPECT
    return Verdict.CHARGED if crashes < budget else Verdict.CRASHED


def lost(session: Session, run: TaskRun, report: Report) -> None:
    """The infrastructure failed while the run was in its hands."""
    cause = report.cause or errors.CrashedRun("the backend lost the task")
    run.worker = report.worker or run.worker
    if run.cancelling:
        session.endings.settle(run, StateType.CANCELLED, None, "Cancelled.")
        return
    if isinstance(cause, errors.CancelledRun):
        cause = errors.CrashedRun(f"the backend cancelled the task: {cause}")
    options = run.task.options
    if isinstance(cause, errors.ResultLost) and run.excuses < EXCUSES:
        _without_input(session, run, cause)
        return
    memory = isinstance(cause, errors.OutOfMemory)
    verdict = judge(
        cause,
        idempotent=options.idempotent,
        budget=options.retry.memory_retries if memory else options.retry.crash_retries,
        crashes=run.crashes,
        suspicions=run.suspicions,
        excuses=run.excuses,
    )
    run.error = cause.of_run(run.id) if isinstance(cause, errors.RunError) else cause
    details: dict[str, Any] = {"cause": type(cause).__name__, "began": spelled(getattr(cause, "began", None))}
    message = _message(cause, run.attempt)
    if verdict is Verdict.CRASHED:
        if not options.idempotent and getattr(cause, "began", None) is not False:
            message += "; it is not tried again, since it may have begun and must not run twice"
        session.endings.settle(run, StateType.CRASHED, None, message, **details)
    elif verdict is Verdict.CHARGED:
        run.crashes += 1
        outcomes.try_again(session, run, 0.0, message, details)
    elif verdict is Verdict.SUSPECT:
        run.suspicions += 1
        details["began"] = _excuse(run, was_executed(cause))
        details["shared"] = getattr(cause, "shared", 0)
        _wait_again(session, run, "Quarantined", f"{message}; it runs again apart from others", details)
    elif verdict is Verdict.EXCUSED:
        details["began"] = _excuse(run, was_executed(cause))
        outcomes.try_again(session, run, 0.0, message, details)
    else:
        _excuse(run, False)
        _wait_again(session, run, "Rescheduled", message, details)


def _excuse(run: TaskRun, executed: bool | None) -> str:
    """A loss at no cost, and no attempt either if the function had not been called; answer how that is spelled."""
    run.excuses += 1
    run.unbegun += executed is False
    return spelled(executed)


def chunk_lost(session: Session, chunk: Chunk, report: Report) -> None:
    """A chunk was lost: whatever has no record of its end runs again.

    If its worker died, only the element that ran at that moment is to blame, in the stage that was at
    its turn. What had its turn before has run, and runs again at no cost; what comes behind had not
    begun. Where nobody can tell which one it was, all of them go alone from now on, and the next loss
    tells.
    """
    cause = report.cause
    if not isinstance(cause, (errors.WorkerLost, errors.OutOfMemory, errors.CancelledRun)):
        for run in list(chunk.runs):
            if not run.done and run.key is chunk.key:
                lost(session, run, report)
        return
    element = getattr(cause, "element", None)
    killed = not isinstance(cause, errors.CancelledRun) and cause.began is not False
    left = [(place, run) for place, run in enumerate(chunk.runs) if not run.done and run.key is chunk.key]
    for place, run in left:  # before any is put back: that takes back what follows it
        executed = was_executed(cause, place, chunk.count)
        known = executed or (executed is None and killed)
        if known and not run.cancelling and not (killed and place == element):
            _not_to_blame(session, run, cause, executed)
    for place, run in left:
        if killed and place == element:
            lost(session, run, report)
        elif run.key is chunk.key and not run.done:
            outcomes.not_run(session, run)
    if killed and element is None:
        for stage in chunk.stages:
            mapped = next((run.mapped for run in stage if run.mapped is not None), None)
            if mapped is not None and mapped.packer is not None:
                mapped.packer.part()


def _not_to_blame(session: Session, run: TaskRun, cause: Exception, executed: bool | None) -> None:
    """An element has run for nothing: its chunk was lost because of another one."""
    why = "which another element may have killed"
    if isinstance(cause, errors.CancelledRun):
        why = "which was ended to stop another element"
    details = {"cause": type(cause).__name__, "began": _excuse(run, executed)}
    _note(session, run, "Rescheduled", f"lost with its worker, {why}: {cause}", details)


def _without_input(session: Session, run: TaskRun, cause: errors.ResultLost) -> None:
    """A value that the run needs was lost before it began."""
    run.excuses += 1
    run.unbegun += 1
    details = {"cause": "ResultLost", "began": "no"}
    _note(session, run, "Rescheduled", str(cause), details)
    if not remaking.renew_inputs(session, run, cause) and not run.done:
        message = f"{cause}; the object that was put may have changed since, so it is not put again"
        run.error = errors.ResultLost(message).of_run(run.id)
        session.endings.settle(run, StateType.CRASHED, None, message, **details)


def _message(cause: Exception, attempt: int) -> str:
    """Name the attempt; back ends know nothing of attempts."""
    text = str(cause)
    return text if "attempt" in text else f"{text} (attempt {attempt})"


def _wait_again(session: Session, run: TaskRun, name: str, message: str, details: dict[str, Any]) -> None:
    _note(session, run, name, message, details)
    session.again(run, 0.0)


def _note(session: Session, run: TaskRun, name: str, message: str, details: dict[str, Any]) -> None:
    if run.alarm is not None:
        run.alarm.cancel()
        run.alarm = None
    run.position = advance(run.position, StateType.PENDING, name)
    run.message = message
    session.journal.task_state(run, **details)
