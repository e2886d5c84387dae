"""What a root flow run did so far, for a driver that goes on with it."""

from __future__ import annotations

from typing import Any

import msgpack
import sqlalchemy as sa

from penstock.api.ingest import read
from penstock.api.leases import find
from penstock.api.models import ACCEPTED, events, flow_runs, maps, task_runs
from penstock.api.rows import decoded, select, select_one

_TASK = (
    "id",
    "flow_run",
    "parent",
    "task",
    "parameters",
    "upstream",
    "child_flow_run",
    "made",
    "attempt",
    "stored",
)
_MAP = ("id", "flow_run", "parent", "task", "upstream", "upstream_maps", "made")


def get_past(connection: sa.Connection, root: str) -> dict[str, Any] | None:
    """Return what a driver has to know to go on with a run; None if there is no such root flow run.

    Parameters
    ----------
    connection : Connection
        Of the store.
    root : str
        A root flow run.

    Returns
    -------
    dict
        ``id, run_name, created, attempt, epoch, rank, type, host, pid, entry``, and ``tasks``,
        ``maps`` and ``flows``: calls with ``id, flow_run`` (that made it), ``parent`` (the task run
        that made it), ``task`` (what was called), ``made`` (their order), ``over`` (an attempt of the
        flow run made it that has ended, and another one has begun). Tasks have ``type, name, attempt,
        parameters, upstream, stored``, flows ``parameters``; ``beside``: not the code of the flow made it,
        but another thread or asyncio task; maps have columns ``types, names, attempts, places``.
    """
    run = select_one(connection, sa.select(flow_runs).where(flow_runs.c.id == root, flow_runs.c.root == root))
    if run is None:
        return None
    lease = find(connection, [root]).get(root)
    within = sa.select(flow_runs).where(flow_runs.c.root == root, flow_runs.c.id != root)
    nested = [dict(row._mapping) for row in connection.execute(within)]  # as they are, see `_calls_of`
    found = {
        "id": root,
        "run_name": run["name"],
        "created": run["created"],
        "attempt": run["attempt"],
        "epoch": max(run["epoch"], lease.epoch if lease is not None else 1),
        "rank": run["rank"],
        "type": run["state_type"],
        "host": run["host"],
        "pid": run["pid"],
        "entry": entry_of(connection, root),
        "tasks": [],
        "maps": [],
        "flows": [],
    }
    stand_ins: dict[str, dict[str, Any]] = {}
    begun = {flow_run: _retried(connection, flow_run) for flow_run in [root, *(row["id"] for row in nested)]}
    for flow_run in begun:
        _calls_of(connection, flow_run, found, stand_ins)
    made = {row["id"] for row in nested}
    for row_id, one in stand_ins.items():
        if one["child_flow_run"] not in made:  # its driver died before it had made the flow run itself
            known = {name: one[name] for name in ("flow_run", "task", "made", "parent", "run_name")}
            found["flows"].append(
                {**known, "id": one["child_flow_run"], "row": row_id, "attempt": 0, "type": "PENDING"}
            )
    for row in nested:
        around = stand_ins.get(row["parent_task_run"], {}).get("parent")
        call = {
            "id": row["id"],
            "flow_run": row["parent_flow_run"],
            "task": row["flow"],
            "made": row["made"] or 0,
            "attempt": row["attempt"],
            "type": row["state_type"],
            "parameters": decoded(row)["parameters"],
        }
        found["flows"].append(
            {**call, "parent": around, "row": row["parent_task_run"], "run_name": row["name"]}
        )
    beside = _beside(connection, root)
    for call in [*found["tasks"], *found["maps"], *found["flows"]]:
        call["beside"] = call.get("row", call["id"]) in beside
        call["over"] = call["made"] < begun.get(call["flow_run"], 0)
    return found


def _beside(connection: sa.Connection, root: str) -> set[str]:
    """Return the task runs and maps that other threads or asyncio tasks made than those of their flows' code."""
    column = events.c
    query = sa.select(column.data).where(column.root == root, column.kind.in_(("task_run", "map_run")))
    found = set()
    for row in connection.execute(query):
        if _BESIDE in row.data:  # few have it: the others are not unpacked
            event = read(row.data)
            if event is not None and event.body.get("beside"):
                found.add(event.run)
    return found


_BESIDE = msgpack.packb("beside")


def _retried(connection: sa.Connection, flow_run: str) -> int:
    """Return when a flow run was last tried again by its driver, as the order key of its calls; 0 if never."""
    column = events.c
    query = sa.select(column.data).where(
        column.run == flow_run, column.kind == "state", column.verdict == ACCEPTED
    )
    for row in connection.execute(query.order_by(column.epoch.desc(), column.rseq.desc())):
        event = read(row.data)
        if event is not None and event.body.get("name") == "Retrying":
            return event.epoch << 40 | event.rseq
    return 0


def _calls_of(
    connection: sa.Connection, flow_run: str, found: dict[str, Any], stand_ins: dict[str, dict[str, Any]]
) -> None:
    # The states as they are: who takes the run decides what becomes of those that a dead driver left.
    result = connection.execute(sa.select(task_runs).where(task_runs.c.flow_run == flow_run))
    rows = [decoded(dict(row._mapping)) for row in result]
    pieces = select(connection, sa.select(maps).where(maps.c.flow_run == flow_run).order_by(maps.c.start))
    by_map: dict[str, dict[str, Any]] = {}
    for piece in map(decoded, pieces):
        call = by_map.setdefault(piece["id"], {name: piece[name] for name in _MAP})
        call["count"] = piece["start"] + piece["count"]
    for call in by_map.values():
        count = call["count"]
        call |= {"types": ["PENDING"] * count, "names": ["Pending"] * count, "attempts": [0] * count}
        call["places"] = [None] * count
    for row in rows:
        if row["map"] is None:
            call = {name: row[name] for name in _TASK}
            call |= {"made": row["made"] or 0, "type": row["state_type"], "name": row["state_name"]}
            if row["child_flow_run"] is not None:
                stand_ins[row["id"]] = {**call, "run_name": row["name"]}
            else:
                found["tasks"].append(call)
        elif row["map"] in by_map and row["element"] < by_map[row["map"]]["count"]:
            call, number = by_map[row["map"]], row["element"]
            call["types"][number], call["names"][number] = row["state_type"], row["state_name"]
            call["attempts"][number], call["places"][number] = row["attempt"], row["stored"]
    found["maps"] += by_map.values()


def entry_of(connection: sa.Connection, root: str) -> dict[str, Any]:
    """Return how a root flow run was started, as `penstock.engine.entry` described it; empty if nothing is known."""
    query = sa.select(events.c.data, events.c.epoch).where(events.c.run == root, events.c.kind == "flow_run")
    for row in connection.execute(query.order_by(events.c.epoch.desc())):
        event = read(row.data)
        if event is not None and event.body.get("entry"):
            return dict(event.body["entry"])
    return {}
