"""Hears how tasks on a Dask cluster end, and makes sure that the end of each is heard.

The tracker's messages are the rule. Everything else here answers the question what if one does
not come: a scheduler that dies, a message that is lost, a task that Dask gives up.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock import errors
from penstock.runners import dask_graph
from penstock.runners.base import Key, Ref, Report

log = logging.getLogger("penstock.runners.dask")

LOOK_SECONDS = 0.5  # between two looks at what the client knows by itself
LATE_SECONDS = 5.0  # that a message may be later than what the client knows
QUIET_SECONDS = 10.0  # without any message, until the scheduler is asked
STALLED_SECONDS = 60.0  # without an answer
REMAKING_SECONDS = 5.0  # that the end of a session waits for lost values to be made again
WAITING_SECONDS = 10.0  # for a worker that may run a task, until the user is told


class Watch:
    """Follows the tasks of one client.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    tracker : module
        `dask_tracker` as the cluster knows it.
    deliver : callable
        Takes reports; called from this object's own thread.
    reconnected : callable
        Called after the client has found a scheduler again.
    patience : float
        Seconds to wait for that.
    """

    def __init__(
        self,
        client: Any,
        tracker: Any,
        deliver: Callable[[Sequence[Report]], None],
        reconnected: Callable[[], None],
        patience: float = 60.0,
    ) -> None:
        self._patience = patience
        self._away: float | None = None  # since when there is no scheduler
        self._unsent: set[Key] = set()
        self.outstanding: dict[Key, Ref] = {}
        self._client = client
        self._tracker = tracker
        self._deliver = deliver
        self._reconnected = reconnected
        self._connection = dask_graph.connection(client)
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._odd: dict[Key, float] = {}  # since when a task seems to be over
        self._unknown: set[Key] = set()  # to the scheduler, when it was asked last
        self._waiting: dict[Key, float] = {}
        self._told: set[str] = set()
        self._recomputed = 0
        self._remaking: set[Key] = set()  # values that Dask has lost and makes again
        self._empty = False  # the cluster had no workers when it was asked last
        self._heard = self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="penstock-dask", daemon=True)
        self._thread.start()

    def expect(self, refs: Mapping[Key, Ref]) -> None:
        """Follow tasks that are about to be sent."""
        self.outstanding.update(refs)
        self._heard = time.monotonic()  # their graph takes its time to arrive

    @property
    def is_away(self) -> bool:
        """Whether there is no scheduler at the moment."""
        return self._away is not None and self._away >= 0

    def expect_later(self, keys: Sequence[Key]) -> None:
        """Keep tasks that could not be sent: they are reported when the scheduler is back, or given up."""
        self._unsent.update(keys)

    def hear(self, message: Any) -> None:
        """Take a message of the tracker; returns at once."""
        self._messages.put(message)

    def tell(self, reports: Sequence[Report]) -> None:
        """Deliver reports from the watch's own thread."""
        self._messages.put(list(reports))

    def settle(self, ending: str, seconds: float = REMAKING_SECONDS) -> None:
        """Wait until it was told what became of lost values that Dask makes again.

        Parameters
        ----------
        ending : str
            Of the names in the keys that are of interest.
        seconds : float
            After which whoever asks goes on without; what is left is told as lost, and may have been
            executed.
        """
        if threading.current_thread() is self._thread:
            return
        deadline = time.monotonic() + seconds
        left: list[Key] = []
        while self._thread.is_alive():
            self._hear_all()
            left = [key for key in list(self._remaking) if key[0].endswith(ending)]
            if not left or self.is_away or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        if left:
            self._remaking.difference_update(left)
            self.tell([Report(key, "gone", cause=_unheard(key)) for key in left])
            self._hear_all()

    def _hear_all(self) -> None:
        """Wait until the messages that have come are read."""
        told = threading.Event()
        self._messages.put(told)
        told.wait(1.0)

    def close(self) -> None:
        """Hear no more."""
        self._messages.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        self.outstanding.clear()

    # -- the thread -------------------------------------------------------------------------
    def _serve(self) -> None:
        next_look = time.monotonic() + LOOK_SECONDS
        while True:
            messages = self._wait(max(next_look - time.monotonic(), 0.0))
            reports: list[Report] = []
            waiting = [message for message in messages if isinstance(message, threading.Event)]
            for message in messages:
                if message is None:
                    return
                if isinstance(message, threading.Event):
                    continue
                reports.extend(message if isinstance(message, list) else self._read(message))
            begun = time.monotonic()
            if begun >= next_look:
                reports.extend(self._look())
                now = time.monotonic()
                next_look = now + max(LOOK_SECONDS, 20 * (now - begun))
            if reports:
                try:
                    self._deliver(reports)
                except Exception:
                    log.exception("a listener failed")
            for one in waiting:
                one.set()

    def _wait(self, seconds: float) -> list[Any]:
        try:
            messages = [self._messages.get(timeout=seconds)]
        except queue.Empty:
            return []
        while True:
            try:
                messages.append(self._messages.get_nowait())
            except queue.Empty:
                return messages

    def _read(self, message: dict[str, Any]) -> list[Report]:
        self._heard = self._answered = time.monotonic()
        reports = []
        for kind, key, record, nbytes, worker, details in message["events"]:
            if kind == "started":
                if key in self.outstanding:
                    reports.append(Report(key, "started", worker=worker))
                continue
            if kind == "item":
                if key in self.outstanding:
                    number, item_key = details
                    handle = dask_graph.adopted(self._client, item_key)
                    item = Ref(item_key, handle, nbytes, worker)
                    reports.append(Report(key, "item", nbytes=nbytes, worker=worker, number=number, ref=item))
                continue
            if kind == "losing":
                if key in self._client.futures:  # what nobody holds any more Dask does not make again
                    self._remaking.add(key)
                    reports.append(Report(key, "losing", worker=worker))
                continue
            if kind == "remark":
                self._remark(details["text"])
                continue
            if kind == "waiting":
                self._waiting.setdefault(key, time.monotonic())
                continue
            ref = self.outstanding.pop(key, None)
            if ref is None:
                reports.extend(self._of_value(kind, key, record, nbytes, worker, details))
                continue
            if kind == "ended":
                ref.nbytes, ref.worker = nbytes, worker
                reports.append(Report(key, "ended", record, None, nbytes, worker))
            elif kind == "lost":
                reports.append(Report(key, "lost", cause=loss(key, details), worker=worker))
            elif kind == "upstream":
                reports.append(Report(key, "upstream"))
            elif kind == "orphaned":
                reports.append(Report(key, "lost", cause=_gone(key)))
            else:
                text = f"the Dask cluster could not run task {_name(key)!r}: {details['error']}"
                reports.append(Report(key, "lost", cause=errors.CrashedRun(text), worker=worker))
        return reports

    def _of_value(
        self, kind: str, key: Key, record: bytes, nbytes: int, worker: str, details: Any
    ) -> list[Report]:
        """Say what became of a value that had been reported, or of a task that was given up."""
        self._remaking.discard(key)
        if kind == "ended":
            if details is None:
                return []
            self._recomputed += 1
            return [Report(key, "again", record, None, nbytes, worker)]
        text = f"the value of task {_name(key)!r} was lost with worker {worker or 'that held it'}"
        cause = errors.ResultLost(text)
        if kind == "lost":  # Dask was making it again, and that worker died, too
            cause.__cause__ = loss(key, details)
        return [Report(key, "gone", cause=cause)]

    def _remark(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning("%s", text)

    # -- what if no message comes -----------------------------------------------------------
    def _look(self) -> list[Report]:
        reports = self._look_at_connection()
        if self._away is not None:
            self._heard = self._answered = time.monotonic()
            return reports
        if not self.outstanding:
            self._heard = self._answered = time.monotonic()
            self._waiting.clear()
            self._odd.clear()
            return reports
        reports += self._look_at_futures()
        if time.monotonic() - self._heard > QUIET_SECONDS:
            reports += self._ask_scheduler()
        self._mention()
        return reports

    def _look_at_connection(self) -> list[Report]:
        connection = dask_graph.connection(self._client)
        if connection is self._connection and self._away is None and not self._unsent:
            return []
        if connection is None or (connection is self._connection and self._unsent):
            return self._wait_for_scheduler()
        self._connection, self._away = connection, None
        try:
            self._reconnected()
        except Exception as error:
            log.warning("the Dask scheduler came back, but cannot be used: %s", error)
        return self._give_back(
            "the Dask scheduler died or went away, and another one has taken over", final=False
        )

    def _wait_for_scheduler(self) -> list[Report]:
        now = time.monotonic()
        if self._away is None:
            self._away, self._connection = now, None
            log.warning(
                "the Dask scheduler is gone; waiting %g s for one at the same address", self._patience
            )
        away = now - self._away
        if away < self._patience and self._client.status != "closed":
            return []
        text = f"the Dask scheduler is gone, and none has come back at its address within {away:.0f} s"
        return self._give_back(text, final=True)

    def _give_back(self, text: str, *, final: bool) -> list[Report]:
        keys, unsent = list(self.outstanding), self._unsent
        self.outstanding.clear()
        self._unsent = set()
        reports = []
        for key in keys:
            cause = errors.SchedulerLost(f"{text}; it had task {_name(key)!r}")
            cause.final = final
            cause.began = False if key in unsent else None
            reports.append(Report(key, "lost", cause=cause))
        remade, self._remaking = self._remaking, set()
        reports += [Report(key, "gone", cause=errors.SchedulerLost(text)) for key in remade]
        return reports

    def _look_at_futures(self) -> list[Report]:
        """Report what the client knows to be over since the last look, and the tracker never said."""
        reports: list[Report] = []
        odd: dict[Key, float] = {}
        now = time.monotonic()
        for key, ref in list(self.outstanding.items()):
            if ref.handle is None or ref.handle.status in {"pending", "lost"}:
                continue
            since = self._odd.get(key, now)
            if now - since < LATE_SECONDS:
                odd[key] = since
            elif self.outstanding.pop(key, None) is not None:
                reports.append(self._by_future(key, ref))
        self._odd = odd
        return reports

    def _by_future(self, key: Key, ref: Ref) -> Report:
        status, reason, exception = dask_graph.fate(ref.handle)
        cause: Exception
        if status == "finished":
            return Report(key, "ended", _made_up_record())
        if status == "error":
            record = getattr(exception, "record", None)
            if isinstance(record, bytes):
                return Report(key, "ended", record)
            if type(exception).__name__ == "KilledWorker":
                cause = errors.WorkerLost(f"the workers that ran task {_name(key)!r} died")
            else:
                shown = f"{type(exception).__name__}: {exception}"[:2000]
                cause = errors.CrashedRun(f"the Dask cluster could not run task {_name(key)!r}: {shown}")
        elif self._connection is None:
            cause = errors.SchedulerLost(f"the Dask scheduler is gone, and with it task {_name(key)!r}")
        elif reason.startswith("scheduler"):
            cause = errors.SchedulerLost(
                f"the Dask cluster was restarted ({reason}) under task {_name(key)!r}"
            )
        else:
            cause = _gone(key)
        return Report(key, "lost", cause=cause)

    def _ask_scheduler(self) -> list[Report]:
        keys = list(self.outstanding)[:5_000]
        try:
            unknown = dask_graph.ask(self._client, self._tracker.unknown, keys, timeout=5.0)
            summary = dask_graph.ask(self._client, self._tracker.summary, timeout=5.0)
        except Exception as error:
            if time.monotonic() - self._answered < STALLED_SECONDS:
                return []
            text = f"the Dask scheduler has not answered for {STALLED_SECONDS:.0f} s ({type(error).__name__})"
            keys = list(self.outstanding)
            self.outstanding.clear()
            return [Report(key, "lost", cause=errors.BackendStalled(text)) for key in keys]
        self._answered = time.monotonic()
        self._mention_emptiness(summary["workers"])
        # The graph of a task may be on its way still: only what is unknown twice is gone.
        found = [
            key for key in unknown if key in self._unknown and self.outstanding.pop(key, None) is not None
        ]
        self._unknown = set(unknown)
        if not self._unknown:
            self._heard = self._answered
        text = "the Dask scheduler does not know task {!r} any more"
        return [Report(key, "lost", cause=errors.CrashedRun(text.format(_name(key)))) for key in found]

    def _mention_emptiness(self, workers: int) -> None:
        """Tell the user that a cluster has no workers; Dask would wait for one without a word."""
        if not workers and not self._empty:
            address = self._client.scheduler.address
            log.warning(
                "the Dask cluster at %s has no workers: %d tasks wait until one comes",
                address,
                len(self.outstanding),
            )
        self._empty = not workers

    def _mention(self) -> None:
        """Tell the user what only waiting would not reveal."""
        if self._recomputed:
            log.warning("%d finished results were lost with their worker and made again", self._recomputed)
            self._recomputed = 0
        if self._waiting:
            now = time.monotonic()
            for key, since in list(self._waiting.items()):
                if key not in self.outstanding:
                    del self._waiting[key]
                elif now - since > WAITING_SECONDS:
                    del self._waiting[key]
                    name = _name(key)
                    if name not in self._told:
                        self._told.add(name)
                        log.warning(
                            "task %r waits for a worker: none has the resources or the name it asks for", name
                        )


def loss(key: Key, details: dict[str, Any]) -> Exception:
    """Say how a task was lost with its worker.

    Parameters
    ----------
    key : tuple
        The attempt.
    details : dict
        ``worker, pid, limit, rss, silent, began, called, shared, element, excused`` as the tracker found them.

    Returns
    -------
    WorkerLost or OutOfMemory
        With attributes ``began`` (whether its turn had come: True, False, or None if nobody knows),
        ``called`` (the same of the user's function) and ``shared`` (how many others that had begun
        were lost with it).
    """
    worker, pid = details["worker"], details["pid"]
    began = details["began"]
    when = {True: "while it ran", False: "before it began", None: "while it had"}[began]
    name = _name(key)
    cause: Any
    if details.get("rss"):
        cause = errors.OutOfMemory(
            f"worker {worker} (pid {pid}) was ended {when} task {name!r}: it used {_megabytes(details['rss'])} "
            f"of the {_megabytes(details['limit'])} it may"
        )
    elif details.get("excused"):
        cause = errors.WorkerLost(
            f"worker {worker} (pid {pid}) was retired or restarted {when} task {name!r}"
        )
    elif details.get("silent"):
        cause = errors.WorkerLost(f"worker {worker} (pid {pid}) no longer answered {when} task {name!r}")
    else:
        cause = errors.WorkerLost(f"worker {worker} (pid {pid}) {_death(pid)} {when} task {name!r}")
    cause.began, cause.called, cause.element = began, details.get("called"), details.get("element")
    cause.shared, cause.excused = details["shared"], details.get("excused", False)
    return cause  # type: ignore[no-any-return]


def _death(pid: int) -> str:
    """Say how a process ended, which is known of workers that this process started."""
    local = sys.modules.get("penstock.runners.dask_local")
    if local is None or pid not in local.LocalNanny.started:
        return "died"
    ends = local.LocalNanny.ends
    deadline = time.monotonic() + 1.0
    while pid not in ends and time.monotonic() < deadline:
        time.sleep(0.01)
    code = ends.get(pid)
    if code is None:
        return "died"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"died by {signal.Signals(-code).name}"
    except ValueError:
        return f"died by signal {-code}"


def _made_up_record() -> bytes:
    """Stand in for the record of a task that is known to have completed, and no more than that."""
    now = time.time()
    record: dict[str, Any] = {
        "status": "completed",
        "attempt": 1,
        "started": now,
        "ended": now,
        "seconds": 0.0,
    }
    record.update(nbytes=0, peak=0, host=socket.gethostname(), pid=os.getpid(), worker="", thread=0)
    return pickle.dumps(record, 4)


def _unheard(key: Key) -> errors.ResultLost:
    """Say that a value was still being made again when nobody waited for it any longer."""
    cause = errors.ResultLost(f"the value of task {_name(key)!r} was lost with the worker that held it")
    cause.__cause__ = errors.CrashedRun("Dask was making it again when its session ended")
    return cause


def _gone(key: Key) -> errors.ResultLost:
    cause = errors.ResultLost(f"a value that task {_name(key)!r} needs is gone, with the worker that held it")
    cause.began = False
    return cause


def _name(key: Key) -> str:
    return key[0].rpartition("-")[0]


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
