"""Dask's half of the worker runtime: what runs inside its scheduler and its workers.

Clusters get this file as source, beside `worker_runtime`; it imports the standard library, dask
and distributed only. With `dask_graph` it is the only place that touches Dask's private surface.

How a record travels
--------------------
`run_one` puts the packed record into the metadata of its task; Dask sends these with the message
that commits the result. The `Tracker` on the scheduler takes them out again and publishes them,
many at a time, under the topic of the session (`topic_of`). A failed task raises `TaskFailure`,
which carries the record. A message is ``{"events": [event, …]}``; it is neither numbered nor
acknowledged, since a client that loses its connection loses all its tasks with it. An event is
``(kind, key, record, nbytes, worker, details)`` with one of the kinds

``ended``
    `record` says how.
``started``
    The user's code begins; only for submissions that ask for it.
``lost``
    The worker died; `details` say what is known.
``upstream``
    Never started: an upstream value failed or was lost.
``orphaned``
    Like "upstream", but that value had been reported as good before.
``broken``
    Dask could not run it; `details` hold its words.
``waiting``
    No worker may run it now.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections import OrderedDict, defaultdict
from mmap import mmap

from dask._task_spec import Task, TaskRef
from distributed import Nanny, get_worker
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.serialize import deserialize

runtime = importlib.import_module(f"{__package__}.worker_runtime")  # has another name when shipped

sys.modules["_penstock_running"].__dict__.setdefault("dask_plugin", __name__)  # for tasks that submit tasks

MARK = "penstock"  # our entry in the metadata of a task
REASON = "penstock: withdrawn"  # why a client's future was cancelled by us
SHORTEST, LONGEST = 0.002, 0.02  # seconds between two messages of one topic
PATIENCE = 0.1  # a nanny says why it ended a worker about when the worker's connection closes


def topic_of(key):
    """Return the topic of the session that owns a key; empty if it is none of ours."""
    if type(key) is tuple and len(key) == 2 and type(key[0]) is str:
        tag = key[0].rpartition("-")[2]
        if len(tag) == 8:
            return f"penstock-{tag}"
    return ""


class TaskFailure(Exception):
    """Raised instead of the user's exception, whose class need not exist elsewhere."""

    def __init__(self, record):
        super().__init__(record)
        self.record = record

    def __str__(self):
        error = pickle.loads(self.record).get("error") or {}
        return f"{error.get('type', 'Error')}: {error.get('message', '')}"

    __repr__ = __str__


# -- on a worker --------------------------------------------------------------------------


