"""Which session carries a call: that of the surrounding run, of an open runner, or a loose one."""

from __future__ import annotations

import atexit
import threading
from dataclasses import replace
from typing import Any

from penstock.engine import heartbeat, waiting
from penstock.engine.context import Scope, current
from penstock.engine.events import bus
from penstock.engine.journal import Journal
from penstock.engine.session import Session
from penstock.engine.tracking import start_tracking
from penstock.runners.base import TaskRunner, ambient_runner
from penstock.runners.sequential import SequentialTaskRunner
from penstock.settings import settings

_loose: dict[int, Session] = {}  # by the identity of an open runner: equal runners are not the same
_lock = threading.Lock()
_caller: list[TaskRunner] = []  # carries direct calls outside of flows


def scope_for_submit(task_name: str) -> Scope:
    """Return the scope in which a submit takes place.

    Raises
    ------
    RuntimeError
        Outside of flows, tasks and ``with SomeTaskRunner():`` blocks.
    """
    scope = current()
    if scope is not None:
        waiting.heed_flow(scope.flow_run)
        return scope
    runner = ambient_runner.get()
    if runner is None:
        message = (
            f"Unable to determine task runner to use for submission of {task_name!r}. Submit it inside a "
            "flow, or inside a block such as 'with ThreadPoolTaskRunner():'."
        )
        raise RuntimeError(message)
    return Scope(_session_of(runner))


def scope_for_call() -> Scope:
    """Return the scope in which a direct call takes place; there always is one."""
    scope = current()
    if scope is not None:
        waiting.heed_flow(scope.flow_run)
        return scope
    runner = ambient_runner.get()
    if runner is None:
        with _lock:
            if not _caller:
                _caller.append(SequentialTaskRunner().open())
        runner = _caller[0]
    return Scope(_session_of(runner))


def _session_of(runner: TaskRunner) -> Session:
    with _lock:
        session = _loose.get(id(runner))
        if session is None:
            start_tracking()
            heartbeat.begin_loose()
            session = _loose[id(runner)] = Session(runner, Journal(bus.publish))
            runner.on_exit(lambda: _end(runner))
        return session


def _end(runner: TaskRunner) -> None:
    """A ``with runner:`` block ends: its runs first."""
    with _lock:
        session = _loose.pop(id(runner), None)
    if session is not None:
        waiting.wait(list(session.live))
        session.hooks.wait()
        session.venues.close()
        session.close()


def sent_elsewhere(scope: Scope, wish: Any) -> Scope:
    """Return the scope for a call of a task that names its runner."""
    if wish is None:
        return scope
    session = scope.session.venues.session_for(scope.session, wish)
    return scope if session is scope.session else replace(scope, session=session)


def default_retries() -> int:
    """Return the retries of tasks that say nothing of them."""
    return settings().task_default_retries


atexit.register(_loose.clear)
