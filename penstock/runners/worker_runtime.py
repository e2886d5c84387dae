"""What runs where the work runs: call the user's function and write down how it went.

Every runner ends up here: `run` executes one attempt and returns its value beside a packed
record. Clusters get this file as source, so it imports the standard library only and must not
import anything of penstock (`cloudpickle` is used where the backend brings it).

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

The order of a chunk has ``stages``, ``count`` and ``box`` instead: see `_run_chunk`.

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
    See `describe`; absent if the status is "completed".
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

import atexit
import builtins
import contextlib
import contextvars
import ctypes
import errno
import functools
import hashlib
import importlib
import inspect
import io
import mmap
import os
import pickle
import queue
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections import ChainMap, OrderedDict, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE_ELEMENT = 1 << 20  # bytes of an element's value that make it guilty where a chunk lacks room
LOG_LINES = 10_000  # per attempt; further lines are counted, not kept
LOG_LINE_BYTES = 65_536
ERROR_TEXT = 20_000  # characters of a traceback that travel
FUNCTIONS_KEPT = 512
AGAIN_SECONDS = 0.005  # until a request to stop that was swallowed is made again

_HOST = socket.gethostname()
_HIDDEN = {__file__}  # frames of these files are not the user's
worker_name = ""  # set by the backend's half where a worker has a name of its own
result_store: Any = None  # likewise: a function that loads the module, where it lies in no package

# One context variable for the whole process, whichever copy of this file was imported.
_shared: Any = sys.modules.setdefault("_penstock_running", types.ModuleType("_penstock_running"))
if not hasattr(_shared, "running"):
    _shared.running = contextvars.ContextVar("penstock_running", default=None)
    _shared.upstairs = contextvars.ContextVar("penstock_upstairs", default=None)
    _shared.print = builtins.print
_running = _shared.running


class Cancelled(BaseException):
    """Raised in the thread of a task that was asked to stop."""


class Skipped(Exception):
    """Raised in the place of a call whose predicate says that there is nothing to do."""


class Failed:
    """Stands where a value would be when its task did not complete."""

    def __init__(self, record: bytes, error: BaseException | None = None) -> None:
        self.record = record
        # The exception itself, in the process that raised it only; of ours the record knows the real class.
        self.error = None if hasattr(error, "_penstock_error") else error

    def __reduce__(self) -> Any:
        return (Failed, (self.record,))


class Running:
    """One attempt while it runs; `current` finds it from the user's code."""

    def __init__(self, order: dict[str, Any], key: Any = None) -> None:
        self.order = order
        self.key = key
        self.thread = threading.get_ident()
        self.cancelled = False
        self.over = False
        self.logs: list[tuple[float, str, str]] = []
        self.dropped = 0
        self.unlock: Any = None  # gives back the lock of a cache key
        self.stored: Any = None  # what the record says of a stored value that is taken: no function runs
        self.found: Any = None  # that value
        self.called: Any = None  # function, args and kwargs, once the call is about to be made
        self.nested: Any = None  # set by the engine when the task submits tasks of its own
        self.yielded = -1  # items that were handed on one by one
        self.helps = False  # a coroutine of the task does a child beside its event loop
        self.awaits = 0  # coroutines of the task that wait without its slot
        self.gap: Any = None  # what takes the slot again
        self.scope: Any = None  # set by the engine where the driver's objects are at hand

    def log(self, level: str, message: object) -> None:
        """Keep one line for the run's log."""
        if len(self.logs) >= LOG_LINES:
            self.dropped += 1
            return
        text = str(message).replace("\0", "")
        if len(text) > LOG_LINE_BYTES:
            text = f"{text[:LOG_LINE_BYTES]} … ({len(text) - LOG_LINE_BYTES} more characters)"
        self.logs.append((time.time(), level, text.encode("utf-8", "replace").decode()))


def current() -> Any:
    """Return the `Running` of the calling code, or None outside a task."""
    return _running.get()


# -- one attempt --------------------------------------------------------------------------


