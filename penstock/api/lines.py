"""Log lines of a run as a client reads them: searched, and continued where the last answer ended."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from penstock.api.history import _LEVELS, _root_of, _within
from penstock.api.models import UNREADABLE, events
from penstock.api.paging import BadCursor
from penstock.api.rows import names_of
from penstock.engine.events import Event, unpack

__all__ = ["read_lines"]

WRITERS = 1000

_Line = dict[str, Any]


def read_lines(
    connection: sa.Connection,
    run: str,
    *,
    level: str | None = None,
    search: str | None = None,
    cursor: str | None = None,
    limit: int = 1000,
) -> dict[str, Any] | None:
    """Return log lines of a run, of a flow run with those of everything in it; None without such a run.

    Parameters
    ----------
    connection : Connection
        Of the store.
    run : str
        Id of a flow or task run.
    level : str, optional
        The lowest level, such as "WARNING".
    search : str, optional
        Only lines that hold this text, in whatever case.
    cursor : str, optional
        ``following`` of an earlier answer: only lines that came after it. Without it the latest ones.
    limit : int
        About so many lines at most; what was written together stays together after a cursor.

    Returns
    -------
    dict
        ``lines``: ``{time, level, text, run, name}`` each, by time; ``dropped``: how many were not
        kept when they were written; ``following``: a cursor for what comes after.
    """
    root = _root_of(connection, run)
    if root is None:
        return None
    seen = _read(cursor)
    wanted = None if root == run else _within(connection, root, run)
    least, text = _LEVELS.get((level or "").upper(), 0), (search or "").casefold()
    latest: list[tuple[float, int, _Line]] = []
    count = dropped = 0
    for writer, seq, event in _events(connection, root, seen):
        if cursor is not None and count >= limit:
            break
        seen[writer] = seq
        if wanted is not None and event.run not in wanted:
            continue
        dropped += _whole(event.body.get("dropped"))
        for line in _lines(event):
            if _LEVELS.get(line["level"].upper(), 20) >= least and text in line["text"].casefold():
                count += 1
                heapq.heappush(latest, (line["time"], count, line))
                if cursor is None and len(latest) > limit:
                    heapq.heappop(latest)
    lines = [line for _, _, line in sorted(latest, key=lambda one: one[:2])]
    names = names_of(connection, sorted({line["run"] for line in lines}))
    named = [{**line, "name": names.get(line["run"])} for line in lines]
    return {"lines": named, "dropped": dropped, "following": _write(seen)}


def _events(connection: sa.Connection, root: str, seen: dict[int, int]) -> Iterator[tuple[int, int, Event]]:
    column = events.c
    query = sa.select(column.writer, column.seq, column.data).where(
        column.root == root, column.kind == "log", column.verdict != UNREADABLE
    )
    if seen:
        begun = [sa.and_(column.writer == writer, column.seq > seq) for writer, seq in seen.items()]
        query = query.where(sa.or_(column.writer.not_in(list(seen)), *begun))
    for writer, seq, data in connection.execute(query.order_by(column.writer, column.seq)):
        yield writer, seq, unpack(data)


def _lines(event: Event) -> Iterator[_Line]:
    found = event.body.get("lines")
    for one in found if isinstance(found, list) else ():
        if isinstance(one, (list, tuple)) and len(one) == 3 and isinstance(one[0], (int, float)):
            yield {"time": float(one[0]), "level": str(one[1]), "text": str(one[2]), "run": event.run}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _write(seen: dict[int, int]) -> str:
    return "-".join(f"{writer:x}.{seq:x}" for writer, seq in sorted(seen.items())[-WRITERS:]) or "0.0"


def _read(cursor: str | None) -> dict[int, int]:
    if cursor is None:
        return {}
    try:
        pairs = [one.split(".") for one in cursor.split("-")]
        seen = {int(writer, 16): int(seq, 16) for writer, seq in pairs}
    except ValueError:
        raise BadCursor("The cursor does not belong to a log.") from None
    if len(seen) > WRITERS or not all(0 <= one < 1 << 62 for pair in seen.items() for one in pair):
        raise BadCursor("The cursor does not belong to a log.")
    return seen
