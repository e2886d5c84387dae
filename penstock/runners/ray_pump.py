"""The thread that hears from Ray how tasks ended, and turns it into reports."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import ObjectRefGenerator, exceptions
from ray.experimental import internal_kv

from penstock import errors
from penstock.runners import ray_tasks
from penstock.runners.base import Key, Ref, Report
from penstock.runners.ray_errors import first_words, is_propagated, neutral, never_ran
from penstock.runners.ray_nodes import cluster_size, how_died
from penstock.runners.worker.failure import Failed
from penstock.runners.worker.starts import find_start

if TYPE_CHECKING:
    from penstock.runners.ray_queue import Queue

FEW = 64  # tasks in flight, for whose end we wait in Ray itself
WINDOW, SLICE = 512, 1_000  # notes in one question to Ray: it takes time by their number
LOOK_SECONDS = 0.01  # a new task is not in the question that is being asked
LIVELY_SECONDS = 0.002  # the same while tasks come and go
GATHER_SECONDS = 0.05
STARTS_SECONDS = 0.1
MEASURE_SECONDS = 5.0
CANCELS = 200  # in one callback, during which Ray hears of nothing else
CALLBACK_SECONDS = 5.0
PART = 512  # tasks that the thread sends, until it listens again
YIELDS = 200  # taken from one generator before others are looked at

log = logging.getLogger("penstock.runners.ray")

# Without the wrapper that starts a new Ray in any call that finds none: here, it has been closed.
_wait, _get, _cancel = (getattr(call, "__wrapped__", call) for call in (ray.wait, ray.get, ray.cancel))


@dataclass(slots=True, eq=False)
class Handle:
    """A value in Ray's hands.

    Attributes
    ----------
    key : Key
        The attempt that makes it.
    value : ObjectRef
        Ray's own reference; None once it was released.
    note : ObjectRef, ObjectRefGenerator or None
        The record beside it; None for a value that was put, and once the task has completed. Of a
        generator whose items come one by one the stream of them, as long as it goes on.
    """

    key: Key
    value: Any
    note: Any


@dataclass(slots=True, eq=False)
class Flight:
    """A task from `send` to its end.

    Attributes
    ----------
    handle : Handle
        What the engine holds.
    value, note : ObjectRef
        Held here too: an error that nobody looked at is printed by Ray when its reference goes. Of a
        stream the note is the stream itself, and the value stands for its end until that has come.
    upstream : tuple of Handle
        The values it depends on.
    announce : bool
        The engine waits for the news that it has started.
    kind : object
        By what the queue counts it.
    asked : bool
        It was asked to stop.
    worker : str
        Who runs it, if that was announced.
    claimed, dropped : bool
        Somebody cancels it and will answer for it, if it never ran; it never ran.
    items : int
        How many have come from a stream.
    unread : ObjectRef or None
        What a stream gave last, if the note on it has not come yet.
    """

    handle: Handle
    value: Any
    note: Any
    upstream: tuple[Handle, ...]
    announce: bool
    kind: Any
    asked: bool = False
    worker: str = ""
    claimed: bool = False
    dropped: bool = False
    items: int = 0
    unread: Any = None

    @property
    def end(self) -> Any:
        """What is there when the task has ended."""
        return self.note.completed() if isinstance(self.note, ObjectRefGenerator) else self.note


class Pump:
    """Waits for notes in a thread of its own and delivers reports in batches.

    Parameters
    ----------
    deliver : callable
        Takes a list of `Report`.
    starts : bytes
        Prefix of the keys under which workers say what they have begun.
    queue : Queue
        Hears of what has ended.
    go_on : callable
        Starts what waits in the queue, as far as there is room, at most a number of tasks.
    """

    def __init__(
        self,
        deliver: Callable[[list[Report]], None],
        starts: bytes,
        queue: Queue,
        go_on: Callable[[int], None],
    ) -> None:
        self.has_announced = False
        self._deliver = deliver
        self._starts = starts
        self._queue = queue
        self._go_on = go_on
        self._untold: list[Report] = []
        self._flying: dict[Any, Flight] = {}  # by note, oldest first
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._unstarted: dict[Key, Flight] = {}
        self._looked = self._moved = 0.0
        self._measured = time.monotonic()
        self._slices: list[list[Any]] = []
        self._token = ray.put(None)
        self._thread = threading.Thread(target=self._run, name="penstock-ray-pump", daemon=True)

    # -- for the runner -------------------------------------------------------------------
    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> list[Flight]:
        """End the thread; return what is still in flight."""
        self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
        with self._lock:
            left = list(self._flying.values())
            self._flying.clear()
        return left

    def add(self, flights: Sequence[Flight]) -> None:
        """Wait for these, too."""
        if not flights:
            return
        with self._lock:
            self._flying.update((flight.note, flight) for flight in flights)
            announced = {flight.handle.key: flight for flight in flights if flight.announce}
            self._unstarted.update(announced)
        if announced:
            self.has_announced = True
        self._moved = time.monotonic()
        self._wake.set()

    def tell(self, reports: Sequence[Report]) -> None:
        """Deliver reports on what Ray never knew of, from the thread."""
        if reports:
            self._untold.extend(reports)
            self._wake.set()

    def find(self, notes: Iterable[Any], *, claim: bool = False) -> list[Flight]:
        """Return the tasks behind notes that have not ended; claimed ones go to `settle`."""
        with self._lock:
            found = [flight for note in notes if (flight := self._flying.get(note)) is not None]
            for flight in found:
                flight.claimed = flight.claimed or claim
        return found

    def cancel(self, flights: Sequence[Flight], *, force: bool = False) -> None:
        """Ask Ray to stop tasks, from that thread of Ray which hears how tasks end.

        From any other thread a cancel may strike between two steps of Ray that belong together, and
        Ray then aborts this process: "Tried to complete task that was not pending" (Ray 2.60, seen
        within seconds; ray-project/ray#54798 mended another case). Callbacks run in that thread.
        """
        waiting = []
        for at in range(0, len(flights), CANCELS):
            done = threading.Event()
            part = flights[at : at + CANCELS]

            def stop(_: Any, part: Sequence[Flight] = part, done: threading.Event = done) -> None:
                try:
                    for flight in part:
                        _cancel(flight.note, force=force, recursive=False)
                except Exception as error:  # Ray is about to close
                    log.debug("Ray cannot cancel: %r", error)
                finally:
                    done.set()

            for flight in part:
                flight.asked = True
            if ray.util.client.ray.is_connected():  # the tasks belong to another process
                stop(None)
            else:
                self._token._on_completed(stop)
            waiting.append(done)
        for done in waiting:
            done.wait(CALLBACK_SECONDS)

    def settle(self, flights: Sequence[Flight], ended: Sequence[Any]) -> list[Key]:
        """Return the keys of claimed tasks that never ran; the others are reported as usual."""
        by_end = {flight.end: flight for flight in flights}
        for end, answer in zip(ended, _read(ended), strict=True):
            if never_ran(answer):
                with self._lock:
                    flight = self._flying.pop(by_end[end].note, None)
                if flight is not None:  # else the thread was faster
                    flight.dropped = True
                    self._queue.ended(flight)
        with self._lock:
            for flight in flights:
                flight.claimed = False
            dropped = [flight for flight in flights if flight.dropped]
        for flight in dropped:
            self._unstarted.pop(flight.handle.key, None)
        _look_at(dropped)
        return [flight.handle.key for flight in dropped]

    def unfinished(self) -> list[Any]:
        """Return some notes of tasks that have not ended.

        Called from a signal handler, so it must not take the lock; no other thread gets between
        the steps of such a list.
        """
        return list(itertools.islice(self._flying, 100))

    # -- the thread -----------------------------------------------------------------------
    def _run(self) -> None:
        while not self._closing:
            if not self._flying and not self._untold:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                ready = self._ready()
                reports = self._started() if self._unstarted else []
                while self._untold:
                    reports.append(self._untold.pop())
                reports.extend(self._ended(ready))
                if self._queue:
                    self._measure()
                    self._go_on(PART)
            except Exception as error:  # Ray is gone; user errors do not come this way
                if self._closing:
                    return
                reports = self._all_lost(error)
            if reports and not self._closing:
                try:
                    self._deliver(reports)
                except Exception:  # a listener's fault must not end the thread for all others
                    log.exception("reports could not be delivered")

    def _measure(self) -> None:
        """Tell the queue how large the cluster is: nodes come and go."""
        if time.monotonic() - self._measured >= MEASURE_SECONDS:
            self._measured = time.monotonic()
            with contextlib.suppress(Exception):  # the head may be busy: ask again later
                self._queue.resize(*cluster_size())

    def _ready(self) -> list[Any]:
        """Wait a little for notes; return those that are there."""
        with self._lock:
            window = list(itertools.islice(self._flying, WINDOW))
            count = len(self._flying)
        if not window:
            return []
        found: list[Any]
        if count <= FEW:
            patience = LIVELY_SECONDS if time.monotonic() - self._moved < 0.1 else LOOK_SECONDS
            found, _ = _wait(window, num_returns=1, timeout=patience, fetch_local=False)
            if found and count > 1:
                found, _ = _wait(window, num_returns=count, timeout=0, fetch_local=False)
            return found
        # A question costs as much as some tasks: ask seldom, for many at a time.
        time.sleep(min(GATHER_SECONDS, count / 20_000))
        found, _ = _wait(window, num_returns=len(window), timeout=0, fetch_local=False)
        if count > WINDOW:
            found.extend(self._ready_behind(set(found)))
        return found

    def _ready_behind(self, known: set[Any]) -> list[Any]:
        """Look at another slice of the tasks behind the window, in turn."""
        if not self._slices:
            with self._lock:
                behind = list(itertools.islice(self._flying, WINDOW, None))
            self._slices = [behind[at : at + SLICE] for at in range(0, len(behind), SLICE)]
        looked: list[Any] = []
        while self._slices and not looked:
            looked = [note for note in self._slices.pop() if note in self._flying and note not in known]
        if not looked:
            return []
        found: list[Any]
        found, _ = _wait(looked, num_returns=len(looked), timeout=0, fetch_local=False)
        return found

    def _ended(self, ready: Sequence[Any]) -> list[Report]:
        reports: list[Report] = []
        silent: list[Flight] = []
        notes = [one for one in ready if not isinstance(one, ObjectRefGenerator)]
        answers = list(zip(notes, _read(notes), strict=True))
        if len(notes) < len(ready):
            for stream in (one for one in ready if isinstance(one, ObjectRefGenerator)):
                answers.extend((stream, answer) for answer in self._drawn(stream, reports))
        for note, answer in answers:
            with self._lock:
                flight = self._flying.pop(note, None)
                if flight is None:
                    continue
                self._queue.ended(flight, _size_in(answer))
                if flight.claimed and never_ran(answer):
                    flight.dropped = True  # `settle` answers for it
                    continue
            self._unstarted.pop(flight.handle.key, None)
            if isinstance(answer, bytes):
                reports.append(_written(flight, answer))
            else:
                silent.append(flight)
                reports.extend(_unwritten(flight, answer))
        _look_at(silent)
        return reports

    def _drawn(self, stream: Any, reports: list[Report]) -> list[Any]:
        """Take what a generator has yielded and report it; return what it said in the end, if it has ended."""
        flight = self._flying.get(stream)
        if flight is None:  # a cancel was faster
            return []
        for _ in range(YIELDS):
            there, _ = _wait([stream], num_returns=1, timeout=0, fetch_local=False)
            if not there:
                break
            reference = next(stream, None)
            if reference is None or reference == stream.completed():  # it has broken off
                return _read([stream.completed()])
            if flight.unread is None:
                flight.unread = reference
                continue
            value, flight.unread = flight.unread, None
            [note] = _read([reference])
            if not isinstance(note, bytes):
                return [note]
            if note[0] != ray_tasks.ITEM:
                flight.value = value
                if flight.handle.value is not None:  # else it was released meanwhile
                    flight.handle.value, flight.handle.note = value, reference
                return [note]
            reports.append(_yielded(flight, value, note))
        return []

    def _started(self) -> list[Report]:
        """Ask which tasks have begun; each worker process has one key for its present task."""
        if time.monotonic() - self._looked < STARTS_SECONDS:
            return []
        self._looked = time.monotonic()
        reports = []
        try:
            names = internal_kv._internal_kv_list(self._starts, namespace=ray_tasks.STORE)
            values = [internal_kv._internal_kv_get(name, namespace=ray_tasks.STORE) for name in names]
        except Exception as error:  # the head may be busy: ask again later
            log.debug("Ray's head does not answer: %r", error)
            return []
        for name, value in zip(names, values, strict=True):
            key = pickle.loads(value or _NOTHING)
            flight = self._unstarted.pop(key, None)
            if flight is not None:
                flight.worker = name.removeprefix(self._starts).decode()
                reports.append(Report(key, "started", worker=flight.worker))
        return reports

    def _all_lost(self, error: Exception) -> list[Report]:
        with self._lock:
            left = list(self._flying.values())
            self._flying.clear()
        cause = errors.SchedulerLost(f"Ray no longer answers: {first_words(error)}")
        cause.final = True  # the driver's own process is a part of Ray: there is no way back
        handles = [flight.handle for flight in left] + [held.handle for held in self._queue.clear()]
        return [Report(handle.key, "lost", cause=cause) for handle in handles]


_NOTHING = pickle.dumps(None)


def _read(references: Sequence[Any]) -> list[Any]:
    """Return the contents of notes that are there; an error of Ray stands for itself."""
    if not references:
        return []
    found: list[Any]
    try:
        found = _get(list(references))
    except exceptions.RayError:
        pass
    else:
        return found
    try:  # private, and ten times faster than an exception for each
        found, _ = ray._private.worker.global_worker.get_objects(list(references), return_exceptions=True)
    except Exception:
        found = []
        for reference in references:
            try:
                found.append(_get(reference))
            except exceptions.RayError as error:
                found.append(error)
    return found


def _size_in(answer: Any) -> int:
    """Return the size of the value that a note is about, -1 if there is none."""
    if not isinstance(answer, bytes) or answer[0] != ray_tasks.COMPLETED:
        return -1
    return ray_tasks.read_note(answer)[1]


def _look_at(flights: Sequence[Flight]) -> None:
    """Look at the errors in place of values, or Ray prints them as some that nobody handled."""
    with contextlib.suppress(Exception):
        _read([flight.value for flight in flights])


def _yielded(flight: Flight, value: Any, note: bytes) -> Report:
    """Say where an item of a generator lies."""
    _, nbytes, worker, _ = ray_tasks.read_note(note)
    key, number = flight.handle.key, flight.items
    flight.items += 1
    name: Key = (f"{key[0]}-{key[1]}-items", number)
    item = Ref(name, Handle(name, value, None), nbytes, worker)
    return Report(key, "item", nbytes=nbytes, worker=worker, number=number, ref=item)


def _written(flight: Flight, note: bytes) -> Report:
    flag, nbytes, worker, record = ray_tasks.read_note(note)
    key = flight.handle.key
    if flag == ray_tasks.COMPLETED:
        flight.handle.note = None  # nobody has to wait for it any more
    if flag == ray_tasks.UPSTREAM:
        return Report(key, "upstream")
    return Report(key, "ended", record, nbytes=nbytes, worker=worker)


# -- tasks that left no note --------------------------------------------------------------


def _unwritten(flight: Flight, error: Any) -> list[Report]:
    """Say what became of a task that left no note."""
    key = flight.handle.key
    if not is_propagated(error):
        return [Report(key, "lost", cause=_located(neutral(error), key), worker=flight.worker)]
    if isinstance(error.cause, exceptions.ObjectLostError):
        # The engine believes that the value is there: both have to be told.
        cause = neutral(error.cause)
        gone = [one for one in flight.upstream if _is_about(error.cause, one)]
        reports = [Report(one.key, "gone", cause=cause) for one in gone]
        return [*reports, Report(key, "lost", cause=cause)]
    if isinstance(error.cause, exceptions.TaskCancelledError) and (
        flight.asked or not any(_is_broken(one) for one in flight.upstream)
    ):  # a request to stop struck while its worker was making ready for it, or right after its end
        return [Report(key, "lost", cause=neutral(error.cause), worker=flight.worker)]
    if isinstance(error.cause, exceptions.RayError) or any(_is_broken(one) for one in flight.upstream):
        return [Report(key, "upstream")]
    message = f"the task could not be set up on its worker: {first_words(error.cause)}"
    return [Report(key, "lost", cause=errors.WorkerLost(message))]


def _located(cause: errors.RunError, key: Key) -> errors.RunError:
    """Name the process that has died, if it was one of this host: Ray does not."""
    if not isinstance(cause, (errors.WorkerLost, errors.OutOfMemory)):
        return cause
    found = find_start(key)
    if found is None:
        return cause
    name = key[0].rpartition("-")[0]
    if isinstance(cause, errors.OutOfMemory):
        located: errors.CrashedRun = errors.OutOfMemory(
            f"worker pid {found[0]}, while running {name!r}: {cause}"
        )
    else:
        located = errors.WorkerLost(f"worker pid {found[0]} {how_died(found[0])} while running {name!r}")
    located.began, located.element, located.called = True, found[1], found[2]
    return located


def _is_about(error: Any, handle: Handle) -> bool:
    value = handle.value
    return value is not None and value.hex() == getattr(error, "object_ref_hex", "")


def _is_broken(handle: Handle) -> bool:
    if handle.note is None:
        return False
    try:
        _get(handle.note, timeout=0)
    except exceptions.GetTimeoutError:
        return False
    except exceptions.RayError:
        return True
    return False


def arrived(value: Any) -> Any:
    """Turn what stands for the value of a failed task into `Failed`."""
    record = ray_tasks.failure(value)
    return value if record is None else Failed(record)


def missing(handle: Handle) -> bool:
    """Whether a value that existed is lost; brings it here to find out."""
    if handle.value is None:
        return True
    try:
        _get(handle.value, timeout=5.0)
    except exceptions.GetTimeoutError:
        return False
    except exceptions.ObjectLostError:
        return True
    except exceptions.RayError:
        return False
    return False
