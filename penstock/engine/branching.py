"""`branch`: a choice that the record shows, with the arm that was not taken."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from penstock.engine import ambient, skipping, values
from penstock.engine.calls import TaskRun
from penstock.engine.context import current_tags
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.options import TaskOptions
from penstock.engine.states import StateType
from penstock.engine.task import Task

if TYPE_CHECKING:
    from penstock.engine.context import Scope

Arm = Task[..., Any] | Callable[[], Any]


def branch(cond: Any, then: Arm, else_: Arm | None = None) -> Any:
    """Take one of two arms, and record the other as SKIPPED, with the value of the condition.

    A native ``if`` works as ever; this one leaves both arms in the graph of the run.

    >>> branch(quality.submit(night), then=calibrate, else_=report_bad_night)  # doctest: +SKIP

    Parameters
    ----------
    cond : bool or PenstockFuture
        What decides; a future is waited for and its value comes here. In async code await it before.
    then, else_ : task or callable
        A task is submitted without arguments, after the condition; anything else is called without
        arguments, such as ``lambda: load.submit(path)``. `else_` may be left out.

    Returns
    -------
    object
        What the arm that was taken returns: of a task its future. None if the condition is false and
        there is no `else_`. A skipped condition skips both arms, and gives a future of the skipped one.

    Raises
    ------
    Exception
        That of the condition's run, if it failed.
    """
    scope = ambient.scope_for_submit("branch")
    run = run_of(cond)
    if run is None:
        return _taken(scope, bool(cond), None, then, else_)
    future: PenstockFuture[Any] = PenstockFuture(run)
    value = future.result()
    if run.type is StateType.SKIPPED:
        skip = skipping.passed_on(run)
        arms = [_skip(scope, arm, run, str(skip), skip) for arm in (then, else_) if arm is not None]
        return PenstockFuture(arms[0])
    return _taken(scope, bool(value), run, then, else_)


def _taken(scope: Scope, value: bool, run: TaskRun | None, then: Arm, else_: Arm | None) -> Any:
    arm, other = (then, else_) if value else (else_, then)
    if other is not None:
        of = f" ({run.name})" if run is not None else ""
        _skip(scope, other, run, f"Branch not taken: the condition{of} was {value}.")
    if arm is None:
        return None
    if isinstance(arm, Task):
        return arm.submit(wait_for=[PenstockFuture(run)] if run is not None else None)
    return arm()


def _skip(
    scope: Scope, arm: Arm, cond: TaskRun | None, message: str, skip: Exception | None = None
) -> TaskRun:
    """Write the row of an arm that is not taken."""
    task: Any = arm if isinstance(arm, Task) else SimpleNamespace(name=_label(arm))
    if not isinstance(arm, Task):
        task.options = TaskOptions(task.name)
    flow_run = scope.flow_run
    run = TaskRun(
        task,
        task.name,
        root=flow_run.root if flow_run else "",
        flow_run=flow_run,
        surrounding=scope.task_run,
        tags=task.options.tags | current_tags() | (flow_run.tags if flow_run else frozenset()),
    )
    run.error = skip
    parents = [("condition", cond.id)] if cond is not None and cond.tracked else []
    scope.session.journal.task_made(run, {}, parents)
    details = (
        {"condition": str(values.results([cond])[0])[:200]} if cond is not None and cond.completed else {}
    )
    scope.session.skip(run, scope, message, **details)
    return run


def _label(arm: Any) -> str:
    own = getattr(arm, "name", None) or getattr(arm, "__name__", None) or type(arm).__name__
    return "arm" if own == "<lambda>" else str(own)