def run(
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
        values = _with_stored(values, order["loads"])
    if "stages" in order:
        return _run_chunk(order, function, arguments, values, key, on_start)
    attempt = Attempt(order, key, scope)
    if "picks" in order:
        values = [_picked(value, order["picks"].get(at)) for at, value in enumerate(values)]
    for value in values:
        if isinstance(value, Failed):
            return attempt.not_started()
    with attempt:
        attempt.value = _call(attempt.running, function, arguments, values, on_start, on_item)
    outcome: tuple[Any, bytes] = attempt.outcome
    return outcome


class Attempt:
    """The frame around user code: ``with attempt: attempt.value = function(...)``.

    It never raises what the block raised; `outcome` holds ``(value, record)`` afterwards. Code
    that has to await fills `value` itself.
    """

    def __init__(self, order: Any, key: Any = None, scope: Any = None) -> None:
        self.running = Running(order, key)
        self.running.scope = scope or self.running.order.get("scope")
        self.value: Any = None
        self.error: BaseException | None = None
        self.outcome: Any = None

    def not_started(self) -> tuple[Any, bytes]:
        """Answer for an attempt whose upstream has no value."""
        record = _record(self.running, {"status": "upstream"}, time.time(), 0.0)
        return Failed(record), record

    def __enter__(self) -> Any:
        self._token = _running.set(self.running)
        self._started, self._clock = time.time(), time.perf_counter()
        try:  # last: a request to stop that strikes before the block would pass `__exit__` by
            _enter(self.running)
        except Cancelled:
            self.running.cancelled = True
        return self

    def pause(self) -> None:
        """Let other code run for a while that is no part of the attempt."""
        with contextlib.suppress(ValueError):
            _running.reset(self._token)

    def resume(self) -> None:
        """Go on with the attempt."""
        self._token = _running.set(self.running)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        running = self.running
        while not running.over:
            try:
                _leave(running)
            except BaseException as raised:  # a request to stop that came in the last moment
                error = error or raised
        self.value, error, details = _finished(running, self.value, error)
        seconds = time.perf_counter() - self._clock
        with contextlib.suppress(ValueError):  # a coroutine may end in another context
            _running.reset(self._token)
        self.error = error
        record = _record(running, details, self._started, seconds, self.value)
        self.outcome = (self.value if error is None else Failed(record, error), record)
        return True


def _finished(
    running: Running, value: Any, error: BaseException | None
) -> tuple[Any, BaseException | None, dict[str, Any]]:
    """Do what is due when user code has ended: wait for its children, look at what it returned.

    Returns
    -------
    tuple
        The value, the error, and what the record says besides times and sizes.
    """
    children = noted = None
    if running.nested is not None:
        try:
            value = running.nested.finish(value, error)
        except BaseException as raised:
            error = error or raised
        noted = running.nested.values()
        children = running.nested.events()
    details: dict[str, Any] = {"status": "completed" if error is None else _status(error, running)}
    if error is None:
        value, state = _made_by_hand(value)
        if state is not None:
            details["state"] = state
        if state is None or state["type"] == "COMPLETED":
            value, error = _kept(running, value, details)
    if running.unlock is not None:
        running.unlock()
    if error is not None:
        value = None
        if details["status"] == "failed":
            _note_inputs(error, running)
        details["error"] = describe(error)
    if "naming" in running.order:
        details["named"] = running.order["name"]
    if running.logs:
        details["logs"] = running.logs
    if running.dropped:
        details["dropped"] = running.dropped
    if children:
        details["children"] = children
    if noted:
        details["values"] = noted
    if running.yielded >= 0:
        details["yielded"] = running.yielded
    return value, error, details


def _kept(running: Running, value: Any, details: dict[str, Any]) -> tuple[Any, BaseException | None]:
    """Store the value, if it is to be: before the record is made, so that what completed is stored."""
    stored = running.stored
    if stored is None:
        try:
            value, stored = commit(value, *_commit_of(running.order))
        except BaseException as raised:
            details.pop("state", None)
            details["status"] = _status(raised, running)
            return None, raised
    if stored is not None:
        details["stored"] = stored
    return value, None


def _call(
    running: Running, function: Any, arguments: Any, values: Any, on_start: Any, on_item: Any = None
) -> Any:
    order = running.order
    if running.cancelled:
        raise Cancelled
    if stored_before(running):
        return running.found
    call = _function(function)
    guard = Guard(order.get("inputs", "readonly"))  # as long as it lives, a frame is copied on write
    args, kwargs = _arguments(arguments, guard.values(map(opened, values)))
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
        value = call(*args, **kwargs)
        if type(value) in _SIMPLE:
            return value
        return _settled(running, value, on_item if order.get("streams") else None)


def ask(predicate: Any, args: Any, kwargs: Any) -> None:
    """Raise `Skipped` if a run is not to be, by the predicate that its work order names."""
    reason = _function(predicate)(args, kwargs)
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
    function = _function(naming)
    name = function(parameters)
    if not isinstance(name, str):
        raise TypeError(
            f"Callable {function} for 'task_run_name' returned type {type(name).__name__} but a string is required."
        )
    return name


_INERT = frozenset({type(None), bool, int, float, complex, str, bytes})
_SIMPLE = _INERT | {list, tuple, dict}


def _settled(running: Running, value: Any, on_item: Any = None) -> Any:
    """Run to its end what the call of a user's function has only begun."""
    if inspect.iscoroutine(value):
        return run_coroutine(value)
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
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
        run_coroutine(_draw(generator, take))
    else:
        for item in generator:
            take(item)
            del item  # it may be large, and the next one is about to be made
    return found


class TimedOut(Exception):
    """Raised in code that exceeded its time, where it can be interrupted."""


@contextlib.contextmanager
def interrupted_after(seconds: float | None, name: Any) -> Iterator[None]:
    """Interrupt the block after a time; only the main thread of a process can be interrupted."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: Any) -> None:
        raise TimedOut(f"Run {name!r} exceeded timeout of {seconds} second(s)")

    ring.rings = True  # type: ignore[attr-defined] # marks it for `_ring_again`
    hear_swallowed()
    if 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= seconds:  # the time around this one is over first
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    begun = time.monotonic()
    due, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if due:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(due - (time.monotonic() - begun), 1e-3), interval)


def is_signal(error: BaseException) -> bool:
    """Whether an exception came from a signal to the driver, in whose main thread a task ran.

    The engine's handler has an attribute ``received`` that notes a signal; where none was
    noted, a KeyboardInterrupt is the task's own.
    """
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    handlers = (signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
    return any(getattr(handler, "received", None) is not None for handler in handlers)


def _status(error: BaseException, running: Running) -> str:
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


def _record(
    running: Running, details: dict[str, Any], started: float, seconds: float, value: Any = None
) -> bytes:
    record: dict[str, Any] = {
        "attempt": running.order.get("attempt", 1),
        "started": started,
        "ended": started + seconds,
        "seconds": seconds,
        "nbytes": size(value),
        **_place_and_peak(),
        **details,
    }
    return pickle.dumps(record, 4)


def _place_and_peak() -> dict[str, Any]:
    return {
        "peak": peak_memory(),
        "host": _HOST,
        "pid": os.getpid(),
        "worker": worker_name,
        "thread": threading.get_ident(),
    }


def _made_by_hand(value: Any) -> tuple[Any, dict[str, Any] | None]:
    """A task may return a state instead of a value: the run then ends as that state says."""
    kind = type(value)
    if kind.__name__ != "State" or kind.__module__ != "penstock.engine.states":
        return value, None
    data = value.data
    state = {"type": str(value.type), "name": value.name, "message": value.message}
    if isinstance(data, BaseException):
        state["error"] = describe(data)
        data = None
    return data, state


def refuse(record: bytes, value: Any, error: BaseException) -> tuple[Any, bytes]:
    """Turn the record of a completed attempt into a failed one: its value cannot travel, or stay.

    Of a chunk only those elements fail whose own value cannot; where room is lacking, the large ones.

    Parameters
    ----------
    record : bytes
        What `run` wrote down.
    value : object
        What it returned.
    error : Exception
        Why it cannot be pickled or stored; a `MemoryError` or a full disk makes it a `ResultTooLarge`.

    Returns
    -------
    tuple
        ``(Failed, record)``, as from `run`; of a chunk the list that can travel, and its record.
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
    sizes = [size(value) for value in values]
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
    if type(value) in _INERT or isinstance(value, Failed):
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
        return _spelled("ResultTooLarge", message)
    message = f"a result of type {kind} cannot be sent to another process: {type(error).__name__}: {reason}"
    return _spelled("UnserializableResult", message)


def _lacks_room(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOSPC


def _spelled(kind: str, message: str) -> dict[str, Any]:
    """Describe an error of `penstock.errors`, which need not exist where this runs."""
    text = message.encode("utf-8", "replace")
    spelled = b"cpenstock.errors\n" + kind.encode() + b"\nX" + len(text).to_bytes(4, "little") + text
    return {
        "type": kind,
        "module": "penstock.errors",
        "message": message,
        "text": f"penstock.errors.{kind}: {message}\n",
        "frames": [],
        "pickle": b"\x80\x02" + spelled + b"\x85R.",
    }


# -- results that outlive their process -----------------------------------------------------


def commit(value: Any, order: dict[str, Any] | None, run: str, attempt: int) -> tuple[Any, Any]:
    """Store the value of one attempt, if its work order says so.

    Parameters
    ----------
    value : object
        What the function returned.
    order : dict or None
        ``commit`` of the work order.
    run, attempt : str, int
        Whose value it is; the runs of a chunk share an order.

    Returns
    -------
    tuple
        The value of the run (the stored one, if another attempt was faster), and what the record
        says about the storage: None if nothing was stored.
    """
    if order is None or (order["over"] and size(value) < order["over"]):
        return value, None
    committed: tuple[Any, Any] = _store().commit(value, order, run, attempt)
    return committed


def stored_before(running: Any) -> bool:
    """Take the stored value of an earlier attempt, whose worker may have died after `commit`, or of a cache key."""
    order, run, attempt = _commit_of(running.order)
    if order is None:
        return False
    if "cache" in order:
        return _recalled(running, order, run)
    found = _store().find(order, run) if attempt > 1 else None
    if found is None:
        return False
    running.found, running.stored = found
    return True


def stored_under(running: Any, call: Any, args: Any, kwargs: Any) -> bool:
    """Make the cache key of a run from its values, if nobody could before; take what is stored under it."""
    order = running.order.get("commit")
    if order is None or "work" not in order:
        return False
    try:
        lookups = importlib.import_module("penstock.engine.lookups")
    except ImportError:
        running.log(
            "WARNING", "caching is off for this run: its worker cannot import penstock to make the key"
        )
        return False
    key = lookups.keyed(order, running, call, args, kwargs)
    if key is None:
        return False
    named = {} if order["named"] else {"key": _store().cache_place(key, order["folder"])}
    order = running.order["commit"] = {**order, **named, "cache": key}
    return _recalled(running, order, running.order["run"])


def _recalled(running: Any, order: Any, run: str) -> bool:
    """Take the value that is stored under a cache key; with a lock, wait for whoever makes it."""
    lock = order.get("lock")
    if lock is not None:
        manager = pickle.loads(lock) if isinstance(lock, bytes) else lock
        holder = f"{run}-{running.order.get('attempt', 1)}"
        manager.acquire_lock(order["cache"], holder)
        running.unlock = functools.partial(manager.release_lock, order["cache"], holder)
    return recall(running)


def recall(running: Any) -> bool:
    """Take the value that is stored under the cache key of a run; a damaged one is made again."""
    store = _store()
    try:
        found = store.recall(running.order["commit"], running.order["run"])
    except store.Damaged as error:
        running.log("WARNING", f"CacheCorrupt: {error}; the value is made again")
        return False
    if found is None:
        return False
    running.found, running.stored = found
    return True


class Kept:
    """Stands among upstream values for one that lies in a storage."""

    penstock_kept = True

    def __init__(self, where: Any) -> None:
        self._where = where

    @property
    def value(self) -> Any:
        """Read the value."""
        where = self._where
        return where() if callable(where) else _store().load(where, where["run"])


def _with_stored(values: Any, loads: dict[int, Any]) -> list[Any]:
    """Put stored values in their places among the others."""
    others = iter(values)
    count = len(loads) + len(values)
    return [Kept(loads[place]) if place in loads else next(others) for place in range(count)]


def _commit_of(order: dict[str, Any]) -> tuple[Any, str, int]:
    target = order.get("commit")
    return target, order["run"] if target is not None else "", order.get("attempt", 1)


def _store() -> Any:
    if result_store is not None:
        return result_store()
    return importlib.import_module(f"{__name__.rpartition('.')[0]}.result_store")


# -- many elements of a map ---------------------------------------------------------------


class _ElementOrder(dict[str, Any]):
    """The work order of one element, whose id and name are made when somebody asks."""

    def __missing__(self, name: str) -> Any:
        if name == "run":
            self[name] = element_id(self["map"], self["index"])
        elif name == "name":
            self[name] = f"{self['task']}-{self['index']}"
        else:
            raise KeyError(name)
        return self[name]


class _Stage:
    """One task of a chunk: makes the calls of its elements and keeps what they tell.

    Parameters
    ----------
    order : dict
        ``map, task, indices, attempts, inputs, prints, context, ordinal``, perhaps ``names``, ``scopes`` and
        ``commits``.
    function : bytes or callable
        What to call.
    arguments : list
        A pair of keyword (or None) and entry for each argument; see `_entry`.
    values : sequence
        Upstream values of the chunk.
    earlier : list of _Stage
        The stages before.
    """

    def __init__(self, order: Any, function: Any, arguments: Any, values: Any, earlier: Any) -> None:
        self.order = order
        self.call = _function(function)
        self.indices, self.attempts = order["indices"], order["attempts"]
        self.names, self.scopes = order.get("names"), order.get("scopes")
        self.common = {
            name: order[name] for name in ("map", "task", "inputs", "prints", "context", "ordinal")
        }
        self.skip_if = order.get("skip_if")
        self.commits = order.get("commits")  # one for all elements, or a list with one for each
        mode = self.mode = order["inputs"]
        self.private = isinstance(function, bytes)  # the arguments were unpickled for this chunk

        def maker(entry: Any) -> Any:
            if entry[0] == "stage":
                made = earlier[entry[1]].values
                return lambda number: _guarded(made[number], mode)
            if entry[0] == "fill":
                makers = [maker(upstream) for upstream in entry[2]]
                return lambda number: _filled(entry[1], [make(number) for make in makers])
            if entry[0] == "mixed":
                some = [maker(one) for one in entry[1]]
                return lambda number: some[number](number)
            return _entry(entry, values, mode)

        self.args = [maker(entry) for keyword, entry in arguments if keyword is None]
        self.kwargs = {keyword: maker(entry) for keyword, entry in arguments if keyword is not None}
        self.values: list[Any] = []
        self.started: list[float] = []
        self.seconds: list[float] = []
        self.nbytes: list[int] = []
        if order["prints"]:
            route_prints()

    def running(self, number: int, key: Any) -> Running:
        """Make what the user's code sees of its own run."""
        attempts = self.attempts
        order = _ElementOrder(self.common)
        order["index"] = self.indices[number]
        order["attempt"] = attempts if isinstance(attempts, int) else attempts[number]
        if self.commits is not None:
            order["commit"] = self.commits if isinstance(self.commits, dict) else self.commits[number]
        if "tags" in self.order:
            order["tags"] = self.order["tags"]
        if self.names is not None:
            order["name"] = self.names[number]
        found = Running(order)
        found.key = key
        if self.scopes is not None:
            found.scope = self.scopes[number]
        return found

    def invoke(self, number: int, running: Running) -> Any:
        """Call the function for one element; a `Failed` means that it was not called."""
        args = [make(number) for make in self.args]
        kwargs = {keyword: make(number) for keyword, make in self.kwargs.items()} if self.kwargs else {}
        for value in args:
            if type(value) is Failed:
                return value
        for value in kwargs.values():
            if type(value) is Failed:
                return value
        if not (_nothing_in(args) and _nothing_in(kwargs.values())):
            args, kwargs = Guard(self.mode).arguments(args, kwargs, private=self.private)
        if self.skip_if is not None:
            ask(self.skip_if, args, kwargs)
        if self.commits is not None and stored_under(running, self.call, args, kwargs):
            return running.found
        running.called = (self.call, args, kwargs)
        value = self.call(*args, **kwargs)
        return value if type(value) in _SIMPLE else _settled(running, value)


class _Interrupted(Exception):
    """The chunk ends here: it was asked to, or the process was."""


def _run_chunk(
    order: Any, function: Any, arguments: Any, values: Any, key: Any, on_start: Any
) -> tuple[Any, bytes]:
    """Execute the elements of a chunk, one after the other, each through all stages.

    The order has ``stages`` (see `_Stage`), ``count`` (of elements) and ``box``: seconds and bytes
    of results after which the rest is left alone, or None.

    Returns
    -------
    tuple
        The list of all values, stage after stage, and the record: ``status`` "chunk", ``count``,
        ``done`` (how many elements were run), ``stages`` (for each its columns ``started, seconds, nbytes``),
        ``odd`` (by place what an element's own record would say besides, if anything), and what
        every record says.
    """
    begun, clock = time.time(), time.perf_counter()
    whole = Running({"attempt": 1}, key)
    token = _running.set(whole)
    count, box = order["count"], order["box"]
    odd: dict[int, dict[str, Any]] = {}
    stages: list[_Stage] = []
    done = filled = 0
    try:
        _enter(whole)
        if whole.cancelled:
            raise _Interrupted
        functions = (
            pickle.loads(function) if isinstance(function, bytes) and len(order["stages"]) > 1 else None
        )
        functions = functions or (function if isinstance(function, list) else [function])
        if isinstance(arguments, bytes):
            arguments = pickle.loads(arguments)
        values = [opened(value) for value in values]
        for part, one, some in zip(order["stages"], functions, arguments, strict=True):
            stages.append(_Stage(part, one, some, values, stages[:]))
        if on_start is not None:
            on_start()
        note = start_of(key)
        while done < count:
            note.element(done)
            _run_element(stages, done, count, odd, whole)
            done += 1
            if box is not None:
                filled += sum(stage.nbytes[-1] for stage in stages)
                if filled > box[1] or time.perf_counter() - clock > box[0]:
                    break
    except _Interrupted:
        done = min((len(stage.nbytes) for stage in stages), default=0)
    except BaseException as error:  # asked to stop between two elements, or it cannot even begin
        done = min((len(stage.nbytes) for stage in stages), default=0)
        if not whole.cancelled and done < count:
            _blame(error, stages, done, count, odd, order)
            done += 1
    while not whole.over:
        with contextlib.suppress(BaseException):  # a request to stop that came in the last moment
            _leave(whole)
    _running.reset(token)
    return _chunk_outcome(order, stages, done, odd, begun, clock)


def _run_element(
    stages: list[_Stage], number: int, count: int, odd: dict[int, dict[str, Any]], whole: Running
) -> None:
    """Run one element through all stages."""
    for at, stage in enumerate(stages):
        running = stage.running(number, whole.key)
        _running.set(running)
        value: Any = None
        error: BaseException | None = None
        started, clock = time.time(), time.perf_counter()
        try:
            if stage.commits is not None and stored_before(running):
                value = running.found
            else:
                value = stage.invoke(number, running)
        except BaseException as raised:
            error = raised
        if type(value) is Failed:
            odd[at * count + number] = {"status": "upstream"}
        elif (
            error is not None
            or running.logs
            or running.nested is not None
            or stage.commits is not None
            or type(value) not in _SIMPLE
        ):
            running.cancelled = running.cancelled or whole.cancelled
            value, error, details = _finished(running, value, error)
            if error is not None:
                value = Failed(b"", error)
            if len(details) > 1 or error is not None:
                odd[at * count + number] = details
        stage.started.append(started)
        stage.seconds.append(time.perf_counter() - clock)
        stage.values.append(value)
        stage.nbytes.append(0 if error is not None else size(value))
        if error is not None and (running.cancelled or whole.cancelled or is_signal(error)):
            _fill_up(stages[at + 1 :], number, at + 1, count, odd)
            raise _Interrupted


def _fill_up(
    stages: list[_Stage], number: int, first: int, count: int, odd: dict[int, dict[str, Any]]
) -> None:
    """Note of the later stages of an element that they were not reached."""
    for at, stage in enumerate(stages, first):
        odd[at * count + number] = {"status": "upstream"}
        stage.started.append(0.0)
        stage.seconds.append(0.0)
        stage.values.append(Failed(b""))
        stage.nbytes.append(0)


def _blame(error: BaseException, stages: Any, done: int, count: int, odd: Any, order: Any) -> None:
    """The chunk cannot be set up, say because its function does not load: the next element has failed."""
    for part in order["stages"][len(stages) :]:
        stage = object.__new__(_Stage)
        stage.order, stage.values, stage.started, stage.seconds, stage.nbytes = part, [], [], [], []
        stages.append(stage)
    for at, stage in enumerate(stages):
        if len(stage.nbytes) > done:
            continue
        failed = at == 0 or at * count + done - count not in odd
        odd[at * count + done] = (
            {"status": "failed", "error": describe(error)} if failed else {"status": "upstream"}
        )
        stage.started.append(time.time())
        stage.seconds.append(0.0)
        stage.values.append(Failed(b"", error))
        stage.nbytes.append(0)


def _chunk_outcome(
    order: Any, stages: list[_Stage], done: int, odd: Any, begun: float, clock: float
) -> tuple[Any, bytes]:
    count = order["count"]
    values: list[Any] = []
    for stage in stages:
        values.extend(stage.values[:done])
        values.extend([Failed(b"")] * (count - done))
    columns: list[Any] = [
        [stage.started[:done], stage.seconds[:done], stage.nbytes[:done]] for stage in stages
    ]
    seconds = time.perf_counter() - clock
    record: dict[str, Any] = {
        "status": "chunk",
        "attempt": 1,
        "count": count,
        "done": done,
        "stages": columns or [[[], [], []] for _ in order["stages"]],
        "odd": odd,
        "started": begun,
        "ended": begun + seconds,
        "seconds": seconds,
        "nbytes": sum(sum(column[2]) for column in columns),
        **_place_and_peak(),
    }
    if not stages:
        values = [Failed(b"")] * (count * len(order["stages"]))
    return values, pickle.dumps(record, 4)


def signal_of(value: Any) -> BaseException | None:
    """Return the exception in a value that came from a signal to the driver, see `is_signal`."""
    errors = [one.error for one in (value if isinstance(value, list) else [value]) if isinstance(one, Failed)]
    return next((error for error in errors if error is not None and is_signal(error)), None)


@functools.lru_cache(1024)
def _map_digest(map_id: str) -> tuple[str, int]:
    digest = hashlib.blake2b(map_id.encode(), digest_size=6).hexdigest()
    prefix = f"{map_id[:12]}8{digest[:3]}{'89ab'[int(digest[3], 16) & 3]}"
    return prefix, int(digest[4:], 16)


def element_id(map_id: str, index: int) -> str:
    """Return the id of one element of a map; every process computes the same one.

    Parameters
    ----------
    map_id : str
        Id of the map run.
    index : int
        Position of the element, below 2 ** 28.

    Returns
    -------
    str
        32 hexadecimal digits (a UUIDv8): the time of the map, 14 bits of a digest of its id, the index,
        and 32 bits in which index and digest are mixed, so that its last digits tell elements apart as
        those of any id do. The ids of a map stand together and in order wherever ids are sorted; a
        store that keeps its rows by id writes them one after the other.
    """
    prefix, salt = _map_digest(map_id)
    return f"{prefix}{index:07x}{(index * 0x9E3779B1 + salt) & 0xFFFFFFFF:08x}"


def too_large(value: Any, limit: float, where: str) -> MemoryError | None:
    """Return the error of a value that does not fit where it was made, None if it does.

    Only arrays, frames, bytes and containers of them are believed.

    Parameters
    ----------
    value : object
        What a task has returned.
    limit : float
        Bytes that a single value may have; 0 for no limit.
    where : str
        What has the limit, for the message.
    """
    nbytes = _occupied(value, 0) if limit else 0
    if nbytes <= limit:
        return None
    return MemoryError(f"{nbytes:,} bytes, and {where} allows {int(limit):,}")


def _occupied(value: Any, depth: int) -> int:
    kind = type(value)
    if kind in {list, tuple, set, dict} and depth < len(_SAMPLES):
        items = list({id(item): item for item in (value.values() if kind is dict else value)}.values())
        sample = items[:: -(-len(items) // 1000)] if items else []
        return sum(_occupied(item, depth + 1) for item in sample) * len(items) // max(len(sample), 1)
    if kind in {str, bytes, bytearray}:
        return len(value)
    if kind.__module__.partition(".")[0] in _BELIEVED:
        return size(value)
    return 0


_BELIEVED = {"numpy", "pandas", "pyarrow", "polars", "xarray", "scipy"}


# -- functions and arguments --------------------------------------------------------------

_functions: OrderedDict[bytes, Any] = OrderedDict()
_functions_lock = threading.Lock()


def _function(function: Any) -> Any:
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


def _arguments(arguments: Any, values: Any) -> Any:
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
        value = _entry(entry, values, None)(0)
        if keyword is None:
            args.append(value)
        else:
            kwargs[keyword] = value
    return args, kwargs


def _picked(value: Any, place: int | None) -> Any:
    """Return one item of a chunk's value; of a chunk that failed as a whole, the failure."""
    return value if place is None or isinstance(value, Failed) else value[place]


def _entry(entry: Any, values: Any, mode: str | None) -> Any:
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
        one = _picked(values[entry[1]], entry[2])
        if mode == "copy":  # each element gets one of its own
            return lambda _: _guarded(one, mode)
        one = one if mode is None else _guarded(one, mode)
        return lambda _: one
    if kind == "picks":
        return _picker(entry[1], entry[2], values, mode)
    if kind == "fill":
        makers = [_entry(upstream, values, mode) for upstream in entry[2]]
        return lambda number: _filled(entry[1], [make(number) for make in makers])
    makers = [_entry(one, values, mode) for one in entry[1]]  # "mixed"
    return lambda number: makers[number](number)


def _picker(positions: Any, places: Any, values: Any, mode: str | None) -> Any:
    if len(positions) == 1:
        whole = values[positions[0]]
        if isinstance(whole, Failed):
            return lambda _: whole
        if mode in {None, "shared"}:
            return lambda number: whole if places[number] is None else whole[places[number]]
        return lambda number: _guarded(_picked(whole, places[number]), mode)
    return lambda number: _guarded(_picked(values[positions[number]], places[number]), mode or "shared")


def _filled(content: Any, upstream: list[Any]) -> Any:
    """Make an argument with upstream values inside."""
    failed = next((value for value in upstream if isinstance(value, Failed)), None)
    if failed is not None:
        return failed
    return content(upstream) if callable(content) else _Arguments(content, upstream).load()


# -- what arrays are to a function ----------------------------------------------------------

INPUT_DEPTH = 5  # containers inside one another that are searched for arrays
INPUT_ITEMS = 10_000  # items of a container that are looked at in search of a first array


def guarded_inputs(values: Any, mode: str) -> list[Any]:
    """Arrays that other tasks may see too arrive as views that refuse writes."""
    return Guard(mode).values(values)


def _guarded(value: Any, mode: str) -> Any:
    """Guard one value; see `guarded_inputs`."""
    return Guard(mode).values((value,))[0]


class Guard:
    """Makes of the arguments of one call what its `inputs` promise, whatever the backend hands over.

    Containers, dataclasses and models are searched to a bounded depth, and copied where something in
    them changes. Under "readonly" arrays become views that refuse writes, and frames become copies on
    write; under "copy" both become the function's own.

    Parameters
    ----------
    mode : {"readonly", "copy", "shared"}
        The option `inputs` of the task.
    """

    def __init__(self, mode: str) -> None:
        self.copies = mode == "copy"
        self._idle = mode == "shared"
        self._all = True
        self._made: dict[int, tuple[Any, Any]] = {}  # by identity; an id is good while its object lives

    def values(self, values: Any) -> list[Any]:
        """Guard values of other tasks, and what was put."""
        if self._idle:
            return list(values)
        return [self._guarded(value, 0) for value in values]

    def arguments(self, args: Any, kwargs: Any, *, private: bool) -> tuple[Any, Any]:
        """Guard complete arguments.

        Parameters
        ----------
        args, kwargs
            Of the function; what `values` has answered may be among them.
        private : bool
            They were unpickled for this call: what can be written to needs no copy.
        """
        if self._idle or (_nothing_in(args) and _nothing_in(kwargs.values())):
            return args, kwargs
        self._all = not private
        args = tuple([self._guarded(value, 0) for value in args])
        return args, {name: self._guarded(value, 0) for name, value in kwargs.items()} if kwargs else kwargs

    def _guarded(self, value: Any, depth: int) -> Any:
        kind = type(value)
        try:
            treatment = _treatments[kind]
        except KeyError:
            treatment = _treatments[kind] = _treatment(kind)
        if treatment is None or depth > INPUT_DEPTH:
            return value
        found = self._made.get(id(value))
        if found is not None:
            return found[1]
        self._made[id(value)] = value, value  # it may hold itself
        try:
            guarded = treatment(self, value, depth)
        except Exception:  # an odd class: better its own object than none
            guarded = value
        self._made[id(value)] = value, guarded
        self._made[id(guarded)] = guarded, guarded
        return guarded

    # -- arrays ---------------------------------------------------------------------------------
    def _array(self, value: Any, depth: int) -> Any:
        writable = value.flags.writeable
        if self.copies:
            return value.copy(order="K") if self._all or not writable else value
        if writable:
            value = value.view()
            value.setflags(write=False)
        return value

    def _masked(self, value: Any, depth: int) -> Any:
        guarded = self._array(value, depth)
        mask = guarded._mask
        if (
            not self.copies and hasattr(mask, "shape") and mask.shape
        ):  # a write of `masked` goes to the mask only
            if guarded is value:
                guarded = value.view()
            guarded._mask = self._array(mask, depth)
        return guarded

    def _sparse(self, value: Any, depth: int) -> Any:
        if self.copies or not hasattr(value, "data") or value.format in {"lil", "dok"}:
            return value.copy()
        guarded = _copy(value)
        for name, item in list(vars(guarded).items()):
            vars(guarded)[name] = self._guarded(item, depth + 1)
        return guarded

    # -- frames ---------------------------------------------------------------------------------
    def _frame(self, value: Any, depth: int) -> Any:
        if not self.copies and _copies_on_write():
            return value.copy(deep=False)
        return value.copy(deep=True) if self._all or self.copies else value

    def _clone(self, value: Any, depth: int) -> Any:
        return value.clone()

    def _labelled(self, value: Any, depth: int) -> Any:
        if self.copies:
            return value.copy(deep=True)
        guarded = value.copy(deep=False)
        if hasattr(guarded, "data_vars"):
            variables = list(guarded.variables.values())
        elif hasattr(guarded, "coords"):
            variables = [guarded.variable, *guarded.coords.variables.values()]
        else:
            variables = [guarded]
        for variable in variables:
            data = variable._data
            if _treatment(type(data)) is Guard._array:  # no index, and nothing lazy
                variable.data = self._array(data, depth)
        return guarded

    # -- containers -----------------------------------------------------------------------------
    def _list(self, value: Any, depth: int) -> Any:
        if _nothing_in(value):
            return value
        changed = self._changed(enumerate(value), depth)
        if not changed:
            return value
        items = list(value)
        for place, item in changed.items():
            items[place] = item
        kind = type(value)
        if kind is list:
            return items
        return kind(*items) if hasattr(value, "_fields") else kind(items)

    def _dict(self, value: Any, depth: int) -> Any:
        if _nothing_in(value.values()):
            return value
        changed = self._changed(value.items(), depth)
        return {**value, **changed} if changed else value

    def _fields(self, value: Any, depth: int) -> Any:
        names = [name for name in value.__dataclass_fields__ if hasattr(value, name)]
        changed = self._changed(((name, getattr(value, name)) for name in names), depth)
        if not changed:
            return value
        guarded = _copy(value)
        for name, item in changed.items():
            object.__setattr__(guarded, name, item)
        return guarded

    def _model(self, value: Any, depth: int) -> Any:
        names = type(value).__pydantic_fields__
        changed = self._changed(((name, getattr(value, name)) for name in names), depth)
        return value.model_copy(update=changed) if changed else value

    def _changed(self, items: Any, depth: int) -> dict[Any, Any]:
        changed: dict[Any, Any] = {}
        for number, (place, item) in enumerate(items):
            if number == INPUT_ITEMS and not changed:
                break
            guarded = self._guarded(item, depth + 1)
            if guarded is not item:
                changed[place] = guarded
        return changed


def _nothing_in(items: Any) -> bool:
    """Whether all items are of classes that are handed over as they are; quick for long lists of numbers."""
    return all(_treatments.get(kind, items) is None for kind in set(map(type, items)))


def _copy(value: Any) -> Any:
    import copy

    return copy.copy(value)


_treatments: dict[type, Any] = dict.fromkeys(
    (type(None), bool, int, float, complex, str, bytes, bytearray, set, frozenset)
)
_treatments.update({list: Guard._list, tuple: Guard._list, dict: Guard._dict})


def _treatment(kind: type) -> Any:
    """Return the method of `Guard` for a class, None for what is handed over as it is."""
    for base in kind.__mro__:
        library, name = base.__module__.partition(".")[0], base.__name__
        if library in {"numpy", "pandas", "polars", "xarray"}:
            known = _KNOWN.get(f"{library}.{name}")
            if known is not None:
                return known
        elif base.__module__.startswith("scipy.sparse"):
            return Guard._sparse
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return Guard._list
    if hasattr(kind, "__dataclass_fields__"):
        return Guard._fields
    return Guard._model if hasattr(kind, "__pydantic_fields__") else None


_KNOWN = {
    "numpy.MaskedArray": Guard._masked,
    "numpy.ndarray": Guard._array,
    "pandas.NDFrame": Guard._frame,
    "polars.DataFrame": Guard._clone,
    "polars.Series": Guard._clone,
    "xarray.DataArray": Guard._labelled,
    "xarray.Dataset": Guard._labelled,
    "xarray.Variable": Guard._labelled,
}


def _copies_on_write() -> bool:
    """Whether a shallow copy of a pandas frame is safe from writes to it."""
    pandas = sys.modules["pandas"]
    if int(pandas.__version__.partition(".")[0]) >= 3:
        return True
    return pandas.options.mode.copy_on_write is True


# -- coroutines: one long-lived loop per worker thread --------------------------------------

_loops = threading.local()


def run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine on this thread's loop, or on a fresh thread if a loop runs here."""
    import asyncio  # half of what this file costs at the start of a worker

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return in_thread(run_coroutine, coroutine)
    if threading.current_thread() is threading.main_thread():
        # The main thread is the user's: nothing of ours stays open in it between two tasks.
        loop = asyncio.new_event_loop()
        task = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(task)
        finally:
            if not task.done():  # interrupted from outside
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    loop.run_until_complete(task)
            loop.close()
    holder = getattr(_loops, "holder", None)
    if holder is None:
        holder = _loops.holder = _Loop()
    return holder.loop.run_until_complete(coroutine)


class _Loop:
    """Closes the loop of a thread when the thread ends."""

    def __init__(self) -> None:
        import asyncio

        self.loop = asyncio.new_event_loop()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.loop.close()


def close_loop() -> None:
    """Close the loop of this thread, which is about to end."""
    holder = _loops.__dict__.pop("holder", None)
    if holder is not None:
        with contextlib.suppress(Exception):  # it runs still, if code in it was struck from outside
            holder.loop.close()


async def _draw(generator: Any, take: Any) -> None:
    async for item in generator:
        take(item)


def in_thread(function: Any, *args: Any) -> Any:
    """Call a function in a fresh thread and wait; used where this thread's stack is not usable.

    The thread works in a copy of the caller's context. While it waits, the caller does what the
    thread asks it to do by `on_task_thread`.
    """
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    box: list[tuple[Any, BaseException | None]] = []

    def upstairs(ask: Any) -> Any:
        reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put((ask, reply))
        value, error = reply.get()
        if error is not None:
            raise error
        return value

    context = contextvars.copy_context()
    if _shared.upstairs.get() is None:
        context.run(_shared.upstairs.set, upstairs)

    def target() -> None:
        try:
            box.append((context.run(function, *args), None))
        except BaseException as error:  # handed to the waiting thread
            box.append((None, error))
        close_loop()
        requests.put(None)

    thread = threading.Thread(target=target, name="penstock-hop", daemon=True)
    thread.start()
    while (asked := requests.get()) is not None:
        ask, reply = asked
        try:
            reply.put((ask(), None))
        except BaseException as raised:
            reply.put((None, raised))
    value, error = box[0]
    if error is not None:
        raise error
    return value


def on_task_thread(function: Any) -> Any:
    """Call a function in the thread that the backend gave to the task, and return its value.

    Code of a task may run in another thread, because a stack was deep or an event loop had to stay
    free; some backends know their slots by the thread.
    """
    upstairs = _shared.upstairs.get()
    return function() if upstairs is None else upstairs(function)


async def beside_loop(function: Any, *args: Any) -> Any:
    """Call a function in a thread beside the running event loop, and await its value."""
    import asyncio

    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def upstairs(ask: Any) -> Any:
        async def answer() -> Any:
            return ask()

        return asyncio.run_coroutine_threadsafe(answer(), loop).result()

    context = contextvars.copy_context()
    if _shared.upstairs.get() is None:
        context.run(_shared.upstairs.set, upstairs)

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def target() -> None:
        value, problem = None, None
        try:
            value = context.run(function, *args)
        except BaseException as error:  # handed to the coroutine
            problem = error
        close_loop()
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody waits any more
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=target, name="penstock-hop", daemon=True).start()
    return await done


# -- cancel -------------------------------------------------------------------------------

_active: dict[Any, Running] = {}
_unwanted: OrderedDict[Any, bool] = OrderedDict()  # keys cancelled before they started
_active_lock = threading.Lock()


def _enter(running: Running) -> None:
    if running.key is None:
        return
    with _active_lock:
        running.cancelled = _unwanted.pop(running.key, False)
        _active[running.key] = running


def _leave(running: Running) -> None:
    """The user's code has ended: from here on no request to stop may reach this thread."""
    with _active_lock:
        if running.key is not None:
            _active.pop(running.key, None)
        if running.cancelled:  # take back a request that has not been delivered yet
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(running.thread), None)
        running.over = True  # last: whoever is struck in here has to come again


class Stoppable:
    """A block of this thread that `cancel` can stop, and that is no attempt of a task.

    Parameters
    ----------
    key : tuple
        Its name for `cancel`.
    """

    def __init__(self, key: Any) -> None:
        self.running = Running({}, key)

    def __enter__(self) -> None:
        _enter(self.running)
        if self.running.cancelled:
            self.__exit__()
            raise Cancelled

    def __exit__(self, *_: object) -> None:
        raised: BaseException | None = None
        while not self.running.over:
            try:
                _leave(self.running)
            except Cancelled as error:  # a request to stop that came in the last moment
                raised = error
        if raised is not None:
            raise raised


def cancel(keys: Any) -> list[Any]:
    """Ask attempts in this process to stop.

    Parameters
    ----------
    keys : list of tuple
        Attempts; those that have not started yet will not run their function.

    Returns
    -------
    list of tuple
        The keys that are running in this process now.
    """
    found = []
    hear_swallowed()
    with _active_lock:
        for key in map(tuple, keys):
            running = _active.get(key)
            if running is None:
                _unwanted[key] = True
                while len(_unwanted) > 100_000:
                    _unwanted.popitem(last=False)
                continue
            found.append(key)
            running.cancelled = True
            # Acts between two bytecodes: code in a C call ends only when that call returns.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(running.thread), ctypes.py_object(Cancelled)
            )
    return found


_swallowed = False  # whether `hear_swallowed` has been called


def hear_swallowed() -> None:
    """Send requests to stop again that struck where Python drops every exception.

    Such places are callbacks of the garbage collector and `__del__`: they end there, and the code
    around them goes on as if nobody had asked.
    """
    global _swallowed
    if _swallowed:
        return
    _swallowed = True
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, (Cancelled, TimedOut)):
            before(dropped)
            return
        # Another thread has to do it: here it would strike in the same place.
        again = _stop_again if issubclass(dropped.exc_type, Cancelled) else _ring_again
        threading.Thread(target=again, args=(threading.get_ident(),), daemon=True).start()

    sys.unraisablehook = hook


