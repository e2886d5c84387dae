"""Dask's half of the worker runtime: the body of every task, on a worker of its cluster.

Clusters get this file as source, beside `worker_runtime`, `dask_tracker` and `dask_memory`; it
imports the standard library, dask and distributed only. With the last two and `dask_graph` it is
the only place that touches Dask's private surface.

The packed record of an attempt goes into the metadata of its task; Dask sends these with the
message that commits the result, so that neither is known without the other. A failed task raises
`TaskFailure`, which carries the record.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import os
import pickle
import signal
import sys
import tempfile
import threading
from mmap import mmap
from typing import Any

from dask._task_spec import DataNode, Task, TaskRef
from distributed import get_worker

runtime: Any = importlib.import_module(f"{__package__}.worker_runtime")  # has another name when shipped
memory: Any = importlib.import_module(f"{__package__}.dask_memory")
# Under which name tasks that submit tasks find this module again.
sys.modules["_penstock_running"].__dict__.setdefault("dask_plugin", __name__)

MARK = __name__  # our entry in the metadata of a task; other versions of this file have other names
LARGE_FUNCTION = 65_536  # bytes from which a function is sent once for all its tasks


def topic_of(key: Any) -> str:
    """Return the topic of the session that owns a key; empty if it is none of ours."""
    if type(key) is tuple and len(key) == 2 and type(key[0]) is str:
        tag = key[0].rpartition("-")[2]
        if len(tag) == 8:
            return f"penstock-{tag}"
    return ""


class TaskFailure(Exception):
    """Raised instead of the user's exception, whose class need not exist elsewhere."""

    def __init__(self, record: bytes) -> None:
        super().__init__(record)
        self.record = record

    def __str__(self) -> str:
        error = pickle.loads(self.record).get("error") or {}
        return f"{error.get('type', 'Error')}: {error.get('message', '')}"

    __repr__ = __str__


# -- the body of a task -------------------------------------------------------------------


def run_one(flags: int, order: bytes, function: bytes, arguments: bytes, *values: Any) -> Any:
    """Execute one attempt.

    Parameters
    ----------
    flags : int
        Number of trailing values that only order (see `ended`), doubled; odd if the start has to
        be announced.
    order, function, arguments
        See `worker_runtime.run`.
    *values : object
        Upstream values.
    """
    worker = get_worker()
    key = worker.get_current_task()
    task = worker.state.tasks[key]
    if task.state == "cancelled":  # withdrawn before this thread got to it
        return None
    runtime.worker_name = worker.address
    place = _marks.enter(key, worker.address)
    try:
        if flags >> 1:
            values = values[: -(flags >> 1)]
        announce = _Announcement(worker, key) if flags & 1 else None
        with memory.resolved(values) as values:
            value, record = runtime.run(order, function, arguments, values, key, announce)
        if not isinstance(value, runtime.Failed):
            problem = _unsendable(value)
            if problem is None:
                task.metadata[MARK] = record
                return value
            value, record = runtime.refuse(record, value, problem)
        elif value.error is not None:
            value.error.__traceback__ = None  # its frames hold the upstream values
    finally:
        _marks.leave(place)
    value = values = ()
    raise TaskFailure(record)


class _Announcement:
    """Tells the session that the user's code begins."""

    def __init__(self, worker: Any, key: Any) -> None:
        self.worker = worker
        self.key = key

    def __call__(self) -> None:
        event = ("started", self.key, b"", 0, self.worker.address, None)
        self.worker.log_event(topic_of(self.key), {"events": [event]})


def ended(_: Any) -> None:
    """Stand between two tasks of which one only waits for the other, so that no bytes move."""


class _Sink:
    """A file that forgets."""

    def write(self, data: Any) -> int:
        return len(data)


_SAFE = {type(None), bool, int, float, complex, str, bytes, bytearray}


def _unsendable(value: Any) -> Exception | None:
    """Return the error that sending a value to another process would raise.

    Dask finds out when a consumer asks for it; the consumer then asks again for ever, and the
    connection between the two workers is spoilt for others.
    """
    kind = type(value)
    if kind in _SAFE or (
        kind.__module__ == "numpy" and getattr(getattr(value, "dtype", None), "char", "O") != "O"
    ):
        return None
    try:  # large buffers are neither copied nor kept
        pickle.Pickler(_Sink(), 5, buffer_callback=lambda _: False).dump(value)
    except Exception:
        try:
            runtime.dumps(value)
        except Exception as error:
            return error
    return None


def cancel_keys(wanted: dict[str, list[Any]], dask_worker: Any) -> list[Any]:
    """Ask attempts on this worker to stop; answer those whose code is running.

    Parameters
    ----------
    wanted : dict of str to list of tuple
        Keys by address of the worker.
    """
    found: list[Any] = runtime.cancel(wanted.get(dask_worker.address, []))
    return found


def end_process() -> None:
    """End this worker process at once; its nanny starts another."""
    os.kill(os.getpid(), signal.SIGKILL)


# -- what runs here, where it survives a SIGKILL ----------------------------------------------


