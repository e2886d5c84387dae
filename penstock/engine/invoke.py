"""From a call to a work order for the runner, and back from a worker's record."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from penstock.engine.calls import Call, TaskRun
from penstock.runners.base import Submission

if TYPE_CHECKING:
    from penstock.engine.session import Session


def work_order(run: TaskRun, call: Call, prints: bool) -> dict[str, Any]:
    """Make the work order for the next attempt of a run."""
    return {
        "run": run.id,
        "attempt": run.attempt,
        "task": call.task.name,
        "name": run.name,
        "inputs": call.task.options.inputs,
        "prints": prints,
        "context": call.context,
    }


def read_record(data: bytes) -> dict[str, Any]:
    """Unpack what a worker wrote down."""
    record: dict[str, Any] = pickle.loads(data)
    return record


def submission(run: TaskRun, session: Session) -> Submission:
    """Compile one run into a unit of work for the runner."""
    call = run.call
    assert call is not None and run.key is not None  # noqa: PT018 - a run that is ready
    order: Any = work_order(run, call, session.prints_of(run))
    if session.in_process:
        order["scope"] = session.scope_of(run)
        order["interrupt_after"] = call.task.options.timeout_seconds
    else:
        order = pickle.dumps(order, 4)
    options = call.task.options
    return Submission(
        key=run.key,
        order=order,
        function=call.function,
        arguments=call.arguments,
        refs=tuple(session.reference(source) for source in call.sources),
        after=tuple(session.reference(source) for source in call.after if session.orders(source)),
        priority=run.depth + options.priority,
        options=options.backend,
        announce=options.timeout_seconds is not None and run.tracked,
    )
