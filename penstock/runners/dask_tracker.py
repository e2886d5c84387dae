"""Our half of a Dask scheduler: tells sessions how their tasks end, and takes tasks off dead workers.

Clusters get this file as source, like `dask_plugin`. A driver calls the functions at the end of it
through `Client.run_on_scheduler`.

How a record travels
--------------------
The `Tracker` takes the records out of the metadata of finished tasks and publishes them, many at a
time, under the topic of their session (`dask_plugin.topic_of`). A message is
``{"events": [event, …]}``; it is neither numbered nor acknowledged, since a client that loses its
connection loses all its tasks with it. An event is ``(kind, key, record, nbytes, worker, details)``
with one of the kinds

``ended``
    `record` says how; `details` are set if it is not the first time, its value having been lost.
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
``refused``
    Its value was lost, and it must not be executed twice.
``losing``
    Its value was lost, and Dask makes it again; sent at once, so that it is heard before that value.
``waiting``
    No worker may run it now.
``remark``
    The user is to be told the text in `details`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import pickle
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.serialize import deserialize

from . import dask_plugin as plugin  # relative: the package around has another name when shipped
from .dask_memory import sweep
from .worker.starts import LastStarts, start_name

MARK, KEPT, topic_of = plugin.MARK, plugin.KEPT, plugin.topic_of
MADE = f"{MARK}:made"  # in the metadata of a task: its value existed once

REASON = "penstock: withdrawn"  # why a client's future was cancelled by us
SHORTEST, LONGEST = 0.002, 0.02  # seconds between two messages of one topic
SWEEPS = (0.3, 2.0)  # seconds after the death of a worker: its process may take its time to end
LEAVING_SECONDS = 5.0  # that a worker which was retired or restarted may take to end
PATIENCE = 0.1  # a nanny says why it ended a worker about when the worker's connection closes


class Tracker(SchedulerPlugin):  # type: ignore[misc]
    """Tells sessions how their tasks end, and takes tasks off dead workers.

    Parameters
    ----------
    name : str
        Of the plugin; holds the version of this file.
    scheduler : distributed.Scheduler
        Where it is.
    """

    def __init__(self, name: str, scheduler: Any) -> None:
        self.name = name
        self.scheduler = scheduler
        self.users: set[str] = set()  # clients; the plugin leaves with the last
        self.homes: dict[str, str] = {}  # client of a worker's own → the worker
        self._events: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)
        self._pause = SHORTEST
        self._flush_due = False
        self._displaced: tuple[str, list[tuple[Any, bool]]] = (
            "",
            [],
        )  # stimulus, and the keys that it took off a worker
        self._blamed: dict[Any, int] = {}  # key → times that a worker died under it
        self._gone: dict[Any, str] = {}  # values lost that must not be made again → stimulus
        self._doomed: dict[str, int] = {}  # worker → resident bytes when its nanny ended it
        self._restarting: set[str] = set()
        self._restart_workers: Any = None  # Dask's own handler
        self._watching: Any = None  # ours around it
        self._workers = {address: _known(state) for address, state in scheduler.workers.items()}

    # -- hooks of Dask: each is called for everybody's tasks and must not raise -------------
    def transition(
        self, key: Any, start: str, finish: str, *args: Any, stimulus_id: str = "", **details: Any
    ) -> None:
        """Look at a task that changes its state."""
        try:
            if finish == "memory":
                if start == "processing" and MARK in (details.get("metadata") or ()):
                    self._completed(key, details)
            elif start == "memory" and finish == "released":
                task = self.scheduler.tasks[key]
                if KEPT in (task.metadata or ()) and (task.who_wants or task.waiters):
                    task.annotations = {**(task.annotations or {}), KEPT: task.metadata[KEPT]}
                if not task.who_wants:
                    return
                if task.annotations and "penstock_once" in task.annotations:
                    self._gone[key] = stimulus_id
                elif MADE in (task.metadata or ()):
                    self._add(topic_of(key), ("losing", key, b"", 0, "", None))
                    self._flush()
            elif finish == "forgotten":
                self._blamed.pop(key, None)
            elif finish in {"erred", "no-worker"} or start == "processing":
                topic = self._topic_of(key)
                if not topic:
                    return
                if finish == "erred":
                    self._erred(topic, key, stimulus_id, details)
                elif finish == "no-worker":
                    self._add(topic, ("waiting", key, b"", 0, "", None))
                else:
                    self._displace(key, stimulus_id, given_up=False)
        except Exception as error:  # a guest does not break the house
            text = f"{type(error).__name__}: {error}"
            self._add(topic_of(key), ("broken", key, b"", 0, "", {"error": f"the tracker failed: {text}"}))

    def _topic_of(self, key: Any) -> str:
        """Return the topic of a task of ours; another version of penstock has a tracker of its own."""
        topic: str = topic_of(key)
        if topic:
            task = self.scheduler.tasks.get(key)
            body = getattr(task.run_spec, "func", None) if task is not None else None
            if getattr(body, "__module__", None) != plugin.__name__:
                return ""
        return topic

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Remember what identifies a worker, for the day it dies."""
        self._workers[worker] = _known(scheduler.workers[worker])

    def remove_worker(self, scheduler: Any, worker: str, *, stimulus_id: str = "", **details: Any) -> None:
        """Decide what becomes of the tasks that a worker took along.

        Runs before anything that Dask has decided leaves the scheduler, so that a task dropped
        here is not started elsewhere.
        """
        stimulus, displaced = self._displaced
        self._displaced = ("", [])
        gone, self._gone = self._gone, {}
        self._refuse([key for key, why in gone.items() if why == stimulus_id], worker)
        known = self._workers.pop(worker, {"worker": worker, "pid": 0, "limit": 0})
        known["silent"] = "ttl" in stimulus_id  # the process may live, but does not answer
        starts = LastStarts(known["pid"], plugin.starts_label(worker))
        begun = starts.read()
        restarted = worker in self._restarting
        self._restarting.discard(worker)
        lost: dict[Any, bool | None] = {}
        excused: set[Any] = set()
        orphans: list[Any] = []
        for key, given_up in displaced if stimulus == stimulus_id else ():
            task = scheduler.tasks.get(key)
            if task is None:
                continue
            name = start_name(key)
            moved = restarted or task.suspicious <= self._blamed.get(key, 0)  # or retired: in good order
            self._blamed[key] = task.suspicious
            if task.who_wants and all(self.homes.get(one.client_key) == worker for one in task.who_wants):
                orphans.append(key)  # who has submitted it died on this worker, too, and bears the blame
                continue
            began = None if begun is None else name in begun
            # What had not begun Dask moves by itself; an execution that was cut short has to be counted.
            if given_up or (began is True if moved else began is not False):
                lost[key] = began
                if restarted or (moved and not given_up):
                    excused.add(key)
        self.drop(orphans)
        if f"{self.name}-memory" in scheduler.worker_plugins:
            for seconds in SWEEPS:
                scheduler.loop.call_later(seconds, sweep)
        if lost:
            self.drop([key for key in lost if scheduler.tasks[key].state != "erred"])
        until = time.monotonic() + (LEAVING_SECONDS if excused else 0.0)
        scheduler.loop.call_later(PATIENCE, self._announce_loss, lost, known, excused, starts, until)

    def log_event(self, topic: str, msg: Any) -> None:
        """Hear of workers that use too much memory."""
        if topic == "worker-restart-memory" and isinstance(msg, dict):
            self._doomed[str(msg.get("worker"))] = msg.get("rss", 0)

    def watch_restarts(self) -> None:
        """Hear which workers are restarted by somebody's wish; Dask has no hook for that."""
        inner = self._restart_workers = self.scheduler.handlers.get("restart_workers")
        if inner is None:
            return

        async def restart_workers(workers: list[str] | None = None, **wishes: Any) -> Any:
            self._restarting.update(self.scheduler.workers if workers is None else workers)
            return await inner(workers=workers, **wishes)

        self._watching = self.scheduler.handlers["restart_workers"] = restart_workers

    def _unwatch_restarts(self) -> None:
        if (
            self._restart_workers is not None
            and self.scheduler.handlers.get("restart_workers") is self._watching
        ):
            self.scheduler.handlers["restart_workers"] = self._restart_workers

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Leave with the last of our clients."""
        self.forget(client)

    def restart(self, scheduler: Any) -> None:
        """Everything is forgotten, by somebody's wish; what is sent before the workers have ended is moved."""
        self._blamed.clear()
        self._restarting.update(scheduler.workers)

    # -- what the hooks do ------------------------------------------------------------------
    def _completed(self, key: Any, details: dict[str, Any]) -> None:
        metadata = self.scheduler.tasks[key].metadata
        record = metadata.pop(MARK)  # Dask would keep it as long as the value
        again = {"again": True} if MADE in metadata else None
        metadata[MADE] = True
        self._blamed.pop(key, None)
        worker, nbytes = details.get("worker") or "", details.get("nbytes") or 0
        self._add(topic_of(key), ("ended", key, record, nbytes, worker, again))

    def _displace(self, key: Any, stimulus_id: str, *, given_up: bool) -> None:
        if self._displaced[0] != stimulus_id:
            self._displaced = (stimulus_id, [])
        self._displaced[1].append((key, given_up))

    def _erred(self, topic: str, key: Any, stimulus_id: str, details: dict[str, Any]) -> None:
        exception, worker = details.get("exception"), details.get("worker") or ""
        if exception is None:
            task = self.scheduler.tasks.get(key)
            blamed = task and task.exception_blame
            existed = bool(blamed and MADE in (blamed.metadata or ()))
            self._add(topic, ("orphaned" if existed else "upstream", key, b"", 0, worker, None))
            return
        try:
            error = (
                exception if isinstance(exception, bytes) else deserialize(exception.header, exception.frames)
            )
            if isinstance(error, bytes):
                error = pickle.loads(error)
        except Exception:
            error = details.get("exception_text") or "an error that cannot be read"
        if isinstance(error, plugin.TaskFailure):
            task = self.scheduler.tasks.get(key)
            again = {"again": True} if task and MADE in (task.metadata or ()) else None
            self._add(topic, ("ended", key, error.record, 0, worker, again))
        elif type(error).__name__ == "KilledWorker":
            self._displace(key, stimulus_id, given_up=True)  # more deaths than the cluster allows
        else:
            text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
            self._add(topic, ("broken", key, b"", 0, worker, {"error": text[:2000]}))

    def _announce_loss(
        self,
        lost: dict[Any, bool | None],
        known: dict[str, Any],
        excused: set[Any],
        starts: Any,
        until: float,
    ) -> None:
        """Say what was lost; a process that leaves in good order goes on with its work for a moment."""
        if time.monotonic() < until and starts.is_growing():
            self.scheduler.loop.call_later(PATIENCE, self._announce_loss, lost, known, excused, starts, until)
            return
        begun = starts.read() or {}
        starts.close()
        known["rss"] = self._doomed.pop(known["worker"], 0)
        company = [key for key, began in lost.items() if began is not False]  # the others have killed nobody
        for key, began in lost.items():
            element, called, _ = begun.get(start_name(key), (None, None, None))
            shared = 0 if key in excused else len(company) - (key in company)
            details = {**known, "began": began, "called": called, "shared": shared, "element": element}
            details["excused"] = key in excused
            self._add(topic_of(key), ("lost", key, b"", 0, known["worker"], details))

    def _refuse(self, keys: list[Any], worker: str) -> None:
        """Keep Dask from making again what must not be executed twice."""
        keys = [key for key in keys if self._topic_of(key)]
        for key in keys:
            self._add(topic_of(key), ("refused", key, b"", 0, worker, None))
        if keys:
            self.drop(keys)

    def drop(self, keys: Iterable[Any]) -> None:
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
            again = MADE in (task.metadata or ())
            for dependant in list(task.dependents):
                if dependant in found or dependant.state in {"memory", "erred", "forgotten"}:
                    continue
                found.add(dependant)
                pending.append(dependant)
                topic = topic_of(dependant.key)
                if topic:
                    self._add(topic, ("orphaned" if again else "upstream", dependant.key, b"", 0, "", None))
        clients: defaultdict[str, list[Any]] = defaultdict(list)
        for task in found:
            for client in task.who_wants or ():
                clients[client.client_key].append(task.key)
        for client, wanted in clients.items():
            self.scheduler.report({"op": "cancelled-keys", "keys": wanted, "reason": REASON}, client=client)
            self.scheduler.client_releases_keys(keys=wanted, client=client)

    # -- messages ---------------------------------------------------------------------------
    def _add(self, topic: str, event: tuple[Any, ...]) -> None:
        self._events[topic].append(event)
        if not self._flush_due:
            self._flush_due = True
            self.scheduler.loop.call_later(self._pause, self._flush)

    def _flush(self) -> None:
        """Send what has gathered; wait the longer for the next time the more there was."""
        self._flush_due = False
        events, self._events = self._events, defaultdict(list)
        most = max(map(len, events.values()), default=0)
        self._pause = min(LONGEST, self._pause * 2) if most > 16 else SHORTEST
        for topic, batch in events.items():
            self.scheduler.log_event(topic, {"events": batch})
            self._tidy(topic)

    def _tidy(self, topic: str) -> None:
        """Dask keeps the last thousand messages of a topic; ours are large and never read again."""
        with contextlib.suppress(AttributeError, KeyError):
            self.scheduler._broker.truncate(topic)
            if not self.scheduler._broker._topics[topic].subscribers:
                del self.scheduler._broker._topics[topic]

    def unsubscribe(self, client: str, topic: str = "") -> None:
        """End what a client hears; of all sessions if none is named."""
        with contextlib.suppress(AttributeError):
            topics = self.scheduler._broker._topics
            for name in [topic] if topic else [name for name in topics if str(name).startswith("penstock-")]:
                if name in topics:
                    topics[name].unsubscribe(client)
                    self._tidy(name)

    def forget(self, client: str) -> None:
        """Count one client less; the last one takes the plugin and the uploaded files along."""
        self.users.discard(client)
        self.homes.pop(client, None)
        self.unsubscribe(client)
        if not self.users and self.scheduler.plugins.get(self.name) is self:
            self.scheduler.remove_plugin(name=self.name)
            self._unwatch_restarts()
            for name in (f"{self.name}-memory", f"{self.name}-files", f"{self.name}-scheduler-files"):
                if name in self.scheduler.plugins:
                    self.scheduler.remove_plugin(name=name)
                if name in self.scheduler.worker_plugins:
                    self.scheduler.loop.add_callback(self._take_along, name)

    async def _take_along(self, name: str) -> None:
        # Not `unregister_worker_plugin`: it fails, and loudly, if a worker goes at the same moment.
        with contextlib.suppress(Exception):
            self.scheduler.worker_plugins.pop(name, None)
            await self.scheduler.broadcast(msg={"op": "plugin-remove", "name": name}, on_error="ignore")


