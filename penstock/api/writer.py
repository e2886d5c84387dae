"""The one thread of a server that writes: batches of many drivers in one transaction.

Requests hand their batches over and wait; the thread takes all that have come, commits them
together, and only then is anybody answered. Whatever else writes (leases, requests, the reaper,
spools of this machine) does so in the same thread, so that the database never sees two of ours.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.engine.spool import Batch
from penstock.errors import ConfigurationError

__all__ = ["Busy", "Figures", "Unavailable", "Writer"]

logger = logging.getLogger("penstock.server")

DEPTH = 64  # batches that wait
TOGETHER = 20_000  # events in one transaction: large enough to share its cost, short enough to wait for
TURN = 0.25  # seconds between two rounds of what else there is to do


class Unavailable(Exception):
    """The database takes nothing now; nothing was committed."""


class Busy(Unavailable):
    """So much waits already that more would not be sooner."""


@dataclass(slots=True)
class Figures:
    """What a writer has done so far."""

    events: int = 0
    batches: int = 0
    commits: int = 0
    failures: int = 0
    refused: int = 0
    seconds: float = 0.0
    last_error: str = ""


@dataclass(slots=True)
class _Job:
    batch: Batch | None
    work: Callable[[Database], Any] | None = None
    done: Future[Any] = field(default_factory=Future)


class Writer:
    """Commits what others hand over.

    Parameters
    ----------
    database : Database
        The caller holds the lock of its writer.
    turn : callable
        What else is to be done in the thread, every 0.25 s; an error in it is logged.
    """

    def __init__(self, database: Database, turn: Callable[[], None] | None = None) -> None:
        self.figures = Figures()
        self._database = database
        self._turn = turn
        self._jobs: queue.Queue[_Job | None] = queue.Queue(DEPTH)
        self._closed = False
        self._complained = ""
        self._listeners: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._work, name="penstock-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """How many batches wait."""
        return self._jobs.qsize()

    def on_commit(self, tell: Callable[[], None]) -> None:
        """Call a function, in the thread of the writer, after each commit; it must not wait."""
        self._listeners.append(tell)

    def commit(self, batch: Batch) -> Future[int]:
        """Commit a batch; the future holds up to which event its writer is committed.

        Raises
        ------
        Busy
            If too many batches wait.
        """
        return self._put(_Job(batch))

    def call(self, work: Callable[[Database], Any]) -> Future[Any]:
        """Call a function with the database in the thread that may write.

        Raises
        ------
        Busy
            If too many batches wait.
        """
        return self._put(_Job(None, work))

    def _put(self, job: _Job) -> Future[Any]:
        if self._closed:
            raise Busy("the server is stopping")
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.figures.refused += 1
            raise Busy("too much waits to be written") from None
        return job.done

    def close(self, timeout: float = 10.0) -> None:
        """Commit what waits and end the thread."""
        self._closed = True
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._jobs.put(None, timeout=timeout)
            self._thread.join(timeout)

    # -- in the thread ----------------------------------------------------------------------
    def _work(self) -> None:
        next_turn = time.monotonic()
        while True:
            jobs = self._gather(max(0.0, next_turn - time.monotonic()))
            if None in jobs:
                self._do([job for job in jobs if job is not None])
                return
            self._do([job for job in jobs if job is not None])
            if time.monotonic() >= next_turn:
                self._take_turn()
                next_turn = time.monotonic() + TURN

    def _gather(self, patience: float) -> list[_Job | None]:
        """Return what waits, or what comes first."""
        jobs: list[_Job | None] = []
        size = 0
        with contextlib.suppress(queue.Empty):
            jobs.append(self._jobs.get(timeout=patience) if patience else self._jobs.get_nowait())
            while (last := jobs[-1]) is not None and size < TOGETHER:
                size += len(last.batch.payloads) if last.batch is not None else 1
                jobs.append(self._jobs.get_nowait())
        return jobs

    def _do(self, jobs: list[_Job]) -> None:
        batches = [job for job in jobs if job.batch is not None]
        if batches:
            self._commit(batches)
        for job in jobs:
            if job.work is not None:
                self._call(job)

    def _commit(self, jobs: list[_Job]) -> None:
        batches = [job.batch for job in jobs if job.batch is not None]
        begin = time.perf_counter()
        try:
            committed = ingest(self._database, batches)
        except Exception as error:
            self._failed(error)
            for job in jobs:
                _fail(job.done, Unavailable(_reason(error)))
            return
        figures = self.figures
        figures.seconds += time.perf_counter() - begin
        figures.commits += 1
        figures.batches += len(batches)
        figures.events += sum(len(batch.payloads) for batch in batches)
        self._complained = figures.last_error = ""
        for job in jobs:
            assert job.batch is not None
            _settle(job.done, committed[job.batch.writer])
        self._tell()

    def _call(self, job: _Job) -> None:
        assert job.work is not None
        try:
            answer = job.work(self._database)
        except (sa.exc.OperationalError, sa.exc.DatabaseError) as error:
            self._failed(error)
            _fail(job.done, Unavailable(_reason(error)))
        except Exception as error:
            _fail(job.done, error)
        else:
            _settle(job.done, answer)
            self._tell()

    def _take_turn(self) -> None:
        if self._turn is not None:
            try:
                self._turn()
            except Exception as error:  # it comes again; the thread must go on
                self._failed(error)

    def _tell(self) -> None:
        for tell in self._listeners:
            with contextlib.suppress(RuntimeError):  # a loop that is closing
                tell()

    def _failed(self, error: Exception) -> None:
        self.figures.failures += 1
        self.figures.last_error = reason = _reason(error)
        if reason != self._complained:
            self._complained = reason
            logger.warning("The database takes nothing now: %s", reason)


def _reason(error: Exception) -> str:
    if isinstance(error, ConfigurationError):
        return str(error)
    return str(getattr(error, "orig", None) or error) or type(error).__name__


def _settle(done: Future[Any], answer: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # whoever asked has gone away
        done.set_result(answer)


def _fail(done: Future[Any], error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        done.set_exception(error)
