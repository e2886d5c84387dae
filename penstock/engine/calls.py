"""Runs while they live in the driver: what was called, where it stands, how it ended."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from penstock.engine import events, refs
from penstock.engine.results import ResultOptions
from penstock.engine.states import Position, StateType

if TYPE_CHECKING:
    from penstock.engine.clock import Alarm
    from penstock.engine.deadline import Deadline
    from penstock.engine.graph import Edge
    from penstock.engine.lookups import Caching
    from penstock.engine.mapped import Mapped
    from penstock.engine.past import Lane, Past
    from penstock.engine.recipes import Recipe
    from penstock.engine.recollection import Recollection
    from penstock.engine.run_transactions import RunTransaction
    from penstock.engine.seeds import Ordinals
    from penstock.engine.session import Session
    from penstock.engine.task import Task
    from penstock.runners.base import Key, Ref


@dataclass(slots=True, eq=False)
class Source:
    """Where the value for a slot of the arguments comes from.

    Attributes
    ----------
    run : TaskRun or None
        The upstream, or None if the value was put near the workers.
    ref : Ref or None
        Reference to a value that was put.
    tolerant : int
        What is a value, too: the exception of a failed upstream, the nothing of a skipped one; see `annotations`.
    """

    run: TaskRun | None = None
    ref: Ref | None = None
    tolerant: int = 0


class Bound:
    """Arguments for a runner in this process: shares objects, fills the slots in when it is time."""

    __slots__ = ("args", "kwargs", "slots")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], slots: int) -> None:
        self.args = args
        self.kwargs = kwargs
        self.slots = slots

    def __call__(self, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the upstream values in place."""
        if not self.slots:
            return self.args, self.kwargs
        return tuple(refs.fill(list(self.args), values)), refs.fill(self.kwargs, values)


@dataclass(slots=True, eq=False)
class Call:
    """An invocation as data: what has to be kept until the run has ended.

    Attributes
    ----------
    task : Task
        What to run, with its options.
    function : bytes or callable
        As the runner needs it.
    arguments : bytes or callable
        As the runner needs it; see `Submission`.
    sources : tuple of Source
        Where the values for the slots come from, in order.
    after : tuple of Source
        What has to end first (`wait_for`).
    context : dict
        Primitives that nested code needs to know.
    held : tuple
        Objects of the caller that the arguments depend on, such as persisted Dask collections.
    naming : str, bytes, callable or None
        What makes the name of the run where its arguments are known: a template, or a function as the
        runner needs it.
    """

    task: Task[..., Any]
    function: Any
    arguments: Any
    sources: tuple[Source, ...] = ()
    after: tuple[Source, ...] = ()
    context: dict[str, Any] = field(default_factory=dict)
    held: tuple[Any, ...] = ()
    naming: Any = None


_NEW = Position(StateType.PENDING, "Pending", 0)  # one for all: a hundred thousand runs begin here


