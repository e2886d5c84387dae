"""What an attempt leaves behind besides its value, as it travels to the driver.

Record (a pickled dict of primitives)
-------------------------------------
``status``
    "completed", "failed", "cancelled", "skipped", "crashed" or "upstream".
``attempt``, ``started``, ``ended``, ``seconds``
    Wall clock of the worker in seconds since 1970, duration by the monotonic clock.
``nbytes``, ``peak``
    Size of the value and peak memory of the worker process in bytes.
``host``, ``pid``, ``worker``, ``thread``
    Who ran it.
``logs``
    List of ``(time, level, message)``; ``dropped`` counts what exceeded the quota.
``error``
    See `errors.describe_error`; absent if the status is "completed".
``state``
    ``{type, name, message, error}`` if the function returned a state made by hand.
``stored``
    Where the value was stored, see `result_store.commit`; absent if it was not.
``yielded``
    How many items a generator has handed on one by one; absent if its value is a list.
``children``
    Packed events of task runs that this one submitted; absent if there are none.
``values``
    Pickled values that the code has set in its transaction; absent if there are none.
"""

from __future__ import annotations

import errno
import os
import pickle
import resource
import socket
import sys
import threading
from typing import Any

from .errors import describe_error, spelled
from .failure import Failed, Skipped
from .interruption import Cancelled
from .pickling import dumps
from .running import Running
from .sizes import SIZE_LIMIT, size_of

LARGE_ELEMENT = 1 << 20  # bytes of an element's value that make it guilty where a chunk lacks room

_HOST = socket.gethostname()
_worker = ""

INERT = frozenset({type(None), bool, int, float, complex, str, bytes})


def set_worker(name: str) -> None:
    """Say what the back end calls this worker, where it has a name."""
    global _worker
    _worker = name


def status_of(error: BaseException, running: Running) -> str:
    """Return the status of an attempt that an exception has ended."""
    if isinstance(error, Cancelled):
        return "cancelled"
    if isinstance(error, Skipped):
        return "skipped"
    if isinstance(error, KeyboardInterrupt) and running.cancelled:
        return "cancelled"
    if not isinstance(error, Exception):
        return "crashed"
    if type(error).__name__ == "Skip" and type(error).__module__ == "penstock.errors":
        return "skipped"
    return "failed"


def write_record(
    running: Running, details: dict[str, Any], started: float, seconds: float, value: Any = None
) -> bytes:
    """Pack the record of an attempt."""
    record: dict[str, Any] = {
        "attempt": running.order.get("attempt", 1),
        "started": started,
        "ended": started + seconds,
        "seconds": seconds,
        "nbytes": size_of(value),
        **place_and_peak(),
        **details,
    }
    return pickle.dumps(record, 4)


def place_and_peak() -> dict[str, Any]:
    """Return what every record says: who ran it, and its peak memory."""
    return {
        "peak": peak_memory(),
        "host": _HOST,
        "pid": os.getpid(),
        "worker": _worker,
        "thread": threading.get_ident(),
    }


def made_by_hand(value: Any) -> tuple[Any, dict[str, Any] | None]:
    """A task may return a state instead of a value: the run then ends as that state says."""
    kind = type(value)
    if kind.__name__ != "State" or kind.__module__ != "penstock.engine.states":
        return value, None
    data = value.data
    state = {"type": str(value.type), "name": value.name, "message": value.message}
    if isinstance(data, BaseException):
        state["error"] = describe_error(data)
        data = None
    return data, state


def refuse(record: bytes, value: Any, error: BaseException) -> tuple[Any, bytes]:
    """Turn the record of a completed attempt into a failed one: its value cannot travel, or stay.

    Of a chunk only those elements fail whose own value cannot; where room is lacking, the large ones.

    Parameters
    ----------
    record : bytes
        What `execute` wrote down.
    value : object
        What it returned.
    error : Exception
        Why it cannot be pickled or stored; a `MemoryError` or a full disk makes it a `ResultTooLarge`.

    Returns
    -------
    tuple
        ``(Failed, record)``, as from `execute`; of a chunk the list that can travel, and its record.
    """
    unpacked = pickle.loads(record)
    if unpacked["status"] == "chunk":
        return _refuse_elements(unpacked, value, error)
    unpacked["status"], unpacked["nbytes"] = "failed", 0
    unpacked.pop("stored", None)
    unpacked["error"] = _unserializable(value, error)
    record = pickle.dumps(unpacked, 4)
    return Failed(record), record


def _refuse_elements(record: dict[str, Any], values: list[Any], problem: BaseException) -> tuple[Any, bytes]:
    sizes = [size_of(value) for value in values]
    large = min(LARGE_ELEMENT, max(sizes, default=0)) if _lacks_room(problem) else SIZE_LIMIT + 1
    kept = list(values)
    for place, value in enumerate(values):
        error = problem if sizes[place] >= large else _obstacle(value)
        if error is None or isinstance(value, Failed):
            continue
        kept[place] = Failed(b"")
        own = record["odd"].setdefault(place, {})
        own.pop("stored", None)
        own.update(status="failed", error=_unserializable(value, error))
        record["nbytes"] -= sizes[place]
    record["nbytes"] = max(record["nbytes"], 0)
    return kept, pickle.dumps(record, 4)


def _obstacle(value: Any) -> Exception | None:
    """Return why a value cannot be pickled."""
    if type(value) in INERT or isinstance(value, Failed):
        return None
    try:
        dumps(value)
    except Exception as error:
        return error
    return None


def _unserializable(value: Any, error: BaseException) -> dict[str, Any]:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    reason = str(error)[:1000]
    if _lacks_room(error):
        message = f"a result of type {kind} is larger than its worker can keep: {reason}"
        return spelled("ResultTooLarge", message)
    message = f"a result of type {kind} cannot be sent to another process: {type(error).__name__}: {reason}"
    return spelled("UnserializableResult", message)


def _lacks_room(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOSPC


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