def run_one(flags, order, function, arguments, *values):
    """Execute one attempt: the body of every task.

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
    mark = _marks.enter(key, worker.address)
    try:
        if flags >> 1:
            values = values[: -(flags >> 1)]
        announce = None
        if flags & 1:

            def announce():
                event = ("started", key, b"", 0, worker.address, None)
                worker.log_event(topic_of(key), {"events": [event]})

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
        _marks.leave(mark)
    value = values = None
    raise TaskFailure(record)


def ended(_):
    """Stand between two tasks of which one only waits for the other, so that no bytes move."""


class _Sink:
    """A file that forgets."""

    def write(self, data):
        return len(data)


_SAFE = {type(None), bool, int, float, complex, str, bytes, bytearray}


def _unsendable(value):
    """Return the error that sending a value to another process would raise.

    Dask finds out when a consumer asks for it, and then asks again for ever.
    """
    kind = type(value)
    if kind in _SAFE or (kind.__module__ == "numpy" and getattr(value, "dtype", object) != object):
        return None
    try:  # large buffers are neither copied nor kept
        pickle.Pickler(_Sink(), 5, buffer_callback=lambda _: False).dump(value)
    except Exception:
        try:
            runtime.dumps(value)
        except Exception as error:
            return error
    return None


def cancel_keys(wanted, dask_worker):
    """Ask attempts on this worker to stop; answer those whose code is running.

    Parameters
    ----------
    wanted : dict of str to list of tuple
        Keys by address of the worker.
    """
    return runtime.cancel(wanted.get(dask_worker.address, []))


def end_process():
    """End this worker process at once; its nanny starts another."""
    os.kill(os.getpid(), signal.SIGKILL)


def dask_setup(worker):
    """Prepare a worker of a cluster of ours: Ctrl-C is the driver's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class Marks:
    """What runs in this process, written where it survives a SIGKILL.

    A worker that dies takes the knowledge with it which of its tasks had begun. Each worker keeps
    it in a small mapped file; a scheduler on the same host reads the file of a dead worker, so
    that tasks which had not begun go elsewhere without being blamed.
    """

    SLOT, SLOTS = 128, 64

    def __init__(self):
        self._lock = threading.Lock()
        self._map = None
        self._free = []

    def enter(self, key, address):
        """Note that the attempt begins; answer the place of the note."""
        try:
            with self._lock:
                if self._map is None:
                    self._open(address)
                place = self._free.pop()
            text = f"{key[0].rpartition('-')[2]}:{key[1]}".encode()
            start = place * self.SLOT
            self._map[start + 1 : start + 1 + len(text)] = text
            self._map[start] = len(text)
        except Exception:  # no room, no disk: the driver then has to guess
            return None
        return place

    def leave(self, place):
        """Note that the attempt has ended."""
        if place is not None:
            self._map[place * self.SLOT] = 0
            self._free.append(place)

    def _open(self, address):
        path = self.path(os.getpid(), address)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        _sweep(os.path.dirname(path))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.truncate(descriptor, self.SLOT * self.SLOTS)
            self._map = mmap(descriptor, self.SLOT * self.SLOTS)
        finally:
            os.close(descriptor)
        self._free = list(range(self.SLOTS))[::-1]

    @staticmethod
    def path(pid, address):
        """Return the file of a worker."""
        name = "".join(letter if letter.isalnum() else "_" for letter in address)
        return os.path.join(tempfile.gettempdir(), f"penstock-{os.getuid()}", f"{pid}-{name}")

    @classmethod
    def read(cls, pid, address):
        """Return ``{"<tag>:<number>", …}`` of a dead worker, None if nobody knows; once."""
        path = cls.path(pid, address)
        try:
            if os.stat(path).st_uid != os.getuid():
                return None
            with open(path, "rb") as file:
                data = file.read()
            os.unlink(path)
        except OSError:
            return None
        found = set()
        for start in range(0, len(data), cls.SLOT):
            length = data[start]
            if length:
                found.add(data[start + 1 : start + 1 + length].decode())
        return found


def _sweep(folder):
    """Remove the files of processes that are gone."""
    for name in os.listdir(folder):
        pid = name.partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            os.unlink(os.path.join(folder, name))
        except (ValueError, OSError):
            continue


_marks = Marks()


# -- a batch of tasks ---------------------------------------------------------------------


def marker_of(name, key):
    """Return the key of the task that stands between `key` and what waits for it in a batch."""
    return ("penstock-after", name, key)


class Batch:
    """What the driver sends: columns of bytes that become tasks on the scheduler.

    Stands where Dask expects an expression: it asks for a graph and for annotations.

    Parameters
    ----------
    name : str
        Unique in the cluster.
    keys, flags, orders, functions, arguments : list
        One entry for each task.
    uses, waits : list of tuple, or None
        Keys of upstream values, and of tasks that have to end first; None if there are none.
    annotations : dict
        Of Dask: name → {key: value}.
    """

    def __init__(self, *columns):
        self.columns = columns

    def __reduce__(self):
        return Batch, self.columns

    def __dask_graph__(self):
        name, keys, flags, orders, functions, arguments, uses, waits, _ = self.columns
        graph = {}
        for number, key in enumerate(keys):
            upstream = [TaskRef(one) for one in uses[number]] if uses else []
            for one in waits[number] if waits else ():
                marker = marker_of(name, one)
                graph[marker] = Task(marker, ended, TaskRef(one))
                upstream.append(TaskRef(marker))
            payload = (flags[number], orders[number], functions[number], arguments[number])
            graph[key] = Task(key, run_one, *payload, *upstream)
        return graph

    def __dask_annotations__(self):
        return self.columns[-1]

    def order(self):
        """Return a place for each key of the graph; Dask fails on a key that has none."""
        name, keys, waits = self.columns[0], self.columns[1], self.columns[7]
        places = {key: number for number, key in enumerate(keys)}
        for number, some in enumerate(waits or ()):
            places.update((marker_of(name, one), number) for one in some)
        return places


