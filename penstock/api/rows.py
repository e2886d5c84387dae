"""Rows of the store as dictionaries that can be written as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api.models import FINAL, PRESUMED, dropped_lines, flow_runs, maps, task_runs
from penstock.engine.events import element_id

Row = dict[str, Any]
"""A row as it is in its table."""

Shown = dict[str, Any]
"""A run as `penstock.api.queries` describes it."""

MANY = 500  # values in one IN list

_JSON = (("tags", list), ("parameters", dict), ("upstream", list), ("upstream_maps", list), ("backend", dict))
_STATE = (
    ("type", "state_type"),
    ("name", "state_name"),
    ("message", "message"),
    ("cause", "cause"),
    ("time", "state_time"),
)
_ERROR = (("type", "error_type"), ("message", "error_message"), ("text", "error_text"))
_HIDDEN = ("made", "backend_order", "epoch", "rank", "rseq", *(column for _, column in _STATE))


def select(connection: sa.Connection, query: sa.Select[Any]) -> list[Row]:
    """Return the rows that a query finds; runs that a dead driver left are shown Crashed."""
    result = connection.execute(query)
    names = list(result.keys())
    rows = [dict(zip(names, row, strict=True)) for row in result]
    if "root" in names and "state_type" in names:
        _show_abandoned(connection, rows)
    return rows


# -- runs whose driver is dead --------------------------------------------------------------

ABANDONED = sa.select(flow_runs.c.id).where(flow_runs.c.rank == PRESUMED)
"""Root flow runs whose driver is presumed dead, and that nobody has taken."""


def shown_type(table: sa.Table) -> sa.ColumnElement[str]:
    """Return the type of state that a flow or task run is shown in."""
    column = table.c.state_type
    left = sa.and_(column.not_in(FINAL), table.c.root.in_(ABANDONED))
    return sa.case((left, sa.literal_column("'CRASHED'")), else_=column)


def in_state(table: sa.Table, states: Sequence[str]) -> sa.ColumnElement[bool]:
    """Return the condition that a flow or task run is shown in one of some types of state."""
    types = [state.upper() for state in states]
    column = table.c.state_type
    left = sa.and_(column.not_in(FINAL), table.c.root.in_(ABANDONED))
    shown = sa.and_(column.in_(types), sa.not_(left))
    return sa.or_(shown, left) if "CRASHED" in types else shown


def abandoned(connection: sa.Connection, flows: Sequence[str]) -> set[str]:
    """Return those of some flow runs whose driver is presumed dead."""
    query = sa.select(flow_runs.c.id).where(flow_runs.c.root.in_(ABANDONED))
    found: set[str] = set()
    for start in range(0, len(flows), MANY):
        some = query.where(flow_runs.c.id.in_(flows[start : start + MANY]))
        found.update(connection.execute(some).scalars())
    return found


def _show_abandoned(connection: sa.Connection, rows: Sequence[Row]) -> None:
    open_ones = [row for row in rows if row["state_type"] not in FINAL]
    roots = sorted({row["root"] for row in open_ones})
    reasons: dict[str, Any] = {}
    for start in range(0, len(roots), MANY):
        query = sa.select(flow_runs.c.id, flow_runs.c.message, flow_runs.c.state_time, flow_runs.c.cause)
        some = query.where(flow_runs.c.rank == PRESUMED, flow_runs.c.id.in_(roots[start : start + MANY]))
        reasons |= {row.id: row for row in connection.execute(some)}
    for row in open_ones if reasons else ():
        reason = reasons.get(row["root"])
        if reason is not None:
            shown = {"state_type": "CRASHED", "state_name": "Crashed", "cause": reason.cause}
            shown |= {"message": reason.message, "state_time": reason.state_time}
            row.update({name: value for name, value in shown.items() if name in row})


def select_one(connection: sa.Connection, query: sa.Select[Any]) -> Row | None:
    """Return the first row that a query finds."""
    rows = select(connection, query)
    return rows[0] if rows else None


def select_tasks(connection: sa.Connection, ids: Sequence[str]) -> list[Row]:
    """Return task runs by their ids, in no order."""
    rows: list[Row] = []
    for start in range(0, len(ids), MANY):
        rows += select(connection, sa.select(task_runs).where(task_runs.c.id.in_(ids[start : start + MANY])))
    return rows


def names_of(connection: sa.Connection, ids: Sequence[str]) -> dict[str, str]:
    """Return the names of flow and task runs by their ids."""
    names: dict[str, str] = {}
    for start in range(0, len(ids), MANY):
        for table in (flow_runs, task_runs):
            query = sa.select(table.c.id, table.c.name).where(table.c.id.in_(ids[start : start + MANY]))
            names |= {row["id"]: row["name"] for row in select(connection, query)}
    return names


def decoded(row: Row) -> Row:
    """Return a row with its JSON columns read."""
    raw = dict(row)
    for name, empty in _JSON:
        if name in raw:
            text = raw[name]
            raw[name] = json.loads(text) if text else empty()
    return raw


def show(kind: str, row: Row) -> Shown:
    """Return a flow or task run as it is shown."""
    raw = decoded(row)
    state = {name: raw[column] for name, column in _STATE}
    error = {name: raw.pop(column) for name, column in _ERROR}
    for column in _HIDDEN:
        raw.pop(column, None)
    seconds, started = raw["seconds"], raw["started"]
    ended = state["time"] if state["type"] in FINAL else None
    if ended is not None and seconds is None and started is not None:
        seconds = max(0.0, ended - started)
    if ended is not None and started is None and seconds is not None:
        started = ended - seconds
    known = {"state": state, "error": error if error["type"] or error["message"] else None}
    return {"kind": kind, **raw, **known, "started": started, "ended": ended, "seconds": seconds}


def edge(parameter: str, run: str) -> Shown:
    """Return a dependency as it is shown."""
    return {"parameter": parameter, "run": run}


def show_task(row: Row, piece: Row | None) -> Shown:
    """Return a task run as it is shown, with what it shares with the other elements of its map."""
    shown = show("task", row)
    edges = [edge(*one) for one in shown["upstream"]]
    if piece is not None:
        shared = decoded(piece)
        shown["parameters"] = shown["parameters"] or shared["parameters"]
        edges += [edge(*one) for one in shared["upstream"]]
        for parameter, map_id, offset in shared["upstream_maps"]:
            edges.append(edge(parameter, element_id(map_id, shown["element"] + offset)))
    return {**shown, "upstream": edges}


def piece_of(connection: sa.Connection, row: Row) -> Row | None:
    """Return the row of `maps` that holds an element; None if the run is none."""
    if row["map"] is None:
        return None
    holds = (maps.c.start <= row["element"], maps.c.start + maps.c["count"] > row["element"])
    return select_one(connection, sa.select(maps).where(maps.c.id == row["map"], *holds))


def count_tasks(connection: sa.Connection, flows: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return for flow runs how many task runs they have in each type of state."""
    found: dict[str, dict[str, int]] = {}
    column = task_runs.c
    for start in range(0, len(flows), MANY):
        query = sa.select(column.flow_run, column.state_type, sa.func.count())
        query = query.where(column.flow_run.in_(flows[start : start + MANY]))
        for flow_run, state, count in connection.execute(query.group_by(column.flow_run, column.state_type)):
            found.setdefault(flow_run, {})[state] = count
    left = [flow for flow, counts in found.items() if not counts.keys() <= FINAL]
    for flow in abandoned(connection, left):
        counts = found[flow]
        over = sum(counts.pop(state) for state in list(counts) if state not in FINAL)
        counts["CRASHED"] = counts.get("CRASHED", 0) + over
    return found


def count_dropped_lines(connection: sa.Connection, root: str) -> int:
    """Return how many log lines of a root run, and of all runs in it, were not kept."""
    query = sa.select(dropped_lines.c.lines).where(dropped_lines.c.root == root)
    return connection.execute(query).scalar() or 0