def _known(state: Any) -> dict[str, Any]:
    return {"worker": state.address, "pid": state.pid, "limit": state.memory_limit or 0}


# -- what a client asks the scheduler -------------------------------------------------------


def join(name: str, client: str, worker: str, dask_scheduler: Any) -> dict[str, Any]:
    """Install the tracker if it is not, and count a client as its user.

    Parameters
    ----------
    name, client : str
        Of the tracker and of the client.
    worker : str
        Address of the worker that the client is a part of, empty for a driver's.
    """
    tracker = dask_scheduler.plugins.get(name)
    if tracker is None:
        tracker = Tracker(name, dask_scheduler)
        dask_scheduler.add_plugin(tracker, name=name)
        tracker.watch_restarts()
    tracker.users.add(client)
    if worker:
        tracker.homes[client] = worker
    return summary(dask_scheduler)


def leave(name: str, client: str, dask_scheduler: Any) -> None:
    """Count a client less."""
    tracker = dask_scheduler.plugins.get(name)
    if tracker is not None:
        tracker.forget(client)


def unsubscribe(name: str, client: str, topic: str, dask_scheduler: Any) -> None:
    """End a subscription; by Dask's own way the topic would stay for ever."""
    tracker = dask_scheduler.plugins.get(name)
    if tracker is not None:
        tracker.unsubscribe(client, topic)


