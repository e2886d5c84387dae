"""What the end of an attempt means for its run: the session's decisions, one for each cause."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine.clock import clock
from penstock.engine.failure import Failure
from penstock.engine.states import State, StateType, advance
from penstock.runners import worker_runtime
from penstock.runners.base import UNSENT

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.session import Session
    from penstock.runners.base import Report


def started(session: Session, run: TaskRun) -> None:
    """User code begins: from now on its deadline runs."""
    if run.type is not StateType.PENDING:
        return
    run.position = advance(run.position, StateType.RUNNING)
    run.started = time.time()
    session.journal.task_state(run)
    timeout = run.task.options.timeout_seconds
    if timeout is not None:
        attempt = run.attempt
        run.alarm = clock.call_later(timeout, lambda: session.later(lambda: expired(session, run, attempt)))


def expired(session: Session, run: TaskRun, attempt: int) -> None:
    """The deadline has passed: the run is over, whether its code stops or not."""
    if run.done or run.attempt != attempt:
        return
    ref = run.ref
    session.forget(run)
    if ref is not None and ref.handle is not UNSENT:
        clock.call_later(0, lambda: _stop(session, ref))
    _timed_out(session, run, {"started": run.started})


def _timed_out(session: Session, run: TaskRun, details: dict[str, Any]) -> None:
    message = f"Task run {run.name!r} exceeded timeout of {run.task.options.timeout_seconds} second(s)"
    _failed(session, run, "TimedOut", message, errors.TaskTimeout(message).of_run(run.id), details)


def _stop(session: Session, ref: Any) -> None:
    with contextlib.suppress(Exception):  # the run is over; the backend may be too
        session.runner.cancel([ref], force=session.runner.kills_on_timeout)


def ended(session: Session, run: TaskRun, record: dict[str, Any], nbytes: int, worker: str) -> None:
    """User code has come to an end, well or not."""
    status = record["status"]
    if status == "upstream":
        return
    run.started, run.nbytes = record["started"], max(nbytes, record["nbytes"])
    if "yielded" in record:
        run.yielded, run.nbytes = record["yielded"], sum(item.nbytes for item in run.items or ())
        run.ref = None  # the value is the list of the items: made when somebody wants it
    elif run.items is not None and status == "completed":
        run.items = None  # it was done in place: its value is a list
    run.worker = worker or record["worker"] or f"{record['host']}:{record['pid']}"
    lines, dropped = [list(line) for line in record.get("logs", ())], record.get("dropped", 0)
    if run.tracked:
        session.journal.lines(run, lines, dropped)
    if "children" in record:
        session.journal.absorb(record["children"])
    details = {"started": record["started"], "seconds": record["seconds"], "peak": record["peak"]}
    timeout = run.task.options.timeout_seconds
    if timeout is not None and record["seconds"] > timeout and not run.direct:
        _timed_out(session, run, details)  # it ended before the deadline was heard of
        return
    if "state" in record:
        _made_by_hand(session, run, record["state"], details)
        return
    if status == "completed":
        session.settle(run, StateType.COMPLETED, **details)
        return
    described = record["error"]
    failure = _failure(run, described, record)
    if status == "cancelled":
        session.settle(run, StateType.CANCELLED, None, "Cancelled while it ran.", **details)
    elif status == "skipped":
        session.settle(run, StateType.SKIPPED, None, described["message"], **details)
    elif status == "crashed":
        run.error = failure
        text = _ABORTED.get(described["type"], "Execution was aborted.")
        session.settle(
            run, StateType.CRASHED, None, text, cause=described["type"], error=_shown(described), **details
        )
    else:
        text = f"Task run encountered an exception: {described['type']}: {described['message']}"
        name = "TimedOut" if described["type"] == "TaskTimeout" else None
        _failed(session, run, name, text, failure, {**details, "error": _shown(described)})


_ABORTED = {
    "KeyboardInterrupt": "Execution was aborted by an interrupt signal.",
    "SystemExit": "Execution was aborted by Python system exit call.",
}


def _made_by_hand(session: Session, run: TaskRun, state: dict[str, Any], details: dict[str, Any]) -> None:
    """The function returned a state: the run ends as it says; a failed one counts as a failure."""
    described = state.get("error")
    error = Failure(described, "") if described else None
    to = StateType(state["type"])
    if to is StateType.COMPLETED:
        session.settle(run, to, state["name"], state["message"], **details)
    elif to is StateType.FAILED:
        _failed(session, run, state["name"], state["message"], error, details)
    elif to.is_final:
        run.error = error.exception(run.id) if error is not None else None
        session.settle(run, to, state["name"], state["message"], **details)
    else:
        text = f"Task run returned a state that is not final: {state['name']}"
        _failed(session, run, None, text, errors.UnfinishedRun(text).of_run(run.id), details)


def _failure(run: TaskRun, described: dict[str, Any], record: dict[str, Any]) -> Any:
    where = f"(task run {run.name!r}, attempt {record['attempt']}, on {run.worker})"
    handle = run.ref.handle if run.ref is not None else None
    own = handle.error if isinstance(handle, worker_runtime.Failed) else None
    return own if own is not None else Failure(described, where)


def _shown(described: dict[str, Any]) -> dict[str, str]:
    return {name: described[name] for name in ("type", "message", "text")}


def _failed(
    session: Session, run: TaskRun, name: str | None, message: str, error: Any, details: dict[str, Any]
) -> None:
    """User code failed: try again if the budget allows it."""
    run.failures += 1
    run.error = error
    policy = run.task.options.retry
    delay = policy.after_failure(run.failures)
    if delay is None or run.cancelling or not _wants_retry(session, run, name, message):
        session.settle(run, StateType.FAILED, name, message, **details)
        return
    _try_again(session, run, delay, message, details)


def _wants_retry(session: Session, run: TaskRun, name: str | None, message: str) -> bool:
    condition = run.task.options.retry_condition_fn
    if condition is None:
        return True
    error = run.error.exception(run.id) if isinstance(run.error, Failure) else run.error
    state = State(StateType.FAILED, name or "", message, error, {"task_run_id": run.id})
    try:
        return bool(condition(run.task, run, state))
    except Exception as problem:  # a condition that fails means no retry
        lines = [[run.ended, "ERROR", f"retry_condition_fn raised {problem!r}: no retry"]]
        session.journal.lines(run, lines, 0)
        return False


def lost(session: Session, run: TaskRun, report: Report) -> None:
    """The infrastructure failed while the run was in its hands."""
    cause = report.cause or errors.CrashedRun("the backend lost the task")
    run.worker = report.worker or run.worker
    if run.cancelling:
        session.settle(run, StateType.CANCELLED, None, "Cancelled.")
        return
    if isinstance(cause, errors.CancelledRun):
        cause = errors.CrashedRun(f"the backend cancelled the task: {cause}")
    run.crashes += 1
    run.error = cause.of_run(run.id) if isinstance(cause, errors.RunError) else cause
    message = str(cause)
    details = {"cause": type(cause).__name__}
    policy = run.task.options.retry
    delay = policy.after_crash(run.crashes) if run.task.options.idempotent else None
    if delay is None:
        session.settle(run, StateType.CRASHED, None, message, **details)
    else:
        _try_again(session, run, delay, message, details)


def _try_again(session: Session, run: TaskRun, delay: float, message: str, details: dict[str, Any]) -> None:
    if run.alarm is not None:
        run.alarm.cancel()
        run.alarm = None
    run.position = advance(run.position, StateType.RUNNING, "Retrying") if not delay else run.position
    if delay:
        run.position = advance(_running(run), StateType.SCHEDULED, "AwaitingRetry")
    run.message = message
    session.journal.task_state(run, **details)
    session.again(run, delay)


def _running(run: TaskRun) -> Any:
    if run.type is StateType.PENDING:
        return advance(run.position, StateType.RUNNING)
    return run.position
