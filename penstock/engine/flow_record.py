"""The rows of one flow run: its own, and the one that stands for it in its parent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from penstock.engine import returned
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.context import Scope
from penstock.engine.entry import describe_entry
from penstock.engine.events import bus
from penstock.engine.flow_arguments import FlowArguments
from penstock.engine.hooks import NO_HOOKS
from penstock.engine.journal import Journal
from penstock.engine.names import new_name
from penstock.engine.reservation import reserved, whereabouts
from penstock.engine.resumption import resumed
from penstock.engine.seeds import next_ordinal
from penstock.engine.states import Position, State, StateType, advance, failure_of
from penstock.engine.tracking import start_tracking

if TYPE_CHECKING:
    from penstock.engine.flow import Flow


class FlowRecord:
    """Writes down what becomes of one flow run.

    Parameters
    ----------
    flow : Flow
        What is called.
    outer : Scope or None
        What surrounds the call; None at the top.
    """

    run: FlowRun

    def __init__(self, flow: Flow[..., Any], outer: Scope | None) -> None:
        self._flow = flow
        self._outer = outer
        self.attempt = 0  # of those that this driver makes
        self._earlier = 0  # attempts before the run was resumed
        self.resumed = resumed() if outer is None else None
        self._reservation = reserved() if outer is None and self.resumed is None else None
        if self.resumed is not None:
            self.journal = self.resumed.journal
        elif self._reservation is not None:
            self.journal = self._reservation.journal
        elif outer is None:
            start_tracking()
            self.journal = Journal(bus.publish)
        else:
            self.journal = outer.session.journal

    def make(self, tags: frozenset[str], arguments: FlowArguments) -> FlowRun:
        """Make the run: a new one, or the one that was reserved, or that is to be resumed."""
        outer, flow = self._outer, self._flow
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
        row: Any = self.resumed or self._reservation or self._before(around, arguments)
        self.run = FlowRun(
            flow,
            row.name if row is not None else new_name(),
            run_id=row.id if row is not None else "",
            parent=outer.flow_run if outer else None,
            task_run=around,
            root=outer.flow_run.root if outer and outer.flow_run else "",
            tags=tags | (outer.flow_run.tags if outer and outer.flow_run else frozenset()),
        )
        if self.resumed is not None:
            self.run.past = self.resumed.past
        if self._reservation is None and row is not None:
            self._earlier = row.attempt
            self.run.position = Position(StateType.PENDING, "Pending", row.attempt + 1)
        return self.run

    def _before(self, around: TaskRun | None, arguments: FlowArguments) -> Any:
        """Return what a nested flow run was before its root is resumed; None if it is a new one."""
        parent = self._outer.flow_run if self._outer is not None else None
        if parent is None or parent.past is None or around is None:
            return None
        outside = around.surrounding.id if around.surrounding is not None else None
        found = parent.past.flow(parent, outside, self._flow.name, arguments.bound())
        if found is None:
            return None
        around._id = found["row"] or around.id
        return SimpleNamespace(id=found["id"], name=found["run_name"], attempt=found["attempt"])

    def write(self, described: dict[str, str], arguments: FlowArguments) -> None:
        """Write the row of the run, before it begins.

        Parameters
        ----------
        described : dict of str to str
            What to say of each argument.
        arguments : FlowArguments
            Of the call.
        """
        run, around = self.run, self.run.task_run
        if around is not None:
            around.child_flow_run = run.id
            around.name = run.name
            parents = [("", up.id) for up in arguments.futures()]
            self.journal.task_made(around, arguments.named, parents)
        write = self.journal.flow_made if self.resumed is None else self._rewrite
        entry = {"entry": describe_entry(self._flow.fn, arguments.named)} if self._outer is None else {}
        write(
            run,
            {
                **entry,
                "name": run.name,
                "flow": self._flow.name,
                "version": self._flow.version,
                "parent_flow_run": run.parent.id if run.parent else None,
                "parent_task_run": around.id if around else None,
                "tags": sorted(run.tags),
                "parameters": described,
                "runner": self._outer.session.runner.name if self._outer else "",
                **whereabouts(),
            },
        )
        if self._reservation is None:  # else it has been PENDING for a while
            self.state(StateType.PENDING)

    def _rewrite(self, run: FlowRun, body: dict[str, Any]) -> None:
        assert self.resumed is not None
        self.resumed.row(body)

    @property
    def number(self) -> int:
        """That of the present attempt of the run."""
        return self._earlier + max(self.attempt, 1)

    def state(
        self,
        to: StateType,
        name: str | None = None,
        message: str = "",
        attempt: int | None = None,
        **details: Any,
    ) -> None:
        """Enter a state and write it down."""
        with self.journal.gate:
            if self.run.position.type is not StateType.PENDING or to is not StateType.PENDING:
                self.run.position = advance(self.run.position, to, name, attempt)
            self.journal.flow_state(self.run, message, **details)

    def row(self, to: StateType, name: str | None = None, message: str = "", **details: Any) -> None:
        """Keep the row that stands for the run in its parent in step, if there is one."""
        run = self.run.task_run
        if run is None:
            return
        run.position = advance(run.position, to, name, self.number)
        run.message = message
        run.done = to.is_final or name == "NotReady"
        self.journal.task_state(run, **details)

    def settle_row(self, state: State, details: dict[str, Any]) -> None:
        """End the run behind the future of a flow in the background."""
        row = self.run.task_run
        assert row is not None
        session = row.carrier
        with session.changing():
            if row.done:
                return
            if state.is_completed():
                returned.give(row, state.data)
            elif not state.is_skipped():
                row.error = failure_of(state)
            session.endings.settle(row, state.type, state.name, state.message, **details)