class Marks:
    """What runs in this process, written where it survives a SIGKILL.

    A worker that dies takes the knowledge with it which of its tasks had begun. Each worker keeps
    it in a small mapped file; a scheduler on the same host reads the file of a dead worker, so
    that tasks which had not begun go elsewhere without being blamed.
    """

    SLOT, SLOTS = 128, 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._map: mmap | None = None
        self._free: list[int] = []

    def enter(self, key: Any, address: str) -> int | None:
        """Note that an attempt begins; answer the place of the note."""
        try:
            with self._lock:
                if self._map is None:
                    self._map = self._mapped(address)
                place = self._free.pop()
            text = name_of(key).encode()
            start = place * self.SLOT
            self._map[start + 1 : start + 1 + len(text)] = text
            self._map[start] = len(text)
        except Exception:  # no room, no disk: nobody will know
            return None
        return place

    def leave(self, place: int | None) -> None:
        """Note that the attempt has ended."""
        if place is not None and self._map is not None:
            self._map[place * self.SLOT] = 0
            self._free.append(place)

    def _mapped(self, address: str) -> mmap:
        path = _marks_file(os.getpid(), address)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        _sweep(os.path.dirname(path))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.truncate(descriptor, self.SLOT * self.SLOTS)
            atexit.register(_unlink, path)
            self._free = list(range(self.SLOTS))[::-1]
            return mmap(descriptor, self.SLOT * self.SLOTS)
        finally:
            os.close(descriptor)

    @classmethod
    def read(cls, pid: int, address: str) -> set[str] | None:
        """Return the names of what ran in a dead worker, None if nobody knows; works once."""
        path = _marks_file(pid, address)
        try:
            if os.stat(path).st_uid != os.getuid():
                return None
            with open(path, "rb") as file:
                data = file.read()
            os.unlink(path)
        except OSError:
            return None
        slots = (data[start : start + cls.SLOT] for start in range(0, len(data), cls.SLOT))
        return {slot[1 : 1 + slot[0]].decode("ascii", "replace") for slot in slots if slot[0]}


def name_of(key: Any) -> str:
    """Return a short name for a key of ours."""
    return f"{key[0].rpartition('-')[2]}:{key[1]}"


def _marks_file(pid: int, address: str) -> str:
    name = "".join(letter if letter.isalnum() else "_" for letter in f"{address}-{__name__}")
    return os.path.join(tempfile.gettempdir(), f"penstock-marks-{os.getuid()}", f"{pid}-{name}")


def _sweep(folder: str) -> None:
    """Remove the files of processes that are gone."""
    for name in os.listdir(folder):
        try:
            os.kill(int(name.partition("-")[0]), 0)
        except ProcessLookupError:
            _unlink(os.path.join(folder, name))
        except (ValueError, OSError):
            continue


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


_marks = Marks()


# -- a batch of tasks ---------------------------------------------------------------------


def marker_of(name: str, key: Any) -> Any:
    """Return the key of the task that stands between `key` and what waits for it in a batch."""
    return ("penstock-after", name, key)


def function_key(function: bytes) -> Any:
    """Return the key under which a large function lies on the cluster."""
    return ("penstock-function", hashlib.sha256(function).hexdigest())


class Batch:
    """What the driver sends: columns of bytes that become tasks on the scheduler.

    Stands where Dask expects an expression: it asks for a graph and for annotations.

    Parameters
    ----------
    *columns
        In this order. `name`: unique in the cluster. `keys`, `flags`, `orders`, `functions`,
        `arguments`: lists with an entry for each task. `uses`, `waits`: lists of tuples with the
        keys of upstream values (or `dask_memory.Placed`), and of tasks that have to end first;
        None if there are none.
        `annotations`: those of Dask, name → {key: value}.
    """

    def __init__(self, *columns: Any) -> None:
        self.columns = columns

    def __reduce__(self) -> Any:
        return Batch, self.columns

    def __dask_graph__(self) -> dict[Any, Any]:
        name, keys, flags, orders, functions, arguments, uses, waits, _ = self.columns
        graph: dict[Any, Any] = {}
        large = self._large()
        for function, key in large.items():
            graph[key] = DataNode(key, function)
        for number, key in enumerate(keys):
            upstream = [TaskRef(one) if type(one) is tuple else one for one in uses[number]] if uses else []
            for one in waits[number] if waits else ():
                marker = marker_of(name, one)
                graph[marker] = Task(marker, ended, TaskRef(one))
                upstream.append(TaskRef(marker))
            function = functions[number]
            if large and function in large:
                function = TaskRef(large[function])
            graph[key] = Task(
                key, run_one, flags[number], orders[number], function, arguments[number], *upstream
            )
        return graph

    def _large(self) -> dict[bytes, Any]:
        """Dask sends the payload of a task with each task: a large function becomes one of its own."""
        functions = {id(one): one for one in self.columns[4]}.values()
        return {one: function_key(one) for one in functions if len(one) > LARGE_FUNCTION}

    def __dask_annotations__(self) -> dict[str, dict[Any, Any]]:
        annotations: dict[str, dict[Any, Any]] = self.columns[-1]
        return annotations

    def places(self) -> dict[Any, int]:
        """Return a place in the order for each key of the graph; Dask fails on a key without."""
        name, keys, waits = self.columns[0], self.columns[1], self.columns[7]
        found = dict(zip(keys, range(len(keys)), strict=True))
        found.update(dict.fromkeys(self._large().values(), 0))
        for number, some in enumerate(waits or ()):
            found.update((marker_of(name, one), number) for one in some)
        return found