# -- on the scheduler ---------------------------------------------------------------------


class Tracker(SchedulerPlugin):
    """Tells sessions how their tasks end, and takes tasks off dead workers.

    Parameters
    ----------
    name : str
        Of the plugin; holds the version of this file.
    scheduler : distributed.Scheduler
        Where it is.
    """

    def __init__(self, name, scheduler):
        self.name = name
        self.scheduler = scheduler
        self.users = set()  # clients; the plugin leaves with the last
        self._events = defaultdict(list)
        self._pause = SHORTEST
        self._flush_due = False
        self._displaced = ("", [])  # stimulus, and the keys that it took off a worker
        self._blamed = {}  # key → times that a worker died under it
        self._doomed = {}  # worker → resident bytes when its nanny ended it
        self._restarting = set()
        self._workers = {address: _known(state) for address, state in scheduler.workers.items()}

    # -- hooks of Dask: each is called for everybody's tasks and must not raise -------------
    def transition(self, key, start, finish, *args, stimulus_id="", **details):
        """Look at a task that changes its state."""
        try:
            if finish == "memory":
                if start == "processing" and MARK in (details.get("metadata") or ()):
                    self._completed(key, details)
            elif finish == "erred":
                topic = topic_of(key)
                if topic:
                    self._erred(topic, key, stimulus_id, details)
            elif start == "processing":
                if topic_of(key):
                    self._displace(key, stimulus_id, given_up=False)
            elif finish == "no-worker":
                topic = topic_of(key)
                if topic:
                    self._add(topic, ("waiting", key, b"", 0, "", None))
            elif finish == "forgotten":
                self._blamed.pop(key, None)
        except Exception:  # a guest does not break the house
            self._add(topic_of(key), ("broken", key, b"", 0, "", {"error": "the tracker failed"}))

    def add_worker(self, scheduler, worker):
        """Remember what identifies a worker, for the day it dies."""
        self._workers[worker] = _known(scheduler.workers[worker])

    def remove_worker(self, scheduler, worker, *, stimulus_id="", **details):
        """Decide what becomes of the tasks that a worker took along.

        Runs before anything that Dask has decided leaves the scheduler, so that a task dropped
        here is not started elsewhere.
        """
        stimulus, displaced = self._displaced
        self._displaced = ("", [])
        known = self._workers.pop(worker, {"worker": worker, "pid": 0, "limit": 0})
        known["silent"] = "ttl" in stimulus_id  # the process may live, but does not answer
        marked = Marks.read(known["pid"], worker)
        restarted = worker in self._restarting
        self._restarting.discard(worker)
        lost = {}
        for key, given_up in displaced if stimulus == stimulus_id else ():
            task = scheduler.tasks.get(key)
            if task is None or task.suspicious <= self._blamed.get(key, 0):
                continue  # retired in good order: Dask moves the task
            self._blamed[key] = task.suspicious
            began = None if marked is None else f"{key[0].rpartition('-')[2]}:{key[1]}" in marked
            if given_up or not (restarted or began is False):
                lost[key] = began
        if lost:
            self.drop([key for key in lost if scheduler.tasks[key].state != "erred"])
            scheduler.loop.call_later(PATIENCE, self._announce_loss, lost, known)

    def log_event(self, topic, msg):
        """Hear of workers that use too much memory."""
        if topic == "worker-restart-memory" and isinstance(msg, dict):
            self._doomed[msg.get("worker")] = msg.get("rss", 0)

    def remove_client(self, scheduler, client):
        """Leave with the last of our clients."""
        self.forget(client)

    def restart(self, scheduler):
        """Everything is forgotten, by somebody's wish."""
        self._blamed.clear()

    # -- what the hooks do ------------------------------------------------------------------
    def _completed(self, key, details):
        task = self.scheduler.tasks[key]
        record = task.metadata.get(MARK)
        task.metadata[MARK] = True  # kept: if the value is lost and made again, that is the second time
        if type(record) is bytes:
            self._blamed.pop(key, None)
            worker, nbytes = details.get("worker") or "", details.get("nbytes") or 0
            self._add(topic_of(key), ("ended", key, record, nbytes, worker, None))

    def _displace(self, key, stimulus_id, *, given_up):
        if self._displaced[0] != stimulus_id:
            self._displaced = (stimulus_id, [])
        self._displaced[1].append((key, given_up))

    def _erred(self, topic, key, stimulus_id, details):
        exception, worker = details.get("exception"), details.get("worker") or ""
        if exception is None:
            task = self.scheduler.tasks.get(key)
            blamed = task and task.exception_blame
            again = bool(blamed and (blamed.metadata or {}).get(MARK))
            self._add(topic, ("orphaned" if again else "upstream", key, b"", 0, worker, None))
            return
        try:
            error = exception if isinstance(exception, bytes) else deserialize(exception.header, exception.frames)
            if isinstance(error, bytes):
                error = pickle.loads(error)
        except Exception:
            error = details.get("exception_text") or "an error that cannot be read"
        if isinstance(error, TaskFailure):
            self._add(topic, ("ended", key, error.record, 0, worker, None))
        elif type(error).__name__ == "KilledWorker":
            self._displace(key, stimulus_id, given_up=True)  # more deaths than the cluster allows
        else:
            text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
            self._add(topic, ("broken", key, b"", 0, worker, {"error": text[:2000]}))

    def _announce_loss(self, lost, known):
        known["rss"] = self._doomed.pop(known["worker"], 0)
        for key, began in lost.items():
            details = {**known, "began": began, "shared": len(lost) - 1}
            self._add(topic_of(key), ("lost", key, b"", 0, known["worker"], details))

    def drop(self, keys):
        """Take tasks and all that waits for them back from their clients.

        Parameters
        ----------
        keys : iterable of tuple
            Not finished. What depends on them is reported, they themselves are not.
        """
        tasks = self.scheduler.tasks
        roots = {tasks[key] for key in keys if key in tasks}
        found, pending = set(roots), list(roots)
        while pending:
            task = pending.pop()
            again = bool((task.metadata or {}).get(MARK))
            for dependant in list(task.dependents):
                if dependant in found or dependant.state in {"memory", "erred", "forgotten"}:
                    continue
                found.add(dependant)
                pending.append(dependant)
                topic = topic_of(dependant.key)
                if topic:
                    self._add(topic, ("orphaned" if again else "upstream", dependant.key, b"", 0, "", None))
        clients = defaultdict(list)
        for task in found:
            for client in task.who_wants or ():
                clients[client.client_key].append(task.key)
        for client, wanted in clients.items():
            self.scheduler.report({"op": "cancelled-keys", "keys": wanted, "reason": REASON}, client=client)
            self.scheduler.client_releases_keys(keys=wanted, client=client)

    # -- messages ---------------------------------------------------------------------------
    def _add(self, topic, event):
        self._events[topic].append(event)
        if not self._flush_due:
            self._flush_due = True
            self.scheduler.loop.call_later(self._pause, self._flush)

    def _flush(self):
        """Send what has gathered; wait the longer for the next time the more there was."""
        self._flush_due = False
        events, self._events = self._events, defaultdict(list)
        most = max(map(len, events.values()), default=0)
        self._pause = min(LONGEST, self._pause * 2) if most > 16 else SHORTEST
        for topic, batch in events.items():
            self.scheduler.log_event(topic, {"events": batch})
            self._tidy(topic)

    def _tidy(self, topic):
        """Dask keeps the last thousand messages of a topic; ours are large and never read again."""
        try:
            broker = self.scheduler._broker
            broker.truncate(topic)
            if not broker._topics[topic].subscribers:
                broker._topics.pop(topic)
        except (AttributeError, KeyError):
            pass

    def forget(self, client):
        """Count one client less; the last one takes the plugin and the uploaded files along."""
        self.users.discard(client)
        if not self.users and self.scheduler.plugins.get(self.name) is self:
            self.scheduler.remove_plugin(name=self.name)
            for name in (f"{self.name}-files", f"{self.name}-scheduler-files"):
                if name in self.scheduler.plugins:
                    self.scheduler.remove_plugin(name=name)
                if name in self.scheduler.worker_plugins:
                    self.scheduler.loop.add_callback(self.scheduler.unregister_worker_plugin, None, name)


