"""Upkeep of the store: fold everything anew, forget old runs, begin again.

A run is forgotten as a whole, with its events, in a transaction of its own, and only after it has
ended. All functions want the lock of the writer on SQLite; see `penstock.api.embedded.writing`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from penstock.api import db
from penstock.api.db import Database
from penstock.api.fold import Fold
from penstock.api.ingest import read
from penstock.api.models import (
    ACCEPTED,
    FINAL,
    dropped_lines,
    events,
    flow_runs,
    leases,
    maps,
    requests,
    task_runs,
    upkeep,
    writers,
)

DAY = 86400.0
PAGE = 5000  # events folded at a time
ROOTS = 500  # looked for at a time

__all__ = ["DAY", "Pruned", "give_back_space", "is_damaged", "prune", "rebuild", "reset", "retain", "upgrade"]

_FOLDED = (flow_runs, task_runs, maps, dropped_lines)
_PRUNED = "prune"
_DONE = db.Upsert(upkeep, ["name", "done"], replace="done")


# -- schema ---------------------------------------------------------------------------------


def upgrade(database: Database) -> tuple[str | None, str]:
    """Bring the tables to the present schema, wherever the database is.

    Returns
    -------
    tuple of str
        The schema before and after; before is None where there were no tables.

    Raises
    ------
    ConfigurationError
        If a newer penstock has written the database.
    """
    with database.engine.connect() as connection:
        before = db.schema_version(connection)
        if before != db.REVISIONS[-1] and db.has_tables(connection):
            db.upgrade(connection)
    database.prepare()
    return before, db.REVISIONS[-1]


# -- rebuild --------------------------------------------------------------------------------


def rebuild(database: Database) -> int:
    """Fold all events anew into the current state of every run, in one transaction.

    The verdicts that were given when the events came stay as they are, so the outcome is what was
    there before.

    Returns
    -------
    int
        How many events were folded.
    """
    count = 0
    with database.write(alone=True) as connection:
        for table in _FOLDED:
            connection.execute(table.delete())
        # What was asked for is no event, only what came of it.
        connection.execute(requests.delete().where(requests.c.made.is_(None)))
        connection.execute(requests.update().values(settled=None, outcome=None))
        for page in _pages(connection):
            fold = Fold()
            for payload in page:
                event = read(payload)
                if event is not None:
                    with contextlib.suppress(Exception):  # from before this kind's body was what it is now
                        fold.add(event)
            for name, upsert, rows in fold.writes():
                database.upsert(connection, name, upsert, rows)
            count += len(page)
    return count


def _pages(connection: sa.Connection) -> Iterator[list[bytes]]:
    place = (0, 0)
    column = events.c
    while True:
        later = sa.tuple_(column.writer, column.seq) > sa.tuple_(*map(sa.literal, place))
        query = sa.select(column.writer, column.seq, column.verdict, column.data).where(later)
        rows = connection.execute(query.order_by(column.writer, column.seq).limit(PAGE)).all()
        if not rows:
            return
        yield [row.data for row in rows if row.verdict == ACCEPTED]
        place = (rows[-1].writer, rows[-1].seq)


# -- prune ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Pruned:
    """What was forgotten.

    Attributes
    ----------
    runs : int
        Root runs.
    finished : bool
        Whether nothing older is left.
    """

    runs: int = 0
    finished: bool = False


def prune(database: Database, before: float, *, seconds: float | None = None) -> Pruned:
    """Forget the root runs that ended before a moment, with all that is in them.

    Parameters
    ----------
    database : Database
        The store.
    before : float
        Seconds since 1970. A run that has not ended is kept, however old it is.
    seconds : float, optional
        Stop after so long; what is left is for the next time.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    done = Pruned()
    while roots := _ended(database, before):
        for root in roots:
            if deadline is not None and time.monotonic() > deadline:
                return done
            done.runs += _forget(database, root, before)
    with database.write() as connection:
        theirs = sa.select(events.c.writer).where(events.c.writer == writers.c.number)
        connection.execute(writers.delete().where(writers.c.seen < before, ~theirs.exists()))
    done.finished = True
    return done


def _ended(database: Database, before: float, *roots: str) -> list[str]:
    with database.write() as connection:
        return _old_roots(connection, before, *roots)


