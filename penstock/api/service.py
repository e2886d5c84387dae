"""What a server is besides its routes: the home that it holds, the database, the thread that writes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from penstock.api.embedded import EmbeddedStore
from penstock.api.writer import Writer
from penstock.engine.home import network_type
from penstock.engine.spool import FileLock
from penstock.errors import ConfigurationError
from penstock.settings import settings

__all__ = ["Service", "read_note", "running"]

logger = logging.getLogger("penstock.server")

PATIENCE = 5.0  # seconds for drivers, which hold the lock for moments only
STATEMENT_SECONDS = 5.0
STEPS = 20_000  # of SQLite's machine between two looks at the clock
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
        self.stopping = threading.Event()
        self.store = EmbeddedStore(home)
        self.database = self.store.database
        self._lock = self._take()
        self._chores: list[Callable[[], Any]] = []
        self._chores_done = time.monotonic()
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
        lock = self.store.take_lock(0)
        if lock is None:
            other = read_note(self.home)
            if other is not None and _alive(other["pid"]):
                raise ConfigurationError(
                    f"A penstock server with pid {other['pid']} serves {self.home} at {other['url']} already."
                )
            lock = self.store.take_lock(PATIENCE)
        if lock is None:
            raise ConfigurationError(
                f"Another process writes to the store in {self.home} all the time; `penstock server status` may "
                "name it."
            )
        return lock

    def chore(self, work: Callable[[], Any]) -> None:
        """Do something every five seconds, in the thread that writes."""
        self._chores.append(work)

    def start(self) -> None:
        """Make the tables and begin to write."""
        self.database.prepare()
        self.writer.start()

    def _turn(self) -> None:
        self.store.sweep()
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


# -- the note that a server leaves in its home ----------------------------------------------


def _note(home: Path) -> Path:
    return home / "server.json"


def write_note(home: Path, url: str) -> None:
    """Tell this account where the server is."""
    fresh = home / f".server.json.{os.getpid()}"
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"pid": os.getpid(), "url": url, "started": time.time()}, file)
    fresh.replace(_note(home))


def remove_note(home: Path) -> None:
    """Take the note away, if it is ours."""
    note = read_note(home)
    if note is not None and note["pid"] == os.getpid():
        _note(home).unlink(missing_ok=True)


def read_note(home: Path) -> dict[str, Any] | None:
    """Return ``{pid, url, started}`` of the server that last held a home; None if there is none."""
    try:
        found = json.loads(_note(home).read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "url": str(found["url"]), "started": float(found["started"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def running(home: Path) -> dict[str, Any] | None:
    """Return the note of the server that holds a home now; None if no server does."""
    note = read_note(home)
    if note is None or not _alive(note["pid"]):
        return None
    name = settings().database_url or f"sqlite:///{home / 'penstock.db'}"
    url = sa.make_url(name)
    database = Path(url.database) if url.get_backend_name() == "sqlite" and url.database else home / "store"
    try:
        lock = FileLock.take(database.with_name(f"{database.name}.lock"))
    except OSError:
        return None
    if lock is not None:  # nobody holds the home: the pid is somebody else's by now
        lock.release()
        return None
    return note


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
