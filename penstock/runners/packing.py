"""Functions and values of users as bytes: by value where a worker cannot import them."""

from __future__ import annotations

import contextlib
import io
import site
import sys
import sysconfig
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from penstock import errors
from penstock.runners.worker.pickling import reducers

_registry = threading.RLock()  # cloudpickle's table of modules by value belongs to the process

_ROOTS = tuple(
    {
        str(Path(path).resolve())
        for path in (
            *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
            *site.getsitepackages(),
            str(Path(__file__).parent.parent),
        )
        if path
    }
)
_users: dict[str, types.ModuleType | None] = {}


def users_module(name: str | None) -> types.ModuleType | None:
    """Return the module of that name if it is the user's own code, which travels by value.

    A script, a notebook or a module outside of site-packages cannot be expected on a worker;
    installed libraries can.
    """
    if name is None or name == "__main__":  # cloudpickle sends these by value without being asked
        return None
    if name not in _users:
        module = sys.modules.get(name)
        path = getattr(module, "__file__", None)
        shipped = path is not None and path.startswith("<")  # ours, on a worker without penstock
        own = path is not None and not shipped and not str(Path(path).resolve()).startswith(_ROOTS)
        _users[name] = module if own else None
    return _users[name]


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles the user's functions and classes by value, and refuses futures in odd places."""

    dispatch_table = reducers(cloudpickle.Pickler)  # tracebacks name the user's file

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (types.FunctionType, type)):
            module = users_module(obj.__module__)
            if module is not None:
                with _registry, _by_value(module):
                    return super().reducer_override(obj)
        elif hasattr(type(obj), "task_run_id"):
            message = (
                f"the future of task run {obj.task_run_id[:8]} is inside an object that penstock does "
                "not search; pass it directly, or in a list, tuple, set, dict or dataclass."
            )
            raise errors.UnserializableArgument(message)
        return super().reducer_override(obj)


@contextlib.contextmanager
def _by_value(module: types.ModuleType) -> Any:
    registered = module.__name__ in cloudpickle.list_registry_pickle_by_value()
    if not registered:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        if not registered:
            cloudpickle.unregister_pickle_by_value(module)


def pack_function(function: Callable[..., Any]) -> bytes:
    """Pickle a function; the session keeps the bytes, so that it happens once per run.

    Raises
    ------
    UnserializableArgument
        Naming the function and what it refers to that cannot be pickled.
    """
    try:
        return dumps(function)
    except Exception as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        message = f"function {name!r} cannot be sent to another process: {error}"
        raise errors.UnserializableArgument(message) from error


def dumps(value: Any, buffer_callback: Callable[[Any], Any] | None = None) -> bytes:
    """Pickle a value that holds no slots; large buffers may be left out."""
    buffer = io.BytesIO()
    Pickler(buffer, protocol=5, buffer_callback=buffer_callback).dump(value)
    return buffer.getvalue()
