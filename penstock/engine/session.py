"""One session per root flow run: carries calls to the runner and reports back to the runs.

The only code in the driver that changes the state of a run. It works like an actor without a
thread of its own: calls and reports are queued, and whichever thread finds the session idle does
the work (`_pump`), so that no lock is held while the runner is asked for anything.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from penstock import errors
from penstock.engine import (
    hook_calls,
    invoke,
    items,
    lookups,
    losses,
    nested,
    outcomes,
    recipes,
    remaking,
    results,
    seeds,
    venues,
    waiting,
)
from penstock.engine.buffer import Buffer
from penstock.engine.calls import Call, Source, TaskRun
from penstock.engine.chunks import Chunk
from penstock.engine.clock import Alarm, clock
from penstock.engine.context import Scope
from penstock.engine.dispatch import Dispatch
from penstock.engine.endings import Endings
from penstock.engine.graph import Graph, admits, sources_of
from penstock.engine.journal import Journal
from penstock.engine.locations import Locations
from penstock.engine.lookout import Lookout
from penstock.engine.luggage import Luggage
from penstock.engine.objects import Objects
from penstock.engine.quarantine import Quarantine
from penstock.engine.states import StateType, advance
from penstock.runners.base import Key, Ref, Report, TaskRunner, new_tag
from penstock.runners.worker.errors import describe_error
from penstock.runners.worker.failure import Failed
from penstock.runners.worker.running import current
from penstock.settings import settings

log = logging.getLogger("penstock.flow_runs")
PATIENCE = 10.0
"""Seconds after which is looked whether a task that asks for special workers can run at all."""


class Session:
    """Carries the runs of one root flow run, or of one task that submits tasks.

    Parameters
    ----------
    runner : TaskRunner
        Open; closed by whoever opened it.
    journal : Journal
        Where events go.
    """

    plans = False
    """Whether it only captures calls (`plan`): flows within it open no runner and wait for nothing."""

    def __init__(self, runner: TaskRunner, journal: Journal) -> None:
        self.totals: dict[str, int] = {}  # in a plan: lengths of maps of which it holds only some elements
        self.runner = runner
        self.in_process = runner.in_process
        self.tag = new_tag()
        self.journal = journal
        self.graph = Graph(native=runner.info.dependencies)
        self.objects = Objects(runner, settings().large_argument)
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._working = threading.Lock()
        self.inbox: deque[list[Report]] = deque()
        self.made = recipes.Made()
        # The back end makes their values again: they are held, with their places, until that is written down.
        self.remaking: dict[Key, list[tuple[TaskRun, int]]] = {}
        self.closing = False
        self.luggage = Luggage(runner)
        self.locations = Locations(self)
        self.dispatch = Dispatch(self)
        self.endings = Endings(self)
        self.lookout = Lookout(self)
        self.buffer = Buffer(self._pump)
        self.quarantine = Quarantine()
        self.ordinals: seeds.Ordinals | None = None
        self.venues = venues.Venues()
        self.hooks = hook_calls.HookCalls(self)
        self._alarm: Alarm | None = None
        self.bytes_fetched = 0
        self.fetched: weakref.WeakKeyDictionary[Ref, Any] = (
            weakref.WeakKeyDictionary()
        )  # the chunk that was fetched last, at most 8 MB
        self.failures = 0
        self.live: dict[TaskRun, None] = {}
        runner.listen(self.tag, self._receive)

    def pause(self) -> None:
        """In a plan: what was captured so far is gone when the flow goes on. A run needs no telling."""

    def close(self) -> None:
        """Stop listening; runs that have not ended are left as they are."""
        self.closing = True
        self.runner.unlisten(self.tag)
        self.remaking.clear()

    def skip(self, run: TaskRun, scope: Scope, message: str, **details: Any) -> None:
        """Take over a run that is skipped before anybody sends it."""
        self.hold([run], scope)
        with self.changing():
            self.endings.settle(run, StateType.SKIPPED, None, message, **details)

    def scope_of(self, run: TaskRun) -> Scope:
        """Return the scope of code inside a run, on runners that share this process."""
        return Scope(self, run.flow_run, run, None, self.luggage.prints_of(run), run.inside)

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
        lookups.find(self, runs)
        running = current()
        if running is not None:  # a task ends when its children have ended
            nested.children_of(running, self).runs.update(runs)
        patient = running is None and len(runs) == 1 and items.yields(runs[0])  # see `items.ask`
        leading = running is None and not patient
        foreign: list[tuple[TaskRun, Source]] = []
        with self.lock:
            self.luggage.note(scope)
            for run in runs:
                self._adopt(run, scope)
                if run.done:
                    continue
                for source in self.graph.foreign(run):
                    run.waiting += 1
                    foreign.append((run, source))
                self.enter(run, leading=leading)
            if patient:
                self.buffer.keep(runs[0])
        for run, source in foreign:
            self._follow(run, source)
        if any(run.done for run in runs):  # an upstream had failed before: nobody else will tell
            with self.changing():
                pass
        self._pump()

    def hold(self, runs: Sequence[TaskRun], scope: Scope) -> None:
        """Take over runs whose calls are not known yet; `bind` lets them go."""
        self._check_depth(scope, runs[0])
        running = current()
        if running is not None:
            nested.children_of(running, self).runs.update(runs)
        with self.lock:
            self.luggage.note(scope)
            for run in runs:
                self._adopt(run, scope)
                run.waiting = 1

    def bind(self, run: TaskRun, call: Call) -> None:
        """Tell a run that was held what it calls; it goes when its upstreams allow (the caller holds the lock)."""
        if run.done:
            return
        run.call = call
        run.waiting -= 1
        self.enter(run, leading=False)

    def _adopt(self, run: TaskRun, scope: Scope) -> None:
        run.session = self
        run.inside = scope.depth + 1
        if run.done:  # before its flow run was resumed
            if scope.flow_run is not None:
                scope.flow_run.runs += 1
                scope.flow_run.finished += 1
            return
        self.live[run] = None
        if scope.flow_run is not None:
            scope.flow_run.live[run] = None
            scope.flow_run.runs += 1

    def _follow(self, run: TaskRun, source: Source) -> None:
        """Wait for an upstream that another session carries."""
        upstream = source.run
        assert upstream is not None and upstream.session is not None  # noqa: PT018 - it is foreign

        def ended() -> None:
            run.waiting -= 1
            if not run.done and not admits(upstream, source.tolerant):
                self.endings.never(run, upstream)
            elif not run.done and run.waiting == 0:
                self.release(run)
            self.buffer.flush()

        upstream.session.endings.add_callback(upstream, lambda _: self.later(ended))

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
            if (
                source.run is not None
                and not source.run.done
                and waiting.surrounds(source.run, scope.task_run)
            ):
                message = (
                    f"deadlock: {run.name!r} would wait for {source.run.name!r}, "
                    "whose own code submits it and cannot end before it."
                )
                raise ValueError(message)

    def enter(self, run: TaskRun, *, leading: bool) -> None:
        """Give a run its place in the graph; it goes if nothing holds it back (the caller holds the lock)."""
        dead = self.graph.add(run)
        if dead is not None:
            self.endings.never(run, dead)
        elif run.waiting == 0:
            self.release(run, leading=leading)

    def release(self, run: TaskRun, *, leading: bool = False) -> None:
        """Nothing holds the run back: it may be sent, and on some backends its dependants too."""
        pending = deque([run])
        while pending:
            one = pending.popleft()
            if one.cancelling and not one.done:  # it was asked to stop while it was taken back
                self.endings.settle(one, StateType.CANCELLED, None, "Cancelled before it started.")
                continue
            if one.hit is not None:
                self._take_hit(one)
                continue
            if self.quarantine.add(one):
                continue
            self.buffer.add(one, leading=leading)
            if one.mapped is None or one.mapped.packer is None:
                one.released = True
                pending.extend(self.graph.released(one))
            # an element is handed out when its packer lets it go (`Dispatch.take`)

    def _take_hit(self, run: TaskRun) -> None:
        """A run has a stored result: it ends without having begun, and its value stays where it is."""
        run.stored = run.hit
        assert run.stored is not None
        run.nbytes = run.stored["nbytes"]
        self.endings.settle(run, StateType.COMPLETED, "Cached", stored=results.location(run.stored))

    @staticmethod
    def keep_stored_only(run: TaskRun) -> None:
        """Keep no copy of a stored value in memory."""
        run.hit, run.key, run.ref, run.value, run.place = run.stored, None, None, None, -1

    def flush(self) -> None:
        """Send whatever waits: somebody looks at a future."""
        if len(self.buffer):
            with self.lock:
                self.buffer.flush(everything=True)
        self._pump()

    def later(self, call: Callable[[], None], delay: float = 0.0) -> None:
        """Change states after a delay, on the clock's thread."""

        def due() -> None:
            with self.changing():
                call()

        clock.call_later(delay, due)

    # -- the pump -----------------------------------------------------------------------------
    def _receive(self, reports: list[Report]) -> None:
        self.inbox.append(reports)
        self._pump()

    def _pump(self) -> None:
        """Do what is due, unless another thread is at it: that one will see it."""
        while (self.inbox or self._due) and self._working.acquire(blocking=False):
            try:
                if self.inbox:
                    self._read(self.inbox.popleft())
                else:
                    self.dispatch.send()
            except Exception as error:
                log.exception("penstock itself failed")
                self._end_all(error)
            finally:
                self._working.release()

    def _end_all(self, error: Exception) -> None:
        """End what has not ended: after a defect of ours a flow must fail, and not wait for ever."""
        message = f"penstock itself failed, please report it: {type(error).__name__}: {error}"
        with self.changing():
            for run in [run for run in self.live if not run.done]:
                run.error = errors.CrashedRun(message).of_run(run.id)
                with contextlib.suppress(Exception):  # the state of this very run may be what is wrong
                    self.endings.settle(run, StateType.CRASHED, None, message)

    @property
    def _due(self) -> bool:
        return self.quarantine.due or (self.buffer.due and not self.quarantine.holds)

    # -- reports ------------------------------------------------------------------------------
    def _read(self, reports: list[Report]) -> None:
        with self.changing():
            for report in reports:
                if report.kind in {"losing", "again", "gone"}:
                    self._about_value(report)
                    continue
                run = self.dispatch.sent.get(report.key)
                if isinstance(run, Chunk):
                    self._read_chunk(run, report)
                    continue
                if run is None or run.done or run.key != report.key:
                    continue
                if report.kind == "started":
                    outcomes.started(self, run)
                elif report.kind == "item":
                    items.arrived(self, run, report)
                elif report.kind == "ended":
                    outcomes.ended(self, run, invoke.read_record(report.record), report.nbytes, report.worker)
                elif report.kind == "lost":
                    losses.lost(self, run, report)
                # "upstream": the upstream's own report decides, by `Graph.ended`

    def _read_chunk(self, chunk: Chunk, report: Report) -> None:
        if report.kind == "ended":
            self.dispatch.landed(chunk)
            outcomes.chunk_ended(self, chunk, invoke.read_record(report.record), report.worker)
        elif report.kind == "lost":
            self.dispatch.landed(chunk)
            losses.chunk_lost(self, chunk, report)
        else:  # "upstream": some of its elements lack what they need, and all were dropped for it
            self.dispatch.landed(chunk)
            for run in list(chunk.runs):
                if not run.done and run.key is chunk.key:
                    self.graph.hold(run)
                    outcomes.not_run(self, run)

    def _about_value(self, report: Report) -> None:
        """A value that existed was lost: made again by the backend, or gone."""
        runs = [run for run in self.made.find(report.key) if run.completed]
        if report.kind == "losing":
            if runs:
                self.remaking[report.key] = [(run, run.place) for run in runs]
            return
        held = self.remaking.pop(report.key, ())
        if isinstance(report.cause, errors.SchedulerLost):  # whoever needs the value will find out
            return
        for run, place in held:
            if run.key != report.key or not run.completed:  # sent again before the news came
                remaking.count_elsewhere(self, run, place, report)
        if self.closing and report.kind == "gone":  # nobody will need it
            for run in runs:
                remaking.count_elsewhere(self, run, run.place, report)
            return
        if runs and report.kind == "again":
            remaking.made_again(self, runs, report)
            return
        for run in runs:
            remaking.gone(self, run, report.cause or errors.ResultLost(f"the value of {run.name!r} is gone"))

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Change states in a block: then write them down, wake who waits, call back, send what is ready."""
        with self.lock:
            try:
                yield
            finally:
                self.journal.write_out()
                self._turn()
                self.changed.notify_all()
                self.buffer.flush()
                due, self.journal.callbacks = self.journal.callbacks, []
        for call in due:
            call()
        self._pump()

    def _turn(self) -> None:
        """Let suspects go on, if there are any."""
        if self.quarantine.waits:
            # What is made again is company, too.
            in_flight = len(self.dispatch.sent) + len(self.remaking)
            again = self.quarantine.turn(in_flight, lambda: self.runner.info.workers)
            if again is not None and self._alarm is None:
                self._alarm = clock.call_later(again, self._wake)

    def _wake(self) -> None:
        with self.changing():
            self._alarm = None

    def ended_here(self, run: TaskRun, value: Any, record: bytes) -> None:
        """Take the end of an attempt that was made in the calling thread."""
        with self.changing():
            read = invoke.read_record(record)
            if isinstance(value, Failed):
                run.ref = Ref(("", 0), value)
            else:
                run.value = value
            outcomes.ended(self, run, read, read["nbytes"], read["worker"])

    def again(self, run: TaskRun, delay: float) -> None:
        """Start another attempt after a delay; dependants that were sent ahead are held back."""
        if run.direct:  # whoever called it waits for it, and tries again
            run.delay = delay
            return
        self.dispatch.withdraw(run)
        for dependant in self.graph.recalled(run):
            self.dispatch.withdraw(dependant)
        if delay > 0:
            self.later(lambda: self._release_again(run), delay)
        elif run.waiting == 0:  # else it was lost in one chunk with what it waits for
            self.release(run)

    def renew(self, runs: Sequence[TaskRun], cause: Exception) -> bool:
        """Make lost values of completed runs again and wait for them; answer whether any was lost."""
        with self.changing():
            refs = {run.ref.key: run.ref for run in runs if run.completed and run.ref is not None}
            gone = {ref.key for ref in self.runner.missing(list(refs.values()))}
            missing = [run for run in runs if run.completed and run.ref is not None and run.ref.key in gone]
            for run in missing:
                remaking.gone(self, run, cause)
        waiting.wait([run for run in missing if not run.done])
        return bool(missing)

    def _release_again(self, run: TaskRun) -> None:
        if not run.done and not run.released and run.waiting == 0:
            if run.type is StateType.SCHEDULED:
                run.position = advance(run.position, StateType.RUNNING, "Retrying", run.next_attempt)
                self.journal.task_state(run)
            self.release(run)

    def fail(self, run: TaskRun, error: Exception) -> None:
        """End a run that cannot be sent (the caller holds the lock)."""
        run.error = error
        self.endings.settle(run, StateType.FAILED, None, str(error), error=describe_error(error))

    def begin_direct(self, run: TaskRun, scope: Scope) -> None:
        """Take over a run that its caller executes."""
        with self.lock:
            self.luggage.note(scope)
        self._check_depth(scope, run)

    def never_direct(self, run: TaskRun, upstream: TaskRun) -> None:
        """An upstream of a direct call ended without a value."""
        with self.changing():
            self.endings.never(run, upstream)
