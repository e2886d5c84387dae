"""Events as they are committed, for whoever watches; and how a stream goes on where it was cut.

A position says up to which event each writer was seen. It travels as the id of a server-sent
event: a browser or client that comes back with it misses nothing, even after a restart of the
server or on another one. One task reads for all streams, and only while there are any.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from penstock.api.models import STALE, UNREADABLE, events, writers
from penstock.api.paging import BadCursor
from penstock.api.service import Service
from penstock.engine.events import Event, unpack

__all__ = ["Hub", "Position", "read_events", "shown"]

WRITERS = 256  # in a position: those that were active most recently
CHUNK = 2000  # events that are read at once
PAUSE = 0.1  # seconds between two looks at the database, whatever comes
PATIENCE = 1.0  # seconds until a look without a reason: another server may write, too
BACKLOG = 50  # chunks that a slow watcher may be behind
TEXT = 2000


@dataclass(slots=True)
class Position:
    """Up to where the events of all writers were seen.

    Attributes
    ----------
    base : int
        Writers with a greater number are new: all of theirs is unseen.
    seen : dict of int to int
        For other writers the last event that was seen; those without an entry were done long ago.
    """

    base: int = 0
    seen: dict[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Write it as it travels."""
        return "-".join([f"{self.base:x}", *(f"{writer:x}.{seq:x}" for writer, seq in self.seen.items())])

    @classmethod
    def read(cls, text: str) -> Position:
        """Read what `str` wrote.

        Raises
        ------
        BadCursor
            If it is something else.
        """
        try:
            base, *pairs = text.split("-")
            position = cls(int(base, 16))
            for writer, seq in (pair.split(".") for pair in pairs):
                position.seen[int(writer, 16)] = int(seq, 16)
        except ValueError:
            raise BadCursor("The id is not one of this stream.") from None
        numbers = [position.base, *position.seen, *position.seen.values()]
        if len(position.seen) > 2 * WRITERS or not all(0 <= one < 1 << 62 for one in numbers):
            raise BadCursor("The id is not one of this stream.")
        return position

    def copy(self) -> Position:
        """Return one that can be changed."""
        return Position(self.base, dict(self.seen))

    def after(self, writer: int, now: int) -> int:
        """Return up to which event of a writer nothing is news; it has committed up to `now`."""
        return self.seen.get(writer, 0 if writer > self.base else now)

    def passes(self, writer: int, seq: int) -> bool:
        """Note an event; return whether it is news."""
        if seq <= self.after(writer, seq):
            return False
        self.seen[writer] = seq
        return True


def present(connection: sa.Connection) -> Position:
    """Return where everything that is here is seen."""
    rows = _writers(connection)
    highest = connection.execute(sa.select(sa.func.max(writers.c.number))).scalar()
    return Position(int(highest or 0), dict(rows))


def _writers(connection: sa.Connection) -> list[tuple[int, int]]:
    column = writers.c
    query = sa.select(column.number, column.acknowledged).order_by(column.seen.desc(), column.number.desc())
    return [(number, committed) for number, committed in connection.execute(query.limit(WRITERS))]


Item = tuple[int, int, Event]
"""Number of the writer, sequence number, event."""


def read_events(connection: sa.Connection, position: Position, limit: int = CHUNK) -> list[Item]:
    """Return what comes after a position, and move the position there.

    Events of one writer come in their order and without a gap; of several writers, in no order.
    """
    found: list[Item] = []
    column = events.c
    for number, committed in _writers(connection):
        after = position.after(number, committed)
        position.seen[number] = after
        if committed <= after or len(found) >= limit:
            continue
        query = sa.select(column.seq, column.verdict, column.data).where(
            column.writer == number, column.seq > after, column.seq <= committed
        )
        last = after
        for seq, verdict, data in connection.execute(query.order_by(column.seq).limit(limit - len(found))):
            last = seq
            if verdict not in {UNREADABLE, STALE}:
                found.append((number, seq, unpack(data)))
        position.seen[number] = last
    return found


# -- what is shown of an event --------------------------------------------------------------

_SHOWN: Mapping[str, tuple[str, ...]] = {
    "flow_run": ("flow", "name", "parent_flow_run", "parent_task_run"),
    "task_run": ("flow_run", "parent", "task", "name", "child_flow_run"),
    "map_run": ("flow_run", "parent", "task", "name", "start", "count"),
    "state": ("of", "type", "name", "message", "cause", "worker", "started", "seconds", "nbytes"),
    "states": ("type", "name"),
    "runner": ("name", "workers", "threads"),
    "log": ("lines", "dropped"),
}


