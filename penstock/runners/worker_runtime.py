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
``commit``
    Where to store the value before the record is made, see `result_store`; absent if nowhere.

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
``children``
    Packed events of task runs that this one submitted; absent if there are none.
"""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import ctypes
import importlib
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
        self.stored: Any = None  # what an earlier attempt has stored: then the function does not run again
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
        state, stored = None, running.stored
        if error is None:
            self.value, state = _made_by_hand(self.value)
        if error is None and stored is None and (state is None or state["type"] == "COMPLETED"):
            try:  # before the record is made: what is recorded as completed is stored
                self.value, stored = commit(self.value, *_commit_of(running.order))
            except BaseException as raised:
                error, status = raised, _status(raised, running)
        self.error = error
        if error is not None:
            self.value, stored = None, None
        record = _record(running, status, self._started, seconds, self.value, error, children, state, stored)
        own = None if hasattr(error, "_penstock_error") else error
        self.outcome = (self.value if error is None else Failed(record, own), record)
        return True


def _call(running: Running, function: Any, arguments: Any, values: Any, on_start: Any) -> Any:
    order = running.order
    if running.cancelled:
        raise Cancelled
    found = stored_before(*_commit_of(order))
    if found is not None:
        value, running.stored = found
        return value
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
    stored: dict[str, Any] | None = None,
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
    if stored is not None:
        record["stored"] = stored
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
    unpacked = pickle.loads(record)
    unpacked["status"], unpacked["nbytes"] = "failed", 0
    unpacked.pop("stored", None)
    unpacked["error"] = _spelled("UnserializableResult", message)
    record = pickle.dumps(unpacked, 4)
    return Failed(record), record


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
    if order is None or (order["over"] and _size_or_nothing(value) < order["over"]):
        return value, None
    committed: tuple[Any, Any] = _store().commit(value, order, run, attempt)
    return committed


def stored_before(order: dict[str, Any] | None, run: str, attempt: int) -> tuple[Any, Any] | None:
    """Return what `commit` returned in an earlier attempt, whose worker may have died right after."""
    if order is None or attempt == 1:
        return None
    found: tuple[Any, Any] | None = _store().find(order, run)
    return found


def _commit_of(order: dict[str, Any]) -> tuple[Any, str, int]:
    target = order.get("commit")
    return target, order["run"] if target is not None else "", order.get("attempt", 1)


def _store() -> Any:
    if result_store is not None:
        return result_store()
    return importlib.import_module(f"{__name__.rpartition('.')[0]}.result_store")


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
