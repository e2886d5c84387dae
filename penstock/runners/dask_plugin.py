"""Dask's half of the worker runtime: the body of every task, on a worker of its cluster.

Clusters get this file as source, beside the folder `worker`, `dask_tracker` and `dask_memory`; it
imports these, the standard library, dask and distributed only. With the last two and `dask_graph` it is
the only place that touches Dask's private surface.

The packed record of an attempt goes into the metadata of its task; Dask sends these with the
message that commits the result, so that neither is known without the other. A failed task raises
`TaskFailure`, which carries the record.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import sys
from typing import Any

from dask._task_spec import DataNode, Task, TaskRef
from dask.sizeof import sizeof
from distributed import get_client, get_worker

from . import dask_memory as memory  # relative: the package around has another name when shipped
from .worker.chunk import kept_of
from .worker.execution import execute
from .worker.failure import Failed
from .worker.interruption import cancel
from .worker.pickling import dumps
from .worker.record import refuse, set_worker
from .worker.sizes import BELIEVED, size_of, too_large
from .worker.starts import starts

# Under which name tasks that submit tasks find this module again.
sys.modules["_penstock_running"].__dict__.setdefault("dask_plugin", __name__)

MARK = __name__  # our entry in the metadata of a task; other versions of this file have other names
KEPT = f"{MARK}:kept"  # in the metadata of a chunk, once made, and in its annotations, when it is made again
ITEM_SECONDS = 10.0  # in which the driver hears of an item
MEMORY_SHARE = 0.95  # of a worker's limit, at which Dask's nanny ends it
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
        See `worker.execution.execute`.
    *values : object
        Upstream values.
    """
    worker = get_worker()
    key = worker.get_current_task()
    task = worker.state.tasks[key]
    if task.state == "cancelled":  # withdrawn before this thread got to it
        return None
    set_worker(worker.address)
    start = starts(starts_label(worker.address)).begin(key)
    try:
        work = pickle.loads(order)
        kept = (task.annotations or {}).get(KEPT)
        if kept is not None:
            work["kept"] = kept
        if flags >> 1:
            values = values[: -(flags >> 1)]
        announce = _Announcement(worker, key) if flags & 1 else None
        items = _Items(worker, key)
        with memory.resolved(values) as values:
            value, record = execute(work, function, arguments, values, key, announce, on_item=items)
        if not isinstance(value, Failed):
            limit, where = _limit(worker)
            problem = too_large(value, limit, where) or _unsendable(value)
            if problem is not None:
                value, record = refuse(record, value, problem)
            if not isinstance(value, Failed):
                _believe_no_more(value, limit)
                task.metadata[MARK] = record
                if "stages" in work:
                    task.metadata[KEPT] = kept_of(value)
                return value
        elif value.error is not None:
            value.error.__traceback__ = None  # its frames hold the upstream values
    finally:
        start.end()
    value = values = ()
    raise TaskFailure(record)


def _limit(worker: Any) -> tuple[float, str]:
    """Return how large one value may be, in bytes: at a little more the nanny ends this process."""
    limit = getattr(getattr(worker, "memory_manager", None), "memory_limit", None) or 0
    return MEMORY_SHARE * limit, f"the memory_limit of the Dask worker {worker.address}"


def _believe_no_more(value: Any, limit: float) -> None:
    """Have Dask measure a class as we do whose objects claim to be larger than the worker they lie in.

    The scheduler would refuse every task that uses such an object.
    """
    for one in value if type(value) is list else (value,):  # the values of a chunk are a list
        kind = type(one)
        if limit and kind not in _SAFE and kind.__module__.partition(".")[0] not in BELIEVED:
            with contextlib.suppress(Exception):  # one that cannot be measured has a size of Dask's own
                if sizeof(one) > limit:
                    sizeof.register(kind, size_of)


class _Announcement:
    """Tells the session that the user's code begins."""

    def __init__(self, worker: Any, key: Any) -> None:
        self.worker = worker
        self.key = key

    def __call__(self) -> None:
        event = ("started", self.key, b"", 0, self.worker.address, None)
        self.worker.log_event(topic_of(self.key), {"events": [event]})


class _Items:
    """Places what a generator yields on this worker, and tells the session where it lies."""

    def __init__(self, worker: Any, key: Any) -> None:
        self.worker = worker
        self.key = key
        self.held: list[Any] = []

    def __call__(self, number: int, item: Any) -> None:
        problem = _unsendable(item)
        if problem is not None:
            raise problem
        key = (f"{self.key[0]}-{self.key[1]}-items", number)
        self.held.append(get_client().scatter({key: item}, hash=False)[key])
        event = ("item", self.key, b"", size_of(item), self.worker.address, (number, key))
        self.worker.log_event(topic_of(self.key), {"events": [event]})
        if len(self.held) == 1:  # until the session has taken hold of them, somebody has to
            self.worker.loop.add_callback(self._let_go_later)

    def _let_go_later(self) -> None:
        self.worker.loop.call_later(ITEM_SECONDS, self._let_go)

    def _let_go(self) -> None:
        """Let the older half go, which was told of a while ago."""
        half = len(self.held) // 2
        del self.held[: max(half, 1)]
        if self.held:
            self._let_go_later()


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
            dumps(value)
        except Exception as error:
            return error
    return None


_OVER = {"memory", "error"}  # states of a task on its worker
_BEGUN = {"executing", "long-running"} | _OVER


def cancel_keys(wanted: dict[str, list[Any]], dask_worker: Any) -> list[Any]:
    """Ask attempts on this worker to stop; answer those that will tell of their end.

    These are the ones whose code is running, and those that a thread is about to begin or has just
    ended: they are not to be taken back.

    Parameters
    ----------
    wanted : dict of str to list of tuple
        Keys by address of the worker.
    """
    tasks = dask_worker.state.tasks
    wishes = wanted.get(dask_worker.address, [])
    states: dict[Any, str] = {key: tasks[key].state if key in tasks else "" for key in wishes}
    stopped = cancel([key for key, state in states.items() if state not in _OVER])
    return [*stopped, *(key for key, state in states.items() if state in _BEGUN and key not in stopped)]


def end_process() -> None:
    """End this worker process at once; its nanny starts another."""
    os.kill(os.getpid(), signal.SIGKILL)


def starts_label(address: str) -> str:
    """Return the label of a worker's table of starts; other versions of this file have other names."""
    return f"{address}-{__name__}"


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
