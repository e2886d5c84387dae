"""Tracking: every event goes to the spool at once, and from there to the store in the background.

A run never waits for the store and never fails because of it. `Tracker.record` appends to the
spool in the thread that made the event; a `Sender` moves the spool into a `Store`. What is unsent
when the process ends stays in the spool for the next run or command on this machine.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from penstock.engine import destination
from penstock.engine.events import Event, bus, pack, unpack
from penstock.engine.home import Home, usable_home
from penstock.engine.sender import Sender, Store, StoreUnusable
from penstock.engine.spool import Spool, spools
from penstock.settings import settings

__all__ = ["Store", "StoreUnusable", "Tracker", "hear", "open_store", "start_tracking", "stop_tracking"]

logger = logging.getLogger("penstock.tracking")

EXIT_PATIENCE = 5.0  # seconds
RING = 100_000  # events kept in memory while the disk takes none
DISK_RETRY = 0.5  # seconds between two attempts to write to a disk that was full
ROTATE = 64 << 20  # bytes after which a spool that is fully sent makes room for a new one
LOG_BACKLOG = 256 << 20  # bytes of unsent events beyond which log lines are given up
SYNC_INTERVAL = 0.05  # seconds that a power failure may cost under PENSTOCK_SPOOL_SYNC=power


def open_store(home: Home) -> Store:
    """Open the store that the settings name; called in the sender's thread only.

    It is bound by name, so that the engine imports neither SQLAlchemy nor an HTTP client, and the
    first task does not wait for either.
    """
    name = "penstock.api.embedded"
    if settings().api_url:
        if importlib.util.find_spec("penstock.api.client") is not None:
            name = "penstock.api.client"
        else:
            logger.warning("PENSTOCK_API_URL is set, but this version records into %s only.", home.path)
    store: Store = importlib.import_module(name).open_store(home.path)
    return store


def drain_spools(home: Home, patience: float) -> bool:
    """Commit everything that is in the spools of a home, each where it is to go.

    What is for the database is taken from dead and living writers; what is for a server from the dead:
    the living send it themselves. What is for a database that the settings do not name stays.

    Returns
    -------
    bool
        False if another process was still committing, or there was no time for all.

    Raises
    ------
    ConfigurationError, StoreUnavailable, ServerError
        If a store takes nothing.
    """
    deadline = time.monotonic() + patience
    places = {destination.read(path) for path in spools(home.spool)}
    done = True
    if not settings().api_url or destination.store() in places:
        done = importlib.import_module("penstock.api.embedded").drain(home.path, patience)
    for url in sorted(filter(destination.is_server, places)):
        done &= importlib.import_module("penstock.api.remote").drain(home.path, url, deadline)
    return done


class Tracker:
    """Records the events of this process.

    Parameters
    ----------
    home : Home
        Where the spool lies.
    opener : callable
        Opens the store, in the sender's thread.
    durable : bool
        Make events survive a power failure as soon as they are 50 ms old.

    Attributes
    ----------
    lost : int
        Transitions that neither the disk nor the memory held when the process ended.
    dropped_logs : int
        Events with log lines that were given up for the sake of transitions. Their lines are
        counted in the record as soon as it takes something again, and shown with the run.
    """

    def __init__(
        self, home: Home, opener: Callable[[Home], Store] = open_store, *, durable: bool = False
    ) -> None:
        self.home = home
        self.lost = 0
        self.dropped_logs = 0
        self._opener = opener
        self._durable = durable
        self._gate = threading.Lock()
        self._closing = False
        self._begin()
        _trackers.add(self)

    def _begin(self) -> None:
        self._ring: deque[tuple[str | None, bytes]] = deque()  # with the root, if it is of a log
        self._retry_at = 0.0
        self._complained = False
        self._waiting = False
        self._owed: dict[str, tuple[int, int]] = {}  # lines that were given up, and the epoch, by root run
        self._spool: Spool | None = None
        self._retired: list[Spool] = []  # what others know this process by
        self._sender: Sender | None = None
        self._still: Callable[[], None] | None = None  # ends what `hear` has begun

    def _after_fork(self) -> None:
        """Forget the spool, its lock and its sender: they are the parent's."""
        _inherited.append(self._sender)
        self._gate = threading.Lock()
        self._begin()

    # -- in the thread of the run -----------------------------------------------------------
    def record(self, event: Event) -> None:
        """Keep one event. Never raises, and waits for nothing but the cache of the disk.

        There is one exception: while the disk takes nothing and the memory for events is full, it
        waits for room, so that a run pauses rather than loses what happened.
        """
        try:
            payload = pack(event)
        except Exception:  # a value that does not fit the format: its text is better than nothing
            payload = pack(replace(event, body=_plain(event.body)))
        while not self._take(event, payload):
            time.sleep(DISK_RETRY or 0.001)

    def _take(self, event: Event, payload: bytes) -> bool:
        with self._gate:
            if event.kind == "log" and self._unsent() > LOG_BACKLOG:
                self._give_up(event.root, payload)  # the store is away for long; transitions come first
                return True
            if self._ring:
                self._empty_ring()
            self._settle()
            taken = (not self._ring and self._append(payload)) or self._keep(event, payload)
            sender = self._sender
        if sender is not None:
            sender.notify()
        return taken

    def _unsent(self) -> int:
        spool, sender = self._spool, self._sender
        return 0 if spool is None else spool.size - (sender.sent(spool) if sender is not None else 0)

    def _give_up(self, root: str, payload: bytes) -> None:
        self.dropped_logs += 1
        lines, epoch = 1, 1
        try:
            event = unpack(payload)
            epoch = event.epoch
            lines = len(event.body.get("lines") or ()) + int(event.body.get("dropped") or 0) or 1
        except Exception:
            logger.debug("an event with log lines cannot be read again", exc_info=True)
        before, latest = self._owed.get(root, (0, epoch))
        self._owed[root] = before + lines, max(latest, epoch)

    def _settle(self) -> None:
        """Say how many lines were given up, if there is room to say it."""
        if not self._owed or self._ring or self._unsent() > LOG_BACKLOG:
            return
        for root, (lines, epoch) in list(self._owed.items()):
            # Under the epoch of the lines: an older one would be stale once the run had changed hands.
            event = Event("log", root, root, time.time(), {"lines": [], "dropped": lines}, epoch)
            if not self._append(pack(event)):
                return
            del self._owed[root]

    def _append(self, payload: bytes) -> bool:
        try:
            if self._spool is None:
                self._spool = Spool(self.home.spool)
                self._start_threads(self._spool)
            self._spool.append(payload)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "%s takes no events (%s); they are kept in memory for now.", self.home.spool, error
                )
            self._retry_at = time.monotonic() + DISK_RETRY
            return False
        self._complained = False
        return True

    def _start_threads(self, spool: Spool) -> None:
        try:
            self._sender = Sender(spool, self.open_store, self._successor, self._listen)
            if self._durable:
                threading.Thread(target=self._sync, name="penstock-sync", daemon=True).start()
        except RuntimeError:
            pass  # Python is shutting down: the spool alone has to do

    def open_store(self) -> Store:
        """Open the store; for the threads in the background."""
        return self._opener(self.home)

    @property
    def writer(self) -> str:
        """Writer of the present spool, empty if there is none."""
        spool = self._spool
        return spool.writer if spool is not None else ""

    @property
    def writers(self) -> list[str]:
        """Writers of all spools that this process has written."""
        with self._gate:
            written = [*self._retired, *([self._spool] if self._spool is not None else [])]
        return [spool.writer for spool in written]

    def begin(self) -> str:
        """Open the spool now; return its writer, empty if the disk takes none or nothing is recorded."""
        with self._gate:
            if self._spool is None and _unsubscribe is not None:
                try:
                    self._spool = Spool(self.home.spool)
                except OSError:
                    return ""
                self._start_threads(self._spool)
        return self.writer

    def _listen(self) -> None:
        if _listener is not None and self._still is None:
            self._still = _listener(self)

    def _empty_ring(self) -> None:
        if time.monotonic() >= self._retry_at:
            while self._ring and self._append(self._ring[0][1]):
                self._ring.popleft()

    def _keep(self, event: Event, payload: bytes) -> bool:
        if len(self._ring) >= RING:
            if event.kind == "log":
                self._give_up(event.root, payload)
                return True
            kept = deque(one for one in self._ring if one[0] is None)
            for root, log in self._ring:
                if root is not None:
                    self._give_up(root, log)
            self._ring = kept
            if len(kept) >= RING:
                if not self._closing:
                    self._complain_of_waiting()
                    return False
                kept.popleft()
                self.lost += 1
        self._ring.append((event.root if event.kind == "log" else None, payload))
        self._waiting = False
        return True

    def _complain_of_waiting(self) -> None:
        if not self._waiting:
            self._waiting = True
            logger.warning(
                "%s takes no events and %d of them wait in memory; runs of this process pause until there is room.",
                self.home.spool,
                len(self._ring),
            )

    def flush(self, timeout: float, *, patient: bool = True) -> bool:
        """Wait until the store has committed everything recorded so far.

        Parameters
        ----------
        timeout : float
            Seconds to wait at most.
        patient : bool
            Wait for a store that cannot be reached, too.

        Returns
        -------
        bool
            False if the time was too short; what is not committed stays in the spool.
        """
        with self._gate:
            self._retry_at = 0.0
            self._empty_ring()
            self._settle()
            spool, sender, complete = self._spool, self._sender, not self._ring
            target = spool.last if spool is not None else 0
        if spool is None or sender is None:
            return complete and spool is None
        return sender.flush(spool, target, timeout, patient=patient) and complete

    def close(self, timeout: float = EXIT_PATIENCE) -> bool:
        """Send what there is and let go of the spool; an event that comes later opens a new one.

        A database that is not loaded yet is not waited for: reading the spool costs the next command
        less than loading it would cost this one. A server has to be told now, unless it is away:
        the next run from here may come in a year.

        Returns
        -------
        bool
            Whether the store has committed everything.
        """
        deadline = time.monotonic() + timeout
        sender = self._sender
        if self._still is not None:
            self._still()
        with self._gate:
            self._retry_at = 0.0
            self._empty_ring()
            self._settle()
            self._closing = bool(self._ring)  # nobody waits for a disk beyond the end of the process
        if sender is not None:
            if sender.loaded or settings().api_url:
                self.flush(timeout, patient=not settings().api_url)
            sender.stop(max(0.0, deadline - time.monotonic()))
        with self._gate:
            self._retry_at = 0.0
            self._empty_ring()
            spool, ring, retired = self._spool, self._ring, self._retired
            self._begin()
        for old in retired:
            old.close(old.last)
            self._closing = False
        self._report(len(ring))
        if spool is None:
            return not ring
        acknowledged = sender.committed(spool) if sender is not None else 0
        spool.close(acknowledged)
        return acknowledged >= spool.last and not ring

    def _report(self, left: int) -> None:
        if self.dropped_logs:
            logger.warning("There was no room for the log lines of %d events.", self.dropped_logs)
        if self.lost + left:
            logger.error("There was no room on the disk: %d events were lost.", self.lost + left)
        self.dropped_logs = self.lost = 0

    # -- in the threads behind it -----------------------------------------------------------
    def _successor(self, acknowledged: int) -> Spool | None:
        """Give the sender a new spool if the present one is long and entirely committed."""
        with self._gate:
            old = self._spool
            if old is None or old.size < ROTATE or acknowledged < old.last:
                return None
            try:
                self._spool = Spool(self.home.spool)
            except OSError:
                return None
            self._retired.append(old)
        old.retire()
        return self._spool

    def _sync(self) -> None:
        while (spool := self._spool) is not None:
            with contextlib.suppress(OSError):
                spool.sync()
            time.sleep(SYNC_INTERVAL)