def _known(state):
    return {"worker": state.address, "pid": state.pid, "limit": state.memory_limit or 0}


# -- what a client asks the scheduler -------------------------------------------------------


def join(name, client, dask_scheduler):
    """Install the tracker if it is not, and count a client as its user."""
    tracker = dask_scheduler.plugins.get(name)
    if tracker is None:
        tracker = Tracker(name, dask_scheduler)
        dask_scheduler.add_plugin(tracker, name=name)
    tracker.users.add(client)
    return summary(dask_scheduler)


def leave(name, client, dask_scheduler):
    """Count a client less."""
    tracker = dask_scheduler.plugins.get(name)
    if tracker is not None:
        tracker.forget(client)


def summary(dask_scheduler):
    """Return what a driver wants to know of a cluster."""
    workers = list(dask_scheduler.workers.values())
    return {
        "workers": len(workers),
        "threads": sum(state.nthreads for state in workers),
        "memory": sum(state.memory_limit or 0 for state in workers),
        "addresses": [state.address for state in workers[:100]],
        "dashboard": importlib.util.find_spec("bokeh") is not None,
    }


def unknown(keys, dask_scheduler):
    """Return those of the keys that the scheduler does not know."""
    return [key for key in keys if key not in dask_scheduler.tasks]


def stop(name, keys, dask_scheduler):
    """Withdraw tasks that no worker has been given.

    Returns
    -------
    tuple of (list, dict)
        Keys that will not run, and keys on workers: address → list.
    """
    idle, placed = [], defaultdict(list)
    for key in keys:
        task = dask_scheduler.tasks.get(key)
        if task is not None and task.state == "processing":
            placed[task.processing_on.address].append(key)
        elif task is None or task.state not in {"memory", "erred"}:
            idle.append(key)
    dask_scheduler.plugins[name].drop(idle)
    return idle, dict(placed)


