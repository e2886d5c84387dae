"""Pickles of what people write in a session or a notebook, and of what their code is called."""

from __future__ import annotations

import functools
import io
import pickle
import types
from collections import ChainMap
from typing import Any


def dumps(value: Any, keep: Any = None) -> bytes:
    """Pickle with cloudpickle where it is at hand.

    Parameters
    ----------
    value : object
        What to pickle.
    keep : callable, optional
        Takes large buffers out of the pickle, as the ``buffer_callback`` of `pickle.dumps`.
    """
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps(value, 5, buffer_callback=keep)
    buffer = io.BytesIO()
    _pickler_of(cloudpickle.Pickler)(buffer, protocol=5, buffer_callback=keep).dump(value)
    return buffer.getvalue()


@functools.cache
def _pickler_of(kind: Any) -> Any:
    return type("Pickler", (kind,), {"dispatch_table": reducers(kind)})


def reducers(pickler: Any) -> Any:
    """Return the `dispatch_table` for picklers of a kind by which code keeps the name of its file.

    From version 3.1.3 on cloudpickle writes ``<dynamic-code>`` for it, so that tracebacks of a
    user's function neither name his file nor show his lines.

    Parameters
    ----------
    pickler : type
        `cloudpickle.Pickler`, or a subclass.
    """
    table = pickler.dispatch_table
    reduce = table.get(types.CodeType)
    place = None if reduce is None else _place_of_file(reduce)
    if place is None:
        return table

    def reduce_code(code: types.CodeType) -> Any:
        made, arguments, *rest = reduce(code)
        return (made, (*arguments[:place], code.co_filename, *arguments[place + 1 :]), *rest)

    return ChainMap({types.CodeType: reduce_code}, table)


def _place_of_file(reduce: Any) -> int | None:
    """Find which argument of the reduction of code is the name of its file; None if it is not plain."""
    code = compile("", "file", "exec").replace(co_name="name", co_qualname="qualname")
    made, arguments = reduce(code)[:2]
    places = [
        number
        for number, one in enumerate(arguments)
        if isinstance(one, str) and one not in {"name", "qualname"}
    ]
    return places[0] if made is types.CodeType and len(places) == 1 else None
