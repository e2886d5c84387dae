"""The run around the calling code, as user code may ask for it, in the driver and on any worker.

In this process the engine's own objects are at hand. On a worker of another process there are the few
primitives that travelled with the work order: less than 1 kB, whatever the parameters of the flow are.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import inspect
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import context, markup
from penstock.engine.summary import describe, describe_all
from penstock.runners.worker.running import current
from penstock.runners.worker.seeds import seed_of

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun

TRAVELS = 400
"""Characters of all parameters of a flow run that go along to workers; of the others a description does."""
_SMALL = (bool, int, float, str, type(None))


@dataclass(slots=True)
class FlowRunView:
    """What can be known of a flow run.

    Attributes
    ----------
    id, name, flow_name : str
        Of the run, and of its flow.
    flow_version : str or None
        Of the flow.
    tags : list of str
        Sorted.
    run_count : int
        Attempts so far.
    parameters : dict
        Values; in another process than the flow's own only small ones, else a description.
    parent_flow_run_id, root_flow_run_id : str or None
        The flow run around it, and the one at the top.
    scheduled_start_time : datetime
        When the run came into being, in UTC.
    """

    id: str
    name: str
    flow_name: str
    flow_version: str | None = None
    tags: list[str] = field(default_factory=list)
    run_count: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    parent_flow_run_id: str | None = None
    root_flow_run_id: str | None = None
    scheduled_start_time: dt.datetime | None = None

    def _repr_html_(self) -> str:
        """Show in a notebook."""
        return _card("Flow run", self.name, self)


@dataclass(slots=True)
class TaskRunView:
    """What can be known of a task run.

    Attributes
    ----------
    id, name, task_name : str
        Of the run, and of its task.
    tags : list of str
        Sorted.
    run_count : int
        Number of the attempt that runs.
    parameters : dict
        The arguments of the call, defaults included.
    flow_run_id : str or None
        The flow run around it.
    seed : int or None
        For random numbers, the same in every attempt and on every runner.
    """

    id: str
    name: str
    task_name: str
    tags: list[str] = field(default_factory=list)
    run_count: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    flow_run_id: str | None = None
    seed: int | None = None

    def _repr_html_(self) -> str:
        """Show in a notebook."""
        return _card("Task run", self.name, self)


def _card(kind: str, title: str, view: FlowRunView | TaskRunView) -> str:
    rows: list[tuple[str, str]] = []
    for one in dataclasses.fields(view):
        value = getattr(view, one.name)
        if one.name == "parameters":
            value = describe_all(value)  # never the data
        if one.name != "name" and value not in (None, {}, []):
            rows.append((one.name.replace("_", " "), str(value)))
    return markup.card(kind, title, rows)


@dataclass(slots=True)
class FlowRunContext:
    """What surrounds the code of a flow.

    Attributes
    ----------
    flow_run : FlowRunView
        The run.
    flow : Flow
        What runs; on a worker of another process an object that has its name only.
    parameters : dict
        Of the run.
    """

    flow_run: FlowRunView
    flow: Any
    parameters: dict[str, Any]

    @classmethod
    def get(cls) -> FlowRunContext | None:
        """Return that of the calling code, also inside of a task; None outside of flows."""
        flow_run = flow_run_here()
        if flow_run is None:
            return None
        live = _live_flow()
        flow = live.flow if live is not None else SimpleNamespace(name=flow_run.flow_name)
        return cls(flow_run, flow, flow_run.parameters)


@dataclass(slots=True)
class TaskRunContext:
    """What surrounds the code of a task.

    Attributes
    ----------
    task_run : TaskRunView
        The run.
    flow_run : FlowRunView or None
        The flow run around it.
    task : Task
        What runs; on a worker of another process an object with its name and function.
    parameters : dict
        Of the call.
    """

    task_run: TaskRunView
    flow_run: FlowRunView | None
    task: Any
    parameters: dict[str, Any]

    @classmethod
    def get(cls) -> TaskRunContext | None:
        """Return that of the calling code, None outside of tasks."""
        task_run = task_run_here()
        if task_run is None:
            return None
        running = current()
        scope = running.scope
        task: Any = scope.task_run.task if scope is not None and scope.task_run is not None else None
        if task is None or not hasattr(task, "fn"):
            called = running.called
            task = SimpleNamespace(name=task_run.task_name, fn=called[0] if called else None)
        return cls(task_run, flow_run_here(), task, task_run.parameters)


def get_run_context() -> TaskRunContext | FlowRunContext:
    """Return the context of the task or flow that calls.

    Raises
    ------
    MissingContextError
        Outside of a flow or task run.
    """
    found: TaskRunContext | FlowRunContext | None = TaskRunContext.get() if _in_task() else None
    found = found or FlowRunContext.get()
    if found is None:
        message = "There is no active flow or task run; call get_run_context() inside one."
        raise errors.MissingContextError(message)
    return found


def _in_task() -> bool:
    """Whether a task surrounds the calling code more closely than a flow."""
    running = current()
    return running is not None and not _flow_within(running)


def _flow_within(running: Any) -> bool:
    """Whether the code of a task has called a flow, and that one calls."""
    scope = context.innermost()
    return scope is not None and scope.running is running and scope.flow_run is not None


def _live_flow() -> FlowRun | None:
    """Return the flow run around the calling code where it is an object of this process."""
    running = current()
    scope = context.innermost()
    if running is None or _flow_within(running):
        return scope.flow_run if scope is not None else None
    own = running.scope
    live = own.flow_run if own is not None else None
    return live if live is not None and hasattr(live.flow, "body") else None


def flow_run_here() -> FlowRunView | None:
    """Return the flow run around the calling code."""
    live = _live_flow()
    if live is not None:
        return of_flow(live)
    running = current()
    header = running.order.get("context") if running is not None else None
    if not header or not header.get("flow_run"):
        return None
    about = pickle.loads(header["about"]) if header.get("about") else {}
    return FlowRunView(
        header["flow_run"], header["flow_run_name"], header["flow"], root_flow_run_id=header["root"], **about
    )


def of_flow(flow_run: FlowRun) -> FlowRunView:
    """Describe a flow run of this process."""
    options = getattr(flow_run.flow, "options", None)
    return FlowRunView(
        flow_run.id,
        flow_run.name,
        flow_run.flow.name,
        getattr(options, "version", None),
        sorted(flow_run.tags),
        flow_run.position.attempt,
        dict(flow_run.parameters),
        flow_run.parent.id if flow_run.parent is not None else None,
        flow_run.root,
        dt.datetime.fromtimestamp(flow_run.started, dt.UTC),
    )


def pack_flow(flow_run: FlowRun) -> bytes:
    """Pack what `flow_run_here` needs to know in another process, besides ids and names."""
    view = of_flow(flow_run)
    return pickle.dumps(
        {
            "flow_version": view.flow_version,
            "tags": view.tags[:20],
            "run_count": view.run_count,
            "parameters": small(view.parameters),
            "parent_flow_run_id": view.parent_flow_run_id,
            "scheduled_start_time": view.scheduled_start_time,
        },
        5,
    )


def small(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters that may travel: small plain values, and descriptions of others, until there is no room."""
    room = TRAVELS
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        kept = value if type(value) in _SMALL and len(repr(value)) <= 100 else describe(value)
        room -= len(name) + len(repr(kept))
        if room < 0:
            break
        found[name] = kept
    return found


def task_run_here() -> TaskRunView | None:
    """Return the task run around the calling code."""
    running = current()
    if running is None or not running.order.get("task"):
        return None
    order = running.order
    header = order.get("context") or {}
    return TaskRunView(
        order["run"],
        order["name"],
        order["task"],
        list(order.get("tags", ())),
        order["attempt"],
        _arguments(running.called),
        header.get("flow_run") or None,
        seed_of(order),
    )


def _arguments(called: Any) -> dict[str, Any]:
    if called is None:
        return {}
    function, args, kwargs = called
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a function of C tells no names
        return dict(kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
