"""The reaper: runs whose driver is dead are Crashed, and those whose driver is well never are.

What proves death: the driver's spool lies in our home and nobody holds its lock (at once), or,
where runs and store share nothing but a connection, `LEASE` seconds without a sign of life. Only
the store's own presence counts: a reaper that was stopped, or whose clock jumped, grants everybody
a whole lease first. What it writes is a presumption (rank 1): the driver's own last word, should it
come after all, wins as long as nobody else has taken the run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from penstock.api import strays
from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.api.leases import LEASE, NOBODY, Lease, find, free, store_time
from penstock.api.models import PRESUMED, events, flow_runs, writers
from penstock.engine.events import HOST, Event, pack
from penstock.engine.spool import Batch, writer_lives

EVERY = 5.0
"""Seconds between two looks of a server."""
PAUSE = 10.0
"""Seconds without a look after which the reaper trusts no lease that it did not see renewed."""
TOGETHER = 5000
"""Events in one transaction."""


@dataclass(frozen=True, slots=True)
class _Suspect:
    root: str
    lease: Lease | None
    epoch: int
    attempt: int
    rseq: int
    reason: str


class Reaper:
    """Looks for runs whose driver is dead.

    Parameters
    ----------
    database : Database
        The caller holds the lock of its writer, where there is one.
    home : Path, optional
        Whose spools prove life or death.
    local : bool
        All drivers share this home: no lease counts, only proofs. So it is without a server.
    lease : float
        Seconds without a sign of life.

    Attributes
    ----------
    dead : set of str
        Writers whose spools were found without their owners, and removed; forgotten after a look.
    """

    def __init__(
        self, database: Database, home: Path | None = None, *, local: bool = False, lease: float = LEASE
    ) -> None:
        self.database = database
        self._spool = home / "spool" if home is not None else None
        self._local = local
        self._lease = lease
        self._looked: tuple[float, float] | None = None  # by the monotonic clock, by the store's
        self._granted = 0.0
        self.dead: set[str] = set()

    def look(self, now: float | None = None) -> list[str]:
        """Look at all runs that are not over.

        Parameters
        ----------
        now : float, optional
            The store's time, for tests.

        Returns
        -------
        list of str
            Root flow runs that are Crashed now.
        """
        begun = time.monotonic()
        with self.database.read() as connection:
            now = store_time(connection) if now is None else now
            self._grant(begun, now)
            suspects = self._suspects(connection, now)
            left = self._strays(connection, now)
        self.dead.clear()
        if (
            not (suspects or left) or time.monotonic() - begun > PAUSE
        ):  # we were stopped in between: look again
            return []
        with self.database.write() as connection:
            self.database.lock_roots(connection, [one.root for one in suspects])
            dead = [one for one in suspects if free(connection, one.root, one.epoch, one.lease)]
        told = [*(_event(one, now) for one in dead), *left]
        for start in range(0, len(told), TOGETHER):
            packed = [pack(event) for event in told[start : start + TOGETHER]]
            ingest(self.database, [Batch(secrets.token_hex(16), 1, packed)])
        return [one.root for one in dead]

    def _grant(self, begun: float, now: float) -> None:
        before, self._looked = self._looked, (begun, now)
        if (
            before is None
            or begun - before[0] > PAUSE
            or abs((now - before[1]) - (begun - before[0])) > PAUSE
        ):
            self._granted = now

    def _suspects(self, connection: sa.Connection, now: float) -> list[_Suspect]:
        query = sa.select(flow_runs).where(flow_runs.c.rank == 0, flow_runs.c.root == flow_runs.c.id)
        rows = connection.execute(query).all()
        known = find(connection, [row.id for row in rows])
        found = []
        for row in rows:
            lease = known.get(row.id)
            reason = self._verdict(connection, row, lease, now)
            if reason:
                epoch = max(row.epoch, lease.epoch if lease is not None else 1)
                found.append(_Suspect(row.id, lease, epoch, row.attempt, row.rseq, reason))
        return found

    def _verdict(
        self, connection: sa.Connection, row: sa.Row[tuple[object, ...]], lease: Lease | None, now: float
    ) -> str:
        """Return why the driver of a run must be dead; empty if it may live."""
        writer, seen = _writer(connection, row.id)
        if lease is not None and lease.holder != NOBODY:
            writer = lease.holder
        heard = max(lease.renewed if lease is not None else 0.0, seen or row.created or 0.0)
        return self._death(writer, heard, (row.host, row.pid, row.created), now)

    def _strays(self, connection: sa.Connection, now: float) -> list[Event]:
        """Return what is to be said of task runs outside of flows."""
        found: list[Event] = []
        for one in strays.drivers_of_open_runs(connection):
            reason = self._death(one.writer, one.seen, (one.host, one.pid, one.since), now)
            if reason:
                found += strays.presumptions(connection, one, reason, now)
        return found

    def _death(
        self, writer: str, heard: float, process: tuple[str | None, int | None, float | None], now: float
    ) -> str:
        """Return why a driver must be dead; empty if it may live.

        `process`: its host, its number there, and a moment at which it was running.
        """
        host, pid, since = process
        driver = f"its driver (pid {pid} on {host})" if pid else "its driver"
        lives = writer_lives(self._spool, writer) if self._spool is not None and writer else None
        if lives is None and writer in self.dead:
            lives = False
        if lives is not None:
            return "" if lives else f"{driver} died"
        if self._local:
            gone = host == HOST and pid and not _runs(pid, since)
            return f"{driver} died" if gone else ""
        silent = now - max(heard, self._granted)
        return (
            f"{driver} is presumed dead: nothing was heard of it for {now - heard:.0f} s"
            if silent > self._lease
            else ""
        )


def _writer(connection: sa.Connection, root: str) -> tuple[str, float | None]:
    """Return the writer of the event that made a run, and when it was last heard of."""
    query = sa.select(writers.c.writer, writers.c.seen).join(events, events.c.writer == writers.c.number)
    row = connection.execute(query.where(events.c.run == root, events.c.kind == "flow_run").limit(1)).first()
    return (str(row.writer), float(row.seen)) if row is not None else ("", None)


def _event(suspect: _Suspect, now: float) -> Event:
    body = {
        "of": "flow",
        "type": "CRASHED",
        "name": "Crashed",
        "message": suspect.reason,
        "cause": "HeartbeatLost",
        "presumed": True,
    }
    root, order = suspect.root, (suspect.epoch, suspect.attempt, PRESUMED, suspect.rseq)
    return Event("state", root, root, now, body, *order)


def _runs(pid: int, since: float | None) -> bool:
    """Whether a process of this machine runs, and is not a later one with the same number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":
            return False
        boot = next(
            float(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime")
        )
        began = boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return since is None or began < since + 2.0
    return True