def _stop_again(thread: int) -> None:
    time.sleep(AGAIN_SECONDS)
    with _active_lock:
        if any(one.thread == thread and one.cancelled for one in _active.values()):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Cancelled))


def _ring_again(_thread: int) -> None:
    if getattr(signal.getsignal(signal.SIGALRM), "rings", False):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


# -- what has begun here, where it survives a SIGKILL ----------------------------------------

START_PLACES = 512  # attempts that run or have ended last; 28 kB per worker process
_NAME_BYTES = 48
_CELLS_END = START_PLACES * 8
_GRACE_SECONDS = 60.0  # for whoever reads the file of a dead process, until a sweep takes it


class Starts:
    """The attempts that have begun in this process, in a file that outlives it.

    A worker that dies takes along which of its tasks had begun. It is written down here, in a
    small mapped file for each process; the driver or scheduler on the same host reads the file of
    a dead worker by `read_starts`, or looks for one attempt by `find_start`. An attempt that has
    ended stays in the file until its place is needed, the oldest first: the message that says so
    may not have left the process when it died.

    How a back end uses it::

        start = starts().begin(key)          # before anything of the user is unpickled
        try:
            ...                              # in a chunk, before each element: start.element(index)
        finally:
            start.end()                      # when the result is out of the task's hands

    Code further down finds the object by `start_of`. `begin` and `end` take 3 µs, `element` 0.2 µs.

    Parameters
    ----------
    label : str
        Tells workers of one process apart, and versions of this file; part of the file's name.
    """

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._lock = threading.Lock()
        self._process = 0
        self._map: Any = None
        self._cells: Any = None
        self._free: deque[int] = deque()

    def open(self) -> None:
        """Make the file before the first attempt begins: a worker without one is known for nothing."""
        with self._lock:
            if self._process != os.getpid():  # the first time, or in a fork
                self._process = os.getpid()
                self._map = self._cells = None
                with contextlib.suppress(OSError, ValueError):  # no disk: nobody will know
                    self._map = self._mapped()
                    self._cells = memoryview(self._map)[:_CELLS_END].cast("q")
                    self._free = deque(range(START_PLACES))

    def begin(self, key: Any) -> Start:
        """Note that an attempt begins."""
        if self._process != os.getpid():
            self.open()
        cells = self._cells
        try:
            place = self._free.popleft()
        except IndexError:  # nothing could be mapped, or more at once than there are places
            cells, place = None, 0
        start = Start(key, cells, place, self._free)
        if cells is not None:
            cells[place] = 0
            name = start_name(key).encode("ascii", "replace")[: _NAME_BYTES - 1]
            at = _CELLS_END + place * _NAME_BYTES
            self._map[at : at + 1 + len(name)] = bytes((len(name),)) + name
            cells[place] = 1
        _starts_open[key] = start
        return start

    def _mapped(self) -> Any:
        folder = _starts_folder()
        os.makedirs(folder, 0o700, exist_ok=True)
        if os.stat(folder).st_uid != os.getuid():
            raise OSError(folder)
        sweep_starts()
        path = _starts_file(os.getpid(), self._label)
        with contextlib.suppress(OSError):  # of an earlier process with this number
            os.unlink(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            size = _CELLS_END + START_PLACES * _NAME_BYTES
            os.truncate(descriptor, size)
            atexit.register(_unlink_own, path, os.getpid())
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)


