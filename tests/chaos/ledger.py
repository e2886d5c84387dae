"""The ledger that tasks write themselves, and what it has to agree with in the store."""

from collections import Counter
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from penstock.api.db import Database
from penstock.api.fold import UPSERTS, Fold
from penstock.api.ingest import read
from penstock.api.models import events, writers


def executions(path: Path) -> Counter[str]:
    """How often each task began, as it wrote down itself."""
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def faults(database: Database) -> list[str]:
    """What is wrong with a record: events that are missing, twice, or folded otherwise than told."""
    found = []
    with database.read() as connection:
        for writer in connection.execute(sa.select(writers)).all():
            query = sa.select(events.c.seq).where(events.c.writer == writer.number).order_by(events.c.seq)
            numbers = list(connection.execute(query).scalars())
            if numbers != list(range(1, len(numbers) + 1)):
                found.append(f"events of {writer.writer} have gaps")
            if writer.acknowledged != len(numbers):
                found.append(f"{writer.writer}: {writer.acknowledged} acknowledged of {len(numbers)}")
        told = [read(row.data) for row in connection.execute(sa.select(events).where(events.c.verdict == 0))]
        lasts: Counter[tuple[Any, ...]] = Counter()
        fold = Fold()
        for event in told:
            assert event is not None
            fold.add(event)
            if event.kind == "state" and event.rank == 2:
                lasts[event.run, event.attempt] += 1
        found += [
            f"attempt {attempt} of {run} ended {count} times"
            for (run, attempt), count in lasts.items()
            if count > 1
        ]
        for name in ("flow_states", "task_states"):
            table = UPSERTS[name].table
            columns = [table.c[column] for column in ("id", "epoch", "attempt", "rank", "rseq", "state_name")]
            rows = {row[0]: tuple(row[1:]) for row in connection.execute(sa.select(*columns))}
            start = 2 if name == "flow_states" else 4
            for run, row in fold.rows[name].items():
                if rows.get(run) != row[start : start + 5]:
                    found.append(f"{run} is {rows.get(run)}, and was told to be {row[start : start + 5]}")
        if connection.exec_driver_sql("PRAGMA integrity_check").scalar() != "ok":
            found.append("the database is damaged")
    return found


__all__ = ["executions", "faults"]
