"""`.map`: from iterable arguments to one call for each element."""

from __future__ import annotations

import io
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from penstock import errors
from penstock.engine import cancelling, events, items, payload, refs, run_transactions, sample, waiting
from penstock.engine.annotations import (
    Annotation,
    allow_failure,
    allow_skipped,
    opaque,
    quote,
    unmapped,
)
from penstock.engine.caller import Caller
from penstock.engine.calls import Source, TaskRun
from penstock.engine.chunks import Packer
from penstock.engine.context import Scope, current_tags
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.lookups import Item, MapPlan
from penstock.engine.mapped import Capture, Column, Mapped
from penstock.engine.options import TaskOptions, needs_values, run_name
from penstock.engine.seeds import next_ordinal
from penstock.runners.worker.sizes import size_of

if TYPE_CHECKING:
    import inspect

    from penstock.engine.task import Task
    from penstock.runners.base import TaskRunner

WINDOW = 50_000
"""Units of work of one map that are with a back end at a time, where the runner does not say."""
PIECE, LARGEST_PIECE = 256, 8192
"""Items that are drawn from a generator at a time: at first, and where they are small."""
AHEAD_BYTES = 256 << 20
"""Bytes of drawn items that may be on their way, by their estimated size."""
WHOLE = 8 << 20
"""Bytes up to which a value that is mapped over travels whole to where its items are needed."""


@dataclass(slots=True)
class Part:
    """One argument that is taken apart.

    Attributes
    ----------
    items : sequence or iterator
        A value, or a future of one, for each element.
    wrap : callable or None
        The annotation to put around each.
    of : TaskRun or None
        The run whose value holds the items; `items` are their positions in it.
    lively : bool
        Somebody makes the items right now: each goes on its way when it comes.
    total : int or None
        Of how many `items` are some, in a plan; None: they are all.
    """

    items: Any
    wrap: Callable[[Any], Any] | None = None
    of: TaskRun | None = None
    lively: bool = False
    total: int | None = None

    @property
    def length(self) -> int:
        """How many there are, or `sample.OPEN`."""
        return len(self.items) if self.total is None else self.total

    def at(self, index: int) -> Any:
        """Return the argument of one element."""
        item = self.items[index]
        return item if self.wrap is None else self.wrap(item)

    def token(self, index: int) -> Any:
        """Return the argument of one element, as it counts for its cache key."""
        return self.at(index) if self.of is None else Item(self.of, self.items[index])


def submit(
    task: Task[..., Any], scope: Scope, bound: inspect.BoundArguments, after: tuple[Source, ...]
) -> list[TaskRun]:
    """Make the runs of a map and hand them to the session.

    A generator is drawn as the window has room: what it has yielded is with the back end, or done.

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
        if part is not None:
            parts[place] = part
    if scope.session.plans:
        return _planned(task, scope, bound, after, parts)
    if any(isinstance(part.items, Iterator) for part in parts.values()):
        making = Making(task, scope, bound, after, parts, None)
        return _drawn(making, parts)
    count = _count(task, parts)
    if not count:
        return []
    runs = Making(task, scope, bound, after, parts, count).piece(parts, 0, count)
    _send(runs, scope)
    return runs


def _send(runs: list[TaskRun], scope: Scope) -> None:
    scope.session.submit(runs, scope)
    if runs[0].transaction is not None:
        run_transactions.enter(runs)


def _planned(
    task: Task[..., Any],
    scope: Scope,
    bound: inspect.BoundArguments,
    after: tuple[Source, ...],
    parts: dict[int | str, Part],
) -> list[TaskRun]:
    """Make the elements that a plan holds, and tell it how many there are."""
    for place, part in parts.items():
        if isinstance(part.items, Iterator):
            first, number = sample.drawn(part.items)
            parts[place] = replace(part, items=first, total=number)
    total = _count(task, parts)
    count = sample.held(total, [len(part.items) for part in parts.values()])
    if not count:
        return []
    some = {place: replace(part, items=part.items[:count]) for place, part in parts.items()}
    runs = Making(task, scope, bound, after, some, total).piece(some, 0, count)
    if count != total:
        scope.session.totals[str(runs[0].map_id)] = total
    scope.session.submit(runs, scope)
    return runs


def calls(
    flow: Any, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of one call for each element, by the rules of a map.

    Raises
    ------
    MappingMissingIterable, MappingLengthMismatch
        If there is nothing to map over, or the lengths differ.
    """
    parts: dict[int | str, Part] = {}
    same: dict[int | str, Any] = {}
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        part = _part(value, flow, scope)
        if part is None:
            same[place] = value.unwrap() if isinstance(value, unmapped) else value
            continue
        if part.of is not None:  # a value on the cluster: each call gets a reference to its item
            part = Part(_elements(PenstockFuture(part.of), scope))
        elif isinstance(part.items, Iterator):
            part = replace(part, items=list(part.items))
        parts[place] = part
    count = _count(flow, parts)
    if any(part.total is not None for part in parts.values()):
        raise sample.Ends(
            f"{flow.name}.map makes a run for each element of a map of which a plan holds only some"
        )
    found = []
    for index in range(count):
        given = {place: part.at(index) for place, part in parts.items()} | same
        some = tuple(given[place] for place in range(len(args)))
        found.append((some, {name: given[name] for name in kwargs}))
    return found


