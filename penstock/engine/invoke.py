"""From a call to the work order that the worker obeys, and back from the worker's record."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.engine import results
from penstock.engine.calls import Call, TaskRun

if TYPE_CHECKING:
    from penstock.engine.mapped import Mapped
    from penstock.engine.session import Session


def work_order(run: TaskRun, call: Call, prints: bool) -> dict[str, Any]:
    """Make the work order for the next attempt of a run."""
    order = {
        "run": run.id,
        "attempt": run.attempt,
        "task": call.task.name,
        "name": run.name,
        "inputs": call.task.options.inputs,
        "prints": prints,
        "context": call.context,
        "streams": run.items is not None,
        "ordinal": run.ordinal,
    }
    if run.index >= 0:
        order["index"] = run.index
    if run.tags:
        order["tags"] = sorted(run.tags)
    if call.task.options.skip_if is not None:
        order["skip_if"] = run.carrier.luggage.predicate(call.task)
    if call.naming is not None:
        order["naming"] = call.naming
    commit = results.commit_order(run)
    if commit is not None:
        order["commit"] = commit
    return order


def stage_order(runs: Sequence[TaskRun], mapped: Mapped, session: Session) -> dict[str, Any]:
    """Make the part of a chunk's work order that says what one of its tasks is, and for which elements.

    Parameters
    ----------
    runs : sequence of TaskRun
        The elements, in the order of the chunk.
    mapped : Mapped
        Their map.
    session : Session
        Who sends them.
    """
    options = mapped.task.options
    attempts = [run.position.attempt for run in runs]
    order: dict[str, Any] = {
        "map": runs[0].map_id,
        "task": options.name,
        "indices": _range_or_list([run.index for run in runs]),
        "attempts": attempts[0] if attempts.count(attempts[0]) == len(attempts) else attempts,
        "inputs": options.inputs,
        "prints": session.luggage.prints_of(runs[0]),
        "context": mapped.context,
        "ordinal": runs[0].ordinal,
    }
    if runs[0].tags:
        order["tags"] = sorted(runs[0].tags)
    if options.skip_if is not None:
        order["skip_if"] = session.luggage.predicate(mapped.task)
    if options.task_run_name is not None:
        order["names"] = [run.given_name for run in runs]
        if None in order["names"]:
            order["naming"] = mapped.naming
    commit = results.commit_order(runs[0])
    if commit is not None:  # one for all, unless its place is made of what each is called
        several = options.results.key or runs[0].caching is not None
        commits = [results.commit_order(run) for run in runs] if several else [commit]
        order["commits"] = commits if len(commits) > 1 else commit
    if session.in_process:
        order["scopes"] = [session.scope_of(run) for run in runs]
    return order


def _range_or_list(numbers: list[int]) -> Sequence[int]:
    first, last = numbers[0], numbers[-1]
    whole = range(first, last + 1)
    return whole if len(whole) == len(numbers) and all(map(int.__eq__, whole, numbers)) else numbers


def read_record(data: bytes) -> dict[str, Any]:
    """Unpack what a worker wrote down."""
    record: dict[str, Any] = pickle.loads(data)
    return record


def element_record(record: dict[str, Any], place: int) -> dict[str, Any] | None:
    """Return the record that one run of a chunk would have had alone; None if it was not run.

    Parameters
    ----------
    record : dict
        Of the chunk.
    place : int
        Where its value is in that of the chunk.
    """
    stage, number = divmod(place, record["count"])
    own = record["odd"].get(place) or {}
    if number >= record["done"] or own.get("status") == "upstream":
        return None
    return _alone(record, stage, number, own)


def _alone(record: dict[str, Any], stage: int, number: int, own: dict[str, Any]) -> dict[str, Any]:
    started, seconds, nbytes = (column[number] for column in record["stages"][stage])
    common = {name: record[name] for name in ("host", "pid", "worker", "thread", "peak", "attempt")}
    times = {"started": started, "ended": started + seconds, "seconds": seconds, "nbytes": nbytes}
    return {**common, "status": "completed", **times, **own}
