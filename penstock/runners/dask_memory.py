"""Results that the worker processes of one host share: one copy in memory, mapped by all.

Dask moves a value from process to process by TCP, and each keeps a copy of its own. Here the first
request of another process makes the worker write the buffers of a large value to a file in shared
memory, and only a `Handle` travels; whoever comes next maps the same file. The worker that made the
value gives its own copy up for the mapping, and a worker that mapped it can pass it on.

How a value is handed over
--------------------------
The worker that is asked for a value of ours (`get_data`)

1. asks the other worker, once, to read a small file: only one that shares its memory can;
2. writes the value to a file, unless that was done;
3. has the other worker map it. There the file gets a second name, so that neither worker depends
   on the life of the other. The answer is a ticket;
4. answers the request with a `Handle` that holds the ticket: unpickling it finds the mapped value.

Whatever goes wrong in these steps, the value itself is sent, as Dask does.

A mapping is private to its process: a page that is written to becomes a copy, so that values behave
as those that came by TCP. The name of a file goes with the last use of its mapping, be it because
the value was released or because it was spilled to disk.

Clusters get this file as source, like `dask_plugin`. Of Dask's private surface it uses the table of
handlers of a worker and what `get_data` writes; where these are not as expected nothing is shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import uuid
from typing import Any

from distributed import get_worker
from distributed.diagnostics.plugin import WorkerPlugin

from . import shared_memory  # relative: the package around has another name when shipped

OFF = "penstock_memory"  # annotation of tasks whose results stay out of it
PATIENCE = 20.0  # seconds for a peer to answer, until the value goes by TCP
FORGIVE = 10.0  # seconds until a peer that did not answer is asked again
PENDING = 60.0  # seconds that a mapped value waits for the handle that fetches it
LINGER = 2.0  # seconds that a mapping of a placed value outlives its last use
REMARK = "remark"  # kind of an event: the user is told, once

_PROBE, _TAKE, _SEND = (f"{__name__}:{name}" for name in ("probe", "take", "send"))


class Handle:
    """What travels instead of a value that its receiver has mapped already; unpickles as the value."""

    def __init__(self, ticket: str) -> None:
        self.ticket = ticket

    def __reduce__(self) -> Any:
        return _redeemed, (self.ticket,)


_pending: dict[str, Any] = {}


def _redeemed(ticket: str) -> Any:
    return _pending.pop(ticket)


class Sharing:
    """What one worker shares with the other workers of its host.

    Parameters
    ----------
    worker : distributed.Worker
        Whose requests for data are answered.
    least : int
        Bytes from which a value is shared.
    topic_of : callable
        `dask_plugin.topic_of`.
    """

    def __init__(self, worker: Any, least: int, topic_of: Any) -> None:
        self.retired = False
        self.inner: Any = worker.handlers["get_data"]
        self._outer = self.get_data
        self._worker = worker
        self._least = least
        self._topic_of = topic_of
        self._memory: Any = None
        self._lock = threading.Lock()
        self._files: dict[Any, Any] = {}  # key → packed value, as long as this process has it mapped
        self._exports: dict[Any, asyncio.Task[Any]] = {}
        self._unfit: set[Any] = set()
        self._near: dict[str, tuple[bool, float]] = {}  # address → answer, and until when it counts
        self._told = False

    def install(self) -> None:
        """Begin to share."""
        handlers = self._worker.handlers
        handlers[_PROBE], handlers[_TAKE], handlers[_SEND] = self.probe, self.take, self.send
        handlers["get_data"] = self._outer

    def retire(self) -> None:
        """Leave the worker as it was; values that are mapped stay."""
        self.retired = True
        handlers = self._worker.handlers
        if handlers.get("get_data") is self._outer:
            handler = self.inner
            while getattr(getattr(handler, "__self__", None), "retired", False):  # of another version of us
                handler = handler.__self__.inner
            handlers["get_data"] = handler
        for name in (_PROBE, _TAKE, _SEND):
            handlers.pop(name, None)
        with self._lock:
            memory, self._memory = self._memory, None
        self._files.clear()
        if memory is not None:
            memory.close()

    # -- the worker that is asked for a value -------------------------------------------------
    async def get_data(self, comm: Any, serializers: Any = None, **message: Any) -> Any:
        """Answer like `Worker.get_data`, with handles for what the other worker can map."""
        with contextlib.suppress(Exception):
            who = str(message.get("who"))
            if (
                not self.retired
                and who.startswith(("tcp://", "tls://"))
                and (serializers is None or "pickle" in serializers)
                and any(map(self._is_large, message.get("keys") or ()))
            ):
                comm = _Answering(comm, self, who)
        return await self.inner(comm, serializers=serializers, **message)

    def _is_large(self, key: Any) -> bool:
        if not self._topic_of(key) or key in self._unfit:
            return False
        task = self._worker.state.tasks.get(key)
        if task is None or (task.nbytes or 0) < self._least:
            return False
        return OFF not in (task.annotations or ())

    async def answer(self, message: Any, who: str) -> Any:
        """Return the answer to a request, with handles in the place of large values."""
        found = {}
        for key, wrapped in message["data"].items():
            if self._is_large(key):
                handle = await self._handle(key, wrapped.data, who)
                if handle is not None:
                    found[key] = type(wrapped)(handle)
        return {**message, "data": {**message["data"], **found}} if found else message

    async def _handle(self, key: Any, value: Any, who: str) -> Handle | None:
        if type(value).__name__ == Handle.__name__ or not await self._is_near(who):
            return None
        shared = await self._shared(key, value)
        if shared is None:
            return None
        # Until the other worker has answered this coroutine holds the mapping, and so the file.
        ticket = await self._ask(who, _TAKE, key=key, packed=shared[0])
        return Handle(ticket) if ticket else None

    async def _is_near(self, who: str) -> bool:
        """Whether another worker sees the memory of this one."""
        known, until = self._near.get(who, (False, 0.0))
        if time.monotonic() < until:
            return known
        path, text = await asyncio.to_thread(lambda: self._own_memory().proof())
        answer = await self._ask(who, _PROBE, path=path)
        near = bool(answer == text)
        self._near[who] = near, time.monotonic() + (3600.0 if near or answer == "" else FORGIVE)
        return near

    async def _ask(self, who: str, operation: str, **arguments: Any) -> Any:
        try:
            call = getattr(self._worker.rpc(who), operation)(**arguments)
            return await asyncio.wait_for(call, PATIENCE)
        except Exception:
            self._near.pop(who, None)
            return None

    async def _shared(self, key: Any, value: Any) -> Any:
        """Return the packed form of a value and the mapped value; several may ask at a time."""
        packed = self._files.get(key)
        if packed is not None:
            return packed, value
        task = self._exports.get(key)
        if task is None:
            task = self._exports[key] = asyncio.ensure_future(self._export(key, value))
            task.add_done_callback(lambda _: self._exports.pop(key, None))
        return await asyncio.shield(task)

    async def _export(self, key: Any, value: Any) -> Any:
        try:
            shared = await asyncio.to_thread(self._write, key, value)
        except OSError as error:
            shared = None
            self._tell(key, error)
        if shared is None:
            if len(self._unfit) > 10_000:
                self._unfit.clear()
            self._unfit.add(key)
        else:
            with contextlib.suppress(Exception):
                self._replace(key, value, shared[1])
        return shared

    def _write(self, key: Any, value: Any) -> Any:
        packed = self._own_memory().export_buffers(value, self._least)
        return None if packed is None else (packed, self._load(key, packed))

    def _load(self, key: Any, packed: Any) -> Any:
        """Map a file of ours; its name goes with the mapping."""
        process = os.getpid()

        def ended() -> None:
            shared_memory.remove(packed[1], by=process)
            if self._files.get(key) is packed:
                self._files.pop(key, None)

        self._files[key] = packed
        try:
            return shared_memory.load(packed, private=True, ended=ended)
        except BaseException:
            ended()
            raise

    def _replace(self, key: Any, value: Any, mapped: Any) -> None:
        """Give up the copy of this process, unless it was released or spilled meanwhile."""
        data = self._worker.data
        fast = getattr(data, "memory", data)
        if key in fast and fast[key] is value:
            data[key] = mapped

    def _own_memory(self) -> Any:
        with self._lock:
            if self.retired:
                raise FileNotFoundError("nothing is shared any more")
            if self._memory is None:
                self._memory = shared_memory.SharedMemory.create(shared_memory.memory_roots())
            return self._memory

    def _tell(self, key: Any, error: OSError) -> None:
        if not self._told:
            self._told = True
            text = (
                f"a large result goes by TCP, since shared memory is out of reach: {error.strerror or error}"
            )
            event = (REMARK, key, b"", 0, self._worker.address, {"text": text})
            with contextlib.suppress(Exception):
                self._worker.log_event(self._topic_of(key), {"events": [event]})

    # -- the worker that asked ----------------------------------------------------------------
    async def probe(self, path: str) -> str:
        """Read the small file of another worker."""
        found: str = await asyncio.to_thread(shared_memory.read_proof, path)
        return found

    async def take(self, key: Any, packed: Any) -> str | None:
        """Map a file of another worker; answer the ticket for it."""
        try:
            value = await asyncio.to_thread(self._adopt, key, packed)
        except Exception:  # it is gone, or cannot be unpickled here: the sender knows what to do
            return None
        ticket = uuid.uuid4().hex
        _pending[ticket] = value
        asyncio.get_running_loop().call_later(PENDING, _pending.pop, ticket, None)
        return ticket

    def _adopt(self, key: Any, packed: Any) -> Any:
        return self._load(key, self._own_memory().adopt(packed))

    async def send(self, packed: Any) -> Any:
        """Send a placed value to a worker that does not see it."""
        from distributed.protocol import to_serialize

        return {"value": to_serialize(await asyncio.to_thread(shared_memory.load, packed))}


class _Answering:
    """A connection that passes everything on, and an answer through `Sharing.answer`."""

    def __init__(self, comm: Any, sharing: Sharing, who: str) -> None:
        self._comm = comm
        self._sharing = sharing
        self._who = who

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    async def write(self, message: Any, *args: Any, **options: Any) -> Any:
        with contextlib.suppress(Exception):  # then as Dask does
            message = await self._sharing.answer(message, self._who)
        return await self._comm.write(message, *args, **options)


class Plugin(WorkerPlugin):  # type: ignore[misc]
    """Has a worker share its results, as long as the plugin is there.

    Parameters
    ----------
    least : int
        Bytes from which a value is shared.
    """

    idempotent = True

    def __init__(self, least: int) -> None:
        self.least = least
        self._sharing: Sharing | None = None

    def __reduce__(self) -> Any:
        # A worker that joins is given its plugins all at once, this one and the file with its class.
        code = "exec(source, space) or space['Late'](name, least)"
        return eval, (code, {"source": _LATE, "space": {}, "name": __name__, "least": self.least})

    def setup(self, worker: Any) -> None:
        """Begin to share; first delete what dead workers left behind."""
        from .dask_plugin import topic_of  # which imports this file

        sweep()
        if not shared_memory.memory_roots() or not str(worker.address).startswith(("tcp://", "tls://")):
            return
        with contextlib.suppress(Exception):  # a release of Dask that is not as we know it
            sharing = Sharing(worker, self.least, topic_of)
            sharing.install()
            self._sharing = sharing

    def teardown(self, worker: Any) -> None:
        """Leave the worker as it was."""
        del worker
        sharing, self._sharing = self._sharing, None
        if sharing is not None:
            sharing.retire()
        _placed.clear()


_LATE = """
import asyncio
import importlib
from distributed.diagnostics.plugin import WorkerPlugin

