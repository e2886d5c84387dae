"""What the end of an attempt means for its run: the session's decisions, one for each cause."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import invoke, results
from penstock.engine.clock import clock
from penstock.engine.states import State, StateType, advance
from penstock.runners.base import UNSENT
from penstock.runners.remote_error import Failure
from penstock.runners.worker.failure import Failed

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.chunks import Chunk
    from penstock.engine.session import Session
    from penstock.runners.base import Key


def chunk_ended(session: Session, chunk: Chunk, record: dict[str, Any], worker: str) -> None:
    """A chunk has come to an end: each of its elements in its own way; some it may not have run at all."""
    worker = worker or record["worker"] or f"{record['host']}:{record['pid']}"
    done, odd = record["done"], record["odd"]
    session.made.add_chunk(chunk)
    _learn(chunk, record)
    place = -1
    for runs, column in zip(chunk.stages, record["stages"], strict=True):
        started, seconds, nbytes = column
        plain: list[int] = []
        for number, run in enumerate(runs):
            place += 1
            if run.done or run.key is not chunk.key:
                continue
            own = odd.get(place)
            if number >= done or (own is not None and _was_spared(run, own)):
                if own is not None and own["status"] == "cancelled":
                    _interrupted(session, run)
                not_run(session, run)
            elif own is not None or run.task.options.timeout_seconds is not None:
                element = invoke.element_record(record, place) or {}
                ended(session, run, element, nbytes[number], worker)
            else:
                run.started, run.nbytes, run.worker = started[number], nbytes[number], worker
                plain.append(number)
        if plain:
            session.endings.complete(
                [runs[number] for number in plain],
                [started[number] for number in plain],
                [seconds[number] for number in plain],
                record["peak"],
            )


def _was_spared(run: TaskRun, own: dict[str, Any]) -> bool:
    """Whether an element has to run again: it lacked what it needs, or another one was to be stopped."""
    return own["status"] == "upstream" or (own["status"] == "cancelled" and not run.cancelling)


def _interrupted(session: Session, run: TaskRun) -> None:
    """Its code was at work when another element was to be stopped: an attempt at no cost."""
    run.excuses += 1
    run.position = advance(run.position, StateType.PENDING, "Rescheduled")
    run.message = "interrupted, since another element of its chunk was to be stopped; it runs again"
    session.journal.task_state(run, cause="CancelledRun", began="unknown")


def _learn(chunk: Chunk, record: dict[str, Any]) -> None:
    """Tell the packers of a chunk what its elements took."""
    done = record["done"]
    if not done:
        return
    rest = max(record["seconds"] - sum(sum(seconds) for _, seconds, _ in record["stages"]), 0.0)
    for runs, (_, seconds, nbytes) in zip(chunk.stages, record["stages"], strict=True):
        mapped = runs[0].mapped
        packer = mapped.packer if mapped is not None else None
        if packer is not None:
            overhead = rest / len(chunk.stages)
            packer.learn((sum(seconds) + overhead) / done, sum(nbytes) / done, together=True)


def not_run(session: Session, run: TaskRun) -> None:
    """An element was not run by its chunk."""
    if run.cancelling:
        session.dispatch.forget(run)
        session.endings.settle(run, StateType.CANCELLED, None, "Cancelled before it started.")
    else:
        session.dispatch.put_back(run)


def started(session: Session, run: TaskRun) -> None:
    """User code begins: from now on its deadline runs."""
    if run.type is not StateType.PENDING:
        return
    run.position = advance(run.position, StateType.RUNNING)
    run.started = time.time()
    session.journal.task_state(run)
    if run.task.options.hooks.on_running:
        session.hooks.started(run)
    timeout = run.task.options.timeout_seconds
    if timeout is not None:
        key = run.key
        run.alarm = clock.call_later(timeout, lambda: session.later(lambda: expired(session, run, key)))


def expired(session: Session, run: TaskRun, key: Key | None) -> None:
    """The deadline of what was sent under a key has passed: it is over, whether its code stops or not."""
    if run.done or run.key is not key:
        return
    ref = run.ref
    session.dispatch.forget(run)
    if ref is not None and ref.handle is not UNSENT:
        force = session.runner.kills_on_timeout or run.task.options.timeout_action == "kill_worker"
        if not force or session.in_process:
            session.journal.lines(run, [[time.time(), "WARNING", _GOES_ON]], 0)
        clock.call_later(0, lambda: _stop(session, ref, force))
    _timed_out(session, run, {"started": run.started})


def _timed_out(session: Session, run: TaskRun, details: dict[str, Any]) -> None:
    message = f"Task run {run.name!r} exceeded timeout of {run.task.options.timeout_seconds} second(s)"
    _failed(session, run, "TimedOut", message, errors.TaskTimeout(message).of_run(run.id), details)


def _stop(session: Session, ref: Any, force: bool) -> None:
    with contextlib.suppress(Exception):  # the run is over; the backend may be too
        session.runner.cancel([ref], force=force)


def ended(session: Session, run: TaskRun, record: dict[str, Any], nbytes: int, worker: str) -> None:
    """User code has come to an end, well or not."""
    status = record["status"]
    if status == "upstream":
        return
    run.suspicions = 0  # its worker has survived it
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
    if "named" in record:
        session.journal.named(run, record["named"])
        if run.call is not None:
            run.call.naming = None  # once per run
    if "values" in record and run.transaction is not None:
        run.transaction.learn(record["values"])
    if run.task.options.hooks.on_running:
        session.hooks.started(run)
    if run.mapped is not None and run.mapped.packer is not None and run.place < 0:
        run.mapped.packer.learn(record["seconds"], run.nbytes, together=False)
    if "stored" in record:
        run.stored = record["stored"]
        details["stored"] = results.location(record["stored"])
        if record["stored"].get("duplicate"):
            session.journal.lines(run, [[run.started, "WARNING", _DUPLICATE]], 0)
    timeout = run.task.options.timeout_seconds
    if timeout is not None and record["seconds"] > timeout and not run.direct:
        _timed_out(session, run, details)  # it ended before the deadline was heard of
        return
    if "state" in record:
        _made_by_hand(session, run, record["state"], details)
        return
    if status == "completed":
        cached = "stored" in record and record["stored"].get("cached")
        session.endings.settle(run, StateType.COMPLETED, "Cached" if cached else None, **details)
        if run.stored is not None and not run.task.options.results.caching.in_memory:
            session.keep_stored_only(run)
        return
    described = record["error"]
    failure = _failure(run, described, record)
    if status == "cancelled":
        session.endings.settle(run, StateType.CANCELLED, None, "Cancelled while it ran.", **details)
    elif status == "skipped":
        session.endings.settle(run, StateType.SKIPPED, None, described["message"], **details)
    elif status == "crashed":
        run.error = failure
        text = _ABORTED.get(described["type"], "Execution was aborted.")
        session.endings.settle(
            run, StateType.CRASHED, None, text, cause=described["type"], error=_shown(described), **details
        )
    else:
        text = f"Task run encountered an exception: {described['type']}: {described['message']}"
        name = "TimedOut" if described["type"] == "TaskTimeout" else None
        if described["module"] == "penstock.errors":  # not the user's code: the storage, the way home
            details["cause"] = described["type"]
        _failed(session, run, name, text, failure, {**details, "error": _shown(described)})


_DUPLICATE = (
    "another attempt of this run had stored its result first; that one counts, this attempt's was dropped"
)
_GOES_ON = (
    "the run is over, its code was asked to stop: Python code stops at its next step, a call into C "
    "cannot be interrupted and occupies its worker until it returns"
)
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
        session.endings.settle(run, to, state["name"], state["message"], **details)
    elif to is StateType.FAILED:
        _failed(session, run, state["name"], state["message"], error, details)
    elif to.is_final:
        run.error = error.exception(run.id) if error is not None else None
        session.endings.settle(run, to, state["name"], state["message"], **details)
    else:
        text = f"Task run returned a state that is not final: {state['name']}"
        _failed(session, run, None, text, errors.UnfinishedRun(text).of_run(run.id), details)


def _failure(run: TaskRun, described: dict[str, Any], record: dict[str, Any]) -> Any:
    where = f"(task run {run.name!r}, attempt {record['attempt']}, on {run.worker})"
    handle = run.ref.handle if run.ref is not None else None
    if run.place >= 0 and isinstance(handle, list):
        handle = handle[run.place]
    own = handle.error if isinstance(handle, Failed) else None
    if own is None:
        return Failure(described, where)
    if where not in getattr(own, "__notes__", ()):
        own.add_note(where)
    return own


def _shown(described: dict[str, Any]) -> dict[str, str]:
    return {name: described[name] for name in ("type", "message", "text")}


def _failed(
    session: Session, run: TaskRun, name: str | None, message: str, error: Any, details: dict[str, Any]
) -> None:
    """User code failed: try again if the budget allows it."""
    run.failures += 1
    run.error = error
    options = run.task.options
    delay = options.retry.after_failure(run.failures)
    if delay is None or run.cancelling:
        session.endings.settle(run, StateType.FAILED, name, message, **details)
    elif options.retry_condition_fn is None:
        try_again(session, run, delay, message, details)
    else:
        _ask(session, run, delay, State(StateType.FAILED, name or "", message, error), details)


def _ask(session: Session, run: TaskRun, delay: float, state: State, details: dict[str, Any]) -> None:
    """Let the user's function say whether a run is tried again; it is called without the session's lock."""
    if run.alarm is not None:
        run.alarm.cancel()
        run.alarm = None
    if isinstance(run.error, Failure):
        run.error = run.error.exception(run.id)
    state.data = run.error
    state.state_details = {"task_run_id": run.id, "attempt": run.attempt}
    if not run.direct:
        session.dispatch.forget(run)  # the attempt is over, whatever becomes of its worker meanwhile
    failures = run.failures

    def decide(again: bool) -> None:
        if run.done or run.failures != failures:  # cancelled meanwhile
            return
        if again and not run.cancelling:
            try_again(session, run, delay, state.message, details)
        else:
            session.endings.settle(run, StateType.FAILED, state.name, state.message, **details)

    session.hooks.ask(run, state, decide)


def try_again(session: Session, run: TaskRun, delay: float, message: str, details: dict[str, Any]) -> None:
    """Start another attempt, after a delay if there is one."""
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
