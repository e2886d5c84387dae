"""From what a user writes to a call: futures become slots, large arguments references."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from penstock.engine import payload, refs
from penstock.engine.annotations import TOLERANCE_OF
from penstock.engine.calls import Bound, Call, Source, TaskRun
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.refs import Slot
from penstock.runners.worker.sizes import is_lazy

if TYPE_CHECKING:
    from penstock.engine.context import Scope
    from penstock.engine.session import Session
    from penstock.engine.task import Task


_CONTAINERS = {list, tuple, dict, set, frozenset}


class Caller:
    """Makes the calls of one submit or one map; large arguments are placed once for all of them.

    Parameters
    ----------
    session : Session
        Who will carry them.
    task : Task
        What is called.
    scope : Scope
        What surrounds the caller.
    local : bool
        The call will not leave this process.
    """

    def __init__(self, session: Session, task: Task[..., Any], scope: Scope, *, local: bool = False) -> None:
        self.session = session
        self.task = task
        self.local = local or session.in_process
        self.tolerance = TOLERANCE_OF[task.options.on_skip]
        self.context = session.luggage.context_of(scope)
        self.function = task.fn if self.local else session.luggage.function(task)
        self._placed: dict[int, Source] = {}
        self._kept: list[Any] = []  # an id is only good while its object lives

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], after: tuple[Source, ...] = ()) -> Call:
        """Capture one invocation: small arguments are pickled now, large ones placed.

        Raises
        ------
        UnserializableArgument
            Naming the parameter.
        """
        sources: list[Source] = []
        positions: dict[int, Slot] = {}
        held: list[Any] = []

        def leaf(value: Any, tolerant: int) -> Any:
            run = run_of(value)
            if run is not None:
                tolerant |= self.tolerance
                return self._slot(id(run) * 8 + tolerant, positions, sources, Source(run, None, tolerant))
            source = None if self.local else self.placed(value)
            if source is not None:
                return self._slot(id(source), positions, sources, source)
            if is_lazy(value):
                held.append(value)
            return value

        def whole(value: Any) -> Any:
            new = refs.replace(value, leaf)
            if type(value) in _CONTAINERS and new is value and not self.local:  # many small things
                source = self.placed(value)
                return value if source is None else self._slot(id(source), positions, sources, source)
            return new

        new_args = tuple([whole(value) for value in args])
        new_kwargs = {name: whole(value) for name, value in kwargs.items()}
        arguments: Any
        if self.local:
            arguments = Bound(new_args, new_kwargs, len(sources))
        else:
            arguments = payload.pack_arguments(new_args, new_kwargs, len(sources), self.task.name)
            if self.session.objects.is_large(arguments):  # an object hides its size: no scheduler reads it
                sources.append(self.session.objects.place(arguments, {}))
                arguments = b""
        return Call(self.task, self.function, arguments, tuple(sources), after, self.context, tuple(held))

    def placed(self, value: Any) -> Source | None:
        """Place a large value, once for all calls; None if it is small."""
        if not self.session.objects.is_large(value):
            return None
        self._kept.append(value)
        return self.session.objects.place(value, self._placed)

    @staticmethod
    def _slot(key: int, positions: dict[int, Slot], sources: list[Source], source: Source) -> Slot:
        slot = positions.get(key)
        if slot is None:
            slot = positions[key] = Slot(len(sources))
            sources.append(source)
        return slot


def wait_sources(wait_for: Iterable[Any] | None, tolerance: int = 0) -> tuple[Source, ...]:
    """Turn ``wait_for`` into edges that accept what the task accepts; plain values in it are ignored."""
    found: dict[TaskRun, Source] = {}

    def leaf(value: Any, tolerant: int) -> Any:
        run = run_of(value)
        if run is not None:
            found[run] = Source(run, None, tolerant | tolerance)
        return value

    if wait_for is not None:
        single = isinstance(wait_for, PenstockFuture)
        refs.replace([wait_for] if single else list(wait_for), leaf)
    return tuple(found.values())
