"""One run of a flow, from its row in the record to its final state."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace as changed_copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import (
    cancelling,
    conclusion,
    context,
    deadline,
    heartbeat,
    hook_calls,
    kernel,
    parameters,
    refs,
    signals,
    skipping,
    values,
)
from penstock.engine import results as stored_results
from penstock.engine.annotations import Annotation, allow_failure, allow_skipped, freeze, quote
from penstock.engine.caller import wait_sources
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.clock import Alarm, clock
from penstock.engine.context import Scope, current_tags
from penstock.engine.entry import describe_entry
from penstock.engine.events import bus
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.graph import admits, sources_of
from penstock.engine.hooks import NO_HOOKS
from penstock.engine.interruption import Interruption
from penstock.engine.journal import Journal
from penstock.engine.living import living
from penstock.engine.names import new_name
from penstock.engine.options import run_name
from penstock.engine.past import lane
from penstock.engine.recollection import Recollection
from penstock.engine.reservation import reserved, whereabouts
from penstock.engine.resumption import resumed
from penstock.engine.seeds import begin_again, next_ordinal
from penstock.engine.session import Session
from penstock.engine.states import TRANSITIONS, Position, State, StateType, Stored, advance, failure_of
from penstock.engine.steps import Invoke, Sleep, Steps, Wait, drive
from penstock.engine.summary import describe_all
from penstock.engine.tracking import start_tracking, stop_tracking
from penstock.engine.venues import Venues
from penstock.runners.base import kept, shutdown_all
from penstock.runners.worker.coroutines import close_loop
from penstock.runners.worker.errors import describe_error
from penstock.runners.worker.interruption import Cancelled, TimedOut
from penstock.runners.worker.running import current
from penstock.runners.worker.sizes import size_of
from penstock.settings import settings

if TYPE_CHECKING:
    from penstock.engine.flow import Flow
    from penstock.runners.base import TaskRunner


class FlowRunScope:
    """The frame around one call of a flow function.

    Parameters
    ----------
    flow : Flow
        What is called.
    outer : Scope or None
        What surrounds the call; None at the top.
    args, kwargs
        As the user wrote them.
    """

    def __init__(
        self, flow: Flow[..., Any], outer: Scope | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.flow = flow
        self.outer = outer
        self.args = args
        self.kwargs = kwargs
        self.runner: TaskRunner | None = None
        self.session: Session | None = outer.session if outer is not None else None
        self.arguments: dict[str, Any] = {}
        self._ends = contextlib.ExitStack()
        self._interrupts = signals.Interrupts()
        self._resumed = resumed() if outer is None else None
        self._reservation = reserved() if outer is None and self._resumed is None else None
        self._problem: Exception | None = None  # why the run cannot even begin
        self._holds = contextlib.ExitStack()  # runner and session
        self._submitted = False  # runs beside the code that submitted it
        self._made = False
        self._validated = False
        self._lock = threading.RLock()  # a request to stop comes from any thread
        self._over = self._expired = self._force = self._dropped = False
        self._alarm: Alarm | None = None
        self._attempt = 0  # of those that this driver makes
        self._earlier = 0  # attempts before the run was resumed
        self._reason: errors.RunError | None = None  # who asked from outside for an end, or why
        self._left: list[TaskRun] = []  # with on_exit="detach"
        self._recalled_as: Any = None
        self.interruption = Interruption()
        if self._resumed is not None:
            self.journal = self._resumed.journal
        elif self._reservation is not None:
            self.journal = self._reservation.journal
        elif outer is None:
            start_tracking()
            self.journal = Journal(bus.publish)
        else:
            self.journal = outer.session.journal

    # -- beginning --------------------------------------------------------------------------------
    def make(self) -> None:
        """Write the run's row, before anything can fail."""
        outer, flow = self.outer, self.flow
        if outer is None:
            self._interrupts = self._ends.enter_context(signals.watched(blocks=not flow.isasync))
        tags = flow.options.tags | current_tags()
        around = None
        if outer is not None:
            stand_in: Any = SimpleNamespace(
                name=flow.name, options=SimpleNamespace(log_prints=None, hooks=NO_HOOKS)
            )
            around = TaskRun(
                stand_in,
                flow.name,
                root=outer.flow_run.root if outer.flow_run else "",
                flow_run=outer.flow_run,
                surrounding=outer.task_run,
                tags=tags,
            )
            around.ordinal = next_ordinal(outer, flow.name)
        row: Any = self._resumed or self._reservation or self._before(around)
        self.flow_run = FlowRun(
            flow,
            row.name if row is not None else new_name(),
            run_id=row.id if row is not None else "",
            parent=outer.flow_run if outer else None,
            task_run=around,
            root=outer.flow_run.root if outer and outer.flow_run else "",
            tags=tags | (outer.flow_run.tags if outer and outer.flow_run else frozenset()),
        )
        if self._resumed is not None:
            self.flow_run.past = self._resumed.past
        if self._reservation is None and row is not None:
            self._earlier = row.attempt
            self.flow_run.position = Position(StateType.PENDING, "Pending", row.attempt + 1)
        if outer is None:
            heartbeat.begin(self.flow_run, self.journal)
            self._ends.enter_context(kernel.shown(self.flow_run.id))
        described: dict[str, str] = {}
        try:
            self.arguments = parameters.bind(flow.signature, flow.name, self.args, self.kwargs)
            described = describe_all(self.arguments)
            template = flow.options.flow_run_name
            if template is not None and self._are_fit():
                self.flow_run.name = run_name(template, self.flow_run.name, self.arguments, "flow_run_name")
        except Exception as error:
            self._problem = error
        self._write_row(described, around)
        self._made = True
        living.enter(self)

    def _before(self, around: TaskRun | None) -> Any:
        """Return what a nested flow run was before its root is resumed; None if it is a new one."""
        parent = self.outer.flow_run if self.outer is not None else None
        if parent is None or parent.past is None or around is None:
            return None
        outside = around.surrounding.id if around.surrounding is not None else None
        found = parent.past.flow(parent, outside, self.flow.name, self._bound())
        if found is None:
            return None
        around._id = found["row"] or around.id
        return SimpleNamespace(id=found["id"], name=found["run_name"], attempt=found["attempt"])

    def _bound(self) -> dict[str, Any] | None:
        """Return the arguments by name, None if they do not fit; whoever says so comes later."""
        try:
            return parameters.bind(self.flow.signature, self.flow.name, self.args, self.kwargs)
        except Exception:
            return None

    def make_in_background(self) -> TaskRun:
        """Write the run's row; the row in the parent is the run of a future, for which others may wait."""
        self._submitted = True
        self.make()
        row = self.flow_run.task_run
        assert self.outer is not None and row is not None  # noqa: PT018 - it is submitted from somewhere
        if self.outer.session.plans:
            row.session = self.outer.session
        else:
            self.outer.session.hold([row], self.outer)
        return row

    def _are_fit(self) -> bool:
        """Coerce the parameters before the run is named after them; with futures among them that is too early."""
        if self.flow.options.validate_parameters and not self._futures():
            try:
                self.arguments = parameters.validate(self.flow.fn, self.flow.signature, self.arguments)
            except errors.ParameterTypeError:
                return False  # said when the run begins
            self._validated = True
        return True

    def _write_row(self, described: dict[str, str], around: TaskRun | None) -> None:
        run = self.flow_run
        if around is not None:
            around.child_flow_run = run.id
            around.name = run.name
            parents = [("", up.id) for up in self._futures()]
            self.journal.task_made(around, self.arguments, parents)
        write = self.journal.flow_made if self._resumed is None else self._rewrite_row
        entry = {"entry": describe_entry(self.flow.fn, self.arguments)} if self.outer is None else {}
        write(
            run,
            {
                **entry,
                "name": run.name,
                "flow": self.flow.name,
                "version": self.flow.version,
                "parent_flow_run": run.parent.id if run.parent else None,
                "parent_task_run": around.id if around else None,
                "tags": sorted(run.tags),
                "parameters": described,
                "runner": self.outer.session.runner.name if self.outer else "",
                **whereabouts(),
            },
        )
        if self._reservation is None:  # else it has been PENDING for a while
            self._state(StateType.PENDING)

    def _rewrite_row(self, run: FlowRun, body: dict[str, Any]) -> None:
        assert self._resumed is not None
        self._resumed.row(body)

    def _futures(self) -> list[TaskRun]:
        return conclusion.members_of([*self.args, *self.kwargs.values()]).runs

    def arguments_steps(self, wait_for: Any) -> Steps:
        """Bring futures among the arguments to the form that each parameter asks for, and validate."""
        if self._problem is not None:
            raise self._problem
        hints = parameters.type_hints(self.flow.fn) if self._futures() else {}
        sources = [source for source in wait_sources(wait_for) if source.run is not None]
        yield Wait([source.run for source in sources if source.run is not None])
        for source in sources:
            self._check(source.run, source.tolerant)
        for name, value in list(self.arguments.items()):
            hint = hints.get(name)
            marked = isinstance(value, (allow_failure, allow_skipped))
            plain = value.unwrap() if isinstance(value, Annotation) else value
            runs = [] if isinstance(value, (quote, freeze)) else self._wanted(plain, hint, marked)
            yield Wait(runs)
            self.arguments[name] = self._resolved(value, runs) if runs else plain
        if self.flow.options.validate_parameters and not self._validated:
            try:
                self.arguments = parameters.validate(self.flow.fn, self.flow.signature, self.arguments)
            except errors.ParameterTypeError as error:
                message = f"Validation of flow parameters failed with error: {error}"
                raise errors.ParameterTypeError(message) from None
        self.args, self.kwargs = parameters.unbind(self.flow.signature, self.arguments)
        self.flow_run.parameters = dict(self.arguments)

    def planned_steps(self, wait_for: Any, return_state: bool) -> Steps:
        """Call the function in the plan that surrounds it: no runner is opened, and nothing is waited for."""
        yield from self.arguments_steps(wait_for)
        assert self.session is not None
        with self.inside():
            returned = yield Invoke(self.flow.body, self.args, self.kwargs, name=self.flow_run.name)
        if return_state:  # only a run has one
            self.session.flush()
        self.session.pause()  # a flow ends when its tasks have ended
        return returned

    def _wanted(self, value: Any, hint: Any, marked: bool) -> list[TaskRun]:
        """Return the runs whose values a parameter asks for; the others go in as references."""
        if parameters.takes_reference(hint) and not marked:
            return []
        return conclusion.members_of(value).runs

    def _resolved(self, value: Any, runs: list[TaskRun]) -> Any:
        """Put values in the place of futures; what an annotation tolerates has something else there."""
        size = sum(run.nbytes for run in runs if run.completed)
        if size > settings().large_argument:
            warnings.warn(
                f"flow {self.flow.name!r} asks by an annotation for values of {size:,} bytes, which come to "
                "this process; annotate the parameter PenstockFuture[...] to pass a reference.",
                stacklevel=8,
            )
        completed = [run for run in runs if run.completed]
        found = dict(zip(completed, values.results(completed), strict=True))

        def leaf(item: Any, tolerant: int) -> Any:
            run = run_of(item)
            if run is None or run not in runs:
                return item
            self._check(run, tolerant)
            return found[run] if run in found else values.stand_in(run, tolerant)

        return refs.replace(value, leaf)

    def _check(self, run: TaskRun | None, tolerant: int) -> None:
        """Raise what an upstream that has ended without a value means for this run."""
        if run is None or admits(run, tolerant):
            return
        if run.type is StateType.SKIPPED:
            raise skipping.passed_on(run)
        message = f"Upstream task run '{run.id}' did not reach a 'COMPLETED' state."
        raise errors.UnfinishedRun(message).of_run(self.flow_run.id) from values.exception_of(run)

    def start(self) -> None:
        """Open the runner (a nested flow uses its parent's) and enter RUNNING; again for each attempt."""
        self.heed()
        self.flow_run.lane = lane()
        self._attempt += 1
        if self._attempt == 1:
            own = self.outer is None or self.flow._runner_override is not None
            if own:
                self._open()
            if not self.flow.isasync:
                self._ends.enter_context(self.interruption.nested())
            if self.flow.options.retry.retries:
                self.flow_run.memory = Recollection()
        else:
            self.flow_run.past = None  # what it found there was the attempt that has failed now
            begin_again(self.flow_run)
        if self.flow_run.memory is not None:
            self.flow_run.memory.begin()
        seconds, parent = self.flow.options.timeout_seconds, self.flow_run.parent
        self.flow_run.deadline = deadline.of_run(seconds, parent.deadline if parent is not None else None)
        with self._lock:
            self.heed()
            name = "Retrying" if self._attempt > 1 else None
            self._state(StateType.RUNNING, name, attempt=self._number)
            if self.flow_run.task_run is not None:
                self._row(StateType.RUNNING, name)
        interruptible = self.flow.isasync or threading.current_thread() is threading.main_thread()
        if seconds is not None and not interruptible:
            self._alarm = clock.call_later(seconds, self._expire)

    def _open(self) -> None:
        self.runner = kept(self.flow.runner())
        users_own = self.runner.is_open  # who has opened it closes it
        self.runner.open()
        # What a nested flow gives back may be used as long as the flow around it runs.
        at_end = self._holds.callback if self.outer is None else self.outer.session.venues.at_end
        at_end(self.runner.close)
        if self.runner.keeps and not users_own:
            self.runner.keep()
        self.session = Session(self.runner, self.journal)
        named, first = self.flow.venues()
        self.session.venues = Venues(named)
        if first is not None:
            self.session.venues.is_home(self.session, first)
        at_end(self.session.close)
        at_end(self.session.venues.close)
        info = self.runner.info
        body = {
            name: getattr(info, name)
            for name in ("name", "address", "dashboard", "workers", "threads", "memory")
        }
        self.journal.write(
            "runner", self.flow_run.id, self.flow_run.root, {**body, "versions": dict(info.versions)}
        )

    # -- stopping ---------------------------------------------------------------------------------
    def stop(self, reason: errors.RunError | None = None, *, force: bool = False) -> bool:
        """Ask the run to stop, with its tasks and nested flows; from any thread.

        Parameters
        ----------
        reason : RunError, optional
            Somebody asks from outside: that is what the caller of the flow gets, and nobody waits for
            code that cannot be interrupted.
        force : bool
            End the processes that run its tasks.

        Returns
        -------
        bool
            Whether it will end CANCELLED, if its code is not faster.
        """
        with self._lock:
            if self._over:
                return False
            self._force = self._force or force
            self._reason = self._reason or reason
            first, self.flow_run.cancelled = not self.flow_run.cancelled, True
            if self.flow_run.type is StateType.PENDING:
                if (
                    self._submitted and not self._dropped
                ):  # its thread may still wait for an upstream: nobody waits
                    self._drop(self._stopped("Cancelled before it started."))
                return True
            if first and self.flow_run.type is not StateType.SCHEDULED:
                said = str(self._reason or "")
                self._state(StateType.CANCELLING, message=said)
                if self.flow_run.task_run is not None:
                    self._row(StateType.CANCELLING, message=said)
        self._stop_code(force)
        if first and reason is not None:
            cancelling.aside(lambda: cancelling.stop(list(self.flow_run.live)))
        return True

    def _drop(self, state: State) -> None:
        """End a run in the background that has not begun: hooks first, in a thread of their own."""
        self._dropped = True
        if not self.flow.options.hooks.of_flow(state.type):
            self.finish(state, dropped=True)
            return

        def end() -> None:
            try:
                drive(self.end_hooks(state, dropped=True))
            finally:
                close_loop()
                self.finish(state, dropped=True)

        threading.Thread(target=end, name="penstock-hooks", daemon=True).start()

    def _expire(self) -> None:
        """The time-out has passed in a thread that no alarm can interrupt."""
        with self._lock:
            if self._over:
                return
            self._expired = self.flow_run.cancelled = True
        self._stop_code(force=False)

    def _stopped(self, message: str) -> State:
        """Return the state of a run that was asked to stop: who asked, or else a message."""
        return State(StateType.CANCELLED, message=str(self._reason or message), data=self._reason)

    def _stop_code(self, force: bool) -> None:
        for other in living.children(self.flow_run):
            other.stop(self._reason, force=force)
        cancelling.cancel(list(self.flow_run.live), force=force)
        self.interruption.ask()
        if self.session is not None:
            with self.session.lock:
                self.session.changed.notify_all()

    def heed(self) -> None:
        """End here if the run was asked to stop."""
        if self.flow_run.cancelled or self._dropped:
            raise Cancelled

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Make this run the one that surrounds the user's code."""
        assert self.session is not None
        wished = self.flow.options.log_prints
        inherited = self.outer.log_prints if self.outer else settings().logging_log_prints
        prints = bool(inherited if wished is None else wished)
        scope = Scope(
            self.session,
            self.flow_run,
            None,
            current(),
            prints,
            self.outer.depth if self.outer else 0,
        )
        if self.outer is not None:
            scope = changed_copy(scope, task_run=self.flow_run.task_run)
        if prints:
            from penstock.engine import logs

            logs.route_flow_prints()
        with context.entered(scope):
            yield

    # -- end ----------------------------------------------------------------------------------------
    def leave_steps(self, returned: Any) -> Steps:
        """Wait for what the flow has started and, by the option `on_exit`, for what it still needs."""
        members = conclusion.members_of(returned).runs
        if self.flow.options.on_exit != "wait":
            needed = _needed(members)
            others = [run for run in self.flow_run.live if run not in needed]
            if self.flow.options.on_exit == "cancel":
                cancelling.cancel(others)
            else:
                self._left = others
        left = set(self._left)
        limit = self.flow_run.deadline
        if limit is not None and self._alarm is None:
            self._alarm = clock.call_later(max(0.0, limit.due - time.monotonic()), self._expire)
        yield Wait([run for run in self.flow_run.live if run not in left] + members, heed=True)
        self.heed()

    def returned(self, value: Any) -> State:
        """Conclude from what the function returned."""
        self._tell_of_the_past()
        if isinstance(value, quote):
            state = State(StateType.COMPLETED, data=value.unwrap())
        elif conclusion.is_handmade(value):
            state = value
        else:
            members = conclusion.members_of(value)
            states = [values.state_of(run) for run in members.runs] + members.states
            state = conclusion.aggregate(states) if states else State(StateType.COMPLETED)
            if state.is_completed():
                state.data = Returned(value, members.runs) if members.runs else value
                if self.outer is None and members.runs:
                    state.data.load()  # the one implicit download; before the record says how much came here
                if not self.flow.options.in_memory:
                    self._put_away(state)
        return state

    def _put_away(self, state: State) -> None:
        """Keep the value in its storage only; what a nested flow gives back as references stays where it is."""
        if isinstance(state.data, Returned) and self.outer is not None:
            return
        value = state.data.load() if isinstance(state.data, Returned) else state.data
        kept = stored_results.put_away(self.flow_run, value)
        if kept is not value:
            state.data = kept
            state.state_details["stored"] = stored_results.location(kept.where)

    def _tell_of_the_past(self) -> None:
        lines: list[tuple[str, str]] = []
        if self.flow_run.past is not None and (left := self.flow_run.past.left(self.flow_run)):
            text = f"it called {left!r} before it was resumed, and did not call it again"
            lines.append(("WARNING", text))
        if self._resumed is not None:
            lines.append(("INFO", f"resumed: {self._resumed.past.told()}"))
        if lines:
            self.journal.flow_lines(self.flow_run, [[time.time(), *line] for line in lines])

    def not_ready(self, error: errors.UnfinishedRun) -> State:
        """An upstream of a nested flow did not complete: it never runs."""
        if self.session is None or self.flow_run.type is not StateType.PENDING:
            state = State(StateType.FAILED, message=str(error), data=error)
        else:
            state = State(StateType.PENDING, "NotReady", str(error), error)
        return state

    def raised(self, error: BaseException) -> Steps:
        """Conclude from what the function (or the start) raised; stop what still runs."""
        asked = self._interrupts.received is not None
        self._interrupts.heard = asked
        stopping = self.flow_run.cancelled
        urgent = asked or self._reason is not None or (not isinstance(error, Exception) and not stopping)
        late = self._is_late(error)
        if self.session is not None and self.flow_run.live:
            live = list(self.flow_run.live)
            if late and not asked:
                cancelling.stop(live, force=self.session.runner.kills_on_timeout)
            elif urgent:
                cancelling.stop(live)
            elif stopping:
                cancelling.cancel(live, force=self._force)
                yield Wait(live)  # CANCELLING until the code has really ended
            else:
                cancelling.cancel_unstarted(live)
                yield Wait(live)
        return self._state_of_error(error, asked, late)

    def _is_late(self, error: BaseException) -> bool:
        """Whether the flow was stopped because its time, or that of a flow around it, was over."""
        limit = self.flow_run.deadline
        ours = (TimedOut, errors.TaskTimeout, asyncio.CancelledError)
        return self._expired or (limit is not None and limit.is_over and isinstance(error, ours))

    def _state_of_error(self, error: BaseException, asked: bool, late: bool) -> State:
        if isinstance(error, errors.Skip):
            return State(StateType.SKIPPED, message=str(error))
        if asked:
            name = signal.Signals(self._interrupts.received or signal.SIGINT).name
            return State(StateType.CANCELLED, message=f"Cancelled by {name}.", data=None)
        if late:
            assert self.flow_run.deadline is not None
            message = f"Flow run exceeded timeout of {self.flow_run.deadline.seconds} second(s)"
            timed_out = error if isinstance(error, errors.TaskTimeout) else errors.TaskTimeout(message)
            if timed_out.run_id is None:
                timed_out.of_run(self.flow_run.id)
            return State(StateType.FAILED, "TimedOut", message, timed_out)
        if (
            self._reason is not None
            or isinstance(error, Cancelled)
            or (self.flow_run.cancelled and isinstance(error, (errors.CancelledRun, asyncio.CancelledError)))
        ):
            return self._stopped(f"Flow run {self.flow_run.name!r} was cancelled.")
        if isinstance(error, errors.TerminationSignal):
            return State(StateType.CRASHED, message="Execution was aborted by a termination signal.")
        if isinstance(error, KeyboardInterrupt):
            return State(StateType.CRASHED, message="Execution was aborted by an interrupt signal.")
        if isinstance(error, SystemExit):
            return State(StateType.CRASHED, message="Execution was aborted by Python system exit call.")
        if isinstance(error, errors.CrashedRun) and error.final:
            return State(StateType.CRASHED, message=str(error), data=error)
        if type(error).__name__ == "CancelledError" and not isinstance(error, Exception):
            return State(StateType.CRASHED, message="Execution was cancelled by the runtime environment.")
        started = self.flow_run.type is StateType.RUNNING
        unfit = isinstance(error, (errors.ParameterBindError, errors.ParameterTypeError))
        if not started and not unfit:
            return State(StateType.FAILED, "StartError", f"{type(error).__name__}: {error}", error)
        if not started:
            return State(StateType.FAILED, message=str(error), data=error)
        message = f"Flow run encountered an exception: {type(error).__name__}: {error}"
        return State(StateType.FAILED, message=message, data=error)

    # -- hooks --------------------------------------------------------------------------------------
    def hooks(self, state: State) -> Steps:
        """Call what the flow's hooks want to be called for a state."""
        hooks = self.flow.options.hooks.of_flow(state.type)
        yield from hook_calls.call_here(
            hooks,
            (self.flow, self.flow_run, state),
            lambda line: self.journal.flow_lines(self.flow_run, [line]),
            Invoke,
        )

    def end_hooks(self, state: State, *, dropped: bool = False) -> Steps:
        """Call the hooks of the final state before it is recorded; they have time, and may use tasks."""
        if self._dropped is not dropped:  # they are called where it was dropped
            return
        self._disarm()
        self.flow_run.deadline, self.flow_run.cancelled = None, False
        if state.name == "NotReady":
            return
        if self.session is None:
            yield from self.hooks(state)
            return
        with self.inside():
            yield from self.hooks(state)
            left = set(self._left)
            while self._interrupts.received is None:
                made = [run for run in self.flow_run.live if run not in left]
                if not made:
                    break
                yield Wait(made)

    def must_go_on(self, error: BaseException, state: State) -> bool:
        """Whether an error ends more than this run: what ends programs, or the task around it."""
        if isinstance(error, Cancelled):
            return not (self.flow_run.cancelled or self._dropped)
        return not isinstance(error, Exception) and not state.is_cancelled()

    def retry_delay(self, state: State) -> float | None:
        """Return the seconds after which the function is tried again, None if it is not."""
        started = self.flow_run.type is StateType.RUNNING
        if (
            state.type is not StateType.FAILED
            or not started
            or (self.flow_run.cancelled and not self._expired)
        ):
            return None
        return self.flow.options.retry.after_failure(self._attempt)

    def await_retry(self, state: State, delay: float) -> None:
        """Tell why the run is tried again, and when."""
        self._disarm()
        with self._lock:
            self._expired = self.flow_run.cancelled = False
            self.interruption.reset()
            name, to = ("AwaitingRetry", StateType.SCHEDULED) if delay else ("Retrying", StateType.RUNNING)
            self._state(to, name, state.message, **_error_of(state))
            if self.flow_run.task_run is not None:
                self._row(to, name, state.message)

    def recalled(self) -> State | None:
        """Return how the same call of this flow completed in an earlier attempt of the parent, if it persists."""
        parent = self.outer.flow_run if self.outer is not None else None
        if parent is None or parent.memory is None or self._problem is not None:
            return None
        self._recalled_as = parent.memory.key(self.flow.name, self.arguments)
        found = parent.memory.find(self._recalled_as)
        if found is None:
            return None
        return State(StateType.COMPLETED, "Cached", "Restored from an earlier attempt.", found.data)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def concluded(self, state: State) -> State:
        """Return the state in which the run ends: what was asked to stop ends CANCELLED."""
        here = self.flow_run.type
        if here is StateType.CANCELLING and state.type not in TRANSITIONS[here]:
            return self._stopped(state.message)
        return state

    def finish(self, state: State, *, dropped: bool = False) -> State:
        """Enter the final state, once, and tell those who wait; returns the state."""
        with self._lock:
            if self._over or self._dropped is not dropped:
                return state
            self._disarm()
            state = self.concluded(state)
            self._over = True
            self._finish(state)
        parent = self.outer.flow_run if self.outer is not None else None
        if (
            self._recalled_as is not None
            and parent is not None
            and parent.memory is not None
            and state.is_completed()
            and self.flow_run.results.persist is True
        ):
            parent.memory.keep(self._recalled_as, state)
        return state

    def lost(self, error: BaseException) -> None:
        """The thread of a flow in the background has ended with an error."""
        if not self._over:
            message = f"{type(error).__name__}: {error}"
            self.finish(State(StateType.CRASHED, message=message, data=error))

    def _finish(self, state: State) -> None:
        state.state_details.setdefault("flow_run_id", self.flow_run.id)
        details: dict[str, Any] = {
            "seconds": max(0.0, state.timestamp - self.flow_run.started),
            **(_error_of(state) if state.data is not self._reason else {}),
        }
        if self.outer is None and self.session is not None:
            details["driver_bytes"] = self.session.bytes_fetched + self.session.venues.bytes_fetched()
        if self._resumed is not None:
            self._resumed.settle()
        self._state(state.type, state.name, state.message, **details)
        if self._submitted:
            self._settle_row(state, details)
        elif self.flow_run.task_run is not None:
            self._row(state.type, state.name, state.message, **details)

    def _settle_row(self, state: State, details: dict[str, Any]) -> None:
        """End the run behind the future of a flow in the background."""
        row = self.flow_run.task_run
        assert row is not None
        session = row.carrier
        with session.changing():
            if row.done:
                return
            if state.is_completed():
                _give(row, state.data)
            elif not state.is_skipped():
                row.error = failure_of(state)
            session.settle(row, state.type, state.name, state.message, **details)

    def _state(
        self,
        to: StateType,
        name: str | None = None,
        message: str = "",
        attempt: int | None = None,
        **details: Any,
    ) -> None:
        with self.journal.gate:
            if self.flow_run.position.type is not StateType.PENDING or to is not StateType.PENDING:
                self.flow_run.position = advance(self.flow_run.position, to, name, attempt)
            self.journal.flow_state(self.flow_run, message, **details)

    @property
    def _number(self) -> int:
        """That of the present attempt of the run."""
        return self._earlier + max(self._attempt, 1)

    def _row(self, to: StateType, name: str | None = None, message: str = "", **details: Any) -> None:
        """Keep the row that stands for this run in its parent in step."""
        run = self.flow_run.task_run
        assert run is not None
        run.position = advance(run.position, to, name, self._number)
        run.message = message
        run.done = to.is_final or name == "NotReady"
        self.journal.task_state(run, **details)

    def raise_if_interrupted(self) -> None:
        """A signal ends the process, also where its exception was turned into another one on the way."""
        if self._interrupts.received is not None:
            raise self._interrupts.exception() from None

    # -- what the caller gets -------------------------------------------------------------------------
    def give_state(self, state: State) -> State:
        """Answer the state; at the top its values are brought here, since the runner may close."""
        if self.outer is None and isinstance(state.data, Returned):
            state.data = state.data.load()
        return state

    def give_value(self, state: State) -> Any:
        """Answer the value, or raise what the state stands for."""
        if state.is_skipped():
            return None
        if not state.is_completed():
            raise failure_of(state)
        if not isinstance(state.data, Returned):
            return state.data.load() if isinstance(state.data, Stored) else state.data
        return state.data.load() if self.outer is None else state.data.value

    def close(self) -> None:
        """Leave the runner; at once, or when what was left to itself has ended."""
        living.leave(self)
        if self.outer is None:
            living.disown(self.flow_run.id)
        self.flow_run.parameters = {}  # the run is kept by its task runs: large arguments must not be
        self._ends.close()
        left = [run for run in self._left if not run.done]
        if left:
            self._leave_behind(left)
        else:
            self._holds.close()
        if self._interrupts.received is not None and not kernel.is_here():
            # Now and not at exit: code that is compiled there makes Python forget the signal,
            # and the exit code of the process would be 1 instead of 130.
            shutdown_all()
            stop_tracking()

    def _leave_behind(self, left: list[TaskRun]) -> None:
        """Keep the runner until the last of the runs has ended; in a nested flow they become the parent's."""
        holds = self._holds.pop_all()
        parent = self.outer.flow_run if self.outer is not None else None
        pending = set(left)
        guard = threading.Lock()
        if parent is not None and self.flow._runner_override is None:
            parent.live.update(dict.fromkeys(left))

        def ended(run: TaskRun) -> None:
            if parent is not None:
                parent.live.pop(run, None)
            with guard:
                pending.discard(run)
                last = not pending
            if last:
                clock.call_later(0, holds.close)

        for run in left:
            run.carrier.add_callback(run, ended)


