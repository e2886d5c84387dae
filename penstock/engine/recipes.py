"""How to make the value of a completed run again, kept as long as the run, without keeping values.

A call holds its upstream runs, and with them their values on the cluster. Once its own value
exists it refers to them weakly: nothing lives longer because of it. Where an upstream is gone,
or the arguments are large, there is no way back.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.engine.calls import Call, Source

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.chunks import Chunk
    from penstock.engine.mapped import Mapped
    from penstock.runners.base import Key

LARGEST = 4_096
"""Bytes of arguments that are kept beside each value."""


class Recipe:
    """A call whose sources are held weakly.

    Parameters
    ----------
    call : Call
        Of a run that has ended; its sources are taken away.
    """

    __slots__ = ("_call", "_sources")

    def __init__(self, call: Call) -> None:
        self._sources = [(weakref.ref(one.run or one.ref), one.tolerant) for one in call.sources]
        self._call = call
        call.sources = call.after = ()

    def restored(self) -> Call | None:
        """Return the call as it was, None if one of its upstreams no longer exists."""
        sources: list[Source] = []
        for weak, tolerant in self._sources:
            found: Any = weak()
            if found is None:
                return None
            is_run = hasattr(found, "position")
            sources.append(Source(found if is_run else None, None if is_run else found, tolerant))
        self._call.sources = tuple(sources)
        return self._call


def of(run: TaskRun) -> Recipe | Mapped | None:
    """Return the recipe of a run that ends now, None if it cannot be made again.

    An element of a map that needs nothing but its own small arguments has the map itself.
    """
    call = run.call
    if call is None and run.mapped is not None and run.mapped.is_light:
        return run.mapped
    if call is None or not call.task.options.idempotent:
        return None
    if type(call.arguments) is not bytes or len(call.arguments) > LARGEST:
        return None
    return Recipe(call)


def restored(run: TaskRun) -> Call | None:
    """Return what a completed run would have to call again; None if there is no way back."""
    recipe = run.recipe
    if isinstance(recipe, Recipe):
        return recipe.restored()
    return None if recipe is None else recipe.call(run.index)


class Made:
    """Completed runs by the key under which the backend knows their values, as long as they live.

    The value of a chunk is that of many runs.
    """

    def __init__(self) -> None:
        self._runs: dict[Key, list[weakref.ref[TaskRun]]] = {}
        self._counts: dict[Key, int] = {}  # elements of the chunks with several stages
        self._sweep_at = 1_000

    def add(self, runs: Sequence[TaskRun]) -> None:
        """Remember runs whose values have one key."""
        key = runs[0].key
        assert key is not None
        self._runs.setdefault(key, []).extend(map(weakref.ref, runs))
        if len(self._runs) > self._sweep_at:  # dearer than forgetting each, but not for each
            self._runs = {key: weak for key, weak in self._runs.items() if any(one() for one in weak)}
            self._counts = {key: count for key, count in self._counts.items() if key in self._runs}
            self._sweep_at = 2 * len(self._runs) + 1_000

    def add_chunk(self, chunk: Chunk) -> None:
        """Remember how many elements a chunk has, if that is needed to know which run has which place."""
        if len(chunk.stages) > 1:
            self._counts[chunk.key] = chunk.count

    def count(self, key: Key | None) -> int:
        """Return how many elements a chunk has; 0 if it has one stage, or is none."""
        return 0 if key is None else self._counts.get(key, 0)

    def find(self, key: Key) -> list[TaskRun]:
        """Return the runs whose value has a key, as far as somebody still holds them."""
        found = [run for weak in self._runs.get(key, ()) if (run := weak()) is not None and run.key == key]
        return list(dict.fromkeys(found))  # one with dependants may be noted twice

    def forget(self, run: TaskRun) -> None:
        """The value of a run is gone; others of the same chunk may have theirs still."""
        if run.key is not None and run.place < 0:
            self._runs.pop(run.key, None)
