"""`.map`: from iterable arguments to one call for each element."""

from __future__ import annotations

import io
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import events
from penstock.engine.annotations import Annotation, allow_failure, quote, unmapped
from penstock.engine.caller import Caller
from penstock.engine.calls import Source, TaskRun
from penstock.engine.context import Scope, current_tags
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.options import run_name

if TYPE_CHECKING:
    import inspect

    from penstock.engine.task import Task


@dataclass(slots=True)
class Part:
    """One argument that is taken apart.

    Attributes
    ----------
    items : sequence
        A value, or a future of one, for each element.
    wrap : callable or None
        The annotation to put around each.
    """

    items: Sequence[Any]
    wrap: Callable[[Any], Any] | None = None

    def at(self, index: int) -> Any:
        """Return the argument of one element."""
        item = self.items[index]
        return item if self.wrap is None else self.wrap(item)


def make(
    task: Task[..., Any], scope: Scope, bound: inspect.BoundArguments, after: tuple[Source, ...]
) -> list[TaskRun]:
    """Make the runs of a map, with their calls, and write down that they exist.

    Raises
    ------
    MappingMissingIterable, MappingLengthMismatch
        If there is nothing to map over, or the lengths differ.
    UpstreamTaskError
        If a future that is to be taken apart did not complete.
    """
    parts: dict[int | str, Part] = {}
    args, kwargs = list(bound.args), dict(bound.kwargs)
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        part = _part(value, task, scope)
        if part is None:
            static = value.unwrap() if isinstance(value, unmapped) else value
            if isinstance(place, int):
                args[place] = static
            else:
                kwargs[place] = static
        else:
            parts[place] = part
    count = _count(task, parts)
    return _make(task, scope, bound, after, args, kwargs, parts, count) if count else []


def _make(
    task: Task[..., Any],
    scope: Scope,
    bound: inspect.BoundArguments,
    after: tuple[Source, ...],
    args: list[Any],
    kwargs: dict[str, Any],
    parts: dict[Any, Part],
    count: int,
) -> list[TaskRun]:
    caller = Caller(scope.session, task, scope)
    map_id = events.new_id()
    template = task.options.task_run_name
    tags = task.options.tags | current_tags() | (scope.flow_run.tags if scope.flow_run else frozenset())
    root = scope.flow_run.root if scope.flow_run else map_id
    runs = []
    names: list[str] | None = [] if template is not None else None
    for index in range(count):
        for place, part in parts.items():
            if isinstance(place, int):
                args[place] = part.at(index)
            else:
                kwargs[place] = part.at(index)
        name = f"{task.name}-{index}"
        if names is not None:
            name = run_name(template, name, with_defaults(task.signature.bind(*args, **kwargs)))
            names.append(name)
        run = TaskRun(
            task,
            name,
            root=root,
            flow_run=scope.flow_run,
            surrounding=scope.task_run,
            map_id=map_id,
            index=index,
            tags=tags,
        )
        run.call = caller.call(tuple(args), dict(kwargs), after)
        runs.append(run)
    named = {_parameter(task, place): part for place, part in parts.items()}
    body = {"name": task.name, "start": 0, "count": count, **_edges(runs, named, after)}
    if names is not None:
        body["names"] = names
    scope.session.journal.map_made(runs[0], body, bound.arguments)
    return runs


def _count(task: Task[..., Any], parts: dict[Any, Part]) -> int:
    if not parts:
        message = (
            f"No iterable parameters were received. Parameters for {task.name}.map must include at least "
            "one iterable: a list, range, array, generator or a future of one."
        )
        raise errors.MappingMissingIterable(message)
    lengths = {str(place): len(part.items) for place, part in parts.items()}
    if len(set(lengths.values())) > 1:
        message = (
            f"Expected iterable parameters of {task.name}.map to have the same length, got {lengths}. "
            "Mark what every element shall get with unmapped(...)."
        )
        raise errors.MappingLengthMismatch(message)
    return next(iter(lengths.values()))