def _drawn(making: Making, parts: dict[int | str, Part]) -> list[TaskRun]:
    """Draw the items of generators piece by piece, and wait while enough of them are on their way."""
    sources = {place: iter(part.items) for place, part in parts.items()}
    runs: list[TaskRun] = []
    ahead: list[TaskRun] = []
    lively = any(part.lively for part in parts.values())
    nbytes, size = 0, 1 if lively else PIECE
    while True:
        problems: list[Exception] = []
        drawn = {place: _draw(source, size, problems) for place, source in sources.items()}
        counts = {str(place): len(items) for place, items in drawn.items()}
        count = min(counts.values())
        if len(set(counts.values())) > 1 and not problems:
            cancelling.cancel(runs)
            lengths = {name: len(runs) + number for name, number in counts.items()}
            raise errors.MappingLengthMismatch(_mismatch(making.task, lengths))
        if not count and not problems:
            return runs
        some = {place: replace(parts[place], items=items[:count]) for place, items in drawn.items()}
        piece = making.piece(some, len(runs), count) if count else []
        if piece:
            _send(piece, making.scope)
        if problems:  # what came before it is on its way
            raise problems[0]
        runs += piece
        added = sum(size_of(items) for items in drawn.values())
        nbytes += added
        if added < AHEAD_BYTES // 32 and not lively:  # a chunk does not reach beyond a piece
            size = min(2 * size, LARGEST_PIECE, max(making.window // 2, 1))
        ahead = [run for run in (*ahead, *piece) if not run.done]
        while len(ahead) >= making.window or (nbytes > AHEAD_BYTES and ahead):
            waiting.wait(ahead[: max(len(ahead) // 2, 1)])
            ahead = [run for run in ahead if not run.done]
            nbytes = nbytes * len(ahead) // max(len(runs), 1) if ahead else 0


def _draw(source: Iterator[Any], size: int, problems: list[Exception]) -> list[Any]:
    """Take some items; what the user's generator raises goes to `problems`."""
    items: list[Any] = []
    try:
        items.extend(itertools.islice(source, size))
    except Exception as error:
        problems.append(error)
    return items


class Making:
    """Makes the elements of one map, at once or piece by piece.

    Parameters
    ----------
    task, scope, bound, after
        What is mapped, where, with which arguments, after what.
    parts : dict
        The arguments that are taken apart, by position or keyword.
    count : int or None
        How many elements there are; None if nobody knows yet.
    """

    def __init__(
        self,
        task: Task[..., Any],
        scope: Scope,
        bound: inspect.BoundArguments,
        after: tuple[Source, ...],
        parts: dict[int | str, Part],
        count: int | None,
    ) -> None:
        session = scope.session
        self.task, self.scope, self.after = task, scope, after
        self.window = min(int(getattr(session.runner, "max_in_flight", WINDOW)), WINDOW)
        self._bound = bound
        self._caller = Caller(session, task, scope)
        self._capture = Capture(
            task.name, run_of, None if session.in_process else self._caller.placed, self._caller.tolerance
        )
        places: list[tuple[int | str, Any]] = [*enumerate(bound.args), *bound.kwargs.items()]
        self._same: dict[int | str, Any] = {}
        self._places = [place for place, _ in places]
        for place, value in places:
            if place not in parts:
                self._same[place] = value.unwrap() if isinstance(value, unmapped) else value
        self._captured = {place: self._capture.one(value, place) for place, value in self._same.items()}
        self._reason = alone(task.options)
        self._packer = packing(task.options, session.runner, self.window, count, self._reason)
        past = scope.flow_run.past if scope.flow_run is not None else None
        around = scope.task_run.id if scope.task_run is not None else None
        known = None
        if past is not None and scope.flow_run is not None:
            idempotent = task.options.idempotent
            known = past.map(scope.flow_run, around, task.name, count, idempotent=idempotent)
        self._map_id = known or events.new_id()
        self._ordinal = next_ordinal(scope, task.name)
        self._packed_naming: bytes | None = None
        self._keys = MapPlan(task, scope.flow_run, in_process=session.in_process)
        tags = task.options.tags | current_tags()
        self._tags = tags | (scope.flow_run.tags if scope.flow_run else frozenset())
        self._joining = run_transactions.joining(scope, task.options.hooks)
        if self._joining is not None:
            self._caller.context = self._joining.context(self._caller.context)

    def piece(self, parts: dict[int | str, Part], start: int, count: int) -> list[TaskRun]:
        """Make some elements, and write down that they exist.

        Parameters
        ----------
        parts : dict
            The arguments that are taken apart, with `count` items each.
        start : int
            Index of the first one in the map.
        count : int
            How many.
        """
        task, scope = self.task, self.scope
        arguments = [
            (
                place if isinstance(place, str) else None,
                _column(self._capture, parts[place], place) if place in parts else self._captured[place],
            )
            for place in self._places
        ]
        mapped = Mapped(
            task,
            self._caller.function,
            self._caller.context,
            arguments,
            self.after,
            scope.session.in_process,
            tuple(self._capture.held),
            start,
            self._packer,
            self._reason,
        )
        names = self._names(parts, start, count)
        named_later = names is not None and None in names
        if named_later:
            mapped.naming = self._naming()
        root = scope.flow_run.root if scope.flow_run else self._map_id
        runs = []
        for index in range(start, start + count):
            run = TaskRun(
                task,
                (names[index - start] or "") if names is not None else "",
                root=root,
                flow_run=scope.flow_run,
                surrounding=scope.task_run,
                map_id=self._map_id,
                index=index,
                tags=self._tags,
            )
            run.mapped, run.ordinal = mapped, self._ordinal
            runs.append(run)
        if self._joining is not None:
            for run in runs:
                run.transaction = self._joining.of(run)
        self._plan_keys(runs, parts)
        named = {_parameter(task, place): part for place, part in parts.items()}
        body = {"name": task.name, "start": start, "count": count, **_edges(runs, named, mapped)}
        if names is not None:
            body["names"] = [run.name for run in runs]
        if not scope.session.journal.elements_told_again(runs):
            scope.session.journal.map_made(runs[0], body, self._bound.arguments, named_later)
        return runs

    def _plan_keys(self, runs: list[TaskRun], parts: dict[int | str, Part]) -> None:
        """Make the cache keys of elements, if any."""
        if not self._keys.needed(runs[0]):
            return
        for number, run in enumerate(runs):
            given = {
                place: self._same[place] if place in self._same else parts[place].token(number)
                for place in self._places
            }
            self._keys.element(run, given, self._same)

    def _naming(self) -> Any:
        """Return what makes names on workers; packed once for all pieces."""
        template = self.task.options.task_run_name
        if isinstance(template, str) or self.scope.session.in_process:
            return template
        if self._packed_naming is None:
            self._packed_naming = payload.pack_function(cast("Callable[..., str]", template))
        return self._packed_naming

    def _names(self, parts: dict[int | str, Part], start: int, count: int) -> list[str | None] | None:
        """Return the names of the elements, None if they are just numbered; one that needs a value elsewhere is None."""
        task = self.task
        template = task.options.task_run_name
        if template is None:
            return None
        names: list[str | None] = []
        for number in range(count):
            given = {place: part.token(number) for place, part in parts.items()} | self._same
            args = [given[place] for place in self._places if isinstance(place, int)]
            kwargs = {place: given[place] for place in self._places if isinstance(place, str)}
            bound = task.signature.bind(*args, **kwargs)
            arguments = with_defaults(bound)
            if needs_values(template, arguments, is_there):
                names.append(None)
            else:
                names.append(run_name(template, f"{task.name}-{start + number}", arguments))
        return names


def is_there(argument: Any) -> bool:
    """Whether an argument holds no future, and is no item of one."""
    futures: list[Any] = []

    def leaf(value: Any, tolerant: int) -> Any:
        if isinstance(value, Item) or run_of(value) is not None:
            futures.append(value)
        return value

    refs.replace(argument, leaf)
    return not futures


def _column(capture: Capture, part: Part, place: int | str) -> Column:
    if part.of is not None:
        return Column("items", part.items, Source(part.of))
    return capture.column(part.items, part.wrap, place)


def alone(options: TaskOptions) -> str:
    """Return why the elements of a map go alone, empty if they need not."""
    if options.chunk_size == 1:
        return "chunk_size is 1"
    if options.timeout_seconds is not None:
        return "timeout_seconds counts from the start of each element"
    if not options.idempotent:
        return "idempotent=False: of a lost chunk nobody could say which elements had begun"
    if options.retry.delays and max(options.retry.delays) > 1:
        return "long retry delays"
    return ""


def packing(
    options: TaskOptions, runner: TaskRunner, window: int, count: int | None, reason: str
) -> Packer | None:
    """Return what decides how many elements go together and how many are sent ahead.

    None where all of them can go at once, each alone.
    """
    if reason and count is not None and count <= window:
        return None
    return Packer(options, runner.info.threads, window, alone=bool(reason))


def _count(task: Task[..., Any], parts: dict[Any, Part]) -> int:
    if not parts:
        message = (
            f"No iterable parameters were received. Parameters for {task.name}.map must include at least "
            "one iterable: a list, range, array, generator or a future of one."
        )
        raise errors.MappingMissingIterable(message)
    lengths = {str(place): part.length for place, part in parts.items()}
    known = {length for length in lengths.values() if length != sample.OPEN}
    if len(known) > 1:
        raise errors.MappingLengthMismatch(_mismatch(task, lengths))
    return next(iter(known), sample.OPEN)


def _mismatch(task: Task[..., Any], lengths: dict[str, int]) -> str:
    return (
        f"Expected iterable parameters of {task.name}.map to have the same length, got {lengths}. "
        "Mark what every element shall get with unmapped(...)."
    )


def _part(value: Any, task: Task[..., Any], scope: Scope) -> Part | None:
    if isinstance(value, unmapped):
        return None
    if isinstance(value, (allow_failure, allow_skipped, opaque, quote)):
        inner = _part(value.unwrap(), task, scope)
        return None if inner is None else replace(inner, wrap=value.rewrap, lively=False)
    if isinstance(value, Annotation):
        return None
    run = run_of(value)
    if run is not None:
        return _inside(PenstockFuture(run), task)
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
    if isinstance(value, Iterator):
        return Part(value)
    if isinstance(value, sample.Sampled):
        return Part(value, total=value.total)
    try:
        indexed = isinstance(value, (list, tuple, range)) or hasattr(value, "__array__")
        return Part(value if indexed and len(value) >= 0 else list(value))  # type: ignore[arg-type]
    except TypeError:  # an array without dimensions
        return None


def _inside(future: PenstockFuture[Any], task: Task[..., Any]) -> Part:
    """Measure a value where it lies; its items are read where they are needed, or near the rest of it."""
    from penstock.engine import ambient

    scope = ambient.scope_for_submit(task.name)
    run = future._run
    if scope.session.plans:
        future.wait()
        return Part(range(sample.SAMPLE), None, run, total=sample.OPEN)
    if items.ask(run):  # a generator: each item is taken as it comes
        return Part(_as_they_come(future, task), lively=True)
    future.wait()
    if not run.completed:
        raise _unusable(future, task)
    if run.session is scope.session and run.place < 0 and run.nbytes <= WHOLE and run.items is None:
        return Part(range(_helper(helpers()[0], (future,), scope).result()), None, run)
    return Part(_elements(future, scope))


def _as_they_come(future: PenstockFuture[Any], task: Task[..., Any]) -> Iterator[PenstockFuture[Any]]:
    """Yield the items of a generator task that runs."""
    for item in items.drawn(future._run, raise_on_failure=False):
        yield PenstockFuture(item)
    if not future._run.completed:
        raise _unusable(future, task)


def _unusable(future: PenstockFuture[Any], task: Task[..., Any]) -> errors.RunError:
    state = future.state
    message = (
        f"Upstream task run '{future.task_run_id}' did not reach a 'COMPLETED' state. {task.name}.map got "
        f"the future of {future.name!r}, which ended as {state.name}: {state.message}"
    )
    return errors.UpstreamTaskError(message).of_run(future.task_run_id)


def _elements(future: PenstockFuture[Any], scope: Scope) -> list[PenstockFuture[Any]]:
    length_task, item_task = helpers()
    count = _helper(length_task, (future,), scope).result()
    return [_helper(item_task, (future, index), scope) for index in range(count)]


def elements_of(future: PenstockFuture[Any]) -> Iterator[PenstockFuture[Any]]:
    """Yield the elements of a value, when its task has ended; raise what the task raised."""
    future.wait()
    error = future.exception()
    if error is not None:
        raise error
    from penstock.engine import ambient

    yield from _elements(future, ambient.scope_for_submit(future.name))


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


def _edges(runs: list[TaskRun], parts: dict[Any, Part], mapped: Mapped) -> dict[str, Any]:
    """Describe the upstreams of a map: shared ones once, those of the elements as a range."""
    shared: dict[str, str] = {
        s.run.id: "wait_for" for s in mapped.after if s.run is not None and s.run.tracked
    }
    for source in mapped.shared_sources:
        if source.run is not None and source.run.tracked:
            shared.setdefault(source.run.id, "")
    maps, singles = [], []
    for place, part in parts.items():
        if part.of is not None:
            if part.of.tracked:
                shared.setdefault(part.of.id, str(place))
            continue
        if isinstance(part.items, range):
            continue
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
        offset = head.index - runs[0].index
        regular = head.map_id is not None and len(upstream) == len(runs)
        if regular and all(
            run.map_id == head.map_id and run.index == own.index + offset
            for own, run in zip(runs, upstream, strict=True)
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
