"""The store in this process: the database in ``PENSTOCK_HOME``, written by one process at a time.

Whoever has something to commit takes the lock of the writer for a moment and commits what it finds
in *all* spools of the home, also in those of other living processes and of dead ones. A process
that does not get the lock leaves its events in its spool, where the holder finds them. So several
runs and commands share one database without ever meeting in it, and a stopped process stops nobody.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from penstock.api import leases, queries
from penstock.api.commands import COMMANDS
from penstock.api.db import REVISIONS, Database, schema_version
from penstock.api.ingest import acknowledged, ingest
from penstock.api.note import running
from penstock.api.reaper import EVERY, Reaper
from penstock.api.refusals import explain, refusal
from penstock.api.upkeep import retain
from penstock.engine import destination
from penstock.engine.home import usable_home
from penstock.engine.sender import StoreUnusable
from penstock.engine.spool import (
    BATCH_BYTES,
    BATCH_EVENTS,
    Batch,
    FileLock,
    SpoolReader,
    mend,
    remove,
    remove_signs,
    spools,
    take_orphan,
)
from penstock.errors import ConfigurationError, PenstockError, StoreDamaged, StoreUnavailable
from penstock.settings import settings

__all__ = ["EmbeddedStore", "drain", "open_store", "reading", "writing"]

logger = logging.getLogger("penstock.tracking")

SWEEP = 0.5  # seconds between two looks at the spools of other processes
ROUND = 0.5  # seconds after which the lock is given back, so that others get their turn
PATIENCE = 5.0  # seconds that a command waits for the lock
POLL = 0.01
RETAIN = 3600.0  # seconds between two questions whether old runs are due to be forgotten
ORPHANS = 100  # whose locks are held at a time


def open_store(home: Path) -> EmbeddedStore:
    """Open the store of a home."""
    with _refusals():
        return EmbeddedStore(home)


def drain(home: Path | None = None, patience: float = PATIENCE) -> bool:
    """Commit everything that runs on this machine have recorded so far.

    Parameters
    ----------
    home : Path, optional
        Instead of the one in the settings.
    patience : float
        Seconds to wait for another process that is committing.

    Returns
    -------
    bool
        False if the other process was still at it; it commits our events, too.

    Raises
    ------
    ConfigurationError
        If the database cannot be used, for instance because a newer penstock wrote it.
    """
    store = EmbeddedStore(usable_home(settings().home).path if home is None else home)
    with contextlib.closing(store), _explained(store.database):
        return store.drain(patience)


@contextlib.contextmanager
def writing(
    home: Path | None = None, patience: float = PATIENCE, *, prepared: bool = True
) -> Iterator[EmbeddedStore]:
    """Hold the store alone, for its upkeep; see `penstock.api.upkeep`.

    Parameters
    ----------
    home : Path, optional
        Instead of the one in the settings.
    patience : float
        Seconds to wait for another process that is committing.
    prepared : bool
        Commit first what runs on this machine have recorded so far.

    Raises
    ------
    StoreUnavailable
        If another process did not let go of it, or the database takes nothing now.
    ConfigurationError
        If the database cannot be used.
    """
    store = EmbeddedStore(usable_home(settings().home).path if home is None else home)
    with contextlib.closing(store), _explained(store.database), store._locked(patience) as held:
        if not held:
            raise StoreUnavailable(
                f"Another process is writing to the store {store.database.name}; try again."
            )
        if prepared:
            store.database.prepare()
            store._sweep(None)
        yield store


@contextlib.contextmanager
def reading(home: Path | None = None, patience: float = PATIENCE) -> Iterator[sa.Connection]:
    """Open the record for reading, with every run of this machine in it; see `penstock.api.queries`.

    Parameters
    ----------
    home : Path, optional
        Instead of the one in the settings.
    patience : float
        Seconds to wait for another process that is committing.

    Raises
    ------
    ConfigurationError
        If the database cannot be used.
    """
    store = EmbeddedStore(usable_home(settings().home).path if home is None else home)
    with contextlib.closing(store), _explained(store.database):
        drained = _drained(store, patience)
        with store.database.read() as connection:
            if not drained and schema_version(connection) != REVISIONS[-1]:
                raise ConfigurationError(
                    f"Another process is preparing the store in {store.home}; try again."
                )
            yield connection


def _drained(store: EmbeddedStore, patience: float) -> bool:
    try:
        return store.drain(patience)
    except sa.exc.OperationalError as error:
        if store.database.path is None or not store.database.path.exists():
            raise
        logger.warning("%s What is shown may not be the latest.", explain(store.database, error))
        return False


class EmbeddedStore:
    """Commits events of this process, and whatever others left, into the database of a home.

    Parameters
    ----------
    home : Path
        Holds the spools and, by default, the database.
    serves : bool
        It is that of a server: drivers that do not share the home reach it.

    Raises
    ------
    ConfigurationError
        If the URL of the database is wrong.
    """

    def __init__(self, home: Path, *, serves: bool = False) -> None:
        self.home = home
        self.database = Database(settings().database_url or f"sqlite:///{home / 'penstock.db'}")
        beside = self.database.path or home / "store"
        with contextlib.suppress(OSError):  # the lock will say what is wrong
            beside.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_path = beside.with_name(f"{beside.name}.lock")
        self._readers: dict[str, SpoolReader] = {}
        self._own: dict[str, int] = {}  # writers of this process, and what is committed of them
        self._swept = 0.0
        # Drivers elsewhere reach a database server, but a file of ours only through a server.
        self._reaper = Reaper(self.database, home, local=self.database.is_sqlite and not serves)
        self._reaped = 0.0
        self._retain_at = 0.0
        self.destinations = {destination.store()}  # of the spools that are for this store

    # -- the seam ---------------------------------------------------------------------------
    def send(self, batch: Batch) -> int:
        """Commit a batch unless somebody else is committing; return what is committed of its writer."""
        self._own.setdefault(batch.writer, 0)
        with self._locked(0) as held, _refusals(), _explained(self.database):
            if held:
                self._own |= ingest(self.database, [batch])
                if time.monotonic() - self._swept >= SWEEP:
                    removed = self._sweep(time.monotonic() + ROUND, living=self.database.is_sqlite)
                    self._swept = time.monotonic()
                    if removed or self._swept - self._reaped >= EVERY:
                        self.reap()
                    self._retain()
        if not held and (self.database.path is None or self.database.path.exists()):
            # The holder of the lock may be making the tables this very moment.
            with contextlib.suppress(sa.exc.OperationalError), self.database.read() as connection:
                self._own |= acknowledged(connection, [batch.writer])
        return self._own[batch.writer]

    def ask(self, question: Mapping[str, Any]) -> Any:
        """Answer ``{"what": name, …}``: a query of `penstock.api.queries` and its arguments, or of `penstock.api.commands`."""
        details = dict(question)
        if details["what"] in COMMANDS:
            return self._write(**details)
        with self.database.read() as connection:
            return queries.ANSWERS[details.pop("what")](connection, **details)

    def _write(self, what: str, **details: Any) -> Any:
        if what == "beat" and self.database.path is not None:
            # Here the lock on its spool says that a driver lives, so it has nothing to write.
            if not details["roots"] or not self.database.path.exists():
                return {"lost": [], "presumed": [], "requests": []}
            with self.database.read() as connection:
                return leases.beat(connection, **details, write=False)
        note = running(self.home, self._lock_path)
        if note is not None:
            remote = importlib.import_module("penstock.api.remote")
            return remote.ask_note(self.home, note, {"what": what, **details})
        with self._locked(PATIENCE) as held, _explained(self.database):
            if not held:
                raise StoreUnavailable(
                    f"Another process is writing to the store {self.database.name}; try again."
                )
            return COMMANDS[what](self.database, **details)

    def close(self) -> None:
        """Close the database and the spools."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self.database.close()

    def drain(self, patience: float = PATIENCE) -> bool:
        """Commit everything in all spools; False if another process did not let us in time."""
        note = running(self.home, self._lock_path)
        if note is not None:
            remote = importlib.import_module("penstock.api.remote")
            with contextlib.suppress(PenstockError):  # it is starting or stopping
                remote.ask_note(self.home, note, {"what": "sweep"})
                return True
        with self._locked(patience) as held:
            if held:
                self.database.prepare()
                self._sweep(None)
                self.reap()
                self._retain()
        return held

    def reap(self) -> None:
        """Show as Crashed what drivers that died have left; the caller holds the lock."""
        self._reaped = time.monotonic()
        remove_signs(self.home / "spool")
        self._reaper.look()

    def commit_first(self) -> None:
        """Commit what the dead have left, if the database can be used at all; the caller holds the lock."""
        with contextlib.suppress(sa.exc.DBAPIError, ConfigurationError):
            self.database.prepare()
            self._sweep(None)

    @contextlib.contextmanager
    def _locked(self, patience: float) -> Iterator[bool]:
        if not self.database.is_sqlite:  # there the transactions themselves keep out of each other's way
            yield True
            return
        deadline = time.monotonic() + patience
        try:
            while (lock := FileLock.take(self._lock_path, os.O_RDWR | os.O_CREAT)) is None:
                if time.monotonic() >= deadline:
                    break
                time.sleep(POLL)
        except OSError as error:
            raise ConfigurationError(f"The store cannot be written to: {error}.") from error
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    # -- the spools of others ---------------------------------------------------------------
    def _retain(self) -> None:
        """Forget what is older than the retention, if that is due."""
        if time.monotonic() >= self._retain_at:
            done = retain(self.database, settings().retention_days, seconds=ROUND)
            unfinished = done is not None and not done.finished
            self._retain_at = time.monotonic() + (SWEEP if unfinished else RETAIN)
            if done is not None and done.runs:
                logger.info("%d runs older than PENSTOCK_RETENTION were removed from the record.", done.runs)

    def _sweep(self, deadline: float | None, *, living: bool = True) -> bool:
        """Commit what is in the spools of all other writers; remove those of the dead, if there are any.

        `living`: also what is in the spools of processes that live. Where each process has a
        connection of its own that is for commands only, which want to see everything.
        """
        found = spools(self.home / "spool", *self.destinations)
        paths = [path for path in found if path.stem not in self._own]
        for gone in self._readers.keys() - {path.stem for path in paths}:
            self._readers.pop(gone).close()
        if not paths:
            return False
        removed = 0
        harvest = _Harvest(self.database, [path.stem for path in paths], deadline)
        with contextlib.ExitStack() as locks:
            for path in paths:
                if harvest.late:
                    break
                # Before the last look into the file: else its writer could append, and die, in between.
                orphan = take_orphan(path)
                if orphan is not None:
                    locks.callback(orphan.release)
                alive = living and not destination.is_server(destination.read(path))  # these send themselves
                reader = self._reader(path) if alive or orphan is not None else None
                if reader is not None:
                    harvest.gather(path, reader, dead=orphan is not None)
                if len(harvest.dead) >= ORPHANS:
                    removed += self._forget(harvest.commit())
                    locks.close()
            removed += self._forget(harvest.commit())
        return removed > 0

    def _reader(self, path: Path) -> SpoolReader | None:
        if path.stem not in self._readers:
            try:
                self._readers[path.stem] = SpoolReader(path)
            except OSError:
                return None  # finished by somebody else a moment ago
        return self._readers[path.stem]

    def _forget(self, removed: Sequence[str]) -> int:
        for writer in removed:
            self._readers.pop(writer).close()
        self._reaper.dead.update(removed)
        return len(removed)