class Late(WorkerPlugin):
    def __init__(self, name, least):
        self.name_of_module, self.least, self.plugin = name, least, None

    async def setup(self, worker):
        for _ in range(200):
            try:
                module = importlib.import_module(self.name_of_module)
            except ImportError:
                await asyncio.sleep(0.05)
            else:
                self.plugin = module.Plugin(self.least)
                self.plugin.setup(worker)
                return

    def teardown(self, worker):
        if self.plugin is not None:
            self.plugin.teardown(worker)
"""


def sweep() -> None:
    """Delete what dead processes left behind, beside what this thread does."""
    threading.Thread(target=shared_memory.sweep_dead_owners, name="penstock-sweep", daemon=True).start()


# -- values that the driver has placed ------------------------------------------------------


class Placed:
    """A value of the driver in shared memory; stands in a graph where its value is wanted.

    Parameters
    ----------
    packed : tuple
        The packed value.
    near : tuple of str
        Addresses of workers that see it.
    """

    def __init__(self, packed: Any, near: tuple[str, ...]) -> None:
        self.packed = packed
        self.near = near

    def __reduce__(self) -> Any:
        return Placed, (self.packed, self.near)


class _Entry:
    """One placed value in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: Any = None
        self.loaded = False
        self.users = 0
        self.idle = 0.0