def addresses(dask_scheduler: Any) -> list[str]:
    """Return the addresses of all workers."""
    return list(dask_scheduler.workers)


def summary(dask_scheduler: Any) -> dict[str, Any]:
    """Return what a driver wants to know of a cluster."""
    workers = list(dask_scheduler.workers.values())
    return {
        "workers": len(workers),
        "threads": sum(state.nthreads for state in workers),
        "memory": sum(state.memory_limit or 0 for state in workers),
        "addresses": [state.address for state in workers[:100]],
        "dashboard": importlib.util.find_spec("bokeh") is not None,
    }


def unknown(keys: list[Any], dask_scheduler: Any) -> list[Any]:
    """Return those of the keys that the scheduler does not know."""
    return [key for key in keys if key not in dask_scheduler.tasks]


async def stop(name: str, keys: list[Any], dask_scheduler: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    """Withdraw tasks that no worker has been given.

    Returns
    -------
    tuple of (list, dict)
        Keys that will not run, and keys on workers: address → list.
    """
    await _arrival(keys, dask_scheduler)
    idle: list[Any] = []
    placed: defaultdict[str, list[Any]] = defaultdict(list)
    for key in keys:
        task = dask_scheduler.tasks.get(key)
        if task is not None and task.state == "processing":
            placed[task.processing_on.address].append(key)
        elif task is None or task.state not in {"memory", "erred"}:
            idle.append(key)
    dask_scheduler.plugins[name].drop(idle)
    return idle, dict(placed)


async def _arrival(keys: list[Any], dask_scheduler: Any) -> None:
    """Wait until the tasks are here: this request came by another connection than their graph."""
    for pause in range(1_000):
        absent = [key for key in keys if key not in dask_scheduler.tasks]
        if not absent or (pause > 100 and not getattr(dask_scheduler, "_active_graph_updates", 0)):
            return
        await asyncio.sleep(0.01)


def withdraw(name: str, keys: list[Any], dask_scheduler: Any) -> list[Any]:
    """Withdraw tasks wherever they are, but for those that have ended meanwhile, whose end was told.

    Returns
    -------
    list of tuple
        Keys of which nothing more will be heard.
    """
    tasks = dask_scheduler.tasks
    found = [key for key in keys if key not in tasks or tasks[key].state not in {"memory", "erred"}]
    dask_scheduler.plugins[name].drop(found)
    return found


def condemn(name: str, workers: list[str], dask_scheduler: Any) -> list[str]:
    """Answer which workers may be ended since a nanny replaces them; their tasks go elsewhere."""
    found = [address for address in workers if getattr(dask_scheduler.workers.get(address), "nanny", None)]
    dask_scheduler.plugins[name]._restarting.update(found)
    return found


def alive(workers: list[str], dask_scheduler: Any) -> list[str]:
    """Return those of the workers that the scheduler still knows."""
    return [address for address in workers if address in dask_scheduler.workers]
