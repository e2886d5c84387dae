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
``yielded``
    How many items a generator has handed on one by one; absent if its value is a list.
``children``
    Packed events of task runs that this one submitted; absent if there are none.
"""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import ctypes
import errno
import inspect
import io
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
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG_LINES = 10_000  # per attempt; further lines are counted, not kept
LOG_LINE_BYTES = 65_536
ERROR_TEXT = 20_000  # characters of a traceback that travel
FUNCTIONS_KEPT = 512

_HOST = socket.gethostname()
_HIDDEN = {__file__}  # frames of these files are not the user's
worker_name = ""  # set by the backend's half where a worker has a name of its own

# One context variable for the whole process, whichever copy of this file was imported.
_shared: Any = sys.modules.setdefault("_penstock_running", types.ModuleType("_penstock_running"))
if not hasattr(_shared, "running"):
    _shared.running = contextvars.ContextVar("penstock_running", default=None)
    _shared.upstairs = contextvars.ContextVar("penstock_upstairs", default=None)
    _shared.print = builtins.print
_running = _shared.running


class Cancelled(BaseException):
    """Raised in the thread of a task that was asked to stop."""


class Failed:
    """Stands where a value would be when its task did not complete."""

    def __init__(self, record: bytes, error: BaseException | None = None) -> None:
        self.record = record
        self.error = error  # the exception itself, in the process that raised it only

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
        self.nested: Any = None  # set by the engine when the task submits tasks of its own
        self.yielded = -1  # items that were handed on one by one
        self.helps = False  # a coroutine of the task does a child beside its event loop
        self.awaits = False  # a coroutine of the task has given its slot back
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
    attempt = Attempt(order, key, scope)
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
        self.running = Running(pickle.loads(order) if isinstance(order, bytes) else order, key)
        self.running.scope = scope or self.running.order.get("scope")
        self.value: Any = None
        self.error: BaseException | None = None
        self.outcome: Any = None

    def not_started(self) -> tuple[Any, bytes]:
        """Answer for an attempt whose upstream has no value."""
        record = _record(self.running, "upstream", time.time(), 0.0)
        return Failed(record), record

    def __enter__(self) -> Any:
        self._token = _running.set(self.running)
        self._started, self._clock = time.time(), time.perf_counter()
        try:  # last: a request to stop that strikes before the block would pass `__exit__` by
            _enter(self.running)
        except Cancelled:
            self.running.cancelled = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        running = self.running
        while not running.over:
            try:
                _leave(running)
            except BaseException as raised:  # a request to stop that came in the last moment
                error = error or raised
        status = "completed" if error is None else _status(error, running)
        children = None
        if running.nested is not None:
            try:
                self.value = running.nested.finish(self.value, error)
            except BaseException as raised:
                if error is None:
                    error, status = raised, _status(raised, running)
            children = running.nested.events()
        seconds = time.perf_counter() - self._clock
        with contextlib.suppress(ValueError):  # a coroutine may end in another context
            _running.reset(self._token)
        self.error = error
        state = None
        if error is None:
            self.value, state = _made_by_hand(self.value)
        else:
            self.value = None
        record = _record(running, status, self._started, seconds, self.value, error, children, state)
        self.outcome = (self.value if error is None else Failed(record, error), record)
        return True


def _call(
    running: Running, function: Any, arguments: Any, values: Any, on_start: Any, on_item: Any = None
) -> Any:
    order = running.order
    if running.cancelled:
        raise Cancelled
    call = _function(function)
    guard = Guard(order.get("inputs", "readonly"))  # as long as it lives, a frame is copied on write
    args, kwargs = _arguments(arguments, guard.values(map(opened, values)))
    args, kwargs = guard.arguments(args, kwargs, private=not callable(arguments))
    if on_start is not None:
        on_start()
    if order.get("prints"):
        route_prints()
    with interrupted_after(order.get("interrupt_after"), order.get("name")):
        value = call(*args, **kwargs)
    if inspect.iscoroutine(value):
        value = run_coroutine(value)
    elif inspect.isgenerator(value) or inspect.isasyncgen(value):
        value = _yielded(running, value, on_item if order.get("streams") else None)
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
    if isinstance(error, KeyboardInterrupt) and running.cancelled:
        return "cancelled"
    if not isinstance(error, Exception):
        return "crashed"
    if type(error).__name__ == "Skip" and type(error).__module__ == "penstock.errors":
        return "skipped"
    return "failed"


def _record(
    running: Running,
    status: str,
    started: float,
    seconds: float,
    value: Any = None,
    error: BaseException | None = None,
    children: bytes | None = None,
    state: dict[str, Any] | None = None,
) -> bytes:
    record: dict[str, Any] = {
        "status": status,
        "attempt": running.order.get("attempt", 1),
        "started": started,
        "ended": started + seconds,
        "seconds": seconds,
        "nbytes": size(value),
        "peak": peak_memory(),
        "host": _HOST,
        "pid": os.getpid(),
        "worker": worker_name,
        "thread": threading.get_ident(),
    }
    if running.logs:
        record["logs"] = running.logs
    if running.dropped:
        record["dropped"] = running.dropped
    if running.yielded >= 0:
        record["yielded"] = running.yielded
    if error is not None:
        record["error"] = describe(error)
    if children:
        record["children"] = children
    if state is not None:
        record["state"] = state
    return pickle.dumps(record, 4)


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
        ``(Failed, record)``, as from `run`.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    reason = str(error)[:1000]
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOSPC:
        name = "ResultTooLarge"
        message = f"a result of type {kind} is larger than its worker can keep: {reason}"
    else:
        name = "UnserializableArgument"
        message = (
            f"a result of type {kind} cannot be sent to another process: {type(error).__name__}: {reason}"
        )
    text = message.encode("utf-8", "replace")
    # Written by hand, since penstock.errors need not exist where this runs.
    spelled = f"cpenstock.errors\n{name}\nX".encode() + len(text).to_bytes(4, "little") + text
    unpacked = pickle.loads(record)
    unpacked["status"], unpacked["nbytes"] = "failed", 0
    unpacked["error"] = {
        "type": name,
        "module": "penstock.errors",
        "message": message,
        "text": f"penstock.errors.{name}: {message}\n",
        "frames": [],
        "pickle": b"\x80\x02" + spelled + b"\x85R.",
    }
    record = pickle.dumps(unpacked, 4)
    return Failed(record), record


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
    """Return the value in an envelope of the engine that nobody has pickled on the way."""
    return value.value if getattr(type(value), "penstock_envelope", False) else value


def _arguments(arguments: Any, values: Any) -> Any:
    if callable(arguments):
        return arguments(values)
    if not arguments:  # they were too large for a message: placed like a value, after all others
        arguments = values[-1]
    return _Arguments(arguments, values).load()


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
        try:
            return loop.run_until_complete(coroutine)
        finally:
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


def dumps(value: Any) -> bytes:
    """Pickle with cloudpickle where it is at hand."""
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps(value, 5)
    pickled: bytes = cloudpickle.dumps(value, 5)
    return pickled


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
