"""What a store does for drivers and people besides taking events: each is one transaction that writes.

A `Store` answers them like the questions of `penstock.api.queries`, by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

from penstock.api import leases, requests

__all__ = ["COMMANDS", "beat", "request", "take"]


def beat(connection: sa.Connection, *, holder: str, roots: Mapping[str, int]) -> dict[str, Any]:
    """Renew the leases of a driver and tell it what it has to know; see `penstock.api.leases.beat`."""
    return leases.beat(connection, holder, roots, write=True)


def take(
    connection: sa.Connection, *, root: str, holder: str, takeover: bool = False, epoch: int | None = None
) -> int:
    """Make a driver the owner of a run and return the new epoch; see `penstock.api.leases.take`."""
    return leases.take(connection, root, holder, takeover=takeover, epoch=epoch)


def request(connection: sa.Connection, *, run: str, kind: str, by: str) -> str:
    """Ask the driver of a run for something; return the id of the request."""
    return requests.make(connection, run, kind, by, leases.store_time(connection))


COMMANDS: dict[str, Callable[..., Any]] = {"beat": beat, "take": take, "ask": request}
"""By the name under ``what``."""
