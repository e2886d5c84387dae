"""Requests: somebody asks the driver of a run for something, and the driver says what came of it.

`make` writes them; a driver reads those for its runs at every beat (`penstock.api.leases.beat`)
and settles them by an event of kind "request", which travels like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api.models import flow_runs, maps, requests, task_runs
from penstock.engine.events import new_id
from penstock.errors import ConfigurationError

KINDS = ("cancel",)

_MANY = 500


def make(connection: sa.Connection, run: str, kind: str, by: str, now: float) -> str:
    """Write a request down.

    Parameters
    ----------
    connection : Connection
        In a transaction that writes.
    run : str
        Id of a flow run, a task run or a map.
    kind : str
        One of `KINDS`.
    by : str
        Who asks, as people will read it.
    now : float
        By the store's clock (`penstock.api.leases.store_time`).

    Returns
    -------
    str
        Id of the request.

    Raises
    ------
    ConfigurationError
        If there is no such run or kind.
    """
    if kind not in KINDS:
        raise ConfigurationError(
            f"the driver of a run can be asked to {' or '.join(KINDS)} it, not to {kind} it."
        )
    root = root_of(connection, run)
    if root is None:
        raise ConfigurationError(f"there is no run {run}.")
    request = new_id()
    values = {"id": request, "root": root, "run": run, "kind": kind, "by": by[:200], "made": now}
    connection.execute(requests.insert().values(**values))
    return request


def root_of(connection: sa.Connection, run: str) -> str | None:
    """Return the root of a flow run, task run or map; None if there is no such run."""
    for table in (flow_runs, task_runs, maps):
        found = connection.execute(sa.select(table.c.root).where(table.c.id == run).limit(1)).scalar()
        if found is not None:
            return str(found)
    return None


def pending(connection: sa.Connection, roots: Sequence[str]) -> list[dict[str, Any]]:
    """Return the requests for runs that are not settled, the oldest first: ``id, root, run, kind, by``."""
    found: list[dict[str, Any]] = []
    columns = [requests.c[name] for name in ("id", "root", "run", "kind", "by")]
    for start in range(0, len(roots), _MANY):
        query = sa.select(*columns).where(
            requests.c.root.in_(roots[start : start + _MANY]), requests.c.settled.is_(None)
        )
        found += [dict(row._mapping) for row in connection.execute(query.order_by(requests.c.id))]
    return found


def get(connection: sa.Connection, request: str) -> dict[str, Any] | None:
    """Return a request with ``made, settled, outcome``; None if there is no such request."""
    row = connection.execute(sa.select(requests).where(requests.c.id == request)).one_or_none()
    return dict(row._mapping) if row is not None else None
