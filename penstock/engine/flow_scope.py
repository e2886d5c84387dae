"""The frame around one call of a flow function: how it begins, is stopped, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace as changed_copy
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
    signals,
    values,
)
from penstock.engine import results as stored_results
from penstock.engine.annotations import quote
from penstock.engine.calls import TaskRun
from penstock.engine.clock import Alarm, clock
from penstock.engine.context import Scope, current_tags
from penstock.engine.flow_arguments import FlowArguments
from penstock.engine.flow_record import FlowRecord
from penstock.engine.holdings import Holdings
from penstock.engine.interruption import Interruption
from penstock.engine.living import living
from penstock.engine.options import run_name
from penstock.engine.past import lane
from penstock.engine.recollection import Recollection
from penstock.engine.returned import Returned, with_upstreams
from penstock.engine.seeds import begin_again
from penstock.engine.session import Session
from penstock.engine.states import TRANSITIONS, State, StateType, Stored, failure_of
from penstock.engine.steps import Invoke, Steps, Wait, drive
from penstock.engine.summary import describe_all
from penstock.engine.tracking import stop_tracking
from penstock.engine.verdict import error_of, state_of_error, stopped
from penstock.runners.base import shutdown_all
from penstock.runners.worker.coroutines import close_loop
from penstock.runners.worker.interruption import Cancelled, TimedOut
from penstock.runners.worker.running import current
from penstock.settings import settings

if TYPE_CHECKING:
    from penstock.engine.flow import Flow


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
        self.arguments = FlowArguments(flow, args, kwargs)
        self.session: Session | None = outer.session if outer is not None else None
        self._ends = contextlib.ExitStack()
        self._interrupts = signals.Interrupts()
        self._problem: Exception | None = None  # why the run cannot even begin
        self._holdings = Holdings(outer)
        self._submitted = False  # runs beside the code that submitted it
        self._made = False
        self._lock = threading.RLock()  # a request to stop comes from any thread
        self._over = self._expired = self._force = self._dropped = False
        self._alarm: Alarm | None = None
        self._reason: errors.RunError | None = None  # who asked from outside for an end, or why
        self._left: list[TaskRun] = []  # with on_exit="detach"
        self._recalled_as: Any = None
        self.interruption = Interruption()
        self.record = FlowRecord(flow, outer)
        self.journal = self.record.journal

    # -- beginning --------------------------------------------------------------------------------
    def make(self) -> None:
        """Write the run's row, before anything can fail."""
        outer, flow = self.outer, self.flow
        if outer is None:
            self._interrupts = self._ends.enter_context(signals.watched(blocks=not flow.isasync))
        self.flow_run = self.record.make(flow.options.tags | current_tags(), self.arguments)
        if outer is None:
            heartbeat.begin(self.flow_run, self.journal)
            self._ends.enter_context(kernel.shown(self.flow_run.id))
        described: dict[str, str] = {}
        try:
            self.arguments.bind()
            described = describe_all(self.arguments.named)
            template = flow.options.flow_run_name
            if template is not None and self.arguments.are_fit():
                self.flow_run.name = run_name(
                    template, self.flow_run.name, self.arguments.named, "flow_run_name"
                )
        except Exception as error:
            self._problem = error
        self.record.write(described, self.arguments)
        self._made = True
        living.enter(self)

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

    def arguments_steps(self, wait_for: Any) -> Steps:
        """Bring the arguments to their form, or raise why the run cannot even begin."""
        if self._problem is not None:
            raise self._problem
        return self.arguments.steps(wait_for, self.flow_run)

    def planned_steps(self, wait_for: Any, return_state: bool) -> Steps:
        """Call the function in the plan that surrounds it: no runner is opened, and nothing is waited for."""
        yield from self.arguments_steps(wait_for)
        assert self.session is not None
        with self.inside():
            returned = yield Invoke(
                self.flow.body, self.arguments.args, self.arguments.kwargs, name=self.flow_run.name
            )
        if return_state:  # only a run has one
            self.session.flush()
        self.session.pause()  # a flow ends when its tasks have ended
        return returned

    def start(self) -> None:
        """Open the runner (a nested flow uses its parent's) and enter RUNNING; again for each attempt."""
        self.heed()
        self.flow_run.lane = lane()
        self.record.attempt += 1
        if self.record.attempt == 1:
            own = self.outer is None or self.flow._runner_override is not None
            if own:
                self.session = self._holdings.open(self.flow, self.journal)
                self._holdings.furnish(self.session, self.flow, self.flow_run)
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
            name = "Retrying" if self.record.attempt > 1 else None
            self.record.state(StateType.RUNNING, name, attempt=self.record.number)
            self.record.row(StateType.RUNNING, name)
        interruptible = self.flow.isasync or threading.current_thread() is threading.main_thread()
        if seconds is not None and not interruptible:
            self._alarm = clock.call_later(seconds, self._expire)

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
            if self.flow_run.type is StateType.CANCELLING and not self.flow_run.cancelled:
                return True  # its code has ended; its last hooks have time
            first, self.flow_run.cancelled = not self.flow_run.cancelled, True
            if self.flow_run.type is StateType.PENDING:
                # Its thread may still wait for an upstream: nobody waits for that.
                if self._submitted and not self._dropped:
                    self._drop(stopped("Cancelled before it started.", self._reason))
                return True
            if first and self.flow_run.type is not StateType.SCHEDULED:
                said = str(self._reason or "")
                self.record.state(StateType.CANCELLING, message=said)
                self.record.row(StateType.CANCELLING, message=said)
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
            needed = with_upstreams(members)
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
        if self.record.resumed is not None:
            lines.append(("INFO", f"resumed: {self.record.resumed.past.told()}"))
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
        received = self._interrupts.received
        asked = received is not None
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
        return state_of_error(error, self.flow_run, received=received, late=late, reason=self._reason)

    def _is_late(self, error: BaseException) -> bool:
        """Whether the flow was stopped because its time, or that of a flow around it, was over."""
        limit = self.flow_run.deadline
        ours = (TimedOut, errors.TaskTimeout, asyncio.CancelledError)
        return self._expired or (limit is not None and limit.is_over and isinstance(error, ours))

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
        return self.flow.options.retry.after_failure(self.record.attempt)

    def await_retry(self, state: State, delay: float) -> None:
        """Tell why the run is tried again, and when."""
        self._disarm()
        with self._lock:
            self._expired = self.flow_run.cancelled = False
            self.interruption.reset()
            name, to = ("AwaitingRetry", StateType.SCHEDULED) if delay else ("Retrying", StateType.RUNNING)
            self.record.state(to, name, state.message, **error_of(state))
            self.record.row(to, name, state.message)

    def recalled(self) -> State | None:
        """Return how the same call of this flow completed in an earlier attempt of the parent, if it persists."""
        parent = self.outer.flow_run if self.outer is not None else None
        if parent is None or parent.memory is None or self._problem is not None:
            return None
        self._recalled_as = parent.memory.key(self.flow.name, self.arguments.named)
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
            return stopped(state.message, self._reason)
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
            **(error_of(state) if state.data is not self._reason else {}),
        }
        if self.outer is None and self.session is not None:
            details["driver_bytes"] = self.session.bytes_fetched + self.session.venues.bytes_fetched()
        if self.record.resumed is not None:
            self.record.resumed.settle()
        self.record.state(state.type, state.name, state.message, **details)
        if self._submitted:
            self.record.settle_row(state, details)
        else:
            self.record.row(state.type, state.name, state.message, **details)

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
        self._holdings.close([run for run in self._left if not run.done])
        if self._interrupts.received is not None and not kernel.is_here():
            # Now and not at exit: code that is compiled there makes Python forget the signal,
            # and the exit code of the process would be 1 instead of 130.
            shutdown_all()
            stop_tracking()
