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

The order of a chunk has ``stages``, ``count`` and ``box`` instead: see `chunk`.
"""

from __future__ import annotations

import pickle
from typing import Any

from .arguments import picked
from .attempt import Attempt
from .call import invoke
from .chunk import run_chunk
from .commit import with_stored
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
    if "loads" in order:
        values = with_stored(values, order["loads"])
    if "stages" in order:
        return run_chunk(order, function, arguments, values, key, on_start)
    attempt = Attempt(order, key, scope)
    if "picks" in order:
        values = [picked(value, order["picks"].get(at)) for at, value in enumerate(values)]
    for value in values:
        if isinstance(value, Failed):
            return attempt.not_started()
    with attempt:
        attempt.value = invoke(attempt.running, function, arguments, values, on_start, on_item)
    outcome: tuple[Any, bytes] = attempt.outcome
    return outcome