class TaskRun:
    """One task run in the driver.

    It is kept by the session until it has ended, then only by futures and by runs that still
    need its value; with the last of them the value is freed.
    """

    __slots__ = (
        "__weakref__",
        "_id",
        "_name",
        "alarm",
        "caching",
        "call",
        "callbacks",
        "cancelling",
        "child_flow_run",
        "crashes",
        "delay",
        "dependants",
        "depth",
        "direct",
        "done",
        "ended",
        "error",
        "excuses",
        "failures",
        "flow_run",
        "hit",
        "index",
        "inside",
        "items",
        "key",
        "map_id",
        "mapped",
        "message",
        "nbytes",
        "ordinal",
        "ordinals",
        "place",
        "position",
        "recipe",
        "ref",
        "released",
        "root",
        "seed",
        "session",
        "started",
        "stored",
        "surrounding",
        "suspicions",
        "tags",
        "task",
        "tracked",
        "transaction",
        "unbegun",
        "value",
        "waiting",
        "worker",
        "yielded",
    )

    def __init__(
        self,
        task: Task[..., Any],
        name: str = "",
        *,
        root: str = "",
        flow_run: FlowRun | None = None,
        surrounding: TaskRun | None = None,
        map_id: str | None = None,
        index: int = -1,
        tags: frozenset[str] = frozenset(),
        tracked: bool = True,
    ) -> None:
        self.task = task
        self._name = name
        self.flow_run = flow_run
        self.map_id = map_id
        self.index = index
        self._id = "" if map_id is not None else events.new_id()
        self.root = root or self._id
        self.tags = tags
        self.tracked = tracked  # False for the engine's own helpers, such as the length of a list
        self.ordinal = 0  # the how-manieth call of its task in the code around it
        self.ordinals: Ordinals | None = None  # of the calls in its own code
        self.seed = -1  # made when somebody asks
        self.position = _NEW
        self.message = ""
        self.call: Call | None = None
        self.mapped: Mapped | None = None  # of an element: the map, which knows its arguments
        self.recipe: Recipe | Mapped | None = None  # how to make the value again, once it exists
        self.key: Key | None = None
        self.ref: Ref | None = None
        self.place = -1  # of a run that is one of many in a chunk: where in its value this one's is
        self.value: Any = None  # of a run that ended in this process with its value at hand
        self.error: BaseException | None = None
        self.done = False
        self.session: Session | None = None
        self.surrounding = surrounding  # the task run whose code submitted this one
        self.released = False  # handed to the buffer: nothing holds it back
        self.cancelling = False
        self.direct = False  # called, not submitted: runs in the caller's thread
        self.delay: float | None = None  # seconds before the next attempt of a direct call
        self.waiting = 0  # upstream edges that still hold the run back
        self.dependants: list[Edge] | None = None
        self.callbacks: list[Callable[[TaskRun], None]] | None = None
        self.depth = 0
        self.inside = 0  # how many task runs surround it
        self.failures = 0
        self.crashes = 0
        self.suspicions = 0  # losses in company of others, since it last came through
        self.excuses = 0  # losses at no cost
        self.unbegun = 0  # those of them before the attempt had begun
        self.started = 0.0
        self.ended = 0.0
        self.nbytes = 0
        self.stored: dict[str, Any] | None = None  # where the value was stored, see `results`
        self.caching: Caching | None = None  # what is looked up or stored under which key, see `lookups`
        self.transaction: RunTransaction | None = None  # its part in the transaction around it
        self.hit: dict[str, Any] | None = None  # where the value lies that is in a storage only
        self.worker = ""
        self.alarm: Alarm | None = None
        self.child_flow_run: str | None = None
        self.items: list[TaskRun] | None = None  # of a generator that was asked for them one by one
        self.yielded = -1  # how many it has yielded in all, once it has ended

    @property
    def given_name(self) -> str | None:
        """The name, None if nobody has made one yet."""
        return self._name or None

    @property
    def name(self) -> str:
        """The name of the run; elements of a map are numbered."""
        return self._name or f"{self.task.name}-{self.index}"

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @property
    def id(self) -> str:
        """The id of the run; that of an element of a map follows from map and index."""
        if not self._id:
            self._id = events.element_id(str(self.map_id), self.index)
        return self._id

    def invocation(self) -> Call | None:
        """What is called with what; None once the run has ended."""
        if self.call is None and self.mapped is not None:
            self.call = self.mapped.call(self.index)
            self.call.naming = None if self._name else self.mapped.naming
        return self.call

    @property
    def carrier(self) -> Session:
        """The session that carries the run."""
        assert self.session is not None  # a future is made of a run that was submitted
        return self.session

    @property
    def type(self) -> StateType:
        """Type of the present state."""
        kind = self.position.type
        assert kind is not None
        return kind

    @property
    def state_name(self) -> str:
        """Name of the present state."""
        return self.position.name

    @property
    def attempt(self) -> int:
        """Number of the present execution, 0 before the first."""
        return self.position.attempt

    @property
    def next_attempt(self) -> int:
        """Number of the execution that comes next: every one that may have begun counts."""
        return self.failures + self.crashes + self.excuses - self.unbegun + 1

    @property
    def settled(self) -> bool:
        """Whether the run has ended, and its hooks with it."""
        return self.done and not (self.session is not None and self.session.hooks.holds(self))

    @property
    def run_count(self) -> int:
        """Number of executions so far, the present one included."""
        return self.position.attempt

    @property
    def flow_run_id(self) -> str | None:
        """Id of the flow run that the run belongs to."""
        return self.flow_run.id if self.flow_run is not None else None

    @property
    def completed(self) -> bool:
        """Whether the run has a value."""
        return self.done and self.position.type is StateType.COMPLETED

    def __repr__(self) -> str:
        """Show name, id and state."""
        return f"<TaskRun {self.name} {self.id[:8]} {self.position.name}>"


