"""The read side: what happened, as dictionaries that can be written as JSON.

Every function takes a connection from `penstock.api.embedded.reading`. Times are seconds since
1970, durations are seconds, what is unknown is None.

A run is shown as ``{kind, id, root, name, tags, parameters, created, state, attempt, started,
ended, seconds, error, …}``, where ``kind`` is "flow" or "task", ``state`` is ``{type, name,
message, cause, time}`` and ``error`` is ``{type, message, text}`` or None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api.history import get_history, get_logs, names_of
from penstock.api.models import FINAL, flow_runs, maps, task_runs
from penstock.engine.events import element_id

__all__ = [
    "ANSWERS",
    "find_runs",
    "get_history",
    "get_logs",
    "get_run",
    "get_tree",
    "list_runs",
    "list_task_runs",
]

Shown = dict[str, Any]

_JSON = ("tags", "parameters", "upstream", "upstream_maps", "backend")
_STATE = ("type", "name", "message", "cause", "time")
_HIDDEN = {"made", "backend_order", "epoch", "rank", "rseq", "message", "cause"}
_MANY = 500


def list_runs(
    connection: sa.Connection,
    *,
    limit: int = 50,
    before: str | None = None,
    states: Sequence[str] = (),
    flow: str | None = None,
    nested: bool = False,
) -> list[Shown]:
    """List flow runs, the newest first.

    Parameters
    ----------
    connection : Connection
        Of the store.
    limit : int
        At most so many.
    before : str, optional
        Id of a run: list those older than it.
    states : sequence of str
        Types of state to list; all of them by default.
    flow : str, optional
        Name of a flow.
    nested : bool
        List flow runs within flow runs, too.

    Returns
    -------
    list of dict
        Runs; ``tasks`` counts the task runs of each by type of state.
    """
    query = sa.select(flow_runs).order_by(flow_runs.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(flow_runs.c.id < before)
    if states:
        query = query.where(flow_runs.c.state_type.in_([state.upper() for state in states]))
    if flow is not None:
        query = query.where(flow_runs.c.flow == flow)
    if not nested:
        query = query.where(flow_runs.c.parent_flow_run.is_(None))
    rows = connection.execute(query).mappings().all()
    counts = _counts(connection, [row["id"] for row in rows])
    return [{**_show("flow", row), "tasks": counts.get(row["id"], {})} for row in rows]


def list_task_runs(
    connection: sa.Connection,
    flow_run: str | None = None,
    *,
    states: Sequence[str] = (),
    limit: int = 200,
    after: str | None = None,
) -> list[Shown]:
    """List task runs of one flow run, or those outside of flows, by their ids.

    Parameters
    ----------
    connection : Connection
        Of the store.
    flow_run : str, optional
        Id of the flow run; without it the task runs outside of flows.
    states : sequence of str
        Types of state to list; all of them by default.
    limit : int
        At most so many.
    after : str, optional
        Id of the last run of the previous page.
    """
    query = sa.select(task_runs).where(task_runs.c.flow_run == flow_run).order_by(task_runs.c.id).limit(limit)
    if states:
        query = query.where(task_runs.c.state_type.in_([state.upper() for state in states]))
    if after is not None:
        query = query.where(task_runs.c.id > after)
    return [_show("task", row) for row in connection.execute(query).mappings()]


def get_run(connection: sa.Connection, run: str) -> Shown | None:
    """Return all that is known of one flow or task run; None if there is no such run.

    A flow run has ``tasks`` (counts by type of state), ``flows`` (ids of the flow runs within it)
    and ``backend`` (what its runner turned out to be); a task run has ``upstream``, a list of
    ``{parameter, run, name}``.
    """
    row = connection.execute(sa.select(flow_runs).where(flow_runs.c.id == run)).mappings().first()
    if row is not None:
        nested = sa.select(flow_runs.c.id).where(flow_runs.c.parent_flow_run == run, flow_runs.c.root == row["root"])
        flows = connection.execute(nested.order_by(flow_runs.c.id)).scalars().all()
        return {**_show("flow", row), "tasks": _counts(connection, [run]).get(run, {}), "flows": list(flows)}
    row = connection.execute(sa.select(task_runs).where(task_runs.c.id == run)).mappings().first()
    if row is None:
        return None
    shown = _with_map(_show("task", row), _map_of(connection, row))
    named = names_of(connection, [edge["run"] for edge in shown["upstream"]])
    shown["upstream"] = [{**edge, "name": named.get(edge["run"])} for edge in shown["upstream"]]
    return shown


def find_runs(connection: sa.Connection, text: str, *, limit: int = 20) -> list[Shown]:
    """Find runs by what a person remembers of them, the newest first, flow runs before task runs.

    Parameters
    ----------
    connection : Connection
        Of the store.
    text : str
        An id, its first or last digits (at least 4), the name of a run, or the name of a flow.
    limit : int
        At most so many.
    """
    wanted = text.strip().replace("-", "").lower()
    if re.fullmatch(r"[0-9a-f]{4,32}", wanted):
        for fits in (lambda ids: ids.between(wanted, f"{wanted}g"), lambda ids: ids.endswith(wanted)):
            found = _search(connection, limit, fits(flow_runs.c.id), fits(task_runs.c.id))
            if found:
                return found
    found = _search(connection, limit, flow_runs.c.name == text, task_runs.c.name == text)
    return found or _search(connection, limit, flow_runs.c.flow == text, None)


def _search(connection: sa.Connection, limit: int, flows: Any, tasks: Any) -> list[Shown]:
    found: list[Shown] = []
    for kind, table, condition in (("flow", flow_runs, flows), ("task", task_runs, tasks)):
        if condition is not None:
            query = sa.select(table).where(condition).order_by(table.c.id.desc()).limit(limit - len(found))
            found += [_show(kind, row) for row in connection.execute(query).mappings()]
    return found


# -- one run as a tree ----------------------------------------------------------------------


def get_tree(connection: sa.Connection, flow_run: str, *, elements: int | None = 10) -> Shown | None:
    """Return a flow run with everything in it; None if there is no such flow run.

    Parameters
    ----------
    connection : Connection
        Of the store.
    flow_run : str
        Id of the flow run.
    elements : int, optional
        How many elements of each map to list: the first ones, besides those that did not end well
        and those that submitted tasks; None lists all.

    Returns
    -------
    dict
        The run, with ``tasks`` (counts by type of state) and ``nodes``: its tasks in the order in
        which they were made. A node of kind "task" is a run with ``upstream`` (a list of
        ``{parameter, run}``), ``nodes`` (the tasks that it submitted) and ``flow`` (the tree of the
        flow run that it stands for, or None). A node of kind "map" stands for all elements of a
        map: ``id, name, task, count, states`` (counts), ``started, ended, seconds, nbytes, peak,
        upstream, upstream_maps`` (a list of ``{parameter, map, offset}``), and ``nodes``, its
        elements.
    """
    run = get_run(connection, flow_run)
    if run is None or run["kind"] != "flow":
        return None
    return {**run, "nodes": _Tree(connection, flow_run, elements).nodes()}


class _Tree:
    """The tasks of one flow run, arranged by who submitted them."""

    def __init__(self, connection: sa.Connection, flow_run: str, elements: int | None) -> None:
        self.connection = connection
        self.flow_run = flow_run
        self.elements = elements
        own = maps.c.flow_run == flow_run
        rows = connection.execute(sa.select(maps).where(own).order_by(maps.c.made)).mappings()
        self.pieces: dict[str, list[Any]] = {}
        for row in rows:
            self.pieces.setdefault(row["id"], []).append(row)

    def nodes(self) -> list[Shown]:
        """Return the nodes on top; the others hang below them."""
        sums = self._sums()
        made: dict[str, tuple[Any, ...]] = {}
        nodes: dict[str, Shown] = {}
        parents: dict[str, str | None] = {}
        for map_id, pieces in self.pieces.items():
            nodes[map_id] = self._map_node(pieces, sums.get(map_id, []))
            made[map_id] = (pieces[0]["made"], 0)
            parents[map_id] = pieces[0]["parent"]
        for row in self._rows():
            map_id = row["map"]
            piece = self._piece(row)
            node = nodes[row["id"]] = {**_with_map(_show("task", row), piece), "nodes": [], "flow": None}
            made[row["id"]] = (row["made"] or 0, row["element"] or 0)
            parents[row["id"]] = map_id if map_id in self.pieces else row["parent"]
            if node["child_flow_run"]:
                node["flow"] = get_tree(self.connection, node["child_flow_run"], elements=self.elements)
        top: list[Shown] = []
        for run in sorted(nodes, key=lambda run: made[run]):
            above = nodes.get(parents[run] or "")
            (top if above is None else above["nodes"]).append(nodes[run])
        return top

    def _rows(self) -> Iterable[Any]:
        own = sa.select(task_runs).where(task_runs.c.flow_run == self.flow_run)
        if self.elements is None:
            return self.connection.execute(own).mappings().all()
        rows = {row["id"]: row for row in self.connection.execute(own.where(task_runs.c.map.is_(None))).mappings()}
        unwell = own.where(task_runs.c.map.is_not(None), task_runs.c.state_type.in_(["FAILED", "CRASHED"]))
        for piece in self.pieces.values():
            first = piece[0]["start"]
            ids = [element_id(piece[0]["id"], first + index) for index in range(min(self.elements, piece[0]["count"]))]
            rows |= {row["id"]: row for row in _by_ids(self.connection, ids)}
        for row in self.connection.execute(unwell.limit(_MANY)).mappings():
            rows.setdefault(row["id"], row)
        busy = {row["parent"] for row in rows.values()} | {piece[0]["parent"] for piece in self.pieces.values()}
        while missing := sorted(run for run in busy if run and run not in rows):
            found = {row["id"]: row for row in _by_ids(self.connection, missing)}
            rows |= found
            busy = {row["parent"] for row in found.values()}
        return list(rows.values())

    def _sums(self) -> dict[str, list[Any]]:
        """Return for each map what its elements add up to, by type of state."""
        if not self.pieces:
            return {}
        column = task_runs.c
        query = sa.select(
            column.map,
            column.state_type,
            sa.func.count().label("count"),
            sa.func.min(column.started).label("started"),
            sa.func.max(column.state_time).label("ended"),
            sa.func.sum(column.seconds).label("seconds"),
            sa.func.sum(column.nbytes).label("nbytes"),
            sa.func.max(column.peak).label("peak"),
        )
        query = query.where(column.flow_run == self.flow_run, column.map.is_not(None))
        found: dict[str, list[Any]] = {}
        for row in self.connection.execute(query.group_by(column.map, column.state_type)).mappings():
            found.setdefault(row["map"], []).append(row)
        return found

    def _map_node(self, pieces: Sequence[Any], sums: Sequence[Any]) -> Shown:
        first = _decoded(pieces[0])
        states = {row["state_type"]: row["count"] for row in sums}
        return {
            "kind": "map",
            **{name: first[name] for name in ("id", "root", "name", "task", "tags", "parameters", "created", "parent")},
            "count": sum(piece["count"] for piece in pieces),
            "states": states,
            "started": _extreme(min, sums, "started"),
            "ended": _extreme(max, sums, "ended") if states.keys() <= FINAL else None,
            "seconds": sum(row["seconds"] or 0.0 for row in sums),
            "nbytes": sum(row["nbytes"] or 0 for row in sums),
            "peak": _extreme(max, sums, "peak"),
            "upstream": [_edge(*edge) for edge in first["upstream"]],
            "upstream_maps": [
                {"parameter": parameter, "map": map_id, "offset": offset}
                for parameter, map_id, offset in first["upstream_maps"]
            ],
            "nodes": [],
        }

    def _piece(self, row: Any) -> Any:
        for piece in self.pieces.get(row["map"], ()):
            if piece["start"] <= row["element"] < piece["start"] + piece["count"]:
                return piece
        return None


# -- rows as dictionaries -------------------------------------------------------------------


def _show(kind: str, row: Any) -> Shown:
    raw = _decoded(row)
    final = raw["state_type"] in FINAL
    state = {name: raw[name if name in {"message", "cause"} else f"state_{name}"] for name in _STATE}
    error = {name: raw[f"error_{name}"] for name in ("type", "message", "text")}
    shown = {name: value for name, value in raw.items() if name not in _HIDDEN and name[:6] not in {"state_", "error_"}}
    ended = raw["state_time"] if final else None
    seconds = raw["seconds"]
    if seconds is None and ended is not None and raw["started"] is not None:
        seconds = max(0.0, ended - raw["started"])
    known = {"state": state, "error": error if any(error.values()) else None, "ended": ended, "seconds": seconds}
    return {"kind": kind, **shown, **known}


def _decoded(row: Any) -> Shown:
    raw = dict(row)
    for name in _JSON:
        if name in raw:
            text, empty = raw[name], {} if name in {"parameters", "backend"} else []
            raw[name] = json.loads(text) if text else empty
    return raw


def _edge(parameter: str, run: str) -> Shown:
    return {"parameter": parameter, "run": run}


def _with_map(shown: Shown, piece: Any) -> Shown:
    """Complete a task run by what it shares with the other elements of its map."""
    edges = [_edge(*edge) for edge in shown["upstream"]]
    if piece is not None:
        shared = _decoded(piece)
        shown["parameters"] = shown["parameters"] or shared["parameters"]
        edges += [_edge(*edge) for edge in shared["upstream"]]
        for parameter, map_id, offset in shared["upstream_maps"]:
            edges.append(_edge(parameter, element_id(map_id, shown["element"] + offset)))
    return {**shown, "upstream": edges}


def _map_of(connection: sa.Connection, row: Any) -> Any:
    if row["map"] is None:
        return None
    holds = (maps.c.start <= row["element"], maps.c.start + maps.c["count"] > row["element"])
    return connection.execute(sa.select(maps).where(maps.c.id == row["map"], *holds)).mappings().first()


def _by_ids(connection: sa.Connection, ids: Sequence[str]) -> list[Any]:
    rows: list[Any] = []
    for start in range(0, len(ids), _MANY):
        some = sa.select(task_runs).where(task_runs.c.id.in_(ids[start : start + _MANY]))
        rows += connection.execute(some).mappings().all()
    return rows


def _counts(connection: sa.Connection, ids: Sequence[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    column = task_runs.c
    for start in range(0, len(ids), _MANY):
        query = sa.select(column.flow_run, column.state_type, sa.func.count())
        query = query.where(column.flow_run.in_(ids[start : start + _MANY]))
        for flow_run, state, count in connection.execute(query.group_by(column.flow_run, column.state_type)):
            found.setdefault(flow_run, {})[state] = count
    return found


def _extreme(choose: Callable[..., Any], rows: Sequence[Any], name: str) -> Any:
    return choose((row[name] for row in rows if row[name] is not None), default=None)


ANSWERS: dict[str, Callable[..., Any]] = {
    "runs": list_runs,
    "task_runs": list_task_runs,
    "run": get_run,
    "find": find_runs,
    "tree": get_tree,
    "history": get_history,
    "logs": get_logs,
}
"""Questions that a `Store` answers."""
