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
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from penstock import errors
from penstock.engine import (
    compile,  # noqa: A004 - the house's word
    hook_calls,
    invoke,
    items,
    lookups,
    losses,
    nested,
    outcomes,
    payload,
    placement,
    recipes,
    remaking,
    results,
    run_context,
    seeds,
    skipping,
    values,
    venues,
    waiting,
)
from penstock.engine.buffer import Buffer
from penstock.engine.calls import ByFlow, Call, FlowRun, Source, TaskRun
from penstock.engine.chunks import Chunk, fuse
from penstock.engine.clock import Alarm, clock
from penstock.engine.context import Scope
from penstock.engine.graph import Graph, admits, sources_of
from penstock.engine.journal import Journal
from penstock.engine.objects import Objects
from penstock.engine.quarantine import Quarantine
from penstock.engine.results import ResultOptions
from penstock.engine.states import Position, StateType, advance
from penstock.runners.base import UNSENT, Key, Options, Ref, Report, Submission, TaskRunner, new_tag
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
        self._inbox: deque[list[Report]] = deque()
        self._sent: dict[Key, TaskRun | Chunk] = {}
        self.made = recipes.Made()
        # The back end makes their values again: they are held, with their places, until that is written down.
        self.remaking: dict[Key, list[tuple[TaskRun, int]]] = {}
        self.closing = False
        # A nested flow run that has ended is gone with its runs: its row holds what it returned.
        self._prints: ByFlow[bool] = ByFlow()
        self._results: ByFlow[tuple[Any, ...]] = ByFlow()
        self._abouts: ByFlow[tuple[int, bytes]] = ByFlow()
        self._parameters: ByFlow[str | None] = ByFlow()
        self._functions: dict[
            int, tuple[Any, bytes]
        ] = {}  # the function is kept, so that its id stays its own
        self._chains: dict[tuple[int, ...], tuple[list[bytes], bytes]] = {}
        self._counter = itertools.count()
        self.buffer = Buffer(self._pump)
        self.quarantine = Quarantine()
        self.ordinals: seeds.Ordinals | None = None
        self.venues = venues.Venues()
        self.unplaced: weakref.WeakSet[TaskRun] = (
            weakref.WeakSet()
        )  # no worker can run them, when last looked at
        self._crossed: weakref.WeakKeyDictionary[TaskRun, Ref] = weakref.WeakKeyDictionary()
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
            "seed": seeds.seed_around(scope),
            "prints": scope.log_prints,
            "runner": self.runner.inside(),
            "results": self._results_of(flow),
            "about": self._about(flow),
            "parameters": self._parameters_of(flow),
        }

    def _about(self, flow: FlowRun | None) -> bytes:
        """Return what `run_context` tells of a flow run in another process; packed once per attempt."""
        if flow is None or self.in_process:
            return b""
        found = self._abouts.get(flow)
        if found is None or found[0] != flow.position.attempt:
            found = self._abouts[flow] = (flow.position.attempt, run_context.pack_flow(flow))
        return found[1]

    def _parameters_of(self, flow: FlowRun | None) -> str | None:
        if flow not in self._parameters:
            self._parameters[flow] = lookups.parameters_digest(flow) if flow is not None else None
        return self._parameters[flow]

    def _results_of(self, flow: FlowRun | None) -> tuple[Any, ...]:
        packed = self._results.get(flow)
        if packed is None:
            packed = self._results[flow] = (flow.results if flow else ResultOptions()).pack()
        return packed

    def function(self, task: Any) -> Any:
        """Return a task's function as the runner needs it; pickled once per session."""
        if self.in_process:
            return task.fn
        found = self._functions.get(id(task.fn))
        if found is None:
            found = self._functions[id(task.fn)] = (task.fn, payload.pack_function(task.fn))
        return found[1]

    def predicate(self, task: Any) -> Any:
        """Return what asks whether a run of a task is to be skipped, as the runner needs it."""
        ask = task.options.skip_if
        if ask is None or self.in_process:
            return ask
        found = self._functions.get(id(ask))
        if found is None:
            found = self._functions[id(ask)] = (ask, payload.pack_function(ask))
        return found[1]

    def skip(self, run: TaskRun, scope: Scope, message: str, **details: Any) -> None:
        """Take over a run that is skipped before anybody sends it."""
        self.hold([run], scope)
        with self.changing():
            self.settle(run, StateType.SKIPPED, None, message, **details)

    def functions(self, packed: Sequence[bytes]) -> bytes:
        """Return the functions of a chunk as one; the same bytes for the same functions."""
        if len(packed) == 1:
            return packed[0]
        names = tuple(map(id, packed))
        found = self._chains.get(names)
        if found is None:
            found = self._chains[names] = (list(packed), pickle.dumps(list(packed), 4))
        return found[1]

    def prints_of(self, run: TaskRun) -> bool:
        """Whether the prints of a run go to its log."""
        wished = run.task.options.log_prints
        return bool(wished if wished is not None else self._prints[run.flow_run])

    def _note(self, scope: Scope) -> None:
        if scope.flow_run not in self._prints:
            self._prints[scope.flow_run] = scope.log_prints

    def scope_of(self, run: TaskRun) -> Scope:
        """Return the scope of code inside a run, on runners that share this process."""
        return Scope(self, run.flow_run, run, None, self.prints_of(run), run.inside)

    def reference(self, source: Source) -> Ref:
        """Return the reference behind a slot; a value that lies here is put near the workers."""
        return self.located(source)[0]

    def located(self, source: Source) -> tuple[Ref, int | None]:
        """Return the reference behind a slot, and the place in its value if that is a chunk's.

        A value that lies here is put near the workers.
        """
        if source.ref is not None:
            return source.ref, None
        run = source.run
        assert run is not None
        if run.session is not self:
            source.ref = self._crossing(run, source.tolerant)
            return source.ref, None
        if run.done and not run.completed:  # `allow_failure`, `on_skip`
            source.ref = self.runner.put([values.stand_in(run, source.tolerant)])[0]
            return source.ref, None
        value = run.value
        if (run.items is not None and value is None) or (run.child_flow_run is not None and run.ref is None):
            (value,) = values.results([run])
        if run.ref is None:
            assert run.done, f"{run.name!r} has no value yet"  # never send None in its place
            run.ref, run.place = self.runner.put([value])[0], -1
        place = run.place if run.place >= 0 else None
        if run.ref.handle is UNSENT:  # goes in the same batch: the backend knows it by its key
            return Ref(run.ref.key, None), place
        return run.ref, place

    def _crossing(self, run: TaskRun, tolerant: int) -> Ref:
        """Bring a value from another session's runner to this one's, once, and say how large it is."""
        found = self._crossed.get(run)
        if found is None:
            completed = not run.done or run.completed
            value = values.results([run])[0] if completed else values.stand_in(run, tolerant)
            found = self.runner.put([value])[0]
            if completed:
                self._crossed[run] = found
            here, there = self.runner, run.carrier.runner
            if here is not there and run.nbytes >= settings().large_argument:
                text = (
                    f"the value of {run.name!r}, {run.nbytes} bytes, moves from {there.name} to {here.name} "
                    "through the driver"
                )
                log.warning("%s", text)
                if run.flow_run is not None:
                    self.journal.flow_lines(run.flow_run, [[time.time(), "WARNING", text]])
        return found

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
        lookups.find(self, runs)
        running = current()
        if running is not None:  # a task ends when its children have ended
            nested.children_of(running, self).runs.update(runs)
        leading = running is None and not (len(runs) == 1 and items.yields(runs[0]))  # see `items.ask`
        foreign: list[tuple[TaskRun, Source]] = []
        with self.lock:
            self._note(scope)
            for run in runs:
                self._adopt(run, scope)
                if run.done:
                    continue
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

    def hold(self, runs: Sequence[TaskRun], scope: Scope) -> None:
        """Take over runs whose calls are not known yet; `bind` lets them go."""
        self._check_depth(scope, runs[0])
        running = current()
        if running is not None:
            nested.children_of(running, self).runs.update(runs)
        with self.lock:
            self._note(scope)
            for run in runs:
                self._adopt(run, scope)
                run.waiting = 1

    def bind(self, run: TaskRun, call: Call) -> None:
        """Tell a run that was held what it calls; it goes when its upstreams allow (the caller holds the lock)."""
        if run.done:
            return
        run.call = call
        run.waiting -= 1
        self._enter(run, leading=False)

    def never_held(self, run: TaskRun, upstream: TaskRun) -> None:
        """Settle a run that was held and will never get what it needs (the caller holds the lock)."""
        self._never(run, upstream)

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

    def _enter(self, run: TaskRun, *, leading: bool) -> None:
        dead = self.graph.add(run)
        if dead is not None:
            self._never(run, dead)
        elif run.waiting == 0:
            self._release(run, leading=leading)

    def _release(self, run: TaskRun, *, leading: bool = False) -> None:
        """Nothing holds the run back: it may be sent, and on some backends its dependants too."""
        pending = deque([run])
        while pending:
            one = pending.popleft()
            if one.cancelling and not one.done:  # it was asked to stop while it was taken back
                self.settle(one, StateType.CANCELLED, None, "Cancelled before it started.")
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
            # an element is handed out when its packer lets it go (`_take`)

    def _take_hit(self, run: TaskRun) -> None:
        """A run has a stored result: it ends without having begun, and its value stays where it is."""
        run.stored = run.hit
        assert run.stored is not None
        run.nbytes = run.stored["nbytes"]
        self.settle(run, StateType.COMPLETED, "Cached", stored=results.location(run.stored))

    @staticmethod
    def keep_stored_only(run: TaskRun) -> None:
        """Keep no copy of a stored value in memory."""
        run.hit, run.key, run.ref, run.value, run.place = run.stored, None, None, None, -1

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
        while (self._inbox or self._due) and self._working.acquire(blocking=False):
            try:
                if self._inbox:
                    self._read(self._inbox.popleft())
                else:
                    self._send()
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
                    self.settle(run, StateType.CRASHED, None, message)

    @property
    def _due(self) -> bool:
        return self.quarantine.due or (self.buffer.due and not self.quarantine.holds)

    def _send(self) -> None:
        with self.changing():
            submissions = compile.submissions(self._take(), self, self._fail)
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
        self._watch(submissions)
        unwanted = []
        with self.lock:
            for ref in sent:
                owner = self._sent.get(ref.key)
                if owner is None:  # cancelled while it was on its way
                    unwanted.append(ref)
                elif isinstance(owner, Chunk):
                    owner.moved(ref)
                else:
                    owner.ref = ref
        if unwanted:
            self.runner.cancel(unwanted)

    def _watch(self, submissions: Sequence[Submission]) -> None:
        """Look after a while whether what asks for special workers can run at all."""
        asking = {  # nothing else of a submission: its references keep values
            one.key: one.options
            for one in submissions
            if one.options.resources or one.options.workers or one.options.threads > 1
        }
        if asking:
            clock.call_later(PATIENCE, lambda: self._look(asking))

    def _look(self, asking: dict[Key, Options]) -> None:
        waiting = {key: options for key, options in asking.items() if key in self._sent}
        reasons: list[tuple[Options, str]] = []
        for options in waiting.values():
            if all(known != options for known, _ in reasons):
                with contextlib.suppress(Exception):  # the backend may be gone by now
                    reasons.append((options, self.runner.unmet(options)))
        if not any(reason for _, reason in reasons):
            return
        with self.changing():
            for key, options in waiting.items():
                reason = next((text for known, text in reasons if known == options), "")
                unit = self._sent.get(key)
                if reason and unit is not None:
                    self._say_unplaced(list(unit.runs) if isinstance(unit, Chunk) else [unit], reason)

    def _say_unplaced(self, runs: Sequence[TaskRun], reason: str) -> None:
        message = str(placement.Unplaced(runs[0].task.name, reason))
        log.warning("%s", message)
        for run in runs:
            if not run.done and run.type is StateType.PENDING:
                run.message = message
                self.unplaced.add(run)
                self.journal.task_state(run)

    def _take(self) -> list[TaskRun | Chunk]:
        """Take what goes now out of the buffer; where the backend knows dependencies, what hangs on it too."""
        units: list[TaskRun | Chunk] = []
        for run in self.quarantine.take():
            if not run.done:
                run.released = True
                units.append(self._address(run))
        if units:
            return units
        while taken := self.buffer.take():
            for unit in taken:
                # What waited to be sent again may have ended meanwhile, if news of it were late.
                runs = [run for run in (unit if isinstance(unit, list) else [unit]) if not run.done]
                if len(runs) > 1:
                    units.append(self._pack(runs))
                elif runs:
                    self._hand_out(runs[0])
                    units.append(self._address(runs[0]))
        return units

    def _address(self, run: TaskRun) -> TaskRun:
        self._submitting([run])
        run.key = (f"{run.task.name}-{self.tag}", next(self._counter))
        run.ref, run.place = Ref(run.key, UNSENT), -1
        self._sent[run.key] = run
        return run

    def _pack(self, runs: list[TaskRun]) -> Chunk:
        key = (f"{runs[0].task.name}-{self.tag}", next(self._counter))
        chunk = Chunk(key, runs)
        fuse(chunk)
        if len(chunk.stages) > 1:
            names = "+".join(stage[0].task.name for stage in chunk.stages[:4])
            chunk.key = (f"{names}-{self.tag}", key[1])
        chunk.address(Ref(chunk.key, UNSENT))
        self._sent[chunk.key] = chunk
        for stage in chunk.stages:
            self._submitting(stage)
            for run in stage:
                self._hand_out(run)
        return chunk

    def _hand_out(self, run: TaskRun) -> None:
        if run.released:
            return
        run.released = True
        for dependant in self.graph.released(run):
            self._release(dependant)

    @staticmethod
    def _submitting(runs: Sequence[TaskRun]) -> None:
        """Bring runs into the state of being sent; neighbours mostly come from one and the same."""
        before: Position | None = None
        after = runs[0].position
        for run in runs:
            if run.position is not before or run.failures or run.crashes or run.excuses:
                before = run.position
                after = advance(before, StateType.PENDING, "Submitting", run.next_attempt)
            run.position = after

    # -- reports ------------------------------------------------------------------------------
    def _read(self, reports: list[Report]) -> None:
        with self.changing():
            for report in reports:
                if report.kind in {"losing", "again", "gone"}:
                    self._about_value(report)
                    continue
                run = self._sent.get(report.key)
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
            self._landed(chunk)
            outcomes.chunk_ended(self, chunk, invoke.read_record(report.record), report.worker)
        elif report.kind == "lost":
            self._landed(chunk)
            losses.chunk_lost(self, chunk, report)
        else:  # "upstream": some of its elements lack what they need, and all were dropped for it
            self._landed(chunk)
            for run in list(chunk.runs):
                if not run.done and run.key is chunk.key:
                    self.graph.hold(run)
                    outcomes.not_run(self, run)

    def _landed(self, unit: TaskRun | Chunk | None) -> None:
        """A unit of work is with the backend no more."""
        if isinstance(unit, Chunk):
            packer = unit.packer
            self._sent.pop(unit.key, None)
        elif unit is not None and unit.key is not None and self._sent.pop(unit.key, None) is not None:
            packer = unit.mapped.packer if unit.mapped is not None else None
        else:
            return
        if packer is not None:
            packer.flying -= 1

    def _detach(self, run: TaskRun) -> None:
        """Expect nothing more of the present attempt of a run; a chunk without any such run is withdrawn."""
        unit = self._sent.get(run.key) if run.key is not None else None
        if not isinstance(unit, Chunk):
            self._landed(unit)
        else:
            unit.open -= 1
            if unit.open == 0:
                self._landed(unit)
                if unit.ref.handle is not UNSENT:
                    self.runner.release([unit.ref])

    def give_up(self, key: Key) -> None:
        """A chunk will certainly not run: those of its elements that nobody cancelled wait again."""
        chunk = self._sent.get(key)
        if not isinstance(chunk, Chunk):
            return
        self._landed(chunk)
        for run in chunk.runs:
            if run.key is chunk.key and not run.done and not run.cancelling:
                self.put_back(run)

    def put_back(self, run: TaskRun) -> None:
        """An element was not run by its chunk: it waits again, and what was sent ahead on it with it."""
        run.key, run.ref, run.place, run.released = None, None, -1, False
        for dependant in self.graph.recalled(run):
            self.withdraw(dependant)
        if not run.done and run.waiting == 0:
            self._release(run)

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
            in_flight = len(self._sent) + len(self.remaking)  # what is made again is company, too
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
            self._detach(run)
        self.quarantine.discard(run)
        if run.alarm is not None:
            run.alarm.cancel()
            run.alarm = None
        if not run.completed:
            run.ref = None
            self.failures += 1
        self.live.pop(run, None)
        if run.transaction is not None:
            run.transaction.note(details)
        held = bool(run.task.options.hooks) and self.hooks.ended(run)
        if run.flow_run is not None:
            if not held:
                run.flow_run.live.pop(run, None)
            run.flow_run.finished += 1
        self.journal.add(run, details)
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
            self.live.pop(run, None)
            if hooks:
                self.hooks.started(run)
            held = bool(hooks) and self.hooks.ended(run)
            if flow_run is not None and not held:
                flow_run.live.pop(run, None)
            if run.dependants is not None or run.callbacks is not None:
                self._let_dependants_go(run, held=held)
            else:
                if not self.in_process:
                    run.recipe = recipes.of(run)
                run.call = run.mapped = None
        if not self.in_process:
            self.made.add(runs)
        if flow_run is not None:
            flow_run.finished += len(runs)
        self.journal.add_completed(runs, started, seconds, peak)

    def _remember(self, run: TaskRun) -> None:
        """Keep what it takes to make the value again, should it be lost."""
        if run.completed and run.key is not None and not self.in_process:
            self.made.add([run])
            run.recipe = recipes.of(run)

    def _let_dependants_go(self, run: TaskRun, *, held: bool = False) -> None:
        """A run has ended: say so to those that wait for it; users hear of it when its hooks have ended, too."""
        ready, dead = self.graph.ended(run)
        self._remember(run)
        run.call = run.mapped = None
        for one in ready:
            self._release(one)
        for one in dead:
            self._never(one, run)
        if not held:
            self._call_back(run)

    def _call_back(self, run: TaskRun) -> None:
        for callback in run.callbacks or ():
            self.journal.callbacks.append(functools.partial(_call_back, callback, run))
        run.callbacks = None

    def settled(self, run: TaskRun) -> None:
        """The hooks of a run that has ended have ended, too (the caller holds the lock)."""
        if run.flow_run is not None:
            run.flow_run.live.pop(run, None)
        self._call_back(run)

    def _never(self, run: TaskRun, upstream: TaskRun) -> None:
        """An upstream ended without a value: the run will never start."""
        if run.done:
            return
        self.withdraw(run)
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

    def withdraw(self, run: TaskRun) -> None:
        """Take a run back from buffer and backend without touching its state."""
        run.released = False
        self.buffer.discard(run)
        self.quarantine.discard(run)
        if run.key is None:
            return
        ref = run.ref if run.place < 0 and run.key in self._sent else None
        self._detach(run)
        run.key, run.ref, run.place = None, None, -1
        if ref is not None and ref.handle is not UNSENT:
            self.runner.release([ref])

    def forget(self, run: TaskRun) -> None:
        """Hear no more of the present attempt: it is over, whatever its code still does."""
        self._detach(run)
        run.key, run.ref, run.place = None, None, -1

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
        elif run.waiting == 0:  # else it was lost in one chunk with what it waits for
            self._release(run)

    def reopen(self, run: TaskRun) -> None:
        """Run again what had completed, and have the runs that need its value wait for it."""
        run.done = False
        run.ref = run.value = None
        self.made.forget(run)
        run.key, run.place = None, -1
        self.live[run] = None
        if run.flow_run is not None:
            run.flow_run.live[run] = None
            run.flow_run.finished -= 1
        self._enter(run, leading=False)
        self.recall(run)

    def recall(self, run: TaskRun) -> None:
        """Hold back what needs the value of a run, is not in the backend's hands, and lacks it now."""
        for one in list(self.live):
            here = one.key is None or one in self.buffer or one in self.quarantine
            if here and any(source.run is run for source in sources_of(one)):
                self.enter_again(one)

    def enter_again(self, run: TaskRun) -> None:
        """Send a run that has not begun, once its upstreams that are made again have ended."""
        self.withdraw(run)
        dead = self.graph.reconnect(run)
        if dead is not None:
            self._never(run, dead)
            return
        for dependant in self.graph.recalled(run):
            self.withdraw(dependant)
        if run.waiting == 0:
            self._release(run)

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
            self._release(run)

    def _fail(self, run: TaskRun, error: Exception) -> None:
        run.error = error
        self.settle(run, StateType.FAILED, None, str(error), error=describe_error(error))

    def begin_direct(self, run: TaskRun, scope: Scope) -> None:
        """Take over a run that its caller executes."""
        with self.lock:
            self._note(scope)
        self._check_depth(scope, run)

    def never_direct(self, run: TaskRun, upstream: TaskRun) -> None:
        """An upstream of a direct call ended without a value."""
        with self.changing():
            self._never(run, upstream)

    def add_callback(self, run: TaskRun, call: Callable[[TaskRun], None]) -> None:
        """Call once when the run has ended, at once if it has."""
        with self.lock:
            if not run.done or self.hooks.holds(run):
                run.callbacks = [*(run.callbacks or ()), call]
                return
        _call_back(call, run)


def _call_back(call: Callable[[TaskRun], None], run: TaskRun) -> None:
    try:
        call(run)
    except Exception:  # a user's callback must not stop the session
        logging.getLogger("penstock.flow_runs").exception("a done-callback of %r failed", run.name)