class FlowRun:
    """One flow run in the driver (or in a task that calls a flow)."""

    __slots__ = (
        "__weakref__",
        "cancelled",
        "deadline",
        "digest",
        "finished",
        "flow",
        "id",
        "lane",
        "live",
        "memory",
        "name",
        "ordinals",
        "parameters",
        "parent",
        "past",
        "position",
        "results",
        "root",
        "runs",
        "started",
        "tags",
        "task_run",
    )

    def __init__(
        self,
        flow: Any,
        name: str,
        *,
        parent: FlowRun | None = None,
        task_run: TaskRun | None = None,
        root: str = "",
        tags: frozenset[str] = frozenset(),
        run_id: str = "",
    ) -> None:
        self.flow = flow
        self.name = name
        self.id = run_id or events.new_id()
        self.parent = parent
        self.task_run = task_run  # the row that stands for this run in its parent
        self.root = root or self.id
        self.tags = tags
        self.parameters: dict[str, Any] = {}
        own = getattr(getattr(flow, "options", None), "results", ResultOptions())
        self.results: ResultOptions = own.over(parent.results if parent is not None else ResultOptions())
        self.position = Position(StateType.PENDING, "Pending", 0)
        self.live: dict[TaskRun, None] = {}  # runs that have not ended
        self.cancelled = False  # somebody asked it to stop: its code hears of it at its next call to us
        self.ordinals: Ordinals | None = None
        self.digest: Any = None  # of parameters that have stayed in another process
        self.deadline: Deadline | None = parent.deadline if parent is not None else None
        self.memory: Recollection | None = None  # of a flow that may be tried again
        self.finished = 0
        self.runs = 0
        self.started = time.time()
        self.past: Past | None = parent.past if parent is not None else None  # of a run that is resumed
        self.lane: Lane | None = None  # where its code runs, once it does

    @property
    def type(self) -> StateType:
        """Type of the present state."""
        kind = self.position.type
        assert kind is not None
        return kind

    @property
    def run_count(self) -> int:
        """Number of executions of the flow function so far, the present one included."""
        return self.position.attempt

    def __repr__(self) -> str:
        """Show name, id and state."""
        return f"<FlowRun {self.name} {self.id[:8]} {self.position.name}>"


Value = TypeVar("Value")


class ByFlow(Generic[Value]):
    """Something for each flow run, as long as that lives, and for calls outside of flows."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[FlowRun, Value] = weakref.WeakKeyDictionary()
        self._outside: list[Value] = []

    def __setitem__(self, flow: FlowRun | None, value: Value) -> None:
        """Keep the value; it must not hold the flow run."""
        if flow is None:
            self._outside = [value]
        else:
            self._kept[flow] = value

    def __getitem__(self, flow: FlowRun | None) -> Value:
        """Return what is kept; KeyError if there is nothing."""
        if flow is not None:
            return self._kept[flow]
        if not self._outside:
            raise KeyError(flow)
        return self._outside[0]

    def __contains__(self, flow: FlowRun | None) -> bool:
        """Whether there is anything for the flow run."""
        return bool(self._outside) if flow is None else flow in self._kept

    def get(self, flow: FlowRun | None) -> Value | None:
        """Return what is kept, None if there is nothing."""
        try:
            return self[flow]
        except KeyError:
            return None