def steps(run: FlowRunScope, wait_for: Any, return_state: bool) -> Steps:
    """Carry out one run of a flow, with its attempts.

    Parameters
    ----------
    run : FlowRunScope
        New, or made for the background.
    wait_for : iterable or None
        Futures that have to end first.
    return_state : bool
        Answer the final state instead of the value.
    """
    try:
        if not run._made:
            run.make()
        if run.outer is not None and run.outer.session.plans:
            return (yield from run.planned_steps(wait_for, return_state))
        state = run.recalled()
        fatal: BaseException | None = None
        caught = False
        while state is None:
            try:
                if run._attempt == 0:
                    yield from run.arguments_steps(wait_for)
                run.start()
                options = run.flow.options
                with run.inside():
                    yield from run.hooks(State(StateType.RUNNING))
                    returned = yield Invoke(
                        run.flow.body,
                        run.args,
                        run.kwargs,
                        options.timeout_seconds,
                        name=run.flow_run.name,
                        interruption=run.interruption,
                    )
                    yield from run.leave_steps(returned)
                state = run.returned(returned)
            except BaseException as error:
                caught = True
                if isinstance(error, errors.UnfinishedRun) and run._attempt == 0:
                    state = run.not_ready(error)
                else:
                    state = yield from run.raised(error)
                    if run.must_go_on(error, state):
                        fatal = error
            delay = None if fatal is not None else run.retry_delay(state)
            if delay is not None:
                run.await_retry(state, delay)
                state = None
                yield Sleep(delay, run.interruption)
        yield from run.end_hooks(run.concluded(state))
        state = run.finish(state)
        if fatal is not None:
            raise fatal
        if caught:
            run.raise_if_interrupted()
        return run.give_state(state) if return_state else run.give_value(state)
    finally:
        run.close()


