"""One flow run as a tree: who submitted what, and what depends on what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api.models import FINAL, flow_runs, maps, task_runs
from penstock.api.rows import (
    MANY,
    Row,
    Shown,
    count_dropped_lines,
    count_tasks,
    decoded,
    edge,
    in_state,
    select,
    select_one,
    select_tasks,
    show,
    show_task,
)
from penstock.engine.events import element_id

_SHARED = ("id", "root", "name", "task", "tags", "parameters", "created", "parent", "flow_run")


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
        The run, with ``tasks`` (counts by type of state), ``dropped_lines`` (how many lines of its
        log were not kept; 0 for a nested flow, whose root run has them) and ``nodes``: its tasks in the order in
        which they were made. A node of kind "task" is a run with ``upstream`` (a list of
        ``{parameter, run}``), ``nodes`` (the tasks that it submitted) and ``flow`` (the tree of the
        flow run that it stands for, or None). A node of kind "map" stands for all elements of a
        map: ``id, name, task, tags, parameters, created, count, states`` (counts), ``started,
        ended, seconds, nbytes, peak, upstream, upstream_maps`` (a list of ``{parameter, map,
        offset}``), and ``nodes``, its elements. A flow run within it that no task stands for is a
        node of kind "flow", a tree of its own.
    """
    run = select_one(connection, sa.select(flow_runs).where(flow_runs.c.id == flow_run))
    if run is None:
        return None
    tree = _Tree(connection, flow_run, elements)
    nodes = tree.nodes()
    within = sa.select(flow_runs.c.id).where(
        flow_runs.c.parent_flow_run == flow_run, flow_runs.c.root == run["root"]
    )
    for nested in connection.execute(within.order_by(flow_runs.c.id)).scalars().all():
        if nested not in tree.flows:
            nodes.append(get_tree(connection, nested, elements=elements) or {})
    return {
        **show("flow", run),
        "tasks": count_tasks(connection, [flow_run]).get(flow_run, {}),
        "dropped_lines": count_dropped_lines(connection, flow_run),
        "nodes": nodes,
    }


class _Tree:
    """The tasks of one flow run, arranged by who submitted them."""

    def __init__(self, connection: sa.Connection, flow_run: str, elements: int | None) -> None:
        self.connection = connection
        self.flow_run = flow_run
        self.elements = elements
        self.flows: set[str] = set()  # those that a task stands for
        self.pieces: dict[str, list[Row]] = {}
        for row in select(
            connection, sa.select(maps).where(maps.c.flow_run == flow_run).order_by(maps.c.made)
        ):
            self.pieces.setdefault(row["id"], []).append(row)

    def nodes(self) -> list[Shown]:
        """Return the nodes on top; the others hang below them."""
        sums = self._sums()
        made: dict[str, tuple[int, int]] = {}
        nodes: dict[str, Shown] = {}
        parents: dict[str, str | None] = {}
        for map_id, pieces in self.pieces.items():
            nodes[map_id] = _map_node(pieces, sums.get(map_id, []))
            made[map_id] = (pieces[0]["made"], 0)
            parents[map_id] = pieces[0]["parent"]
        for row in self._rows():
            nodes[row["id"]] = self._task_node(row)
            made[row["id"]] = (row["made"] or 0, row["element"] or 0)
            parents[row["id"]] = row["map"] if row["map"] in self.pieces else row["parent"]
        top: list[Shown] = []
        for run in sorted(nodes, key=lambda run: made[run]):
            above = nodes.get(parents[run] or "")
            (top if above is None else above["nodes"]).append(nodes[run])
        return top

    def _task_node(self, row: Row) -> Shown:
        node = {**show_task(row, self._piece(row)), "nodes": [], "flow": None}
        child = node["child_flow_run"]
        if child is not None and child not in self.flows:
            self.flows.add(child)
            node["flow"] = get_tree(self.connection, child, elements=self.elements)
        return node

    def _piece(self, row: Row) -> Row | None:
        for piece in self.pieces.get(row["map"], ()):
            if piece["start"] <= row["element"] < piece["start"] + piece["count"]:
                return piece
        return None

    def _rows(self) -> list[Row]:
        """Return the task runs that get nodes of their own."""
        own = sa.select(task_runs).where(task_runs.c.flow_run == self.flow_run)
        if self.elements is None:
            return select(self.connection, own)
        unwell = own.where(task_runs.c.map.is_not(None), in_state(task_runs, ["FAILED", "CRASHED"]))
        found = select(self.connection, own.where(task_runs.c.map.is_(None)))
        found += select(self.connection, unwell.limit(MANY))
        for map_id, pieces in self.pieces.items():
            first, count = pieces[0]["start"], min(self.elements, pieces[0]["count"])
            ids = [element_id(map_id, index) for index in range(first, first + count)]
            found += select_tasks(self.connection, ids)
        rows = {row["id"]: row for row in found}
        wanted = {row["parent"] for row in rows.values()} | {
            pieces[0]["parent"] for pieces in self.pieces.values()
        }
        while missing := sorted(run for run in wanted if run and run not in rows):
            above = {
                row["id"]: row
                for row in select_tasks(self.connection, missing)
                if row["flow_run"] == self.flow_run  # not the row in the flow above that stands for this one
            }
            rows |= above
            wanted = {row["parent"] for row in above.values()}
        return list(rows.values())

    def _sums(self) -> dict[str, list[Row]]:
        """Return for each map what its elements add up to, by type of state."""
        if not self.pieces:
            return {}
        column, func = task_runs.c, sa.func
        query = sa.select(
            column.map,
            column.root,
            column.state_type,
            func.count().label("count"),
            func.min(column.started).label("started"),
            func.max(column.state_time).label("ended"),
            func.sum(column.seconds).label("seconds"),
            func.sum(column.nbytes).label("nbytes"),
            func.max(column.peak).label("peak"),
        )
        query = query.where(column.flow_run == self.flow_run, column.map.is_not(None))
        found: dict[str, list[Row]] = {}
        for row in select(self.connection, query.group_by(column.map, column.root, column.state_type)):
            found.setdefault(row["map"], []).append(row)
        return found


def _map_node(pieces: Sequence[Row], sums: Sequence[Row]) -> Shown:
    first = decoded(pieces[0])
    states: dict[str, int] = {}
    for row in sums:
        states[row["state_type"]] = states.get(row["state_type"], 0) + row["count"]
    offsets = [
        {"parameter": name, "map": map_id, "offset": offset}
        for name, map_id, offset in first["upstream_maps"]
    ]
    return {
        "kind": "map",
        **{name: first[name] for name in _SHARED},
        "count": sum(piece["count"] for piece in pieces),
        "states": states,
        "started": _extreme(min, sums, "started"),
        "ended": _extreme(max, sums, "ended") if states.keys() <= FINAL else None,
        "seconds": sum(row["seconds"] or 0.0 for row in sums),
        "nbytes": sum(int(row["nbytes"] or 0) for row in sums),
        "peak": _extreme(max, sums, "peak"),
        "upstream": [edge(*one) for one in first["upstream"]],
        "upstream_maps": offsets,
        "nodes": [],
    }


def _extreme(choose: Callable[..., Any], rows: Sequence[Row], name: str) -> Any:
    return choose((row[name] for row in rows if row[name] is not None), default=None)
