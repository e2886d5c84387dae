"""Events into the store: validate, keep each once, fold it into the current state; one transaction.

`ingest` is safe to repeat: an event that is here already changes nothing, in whatever order and
company it comes again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from penstock.api.db import Database, Upsert
from penstock.api.fold import Fold
from penstock.api.models import ACCEPTED, STALE, UNREADABLE, events, leases, writers
from penstock.engine.events import Event, unpack
from penstock.engine.spool import Batch

_EVENTS = Upsert(events, [column.name for column in events.columns])
_WRITERS = Upsert(writers, ["writer", "acknowledged", "seen"], conflict=["writer"])
_NOBODY = "0" * 32
_MANY = 500  # values in one IN list
LARGE = 4096  # bytes of an event that is about many elements of a map
PORTION = 256 << 10  # bytes of such events in one transaction


@dataclass(slots=True)
class _Writer:
    """What the store knows of a writer."""

    name: str
    number: int
    acknowledged: int
    present: set[int] = field(default_factory=set)  # events beyond a gap


def ingest(database: Database, batches: Sequence[Batch]) -> dict[str, int]:
    """Commit batches of events.

    Parameters
    ----------
    database : Database
        The caller holds the lock of its writer.
    batches : sequence of Batch
        Of any writers, in any order, with repetitions.

    Returns
    -------
    dict of str to int
        For each writer the number up to which all its events are committed.

    Raises
    ------
    sqlalchemy.exc.OperationalError
        If the database takes nothing now; then not all of the batches is committed.
    """
    if not database.is_sqlite and len(portions := list(_portions(batches))) > 1:
        committed: dict[str, int] = {}
        for portion in portions:
            committed |= ingest(database, portion)
        return committed
    try:
        with database.write() as connection:
            done = _commit(database, connection, batches)
    except (
        sa.exc.DataError,
        sa.exc.IntegrityError,
        sa.exc.InterfaceError,
        ArithmeticError,
        TypeError,
        ValueError,
    ):
        # Some event holds what the database cannot take, and must not hold up the others.
        done = {}
        for half in _halves(batches):
            done |= ingest(database, half)
        if done:
            return done
        with database.write() as connection:
            return _commit(database, connection, batches, trusted=False)
    database.tidy()
    return done


def _portions(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Yield batches with not too many elements of maps in each transaction, for `Database.tidy` in between.

    PostgreSQL can give the room of the rows that one transaction has replaced to the next one only.
    """
    portion: list[Batch] = []
    size = 0
    for batch in batches:
        begin = 0
        for end, payload in enumerate(batch.payloads, 1):
            size += len(payload) if len(payload) > LARGE else 0
            if size > PORTION:
                yield [*portion, Batch(batch.writer, batch.first + begin, batch.payloads[begin:end])]
                portion, begin, size = [], end, 0
        if begin < len(batch.payloads) or not batch.payloads:
            rest = batch.payloads[begin:]
            portion.append(batch if begin == 0 else Batch(batch.writer, batch.first + begin, rest))
    if portion:
        yield portion