class _PlacedValues:
    """The placed values that tasks of this process use, or used a moment ago."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._janitor: threading.Thread | None = None

    def get(self, placed: Placed) -> Any:
        """Return the value; each `get` needs a `leave`."""
        with self._lock:
            entry = self._entries.setdefault(placed.packed[1], _Entry())
            entry.users += 1
        with entry.lock:
            if not entry.loaded:
                entry.value, entry.loaded = _load_placed(placed), True
            return entry.value

    def leave(self, placed: Placed) -> None:
        """Note that one task less uses a value."""
        with self._lock:
            entry = self._entries.get(placed.packed[1])
            if entry is None:
                return
            entry.users -= 1
            entry.idle = time.monotonic()
            if self._janitor is None:
                self._janitor = threading.Thread(target=self._tidy, name="penstock-placed", daemon=True)
                self._janitor.start()

    def _tidy(self) -> None:
        while True:
            threading.Event().wait(LINGER / 2)
            gone = []
            with self._lock:
                for path, entry in list(self._entries.items()):
                    if not entry.users and time.monotonic() - entry.idle > LINGER:
                        gone.append(self._entries.pop(path))
                if not self._entries:
                    self._janitor = None
                    return
            gone.clear()  # outside of the lock: this unmaps

    def clear(self) -> None:
        """Forget everything that is not in use."""
        with self._lock:
            self._entries = {path: entry for path, entry in self._entries.items() if entry.users}


_placed = _PlacedValues()


@contextlib.contextmanager
def resolved(values: tuple[Any, ...]) -> Any:
    """Give a task the values that the driver has placed, for as long as the block runs.

    Parameters
    ----------
    values : tuple
        Upstream values, some of them `Placed`.
    """
    placed = [value for value in values if type(value) is Placed]
    if not placed:
        yield values
        return
    taken = []
    try:
        found = []
        for value in values:
            if type(value) is Placed:
                taken.append(value)
                value = _placed.get(value)
            found.append(value)
        yield tuple(found)
    finally:
        for value in taken:
            _placed.leave(value)


def _load_placed(placed: Placed) -> Any:
    try:
        return shared_memory.load(placed.packed, private=True)
    except (shared_memory.Vanished, OSError):
        pass
    worker = get_worker()
    for address in placed.near:  # a worker of another host, which came when the value was placed already
        with contextlib.suppress(Exception):
            call = getattr(worker.rpc(address), _SEND)(packed=placed.packed)
            answer = asyncio.run_coroutine_threadsafe(call, worker.loop.asyncio_loop).result(120.0)
            return answer["value"]
    raise shared_memory.Vanished(f"no worker that can be asked sees {placed.packed[1]}")


def sees(path: str) -> str:
    """Return what is in the driver's small file, for a driver that asks all workers."""
    found: str = shared_memory.read_proof(path)
    return found
