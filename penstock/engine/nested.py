"""Tasks that submit tasks: what a task owes its children, and a session inside a worker.

A task ends when its children have ended. On runners of another process the children's events
travel to the driver in the record of the outermost task.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgpack

from penstock.engine import cancelling, events, lookups, refs, results, values, waiting
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.context import Scope
from penstock.engine.futures import run_of
from penstock.engine.journal import Journal
from penstock.runners import inside_worker
from penstock.runners.worker.seeds import seed_of

if TYPE_CHECKING:
    from penstock.engine.session import Session
    from penstock.engine.transactions import Transaction


class Children:
    """The runs that a task has submitted; the worker runtime calls `finish` and `events`.

    Parameters
    ----------
    session : Session
        Who carries them.
    made : list of Event, optional
        The events of a session that lives in this task only.
    """

    def __init__(self, session: Session, made: list[events.Event] | None = None) -> None:
        self.session = session
        self.runs: weakref.WeakSet[TaskRun] = weakref.WeakSet()  # live ones are held by the session
        self._made = made
        self.transaction: Transaction | None = None  # of the attempt, once somebody asks for it

    def finish(self, value: Any, error: BaseException | None) -> Any:
        """Wait for the children and put values in the place of futures in the result."""
        live = [run for run in list(self.runs) if not run.done]
        if error is not None:
            cancelling.cancel(live)
        waiting.wait([run for run in live if not run.done])
        if self.transaction is not None:
            self.transaction.attempt_ended(error)
        if error is not None:
            return value
        return refs.replace(value, self._value)

    def _value(self, leaf: Any, tolerant: int) -> Any:
        run = run_of(leaf)
        if run is None:
            return leaf
        waiting.wait([run])
        return values.results([run], raise_on_failure=not tolerant)[0]

    def values(self) -> bytes:
        """Pack what the code has set in the transaction of its run; empty if nothing."""
        return b"" if self.transaction is None else self.transaction.pack_set()

    def events(self) -> bytes:
        """Pack what happened to the children; empty where the driver has seen it itself."""
        if self._made is None:
            return b""
        self.session.venues.close()
        self.session.close()
        self.session.runner.close()
        packed: bytes = msgpack.packb([events.pack(event) for event in self._made])
        return packed


def children_of(running: Any, session: Session) -> Children:
    """Return the children of the attempt that runs here."""
    if running.nested is None:
        running.nested = Children(session)
    found: Children = running.nested
    return found


def open_scope(running: Any) -> Scope:
    """Make a session for the task that runs here, in a worker of another process than the driver's.

    Parameters
    ----------
    running : Running
        The attempt.

    Returns
    -------
    Scope
        With the ids of the flow and task runs that the work order names.
    """
    from penstock.engine.session import Session

    context = running.order["context"]
    made: list[events.Event] = []
    session = Session(inside_worker(context["runner"]).open(), Journal(made.append))
    running.nested = Children(session, made)
    flow_run = None
    if context["flow_run"]:
        flow = SimpleNamespace(name=context["flow"])
        flow_run = FlowRun(flow, context["flow_run_name"], root=context["root"], run_id=context["flow_run"])
        flow_run.results = results.unpack(context.get("results"))
        flow_run.digest = lookups.read_digest(context.get("parameters"))
    task = SimpleNamespace(name=running.order["task"])
    around = TaskRun(task, running.order["name"], root=context["root"], flow_run=flow_run)  # type: ignore[arg-type]
    around._id = running.order["run"]
    around.session, around.seed = session, seed_of(running.order)
    return Scope(session, flow_run, around, running, bool(running.order["prints"]), context["depth"])