def _plain(value: Any, depth: int = 8) -> Any:
    """Make a value packable: odd text, numbers and objects become text."""
    if isinstance(value, dict) and depth:
        return {str(_plain(key, 0)): _plain(one, depth - 1) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)) and depth:
        return [_plain(one, depth - 1) for one in value]
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode()


# -- what else the store is asked ------------------------------------------------------------

_listener: Callable[[Tracker], Callable[[], None]] | None = None


def hear(listener: Callable[[Tracker], Callable[[], None]]) -> None:
    """Call once for each tracker whose store is loaded; the answer ends what it has begun."""
    global _listener
    _listener = listener


# -- the tracker of this process ------------------------------------------------------------

_inherited: list[Sender | None] = []  # never finalised: SQLite must not close a parent's connection
_trackers: weakref.WeakSet[Tracker] = weakref.WeakSet()
_starting = threading.Lock()
_tracker: Tracker | None = None
_unsubscribe: Callable[[], None] | None = None


def start_tracking() -> Tracker:
    """Record every event from now on; later calls return the same tracker.

    Returns
    -------
    Tracker
        One that records nothing if ``PENSTOCK_TRACKING`` is off.
    """
    global _tracker, _unsubscribe
    with _starting:
        if _tracker is None:
            given = settings()
            home = usable_home(given.home) if given.tracking == "on" else Home(given.home)
            if home.warning:
                logger.warning("%s", home.warning)
            _tracker = Tracker(home, durable=given.spool_sync == "power")
            if given.tracking == "on":
                _unsubscribe = bus.subscribe(_tracker.record)
        return _tracker


def stop_tracking(timeout: float = EXIT_PATIENCE) -> bool:
    """Send what there is and record nothing more.

    Returns
    -------
    bool
        Whether the store has committed everything; the rest stays in the spool.
    """
    global _tracker, _unsubscribe
    tracker, unsubscribe = _tracker, _unsubscribe
    _tracker = _unsubscribe = None
    if unsubscribe is not None:
        unsubscribe()
    return tracker.close(timeout) if tracker is not None else True


def _after_fork() -> None:
    global _starting
    _starting = threading.Lock()
    for tracker in list(_trackers):
        tracker._after_fork()


def _at_exit() -> None:
    if _tracker is not None:  # still subscribed: what others publish while they close is kept
        _tracker.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
