"""The arguments of a map: captured once for all its elements, handed out for one or for many.

An element is a number. What its call needs is made when it is sent: the arguments that all
elements share were pickled once, and those that differ lie in one column per argument.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from penstock.engine import payload, refs
from penstock.engine.calls import Call, Source, TaskRun
from penstock.engine.refs import Slot
from penstock.runners.worker.sizes import is_lazy

if TYPE_CHECKING:
    from penstock.engine.chunks import Packer
    from penstock.engine.task import Task

LIGHT = 4_096
"""Bytes of an argument up to which it is kept as long as the value that was made of it."""

Locate = Callable[[Source], tuple[Any, ...]]
"""Answers where a chunk finds an upstream value: ``("value", position, place)`` among the values
that travel with it, or ``("stage", number)`` for the same element of an earlier stage."""


@dataclass(slots=True, eq=False)
class Captured:
    """One argument as it was when the map was made.

    Attributes
    ----------
    kind : {"plain", "packed", "upstream", "filled"}
        An immutable value; a pickle; the value of `sources[0]`; a structure with upstream values
        somewhere inside, pickled with placeholders (in this process: a callable that fills them in).
    content : object
        The value, the bytes, None, or what makes the structure.
    sources : tuple of Source
        The upstream values it needs, in the order of its placeholders.
    """

    kind: Literal["plain", "packed", "upstream", "filled"]
    content: Any = None
    sources: tuple[Source, ...] = ()

    @property
    def weight(self) -> int:
        """Bytes that it holds besides plain values."""
        return len(self.content) if self.kind == "packed" else 0


@dataclass(slots=True, eq=False)
class Column:
    """One argument of all elements.

    Attributes
    ----------
    kind : {"plain", "packed", "upstream", "items", "mixed"}
        Of all entries: immutable values; pickles; runs; items of one upstream value; `Captured`.
    content : sequence
        An entry for each element.
    source : Source or None
        Of the kind "items": where the sequence lies.
    tolerant : int
        What each entry accepts besides a value, see `annotations`.
    """

    kind: Literal["plain", "packed", "upstream", "items", "mixed"]
    content: Sequence[Any]
    source: Source | None = None
    tolerant: int = 0

    @property
    def weight(self) -> int:
        """Bytes that an entry holds besides plain values, on average."""
        return sum(map(len, self.content)) // max(len(self.content), 1) if self.kind == "packed" else 0

    def sources(self, number: int) -> tuple[Source, ...]:
        """Return the upstream values of one entry."""
        if self.kind == "upstream":
            return (Source(self.content[number], None, self.tolerant),)
        if self.kind == "items":
            assert self.source is not None
            return (self.source,)
        if self.kind == "mixed":
            found: tuple[Source, ...] = self.content[number].sources
            return found
        return ()


Argument = Captured | Column


@dataclass(slots=True, eq=False)
class Mapped:
    """A map, as its elements need it.

    Attributes
    ----------
    task : Task
        What each element calls.
    function : bytes or callable
        As the runner needs it.
    context : dict
        Primitives that nested code needs to know.
    arguments : list of (str or None, Captured or Column)
        Positional ones first, then those with a keyword.
    after : tuple of Source
        What has to end before any element starts.
    local : bool
        Elements run in this process and share its objects.
    held : tuple
        Lazy collections among the arguments: what they refer to on the cluster goes with them.
    start : int
        Index of the element behind the first entries of the columns.
    packer : Packer or None
        Decides how many elements go together; None where each has to go alone.
    reason : str
        Why each goes alone, in a user's words; empty where they need not.
    naming : str, bytes, callable or None
        What makes the names of elements where their arguments are known, see `Call`.
    """

    task: Task[..., Any]
    function: Any
    context: dict[str, Any]
    arguments: list[tuple[str | None, Argument]]
    after: tuple[Source, ...] = ()
    local: bool = False
    held: tuple[Any, ...] = ()
    start: int = 0
    packer: Packer | None = None
    reason: str = ""
    naming: Any = None
    has_upstreams: bool = field(init=False)
    is_light: bool = field(init=False)
    """Whether it may be kept beside the values of its elements, so that these can be made again."""

    def __post_init__(self) -> None:
        """Note whether any element depends on anything."""
        self.has_upstreams = bool(self.after) or any(
            argument.kind in {"upstream", "filled", "items", "mixed"} for _, argument in self.arguments
        )
        light = not self.has_upstreams and self.task.options.idempotent and not self.held
        self.is_light = light and all(argument.weight <= LIGHT for _, argument in self.arguments)

    @property
    def shared_sources(self) -> list[Source]:
        """The upstream values that every element gets."""
        found: list[Source] = []
        for _, argument in self.arguments:
            if isinstance(argument, Captured):
                found.extend(argument.sources)
        return found

    def sources(self, index: int) -> Iterator[Source]:
        """Yield where the values for one element come from, then what it waits for."""
        number = index - self.start
        for _, argument in self.arguments:
            yield from argument.sources if isinstance(argument, Captured) else argument.sources(number)
        yield from self.after

    def call(self, index: int) -> Call:
        """Return the invocation of one element, to be sent by itself."""
        number = index - self.start
        sources: list[Source] = []

        def locate(source: Source) -> tuple[Any, ...]:
            sources.append(source)
            return ("value", len(sources) - 1, None)

        entries = [(keyword, _entry(one, number, locate)) for keyword, one in self.arguments]
        arguments: Any = entries
        if not self.local:
            plain = all(entry[0] == "same" for _, entry in entries)
            arguments = pickle.dumps(_as_call(entries) if plain else entries, 5)
        return Call(self.task, self.function, arguments, tuple(sources), self.after, self.context, self.held)

    def columns(self, indices: Sequence[int], locate: Locate) -> list[tuple[str | None, tuple[Any, ...]]]:
        """Return the arguments of some elements, as `worker.chunk` reads them for a chunk.

        Parameters
        ----------
        indices : sequence of int
            The elements, in the order of the chunk.
        locate : callable
            See `Locate`.
        """
        numbers = [index - self.start for index in indices]
        return [(keyword, _column(one, numbers, locate)) for keyword, one in self.arguments]


def _as_call(entries: Sequence[tuple[str | None, tuple[Any, ...]]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(entry[1] for keyword, entry in entries if keyword is None)
    return args, {keyword: entry[1] for keyword, entry in entries if keyword is not None}


def _entry(argument: Argument, number: int, locate: Locate) -> tuple[Any, ...]:
    """Say how one element gets one argument."""
    if isinstance(argument, Captured):
        return _same(argument, locate)
    if argument.kind == "plain":
        return "same", argument.content[number]
    if argument.kind == "packed":
        return "loads", argument.content[number]
    if argument.kind == "mixed":
        return _same(argument.content[number], locate)
    (source,) = argument.sources(number)
    if argument.kind == "items":
        return "item", locate(source)[1], argument.content[number]
    return locate(source)


def _same(captured: Captured, locate: Locate) -> tuple[Any, ...]:
    if captured.kind == "plain":
        return "same", captured.content
    if captured.kind == "packed":
        return "loads", captured.content
    if captured.kind == "upstream":
        return locate(captured.sources[0])
    return "fill", captured.content, [locate(source) for source in captured.sources]


def _column(argument: Argument, numbers: list[int], locate: Locate) -> tuple[Any, ...]:
    """Say how the elements of a chunk get one argument."""
    if isinstance(argument, Captured):
        return _same(argument, locate)
    if argument.kind in {"plain", "packed"}:
        return "items" if argument.kind == "plain" else "pickles", _some(argument.content, numbers)
    if argument.kind == "items":
        assert argument.source is not None
        position = locate(argument.source)[1]
        return "picks", [position], [argument.content[number] for number in numbers]
    entries = [_entry(argument, number, locate) for number in numbers]
    if all(entry == entries[0] for entry in entries) and entries[0][0] == "stage":
        return entries[0]
    if all(entry[0] == "value" for entry in entries):
        positions, places = [entry[1] for entry in entries], [entry[2] for entry in entries]
        return "picks", positions[:1] if len(set(positions)) == 1 else positions, places
    return "mixed", entries


def _some(content: Sequence[Any], numbers: list[int]) -> Sequence[Any]:
    first, last = numbers[0], numbers[-1]
    if list(range(first, last + 1)) == numbers:
        return content[first : last + 1]
    return [content[number] for number in numbers]


_CONTAINERS = (list, tuple, dict, set, frozenset)


# -- capturing ----------------------------------------------------------------------------------


class Capture:
    """Takes arguments as they are now: small ones pickled, large ones placed once for the whole map.

    Parameters
    ----------
    task : str
        Name, for messages.
    run_of : callable
        Answers the run behind a future, None for any other value.
    place : callable or None
        Puts a large value near the workers and answers its `Source`, None for a small value;
        None where elements run in this process and share its objects.
    tolerance : int
        What the task accepts of any upstream besides a value.
    """

    def __init__(
        self,
        task: str,
        run_of: Callable[[Any], TaskRun | None],
        place: Callable[[Any], Source | None] | None,
        tolerance: int = 0,
    ) -> None:
        self._task = task
        self._run_of = run_of
        self._place = place
        self._tolerance = tolerance
        self.held: list[Any] = []

    def one(self, value: Any, where: int | str) -> Captured:
        """Take one value.

        Raises
        ------
        UnserializableArgument
            Naming the parameter.
        """
        sources: list[Source] = []

        def leaf(item: Any, tolerant: int) -> Any:
            run = self._run_of(item)
            if run is not None:
                source: Source | None = Source(run, None, tolerant | self._tolerance)
            else:
                source = None if self._place is None else self._place(item)
            if source is not None:
                sources.append(source)
                return Slot(len(sources) - 1)
            if is_lazy(item):
                self.held.append(item)
            return item

        taken = refs.replace(value, leaf)
        if taken is value and type(value) in _CONTAINERS and self._place is not None:  # many small things
            source = self._place(value)
            if source is not None:
                return Captured("upstream", None, (source,))
        if type(taken) is Slot:
            return Captured("upstream", None, tuple(sources))
        if self._place is None:
            if not sources:
                return Captured("plain", taken)
            return Captured("filled", lambda values: refs.fill(taken, values), tuple(sources))
        if not sources and payload.is_plain(taken):
            return Captured("plain", taken)
        packed = payload.pack_argument(taken, where, self._task)
        return Captured("filled" if sources else "packed", packed, tuple(sources))

    def column(self, items: Sequence[Any], wrap: Callable[[Any], Any] | None, where: int | str) -> Column:
        """Take one argument of all elements."""
        if wrap is None:
            if isinstance(items, range):
                return Column("plain", items)
            if _is_numeric_array(items):
                return Column("plain", items.copy())  # type: ignore[attr-defined] # a numpy array
            if payload.SCALARS.issuperset(map(type, items)):
                return Column("plain", list(items))
        taken = [self.one(item if wrap is None else wrap(item), where) for item in items]
        kind = taken[0].kind
        if any(one.kind != kind for one in taken) or kind == "filled":
            return Column("mixed", taken)
        if kind != "upstream":
            return Column(kind, [one.content for one in taken])
        sources = [one.sources[0] for one in taken]
        first = sources[0].tolerant
        if any(source.run is None or source.tolerant != first for source in sources):
            return Column("mixed", taken)
        return Column("upstream", [source.run for source in sources], tolerant=first)


def _is_numeric_array(items: Any) -> bool:
    """Whether the items are numpy's own scalars, so that one copy of the array captures them all."""
    dtype = getattr(items, "dtype", None)
    kind: str = getattr(dtype, "kind", "?")
    return type(items).__module__ == "numpy" and getattr(items, "ndim", 0) == 1 and kind in "biufc"
