"""Flows, flow runs, task runs and maps as lists: filtered, sorted, a page at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

import sqlalchemy as sa

from penstock.api.models import flow_runs, maps, task_runs
from penstock.api.paging import Order, read_page
from penstock.api.rows import (
    MANY,
    Row,
    Shown,
    count_tasks,
    decoded,
    edge,
    in_state,
    select,
    show,
    show_task,
    shown_type,
)
from penstock.engine.events import element_id

__all__ = [
    "FlowOrder",
    "FlowRunOrder",
    "MapOrder",
    "TaskRunOrder",
    "list_flows",
    "list_maps",
    "page_flow_runs",
    "page_task_runs",
]

Listed = tuple[list[Shown], str | None]
"""Some of a list, and the cursor that continues it."""

SPANS = 1000
"""Ranges of elements that are shown of one map in one state."""


class FlowOrder(str, Enum):
    """How flows can be sorted."""

    NAME = "name"
    LATEST = "latest"
    RUNS = "runs"


class FlowRunOrder(str, Enum):
    """How flow runs can be sorted."""

    NEWEST = "newest"
    OLDEST = "oldest"
    NAME = "name"
    LONGEST = "longest"
    LATEST_END = "latest_end"


class TaskRunOrder(str, Enum):
    """How task runs can be sorted."""

    NEWEST = "newest"
    OLDEST = "oldest"
    NAME = "name"
    LONGEST = "longest"
    LARGEST = "largest"
    LATEST_END = "latest_end"


class MapOrder(str, Enum):
    """How maps can be sorted."""

    NEWEST = "newest"
    OLDEST = "oldest"


def _orders(table: sa.Table) -> dict[str, tuple[str, Order]]:
    column = table.c
    found = {
        "newest": ("id", Order(column.id, falling=True, empty="")),
        "oldest": ("id", Order(column.id, empty="")),
        "name": ("name", Order(column.name, empty="")),
    }
    if "seconds" in column:
        found["longest"] = ("seconds", Order(column.seconds, falling=True, empty=-1.0))
        found["latest_end"] = ("state_time", Order(column.state_time, falling=True, empty=0.0))
    if "nbytes" in column:
        found["largest"] = ("nbytes", Order(column.nbytes, falling=True, empty=-1))
    return found


_FLOW_RUNS, _TASK_RUNS, _MAPS = _orders(flow_runs), _orders(task_runs), _orders(maps)


# -- flows ----------------------------------------------------------------------------------


def list_flows(
    connection: sa.Connection,
    *,
    name: str | None = None,
    order: FlowOrder = FlowOrder.LATEST,
    cursor: str | None = None,
    limit: int = 200,
) -> Listed:
    """List flows by name, with how many runs each has and in which states they are.

    Parameters
    ----------
    connection : Connection
        Of the store.
    name : str, optional
        Part of the name.
    order : FlowOrder
        How to sort.
    cursor : str, optional
        Of the page before.
    limit : int
        At most so many.

    Returns
    -------
    list of dict, str or None
        ``{name, runs, latest, states}`` each; the cursor of the next page.
    """
    column = flow_runs.c
    grouped = sa.select(
        column.flow.label("name"), sa.func.count().label("runs"), sa.func.max(column.created).label("latest")
    )
    grouped = grouped.where(column.flow.is_not(None))
    if name is not None:
        grouped = grouped.where(column.flow.contains(name, autoescape=True))
    flows = grouped.group_by(column.flow).subquery()
    by = {
        FlowOrder.NAME: Order(flows.c.name, empty=""),
        FlowOrder.LATEST: Order(flows.c.latest, falling=True),
        FlowOrder.RUNS: Order(flows.c.runs, falling=True, empty=0),
    }[order]
    page = read_page(
        connection, sa.select(flows), [flows.c.name], by, cursor, limit, lambda row: row[order.value]
    )
    states = _states_of_flows(connection, [row["name"] for row in page.rows])
    return [{**row, "states": states.get(row["name"], {})} for row in page.rows], page.following


def _states_of_flows(connection: sa.Connection, names: Sequence[str]) -> dict[str, dict[str, int]]:
    column, found = flow_runs.c, dict[str, dict[str, int]]()
    for start in range(0, len(names), MANY):
        kind = shown_type(flow_runs).label("kind")
        query = sa.select(column.flow, kind, sa.func.count())
        query = query.where(column.flow.in_(names[start : start + MANY]))
        for flow, state, count in connection.execute(query.group_by(column.flow, kind)):
            found.setdefault(flow, {})[state] = count
    return found


# -- runs -----------------------------------------------------------------------------------


def page_flow_runs(
    connection: sa.Connection,
    *,
    flow: str | None = None,
    name: str | None = None,
    states: Sequence[str] = (),
    tag: str | None = None,
    root: str | None = None,
    parent: str | None = None,
    nested: bool = False,
    created_after: float | None = None,
    created_before: float | None = None,
    order: FlowRunOrder = FlowRunOrder.NEWEST,
    cursor: str | None = None,
    limit: int = 50,
) -> Listed:
    """List flow runs.

    Parameters
    ----------
    connection : Connection
        Of the store.
    flow, name, tag : str, optional
        Name of the flow, part of the name of the run, one of its tags.
    states : sequence of str
        Types of state.
    root, parent : str, optional
        Ids of the outermost flow run, or of the one directly above.
    nested : bool
        List flow runs within flow runs, too; implied by `root` and `parent`.
    created_after, created_before : float, optional
        Seconds since 1970.
    order : FlowRunOrder
        How to sort.
    cursor : str, optional
        Of the page before.
    limit : int
        At most so many.
    """
    column = flow_runs.c
    query = _common(sa.select(flow_runs), flow_runs, name, states, tag, root, created_after, created_before)
    if flow is not None:
        query = query.where(column.flow == flow)
    if parent is not None:
        query = query.where(column.parent_flow_run == parent)
    elif not nested and root is None:
        query = query.where(column.parent_flow_run.is_(None))
    by, how = _FLOW_RUNS[order.value]
    page = read_page(connection, query, [column.id], how, cursor, limit, lambda row: row[by])
    counts = count_tasks(connection, [row["id"] for row in page.rows])
    return [{**show("flow", row), "tasks": counts.get(row["id"], {})} for row in page.rows], page.following


def page_task_runs(
    connection: sa.Connection,
    *,
    flow_run: str | None = None,
    root: str | None = None,
    parent: str | None = None,
    map_run: str | None = None,
    task: str | None = None,
    name: str | None = None,
    states: Sequence[str] = (),
    tag: str | None = None,
    worker: str | None = None,
    created_after: float | None = None,
    created_before: float | None = None,
    order: TaskRunOrder = TaskRunOrder.OLDEST,
    cursor: str | None = None,
    limit: int = 50,
) -> Listed:
    """List task runs.

    Parameters
    ----------
    connection : Connection
        Of the store.
    flow_run, root, parent, map_run : str, optional
        Ids of the flow run that it belongs to, of the outermost one, of the task run that submitted
        it, of the map that it is an element of.
    task, name, tag : str, optional
        Name of the task, part of the name of the run, one of its tags.
    states : sequence of str
        Types of state.
    worker : str, optional
        Where it ran.
    created_after, created_before : float, optional
        Seconds since 1970; elements of maps have no time of their own.
    order : TaskRunOrder
        How to sort.
    cursor : str, optional
        Of the page before.
    limit : int
        At most so many.
    """
    column = task_runs.c
    query = _common(sa.select(task_runs), task_runs, name, states, tag, root, created_after, created_before)
    exact = {"flow_run": flow_run, "parent": parent, "map": map_run, "task": task, "worker": worker}
    for one, wanted in exact.items():
        if wanted is not None:
            query = query.where(column[one] == wanted)
    by, how = _TASK_RUNS[order.value]
    page = read_page(connection, query, [column.id], how, cursor, limit, lambda row: row[by])
    pieces = _pieces(connection, {row["map"] for row in page.rows if row["map"] is not None})
    return [show_task(row, _piece(pieces, row)) for row in page.rows], page.following


def _common(
    query: sa.Select[Any],
    table: sa.Table,
    name: str | None,
    states: Sequence[str],
    tag: str | None,
    root: str | None,
    after: float | None,
    before: float | None,
) -> sa.Select[Any]:
    column = table.c
    if name is not None:
        query = query.where(column.name.contains(name, autoescape=True))
    if states:
        query = query.where(in_state(table, states))
    if tag is not None:  # tags are a JSON list of texts
        query = query.where(column.tags.contains(json.dumps(tag, ensure_ascii=False), autoescape=True))
    if root is not None:
        query = query.where(column.root == root)
    if after is not None:
        query = query.where(column.created >= after)
    if before is not None:
        query = query.where(column.created < before)
    return query


def _pieces(connection: sa.Connection, ids: set[str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    wanted = sorted(ids)
    for start in range(0, len(wanted), MANY):
        query = sa.select(maps).where(maps.c.id.in_(wanted[start : start + MANY]))
        for row in select(connection, query.order_by(maps.c.start)):
            found.setdefault(row["id"], []).append(row)
    return found


def _piece(pieces: dict[str, list[Row]], row: Row) -> Row | None:
    for piece in pieces.get(row["map"], ()):
        if row["element"] is not None and piece["start"] <= row["element"] < piece["start"] + piece["count"]:
            return piece
    return None


# -- maps -----------------------------------------------------------------------------------


def list_maps(
    connection: sa.Connection,
    *,
    ids: Sequence[str] | None = None,
    flow_run: str | None = None,
    task: str | None = None,
    order: MapOrder = MapOrder.OLDEST,
    cursor: str | None = None,
    limit: int = 50,
) -> Listed:
    """List maps: how many elements are in which state, and which ones, as ranges.

    Parameters
    ----------
    connection : Connection
        Of the store.
    ids : sequence of str, optional
        Only these.
    flow_run, task : str, optional
        Id of the flow run, name of the task.
    order : MapOrder
        How to sort.
    cursor : str, optional
        Of the page before.
    limit : int
        At most so many.

    Returns
    -------
    list of dict, str or None
        ``{kind, id, root, flow_run, parent, task, name, tags, parameters, created, count, states,
        started, ended, seconds, nbytes, peak, upstream, upstream_maps, ranges}`` each. ``states`` has
        counts and ``ranges`` lists of ``[first, last]`` by type of state; the time of all elements
        together is ``seconds``.
    """
    column = maps.c
    unique = sa.select(
        column.id, sa.func.min(column.start).label("first"), sa.func.sum(column["count"]).label("total")
    )
    if ids is not None:
        unique = unique.where(column.id.in_(list(ids)[:MANY]))
    if flow_run is not None:
        unique = unique.where(column.flow_run == flow_run)
    if task is not None:
        unique = unique.where(column.task == task)
    whole = unique.group_by(column.id).subquery()
    query = sa.select(maps, whole.c.total).join(
        whole, sa.and_(column.id == whole.c.id, column.start == whole.c.first)
    )
    by, how = _MAPS[order.value]
    page = read_page(connection, query, [column.id], how, cursor, limit, lambda row: row[by])
    return [_shown_map(connection, row) for row in page.rows], page.following


_SHARED = ("id", "root", "flow_run", "parent", "task", "name", "tags", "parameters", "created")


def _shown_map(connection: sa.Connection, row: Row) -> Shown:
    known, sums = decoded(row), _sums(connection, row["id"])
    offsets = [
        {"parameter": parameter, "map": map_id, "offset": offset}
        for parameter, map_id, offset in known["upstream_maps"]
    ]
    return {
        "kind": "map",
        **{name: known[name] for name in _SHARED},
        "count": int(row["total"]),
        **sums,
        "upstream": [edge(*one) for one in known["upstream"]],
        "upstream_maps": offsets,
        "ranges": _ranges(connection, row["id"]),
    }


def _sums(connection: sa.Connection, map_id: str) -> Shown:
    column, func = task_runs.c, sa.func
    kind = shown_type(task_runs).label("kind")
    query = sa.select(
        kind,
        func.count().label("count"),
        func.min(column.started).label("started"),
        func.max(column.state_time).label("ended"),
        func.sum(column.seconds).label("seconds"),
        func.sum(column.nbytes).label("nbytes"),
        func.max(column.peak).label("peak"),
    ).where(*_elements_of(map_id))
    found: Any = query.group_by(kind)
    rows = select(connection, found)
    started = [row["started"] for row in rows if row["started"] is not None]
    ended = [row["ended"] for row in rows if row["ended"] is not None]
    return {
        "states": {row["kind"]: row["count"] for row in rows},
        "started": min(started, default=None),
        "ended": max(ended, default=None),
        "seconds": sum(float(row["seconds"] or 0) for row in rows),
        "nbytes": sum(int(row["nbytes"] or 0) for row in rows),
        "peak": max((row["peak"] for row in rows if row["peak"] is not None), default=None),
    }


def _elements_of(map_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    """Return what finds the elements of a map; their ids stand together, and begin with the same 17 digits."""
    prefix = element_id(map_id, 0)[:17]
    return (task_runs.c.id >= prefix, task_runs.c.id < f"{prefix}g", task_runs.c.map == map_id)


def _ranges(connection: sa.Connection, map_id: str) -> dict[str, list[list[int]]]:
    """Return which elements are in which state: neighbours in one state have the same distance to their rank."""
    element = task_runs.c.element
    known = sa.select(shown_type(task_runs).label("kind"), element).where(*_elements_of(map_id)).subquery()
    rank = sa.func.row_number().over(partition_by=known.c.kind, order_by=known.c.element)
    ranked = sa.select(known, (known.c.element - rank).label("island")).subquery()
    first, last = sa.func.min(ranked.c.element), sa.func.max(ranked.c.element)
    query = sa.select(ranked.c.kind, first, last).group_by(ranked.c.kind, ranked.c.island)
    found: dict[str, list[list[int]]] = {}
    for state, begin, end in connection.execute(query.order_by(ranked.c.kind, first)):
        spans = found.setdefault(state, [])
        if len(spans) < SPANS:
            spans.append([begin, end])
    return found
