"""The half of the Ray runner that lies in the worker: one task, and the signals that reach it.

Workers need not have penstock. The one remote function of a session carries this file and the
folder `worker` as source, and Ray sends it to each worker process once. So this file imports these,
the standard library and Ray only, and what it returns unpickles with the standard library alone.

A task of Ray runs in the main thread of its process, one at a time. Ray's cancel sets Python's
flag for SIGINT there, which nobody looks at in the middle of a `time.sleep`, and only a main thread
that waits *in Ray* gives its CPU back. Both are mended here with a second signal, SIGURG, which is
ignored by default and used by hardly anybody: it makes the main thread leave a system call and run
what is due.
"""

from __future__ import annotations

import _thread
import functools
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from types import FrameType, SimpleNamespace
from typing import Any

from .worker import coroutines  # relative: the package around may have another name when shipped
from .worker.errors import hide
from .worker.execution import execute, execute_stream
from .worker.failure import Failed
from .worker.interruption import AGAIN_SECONDS, Cancelled, hear_swallowed
from .worker.record import refuse, set_worker
from .worker.running import current
from .worker.sizes import size_of, too_large
from .worker.starts import starts

Note = bytes
"""What travels beside a value: flag, size, worker, record; see `write_note`."""

COMPLETED, FAILED, UPSTREAM, ITEM = 0, 1, 2, 3
STORE = b"penstock"
"""Namespace of our keys in the key-value store of Ray's head."""

SLICE = 0.05  # seconds that a task waits in Ray before it looks up
LOOK_SECONDS = 0.003
FUNCTIONS_KEPT = 64
LARGE_VALUE = 100_000_000  # bytes from which a value is compared with what the node can keep
FAILURE_BYTES = 32_768  # a longer record is not repeated in the value of a failed task

_worker = ""  # how the worker of this process is called; set by `begin`


def entry(sources: dict[str, str], *, streams: bool = False) -> Callable[..., Any]:
    """Make a function that Ray exports: it brings its own source along.

    Parameters
    ----------
    sources : dict of str to str
        Path → text of this file and of the folder `worker`, see `shipment.sources`.
    streams : bool
        Make the one for generators whose items are wanted one by one.

    Returns
    -------
    callable
        Takes a head (see `pack_head`) and the upstream values, answers ``(value, note)``, or yields
        what `stream` does. It is a closure, hence pickled by value, and names nothing outside itself.
    """
    loaded: dict[str, Any] = {}

    def tasks_here() -> Any:
        if not loaded:
            import importlib.util
            import os
            import sys
            import types

            class Shipped:
                """Finds and loads the modules of a package from their texts."""

                def __init__(self, package: str) -> None:
                    names = {path: path[:-3].replace("/", ".").removesuffix(".__init__") for path in sources}
                    self.paths = {f"{package}.{name}": path for path, name in names.items()}

                def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
                    file = self.paths.get(name)
                    if file is None:
                        return None
                    ours: Any = self
                    return importlib.util.spec_from_loader(name, ours, is_package="__init__" in file)

                def create_module(self, spec: Any) -> None:
                    """Have Python make it."""

                def exec_module(self, module: Any) -> None:
                    path = self.paths[module.__name__]
                    module.__file__ = f"<penstock.runners>/{path}"
                    exec(compile(sources[path], module.__file__, "exec"), module.__dict__)  # noqa: S102 - our source

                def load(self, name: str) -> Any:
                    """Import a module without the packages around it, which may exist or not."""
                    spec = self.find_spec(name)
                    module = sys.modules[name] = importlib.util.module_from_spec(spec)
                    self.exec_module(module)
                    return module

            def is_same(worker: Any) -> bool:
                """Whether a loaded `worker` is what we would load."""
                if hasattr(worker, "_sources"):
                    return bool(worker._sources == sources)
                folder = os.path.dirname(os.path.dirname(worker.__file__))
                try:
                    for path, text in sources.items():
                        with open(os.path.join(folder, path), encoding="utf-8") as file:
                            if file.read() != text:
                                return False
                except OSError:
                    return False
                return True

            package = "penstock.runners"
            there = sys.modules.get(f"{package}.worker")  # the worker has imported penstock: one copy of each
            if there is not None and not is_same(there):
                package = f"_penstock_{abs(hash(tuple(sources.values()))):x}"
                there = sys.modules.get(f"{package}.worker")
                sys.modules.setdefault(package, types.ModuleType(package)).__path__ = []
            if there is None:
                shipped = Shipped(package)
                sys.meta_path.insert(0, shipped)
                shipped.load(f"{package}.worker")._sources = sources
                tasks = shipped.load(f"{package}.ray_tasks")
            else:
                tasks = importlib.import_module(f"{package}.ray_tasks")
            tasks.begin()
            loaded["tasks"] = tasks
        return loaded["tasks"]

    def penstock(head: bytes, *values: Any) -> Any:
        return tasks_here().work(head, values)

    def penstock_stream(head: bytes, *values: Any) -> Any:
        yield from tasks_here().stream(head, values)

    return penstock_stream if streams else penstock


