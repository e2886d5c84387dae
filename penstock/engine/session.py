"""One session per root flow run: carries calls to the runner and reports back to the runs.

The only code in the driver that changes the state of a run. It works like an actor without a
thread of its own: calls and reports are queued, and whichever thread finds the session idle does
the work (`_pump`), so that no lock is held while the runner is asked for anything.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from penstock import errors
from penstock.engine import compile, invoke, items, nested, outcomes, payload, values  # noqa: A004 - the house's word
from penstock.engine.buffer import Buffer
from penstock.engine.calls import FlowRun, Source, TaskRun
from penstock.engine.clock import clock
from penstock.engine.context import Scope
from penstock.engine.graph import Graph, admits, sources_of
from penstock.engine.journal import Journal
from penstock.engine.objects import Objects
from penstock.engine.states import StateType, advance
from penstock.engine.waiting import surrounds
from penstock.runners import worker_runtime
from penstock.runners.base import UNSENT, Key, Ref, Report, TaskRunner, new_tag
from penstock.settings import settings


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
        self.graph = Graph(native=runner.info.dependencies)
        self.objects = Objects(runner, settings().large_argument)
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._working = threading.Lock()
        self._inbox: deque[list[Report]] = deque()
        self._sent: dict[Key, TaskRun] = {}
        self._scopes: dict[FlowRun | None, Scope] = {}
        self._functions: dict[
            int, tuple[Any, bytes]
        ] = {}  # the function is kept, so that its id stays its own
        self._counter = itertools.count()
        self.buffer = Buffer(self._pump)
        self.bytes_fetched = 0
        self.failures = 0
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
        found = self._functions.get(id(task.fn))
        if found is None:
            found = self._functions[id(task.fn)] = (task.fn, payload.pack_function(task.fn))
        return found[1]

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
            source.ref = self.runner.put(values.results([run], raise_on_failure=False))[0]
            return source.ref
        if run.done and not run.completed:  # `allow_failure`: the exception is the value
            source.ref = self.runner.put([values.exception_of(run)])[0]
            return source.ref
        if run.items is not None and run.value is None:
            values.results([run])
        if run.ref is None:
            run.ref = self.runner.put([run.value])[0]
        if run.ref.handle is UNSENT:  # goes in the same batch: the backend knows it by its key
            return Ref(run.ref.key, None)
        return run.ref

    def orders(self, source: Source) -> bool:
        """Whether an edge of ``wait_for`` has to be known to the backend."""
        run = source.run
        return run is not None and not run.done and run.session is self and self.graph.native

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
        leading = running is None and not (len(runs) == 1 and items.yields(runs[0]))  # see `items.ask`
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
        if any(run.done for run in runs):  # an upstream had failed before: nobody else will tell
            with self.changing():
                pass
        self._pump()

    def _follow(self, run: TaskRun, source: Source) -> None:
        """Wait for an upstream that another session carries."""
        upstream = source.run
        assert upstream is not None and upstream.session is not None  # noqa: PT018 - it is foreign

        def ended() -> None:
            run.waiting -= 1
            if not run.done and not admits(upstream, source.tolerant):
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
            if source.run is not None and not source.run.done and surrounds(source.run, scope.task_run):
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
        """Change states after a delay, on the clock's thread."""

        def due() -> None:
            with self.changing():
                call()

        clock.call_later(delay, due)

    # -- the pump -----------------------------------------------------------------------------
    def _receive(self, reports: list[Report]) -> None:
        self._inbox.append(reports)
        self._pump()

    def _pump(self) -> None:
        """Do what is due, unless another thread is at it: that one will see it."""
        while (self._inbox or self.buffer.due) and self._working.acquire(blocking=False):
            try:
                if self._inbox:
                    self._read(self._inbox.popleft())
                else:
                    self._send()
            finally:
                self._working.release()

    def _send(self) -> None:
        with self.changing():
            batch = [run for run in self.buffer.take() if run.released and not run.done]
            for run in batch:
                attempt = run.failures + run.crashes + 1
                run.position = advance(run.position, StateType.PENDING, "Submitting", max(attempt, 1))
                run.key = (f"{run.task.name}-{self.tag}", next(self._counter))
                run.ref = Ref(run.key, UNSENT)
                self._sent[run.key] = run
            submissions = compile.submissions(batch, self, self._fail)
        if not submissions:
            return
        try:
            sent = self.runner.send(submissions)
        except Exception as error:  # the backend is gone, or refuses: nothing was started
            self._inbox.append(
                [
                    Report(s.key, "lost", cause=errors.CrashedRun(f"could not be sent: {error}"))
                    for s in submissions
                ]
            )
            return
        unwanted = []
        with self.lock:
            for ref in sent:
                owner = self._sent.get(ref.key)
                if owner is not None:
                    owner.ref = ref
                else:  # cancelled while it was on its way
                    unwanted.append(ref)
        if unwanted:
            self.runner.cancel(unwanted)

    # -- reports ------------------------------------------------------------------------------
    def _read(self, reports: list[Report]) -> None:
        with self.changing():
            for report in reports:
                run = self._sent.get(report.key)
                if run is None or run.done or run.key != report.key:
                    continue
                if report.kind == "started":
                    outcomes.started(self, run)
                elif report.kind == "item":
                    items.arrived(self, run, report)
                elif report.kind == "ended":
                    outcomes.ended(self, run, invoke.read_record(report.record), report.nbytes, report.worker)
                elif report.kind == "lost":
                    outcomes.lost(self, run, report)
                # "upstream": the upstream's own report decides, by `Graph.ended`

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Change states in a block: then write them down, wake who waits, call back, send what is ready."""
        with self.lock:
            try:
                yield
            finally:
                self.journal.write_out()
                self.changed.notify_all()
                self.buffer.flush()
                due, self.journal.callbacks = self.journal.callbacks, []
        for call in due:
            call()
        self._pump()

    def ended_here(self, run: TaskRun, value: Any, record: bytes) -> None:
        """Take the end of an attempt that was made in the calling thread."""
        with self.changing():
            read = invoke.read_record(record)
            if isinstance(value, worker_runtime.Failed):
                run.ref = Ref(("", 0), value)
            else:
                run.value = value
            outcomes.ended(self, run, read, read["nbytes"], read["worker"])

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
            self.failures += 1
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
        if run.cancelling:
            self.settle(run, StateType.CANCELLED, None, "Cancelled before it started.")
            return
        if upstream.type is StateType.SKIPPED:
            reason = f"Upstream task run '{upstream.id}' was skipped: {upstream.message}"
            self.settle(run, StateType.SKIPPED, None, reason, upstream=upstream.id)
            return
        message = f"Upstream task run '{upstream.id}' did not reach a 'COMPLETED' state."
        unfinished = errors.UnfinishedRun(message).of_run(run.id)
        unfinished.__cause__ = values.exception_of(upstream)
        run.error = unfinished
        self.settle(run, StateType.PENDING, "NotReady", message, upstream=upstream.id)

    def withdraw(self, run: TaskRun) -> None:
        """Take a run back from buffer and backend without touching its state."""
        run.released = False
        self.buffer.discard(run)
        if run.key is not None and self._sent.pop(run.key, None) is not None and run.ref is not None:
            ref, run.ref, run.key = run.ref, None, None
            if ref.handle is not UNSENT:
                self.runner.release([ref])

    def forget(self, run: TaskRun) -> None:
        """Hear no more of the present attempt: it is over, whatever its code still does."""
        if run.key is not None:
            self._sent.pop(run.key, None)
        run.key, run.ref = None, None

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

    def _fail(self, run: TaskRun, error: Exception) -> None:
        run.error = error
        self.settle(run, StateType.FAILED, None, str(error), error=worker_runtime.describe(error))

    def begin_direct(self, run: TaskRun, scope: Scope) -> None:
        """Take over a run that its caller executes."""
        with self.lock:
            self._scopes.setdefault(scope.flow_run, scope)
        self._check_depth(scope, run)

    def never_direct(self, run: TaskRun, upstream: TaskRun) -> None:
        """An upstream of a direct call ended without a value."""
        with self.changing():
            self._never(run, upstream)

    def add_callback(self, run: TaskRun, call: Callable[[TaskRun], None]) -> None:
        """Call once when the run has ended, at once if it has."""
        with self.lock:
            if not run.done:
                run.callbacks = [*(run.callbacks or ()), call]
                return
        _call_back(call, run)


def _call_back(call: Callable[[TaskRun], None], run: TaskRun) -> None:
    try:
        call(run)
    except Exception:  # a user's callback must not stop the session
        logging.getLogger("penstock.flow_runs").exception("a done-callback of %r failed", run.name)
