"""Task runs outside of flows whose driver is dead: nobody will ever tell how they ended.

A flow run has a lease of its own (`penstock.api.leases`). Task runs outside of flows are many and
short, so for them the driver as a whole says that it lives: by the lock on its spool, or by the
beats of its writer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from penstock.api.ingest import read
from penstock.api.models import FINAL, PRESUMED, events, flow_runs, task_runs, writers
from penstock.engine.events import Event
from penstock.engine.states import StateType

__all__ = ["Driver", "drivers_of_open_runs", "presumptions"]

OPEN = sorted({str(kind) for kind in StateType} - FINAL)
MADE = ("task_run", "map_run")


@dataclass(frozen=True, slots=True)
class Driver:
    """Who made task runs outside of flows that have not ended.

    Attributes
    ----------
    number : int
        Stands for the writer in the tables.
    writer : str
        Under which it made them.
    seen : float
        When it was last heard of.
    host, pid
        Its process, as far as it told.
    since : float
        When it had been running.
    """

    number: int
    writer: str
    seen: float
    host: str | None
    pid: int | None
    since: float | None


def _open(*columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """Return the query for task runs outside of flows that have not ended, with the event that made their root."""
    run, made = task_runs.c, events.c
    query = sa.select(*columns).select_from(task_runs)
    query = query.join(events, sa.and_(made.run == run.root, made.kind.in_(MADE)))
    return query.where(
        run.flow_run.is_(None),
        run.state_type.in_(OPEN),
        run.made.is_not(None),  # else its flow run is merely not known yet
        ~sa.exists().where(flow_runs.c.id == run.root),
    )


def drivers_of_open_runs(connection: sa.Connection) -> list[Driver]:
    """Return the drivers of all task runs outside of flows that have not ended."""
    first = sa.func.min(events.c.seq).label("seq")  # of the outermost run, which tells where its driver is
    made = _open(events.c.writer, first).group_by(events.c.writer).subquery()
    query = sa.select(writers.c.number, writers.c.writer, writers.c.seen, events.c.data)
    query = query.join(made, made.c.writer == writers.c.number)
    query = query.join(events, sa.and_(events.c.writer == made.c.writer, events.c.seq == made.c.seq))
    return [_driver(*row) for row in connection.execute(query)]


def _driver(number: int, writer: str, seen: float, data: bytes) -> Driver:
    event = read(data)
    host, pid = (event.body.get("host"), event.body.get("pid")) if event is not None else (None, None)
    known = type(host) is str and type(pid) is int and pid > 0
    since = event.time if event is not None else None
    return Driver(number, writer, seen, host if known else None, pid if known else None, since)


def presumptions(connection: sa.Connection, driver: Driver, reason: str, now: float) -> list[Event]:
    """Return the events that say of the open runs of a driver that they died with it."""
    run = task_runs.c
    columns = (run.id, run.root, run.map, run.element, run.epoch, run.attempt)
    rows = connection.execute(_open(*columns).where(events.c.writer == driver.number).distinct())
    found: list[Event] = []
    maps: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
    for row in rows:
        if row.map is None:
            order = (row.epoch, row.attempt, PRESUMED)
            found.append(Event("state", row.id, row.root, now, {"of": "task", **_died(reason)}, *order))
        else:
            maps.setdefault((row.map, row.root, row.epoch), []).append((row.element, row.attempt))
    for (map_id, root, epoch), elements in maps.items():
        body = {
            **_died(reason),
            "index": [one for one, _ in elements],
            "attempt": [one for _, one in elements],
        }
        attempt = max(body["attempt"])
        found.append(Event("states", map_id, root, now, {"of": "task", **body}, epoch, attempt, PRESUMED))
    return found


def _died(reason: str) -> dict[str, Any]:
    state = {"type": "CRASHED", "name": "Crashed", "message": reason, "cause": "HeartbeatLost"}
    return {**state, "presumed": True}