def begin() -> None:
    """Make this process ready for tasks, once."""
    global _worker
    if _worker:
        return
    try:
        import cloudpickle  # noqa: F401
    except ImportError:  # functions are pickled with it; Ray has a copy
        import ray.cloudpickle

        sys.modules["cloudpickle"] = ray.cloudpickle
        sys.modules["cloudpickle.cloudpickle"] = ray.cloudpickle.cloudpickle
    import ray

    node = ray.get_runtime_context().get_node_id()
    _worker = f"{node[:8]}:{os.getpid()}"
    set_worker(_worker)
    starts().open()
    _tell_exits()
    _hear_swallowed()
    hide(__file__)


def _tell_exits() -> None:
    """Have the log of this process say with which code user code left it; Ray never tells."""
    leave, process = os._exit, os.getpid()

    def _exit(status: int) -> None:
        if os.getpid() == process:
            os.write(2, f"*** exit {status} by os._exit ***\n".encode())
        leave(status)

    os._exit = _exit  # type: ignore[assignment]


def _hear_swallowed() -> None:
    """Make requests to stop again that struck where Python drops every exception: see `interruption`."""
    hear_swallowed()
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        task = _task
        if task is None or not task.interrupted or not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        threading.Thread(target=_interrupt_again, args=(task,), daemon=True).start()

    sys.unraisablehook = hook


def _interrupt_again(task: _Task) -> None:
    time.sleep(AGAIN_SECONDS)
    if task is _task and not task.is_over:
        _thread.interrupt_main()  # as Ray does it: the signal itself is blocked here


# -- one task -----------------------------------------------------------------------------


def pack_head(
    key: tuple[str, int],
    order: bytes,
    function: bytes | str,
    arguments: bytes,
    announce: bytes | None,
    after: int,
) -> bytes:
    """Pack what a task needs besides upstream values into one argument.

    Parameters
    ----------
    key, order, arguments
        As in `Submission`.
    function : bytes or str
        Pickled function, or the key in Ray's key-value store under which it lies.
    announce : bytes or None
        Prefix of the key in that store that says which task has begun in a process.
    after : int
        How many of the values that follow are notes of tasks that come first.
    """
    return pickle.dumps((key, order, function, arguments, announce, after), 5)


def work(head: bytes, values: Sequence[Any]) -> tuple[Any, Any]:
    """Run one task; the errors of users never leave it."""
    global _task
    key, order, function, arguments, announce, after = pickle.loads(head)
    _listen()
    start = starts().begin(key)
    task = _task = _Task(key, announce)
    try:
        upstream, function = _upstream(values, after), _content(function)
        value, record = execute(order, function, arguments, upstream, key, task.begin)
        task.is_over = True
        start.end()  # Ray stores the result after this; the note of what has ended stays for a while
        return _departing(value, record)
    finally:
        _task = None
        start.end()


def stream(head: bytes, values: Sequence[Any]) -> Iterator[Any]:
    """Run the task of a generator: give each item and a note on it, and in the end value and note of the task.

    Ray draws this in the main thread, so the user's code runs there, too, and can be interrupted.
    """
    global _task
    key, order, function, arguments, announce, after = pickle.loads(head)
    _listen()
    start = starts().begin(key)
    task = _task = _Task(key, announce)
    try:
        upstream, function = _upstream(values, after), _content(function)
        items = execute_stream(order, function, arguments, upstream, key, task.begin)
        value, record = yield from _parcels(items)
        task.is_over = True
        start.end()
        answer, note = _departing(value, record)
        yield answer
        yield note
    finally:
        _task = None
        start.end()


