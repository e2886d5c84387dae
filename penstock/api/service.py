"""What a server is besides its routes: the home that it holds, the database, the thread that writes."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from penstock.api.embedded import EmbeddedStore
from penstock.api.local_runs import LocalRuns
from penstock.api.note import is_alive, read_note, take_lock
from penstock.api.refusals import refusal
from penstock.api.writer import Writer
from penstock.engine.home import network_type
from penstock.engine.spool import FileLock
from penstock.errors import ConfigurationError

__all__ = ["Service"]

logger = logging.getLogger("penstock.server")

PATIENCE = 5.0  # seconds for drivers, which hold the lock for moments only
STATEMENT_SECONDS = 5.0
STEPS = 20_000  # of SQLite's machine between two looks at the clock
ROUND = 0.5  # seconds for the spools before drivers elsewhere get their turn
CHORES = 5.0  # seconds between two rounds of the reaper


class Service:
    """The store of a home, held by one server.

    Parameters
    ----------
    home : Path
        Its spools are swept, its database is served.

    Raises
    ------
    ConfigurationError
        If another server has the home, or it cannot hold a database.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started = time.time()
        self.swept = 0.0
        self.streams = 0
        self.local_runs: LocalRuns | None = None  # where nobody has allowed it, no run is started
        self.stopping = threading.Event()
        self.store = EmbeddedStore(home, serves=True)
        self.database = self.store.database
        self._lock = self._take()
        self._chores: list[Callable[[], Any]] = []
        self._chores_done = time.monotonic()
        self.chore(self.store.reap)
        self.chore(self.store._retain)
        self.writer = Writer(self.database, self._turn)

    def _take(self) -> FileLock:
        kind = network_type(self.home) if self.database.path is not None else ""
        if kind:
            raise ConfigurationError(
                f"PENSTOCK_HOME {self.home} is on a network file system ({kind}), where a SQLite store is not safe: "
                "set PENSTOCK_HOME to a local directory, or PENSTOCK_DATABASE_URL to a PostgreSQL database."
            )
        with contextlib.suppress(OSError):
            (self.home / "spool").mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._take_lock(0.0)
        if lock is None:
            other = read_note(self.home)
            if other is not None and is_alive(other["pid"]):
                raise ConfigurationError(
                    f"A penstock server with pid {other['pid']} serves {self.home} at {other['url']} already."
                )
            lock = self._take_lock(PATIENCE)
        if lock is None:
            raise ConfigurationError(
                f"Another process writes to the store in {self.home} all the time; `penstock server status` may "
                "name it."
            )
        return lock

    def _take_lock(self, patience: float) -> FileLock | None:
        try:
            return take_lock(self.store._lock_path, patience)
        except OSError as error:
            raise ConfigurationError(f"The store cannot be written to: {error}.") from error

    def chore(self, work: Callable[[], Any]) -> None:
        """Do something every five seconds, in the thread that writes."""
        self._chores.append(work)

    def sweep(self) -> None:
        """Commit everything that is in the spools of this home; in the thread that writes."""
        self.store._sweep(None)

    def prepare(self) -> None:
        """Make the tables.

        Raises
        ------
        ConfigurationError, StoreUnavailable, StoreDamaged
            If the database takes nothing: one sentence, and no traceback of a server that did not start.
        """
        try:
            self.database.prepare()
        except sa.exc.SQLAlchemyError as error:
            raise refusal(self.database, error) from error

    def start(self) -> None:
        """Make the tables and begin to write."""
        self.prepare()
        self.writer.start()

    def _turn(self) -> None:
        self.store._sweep(time.monotonic() + ROUND)
        self.swept = time.monotonic()
        if time.monotonic() - self._chores_done >= CHORES:
            self._chores_done = time.monotonic()
            for work in self._chores:
                work()

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a connection for one question, which may take five seconds."""
        with self.database.read() as connection:
            if connection.dialect.name == "sqlite":
                raw = connection.connection.driver_connection
                assert isinstance(raw, sqlite3.Connection)
                deadline = time.monotonic() + STATEMENT_SECONDS
                raw.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
            elif connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(STATEMENT_SECONDS * 1000)}")
            yield connection

    def close(self) -> None:
        """Commit what waits, and give the home back."""
        self.stopping.set()
        self.writer.close()
        self.store.close()
        self._lock.release()
