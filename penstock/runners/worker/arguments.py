"""Functions and arguments as they arrive, and what is made of them for one call."""

from __future__ import annotations

import io
import pickle
import threading
from collections import OrderedDict
from typing import Any

from .failure import Failed
from .guard import guarded

FUNCTIONS_KEPT = 512


_functions: OrderedDict[bytes, Any] = OrderedDict()
_functions_lock = threading.Lock()


def load_function(function: Any) -> Any:
    """Unpickle a function once per process."""
    if callable(function):
        return function
    with _functions_lock:
        found = _functions.get(function)
        if found is not None:
            _functions.move_to_end(function)
            return found
    loaded = pickle.loads(function)
    with _functions_lock:
        _functions[function] = loaded
        while len(_functions) > FUNCTIONS_KEPT:
            _functions.popitem(last=False)
    return loaded


class _Arguments(pickle.Unpickler):
    """Reads arguments; a persistent id is the position of an upstream value."""

    def __init__(self, data: bytes, values: Any) -> None:
        super().__init__(io.BytesIO(data))
        self._values = values

    def persistent_load(self, position: Any) -> Any:
        return self._values[position]


def opened(value: Any) -> Any:
    """Return the value in an envelope of the engine that nobody has pickled on the way, or in a storage."""
    kind = type(value)
    if getattr(kind, "penstock_envelope", False) or getattr(kind, "penstock_kept", False):
        return value.value
    return value


def read_arguments(arguments: Any, values: Any) -> Any:
    """Return ``(args, kwargs)``: as they were pickled, made by a callable, or argument by argument."""
    if callable(arguments):
        return arguments(values)
    if isinstance(arguments, bytes):
        if not arguments:  # they were too large for a message: placed like a value, after all others
            arguments = values[-1]
        arguments = _Arguments(arguments, values).load() if values else pickle.loads(arguments)
    if isinstance(arguments, tuple):
        return arguments
    args, kwargs = [], {}
    for keyword, entry in arguments:  # of an element of a map
        value = maker_of(entry, values, None)(0)
        if keyword is None:
            args.append(value)
        else:
            kwargs[keyword] = value
    return args, kwargs


def picked(value: Any, place: int | None) -> Any:
    """Return one item of a chunk's value; of a chunk that failed as a whole, the failure."""
    return value if place is None or isinstance(value, Failed) else value[place]


def maker_of(entry: Any, values: Any, mode: str | None) -> Any:
    """Return what makes one argument for the element with a given number.

    Parameters
    ----------
    entry : tuple
        ``("same", value)``, ``("loads", pickle)``, ``("value", position, place)``, ``("item",
        position, index)``, ``("fill", pickle or callable, [("value", …), …])``; for a chunk also
        ``("items", values)``, ``("pickles", pickles)``, ``("picks", positions, places)``, ``("mixed",
        entries)``.
    values : sequence
        The upstream values.
    mode : str or None
        What arrays among them are to the function; None if they are guarded already.
    """
    kind = entry[0]
    if kind == "same":
        return lambda _: entry[1]
    if kind == "items":
        return entry[1].__getitem__
    if kind == "loads":
        return lambda _: pickle.loads(entry[1])
    if kind == "pickles":
        return lambda number: pickle.loads(entry[1][number])
    if kind in {"value", "item"}:
        one = picked(values[entry[1]], entry[2])
        if mode == "copy":  # each element gets one of its own
            return lambda _: guarded(one, mode)
        one = one if mode is None else guarded(one, mode)
        return lambda _: one
    if kind == "picks":
        return _picker(entry[1], entry[2], values, mode)
    if kind == "fill":
        makers = [maker_of(upstream, values, mode) for upstream in entry[2]]
        return lambda number: filled(entry[1], [make(number) for make in makers])
    makers = [maker_of(one, values, mode) for one in entry[1]]  # "mixed"
    return lambda number: makers[number](number)


def _picker(positions: Any, places: Any, values: Any, mode: str | None) -> Any:
    if len(positions) == 1:
        whole = values[positions[0]]
        if isinstance(whole, Failed):
            return lambda _: whole
        if mode in {None, "shared"}:
            return lambda number: whole if places[number] is None else whole[places[number]]
        return lambda number: guarded(picked(whole, places[number]), mode)
    return lambda number: guarded(picked(values[positions[number]], places[number]), mode or "shared")


def filled(content: Any, upstream: list[Any]) -> Any:
    """Make an argument with upstream values inside."""
    failed = next((value for value in upstream if isinstance(value, Failed)), None)
    if failed is not None:
        return failed
    return content(upstream) if callable(content) else _Arguments(content, upstream).load()
