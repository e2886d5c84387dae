"""The process pool: one thread that starts worker processes, listens to them and buries them."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock import errors
from penstock.runners.base import Key, Report
from penstock.runners.process_channel import Message
from penstock.runners.process_child import Child, oom_kills
from penstock.runners.process_requests import serve
from penstock.runners.process_schedule import Schedule
from penstock.runners.process_work import Handle, Work
from penstock.runners.shared_memory import SharedMemory

_START_SECONDS = 60.0  # until a worker is alive: it may import from a slow file system
_FAILED_STARTS = 5  # in a row, until the pool gives up
_PAUSE_SECONDS = 0.05  # after a failed start; doubles each time
_GRACE_SECONDS = 1.0  # for workers that are told to end
_LINGER_SECONDS = 2.0  # until an idle process beyond the full number ends
_STUCK_SECONDS = 0.25  # until we believe that tasks wait for each other
_LOOK_SECONDS = 0.05  # how often to look at the clock while one of these runs

_log = logging.getLogger(__name__)


class Pool:
    """Worker processes and the thread that serves them.

    The workers are children of this thread: the kernel kills them when it ends, however it ends.

    Parameters
    ----------
    workers : int
        How many tasks run at a time.
    settings : dict
        For `Child.start`.
    environment : dict
        Of the workers.
    memory : SharedMemory
        Where large values lie; the pool deletes it at the end.
    deliver : callable
        Takes reports; called by the thread of the pool.
    """

    def __init__(
        self,
        workers: int,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        memory: SharedMemory,
        deliver: Callable[[Sequence[Report]], None],
    ) -> None:
        self._schedule = Schedule(workers)
        self.files = self._schedule.files
        self._settings = settings
        self._environment = environment
        self._memory = memory
        self._deliver = deliver
        self._lock = threading.RLock()
        self._numbers = 0
        self._failed_starts = 0.0
        self._pause_until = 0.0  # no process is started before
        self._oom_kills = oom_kills()
        self._broken = ""  # why there will be no more workers
        self._opened = threading.Event()  # the first worker is ready, or there will be none
        self._deadline: float | None = None  # set when the pool closes: then workers are killed
        self._is_leaving = False
        self._stuck_since: float | None = None
        self._selector = selectors.DefaultSelector()
        self._ear, self._bell = socket.socketpair()  # wakes the thread up
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="penstock-processes", daemon=True)
        self._process = os.getpid()

    # -- called by any thread -------------------------------------------------------------
    def open(self) -> None:
        """Start the workers and wait for the first one.

        Raises
        ------
        RunnerUnavailable
            If none can be started.
        """
        self._wake()  # for its first turn, which starts the workers
        self._thread.start()
        self._opened.wait()
        if self._broken:
            raise errors.RunnerUnavailable(self._broken)

    def close(self) -> None:
        """End the workers, soon or by force, and delete the files; wait until that is done."""
        if os.getpid() != self._process or not self._thread.ident:
            return
        # All the work is done by the thread of the pool, which no Ctrl-C can interrupt.
        if self._deadline is None:
            self._deadline = time.monotonic() + _GRACE_SECONDS
        self._wake()
        if self._thread is threading.current_thread():
            return
        try:
            self._thread.join(2 * _GRACE_SECONDS + 0.5)
        except BaseException:  # a second Ctrl-C
            self._deadline = 0.0
            self._wake()
            self._thread.join(_GRACE_SECONDS)
            raise
        finally:
            if self._thread.is_alive():  # held up by a session that does not take its reports
                for child in list(self._schedule.children.values()):
                    child.kill()

    def send(self, works: Sequence[tuple[Work, Sequence[Handle | None]]]) -> None:
        """Queue work."""
        if not self._thread.is_alive():  # nobody would report what becomes of it
            raise errors.WorkerLost(self._broken or "the process pool was closed")
        with self._lock:
            for work, upstream in works:
                self._schedule.admit(work, upstream)
                if self._broken or self._deadline is not None:
                    self._schedule.end_all(errors.WorkerLost(self._broken or "the process pool was closed"))
            self._settle()

    def cancel(self, keys: Sequence[Key], *, force: bool) -> list[Key]:
        """See `TaskRunner.cancel`."""
        with self._lock:
            removed = self._schedule.cancel(keys, force=force)
            self._settle()
        return removed

    def cancel_all(self) -> None:
        """Stop all work; each gets a report."""
        with self._lock:
            self._schedule.cancel(self._schedule.keys(), force=False, told=False)
            self._settle()

    def take_back(self, key: Key) -> bool:
        """See `TaskRunner.take_back`."""
        with self._lock:
            taken = self._schedule.take_back(key)
            self._settle()
        return taken

    def _settle(self) -> None:
        """Send what can be sent from here; call the thread for everything else."""
        schedule = self._schedule
        schedule.settle()
        if schedule.reports or schedule.dropped or schedule.clogged or schedule.missing_workers():
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake up; closed: it has ended
            self._bell.send(b".")

    # -- the thread -----------------------------------------------------------------------
    def _run(self) -> None:
        # What this thread starts inherits the mask: no Ctrl-C before a worker can ignore it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            while self._turn():
                pass
        except BaseException as error:
            _log.exception("the process pool has failed")
            self._break(f"the process pool has failed: {error!r}")
        finally:
            self._finish()

    def _turn(self) -> bool:
        events = self._selector.select(self._patience())
        schedule = self._schedule
        with self._lock:
            for key, mask in events:
                child: Child | None = key.data
                if child is None:
                    with contextlib.suppress(BlockingIOError):
                        self._ear.recv(4096)
                elif schedule.children.get(child.number) is child:  # not buried a moment ago
                    self._attend(child, mask, key.fileobj)
            self._tend()
            schedule.settle()
            for child in schedule.clogged:
                self._watch(child, selectors.EVENT_READ | selectors.EVENT_WRITE)
            schedule.clogged.clear()
            reports, schedule.reports = schedule.reports, []
            dropped, schedule.dropped = schedule.dropped, []
        del events
        dropped.clear()
        if reports:
            self._tell(reports)
        return self._deadline is None or bool(schedule.children)

    def _tell(self, reports: list[Report]) -> None:
        try:
            self._deliver(reports)
        except Exception:  # the session's fault: the other sessions need the pool
            _log.exception("a session failed over a report")

    def _patience(self) -> float | None:
        with self._lock:
            children = self._schedule.children.values()
            hurry = self._deadline is not None or len(children) != self._schedule.workers
            hurry = hurry or self._schedule.may_be_stuck or not all(child.is_ready for child in children)
            return _LOOK_SECONDS if hurry else None

    def _watch(self, child: Child, events: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.modify(child.channel, events, child)

    def _attend(self, child: Child, mask: int, source: Any) -> None:
        if source is not child.channel:  # the process has ended; it may have said something before
            self._bury(child)
            return
        if mask & selectors.EVENT_WRITE and child.channel.flush():
            self._watch(child, selectors.EVENT_READ)
        if mask & selectors.EVENT_READ:
            try:
                messages = child.channel.receive()
            except EOFError:
                self._bury(child)
                return
            for message in messages:
                self._hear(child, message)

    # -- messages of workers --------------------------------------------------------------
    def _hear(self, child: Child, message: Message) -> None:
        kind, *details = message
        schedule = self._schedule
        if kind == "ended":
            *details, was_interrupted = details
            schedule.ended(child, *details)
            child.idle_since = time.monotonic()
            if was_interrupted and not child.is_leaving:
                self._dismiss(child)
        elif kind == "started":
            schedule.started(child, *details)
        elif kind == "item":
            schedule.yielded(child, *details)
        elif kind == "returned":
            schedule.returned(child, *details)
        elif kind == "blocked":
            child.is_blocked, child.is_presumed_blocked = details[0], False
            schedule.returned(child, details[1])
        elif kind == "alive":
            child.is_alive = True
        elif kind == "ready":
            child.is_alive = child.is_ready = True
            child.idle_since = time.monotonic()
            self._failed_starts = 0.0
            self._opened.set()
        elif kind == "unready":
            self._break(f"the initializer failed in a worker process:\n{details[0]}")
        elif kind == "missing":
            schedule.missing(child, *details)
        else:
            serve(schedule, child, kind, details)

    # -- life and death of workers --------------------------------------------------------
    def _tend(self) -> None:
        now = time.monotonic()
        schedule = self._schedule
        if self._deadline is not None and not self._is_leaving:
            self._leave()
        for child in list(schedule.children.values()):
            if not child.is_alive and now - child.born > _START_SECONDS:
                child.kill()
        if self._deadline is not None:
            if now > self._deadline:
                for child in schedule.children.values():
                    child.kill()
            if now > self._deadline + _GRACE_SECONDS:
                for child in list(schedule.children.values()):
                    self._bury(child)
            return
        if not schedule.may_be_stuck:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > _STUCK_SECONDS:
            self._stuck_since = None
            schedule.presume_blocked()
        for child in schedule.spare_workers():
            if now - child.idle_since > _LINGER_SECONDS:
                self._dismiss(child)
        if not self._broken and now >= self._pause_until:
            for _ in range(schedule.missing_workers()):
                self._start()

    def _start(self) -> None:
        self._numbers += 1
        try:
            child = Child.start(self._numbers, self._settings, self._environment)
        except OSError as error:
            self._start_failed(f"no worker process can be started: {error}")
            return
        self._schedule.children[child.number] = child
        self._selector.register(child.channel, selectors.EVENT_READ | selectors.EVENT_WRITE, child)
        if child.death is not None:
            self._selector.register(child.death, selectors.EVENT_READ, child)

    def _bury(self, child: Child) -> None:
        for message in child.channel.drain():
            self._hear(child, message)
        self._selector.unregister(child.channel)
        if child.death is not None:
            self._selector.unregister(child.death)
        end = child.bury()
        kills = oom_kills()
        self._schedule.lost(child, end, by_oom=end.endswith("SIGKILL") and kills > self._oom_kills)
        self._oom_kills = kills
        self._memory.sweep(str(child.number), self.files)
        if not child.is_ready and self._deadline is None:
            # A signal is somebody else's doing, and more likely to pass.
            self._start_failed(
                f"a worker process {end} before it was ready; it may have said why on stderr",
                1.0 if end.startswith("exited") else 0.25,
            )

    def _start_failed(self, reason: str, weight: float = 1.0) -> None:
        """Try again, a little later; give up if that goes on and nobody is left to work."""
        self._pause_until = time.monotonic() + _PAUSE_SECONDS * 2 ** min(self._failed_starts, 7)
        self._failed_starts += weight
        children = self._schedule.children.values()
        if self._failed_starts >= _FAILED_STARTS and not any(
            child.is_ready and not child.is_blocked for child in children
        ):
            self._break(reason)

    def _break(self, reason: str) -> None:
        with self._lock:
            self._broken = self._broken or reason
            self._schedule.end_all(errors.WorkerLost(reason))
        self._opened.set()

    def _dismiss(self, child: Child) -> None:
        child.is_leaving = True
        if not child.is_ready:  # no code of the user has run in it
            child.kill()
        if child.running:
            child.channel.post(("cancel", list(child.running)))
        child.channel.post(("stop",))
        if not child.channel.flush():
            self._schedule.clogged.add(child)

    def _leave(self) -> None:
        self._is_leaving = True
        for child in self._schedule.children.values():
            self._dismiss(child)
        self._schedule.end_all(errors.CancelledRun("the process pool was closed"))

    def _finish(self) -> None:
        """Leave nothing behind, whatever has happened."""
        with self._lock:
            self._deadline = self._deadline or 0.0
            for child in list(self._schedule.children.values()):
                child.bury()
            self._schedule.children.clear()
            reports, self._schedule.reports = self._schedule.reports, []
            self._selector.close()
            self._ear.close()
            self._bell.close()
        self._memory.close()
        self._opened.set()
        if reports:
            self._tell(reports)