class Start:
    """The note that one attempt has begun."""

    __slots__ = ("_cells", "_free", "_key", "_place")

    def __init__(self, key: Any, cells: Any, place: int, free: deque[int]) -> None:
        self._key = key
        self._cells = cells
        self._place = place
        self._free = free

    def element(self, index: int) -> None:
        """Note which element of a chunk begins now; all before it have run."""
        if self._cells is not None:
            self._cells[self._place] = index + 1

    def end(self) -> None:
        """Note that the attempt has ended; calling it twice is harmless."""
        cells, self._cells = self._cells, None
        _starts_open.pop(self._key, None)
        if cells is not None:
            cells[self._place] = -cells[self._place]
            self._free.append(self._place)


_starts: dict[str, Starts] = {}
_starts_open: dict[Any, Start] = {}
_NO_START = Start(None, None, 0, deque())


def starts(label: str = "") -> Starts:
    """Return the table of this process with a label, made once."""
    found = _starts.get(label)
    return _starts.setdefault(label, Starts(label)) if found is None else found


def start_of(key: Any) -> Start:
    """Return the note of an attempt that runs in this process; one that writes nothing if there is none."""
    return _starts_open.get(key, _NO_START)


def start_name(key: Any) -> str:
    """Return the name of an attempt in the file: tag and counter of its key."""
    return f"{key[0].rpartition('-')[2]}:{key[1]}"