def withdraw(name, keys, dask_scheduler):
    """Withdraw tasks wherever they are."""
    dask_scheduler.plugins[name].drop([key for key in keys if key in dask_scheduler.tasks])


def condemn(name, workers, dask_scheduler):
    """Answer which workers may be ended since a nanny replaces them; their tasks go elsewhere."""
    found = [address for address in workers if getattr(dask_scheduler.workers.get(address), "nanny", None)]
    dask_scheduler.plugins[name]._restarting.update(found)
    return found


def alive(workers, dask_scheduler):
    """Return those of the workers that the scheduler still knows."""
    return [address for address in workers if address in dask_scheduler.workers]


# -- in the driver, for clusters that it starts ------------------------------------------------


class LocalNanny(Nanny):
    """Watches a worker process of a cluster of ours and remembers how it ended."""

    ends = OrderedDict()  # process id → exit code, negative for a signal
    started = OrderedDict()  # process id → True
    worker_pid = None

    @classmethod
    def known(cls, pid):
        """Whether a process is or was a worker of ours."""
        return pid in cls.started

    async def instantiate(self):
        """Start the worker process without running the user's script in it once more.

        `multiprocessing` imports ``__main__`` again in each child, which costs time and starts
        a flow anew if the script has no guard. Tasks do not need it: they travel by value.
        """
        main = sys.modules["__main__"]
        kept = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        try:
            status = await super().instantiate()
        finally:
            main.__dict__.update(kept)
        self.worker_pid = self.pid
        self.ends.pop(self.pid, None)  # an earlier process with the same number
        self._note(self.started, True)
        return status

    def _on_worker_exit_sync(self, exitcode):
        self._note(self.ends, exitcode)
        super()._on_worker_exit_sync(exitcode)

    def _note(self, table, value):
        table[self.worker_pid] = value
        while len(table) > 1000:
            table.popitem(last=False)
