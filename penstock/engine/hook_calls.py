"""Calls hooks in the driver: of task runs in threads beside the session, of flows and direct calls in place.

A run that has ended is done for its dependants at once; for whoever waits for it only when its
hooks have ended. No lock is held while a hook runs, and without hooks nothing here is touched.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penstock.engine import context, values
from penstock.engine.hooks import Hook, name_of
from penstock.engine.states import State, StateType
from penstock.runners import worker_runtime

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.context import Scope
    from penstock.engine.session import Session

THREADS = 8
"""Hooks of different runs that a session calls at a time."""

_inside = threading.local()


class HookCalls:
    """The hooks of one session's task runs, called in order for each run.

    Parameters
    ----------
    session : Session
        Whose lock guards what is here.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending: dict[TaskRun, deque[tuple[tuple[Hook, ...], State]]] = {}
        self._ready: deque[TaskRun] = deque()
        self._threads = 0
        self._begun: weakref.WeakKeyDictionary[TaskRun, int] = weakref.WeakKeyDictionary()
        self._ended: weakref.WeakSet[TaskRun] = weakref.WeakSet()

    # -- what happens to runs (the caller holds the session's lock) ---------------------------------
    def started(self, run: TaskRun) -> None:
        """User code of a run has begun, once per attempt."""
        hooks = run.task.options.hooks.on_running
        if hooks and not run.direct and self._begun.get(run) != run.attempt:
            self._begun[run] = run.attempt
            self._add(run, hooks, running_state(run))

    def ended(self, run: TaskRun) -> bool:
        """A run has ended; answer whether somebody has to be told later.

        A value that is lost and made again does not count as another end.
        """
        hooks = run.task.options.hooks
        if run.direct:
            return False
        due = hooks.of_task(run.type)
        if due and run not in self._ended:
            self._ended.add(run)
            self._add(run, due, values.state_of(run))
        return run in self._pending

    def _add(self, run: TaskRun, hooks: tuple[Hook, ...], state: State) -> None:
        queue = self._pending.get(run)
        if queue is None:
            queue = self._pending[run] = deque()
            self._ready.append(run)
            if self._threads < THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="penstock-hooks", daemon=True).start()
        queue.append((hooks, state))

    # -- who waits ------------------------------------------------------------------------------
    def holds(self, run: TaskRun) -> bool:
        """Whether a run has hooks that have not ended. Hooks themselves wait for no other hooks."""
        return bool(self._pending) and run in self._pending and not getattr(_inside, "hook", False)

    def hold_any(self, runs: Iterable[TaskRun]) -> bool:
        """Whether any of some runs has hooks that have not ended."""
        return bool(self._pending) and any(self.holds(run) for run in runs)

    def wait(self) -> None:
        """Wait until no hook is due."""
        with self._session.changed:
            self._session.changed.wait_for(lambda: not self._pending)

    # -- the threads ------------------------------------------------------------------------------
    def _work(self) -> None:
        session = self._session
        _inside.hook = True
        while True:
            with session.lock:
                if not self._ready:
                    self._threads -= 1
                    return
                run = self._ready.popleft()
            while True:
                with session.lock:
                    queue = self._pending[run]
                    if not queue:
                        break
                    hooks, state = queue.popleft()
                with context.entered(self._scope(run)):
                    for hook in hooks:
                        self._call(hook, run, state)
            self._told(run)

    def _scope(self, run: TaskRun) -> Scope:
        scope = self._session.scope_of(run)
        return replace(scope, task_run=run.surrounding, running=None)

    def _call(self, hook: Hook, run: TaskRun, state: State) -> None:
        try:
            answer = hook(run.task, run, state)
            if hasattr(answer, "__await__"):
                worker_runtime.run_coroutine(_awaited(answer))
        except BaseException as error:  # the others run, whatever this one does
            self._session.journal.lines(run, [failed(hook, error)], 0)

    def _told(self, run: TaskRun) -> None:
        """All hooks of a run that are known have ended: wake who waits for it."""
        session = self._session
        with session.changing():
            if self._pending[run]:  # one more has come
                self._ready.appendleft(run)
                return
            del self._pending[run]
            if run.done:
                session.settled(run)


async def _awaited(answer: Any) -> Any:
    return await answer


def running_state(run: TaskRun) -> State:
    """Make the state that `on_running` sees."""
    name = "Retrying" if run.attempt > 1 else "Running"
    details: dict[str, Any] = {"task_run_id": run.id, "attempt": run.attempt}
    if run.flow_run is not None:
        details["flow_run_id"] = run.flow_run.id
    return State(StateType.RUNNING, name, "", None, details, run.started or time.time())


def failed(hook: Hook, error: BaseException) -> list[Any]:
    """Make the log line of a hook that failed."""
    return [time.time(), "ERROR", f"hook {name_of(hook)!r} raised {type(error).__name__}: {error}"]


def call_here(
    hooks: Sequence[Hook],
    arguments: tuple[Any, ...],
    log: Callable[[list[Any]], None],
    call: Callable[..., Any],
) -> Any:
    """Call hooks one after the other, as steps of the code around them.

    Parameters
    ----------
    hooks : sequence of callable
        In order.
    arguments : tuple
        What each takes: task or flow, run, state.
    log : callable
        Takes the line of one that failed.
    call : callable
        Makes the step that calls a function: `steps.Invoke`.
    """
    for hook in hooks:
        try:
            yield call(hook, arguments)
        except Exception as error:
            log(failed(hook, error))
