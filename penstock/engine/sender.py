"""The background half of tracking: one daemon thread that moves a spool into a store."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from penstock.engine.spool import Batch, Spool, SpoolReader, write_ack
from penstock.errors import ConfigurationError

logger = logging.getLogger("penstock.tracking")

START_DELAY = 1.0  # seconds before the store is loaded: a short script never pays for it
LOADING_PATIENCE = 0.05
INTERVAL = 0.05  # between two batches, so that many small events share a commit
LONGEST_INTERVAL = 0.12  # what is recorded is to be seen within a quarter of a second
SHARE = 0.1  # of the time of one core, that sending may take from the run while nobody waits
SHORTEST_PAUSE = 0.02
LONGEST_PAUSE = 5.0  # between two attempts to reach a store that does not answer
ELSEWHERE_PAUSE = 0.25  # while another process commits our events
ACK_INTERVAL = 1.0


class Store(Protocol):
    """Who remembers: the store in this process, or a server."""

    def send(self, batch: Batch) -> int:
        """Commit events; return up to which event of their writer all are committed.

        A number below the batch's last means that another process will commit them, or that they
        have to be sent again.
        """
        ...

    def ask(self, question: Mapping[str, Any]) -> Any:
        """Answer a question about the record."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class StoreUnusable(ConfigurationError):
    """The store will take nothing from this process, however often it is asked."""


class Sender:
    """Sends what is in a spool to a store and keeps count of what is committed.

    Parameters
    ----------
    spool : Spool
        Of this process.
    opener : callable
        Opens the store; called in the thread of the sender.
    successor : callable
        Given what is committed, returns the spool to go on with if the present one is finished.
    listen : callable, optional
        Called once, when it is time to load the store.

    Attributes
    ----------
    loaded : bool
        The store was opened.
    usable : bool
        The store has not refused for good.
    reachable : bool
        The latest attempt to send did not fail.
    """

    def __init__(
        self,
        spool: Spool,
        opener: Callable[[], Store],
        successor: Callable[[int], Spool | None] | None = None,
        listen: Callable[[], None] | None = None,
    ) -> None:
        self._spool = spool
        self._acknowledged = 0
        self._sent = 0
        self._finished: set[str] = set()
        self.loaded = False
        self.usable = True
        self.reachable = True
        self._opener = opener
        self._successor = successor
        self._listen = listen
        self._wake = threading.Event()  # there is something to send
        self._hurry = threading.Event()  # somebody waits: no delays
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._ack_written = time.monotonic()
        self._pause = SHORTEST_PAUSE
        self._store: Store | None = None
        self._reader: SpoolReader | None = None
        self._complained = False
        self._thread = threading.Thread(target=self._work, name="penstock-tracking", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Say that the spool has grown."""
        if not self._wake.is_set():
            self._wake.set()

    def flush(self, spool: Spool, target: int, timeout: float, *, patient: bool = True) -> bool:
        """Wait until the store has committed a spool up to `target`; False if it has not in time.

        Without patience the first attempt that fails is the last one that is waited for.
        """
        deadline = time.monotonic() + timeout
        self._hurry.set()
        self._wake.set()
        try:
            with self._progress:
                while self.committed(spool) < target:
                    remaining = deadline - time.monotonic()
                    hopeless = not self.usable or not self._thread.is_alive()
                    if remaining <= 0 or hopeless or not (patient or self.reachable):
                        return False
                    self._progress.wait(min(remaining, 0.1))
            return True
        finally:
            self._hurry.clear()

    def committed(self, spool: Spool) -> int:
        """Return up to which event of a spool the store has committed."""
        if spool.writer in self._finished:
            return spool.last
        return self._acknowledged if spool is self._spool else 0  # 0: it is the next one

    def sent(self, spool: Spool) -> int:
        """Return up to which byte of a spool the store has committed its events."""
        if spool.writer in self._finished:
            return spool.size
        return self._sent if spool is self._spool else 0

    def stop(self, timeout: float) -> None:
        """End the thread. One that is loading a library, or waiting for a busy store, is left behind."""
        self._stop.set()
        self._hurry.set()
        self._wake.set()
        self._thread.join(timeout if self.loaded else min(timeout, LOADING_PATIENCE))

    # -- in the thread ----------------------------------------------------------------------
    def _work(self) -> None:
        self._hurry.wait(START_DELAY)
        if self._listen is not None and not self._stop.is_set():
            self._listen()
        try:
            while not self._stop.is_set():
                self._wake.wait()
                self._wake.clear()
                self._round()
        except StoreUnusable as error:
            self.usable = False
            logger.warning("%s Runs are kept in %s until then.", error, self._spool.path.parent)
        finally:
            if self._reader is not None:
                self._reader.close()
            if self._store is not None:
                with contextlib.suppress(Exception):
                    self._store.close()

    def _round(self) -> None:
        begun = time.thread_time()
        try:
            complete = self._ship()
        except StoreUnusable:
            raise
        except Exception as error:  # whatever happens to the store must not reach the run
            if not self._complained:
                self._complained = True
                where = self._spool.path.parent
                logger.warning("The store does not take events now (%s); they wait in %s.", error, where)
            if self._reader is not None:
                self._reader.seek(self._acknowledged)
            complete = False
            with self._progress:
                self.reachable = False
                self._progress.notify_all()
            self._back_off(LONGEST_PAUSE)
        if complete:
            cost = time.thread_time() - begun
            self._hurry.wait(min(max(INTERVAL, cost / SHARE), LONGEST_INTERVAL))
        else:
            self._wake.set()  # there is more to send, whether or not new events come

    def _ship(self) -> bool:
        """Send one batch; return whether nothing is left to send."""
        reader = self._reader
        if reader is None or reader.writer != self._spool.writer:
            if reader is not None:
                reader.close()
            reader = self._reader = SpoolReader(self._spool.path)
        batch = reader.read()
        if not batch.payloads or self._stop.is_set():
            return True
        if self._store is None:
            self._store = self._opener()
            if self._stop.is_set():
                return True
            self.loaded = True
        acknowledged = self._store.send(batch)
        self._complained = False
        self.reachable = True
        self._acknowledge(acknowledged)
        if acknowledged != batch.last:  # another process commits them, or was faster than we
            reader.seek(acknowledged)
        if acknowledged < batch.last:
            self._back_off(ELSEWHERE_PAUSE)
            return False
        self._sent = reader.offset
        self._pause = SHORTEST_PAUSE
        if reader.read_to < self._spool.last:
            return False
        self._rotate()
        return True

    def _rest(self, seconds: float) -> None:
        if self._hurry.wait(seconds):  # somebody waits; still no busy loop
            self._stop.wait(min(seconds, SHORTEST_PAUSE))

    def _back_off(self, longest: float) -> None:
        self._rest(self._pause * random.random())  # noqa: S311 - many drivers must not come back together
        self._pause = min(self._pause * 2, longest)

    def _acknowledge(self, number: int) -> None:
        with self._progress:
            if number > self._acknowledged:
                self._acknowledged = number
                self._progress.notify_all()
        now = time.monotonic()
        if now - self._ack_written >= ACK_INTERVAL:
            self._ack_written = now
            with contextlib.suppress(OSError):
                write_ack(self._spool.path, number)

    def _rotate(self) -> None:
        following = self._successor(self._acknowledged) if self._successor is not None else None
        if following is not None:
            with self._progress:
                self._finished.add(self._spool.writer)
                self._spool, self._acknowledged, self._sent = following, 0, 0
                self._progress.notify_all()
