"""Nothing lost, nothing twice: a record held against itself and against the ledger that tasks wrote."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from penstock.api import upkeep
from penstock.api.db import Database
from penstock.api.ingest import read
from penstock.api.models import ACCEPTED, FINAL, events, flow_runs, maps, task_runs, writers
from penstock.engine.events import Event, element_id

Executions = dict[str, Counter[int]]

FOLDED = (flow_runs, task_runs, maps)


def executions(ledger: Path) -> Executions:
    """How often each attempt of each task run began, as the tasks wrote down themselves."""
    found: Executions = defaultdict(Counter)
    for line in ledger.read_text().splitlines():
        run, _, attempt = line.partition(" ")
        found[run][int(attempt)] += 1
    return found


class Proof:
    """Checks a record at rest.

    Attributes
    ----------
    faults : list of str
        What is wrong with it.
    figures : dict
        How much was looked at.
    """

    def __init__(self, database: Database, ledger: Path) -> None:
        self.database = database
        self.faults: list[str] = []
        self.executed = executions(ledger)
        self.figures: dict[str, Any] = {
            "executions": sum(sum(one.values()) for one in self.executed.values())
        }
        with database.read() as connection:
            self._numbers(connection)
            self._ends(connection)
            self._ledger(connection)
            self._counts(connection)
            self._integrity(connection)
        self._fold()

    def _fault(self, *found: str) -> None:
        if len(self.faults) < 50:  # one cause makes many
            self.faults += found

    # -- 1: the events of each writer are 1 to n --------------------------------------------
    def _numbers(self, connection: sa.Connection) -> None:
        column, func = events.c, sa.func
        query = sa.select(writers.c.writer, writers.c.acknowledged, func.count(), func.max(column.seq))
        query = query.join(events, column.writer == writers.c.number)
        total = 0
        rows = connection.execute(query.group_by(writers.c.writer, writers.c.acknowledged)).all()
        for writer, acknowledged, count, last in rows:
            total += count
            if not acknowledged == count == last:
                self._fault(f"{writer}: {acknowledged} acknowledged, {count} there, the last is {last}")
        self.figures |= {"writers": len(rows), "events": total}

    # -- 3: an attempt ends once ------------------------------------------------------------
    def _ends(self, connection: sa.Connection) -> None:
        lasts: Counter[tuple[str, int]] = Counter()
        for event in _told(connection):
            if event.rank == 2:
                lasts.update(_ended(event))
        self._fault(
            *(f"attempt {attempt} of {run} ended {n} times" for (run, attempt), n in lasts.items() if n > 1)
        )
        for table in (flow_runs, task_runs):
            column = table.c
            query = sa.select(column.id, column.attempt, column.rank)
            for run, attempt, rank in connection.execute(query):
                if (rank == 2) != (lasts[run, attempt] == 1):
                    self._fault(
                        f"{run} has rank {rank}, and attempt {attempt} ended {lasts[run, attempt]} times"
                    )
        self.figures["attempts"] = len(lasts)

    # -- 2: what was executed is what is recorded -------------------------------------------
    def _ledger(self, connection: sa.Connection) -> None:
        column = task_runs.c
        query = sa.select(column.id, column.attempt, column.rank, column.state_type, flow_runs.c.state_type)
        query = query.join(flow_runs, flow_runs.c.id == column.root)
        known = set()
        for run, attempt, rank, state, flow in connection.execute(query):
            executed = self.executed.get(run, Counter())
            known.add(run)
            attempts = Counter(range(1, attempt + 1))
            if rank == 2 and state in {"COMPLETED", "FAILED"} and executed != attempts:
                self._fault(f"{run} {state}: executed {dict(executed)}, {attempt} attempts recorded")
            if any(count > 1 for count in executed.values()):
                self._fault(f"{run} was executed {dict(executed)}")
            # A driver that died may have begun an attempt that it could not write down any more.
            if rank < 2 and not attempt - 1 <= len(executed) <= attempt + 1:
                self._fault(f"{run} {state}: executed {dict(executed)}, {attempt} attempts recorded")
            if flow == "COMPLETED" and state != "COMPLETED":
                self._fault(f"{run} is {state} in a flow that completed")
        self._fault(*(f"{run} was executed and is not recorded" for run in self.executed.keys() - known))
        self.figures["task_runs"] = len(known)

    # -- 4: what events say is what is shown ------------------------------------------------
    def _fold(self) -> None:
        before = self._dump()
        upkeep.rebuild(self.database)
        after = self._dump()
        for name, rows in before.items():
            if rows != after[name]:
                differing = [
                    at for at, pair in enumerate(zip(rows, after[name], strict=False)) if len({*pair}) > 1
                ]
                self._fault(
                    f"{name} is not what its events say: {len(rows)} rows, {len(after[name])} rebuilt; by primary "
                    f"key row {differing[:1]} differs, and {len(differing)} do"
                )

    def _dump(self) -> dict[str, list[int]]:
        """A number for each row: millions of rows would not fit beside one another."""
        found = {}
        with self.database.read() as connection:
            for table in FOLDED:
                query = sa.select(table).order_by(*table.primary_key).execution_options(yield_per=10_000)
                found[table.name] = [hash(tuple(row)) for row in connection.execute(query)]
        return found

    # -- 5: for whoever looks ---------------------------------------------------------------
    def _counts(self, connection: sa.Connection) -> None:
        self.states = {
            name: {
                kind: count
                for kind, count in connection.execute(
                    sa.select(table.c.state_type, sa.func.count()).group_by(table.c.state_type)
                )
            }
            for name, table in (("flow", flow_runs), ("task", task_runs))
        }
        self.figures["states"] = self.states

    def compare(self, shown: dict[str, dict[str, int]]) -> None:
        """Compare with what an API shows once no run is alive: what had not ended by then is Crashed."""
        for name, counts in self.states.items():
            counts = dict(counts)
            for kind in counts.keys() - FINAL:
                counts["CRASHED"] = counts.get("CRASHED", 0) + counts.pop(kind)
            if {kind: count for kind, count in shown[name].items() if count} != counts:
                self._fault(f"{name} runs are shown as {shown[name]}, and are {counts}")

    # -- 6: the files -----------------------------------------------------------------------
    def _integrity(self, connection: sa.Connection) -> None:
        if self.database.is_sqlite:
            if (found := connection.exec_driver_sql("PRAGMA integrity_check").scalar()) != "ok":
                self._fault(f"the database is damaged: {found}")
            return
        with contextlib.closing(self.database.engine.connect().execution_options()) as other:
            try:
                other.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS amcheck")
            except sa.exc.DBAPIError:
                self.figures["indexes_checked"] = False  # this PostgreSQL comes without it
                return
            query = "SELECT bt_index_check(oid, true) FROM pg_class WHERE relkind = 'i' AND relname !~ '^pg_'"
            self.figures["indexes_checked"] = len(other.exec_driver_sql(query).all())
            other.rollback()


def _told(connection: sa.Connection) -> Iterator[Event]:
    query = sa.select(events.c.data).where(
        events.c.verdict == ACCEPTED, events.c.kind.in_(["state", "states"])
    )
    for data in connection.execution_options(yield_per=5000).execute(query).scalars():
        event = read(data)
        assert event is not None
        yield event


def _ended(event: Event) -> list[tuple[str, int]]:
    if event.kind == "state":
        return [(event.run, event.attempt)]
    attempts = event.body.get("attempt") or [event.attempt] * len(event.body["index"])
    return [
        (element_id(event.run, index), attempt or event.attempt)
        for index, attempt in zip(event.body["index"], attempts, strict=True)
    ]


__all__ = ["Proof", "executions"]