def _halves(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    if len(batches) > 1:
        middle = len(batches) // 2
        yield list(batches[:middle])
        yield list(batches[middle:])
    elif batches and len(batches[0].payloads) > 1:
        batch, middle = batches[0], len(batches[0].payloads) // 2
        yield [Batch(batch.writer, batch.first, batch.payloads[:middle])]
        yield [Batch(batch.writer, batch.first + middle, batch.payloads[middle:])]


def _commit(
    database: Database, connection: sa.Connection, batches: Sequence[Batch], *, trusted: bool = True
) -> dict[str, int]:
    known = _known(database, connection, batches)
    fresh = _fresh(batches, known)
    events_of = [read(payload) if trusted else None for _, _, payload in fresh]
    roots = {event.root for event in events_of if event is not None}
    database.lock_roots(connection, roots)
    owners = _owners(connection, roots)
    fold, rows = Fold(), []
    for (writer, seq, payload), event in zip(fresh, events_of, strict=True):
        if event is None:
            rows.append((writer.number, seq, "?", _NOBODY, _NOBODY, 0, 0, 0, 0, UNREADABLE, payload))
            continue
        verdict = _fold(fold, event, writer, owners)
        order = (event.epoch, event.attempt, event.rank, event.rseq)
        rows.append((writer.number, seq, event.kind, event.run, event.root, *order, verdict, payload))
    database.upsert(connection, "events", _EVENTS, rows)
    for name, upsert, some in fold.writes():
        database.upsert(connection, name, upsert, some)
    _acknowledge(connection, known)
    return {name: writer.acknowledged for name, writer in known.items()}


def acknowledged(connection: sa.Connection, names: Sequence[str]) -> dict[str, int]:
    """Return up to which event the writers among `names` that the store knows are committed."""
    return {name: writer.acknowledged for name, writer in _writers(connection, names).items()}


def read(payload: bytes) -> Event | None:
    """Unpack an event; None if it is not one."""
    try:
        event = unpack(payload)
        kind, run, root, epoch, attempt = event.kind, event.run, event.root, event.epoch, event.attempt
        sound = (
            type(kind) is type(run) is type(root) is str
            and len(kind) <= 32 >= len(run)
            and len(root) <= 32
            and 0 <= epoch < 1 << 22
            and 0 <= attempt < 1 << 31
            and 0 <= event.rank <= 2
            and 0 <= event.rseq < 1 << 40
            and type(epoch) is type(attempt) is type(event.rank) is type(event.rseq) is int
            and type(event.body) is dict
        )
        float(event.time)
    except Exception:
        return None
    return event if sound else None


def _fold(fold: Fold, event: Event, writer: _Writer, owners: dict[str, tuple[int, str]]) -> int:
    owner = owners.get(event.root)
    if owner is not None and event.epoch < owner[0] and writer.name != owner[1]:
        return STALE
    try:
        fold.add(event)
    except Exception:  # a body that its kind does not promise: kept as it came
        return UNREADABLE
    return ACCEPTED


# -- what is here already -------------------------------------------------------------------


def _known(database: Database, connection: sa.Connection, batches: Sequence[Batch]) -> dict[str, _Writer]:
    names = sorted({batch.writer for batch in batches})
    known = _writers(connection, names)
    missing = [name for name in names if name not in known]
    database.upsert(connection, "writers", _WRITERS, [(name, 0, time.time()) for name in missing])
    if missing or not database.is_sqlite:
        # Two that bring events of one writer come one after the other: what is here is decided once.
        known = _writers(connection, names, lock=not database.is_sqlite)
    for batch in batches:
        writer = known[batch.writer]
        if batch.last > writer.acknowledged:
            between = events.c.seq.between(max(batch.first, writer.acknowledged + 1), batch.last)
            query = sa.select(events.c.seq).where(events.c.writer == writer.number, between)
            writer.present.update(connection.execute(query).scalars())
    return known


def _writers(connection: sa.Connection, names: Sequence[str], *, lock: bool = False) -> dict[str, _Writer]:
    found = {}
    for some in _chunks(names):
        query = sa.select(writers).where(writers.c.writer.in_(some)).order_by(writers.c.writer)
        for row in connection.execute(query.with_for_update() if lock else query):
            found[row.writer] = _Writer(row.writer, row.number, row.acknowledged)
    return found


def _fresh(batches: Sequence[Batch], known: dict[str, _Writer]) -> list[tuple[_Writer, int, bytes]]:
    found = []
    for batch in batches:
        writer = known[batch.writer]
        present, done = writer.present, writer.acknowledged
        for seq, payload in enumerate(batch.payloads, batch.first):
            if seq > done and seq not in present:
                present.add(seq)
                found.append((writer, seq, payload))
    return found


def _owners(connection: sa.Connection, roots: set[str]) -> dict[str, tuple[int, str]]:
    found = {}
    for some in _chunks(sorted(roots)):
        query = sa.select(leases.c.root, leases.c.epoch, leases.c.holder).where(leases.c.root.in_(some))
        for row in connection.execute(query):
            found[row.root] = (row.epoch, row.holder)
    return found


def _chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[start : start + _MANY] for start in range(0, len(values), _MANY))


def _acknowledge(connection: sa.Connection, known: dict[str, _Writer]) -> None:
    updates: list[dict[str, Any]] = []
    for writer in known.values():
        number = _contiguous(connection, writer)
        if number > writer.acknowledged:
            writer.acknowledged = number
            updates.append({"n": writer.number, "a": number, "s": time.time()})
    if updates:
        statement = writers.update().where(writers.c.number == sa.bindparam("n"))
        connection.execute(statement.values(acknowledged=sa.bindparam("a"), seen=sa.bindparam("s")), updates)


def _contiguous(connection: sa.Connection, writer: _Writer) -> int:
    number = writer.acknowledged
    if number + 1 not in writer.present:
        return number
    while number + 1 in writer.present:
        number += 1
    later = sa.select(events.c.seq).where(events.c.writer == writer.number).order_by(events.c.seq)
    while True:  # what came before its turn in an earlier transaction
        following = connection.execute(later.where(events.c.seq > number).limit(1000)).scalars().all()
        begin = number
        for seq in following:
            if seq != number + 1:
                return number
            number = seq
        if number == begin:
            return number
