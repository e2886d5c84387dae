"""The read side: what happened, as dictionaries that can be written as JSON.

Every function takes a connection from `penstock.api.embedded.reading`. Times are seconds since
1970, durations are seconds, what is unknown is None.

A run is shown as ``{kind, id, root, name, tags, parameters, created, state, attempt, started,
ended, seconds, error, …}``, where ``kind`` is "flow" or "task", ``state`` is ``{type, name,
message, cause, time}`` and ``error`` is ``{type, message, text}`` or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api import leases
from penstock.api.history import get_history, get_logs
from penstock.api.models import flow_runs, task_runs
from penstock.api.past import get_past
from penstock.api.requests import get as get_request
from penstock.api.rows import (
    Shown,
    count_dropped_lines,
    count_tasks,
    in_state,
    names_of,
    piece_of,
    select,
    select_one,
    show,
    show_task,
)
from penstock.api.tree import get_tree

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
        query = query.where(in_state(flow_runs, states))
    if flow is not None:
        query = query.where(flow_runs.c.flow == flow)
    if not nested:
        query = query.where(flow_runs.c.parent_flow_run.is_(None))
    rows = select(connection, query)
    counts = count_tasks(connection, [row["id"] for row in rows])
    return [{**show("flow", row), "tasks": counts.get(row["id"], {})} for row in rows]


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
        query = query.where(in_state(task_runs, states))
    if after is not None:
        query = query.where(task_runs.c.id > after)
    return [show("task", row) for row in select(connection, query)]


def get_run(connection: sa.Connection, run: str) -> Shown | None:
    """Return all that is known of one flow or task run; None if there is no such run.

    A flow run has ``tasks`` (counts by type of state), ``flows`` (ids of the flow runs within it),
    ``dropped_lines`` (of the log that were not kept)
    and ``backend`` (what its runner turned out to be); a task run has ``upstream``, a list of
    ``{parameter, run, name}``.
    """
    row = select_one(connection, sa.select(flow_runs).where(flow_runs.c.id == run))
    if row is not None:
        nested = sa.select(flow_runs.c.id).where(
            flow_runs.c.parent_flow_run == run, flow_runs.c.root == row["root"]
        )
        flows = connection.execute(nested.order_by(flow_runs.c.id)).scalars().all()
        return {
            **show("flow", row),
            "tasks": count_tasks(connection, [run]).get(run, {}),
            "dropped_lines": count_dropped_lines(connection, run),
            "flows": list(flows),
        }
    row = select_one(connection, sa.select(task_runs).where(task_runs.c.id == run))
    if row is None:
        return None
    shown = show_task(row, piece_of(connection, row))
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
        first = [ids.between(wanted, f"{wanted}g") for ids in (flow_runs.c.id, task_runs.c.id)]
        last = [ids.endswith(wanted) for ids in (flow_runs.c.id, task_runs.c.id)]
        found = _search(connection, limit, *first) or _search(connection, limit, *last)
        if found:
            return found
    found = _search(connection, limit, flow_runs.c.name == text, task_runs.c.name == text)
    return found or _search(connection, limit, flow_runs.c.flow == text, None)


def _search(connection: sa.Connection, limit: int, flows: Any, tasks: Any) -> list[Shown]:
    found: list[Shown] = []
    for kind, table, condition in (("flow", flow_runs, flows), ("task", task_runs, tasks)):
        if condition is not None:
            query = sa.select(table).where(condition).order_by(table.c.id.desc()).limit(limit - len(found))
            found += [show(kind, row) for row in select(connection, query)]
    return found


def listen(connection: sa.Connection, *, holder: str, roots: Mapping[str, int]) -> dict[str, Any]:
    """Tell a driver what it has to know; see `penstock.api.leases.beat`."""
    return leases.beat(connection, holder, roots, write=False)


ANSWERS: dict[str, Callable[..., Any]] = {
    "runs": list_runs,
    "task_runs": list_task_runs,
    "run": get_run,
    "find": find_runs,
    "tree": get_tree,
    "history": get_history,
    "logs": get_logs,
    "listen": listen,
    "request": get_request,
    "past": get_past,
}
"""Questions that a `Store` answers."""