def read_starts(pid: int, label: str = "", *, remove: bool = True) -> dict[str, tuple[int, bool]] | None:
    """Read what had begun in another process of this host, dead or alive.

    Parameters
    ----------
    pid : int
        Of the worker process.
    label : str
        Of its table.
    remove : bool
        Delete the file, since the process is dead.

    Returns
    -------
    dict or None
        `start_name` of each attempt → index of the element that ran last (0 for what is no
        chunk), and whether the attempt had ended. An attempt without an entry had not begun, or
        its end is long past. None if nobody knows: another host, no file.
    """
    path = _starts_file(pid, label)
    found = _read_starts(path)
    if remove and found is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return found


class LastStarts:
    """What has begun in a process of this host that is about to end, to be read until it has.

    Parameters
    ----------
    pid : int
        Of the process.
    label : str
        Of its table.
    """

    def __init__(self, pid: int, label: str = "") -> None:
        self.pid = pid
        self._path = _starts_file(pid, label)
        self._file: Any = None
        with contextlib.suppress(OSError):
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - the process may remove it before it ends

    def read(self) -> dict[str, tuple[int, bool]] | None:
        """Return what `read_starts` does, None if nobody knows."""
        return None if self._file is None else _starts_in(self._file)

    def is_growing(self) -> bool:
        """Whether the process lives and may begin more."""
        try:
            os.kill(self.pid, 0)
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return self._file is not None and file.read().rpartition(b")")[2].split()[:1] != [b"Z"]
        except OSError:
            return False

    def close(self) -> None:
        """Delete the table."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def __del__(self) -> None:
        self.close()


def find_start(key: Any) -> tuple[int, int, bool] | None:
    """Look for an attempt in the files of all processes of this host.

    Returns
    -------
    tuple of (int, int, bool) or None
        Process id, index of the element that ran last, whether the attempt had ended. None if it
        has not begun on this host, or nobody knows.
    """
    wanted = start_name(key)
    try:
        names = os.listdir(_starts_folder())
    except OSError:
        return None
    for name in names:
        found = _read_starts(os.path.join(_starts_folder(), name)) or {}
        if wanted in found:
            return int(name.partition("-")[0]), *found[wanted]
    return None


def _read_starts(path: str) -> dict[str, tuple[int, bool]] | None:
    try:
        with open(path, "rb") as file:
            return _starts_in(file)
    except OSError:
        return None


def _starts_in(file: Any) -> dict[str, tuple[int, bool]] | None:
    try:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            return None
        file.seek(0)
        data = file.read()
        cells = memoryview(data)[:_CELLS_END].cast("q")
    except (OSError, TypeError):
        return None
    if len(data) < _CELLS_END + START_PLACES * _NAME_BYTES:
        return None
    found = {}
    for place, cell in enumerate(cells):
        if cell:
            at = _CELLS_END + place * _NAME_BYTES
            name = data[at + 1 : at + 1 + data[at]].decode("ascii", "replace")
            found[name] = (abs(cell) - 1, cell < 0)
    return found


def sweep_starts() -> None:
    """Remove the files of processes that have been dead for a minute; their readers come first."""
    folder = _starts_folder()
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            try:
                os.kill(int(name.partition("-")[0]), 0)
            except ProcessLookupError:
                with contextlib.suppress(OSError):
                    _bury_starts(path)
            except (ValueError, OSError):
                continue


def _bury_starts(path: str) -> None:
    """Delete a file at the second look; at the first one, write the time on it."""
    status = os.stat(path)
    if status.st_mode & 0o200:
        os.utime(path)
        os.chmod(path, 0o400)
    elif time.time() - status.st_mtime > _GRACE_SECONDS:
        os.unlink(path)


def _starts_folder() -> str:
    base = os.environ.get("TMPDIR", "")
    return os.path.join(base if os.path.isdir(base) else "/tmp", f"penstock-starts-{os.getuid()}")  # noqa: S108 - its owner is checked


def _starts_file(pid: int, label: str) -> str:
    plain = "".join(letter if letter.isalnum() else "_" for letter in label)
    return os.path.join(_starts_folder(), f"{pid}-{plain}")


def _unlink_own(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        with contextlib.suppress(OSError):
            os.unlink(path)


# -- errors -------------------------------------------------------------------------------


def describe(error: BaseException) -> dict[str, Any]:
    """Turn an exception into primitives that always unpickle.

    Returns
    -------
    dict
        ``type`` and ``module`` of the class, ``message``, ``text`` (the traceback as text),
        ``frames`` (list of ``(file, line, function)``, the user's only) and ``pickle`` (the
        exception itself, None if it cannot be pickled).
    """
    frames = [
        (frame.filename, frame.lineno or 0, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in _HIDDEN
    ]
    _strip(error)
    ours = getattr(error, "_penstock_error", None)
    if isinstance(ours, str):
        return _spelled(ours, str(error))
    if isinstance(error, ValueError) and "read-only" in str(error):
        error.add_note(
            "penstock hands arrays over as read-only views, since others may see them too; "
            "use @task(inputs='copy') for a copy of your own, or inputs='shared' to share it."
        )
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # an odd __str__ must not hide the failure
        text = f"{type(error).__name__}: (its message cannot be shown)"
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return {
        "type": type(error).__qualname__,
        "module": type(error).__module__,
        "message": message[:ERROR_TEXT],
        "text": text[-ERROR_TEXT:],
        "frames": frames,
        "pickle": _pickle_error(error),
    }


INPUTS_NOTED = 12  # arguments of a call that a note names


def _note_inputs(error: BaseException, running: Running) -> None:
    """Add to an error what the call got: types, shapes and dtypes, and of values only plain numbers."""
    called, running.called = running.called, None
    if called is None or getattr(error, "_penstock_error", None) is not None:
        return
    function, args, kwargs = called
    try:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        named = list(bound.items())
    except Exception:  # a function of C tells no names
        named = [*((f"#{place}", value) for place, value in enumerate(args)), *kwargs.items()]
    if not named:
        return
    texts = [f"{name}: {_outline(value)}" for name, value in named[:INPUTS_NOTED]]
    if len(named) > INPUTS_NOTED:
        texts.append(f"{len(named) - INPUTS_NOTED} more")
    note = f"inputs of {running.order.get('name') or 'the task'!r}: {', '.join(texts)}"
    if note not in getattr(error, "__notes__", ()):
        with contextlib.suppress(Exception):  # an odd class must not hide the failure
            error.add_note(note)


def _outline(value: Any, depth: int = 0) -> str:
    """Tell what a value is without its content, which may be secret or large."""
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, complex)):
        text = repr(value)
        return text if len(text) <= 24 else kind
    try:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if isinstance(shape, tuple):
            return f"{kind}{shape}" + (f" {dtype}" if dtype is not None else "")
        if isinstance(value, (str, bytes, bytearray)):
            return f"{kind} of {len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            inner = ""
            if depth == 0 and isinstance(value, (list, tuple)) and value:
                inner = f", the first {_outline(value[0], 1)}"
            return f"{kind} of {len(value)}{inner}"
    except Exception:  # an odd class must not hide the failure
        return kind
    return kind


def _strip(error: BaseException | None) -> None:
    """Drop our frames from the traceback of an error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kept, step = [], error.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename not in _HIDDEN:
                kept.append(step)
            step = step.tb_next
        head: types.TracebackType | None = None
        for frame in reversed(kept):
            head = types.TracebackType(head, frame.tb_frame, frame.tb_lasti, frame.tb_lineno or 0)
        error.__traceback__ = head
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _pickle_error(error: BaseException) -> bytes | None:
    """Pickle an exception so that it loads again, also where its __init__ is odd."""
    for form in (error, _Rebuilt(error)):
        try:
            data = dumps(form)
            loaded = pickle.loads(data)
        except Exception:
            continue
        if isinstance(loaded, BaseException):
            return data
    return None