def _parcels(items: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
    """Give each item as Ray can carry it, and a note on it; return what the task answers in the end."""
    try:
        item = next(items)
        while True:
            note = write_note(ITEM, size_of(item), b"")
            try:
                item = item if _always_pickles(item) else _Sealed(item)
            except Exception as error:
                item = items.throw(error)  # which fails the task, hence ends it
                continue
            yield item
            item = None  # it may be large, and the next one is about to be made
            yield note
            item = next(items)
    except StopIteration as end:
        return end.value


def _upstream(values: Sequence[Any], after: int) -> list[Any]:
    """Return the values that a task uses; a failed one among them if what comes first has failed."""
    upstream = [_arrived(value) for value in values[after:]]
    if any(note[0] != COMPLETED for note in values[:after]):
        upstream.append(Failed(b""))
    return upstream


class _Task:
    """The task of this process, as the signals find it."""

    def __init__(self, key: tuple[str, int], announce: bytes | None) -> None:
        self.key = key
        self.announce = announce
        self.running: Any = None
        self.interrupted = False
        self.is_over = False  # its code has ended: a request to stop comes too late

    def begin(self) -> None:
        """User code starts now."""
        self.running = current()
        if self.announce is not None:
            from ray.experimental.internal_kv import _internal_kv_put

            # One key per process, not per task: nobody has to clean up after each.
            name = self.announce + _worker.encode()
            _internal_kv_put(name, pickle.dumps(self.key), overwrite=True, namespace=STORE)


_task: _Task | None = None
_kept: OrderedDict[str, bytes] = OrderedDict()


def _content(name: bytes | str) -> bytes:
    """Return a function; a large one is read from Ray's key-value store, once per process."""
    if isinstance(name, bytes):
        return name
    if name not in _kept:
        from ray.experimental.internal_kv import _internal_kv_get

        found = _internal_kv_get(name.encode(), namespace=STORE)
        if found is None:
            message = "the driver that sent the task has closed its session"
            raise RuntimeError(message)
        _kept[name] = found
        if len(_kept) > FUNCTIONS_KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(name)
    return _kept[name]


# -- values and notes ---------------------------------------------------------------------


def write_note(flag: int, nbytes: int, record: bytes) -> Note:
    """Put what the driver wants to know into one string of bytes."""
    worker = _worker.encode()
    return bytes((flag, len(worker))) + nbytes.to_bytes(8, "little") + worker + record


def read_note(note: Note) -> tuple[int, int, str, bytes]:
    """Return flag, size of the value, worker and record."""
    end = 10 + note[1]
    return note[0], int.from_bytes(note[2:10], "little"), note[10:end].decode(), note[end:]


def failure(value: Any) -> bytes | None:
    """Return the record in what stands for the value of a failed task, None for any other value."""
    if type(value) is SimpleNamespace:
        found: bytes | None = value.__dict__.get("penstock_failed")
        return found
    return None


def _mark(record: bytes) -> SimpleNamespace:
    return SimpleNamespace(penstock_failed=record if len(record) <= FAILURE_BYTES else b"")


def _arrived(value: Any) -> Any:
    failed = failure(value)
    return value if failed is None else Failed(failed)


def _departing(value: Any, record: bytes) -> tuple[Any, Any]:
    """Turn what the runtime answers into the two results of the remote function."""
    facts = pickle.loads(record)
    if isinstance(value, Failed):
        flag = UPSTREAM if facts["status"] == "upstream" else FAILED
        return _mark(record), write_note(flag, 0, record)
    problem = too_large(value, *_limit()) if facts["nbytes"] > LARGE_VALUE else None
    if problem is not None:
        _, record = refuse(record, value, problem)
        return _mark(record), write_note(FAILED, 0, record)
    note = write_note(COMPLETED, facts["nbytes"], record)
    if _always_pickles(value):
        return value, note
    letter = _Letter(value, record, note)
    return letter, _Postmark(letter)


def _limit() -> tuple[float, str]:
    """Return how large one value may be, in bytes: the object store of this node, and the disk behind it."""
    import shutil
    import tempfile

    global _capacity
    if _capacity < 0:
        import ray

        here = ray.get_runtime_context().get_node_id()
        nodes = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
        _capacity = nodes[0].get("object_store_memory", 0) if nodes else 0
    return _capacity + shutil.disk_usage(
        tempfile.gettempdir()
    ).free, "Ray's object store with the disk behind it"


_capacity = -1.0
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def _always_pickles(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    return kind.__name__ == "ndarray" and kind.__module__ == "numpy" and not value.dtype.hasobject


class _Letter:
    """A value that may refuse to be pickled; then a failure travels in its place.

    Ray pickles the results one after the other, and an error there would lose the record with the
    logs. So the value is pickled from within Ray's own pickling, once, with large buffers out of
    band, and unpickles to the value itself.
    """

    def __init__(self, value: Any, record: bytes, note: Note) -> None:
        self.value = value
        self.record = record
        self.note = note

    def __reduce_ex__(self, protocol: Any) -> Any:
        try:
            return _Sealed(self.value).__reduce__()
        except Exception as error:
            value, record = refuse(self.record, self.value, error)
            if not isinstance(value, Failed):  # of a chunk the rest can travel
                self.note = write_note(COMPLETED, read_note(self.note)[1], record)
                return _Sealed(value).__reduce__()
            self.note = write_note(FAILED, 0, record)
            return SimpleNamespace, (), _mark(record).__dict__


class _Sealed:
    """A value that is pickled already, its large buffers out of band; it unpickles to the value itself."""

    def __init__(self, value: Any) -> None:
        import ray.cloudpickle

        self.buffers: list[Any] = []
        self.data = ray.cloudpickle.dumps(value, protocol=5, buffer_callback=self.buffers.append)

    def __reduce__(self) -> Any:
        return functools.partial(pickle.loads, buffers=self.buffers), (self.data,)


class _Postmark:
    """The note beside a letter; pickled after it, so it knows what became of the letter."""

    def __init__(self, letter: _Letter) -> None:
        self.letter = letter

    def __reduce__(self) -> Any:
        return bytes, (self.letter.note,)


# -- being stopped ------------------------------------------------------------------------

_wake_reader: socket.socket | None = None
_wake_writer: socket.socket | None = None


def _listen() -> None:
    """Have our handlers in place: user code may have put others there."""
    global _wake_reader, _wake_writer
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not _on_interrupt:
        signal.signal(signal.SIGINT, _on_interrupt)
    if signal.getsignal(signal.SIGURG) is not _on_nudge:
        signal.signal(signal.SIGURG, _on_nudge)
    if _wake_reader is None or _wake_writer is None:
        _wake_reader, _wake_writer = socket.socketpair()
        _wake_writer.setblocking(False)
        threading.Thread(target=_watch, args=(_wake_reader,), name="penstock-watch", daemon=True).start()
    # Python writes the number of a signal here as soon as its flag is set, even if the main
    # thread is in a system call that the flag does not end.
    signal.set_wakeup_fd(_wake_writer.fileno(), warn_on_full_buffer=False)


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    """Ray asks the task of this process to stop (a user's own KeyboardInterrupt takes no signal)."""
    task = _task
    if task is not None:
        task.interrupted = True
        if task.is_over:
            return
        for running in (task.running, current()):
            if running is not None:
                running.cancelled = True
        hop = _newest_hop()
        if hop is not None and hop.ident is not None:  # the stack goes on there; it ends from its top
            import ctypes

            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(hop.ident), ctypes.py_object(Cancelled))
            return
    # The one class that Ray lets through its own waits; outside a task it makes a TaskCancelledError.
    raise KeyboardInterrupt


def _watch(reader: socket.socket) -> None:
    """Help interrupts through to a main thread that is in a system call."""
    while True:
        if signal.SIGINT not in reader.recv(4096):
            continue
        task = _task
        for _ in range(100):
            if task is None or task is not _task or task.interrupted:
                break
            _nudge()
            time.sleep(0.02)  # it may have been on its way into the call


def _nudge() -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGURG)


