"""Pages of long lists: sorted by one of a few orders, continued where the last one ended.

A cursor holds the sort value and the id of the last row, so a page costs the same however far in
it lies, and rows that come in the meantime shift nothing.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from penstock.api.rows import Row, select

__all__ = ["BadCursor", "Order", "Page", "read_page"]


class BadCursor(ValueError):
    """A cursor that none of our pages has given out."""


@dataclass(frozen=True, slots=True)
class Order:
    """How a list is sorted.

    Attributes
    ----------
    column : ColumnElement
        What comes first; None counts as `empty`.
    falling : bool
        The largest first.
    empty : float or str
        Stands for None; of the type of the column.
    """

    column: sa.ColumnElement[Any]
    falling: bool = False
    empty: float | str = 0.0


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, and the cursor that continues after them; None after the last."""

    rows: list[Row]
    following: str | None


def read_page(
    connection: sa.Connection,
    query: sa.Select[Any],
    key: Sequence[sa.ColumnElement[Any]],
    order: Order,
    cursor: str | None,
    limit: int,
    value: Callable[[Row], Any],
) -> Page:
    """Return one page of a query.

    Parameters
    ----------
    connection : Connection
        Of the store.
    query : Select
        All rows, in no order.
    key : sequence of ColumnElement
        What makes a row unique: its id.
    order : Order
        What comes before the key.
    cursor : str, optional
        Of the page before.
    limit : int
        At most so many rows.
    value : callable
        Returns what `order` sorts a row by.

    Raises
    ------
    BadCursor
        If the cursor is not one of this list in this order.
    """
    sorted_by = sa.func.coalesce(order.column, order.empty)
    direction = sa.desc if order.falling else sa.asc
    if cursor is not None:
        last = sa.tuple_(*(sa.literal(one) for one in _read(cursor, order, len(key))))
        here = sa.tuple_(sorted_by, *key)
        query = query.where(here < last if order.falling else here > last)
    query = query.order_by(direction(sorted_by), *(direction(column) for column in key)).limit(limit + 1)
    rows = select(connection, query)
    if len(rows) <= limit:
        return Page(rows, None)
    rows = rows[:limit]
    end = rows[-1]
    first = value(end)
    return Page(
        rows, _write([order.empty if first is None else first, *(end[one.key] for one in key if one.key)])
    )


def _write(values: Sequence[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def _read(cursor: str, order: Order, keys: int) -> list[Any]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        values: Any = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        sound = isinstance(values, list) and len(values) == keys + 1 and _fits(values[0], order.empty)
        if sound and all(_fits(one, "") for one in values[1:]):
            return list(values)
    except (ValueError, RecursionError):
        pass
    raise BadCursor("The cursor does not belong to this list in this order.")


def _fits(value: Any, like: float | str) -> bool:
    if isinstance(like, str):
        return isinstance(value, str) and "\0" not in value and value.isprintable()
    return type(value) in {int, float} and math.isfinite(value) and abs(value) < 1 << 62
