"""The questions that travel by name, and nothing else can be asked that way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

from penstock.api import queries
from penstock.api.models import flow_runs, maps, task_runs

__all__ = ["READ", "bound", "exists", "fits"]

READ: Mapping[str, Callable[..., Any]] = queries.ANSWERS
"""Questions that change nothing."""


LIMITS = {"limit": 1000, "elements": 10_000}
DEPTH = 32
VALUES = 20_000


def fits(details: Mapping[str, Any]) -> bool:
    """Whether the arguments of a question are few and flat enough for anybody to look at them."""
    level: list[Any] = [details]
    count = 0
    for _ in range(DEPTH):
        following: list[Any] = []
        for one in level:
            count += len(one)
            if count > VALUES:
                return False
            inner = one.values() if isinstance(one, Mapping) else one
            following += [value for value in inner if isinstance(value, (list, dict))]
        level = following
    return not level


def bound(details: dict[str, Any]) -> None:
    """Lower what a question asks for to what one answer may hold."""
    for name, most in LIMITS.items():
        if name in details and (details[name] is None or type(details[name]) is int):
            details[name] = most if details[name] is None else max(0, min(details[name], most))


def exists(connection: sa.Connection, run: str) -> bool:
    """Whether there is a flow run, task run or map of this id."""
    return any(
        connection.execute(sa.select(table.c.id).where(table.c.id == run).limit(1)).scalar() is not None
        for table in (flow_runs, task_runs, maps)
    )