def _part(value: Any, task: Task[..., Any], scope: Scope) -> Part | None:
    if isinstance(value, unmapped):
        return None
    if isinstance(value, (allow_failure, quote)):
        inner = _part(value.unwrap(), task, scope)
        return None if inner is None else Part(inner.items, value.rewrap)
    if isinstance(value, Annotation):
        return None
    run = run_of(value)
    if run is not None:
        return Part(_elements(PenstockFuture(run), task))
    if isinstance(value, (str, bytes, bytearray, io.IOBase)) or not isinstance(value, Iterable):
        return None
    if isinstance(value, dict) or hasattr(value, "columns"):
        what = "keys" if isinstance(value, dict) else "column names"
        warnings.warn(
            f"{task.name}.map iterates over the {what} of a {type(value).__name__}; "
            "pass unmapped(...) to give it to every element.",
            stacklevel=6,
        )
        return Part(list(value))
    try:
        indexed = isinstance(value, (list, tuple, range)) or hasattr(value, "__array__")
        return Part(value if indexed and len(value) >= 0 else list(value))  # type: ignore[arg-type]
    except TypeError:  # an array without dimensions
        return None


def _elements(future: PenstockFuture[Any], task: Task[..., Any]) -> list[PenstockFuture[Any]]:
    """Measure a value where it lies, and make a future for each element of it."""
    from penstock.engine import ambient

    scope = ambient.scope_for_submit(task.name)
    future.wait()
    if not future._run.completed:
        state = future.state
        message = (
            f"{task.name}.map got the future of {future.name!r}, which ended as {state.name}: {state.message}"
        )
        raise errors.UpstreamTaskError(message).of_run(future.task_run_id)
    length_task, item_task = helpers()
    length = _helper(length_task, (future,), scope)
    count = length.result()
    return [_helper(item_task, (future, index), scope) for index in range(count)]


def elements_of(future: PenstockFuture[Any]) -> Iterator[PenstockFuture[Any]]:
    """Yield the elements of a value, when its task has ended; raise what the task raised."""
    future.wait()
    error = future.exception()
    if error is not None:
        raise error
    yield from _elements(future, future._run.task)


def _helper(task: Task[..., Any], args: tuple[Any, ...], scope: Scope) -> PenstockFuture[Any]:
    run = TaskRun(task, task.name, flow_run=scope.flow_run, surrounding=scope.task_run, tracked=False)
    run.call = Caller(scope.session, task, scope).call(args, {})
    scope.session.submit([run], scope)
    return PenstockFuture(run)


_helpers: list[Task[..., Any]] = []


def helpers() -> list[Task[..., Any]]:
    """Return the engine's own tasks: the length of a value, and one item of it."""
    if not _helpers:
        from penstock.engine.task import Task

        _helpers.append(Task(len, name="len", inputs="shared"))
        _helpers.append(Task(operator.getitem, name="item", inputs="shared"))
    return _helpers


def _edges(runs: list[TaskRun], parts: dict[Any, Part], after: tuple[Source, ...]) -> dict[str, Any]:
    """Describe the upstreams of a map: shared ones once, those of the elements as a range."""
    shared: dict[str, str] = {s.run.id: "wait_for" for s in after if s.run is not None and s.run.tracked}
    of_elements = {
        id(item._run) for part in parts.values() for item in part.items if isinstance(item, PenstockFuture)
    }
    first = runs[0].call
    for source in first.sources if first is not None else ():
        if source.run is not None and source.run.tracked and id(source.run) not in of_elements:
            shared.setdefault(source.run.id, "")
    maps, singles = [], []
    for place, part in parts.items():
        upstream = [run for item in part.items if (run := run_of(item)) is not None and run.tracked]
        if not upstream:
            origin = next((item for item in part.items if run_of(item) is not None), None)
            if origin is not None:  # elements of one future: the edge is to that future
                call = origin._run.call
                source_run = call.sources[0].run if call is not None and call.sources else None
                if source_run is not None and source_run.tracked:
                    shared.setdefault(source_run.id, str(place))
            continue
        head = upstream[0]
        offset = head.index
        regular = head.map_id is not None and len(upstream) == len(runs)
        if regular and all(
            run.map_id == head.map_id and run.index == i + offset for i, run in enumerate(upstream)
        ):
            maps.append([str(place), head.map_id, offset])
        else:
            singles.append([str(place), [run.id if (run := run_of(item)) else None for item in part.items]])
    return {
        "upstream": [[name, run_id] for run_id, name in shared.items()],
        "upstream_maps": maps,
        "upstream_elements": singles,
    }


def _parameter(task: Task[..., Any], place: int | str) -> str:
    """Return the name of the parameter behind a position."""
    if isinstance(place, str):
        return place
    names = list(task.signature.parameters)
    return names[min(place, len(names) - 1)]


def with_defaults(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return the arguments with the defaults of what was not given."""
    bound.apply_defaults()
    return dict(bound.arguments)
