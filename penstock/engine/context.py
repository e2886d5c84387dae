"""Where the calling code is: in which flow run, in which task run, under which tags.

In the driver a context variable knows. Inside a task the attempt that runs knows
(`worker.running.current`): on runners in this process it holds the driver's scope, elsewhere a
scope is made from the few primitives that travelled with the work order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from penstock.runners.worker.running import current as running_attempt

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun, TaskRun
    from penstock.engine.session import Session


@dataclass(frozen=True, slots=True)
class Scope:
    """What surrounds the calling code.

    Attributes
    ----------
    session : Session
        Who carries calls to the runner.
    flow_run : FlowRun or None
        The innermost flow run.
    task_run : TaskRun or None
        The innermost task run, if one surrounds the code more closely than `flow_run`.
    running : object
        The attempt in which the scope was made, None in the driver's own code.
    log_prints : bool
        What tasks inherit.
    depth : int
        How many task runs surround the code.
    """

    session: Session
    flow_run: FlowRun | None = None
    task_run: TaskRun | None = None
    running: Any = None
    log_prints: bool = False
    depth: int = 0


_scope: ContextVar[Scope | None] = ContextVar("penstock_scope", default=None)
_tags: ContextVar[frozenset[str]] = ContextVar("penstock_tags", default=frozenset())


def current() -> Scope | None:
    """Return the scope of the calling code, None outside of flows and tasks."""
    scope = _scope.get()
    running = running_attempt()
    if running is None or (scope is not None and scope.running is running):
        return scope
    if running.scope is None:
        from penstock.engine import nested

        running.scope = nested.open_scope(running)
    if running.scope.running is not running:
        running.scope = replace(running.scope, running=running)
    found: Scope = running.scope
    return found


def innermost() -> Scope | None:
    """Return the scope that was entered last in this context; nothing is opened for it."""
    return _scope.get()


@contextlib.contextmanager
def entered(scope: Scope) -> Iterator[Scope]:
    """Make a scope the current one for a block."""
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        # A generator or a coroutine may end in another context than it began in.
        with contextlib.suppress(ValueError):
            _scope.reset(token)


def current_tags() -> frozenset[str]:
    """Return the tags that surround the calling code."""
    return _tags.get()


@contextlib.contextmanager
def tags(*new: str) -> Iterator[frozenset[str]]:
    """Tag all runs that start in a block.

    >>> with tags("night", "vla"):  # doctest: +SKIP
    ...     reduce(observation)

    Parameters
    ----------
    *new : str
        Added to the tags of the surrounding block.
    """
    token = _tags.set(_tags.get() | frozenset(new))
    try:
        yield _tags.get()
    finally:
        _tags.reset(token)
