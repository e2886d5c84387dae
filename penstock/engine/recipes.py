"""How to make the value of a completed run again, kept as long as the run, without keeping values.

A call holds its upstream runs, and with them their values on the cluster. What is left of it
once the value exists refers to upstreams weakly: nothing lives longer because of it. Where an
upstream is gone, or the arguments are large, there is no way back.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.engine.calls import Call, Source

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun

LARGEST = 4_096
"""Bytes of arguments that are kept beside each value."""

Weak = tuple["weakref.ref[Any] | None", bool]


@dataclass(slots=True, eq=False)
class Recipe:
    """A call whose sources are held weakly.

    Attributes
    ----------
    call : Call
        Without its sources.
    sources : tuple
        Upstream runs and references to put values: weak, with their `tolerant`.
    """

    call: Call
    sources: tuple[Weak, ...]

    def restored(self) -> Call | None:
        """Return the call as it was, None if one of its upstreams no longer exists."""
        sources = []
        for weak, tolerant in self.sources:
            found = weak() if weak is not None else None
            if found is None:
                return None
            is_run = hasattr(found, "position")
            sources.append(Source(found if is_run else None, None if is_run else found, tolerant))
        call = self.call
        return Call(call.task, call.function, call.arguments, tuple(sources), (), call.context)


def of(run: TaskRun) -> Recipe | None:
    """Return the recipe of a run that ends now, None if it cannot be made again."""
    call = run.call
    if call is None or not run.task.options.idempotent or not isinstance(call.arguments, bytes):
        return None
    if len(call.arguments) > LARGEST:
        return None
    sources = tuple(
        (_weak(source.ref if source.run is None else source.run), source.tolerant) for source in call.sources
    )
    return Recipe(Call(call.task, call.function, call.arguments, (), (), call.context), sources)


def _weak(target: Any) -> weakref.ref[Any] | None:
    return None if target is None else weakref.ref(target)
