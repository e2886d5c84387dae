"""A random seed for each task run: the same at every attempt, on every runner, in every run of the flow.

It follows from where the call stands: in which flow and task, the how-manieth call of its task there,
and which element of a map. The header that travels holds what it takes; a hash is made by who asks.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from penstock.runners.worker.seeds import seed_from

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun, TaskRun
    from penstock.engine.context import Scope

Ordinals = dict[str, "itertools.count[int]"]


def next_ordinal(scope: Scope, name: str) -> int:
    """Count the calls of a task or flow in the code of one run, from 0."""
    parent = scope.task_run or scope.flow_run
    owner = parent if parent is not None else scope.session
    if owner.ordinals is None:
        owner.ordinals = {}
    counter = owner.ordinals.get(name)
    if counter is None:
        counter = owner.ordinals.setdefault(name, itertools.count())
    return next(counter)


def begin_again(flow_run: FlowRun) -> None:
    """Count from 0 again: the code of a flow run is executed anew, and its calls get the seeds they had."""
    (flow_run.task_run or flow_run).ordinals = None


def seed_around(scope: Scope) -> int:
    """Return the seed of the run whose code calls."""
    if scope.task_run is not None:
        return seed_of(scope.task_run)
    return 0 if scope.flow_run is None else seed_of_flow(scope.flow_run)


def seed_of(run: TaskRun) -> int:
    """Return the seed of a task run, 64 bits."""
    if run.seed < 0:
        if run.surrounding is not None:
            around = seed_of(run.surrounding)
        else:
            around = 0 if run.flow_run is None else seed_of_flow(run.flow_run)
        run.seed = seed_from(around, run.task.name, run.ordinal, run.index)
    return run.seed


def seed_of_flow(flow_run: FlowRun) -> int:
    """Return the seed of a flow run: of the row that stands for it in its parent, if it has one."""
    if flow_run.task_run is not None:
        return seed_of(flow_run.task_run)
    return seed_from(0, flow_run.flow.name, 0, -1)
