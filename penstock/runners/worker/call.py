"""Make the one call of a user's function, and run to its end what it has only begun."""

from __future__ import annotations

import inspect
from typing import Any

from .arguments import load_function, opened, read_arguments
from .commit import stored_before, stored_under
from .coroutines import draw, run_coroutine
from .failure import Skipped
from .guard import Guard
from .interruption import Cancelled, interrupted_after
from .prints import route_prints
from .record import INERT
from .running import Running
from .starts import start_of


def invoke(
    running: Running, function: Any, arguments: Any, values: Any, on_start: Any, on_item: Any = None
) -> Any:
    """Call the function of an attempt, unless its value is there already; return the value."""
    order = running.order
    if running.cancelled:
        raise Cancelled
    if stored_before(running):
        return running.found
    call = load_function(function)
    guard = Guard(order.get("inputs", "readonly"))  # as long as it lives, a frame is copied on write
    args, kwargs = read_arguments(arguments, guard.values(map(opened, values)))
    args, kwargs = guard.arguments(args, kwargs, private=isinstance(arguments, bytes))
    if "naming" in order:
        order["name"] = name_from(order["naming"], call, args, kwargs)
    if "skip_if" in order:
        ask(order["skip_if"], args, kwargs)
    if stored_under(running, call, args, kwargs):
        return running.found
    running.called = (call, args, kwargs)
    if on_start is not None:
        on_start()
    if order.get("prints"):
        route_prints()
    with interrupted_after(order.get("interrupt_after"), order.get("name")):
        start_of(running.key).called()
        value = call(*args, **kwargs)
        if type(value) in SIMPLE:
            return value
        return settled(running, value, on_item if order.get("streams") else None)


def ask(predicate: Any, args: Any, kwargs: Any) -> None:
    """Raise `Skipped` if a run is not to be, by the predicate that its work order names."""
    reason = load_function(predicate)(args, kwargs)
    if reason is not None:
        raise Skipped(reason)


def name_from(naming: Any, call: Any, args: Any, kwargs: Any) -> str:
    """Make the name of a run from its arguments.

    Parameters
    ----------
    naming : str, bytes or callable
        A template, or a function of nothing or of ``parameters``.
    call : callable
        The user's function.
    args, kwargs
        Its arguments.
    """
    bound = inspect.signature(call).bind(*args, **kwargs)
    bound.apply_defaults()
    parameters = dict(bound.arguments)
    if isinstance(naming, str):
        return naming.format(**parameters)
    function = load_function(naming)
    name = function(parameters)
    if not isinstance(name, str):
        raise TypeError(
            f"Callable {function} for 'task_run_name' returned type {type(name).__name__} but a string is required."
        )
    return name


SIMPLE = INERT | {list, tuple, dict}
LEFT_TO_CALLER: Any = object()
"""In place of `on_item`: the caller draws the generator."""


def settled(running: Running, value: Any, on_item: Any = None) -> Any:
    """Run to its end what the call of a user's function has only begun."""
    if inspect.iscoroutine(value):
        return run_coroutine(value)
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        if on_item is LEFT_TO_CALLER:
            return value
        return _yielded(running, value, on_item)
    return value


def _yielded(running: Running, generator: Any, on_item: Any) -> list[Any] | None:
    """Draw a generator: into a list, or item by item to whoever wants them so."""
    found: list[Any] | None = None
    if on_item is None:
        found = []
    else:
        running.yielded = 0

    def take(item: Any) -> None:
        if found is not None:
            found.append(item)
            return
        on_item(running.yielded, item)
        running.yielded += 1

    if inspect.isasyncgen(generator):
        run_coroutine(draw(generator, take))
    else:
        for item in generator:
            take(item)
            del item  # it may be large, and the next one is about to be made
    return found
