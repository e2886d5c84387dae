"""From a call to the work order that the worker obeys, and back from the worker's record."""

from __future__ import annotations

import pickle
from typing import Any

from penstock.engine.calls import Call, TaskRun


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
        "streams": run.items is not None,
    }


def read_record(data: bytes) -> dict[str, Any]:
    """Unpack what a worker wrote down."""
    record: dict[str, Any] = pickle.loads(data)
    return record
