"""Functions and arguments as bytes: pickled once, by value where a worker cannot import them."""

from __future__ import annotations

import functools
import io
import pickle
from typing import Any

from penstock import errors
from penstock.engine.refs import Slot
from penstock.runners.packing import Pickler, dumps, pack_function
from penstock.runners.worker.sizes import size_of

__all__ = [
    "SCALARS",
    "Envelope",
    "dumps",
    "is_plain",
    "pack_argument",
    "pack_arguments",
    "pack_function",
    "portable",
    "serializer_of",
]

_PLAIN = (int, float, str, bytes, bool, complex, type(None))
SCALARS = frozenset(_PLAIN)
"""Types whose values nobody can change."""
_NUMPY_SCALARS = frozenset(
    [
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "bool",
        "bool_",
        "str_",
        "bytes_",
        "datetime64",
        "timedelta64",
    ]
)


class _ArgumentPickler(Pickler):
    """Leaves the upstream values out; `worker.arguments` puts them in."""

    def persistent_id(self, obj: Any) -> int | None:
        return obj.position if type(obj) is Slot else None


def serializer_of(given: Any) -> Any:
    """Return a ``result_serializer`` as it travels: a name, or ``("custom", pickle, name)`` of an object.

    Raises
    ------
    UnserializableArgument
        If the object cannot be pickled.
    """
    if isinstance(given, str) or not (hasattr(given, "dumps") and hasattr(given, "loads")):
        return given
    name = getattr(given, "__name__", type(given).__name__)
    try:
        return "custom", dumps(given), name
    except Exception as error:
        message = f"result_serializer {name!r} cannot be sent to another process: {error}"
        raise errors.UnserializableArgument(message) from error


class Envelope:
    """A value on its way to a backend, pickled as arguments are: the user's classes by value.

    It unpickles to the value itself. Buffers travel out of band, so nothing large is copied.
    """

    penstock_envelope = True  # `worker.arguments.opened` looks for it: some clusters never pickle

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def nbytes(self) -> int:
        """Size of the value, for a backend that wants to know before it pickles."""
        return size_of(self.value)

    def __sizeof__(self) -> int:
        return size_of(self.value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        buffers: list[Any] = []
        data = dumps(self.value, buffers.append)
        return functools.partial(pickle.loads, buffers=buffers), (data,)


def portable(value: Any) -> Any:
    """Return a value as a backend can place it: in an envelope if it may hold classes of the user."""
    kind = type(value)
    if kind in _PLAIN or kind.__module__.partition(".")[0] in _INSTALLED:
        return value
    return Envelope(value)


_INSTALLED = {"numpy", "pandas", "pyarrow", "polars", "xarray", "scipy"}


def pack_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], slots: int, task: str) -> bytes:
    """Pickle the arguments of one call, with placeholders for `slots` upstream values.

    Raises
    ------
    UnserializableArgument
        Naming the task, the parameter and the reason.
    """
    if not slots and _are_plain(args) and _are_plain(kwargs.values()):
        return pickle.dumps((args, kwargs), 5)
    try:
        buffer = io.BytesIO()
        _ArgumentPickler(buffer, protocol=5).dump((args, kwargs))
    except Exception as error:
        where, reason = _culprit(args, kwargs, error)
        message = f"argument {where} of task {task!r} cannot be sent to another process: {reason}"
        raise errors.UnserializableArgument(message) from error
    return buffer.getvalue()


def pack_argument(value: Any, where: int | str, task: str) -> bytes:
    """Pickle one argument of a map, with placeholders for upstream values.

    Raises
    ------
    UnserializableArgument
        Naming the task, the parameter and the reason.
    """
    try:
        buffer = io.BytesIO()
        _ArgumentPickler(buffer, protocol=5).dump(value)
    except Exception as error:
        path, culprit, reason = _path_to_culprit(value, 3) or ("", value, str(error))
        message = (
            f"argument {str(where)!r}{path} of task {task!r} cannot be sent to another process: "
            f"{type(culprit).__name__} ({reason})"
        )
        raise errors.UnserializableArgument(message) from error
    return buffer.getvalue()


def is_plain(value: Any) -> bool:
    """Whether nobody can change a value, so that it may be pickled later than now."""
    kind = type(value)
    if kind in SCALARS:
        return True
    if kind is tuple:
        return len(value) < 100 and all(map(is_plain, value))
    return kind.__module__ == "numpy" and kind.__name__ in _NUMPY_SCALARS


def _are_plain(values: Any) -> bool:
    for value in values:
        kind = type(value)
        if kind in _PLAIN or kind.__module__ == "numpy":
            continue
        if kind in (tuple, list) and len(value) < 100 and _are_plain(value):
            continue
        return False
    return True


def _culprit(args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> tuple[str, str]:
    """Find the argument that does not pickle, and the path of the attribute in it."""
    for name, value in [*((str(position), value) for position, value in enumerate(args)), *kwargs.items()]:
        path = _path_to_culprit(value, 3)
        if path is not None:
            return f"{name!r}{path[0]}", f"{type(path[1]).__name__} ({path[2]})"
    return "list", str(error)


def _path_to_culprit(value: Any, depth: int) -> tuple[str, Any, str] | None:
    try:
        buffer = io.BytesIO()
        _ArgumentPickler(buffer, protocol=5).dump(value)
    except Exception as error:
        members: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            members = [(f"[{key!r}]", member) for key, member in value.items()]
        elif isinstance(value, (list, tuple)):
            members = [(f"[{position}]", member) for position, member in enumerate(value)]
        elif hasattr(value, "__dict__"):
            members = [(f".{name}", member) for name, member in vars(value).items()]
        for text, member in members[:100] if depth else []:
            inner = _path_to_culprit(member, depth - 1)
            if inner is not None:
                return text + inner[0], inner[1], inner[2]
        return "", value, str(error)
    return None