def shown(item: Item) -> dict[str, Any]:
    """Return an event as it is streamed: without what only the store needs, ranges instead of columns."""
    writer, seq, event = item
    body = {name: _short(event.body.get(name)) for name in _SHOWN.get(event.kind, ())}
    if event.kind == "states":
        index = sorted(one for one in event.body.get("index") or () if isinstance(one, int))
        body |= {"count": len(index), "ranges": list(_ranges(index))}
    about = {"kind": event.kind, "run": event.run, "root": event.root, "time": event.time}
    return {
        "writer": writer,
        "seq": seq,
        **about,
        "epoch": event.epoch,
        "attempt": event.attempt,
        "body": body,
    }


def _short(value: Any) -> Any:
    return value[:TEXT] if isinstance(value, str) else value


def _ranges(index: Iterable[int]) -> Iterator[list[int]]:
    span: list[int] = []
    for one in index:
        if span and one <= span[1] + 1:
            span[1] = one
            continue
        if span:
            yield span
        span = [one, one]
    if span:
        yield span


# -- many watchers --------------------------------------------------------------------------


class Hub:
    """Reads new events once and hands them to all streams.

    Parameters
    ----------
    service : Service
        Whose events; it says when something was committed.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._queues: set[asyncio.Queue[list[Item] | None]] = set()
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._position: Position | None = None  # up to where everything was handed over

    def start(self) -> None:
        """Listen for commits; call it in the loop of the server."""
        self._loop = asyncio.get_running_loop()
        self._service.writer.on_commit(self._tell)

    def _tell(self) -> None:
        if self._loop is not None and self._queues:
            self._loop.call_soon_threadsafe(self._news.set)

    async def stop(self) -> None:
        """End the task that reads."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def watch(
        self, start: Position | None, wanted: Callable[[Event], bool], idle: float
    ) -> AsyncIterator[tuple[list[Item], str]]:
        """Yield new events that are wanted and the position after them; nothing after `idle` seconds.

        Parameters
        ----------
        start : Position, optional
            Where to go on; by default with what comes from now on.
        wanted : callable
            Chooses events.
        idle : float
            Seconds after which an empty list is yielded, to see whether anybody still listens.
        """
        queue: asyncio.Queue[list[Item] | None] = asyncio.Queue(BACKLOG)
        self._queues.add(queue)
        try:
            if self._task is None or self._task.done():
                self._position = await run_in_threadpool(self._present)
                if self._task is None or self._task.done():  # nobody else was faster
                    self._task = asyncio.create_task(self._read_for_all(self._position))
            assert self._position is not None
            # From here on everything beyond the hub's position comes through the queue.
            position, behind = (start or self._position).copy(), start is not None
            yield [], str(position)
            while behind and not self._service.stopping.is_set():
                items = await run_in_threadpool(self._read, position)
                if items:
                    yield [item for item in items if wanted(item[2])], str(position)
                behind = bool(items)
            while not self._service.stopping.is_set():
                try:
                    news = await asyncio.wait_for(queue.get(), idle)
                except TimeoutError:
                    yield [], str(position)
                    continue
                if news is None:
                    return  # too slow, or the end: the client comes back with its position
                fresh = [item for item in news if position.passes(item[0], item[1]) and wanted(item[2])]
                yield fresh, str(position)
        finally:
            self._queues.discard(queue)

    def _present(self) -> Position:
        with self._service.read() as connection:
            return present(connection)

    def _read(self, position: Position) -> list[Item]:
        with self._service.read() as connection:
            return read_events(connection, position)

    async def _read_for_all(self, position: Position) -> None:
        while self._queues:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), PATIENCE)
            self._news.clear()
            if self._service.stopping.is_set():
                break
            further = position.copy()
            try:
                items = await run_in_threadpool(self._read, further)
            except sa.exc.DBAPIError:
                await asyncio.sleep(PATIENCE)  # the database is away; the position stays where it is
                continue
            self._position = position = further  # in one step with handing over
            for queue in list(self._queues) if items else ():
                self._hand_over(queue, items)
            if len(items) >= CHUNK:
                self._news.set()
            await asyncio.sleep(PAUSE)
        for queue in list(self._queues):
            self._hand_over(queue, None)

    def _hand_over(self, queue: asyncio.Queue[list[Item] | None], items: list[Item] | None) -> None:
        if queue.full():
            self._queues.discard(queue)
            queue.get_nowait()
            items = None
        queue.put_nowait(items)
