"""Values, exceptions and states of runs, for whoever asks; the only place that fetches."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import lookups
from penstock.engine import results as stored
from penstock.engine.annotations import SKIPPED_AS_NONE, SKIPPED_AS_STATE
from penstock.engine.calls import Source, TaskRun
from penstock.engine.states import State, StateType, Stored, failure_of
from penstock.runners.remote_error import Failure
from penstock.runners.worker.sizes import size_of

if TYPE_CHECKING:
    from penstock.engine.session import Session


KEPT = 16 << 20
"""Bytes of a chunk that stay here after one of its elements was asked for, until another chunk is."""


REMADE_SECONDS = 60.0  # that a value which was lost after its run had ended may take to be made again


def is_at_hand(run: TaskRun) -> bool:
    """Whether the value of a run is in this process already."""
    if run.items is not None and run.completed:
        return run.value is not None
    if isinstance(run.value, Stored):  # of a flow in the background, with references in it
        return False
    if lookups.is_stored(run):
        return run.value is not None
    return not run.completed or run.value is not None or run.ref is None or run.carrier.in_process


def results(runs: Sequence[TaskRun], *, raise_on_failure: bool = True) -> list[Any]:
    """Return the values of runs that have ended, all of a session fetched in one request.

    Parameters
    ----------
    runs : sequence of TaskRun
        All done.
    raise_on_failure : bool
        False puts exceptions in the place of values.
    """
    found: dict[TaskRun, Any] = {}
    late: set[TaskRun] = set()
    wanted: dict[Any, list[TaskRun]] = {}
    for run in runs:
        if not run.completed and run.session is not None:
            # Its value may have been lost this very moment: never look between two of its states.
            with run.carrier.changed:
                if not run.carrier.changed.wait_for(lambda run=run: run.done, REMADE_SECONDS):  # type: ignore[misc]
                    late.add(run)
        if run.items is not None:
            _gather(run)
        value, away = run.value, run.child_flow_run is not None and isinstance(run.value, Stored)
        if away:
            value = run.value.load()
            if run.value.keeps:  # else it is read for each that asks
                run.value = value
        if run.completed and (value is not None or away):
            found[run] = value
        elif run.completed and run.ref is not None:
            wanted.setdefault(run.carrier, []).append(run)
    for session, members in wanted.items():
        try:
            found.update(_fetch(session, members))
        except errors.ResultLost as loss:
            if session.renew(members, loss):
                return results(runs, raise_on_failure=raise_on_failure)
            raise
    given = []
    for run in runs:
        if run in found:
            given.append(found[run])
            continue
        error = exception_of(run)
        if (not run.done and run not in late) or (run.completed and run.ref is not None):  # lost meanwhile
            return results(runs, raise_on_failure=raise_on_failure)
        if error is not None and raise_on_failure:
            raise error
        if lookups.is_stored(run) and run.value is None:
            given.append(_read(run))
            continue
        given.append(run.value if error is None else error)
    return given


_reading = threading.Lock()


def _read(run: TaskRun) -> Any:
    """Read a value that lies in a storage, once for all who ask, if it may be kept here."""
    if not run.task.options.results.caching.in_memory:
        return stored.load(run)
    with _reading:
        if run.value is None:
            run.value = stored.load(run)
        return run.value


def _fetch(session: Session, runs: Sequence[TaskRun]) -> dict[TaskRun, Any]:
    """Bring the values of completed runs here; a chunk comes once for all its elements.

    A stored copy takes the place of a value that is gone. Runs whose value is lost meanwhile are left out.
    """
    held = [(run, ref, run.place) for run in runs if (ref := run.ref) is not None]
    held = [one for one in held if one[0].ref is one[1]]  # else its place may be another one's already
    refs = {ref.key: ref for _, ref, _ in held}
    known = session.fetched
    missing = [ref for ref in refs.values() if ref not in known]
    try:
        fetched = dict(
            zip([ref.key for ref in missing], session.runner.fetch(missing) if missing else [], strict=True)
        )
    except Exception as error:
        closed = not session.runner.is_open
        if not closed and not isinstance(error, errors.ResultLost):
            raise
        if len(refs) > 1:  # some may still be there
            parts = [_fetch(session, [run for run, ref, _ in held if ref.key == key]) for key in refs]
            return {run: value for part in parts for run, value in part.items()}
        for run, _, _ in held:
            if run.stored is None and not closed:
                raise
            run.value = stored.load(run)
        return {run: run.value for run, _, _ in held}
    found: dict[TaskRun, Any] = {}
    for run, ref, place in held:
        value = fetched[ref.key] if ref.key in fetched else known[ref]
        found[run] = value if place < 0 else value[place]
        if run.ref is ref:
            run.value = found[run]
        if not session.in_process:
            session.bytes_fetched += run.nbytes
    if len(refs) == 1 and held[0][2] >= 0 and fetched and not session.in_process:
        # Who asks for one element mostly asks for its neighbour next. Nobody can once all are dropped.
        value = next(iter(fetched.values()))
        small = size_of(value) <= KEPT
        session.fetched = weakref.WeakKeyDictionary({missing[0]: value} if small else {})
    return found


def _gather(run: TaskRun) -> None:
    """Make the list that is the value of a generator which gave its items one by one."""
    if run.items is None or not run.completed or run.value is not None:
        return
    if run.yielded != len(run.items):
        message = f"of the {run.yielded} items of {run.name!r} only {len(run.items)} have arrived."
        raise errors.ResultLost(message).of_run(run.id)
    run.value = results(run.items)


def exception_of(run: TaskRun) -> BaseException | None:
    """Return the exception of a run that has ended, None if it completed or was skipped."""
    if run.completed or run.type is StateType.SKIPPED:
        return None
    if isinstance(run.error, Failure):
        run.error = run.error.exception(run.id)
    if run.error is None:
        run.error = failure_of(State(run.type, run.state_name, run.message, None, {"task_run_id": run.id}))
    return run.error


def has_failed(run: TaskRun) -> bool:
    """Whether a run has ended without a value, and was not skipped."""
    return run.done and not run.completed and run.type is not StateType.SKIPPED


def state_of(run: TaskRun) -> State:
    """Make the state that users see; its data stays where it is."""
    data: Any = None
    if run.completed:
        data = Value(run)
    elif has_failed(run):
        data = exception_of(run)
    details: dict[str, Any] = {"task_run_id": run.id, "attempt": run.attempt}
    if run.flow_run is not None:
        details["flow_run_id"] = run.flow_run.id
    if run.type is StateType.SKIPPED and isinstance(run.error, errors.Skip):
        details["upstream"] = run.error.run_id
    if run.stored is not None:
        details["stored"] = stored.location(run.stored)
    if run.child_flow_run is not None:
        details["child_flow_run_id"] = run.child_flow_run
    return State(run.type, run.state_name, run.message, data, details, run.ended or time.time())


def of_sources(session: Any, sources: Sequence[Source]) -> list[Any]:
    """Return the values behind the slots of a call, here."""
    found = []
    for source in sources:
        if source.run is None:
            found.append(session.runner.fetch([source.ref])[0])
        elif source.run.completed:
            found.append(results([source.run])[0])
        else:
            found.append(stand_in(source.run, source.tolerant))
    return found


def stand_in(run: TaskRun, tolerant: int) -> Any:
    """Return what a tolerant run gets in the place of a value: an exception, None, or the state of what was skipped."""
    if run.type is not StateType.SKIPPED:
        return exception_of(run)
    as_state = tolerant & SKIPPED_AS_STATE and not tolerant & SKIPPED_AS_NONE
    return state_of(run) if as_state else None


class Value(Stored):
    """The value of a task run, wherever it lies."""

    def __init__(self, run: TaskRun) -> None:
        self.run = run

    def load(self) -> Any:
        """Bring the value here."""
        return results([self.run])[0]
