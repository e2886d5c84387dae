"""Execute one attempt, or one chunk of a map: where every runner ends up.

It returns the value beside a packed record; the form of that is in `record`.

Work order (a pickled dict of primitives)
-----------------------------------------
``run``
    Id of the task run.
``attempt``
    Number of this execution, from 1.
``task``, ``name``
    Name of the task and of the run.
``inputs``
    "readonly", "copy" or "shared": what arrays in the arguments are to the function.
``prints``
    Whether `print` goes to the run's log.
``plain`` (optional)
    The function is no task: nothing in it finds a run around itself.
``streams``
    Whether the items of a generator are wanted one by one.
``context``
    What nested code needs to know: ids and names of the flow run, tags, depth, runner.
``commit`` (optional)
    Where to store the value before the record is made, see `result_store`.
``skip_if`` (optional)
    A function, or its pickle, of args and kwargs: why the run is to be skipped, or None.
``loads`` (optional)
    ``{position: where}``: upstream values that are read from a storage, and not among `values`.
``picks`` (optional)
    ``{position: place}``: of that upstream value, which is a chunk's, only the item at the place.
``kept`` (optional)
    Of a chunk whose lost value is made again: the places that had a value, True for all. Nothing else is run.

The order of a chunk has ``stages``, ``count`` and ``box`` instead: see `chunk`.
"""

from __future__ import annotations

import pickle
from collections.abc import Generator
from typing import Any

from .arguments import picked
from .attempt import Attempt
from .call import LEFT_TO_CALLER, invoke
from .chunk import run_chunk
from .commit import with_stored
from .coroutines import steps
from .failure import Failed


def execute(
    order: Any,
    function: Any,
    arguments: Any,
    values: Any = (),
    key: Any = None,
    on_start: Any = None,
    scope: Any = None,
    on_item: Any = None,
) -> tuple[Any, bytes]:
    """Execute one attempt.

    Parameters
    ----------
    order : bytes or dict
        The work order.
    function : bytes or callable
        What to call.
    arguments : bytes or callable
        Pickled ``(args, kwargs)`` with persistent ids for upstream values, or a callable that
        takes the list of values.
    values : sequence
        Upstream values.
    key : tuple, optional
        Name of the attempt, for `cancel`.
    on_start : callable, optional
        Called without arguments right before the user's code.
    scope : object, optional
        The engine's own context, where it is in this process.
    on_item : callable, optional
        Called with number and item for each item of a generator, if the order asks for them; the
        value is then None.

    Returns
    -------
    tuple
        ``(value, record)``: the value, or a `Failed`, and the packed record.
    """
    if isinstance(order, bytes):
        order = pickle.loads(order)
    values = _upstream(order, values)
    if "stages" in order:
        return run_chunk(order, function, arguments, values, key, on_start)
    attempt = Attempt(order, key, scope)
    for value in values:
        if isinstance(value, Failed):
            return attempt.not_started()
    with attempt:
        attempt.value = invoke(attempt.running, function, arguments, values, on_start, on_item)
    outcome: tuple[Any, bytes] = attempt.outcome
    return outcome


def execute_stream(
    order: bytes, function: bytes, arguments: bytes, values: Any, key: Any, on_start: Any
) -> Generator[Any, None, tuple[Any, bytes]]:
    """Execute one attempt of a generator task whose caller draws the items; return what `execute` returns.

    Between two items the attempt is paused: the caller's code is no part of it. An exception that the
    caller throws in ends the attempt as one of the task's own.
    """
    work: dict[str, Any] = pickle.loads(order)
    values = _upstream(work, values)
    attempt = Attempt(work, key)
    if any(isinstance(value, Failed) for value in values):
        return attempt.not_started()
    with attempt:
        running = attempt.running
        items = invoke(running, function, arguments, values, on_start, LEFT_TO_CALLER)
        running.yielded = 0
        for item in steps(items):
            running.yielded += 1
            attempt.pause()
            try:
                yield item
            finally:
                attempt.resume()
            del item  # it may be large, and the next one is about to be made
    outcome: tuple[Any, bytes] = attempt.outcome
    return outcome


def _upstream(order: Any, values: Any) -> Any:
    """Return the upstream values: those that are read from a storage too, of chunks only what is used."""
    if "loads" in order:
        values = with_stored(values, order["loads"])
    if "picks" in order:
        values = [picked(value, order["picks"].get(at)) for at, value in enumerate(values)]
    return values
