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
    "readonly", "copy" or "shared": what arrays from other tasks are to the function.
``prints``
    Whether `print` goes to the run's log.
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
``children``
    Packed events of task runs that this one submitted; absent if there are none.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import contextvars
import ctypes
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
from collections import OrderedDict, deque
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
        attempt.value = _call(attempt.running, function, arguments, values, on_start)
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


def _call(running: Running, function: Any, arguments: Any, values: Any, on_start: Any) -> Any:
    order = running.order
    if running.cancelled:
        raise Cancelled
    call = _function(function)
    args, kwargs = _arguments(arguments, guarded_inputs(values, order.get("inputs", "readonly")))
    if on_start is not None:
        on_start()
    if order.get("prints"):
        route_prints()
    with interrupted_after(order.get("interrupt_after"), order.get("name")):
        value = call(*args, **kwargs)
    if inspect.iscoroutine(value):
        value = run_coroutine(value)
    elif inspect.isgenerator(value):
        value = list(value)
    elif inspect.isasyncgen(value):
        value = run_coroutine(_collect(value))
    return value


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
        "nbytes": _size_or_nothing(value),
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
    """Turn the record of a completed attempt into a failed one: its value cannot travel.

    Parameters
    ----------
    record : bytes
        What `run` wrote down.
    value : object
        What it returned.
    error : Exception
        Why it cannot be pickled or stored.

    Returns
    -------
    tuple
        ``(Failed, record)``, as from `run`.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    reason = f"{type(error).__name__}: {error}"[:1000]
    message = f"a result of type {kind} cannot be sent to another process: {reason}"
    text = message.encode("utf-8", "replace")
    # Written by hand, since penstock.errors need not exist where this runs.
    spelled = b"cpenstock.errors\nUnserializableArgument\nX" + len(text).to_bytes(4, "little") + text
    unpacked = pickle.loads(record)
    unpacked["status"], unpacked["nbytes"] = "failed", 0
    unpacked["error"] = {
        "type": "UnserializableArgument",
        "module": "penstock.errors",
        "message": message,
        "text": f"penstock.errors.UnserializableArgument: {message}\n",
        "frames": [],
        "pickle": b"\x80\x02" + spelled + b"\x85R.",
    }
    record = pickle.dumps(unpacked, 4)
    return Failed(record), record


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


def _arguments(arguments: Any, values: Any) -> Any:
    if callable(arguments):
        return arguments(values)
    return _Arguments(arguments, values).load()


def guarded_inputs(values: Any, mode: str) -> list[Any]:
    """Arrays that other tasks may see too arrive as views that refuse writes."""
    if mode == "shared":
        return list(values)
    return [_guarded(value, mode) for value in values]


def _guarded(value: Any, mode: str) -> Any:
    flags = getattr(value, "flags", None)
    if flags is None or not hasattr(flags, "writeable") or not hasattr(value, "setflags"):
        return value
    if mode == "copy":
        return value.copy()
    if flags.writeable:
        value = value.view()
        value.setflags(write=False)
    return value


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


async def _collect(generator: Any) -> list[Any]:
    return [item async for item in generator]


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
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
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
    if isinstance(error, ValueError) and "read-only" in str(error):
        error.add_note(
            "penstock hands arrays from other tasks over as read-only views; "
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


def size(value: Any) -> int:
    """Estimate the size of a value in bytes without copying it."""
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)[:1000]
        total = sum(size(item) for item in items)
        return sys.getsizeof(value) + (total * len(value) // len(items) if items else 0)
    if isinstance(value, dict):
        return sys.getsizeof(value) + size(list(value.values()))
    usage = getattr(value, "memory_usage", None)
    if usage is not None and hasattr(value, "columns"):  # a data frame, sized by itself
        try:
            return int(usage(deep=False).sum())
        except Exception:
            return sys.getsizeof(value, 0)
    fields = getattr(value, "__dataclass_fields__", None)
    if fields and not isinstance(value, type):
        return sum(size(getattr(value, name, None)) for name in fields)
    return sys.getsizeof(value, 0)


def _size_or_nothing(value: Any) -> int:
    """A user's class may compute its `nbytes` or its length, and fail; that is no failed task."""
    try:
        return size(value)
    except Exception:
        return 0


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
