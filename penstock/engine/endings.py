"""How runs come to their end, and who hears of it: dependants, hooks, callbacks, the record."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import recipes, skipping, values
from penstock.engine.calls import TaskRun
from penstock.engine.states import Position, StateType, advance

if TYPE_CHECKING:
    from penstock.engine.session import Session

log = logging.getLogger("penstock.flow_runs")


class Endings:
    """Brings the runs of one session to their end (its lock is held by the caller, where nothing else is said).

    Parameters
    ----------
    session : Session
        Whose runs they are.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def settle(
        self,
        run: TaskRun,
        to: StateType,
        name: str | None = None,
        message: str = "",
        **details: Any,
    ) -> None:
        """Bring a run to its end (the caller holds the lock).

        Parameters
        ----------
        run : TaskRun
            Not done.
        to : StateType
            Its last state; PENDING for a run that can never start.
        name, message : str
            Of the state.
        **details : object
            For the record: ``cause, started, seconds, peak, error``.
        """
        session = self._session
        if details.get("started") and run.position.type is StateType.PENDING:
            run.position = advance(run.position, StateType.RUNNING, None, max(run.attempt, 1))
        run.position = advance(run.position, to, name)
        run.message = message
        run.done = True
        run.ended = time.time()
        if run.key is not None:
            session.dispatch.detach(run)
        session.quarantine.discard(run)
        if run.alarm is not None:
            run.alarm.cancel()
            run.alarm = None
        if not run.completed:
            run.ref = None
            session.failures += 1
        session.live.pop(run, None)
        if run.transaction is not None:
            run.transaction.note(details)
        held = bool(run.task.options.hooks) and session.hooks.ended(run)
        if run.flow_run is not None:
            if not held:
                run.flow_run.live.pop(run, None)
            run.flow_run.finished += 1
        session.journal.add(run, details)
        self._let_dependants_go(run, held=held)

    def complete(
        self, runs: Sequence[TaskRun], started: Sequence[float], seconds: Sequence[float], peak: int
    ) -> None:
        """Bring many runs of one map to a good end (the caller holds the lock).

        Parameters
        ----------
        runs : sequence of TaskRun
            Elements that a chunk has run; size and worker are set.
        started, seconds : sequence of float
            When user code began, on the worker's clock, and how long it took.
        peak : int
            Peak memory of the worker in bytes.
        """
        session = self._session
        now = time.time()
        before: Position | None = None
        after = runs[0].position
        for run, began, took in zip(runs, started, seconds, strict=True) if runs[0].transaction else ():
            assert run.transaction is not None
            run.transaction.note({"started": began, "seconds": took, "peak": peak})
        flow_run = runs[0].flow_run
        hooks = runs[0].task.options.hooks
        for run in runs:
            if run.position is not before:
                before = run.position
                running = advance(before, StateType.RUNNING) if before.type is StateType.PENDING else before
                after = advance(running, StateType.COMPLETED)
            run.position = after
            run.done = True
            run.ended = now
            session.live.pop(run, None)
            if hooks:
                session.hooks.started(run)
            held = bool(hooks) and session.hooks.ended(run)
            if flow_run is not None and not held:
                flow_run.live.pop(run, None)
            if run.dependants is not None or run.callbacks is not None:
                self._let_dependants_go(run, held=held)
            else:
                if not session.in_process:
                    run.recipe = recipes.of(run)
                run.call = run.mapped = None
        if not session.in_process:
            session.made.add(runs)
        if flow_run is not None:
            flow_run.finished += len(runs)
        session.journal.add_completed(runs, started, seconds, peak)

    def _remember(self, run: TaskRun) -> None:
        """Keep what it takes to make the value again, should it be lost."""
        if run.completed and run.key is not None and not self._session.in_process:
            self._session.made.add([run])
            run.recipe = recipes.of(run)

    def _let_dependants_go(self, run: TaskRun, *, held: bool = False) -> None:
        """A run has ended: say so to those that wait for it; users hear of it when its hooks have ended, too."""
        ready, dead = self._session.graph.ended(run)
        self._remember(run)
        run.call = run.mapped = None
        for one in ready:
            self._session.release(one)
        for one in dead:
            self.never(one, run)
        if not held:
            self._call_back(run)

    def _call_back(self, run: TaskRun) -> None:
        for callback in run.callbacks or ():
            self._session.journal.callbacks.append(functools.partial(_call_back, callback, run))
        run.callbacks = None

    def settled(self, run: TaskRun) -> None:
        """The hooks of a run that has ended have ended, too (the caller holds the lock)."""
        if run.flow_run is not None:
            run.flow_run.live.pop(run, None)
        self._call_back(run)

    def never(self, run: TaskRun, upstream: TaskRun) -> None:
        """An upstream ended without a value: the run will never start."""
        if run.done:
            return
        self._session.dispatch.withdraw(run)
        if run.cancelling:
            self.settle(run, StateType.CANCELLED, None, "Cancelled before it started.")
            return
        if upstream.type is StateType.SKIPPED:
            run.error = skip = skipping.passed_on(upstream)
            self.settle(run, StateType.SKIPPED, None, str(skip), upstream=skip.run_id)
            return
        message = f"Upstream task run '{upstream.id}' did not reach a 'COMPLETED' state."
        unfinished = errors.UnfinishedRun(message).of_run(run.id)
        unfinished.__cause__ = values.exception_of(upstream)
        run.error = unfinished
        self.settle(run, StateType.PENDING, "NotReady", message, upstream=upstream.id)

    def add_callback(self, run: TaskRun, call: Callable[[TaskRun], None]) -> None:
        """Call once when the run has ended, at once if it has."""
        with self._session.lock:
            if not run.done or self._session.hooks.holds(run):
                run.callbacks = [*(run.callbacks or ()), call]
                return
        _call_back(call, run)


def _call_back(call: Callable[[TaskRun], None], run: TaskRun) -> None:
    try:
        call(run)
    except Exception:  # a user's callback must not stop the session
        log.exception("a done-callback of %r failed", run.name)