# -- waiting for other tasks ----------------------------------------------------------------

_lenders: list[Callable[[], list[Any]]] = []
_waiting = False
# A task whose stack goes on in another thread waits in the last one.
_WAITS = {threading.__file__, selectors.__file__, coroutines.__file__}


def lend_slot(unfinished: Callable[[], list[Any]]) -> Callable[[], None]:
    """Give the CPU of this task back while it waits for tasks of its own, whatever it waits in.

    Ray lends the CPU of a task to others while its main thread waits in `ray.wait`. Ours waits for
    a lock, an event loop, or a thread in which the stack goes on. So whenever it is found waiting
    while tasks of its own run, it is nudged out of there, to wait in Ray for a moment, in its
    signal handler.

    Parameters
    ----------
    unfinished : callable
        Returns references of tasks that this one has submitted and that have not ended.

    Returns
    -------
    callable
        Call it when the task submits no more.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            if not _waiting and unfinished() and _task_waits():
                _nudge()

    def end() -> None:
        _lenders.remove(unfinished)
        over.set()
        thread.join()

    _lenders.append(unfinished)
    thread = threading.Thread(target=look, name="penstock-slot", daemon=True)
    thread.start()
    return end


def _task_waits() -> bool:
    """Whether the main thread waits, and whoever it waits for if the stack goes on elsewhere."""
    frames = sys._current_frames()
    hop = _newest_hop()
    threads = [threading.main_thread().ident, hop.ident if hop is not None else None]
    tops = [frames[ident] for ident in threads if ident in frames]
    return all(top.f_code.co_filename in _WAITS for top in tops)


def _newest_hop() -> threading.Thread | None:
    return next((one for one in reversed(threading.enumerate()) if one.name == "penstock-hop"), None)


def _on_nudge(signum: int, frame: FrameType | None) -> None:
    """Wait in Ray for a moment if this task waits for others; else, just leave the system call."""
    global _waiting
    references = list(dict.fromkeys(one for unfinished in list(_lenders) for one in unfinished()))
    if _waiting or not references:
        return
    import ray

    _waiting = True
    try:
        ray.wait(references, num_returns=1, timeout=SLICE, fetch_local=False)
    finally:
        _waiting = False