def _needed(members: Sequence[TaskRun]) -> set[TaskRun]:
    """Return runs and all that they wait for."""
    found: set[TaskRun] = set()
    pending = list(members)
    while pending:
        run = pending.pop()
        if run not in found:
            found.add(run)
            pending.extend(source.run for source in sources_of(run) if source.run is not None)
    return found


def _error_of(state: State) -> dict[str, Any]:
    """Describe the exception in a state for the record."""
    if not isinstance(state.data, BaseException):
        return {}
    errors.hide_frames(state.data)
    described = describe_error(state.data)
    return {"error": {name: described[name] for name in ("type", "message", "text")}}


def _give(row: TaskRun, data: Any) -> None:
    """Make what a flow returned the value of a run; a single future lends its reference."""
    if isinstance(data, Returned):
        run = run_of(data.value)
        lends = run is not None and isinstance(data.value, PenstockFuture) and run.carrier is row.carrier
        if lends and run is not None and run.completed and run.items is None:
            row.ref, row.place, row.value = run.ref, run.place, run.value
            row.nbytes, row.stored, row.worker = run.nbytes, run.stored, run.worker
            return
        row.value = data
        row.nbytes = sum(run.nbytes for run in data.runs)
    else:
        row.value = data
        away = isinstance(data, stored_results.PutAway)
        row.nbytes = data.where["nbytes"] if away else size_of(data)


class Returned(Stored):
    """A flow's return value that holds futures."""

    def __init__(self, value: Any, runs: list[TaskRun]) -> None:
        self.value = value
        self.runs = runs
        self._loaded: list[Any] = []

    def load(self) -> Any:
        """Bring the values of the futures here and put them in their places."""
        if self._loaded:
            return self._loaded[0]
        ended = [run for run in self.runs if run.completed or (run.done and run.type is StateType.SKIPPED)]
        found = dict(zip(ended, values.results(ended), strict=True))
        self._loaded = [conclusion.with_values(self.value, found)]
        return self._loaded[0]