def _old_roots(connection: sa.Connection, before: float, *roots: str) -> list[str]:
    flow, task = flow_runs.c, task_runs.c
    ended = (flow.state_type.in_(FINAL), flow.state_time < before, ~_heard_of(flow.root, before))
    flows = sa.select(flow.root).where(flow.id == flow.root, *ended, *_among(flow.root, roots)).limit(ROOTS)
    found = list(connection.execute(flows).scalars())
    if found:
        return found
    # Tasks and maps outside of flows: all of their elements have to have ended.
    lasting = sa.func.max(sa.case((task.state_type.in_(FINAL), 0), else_=1))
    alone = sa.select(task.root).where(
        task.flow_run.is_(None), ~sa.exists().where(flow.root == task.root), *_among(task.root, roots)
    )
    alone = alone.group_by(task.root).having(lasting == 0, sa.func.max(task.state_time) < before)
    old = alone.subquery()
    return list(
        connection.execute(sa.select(old.c.root).where(~_heard_of(old.c.root, before)).limit(ROOTS)).scalars()
    )


def _heard_of(root: sa.ColumnElement[str], since: float) -> sa.Exists:
    """Tell whether whoever wrote about a run was heard of since, by our own clock.

    The clock of a driver may have been wrong by years, and its run must not vanish as it arrives.
    """
    about = sa.select(events.c.seq).join(writers, writers.c.number == events.c.writer)
    return about.where(events.c.root == root, writers.c.seen >= since).exists()


def _among(column: sa.ColumnElement[str], roots: tuple[str, ...]) -> list[sa.ColumnElement[bool]]:
    return [column.in_(roots)] if roots else []


def _forget(database: Database, root: str, before: float) -> int:
    with database.write() as connection:
        database.lock_roots(connection, [root])
        if root not in _old_roots(connection, before, root):
            return 0  # it was resumed a moment ago
        flows = sa.select(flow_runs.c.id).where(flow_runs.c.root == root)
        # By the index on flow runs; a task run of another root is never in a flow run of this one.
        connection.execute(task_runs.delete().where(task_runs.c.flow_run.in_(flows)))
        outside = task_runs.c.flow_run.is_(None)
        connection.execute(task_runs.delete().where(outside, task_runs.c.root == root))
        connection.execute(maps.delete().where(maps.c.flow_run.in_(flows)))
        connection.execute(maps.delete().where(maps.c.flow_run.is_(None), maps.c.root == root))
        for table in (events, leases, requests, dropped_lines, flow_runs):
            connection.execute(table.delete().where(table.c.root == root))
    return 1


def give_back_space(database: Database, *, thoroughly: bool = False) -> None:
    """Give the pages of what was forgotten back to the file system; PostgreSQL does so by itself.

    Parameters
    ----------
    thoroughly : bool
        Rewrite the file if it was made by a penstock that could not do it page by page; that takes
        as much room again, for a moment.
    """
    if not database.is_sqlite:
        return
    raw = database.raw_writer()
    (mode,) = raw.execute("PRAGMA auto_vacuum").fetchone()
    if mode == 2:
        raw.executescript("PRAGMA incremental_vacuum")  # `execute` would stop after the first page
    elif thoroughly:
        raw.execute("PRAGMA auto_vacuum = INCREMENTAL")
        raw.execute("VACUUM")
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def retain(database: Database, days: float | None, *, seconds: float) -> Pruned | None:
    """Forget runs older than the retention, at most once a day.

    Parameters
    ----------
    database : Database
        The store.
    days : float, optional
        How long runs are kept after their end; None: for ever.
    seconds : float
        Stop after so long; the next call goes on.

    Returns
    -------
    Pruned or None
        None if it was not due.
    """
    now = time.time()
    if days is None:
        return None
    with database.write() as connection:
        last = connection.execute(sa.select(upkeep.c.done).where(upkeep.c.name == _PRUNED)).scalar()
    if last is not None and 0 <= now - last < DAY:  # a date in the future: the clock was wrong then
        return None
    done = prune(database, now - days * DAY, seconds=seconds)
    if done.runs:
        give_back_space(database)
    if done.finished:
        with database.write() as connection:
            database.upsert(connection, _PRUNED, _DONE, [(_PRUNED, now)])
    return done


# -- reset ----------------------------------------------------------------------------------


def reset(database: Database) -> Path | None:
    """Empty the store: every run is forgotten.

    Returns
    -------
    Path or None
        Where the old file is, if it was damaged: then it is set aside and not removed.
    """
    if not database.is_sqlite or database.path is None:
        db.recreate(database)
        return None
    aside = None
    if is_damaged(database):
        aside = database.path.with_name(f"{database.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    database.close()
    for ending in ("", "-wal", "-shm"):
        path = database.path.with_name(database.path.name + ending)
        with contextlib.suppress(FileNotFoundError):
            if aside is not None:
                os.replace(path, aside.with_name(aside.name + ending))
            else:
                path.unlink()
    database.prepare()
    return aside


def is_damaged(database: Database) -> bool:
    """Whether the file of a SQLite store can no longer be read in full."""
    try:
        with database.read() as connection:
            return connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok"
    except sa.exc.DatabaseError as error:
        return not isinstance(error, sa.exc.OperationalError)
