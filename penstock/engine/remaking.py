"""Values that were lost with their worker after their run had completed: made again, and said so.

Nothing of it is silent: each time is an attempt of the run, opened by a state "Recomputed" whose
``reason`` is "lost_result". A run that must not be executed twice ends as crashed instead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import invoke, recipes
from penstock.engine.executions import spelled, was_executed
from penstock.engine.graph import sources_of
from penstock.engine.states import Position, StateType, advance

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.session import Session
    from penstock.runners.base import Key, Report

REASON = "lost_result"


def made_again(session: Session, runs: Sequence[TaskRun], report: Report) -> None:
    """The backend has lost a value, of one run or of a chunk, and has made it again by itself."""
    record = invoke.read_record(report.record)
    worker = report.worker or record["worker"]
    for run in runs:
        own: dict[str, Any] | None = record
        if record["status"] == "chunk":
            own = invoke.element_record(record, run.place)
        if own is None or own["status"] != "completed":
            _not_made_again(session, run, own, report)
        else:
            nbytes = own["nbytes"] if own is not record else max(report.nbytes, record["nbytes"])
            _made_again(session, run, own, nbytes, worker)


def _made_again(session: Session, run: TaskRun, record: dict[str, Any], nbytes: int, worker: str) -> None:
    lost = advance(run.position, StateType.PENDING, "Recomputed", run.attempt + 1)
    message = "its result was lost with the worker that held it, and made again"
    session.journal.task_passed(run, lost, message, reason=REASON)
    run.excuses += 1
    run.message = message
    run.worker = worker
    details = {"started": record["started"], "seconds": record["seconds"], "peak": record["peak"]}
    run.ended = time.time()
    run.nbytes = nbytes
    run.position = advance(lost, StateType.COMPLETED)  # in one step: whoever looks sees a run that has ended
    session.journal.task_state(run, **details)


def _not_made_again(session: Session, run: TaskRun, record: dict[str, Any] | None, report: Report) -> None:
    """The function has failed where it had returned before, or was not reached: the run's own retries decide."""
    if session.closing:  # nobody needs the value
        count_elsewhere(session, run, run.place, report)
        return
    message = f"the value of {run.name!r} was lost with its worker"
    if record is not None and record["status"] != "upstream":
        described = record.get("error") or {"type": "Error", "message": record["status"]}
        message += f", and making it again failed: {described['type']}: {described['message']}"
        _reopen(session, run, message)
    gone(session, run, errors.ResultLost(message))


def gone(session: Session, run: TaskRun, cause: Exception) -> bool:
    """A value is lost, and the backend will not make it: do so, if the run may be executed again.

    Returns
    -------
    bool
        Whether the value will exist again.
    """
    if run.stored is not None:  # whoever needs it reads the copy (`values`)
        return True
    run.done = False  # before it is in another state: whoever looks waits
    _count_death(session, run, cause)
    message = str(cause)
    options = run.task.options
    call = recipes.restored(run)
    if not options.idempotent:
        _give_up(session, run, f"{message}; it must not run twice, so it is not made again")
        return False
    if call is None or run.cancelling:
        _give_up(session, run, f"{message}; what it was made of no longer exists")
        return False
    _reopen(session, run, message)
    run.call, run.recipe = call, None
    _enter_anew(session, run)
    return True


def renew_inputs(session: Session, run: TaskRun, cause: Exception) -> bool:
    """See to the values that a run needs and that were lost; it had not begun, and is sent again.

    Returns
    -------
    bool
        False if a value that was put is lost, and cannot be put again.
    """
    upstreams = {id(source.run.ref): source.run for source in sources_of(run) if source.run is not None}
    lost = [one for one in upstreams.values() if one.session is session and one.completed]
    for ref in session.runner.missing([one.ref for one in lost if one.ref is not None]):
        if upstreams[id(ref)].completed:
            gone(session, upstreams[id(ref)], cause)
    for source in sources_of(run):
        if source.run is None and source.ref is not None and session.runner.missing([source.ref]):
            renewed = session.objects.put_again(source.ref)
            if renewed is None:
                return False
            source.ref = renewed
    if not run.done:
        _enter_again(session, run)
    return True


