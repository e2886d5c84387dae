"""Calls hooks and retry conditions in the driver: of task runs in threads beside the session, of flows and direct calls in place.

A run that has ended is done for its dependants at once; for whoever waits for it only when its
hooks have ended. No lock is held while a hook runs, and without hooks nothing here is touched.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from penstock.engine import context, values
from penstock.engine.hooks import Hook, name_of
from penstock.engine.states import State, StateType
from penstock.runners.worker.coroutines import close_loop, run_coroutine

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
        self._pending: dict[TaskRun, deque[Callable[[], None]]] = {}
        self._asked: dict[TaskRun, Condition] = {}  # of direct calls: their callers ask
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
            self._add(run, self._calls(run, hooks, running_state(run)))

    def ended(self, run: TaskRun) -> bool:
        """A run has ended; answer whether somebody has to be told later.

        A value that is lost and made again does not count as another end.
        """
        hooks = run.task.options.hooks
        if run.direct:
            return False
        due = hooks.of_task(run.type)
        commits = run.transaction is not None and run.transaction.decides(run)
        if (due or commits) and run not in self._ended:
            self._ended.add(run)
            if commits:
                assert run.transaction is not None
                self._add(run, run.transaction.conclude)
            if due:
                self._add(run, self._calls(run, due, values.state_of(run)))
        return run in self._pending

    def ask(self, run: TaskRun, state: State, decide: Callable[[bool], None]) -> None:
        """Ask the retry condition of a run; `decide` takes the answer, under the session's lock."""
        condition = Condition(run, state, decide)
        if run.direct:
            self._asked[run] = condition
            return

        def asked() -> None:
            answer = False
            try:
                answer = bool(_called(run.task.options.retry_condition_fn, *condition.arguments))
            except BaseException as error:
                self.no_answer(run, error)
            with self._session.changing():
                decide(answer)

        self._add(run, asked)

    def no_answer(self, run: TaskRun, error: BaseException) -> None:
        """A condition that fails means no retry."""
        line = [time.time(), "ERROR", f"retry_condition_fn raised {error!r}: no retry"]
        self._session.journal.lines(run, [line], 0)

    def asked(self, run: TaskRun) -> Condition | None:
        """Take the question about a direct call, if there is one."""
        return self._asked.pop(run, None)

    def _add(self, run: TaskRun, call: Callable[[], None]) -> None:
        queue = self._pending.get(run)
        if queue is None:
            queue = self._pending[run] = deque()
            self._ready.append(run)
            if self._threads < THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="penstock-hooks", daemon=True).start()
        queue.append(call)

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
        try:
            self._work_off()
        finally:
            close_loop()  # hooks may have been coroutines

    def _work_off(self) -> None:
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
                    call = queue.popleft()
                with context.entered(self._scope(run)):
                    call()
            self._told(run)

    def _scope(self, run: TaskRun) -> Scope:
        scope = self._session.scope_of(run)
        return replace(scope, task_run=run.surrounding, running=None)

    def _calls(self, run: TaskRun, hooks: tuple[Hook, ...], state: State) -> Callable[[], None]:
        def calls() -> None:
            for hook in hooks:
                try:
                    _called(hook, run.task, run, state)
                except BaseException as error:  # the others run, whatever this one does
                    self._session.journal.lines(run, [failed(hook, error)], 0)

        return calls

    def _told(self, run: TaskRun) -> None:
        """All hooks of a run that are known have ended: wake who waits for it."""
        session = self._session
        with session.changing():
            if self._pending[run]:  # one more has come
                self._ready.appendleft(run)
                return
            del self._pending[run]
            if run.done:
                session.endings.settled(run)


@dataclass(slots=True)
class Condition:
    """The question whether a run is tried again.

    Attributes
    ----------
    run : TaskRun
        Which has failed.
    state : State
        FAILED, with the exception.
    decide : callable
        Takes the answer.
    """

    run: TaskRun
    state: State
    decide: Callable[[bool], None]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the user's function takes."""
        return self.run.task, self.run, self.state


def _called(function: Any, *arguments: Any) -> Any:
    answer = function(*arguments)
    return run_coroutine(_awaited(answer)) if hasattr(answer, "__await__") else answer


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
