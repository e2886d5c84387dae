"""One session per root flow run: carries calls to the runner and reports back to the runs.

The only code in the driver that changes the state of a run. It works like an actor without a
thread of its own: calls and reports are queued, and whichever thread finds the session idle does
the work (`_pump`), so that no lock is held while the runner is asked for anything.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from penstock import errors
from penstock.engine import invoke, nested, outcomes, payload
from penstock.engine.buffer import Buffer
from penstock.engine.calls import FlowRun, Source, TaskRun
from penstock.engine.clock import clock
from penstock.engine.context import Scope, current
from penstock.engine.graph import Graph, sources_of
from penstock.engine.journal import Journal
from penstock.engine.objects import Objects
from penstock.engine.states import State, StateType, Stored, advance, failure_of
from penstock.runners import worker_runtime
from penstock.runners.base import Key, Ref, Report, TaskRunner, new_tag
from penstock.settings import settings

HOP = 25  # task runs inside one another on one stack; deeper ones go on in a fresh thread


class Session:
    """Carries the runs of one root flow run, or of one task that submits tasks.

    Parameters
    ----------
    runner : TaskRunner
        Open; closed by whoever opened it.
    journal : Journal
        Where events go.
    """

    def __init__(self, runner: TaskRunner, journal: Journal) -> None:
        self.runner = runner
        self.in_process = runner.in_process
        self.tag = new_tag()
        self.journal = journal
        self.publish = journal.publish
        self.graph = Graph(native=runner.info.dependencies)
        self.objects = Objects(runner, settings().large_argument)
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._working = threading.Lock()
        self._inbox: deque[list[Report]] = deque()
        self._sent: dict[Key, TaskRun] = {}
        self._scopes: dict[FlowRun | None, Scope] = {}
        self._functions: dict[Any, Any] = {}
        self._counter = itertools.count()
        self._calls_due: deque[Callable[[], None]] = deque()
        self.buffer = Buffer(self._pump)
        self.bytes_fetched = 0
        self._failures = 0
        self.live: dict[TaskRun, None] = {}
        runner.listen(self.tag, self._receive)

    def close(self) -> None:
        """Stop listening; runs that have not ended are left as they are."""
        self.runner.unlisten(self.tag)

    # -- what invoke needs to know ------------------------------------------------------------
    def context_of(self, scope: Scope) -> dict[str, Any]:
        """Return the primitives that travel with a work order, for nested code."""
        flow = scope.flow_run
        return {
            "root": flow.root if flow else "",
            "flow_run": flow.id if flow else "",
            "flow_run_name": flow.name if flow else "",
            "flow": flow.flow.name if flow else "",
            "depth": scope.depth + 1,
            "prints": scope.log_prints,
            "runner": self.runner.inside(),
        }

    def function(self, task: Any) -> Any:
        """Return a task's function as the runner needs it; pickled once per session."""
        if self.in_process:
            return task.fn
        found = self._functions.get(task.fn)
        if found is None:
            found = self._functions[task.fn] = payload.pack_function(task.fn)
        return found

    def prints_of(self, run: TaskRun) -> bool:
        """Whether the prints of a run go to its log."""
        wished = run.task.options.log_prints
        return bool(wished if wished is not None else self._scopes[run.flow_run].log_prints)

    def scope_of(self, run: TaskRun) -> Scope:
        """Return the scope of code inside a run, on runners that share this process."""
        return Scope(self, run.flow_run, run, None, self.prints_of(run), run.inside)

    def reference(self, source: Source) -> Ref:
        """Return the reference behind a slot; a value that lies here is put near the workers."""
        if source.ref is not None:
            return source.ref
        run = source.run
        assert run is not None
        if run.session is not self:
            source.ref = self.runner.put([self._foreign_value(run)])[0]
            return source.ref
        if run.done and not run.completed:
            source.ref = self.runner.put([None if run.type is StateType.SKIPPED else self.exception_of(run)])[0]
            return source.ref
        if run.ref is None:
            run.ref = self.runner.put([run.value])[0]
        return run.ref

    def orders(self, source: Source) -> bool:
        """Whether an edge of ``wait_for`` has to be known to the backend."""
        run = source.run
        return run is not None and not run.done and run.session is self and self.graph.native

    @staticmethod
    def _foreign_value(run: TaskRun) -> Any:
        assert run.session is not None
        return run.session.results([run], raise_on_failure=False)[0]

    # -- calls --------------------------------------------------------------------------------
    def submit(self, runs: Sequence[TaskRun], scope: Scope) -> None:
        """Take over runs whose calls were made; returns at once.

        Raises
        ------
        NestingTooDeep
            If tasks have submitted tasks beyond the limit.
        ValueError
            If a run would have to wait for the one that submits it.
        """
        self._check_depth(scope, runs[0])
        running = worker_runtime.current()
        if running is not None:  # a task ends when its children have ended
            nested.children_of(running, self).runs.update(runs)
        leading = running is None
        foreign: list[tuple[TaskRun, Source]] = []
        with self.lock:
            self._scopes.setdefault(scope.flow_run, scope)
            for run in runs:
                run.session = self
                run.inside = scope.depth + 1
                self.live[run] = None
                if scope.flow_run is not None:
                    scope.flow_run.live[run] = None
                    scope.flow_run.runs += 1
                for source in self.graph.foreign(run):
                    run.waiting += 1
                    foreign.append((run, source))
                self._enter(run, leading=leading)
        for run, source in foreign:
            self._follow(run, source)
        self._pump()

    def _follow(self, run: TaskRun, source: Source) -> None:
        """Wait for an upstream that another session carries."""
        upstream = source.run
        assert upstream is not None and upstream.session is not None  # noqa: PT018 - it is foreign

        def ended() -> None:
            run.waiting -= 1
            if not run.done and not (upstream.completed or source.tolerant):
                self._never(run, upstream)
            elif not run.done and run.waiting == 0:
                self._release(run)
            self.buffer.flush()

        upstream.session.add_callback(upstream, lambda _: self.later(ended))

    def _check_depth(self, scope: Scope, run: TaskRun) -> None:
        limit = settings().tasks_max_nesting
        if scope.depth >= limit:
            names = [run.task.name]
            around = scope.task_run
            while around is not None and len(names) < 5:
                names.append(around.task.name)
                around = around.surrounding
            chain = " in ".join(names)
            message = (
                f"tasks are nested {scope.depth} levels deep ({chain} …): more than "
                f"PENSTOCK_TASKS_MAX_NESTING={limit} allows."
            )
            raise errors.NestingTooDeep(message)
        for source in sources_of(run):
            if source.run is not None and not source.run.done and _surrounds(source.run, scope.task_run):
                message = (
                    f"deadlock: {run.name!r} would wait for {source.run.name!r}, "
                    "whose own code submits it and cannot end before it."
                )
                raise ValueError(message)

    def _enter(self, run: TaskRun, *, leading: bool) -> None:
        dead = self.graph.add(run)
        if dead is not None:
            self._never(run, dead)
        elif run.waiting == 0:
            self._release(run, leading=leading)

    def _release(self, run: TaskRun, *, leading: bool = False) -> None:
        """Nothing holds the run back: it may be sent, and on some backends its dependants too."""
        pending = [run]
        while pending:
            one = pending.pop(0)
            one.released = True
            self.buffer.add(one, leading=leading)
            pending.extend(self.graph.released(one))

    def flush(self) -> None:
        """Send whatever waits: somebody looks at a future."""
        if len(self.buffer):
            with self.lock:
                self.buffer.flush()
        self._pump()

    def later(self, call: Callable[[], None], delay: float = 0.0) -> None:
        """Run a piece of work of the session, in turn with all others."""

        def due() -> None:
            self._calls_due.append(call)
            self._pump()

        if delay > 0:
            clock.call_later(delay, due)
        else:
            due()

    # -- the pump -----------------------------------------------------------------------------
    def _receive(self, reports: list[Report]) -> None:
        self._inbox.append(reports)
        self._pump()

    def _pump(self) -> None:
        """Do what is due, unless another thread is at it: that one will see it."""
        while (self._inbox or self.buffer.due or self._calls_due) and self._working.acquire(blocking=False):
            try:
                if self._inbox:
                    self._read(self._inbox.popleft())
                elif self._calls_due:
                    with self.lock:
                        self._calls_due.popleft()()
                else:
                    self._send()
            finally:
                self._working.release()

    def _send(self) -> None:
        with self.lock:
            batch = [run for run in self.buffer.take() if run.released and not run.done]
            for run in batch:
                attempt = run.failures + run.crashes + 1
                run.position = advance(run.position, StateType.PENDING, "Submitting", max(attempt, 1))
                run.key = (f"{run.task.name}-{self.tag}", next(self._counter))
                run.ref = Ref(run.key, None)
                self._sent[run.key] = run
            submissions = []
            for run in batch:
                try:
                    submissions.append(invoke.submission(run, self))
                except Exception as error:  # an upstream's value that cannot be put, say
                    self._fail(run, error)
        if not submissions:
            return
        try:
            sent = self.runner.send(submissions)
        except Exception as error:  # the backend is gone, or refuses: nothing was started
            self._inbox.append(
                [Report(s.key, "lost", cause=errors.CrashedRun(f"could not be sent: {error}")) for s in submissions]
            )
            return
        with self.lock:
            for ref in sent:
                owner = self._sent.get(ref.key)
                if owner is not None:
                    owner.ref = ref

    # -- reports ------------------------------------------------------------------------------
    def _read(self, reports: list[Report]) -> None:
        callbacks: list[Callable[[], None]] = []
        with self.lock:
            for report in reports:
                run = self._sent.get(report.key)
                if run is None or run.done or run.key != report.key:
                    continue
                if report.kind == "started":
                    outcomes.started(self, run)
                elif report.kind == "ended":
                    outcomes.ended(self, run, invoke.read_record(report.record), report.nbytes, report.worker)
                elif report.kind == "lost":
                    outcomes.lost(self, run, report)
                # "upstream": the upstream's own report decides, by `Graph.ended`
            callbacks = self._wake()
        for call in callbacks:
            call()

    def _wake(self) -> list[Callable[[], None]]:
        """Publish what has gathered, wake who waits; answer the callbacks that are due."""
        self.journal.write_out()
        self._changed.notify_all()
        self.buffer.flush()
        due, self.journal.callbacks = self.journal.callbacks, []
        return due

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
        if details.get("started") and run.position.type is StateType.PENDING:
            run.position = advance(run.position, StateType.RUNNING, None, max(run.attempt, 1))
        run.position = advance(run.position, to, name)
        run.message = message
        run.done = True
        run.ended = time.time()
        if run.key is not None:
            self._sent.pop(run.key, None)
        if run.alarm is not None:
            run.alarm.cancel()
            run.alarm = None
        if not run.completed:
            run.ref = None
            self._failures += 1
        self.live.pop(run, None)
        if run.flow_run is not None:
            run.flow_run.live.pop(run, None)
            run.flow_run.finished += 1
        self.journal.add(run, details)
        ready, dead = self.graph.ended(run)
        run.call = None
        for one in ready:
            self._release(one)
        for one in dead:
            self._never(one, run)
        for callback in run.callbacks or ():
            self.journal.callbacks.append(functools.partial(_call_back, callback, run))
        run.callbacks = None

    def _never(self, run: TaskRun, upstream: TaskRun) -> None:
        """An upstream ended without a value: the run will never start."""
        if run.done:
            return
        self.withdraw(run)
        if upstream.type is StateType.SKIPPED:
            reason = f"Upstream task run '{upstream.id}' was skipped: {upstream.message}"
            self.settle(run, StateType.SKIPPED, None, reason, upstream=upstream.id)
            return
        message = f"Upstream task run '{upstream.id}' did not reach a 'COMPLETED' state."
        unfinished = errors.UnfinishedRun(message).of_run(run.id)
        unfinished.__cause__ = self.exception_of(upstream)
        run.error = unfinished
        self.settle(run, StateType.PENDING, "NotReady", message, upstream=upstream.id)

    def withdraw(self, run: TaskRun) -> None:
        """Take a run back from buffer and backend without touching its state."""
        run.released = False
        self.buffer.discard(run)
        if run.key is not None and self._sent.pop(run.key, None) is not None and run.ref is not None:
            ref, run.ref, run.key = run.ref, None, None
            if ref.handle is not None:
                self.runner.release([ref])

    def forget(self, run: TaskRun) -> None:
        """Hear no more of the present attempt: it is over, whatever its code still does."""
        if run.key is not None:
            self._sent.pop(run.key, None)
        run.key, run.ref = None, None

    def wake(self) -> None:
        """Tell the world what has changed; for work that came in by `later`."""
        for call in self._wake():
            self._calls_due.append(call)

    def again(self, run: TaskRun, delay: float) -> None:
        """Start another attempt after a delay; dependants that were sent ahead are held back."""
        if run.direct:  # whoever called it waits for it, and tries again
            run.delay = delay
            return
        self.withdraw(run)
        for dependant in self.graph.recalled(run):
            self.withdraw(dependant)
        if delay > 0:
            self.later(lambda: self._release_again(run), delay)
        else:
            self._release(run)

    def _release_again(self, run: TaskRun) -> None:
        if not run.done:
            self._release(run)
            self.buffer.flush()

    def _fail(self, run: TaskRun, error: Exception) -> None:
        run.error = error
        self.settle(run, StateType.FAILED, None, str(error), error=worker_runtime.describe(error))

    # -- waiting ------------------------------------------------------------------------------
    def wait(self, runs: Sequence[TaskRun], timeout: float | None = None, *, until_failure: bool = False) -> None:
        """Wait until runs have ended, or one has failed; no bytes move.

        Inside a task the runs that have not been sent are done here, one after the other, and
        while there is nothing to do the slot of the task is given back.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        running = worker_runtime.current()
        if running is not None:
            self._check_wait(runs)
            self._do_here(runs)
        self.flush()
        position, failures = 0, -1
        with contextlib.ExitStack() as stack:
            if running is not None and not all(run.done for run in runs):
                pending = [run.ref for run in runs if not run.done and run.ref is not None and run.ref.handle]
                stack.enter_context(self.runner.blocked(pending))
            with self._changed:
                while True:
                    while position < len(runs) and runs[position].done:
                        if until_failure and _has_failed(runs[position]):
                            return
                        position += 1
                    if position == len(runs):
                        return
                    if until_failure and self._failures != failures:
                        failures = self._failures
                        if any(_has_failed(run) for run in runs[position:]):
                            return
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        return
                    self._changed.wait(left)

    def wait_any(self, runs: Sequence[TaskRun], deadline: float | None) -> None:
        """Inside a task, do one of the runs here if it has not been sent."""
        del deadline
        if worker_runtime.current() is not None:
            self._do_here(runs[:1])

    def _check_wait(self, runs: Iterable[TaskRun]) -> None:
        scope = current()
        around = scope.task_run if scope is not None else None
        for run in runs:
            if not run.done and _surrounds(run, around):
                message = f"deadlock: {run.name!r} waits for itself."
                raise ValueError(message)

    def _do_here(self, runs: Sequence[TaskRun]) -> None:
        """Run in place what is not on its way yet; all but the last may go to others first."""
        mine = [run for run in runs if not run.done and run.session is self]
        if not mine:
            return
        if len(mine) > 1 and self.runner.info.threads > 1:
            with self.lock:
                kept = self.buffer.discard(mine[-1])
            self.flush()
            mine = mine[-1:] if kept else []
        for run in mine:
            self._run_here(run)

    def _run_here(self, run: TaskRun) -> None:
        for source in (*run.call.sources, *run.call.after) if run.call else ():
            if source.run is not None and not source.run.done:
                self.wait([source.run])
        with self.lock:
            if run.done or run.waiting or run.call is None:
                return
            if run.key is not None:
                if run.ref is None or run.ref.handle is None or not self.runner.take_back(run.ref):
                    return  # it is on its way: wait for it
                self._sent.pop(run.key, None)
            self.buffer.discard(run)
            run.released = True
            attempt = run.failures + run.crashes + 1
            run.position = advance(run.position, StateType.RUNNING, None, attempt)
            run.key, run.ref = None, None
            call = run.call
            order = invoke.work_order(run, call, self.prints_of(run))
            order["scope"] = self.scope_of(run)
        values = self.values_of(call.sources)
        attempt_of = (order, call.function, call.arguments, values)
        if run.inside % HOP == HOP - 1:  # a fresh thread has a fresh stack
            value, record = worker_runtime.in_thread(worker_runtime.run, *attempt_of)
        else:
            value, record = worker_runtime.run(*attempt_of)
        self.ended_here(run, value, record)
        outer = worker_runtime.current()
        if outer is not None and outer.cancelled:
            raise worker_runtime.Cancelled

    def ended_here(self, run: TaskRun, value: Any, record: bytes) -> None:
        """Take the end of a run that was done in the calling thread."""
        with self.lock:
            read = invoke.read_record(record)
            if isinstance(value, worker_runtime.Failed):
                run.ref = Ref(("", 0), value)
            else:
                run.value = value
            outcomes.ended(self, run, read, read["nbytes"], read["worker"])
            callbacks = self._wake()
        for call in callbacks:
            call()
        self._pump()

    def values_of(self, sources: Sequence[Source]) -> list[Any]:
        """Return the values behind slots, here."""
        values = []
        for source in sources:
            if source.run is None:
                values.append(self.runner.fetch([source.ref])[0])  # type: ignore[list-item]
            elif source.run.completed:
                values.append(self.results([source.run])[0])
            else:
                values.append(self.exception_of(source.run))
        return values

    # -- values and states --------------------------------------------------------------------
    def is_at_hand(self, run: TaskRun) -> bool:
        """Whether the value of a run is in this process already."""
        return not run.completed or run.value is not None or run.ref is None or self.in_process

    def results(self, runs: Sequence[TaskRun], *, raise_on_failure: bool = True) -> list[Any]:
        """Return the values of runs that have ended, all fetched in one request."""
        wanted = {run: run.ref for run in runs if run.completed and run.value is None and run.ref is not None}
        if wanted:
            values = self.runner.fetch(list(wanted.values()))
            for run, value in zip(wanted, values, strict=True):
                run.value = value
                if not self.in_process:
                    self.bytes_fetched += run.nbytes
        found = []
        for run in runs:
            error = self.exception_of(run)
            if error is not None and raise_on_failure:
                raise error
            found.append(run.value if error is None else error)
        return found

    def exception_of(self, run: TaskRun) -> BaseException | None:
        """Return the exception of a run that has ended, None if it completed or was skipped."""
        if run.completed or run.type is StateType.SKIPPED:
            return None
        if isinstance(run.error, invoke.Failure):
            run.error = run.error.exception(run.id)
        if run.error is None:
            run.error = failure_of(State(run.type, run.state_name, run.message, None, {"task_run_id": run.id}))
        return run.error

    def state_of(self, run: TaskRun) -> State:
        """Make the state that users see; its data stays where it is."""
        data: Any = None
        if run.completed:
            data = Value(run)
        elif run.done and run.type is not StateType.SKIPPED:
            data = self.exception_of(run)
        details: dict[str, Any] = {"task_run_id": run.id, "attempt": run.attempt}
        if run.flow_run is not None:
            details["flow_run_id"] = run.flow_run.id
        if run.child_flow_run is not None:
            details["child_flow_run_id"] = run.child_flow_run
        return State(run.type, run.state_name, run.message, data, details, run.ended or time.time())

    def add_callback(self, run: TaskRun, call: Callable[[TaskRun], None]) -> None:
        """Call once when the run has ended, at once if it has."""
        with self.lock:
            if not run.done:
                run.callbacks = [*(run.callbacks or ()), call]
                return
        _call_back(call, run)

    def cancel_unstarted(self, runs: Sequence[TaskRun]) -> None:
        """Cancel what has not been sent; leave the rest alone."""
        self.cancel([run for run in runs if run.key is None])

    def abandon(self, runs: Sequence[TaskRun]) -> None:
        """Give runs up that were asked to stop and do not: they are CANCELLED for us."""
        with self.lock:
            for run in runs:
                if not run.done:
                    self.forget(run)
                    self.settle(run, StateType.CANCELLED, None, "Cancelled; its code could not be interrupted.")
            callbacks = self._wake()
        for call in callbacks:
            call()

    def begin_direct(self, run: TaskRun, scope: Scope) -> None:
        """Take over a run that its caller executes."""
        with self.lock:
            self._scopes.setdefault(scope.flow_run, scope)
        self._check_depth(scope, run)

    def never_direct(self, run: TaskRun, upstream: TaskRun) -> None:
        """An upstream of a direct call ended without a value."""
        with self.lock:
            self._never(run, upstream)
            callbacks = self._wake()
        for call in callbacks:
            call()

    def cancel(self, runs: Sequence[TaskRun], *, force: bool = False) -> bool:
        """Ask runs to stop; answer whether any of them will end CANCELLED."""
        with self.lock:
            sent = []
            hit = False
            for run in runs:
                if run.done:
                    continue
                hit = True
                if run.key is None or run.ref is None or run.ref.handle is None:
                    self.withdraw(run)
                    self.settle(run, StateType.CANCELLED, None, "Cancelled before it was sent.")
                    continue
                run.cancelling = True
                run.position = advance(run.position, StateType.CANCELLING)
                sent.append(run)
            callbacks = self._wake()
        for call in callbacks:
            call()
        if sent:
            stopped = set(self.runner.cancel([run.ref for run in sent if run.ref is not None], force=force))
            with self.lock:
                for run in sent:
                    if run.key in stopped and not run.done:
                        self.settle(run, StateType.CANCELLED, None, "Cancelled before it started.")
                callbacks = self._wake()
            for call in callbacks:
                call()
        return hit


class Value(Stored):
    """The value of a task run, wherever it lies."""

    def __init__(self, run: TaskRun) -> None:
        self.run = run

    def load(self) -> Any:
        """Bring the value here."""
        assert self.run.session is not None
        return self.run.session.results([self.run])[0]


def _has_failed(run: TaskRun) -> bool:
    return run.done and not run.completed and run.type is not StateType.SKIPPED


def _surrounds(run: TaskRun, around: TaskRun | None) -> bool:
    while around is not None:
        if around is run:
            return True
        around = around.surrounding
    return False


def _call_back(call: Callable[[TaskRun], None], run: TaskRun) -> None:
    try:
        call(run)
    except Exception:  # a user's callback must not stop the session
        import logging

        from penstock.engine.logs import FLOW_LOGGER

        logging.getLogger(FLOW_LOGGER).exception("a done-callback of %r failed", run.name)