class _Harvest:
    """Batches of many writers on their way into the database."""

    def __init__(self, database: Database, names: Sequence[str], deadline: float | None) -> None:
        self.database = database
        self.dead: list[tuple[Path, SpoolReader]] = []
        self._deadline = deadline
        with database.write() as connection:
            self._known = acknowledged(connection, names)
        self._batches: list[Batch] = []
        self._readers: dict[str, SpoolReader] = {}
        self._events = self._bytes = 0

    @property
    def late(self) -> bool:
        """Whether it is time to give the lock back."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def gather(self, path: Path, reader: SpoolReader, *, dead: bool) -> None:
        """Read a spool to its present end, committing whenever a transaction is full."""
        try:
            end = path.stat().st_size  # a busy writer would keep us here for ever
        except OSError:
            return
        reader.seek(max(reader.read_to, self._known.get(reader.writer, 0)))
        while (dead or reader.offset < end) and (batch := reader.read()).payloads:
            self._batches.append(batch)
            self._readers[reader.writer] = reader
            self._events += len(batch.payloads)
            self._bytes += sum(map(len, batch.payloads))
            if self._events >= BATCH_EVENTS or self._bytes >= BATCH_BYTES:
                self._ingest()
                if self.late:
                    return
        if dead and not reader.foreign:
            self.dead.append((path, reader))

    def _ingest(self) -> None:
        batches, self._batches = self._batches, []
        readers, self._readers = self._readers, {}
        self._events = self._bytes = 0
        done = ingest(self.database, batches) if batches else {}
        for writer, number in done.items():
            if number != readers[writer].read_to:  # the database is younger than the spool
                readers[writer].seek(number)

    def commit(self) -> list[str]:
        """Commit the rest and remove the spools of dead writers; return whose are gone."""
        self._ingest()
        dead, self.dead = self.dead, []
        removed = []
        for path, reader in dead:
            if reader.read().payloads:
                reader.seek(0)  # not all of it was taken; the next sweep tries again
                continue
            with contextlib.suppress(OSError):
                if mend(path, reader) and reader.damaged:
                    logger.warning(
                        "A spool was damaged; what cannot be read is in %s.", path.with_suffix(".rejected")
                    )
                remove(path)
                removed.append(reader.writer)
        return removed


@contextlib.contextmanager
def _explained(database: Database) -> Iterator[None]:
    """Turn errors of the database into sentences."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise refusal(database, error) from error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (ConfigurationError, StoreDamaged) as error:
        raise StoreUnusable(str(error)) from error
