"""What a store does for drivers and people besides taking events: each is one transaction that writes.

A `Store` answers them like the questions of `penstock.api.queries`, by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.api import leases, requests
from penstock.api.db import Database

__all__ = ["COMMANDS", "beat", "request", "take"]


def beat(database: Database, *, holder: str, roots: Mapping[str, int]) -> dict[str, Any]:
    """Renew the leases of a driver and tell it what it has to know; see `penstock.api.leases.beat`."""
    with database.write() as connection:
        leases.hear_of(connection, holder)  # before the locks of roots, as in `penstock.api.ingest`
        database.lock_roots(connection, roots)
        return leases.beat(connection, holder, roots, write=True)


def take(
    database: Database, *, root: str, holder: str, takeover: bool = False, epoch: int | None = None
) -> int:
    """Make a driver the owner of a run and return the new epoch; see `penstock.api.leases.take`."""
    with database.write() as connection:
        database.lock_roots(connection, [root])
        return leases.take(connection, root, holder, takeover=takeover, epoch=epoch)


def request(database: Database, *, run: str, kind: str, by: str) -> str:
    """Ask the driver of a run for something; return the id of the request."""
    with database.write() as connection:
        return requests.make(connection, run, kind, by, leases.store_time(connection))


COMMANDS: dict[str, Callable[..., Any]] = {"beat": beat, "take": take, "ask": request}
"""By the name under ``what``."""