class _Rebuilt:
    """Pickles an exception as class, args and attributes, without calling its __init__."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        state = {}
        for name, value in vars(self.error).items():
            try:
                dumps(value)
            except Exception:
                value = repr(value)
            state[name] = value
        args = []
        for value in self.error.args:
            try:
                dumps(value)
            except Exception:
                value = repr(value)
            args.append(value)
        return (_exception_of, (type(self.error), tuple(args), state))


def _exception_of(kind: Any, args: Any, state: Any) -> Any:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


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


# -- seeds ----------------------------------------------------------------------------------


def seed_from(around: int, task: str, ordinal: int, index: int) -> int:
    """Make the random seed of a task run, 64 bits.

    Parameters
    ----------
    around : int
        Seed of the run whose code calls the task.
    task : str
        Name of the task.
    ordinal : int
        The how-manieth call of that task it is there.
    index : int
        Of an element of a map; -1 for any other call.
    """
    text = f"{around}/{task}/{ordinal}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def seed_of(order: Any) -> int:
    """Return the random seed of the run that a work order belongs to, the same at every attempt.

    Good for ``random.Random(seed)`` and ``numpy.random.default_rng(seed)``.
    """
    around = order["context"].get("seed", 0)
    return seed_from(around, order["task"], order.get("ordinal", 0), order.get("index", -1))


# -- prints, sizes, memory ------------------------------------------------------------------


def route_prints() -> None:
    """Make `print` write to the log of the run that calls it, where the run wants that."""
    if builtins.print is not _print:
        builtins.print = _print


def set_outside(receive: Any) -> None:
    """Ask `receive(text)` about prints outside of task runs; it answers whether it took them."""
    _shared.outside = receive


def _print(
    *args: Any, sep: str | None = " ", end: str | None = "\n", file: Any = None, flush: bool = False
) -> None:
    if file in (None, sys.stdout):
        text = (" " if sep is None else sep).join(map(str, args))
        running = _running.get()
        outside = getattr(_shared, "outside", None)
        if (running is not None and running.scope is None) or outside is None:
            taken = running is not None and bool(running.order.get("prints"))
            if taken:
                running.log("INFO", text)
        else:
            taken = outside(text)
        if taken:
            return
    _shared.print(*args, sep=sep, end=end, file=file, flush=flush)


SIZE_LIMIT = 1 << 50  # a claim above a pebibyte is no size, and sums have to fit into a database
_SAMPLES = (100, 10, 5)  # items that stand for all, by depth


def size(value: Any, depth: int = 0) -> int:
    """Estimate the size of a value in bytes, without a copy and without trust in the value.

    Parameters
    ----------
    value : object
        Of any class; one whose `nbytes` or `__sizeof__` lies or raises has the size of its shell.
    depth : int
        How many containers surround it.

    Returns
    -------
    int
        Not negative, at most `SIZE_LIMIT`.
    """
    kind = type(value)
    if kind in _SHELLS:
        return sys.getsizeof(value)
    try:
        if kind.__name__ == "ndarray" and kind.__module__ == "numpy" and 0 not in value.strides:
            found: int = value.nbytes
            return found
        return min(max(int(_size(value, kind, depth)), 0), SIZE_LIMIT)
    except Exception:
        return 0


def _size(value: Any, kind: type, depth: int) -> int:
    if is_lazy(value):
        return sys.getsizeof(value, 0)
    found = _told(value, kind, depth)
    library = kind.__module__.partition(".")[0]
    if found > _memory_of_host() and library != "builtins" and library not in _BELIEVED:
        return object.__sizeof__(value)  # there is no such object
    return found


def _told(value: Any, kind: type, depth: int) -> int:
    if kind in {list, tuple, set, frozenset}:
        return sys.getsizeof(value) + _sampled(value, depth)
    if kind is dict:
        return sys.getsizeof(value) + _sampled(value.values(), depth) + _sampled(value, depth)
    claimed = _claimed(value)
    if claimed is not None:
        return claimed
    fields = getattr(kind, "__dataclass_fields__", None) or getattr(kind, "__pydantic_fields__", None)
    if fields and depth < len(_SAMPLES):
        return sum(size(getattr(value, name, None), depth + 1) for name in fields)
    if isinstance(value, (list, tuple, set, frozenset)):
        return sys.getsizeof(value, 0) + _sampled(value, depth)
    return sys.getsizeof(value, 0)


def _memory_of_host() -> int:
    global _host_memory
    if not _host_memory:
        try:
            _host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (OSError, ValueError):
            _host_memory = SIZE_LIMIT
    return _host_memory


_host_memory = 0
_SHELLS = {type(None), bool, int, float, complex, str, bytes, bytearray, type}


def _sampled(items: Any, depth: int) -> int:
    """Estimate the size of what is in a container by a few of its items."""
    count = len(items)
    if not count or depth >= len(_SAMPLES):
        return 0
    few = _SAMPLES[depth]
    if count <= few:
        return _together(items, depth)
    if isinstance(items, (list, tuple)):
        sample = items[:: -(-count // few)]
    else:
        sample = [item for item, _ in zip(items, range(few), strict=False)]
    return _together(sample, depth) * count // len(sample)


def _together(items: Any, depth: int) -> int:
    if _SHELLS.issuperset(map(type, items)):
        return sum(map(sys.getsizeof, items))
    return sum(size(item, depth + 1) for item in items)


def _claimed(value: Any) -> int | None:
    """Return what an array or a frame says of its size, None if that cannot be one."""
    nbytes = getattr(value, "nbytes", None)
    if nbytes is None:
        usage = getattr(value, "memory_usage", None)
        if usage is not None and hasattr(value, "columns"):
            nbytes = usage(deep=False).sum()
        elif hasattr(value, "estimated_size"):
            nbytes = value.estimated_size()
    if nbytes is None or isinstance(nbytes, str) or callable(nbytes):
        return None
    strides = getattr(value, "strides", None)
    if isinstance(strides, tuple) and 0 in strides and hasattr(value, "itemsize"):  # broadcast: one for many
        nbytes = value.itemsize
        for length, stride in zip(value.shape, strides, strict=True):
            nbytes *= length if stride else 1
    found = int(nbytes)
    return found if found >= 0 else None


def is_lazy(value: Any) -> bool:
    """Whether a value is a Dask collection: it says what it would be, and holds nothing yet."""
    kind = type(value)
    if kind is type or not hasattr(kind, "__dask_graph__"):
        return False
    if kind.__module__.partition(".")[0] == "dask":  # its graph would be made for the question
        return True
    try:
        return value.__dask_graph__() is not None
    except Exception:
        return False


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
