"""Leases: which driver owns a root flow run, and when it was last heard of.

A driver takes a run by being the first to raise its epoch; events of an older epoch by anybody
else are stale from then on (`penstock.api.ingest`). Times are those of the store's clock: no two
machines' clocks are ever compared. The caller of what writes holds the lock of the store's writer,
where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from penstock.api import requests
from penstock.api.db import Upsert
from penstock.api.models import flow_runs, leases, writers
from penstock.errors import ConfigurationError, RunOwnedElsewhere

LEASE = 30.0
"""Seconds without a sign of life after which a driver is presumed dead."""

NOBODY = "0" * 32
"""Holder of the lease of a run whose driver is presumed dead."""

_MANY = 500
_NEW = Upsert(leases, ["root", "epoch", "holder", "renewed"])


@dataclass(frozen=True, slots=True)
class Lease:
    """Who owns a root flow run.

    Attributes
    ----------
    root : str
        The run.
    epoch : int
        How many owners it has had.
    holder : str
        Writer of the owner, `NOBODY` if that is presumed dead.
    renewed : float
        When the owner was last heard of, by the store's clock.
    """

    root: str
    epoch: int
    holder: str
    renewed: float


def store_time(connection: sa.Connection) -> float:
    """Return the time by the store's clock: that of the database server, or of this machine."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def find(connection: sa.Connection, roots: Sequence[str]) -> dict[str, Lease]:
    """Return the leases of runs, of those that have one."""
    found: dict[str, Lease] = {}
    for start in range(0, len(roots), _MANY):
        query = sa.select(leases).where(leases.c.root.in_(roots[start : start + _MANY]))
        for row in connection.execute(query):
            found[row.root] = Lease(row.root, row.epoch, row.holder, row.renewed)
    return found


def renew(connection: sa.Connection, holder: str, roots: Mapping[str, int]) -> None:
    """Note that a driver lives; what it no longer owns is left alone.

    Parameters
    ----------
    connection : Connection
        In a transaction that writes.
    holder : str
        Writer of the driver.
    roots : mapping of str to int
        The runs that it believes to own, with the epoch of each.
    """
    now, known = store_time(connection), find(connection, list(roots))
    for root, epoch in roots.items():
        if root not in known:
            insert(connection, Lease(root, epoch, holder, now))
    mine = leases.update().where(leases.c.holder == holder, leases.c.root == sa.bindparam("r"))
    mine = mine.where(leases.c.epoch == sa.bindparam("e")).values(renewed=now)
    kept = [{"r": root, "e": epoch} for root, epoch in roots.items() if root in known]
    if kept:
        connection.execute(mine, kept)


def hear_of(connection: sa.Connection, writer: str) -> None:
    """Note that a driver lives, whatever it owns: its task runs outside of flows have no lease of their own."""
    now = store_time(connection)
    connection.execute(writers.update().where(writers.c.writer == writer).values(seen=now))


def insert(connection: sa.Connection, lease: Lease) -> bool:
    """Make the first lease of a run; False if it has one."""
    statement = _NEW.build(connection.dialect.name)
    values = {"root": lease.root, "epoch": lease.epoch, "holder": lease.holder, "renewed": lease.renewed}
    return connection.execute(statement, values).rowcount == 1


def take(
    connection: sa.Connection, root: str, holder: str, *, takeover: bool = False, epoch: int | None = None
) -> int:
    """Make a driver the owner of a run.

    Parameters
    ----------
    connection : Connection
        In a transaction that writes.
    root : str
        A root flow run.
    holder : str
        Writer of the driver.
    takeover : bool
        Take it from an owner that lives.
    epoch : int, optional
        Only if nobody has taken it since this epoch.

    Returns
    -------
    int
        The new epoch.

    Raises
    ------
    RunOwnedElsewhere
        If somebody else owns it, or was faster.
    ConfigurationError
        If there is no such run.
    """
    query = sa.select(flow_runs).where(flow_runs.c.id == root)
    run = connection.execute(query).one_or_none()
    if run is None or run.root != root:
        raise ConfigurationError(f"there is no root flow run {root}.")
    lease = find(connection, [root]).get(root)
    present = max(lease.epoch if lease is not None else 1, run.epoch)
    free = run.rank > 0 or (lease is not None and lease.holder in {NOBODY, holder}) or takeover
    if not free or (epoch is not None and present != epoch):
        raise elsewhere(root, run.host, run.pid)
    new = Lease(root, present + 1, holder, store_time(connection))
    if lease is None:
        done = insert(connection, new)
    else:
        unchanged = (leases.c.root == root, leases.c.epoch == lease.epoch, leases.c.holder == lease.holder)
        change = leases.update().where(*unchanged)
        values = {"epoch": new.epoch, "holder": holder, "renewed": new.renewed}
        done = connection.execute(change.values(**values)).rowcount == 1
    if not done:
        raise elsewhere(root, run.host, run.pid)
    return new.epoch


def elsewhere(root: str, host: str | None, pid: int | None) -> RunOwnedElsewhere:
    """Return the error that says who else owns a run."""
    where = f"pid {pid} on {host}" if pid else "another driver"
    error = RunOwnedElsewhere(
        f"flow run {root} belongs to {where}; cancel it, or take it with 'penstock resume {root} --takeover'."
    )
    error.of_run(root)
    return error


def free(connection: sa.Connection, root: str, epoch: int, lease: Lease | None) -> bool:
    """Presume the owner of a run dead, unless it was heard of since `lease` was read."""
    if lease is None:
        return insert(connection, Lease(root, epoch, NOBODY, 0.0))
    same = (leases.c.epoch == lease.epoch, leases.c.holder == lease.holder, leases.c.renewed == lease.renewed)
    change = leases.update().where(leases.c.root == root, *same)
    return connection.execute(change.values(holder=NOBODY, renewed=0.0)).rowcount == 1


def beat(connection: sa.Connection, holder: str, roots: Mapping[str, int], *, write: bool) -> dict[str, Any]:
    """Answer what a driver asks again and again.

    Parameters
    ----------
    connection : Connection
        In a transaction that writes, if `write`.
    holder : str
        Writer of the driver.
    roots : mapping of str to int
        The runs that it believes to own, with the epoch of each.
    write : bool
        Renew its leases.

    Returns
    -------
    dict
        ``lost``: runs that somebody else has taken. ``presumed``: runs that it is presumed to have
        left by its death, and that nobody has taken. ``requests``: what it is asked to do, as
        `penstock.api.requests.pending` tells it.
    """
    if write:
        renew(connection, holder, roots)
    lost, presumed = [], []
    for root, lease in find(connection, list(roots)).items():
        if lease.holder == NOBODY and lease.epoch <= roots[root]:
            presumed.append(root)
        elif lease.holder != holder and lease.epoch > roots[root]:
            lost.append(root)
    return {"lost": lost, "presumed": presumed, "requests": requests.pending(connection, list(roots))}
