"""One flow run as a graph: its tasks, maps and nested flows, and what depends on what."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from penstock.api.lists import list_maps
from penstock.api.models import flow_runs, task_runs
from penstock.api.rows import Shown, decoded, select, show

__all__ = ["get_graph"]

NODES = 5000


def get_graph(connection: sa.Connection, flow_run: str, *, limit: int = NODES) -> Shown | None:
    """Return the graph of a flow run; None if there is no such flow run.

    A map is one node, however many elements it has; flow runs that a task does not stand for are
    nodes of their own.

    Parameters
    ----------
    connection : Connection
        Of the store.
    flow_run : str
        Its id.
    limit : int
        At most so many tasks and as many maps, the first ones.

    Returns
    -------
    dict
        ``nodes``: ``{id, kind, name, task, state, states, count, parent, child_flow_run, started,
        seconds}`` each; ``edges``: ``{source, target, parameter}`` between ids of nodes;
        ``complete``: whether there are no more.
    """
    present = connection.execute(sa.select(flow_runs.c.root).where(flow_runs.c.id == flow_run)).scalar()
    if present is None:
        return None
    column = task_runs.c
    own = sa.select(task_runs).where(column.flow_run == flow_run, column.map.is_(None)).order_by(column.id)
    rows = select(connection, own.limit(limit + 1))
    pieces, following = _maps(connection, flow_run, limit)
    nodes = [_task_node(show("task", row)) for row in rows[:limit]] + [_map_node(one) for one in pieces]
    stand_ins = {node["child_flow_run"] for node in nodes}
    below = sa.select(flow_runs).where(flow_runs.c.parent_flow_run == flow_run, flow_runs.c.root == present)
    for row in select(connection, below.order_by(flow_runs.c.id).limit(limit)):
        if row["id"] not in stand_ins:
            nodes.append(_flow_node(show("flow", row)))
    edges = [edge for row in rows[:limit] for edge in _edges(row["id"], decoded(row)["upstream"])]
    for one in pieces:
        edges += [_edge(one["id"], link["parameter"], link["run"]) for link in one["upstream"]]
        edges += [_edge(one["id"], link["parameter"], link["map"]) for link in one["upstream_maps"]]
    edges = _to_nodes(connection, edges, {node["id"] for node in nodes})
    return {"nodes": nodes, "edges": edges, "complete": len(rows) <= limit and following is None}


def _maps(connection: sa.Connection, flow_run: str, limit: int) -> tuple[list[Shown], str | None]:
    found: list[Shown] = []
    cursor: str | None = None
    while len(found) < limit:
        some, cursor = list_maps(
            connection, flow_run=flow_run, cursor=cursor, limit=min(200, limit - len(found))
        )
        found += some
        if cursor is None:
            break
    return found, cursor


def _edges(target: str, upstream: list[list[str]]) -> list[Shown]:
    return [_edge(target, parameter, source) for parameter, source in upstream]


def _edge(target: str, parameter: str, source: str) -> Shown:
    return {"source": source, "target": target, "parameter": parameter}


def _to_nodes(connection: sa.Connection, edges: list[Shown], nodes: set[str]) -> list[Shown]:
    """Draw edges from elements as edges from their maps, and leave out what comes from elsewhere."""
    strange = sorted({edge["source"] for edge in edges} - nodes)
    homes: dict[str, str] = {}
    for start in range(0, len(strange), 500):
        query = sa.select(task_runs.c.id, task_runs.c.map).where(
            task_runs.c.id.in_(strange[start : start + 500])
        )
        homes |= {row["id"]: row["map"] for row in select(connection, query) if row["map"] is not None}
    drawn: dict[tuple[Any, ...], Shown] = {}
    for edge in edges:
        source = homes.get(edge["source"], edge["source"])
        if source in nodes and source != edge["target"]:
            drawn[source, edge["target"], edge["parameter"]] = {**edge, "source": source}
    return list(drawn.values())


def _task_node(run: Shown) -> Shown:
    node = {name: run[name] for name in ("id", "kind", "name", "task", "parent", "child_flow_run")}
    times = {"started": run["started"], "seconds": run["seconds"]}
    return {**node, "state": run["state"]["type"], "states": {}, "count": 1, **times}


def _map_node(one: Shown) -> Shown:
    node = {
        name: one[name] for name in ("id", "kind", "name", "task", "parent", "states", "count", "started")
    }
    return {**node, "state": None, "child_flow_run": None, "seconds": one["seconds"]}


def _flow_node(run: Shown) -> Shown:
    node = {name: run[name] for name in ("id", "kind", "name", "started", "seconds")}
    about = {"task": run["flow"], "parent": run["parent_task_run"], "child_flow_run": run["id"]}
    return {**node, **about, "state": run["state"]["type"], "states": {}, "count": 1}