def _reopen(session: Session, run: TaskRun, message: str, **details: Any) -> None:
    run.excuses += 1
    run.position = advance(run.position, StateType.PENDING, "Recomputed", run.attempt + 1)
    run.message = message
    session.journal.task_state(run, reason=REASON, **details)


def _count_death(session: Session, run: TaskRun, cause: Exception) -> None:
    """The back end was making a lost value again when that worker died, too: an attempt more, if it was executed."""
    executed = _died(session, run.key, run.place, cause)
    if executed is not False:
        death = cause.__cause__
        _reopen(session, run, str(death), cause=type(death).__name__, began=spelled(executed))


def _died(session: Session, key: Key | None, place: int, cause: Exception | None) -> bool | None:
    """Answer whether a value's loss is that of a worker that was making it again, and had called its function."""
    death = cause.__cause__ if cause is not None else None
    if not isinstance(death, errors.CrashedRun):
        return False
    return was_executed(death, place, session.made.count(key))


def count_elsewhere(session: Session, run: TaskRun, place: int, report: Report) -> None:
    """Count what a back end has executed again of a run that has left its key meanwhile, or is not needed any more.

    Its state stays what it is: the attempt is told, and nothing follows from it.
    """
    if report.kind == "again":
        record = invoke.read_record(report.record)
        own = invoke.element_record(record, place) if record["status"] == "chunk" else record
        executed: bool | None = own is not None and own["status"] != "upstream"
    else:
        executed = _died(session, report.key, place, report.cause)
    if executed is False:
        return
    run.excuses += 1
    before = run.position
    run.position = Position(before.type, before.name, before.attempt + 1)
    details: dict[str, Any] = {"reason": REASON, "began": spelled(executed)}
    if run.done:
        details.update(started=run.started, seconds=max(run.ended - run.started, 0.0))
    session.journal.task_state(run, **details)


def _give_up(session: Session, run: TaskRun, message: str) -> None:
    """The value is gone for good; the run that had made it is told so, in an attempt that never began."""
    run.excuses += 1
    run.unbegun += 1
    run.error = errors.ResultLost(message).of_run(run.id)
    run.position = advance(run.position, StateType.CRASHED, None, run.attempt + 1)
    run.message = message
    run.ref = run.value = None
    run.done = True
    session.failures += 1
    session.journal.task_state(run, cause="ResultLost", began="no", reason=REASON)
    _recall(session, run)


def _enter_anew(session: Session, run: TaskRun) -> None:
    """Run again what had completed, and have the runs that need its value wait for it."""
    run.done = False
    run.ref = run.value = None
    session.made.forget(run)
    run.key, run.place = None, -1
    session.live[run] = None
    if run.flow_run is not None:
        run.flow_run.live[run] = None
        run.flow_run.finished -= 1
    session.enter(run, leading=False)
    _recall(session, run)


def _recall(session: Session, run: TaskRun) -> None:
    """Hold back what needs the value of a run, is not in the backend's hands, and lacks it now."""
    for one in list(session.live):
        here = one.key is None or one in session.buffer or one in session.quarantine
        if here and any(source.run is run for source in sources_of(one)):
            _enter_again(session, one)


def _enter_again(session: Session, run: TaskRun) -> None:
    """Send a run that has not begun, once its upstreams that are made again have ended."""
    session.dispatch.withdraw(run)
    dead = session.graph.reconnect(run)
    if dead is not None:
        session.endings.never(run, dead)
        return
    for dependant in session.graph.recalled(run):
        session.dispatch.withdraw(dependant)
    if run.waiting == 0:
        session.release(run)
