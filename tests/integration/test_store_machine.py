"""The store against a small model: deliveries, duplicates, crashes, takeovers, upkeep, in any order."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from penstock.api import ingest as ingesting
from penstock.api import upkeep
from penstock.api.db import Database
from penstock.api.ingest import acknowledged, ingest
from penstock.api.models import ACCEPTED, STALE, events, leases, metadata
from penstock.engine.events import Event, element_id, pack
from penstock.engine.spool import Batch
from tests.story import current, empty, hurry

EXAMPLES, STEPS = 45, 50
RUNS = 3
TERMINAL = ("COMPLETED", "FAILED")


class Crash(Exception):
    """What ends a transaction half-way."""


class Model:
    """What the store has to know: sets of events, and the greatest of each run."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, int], Event] = {}  # in spools
        self.verdicts: dict[tuple[str, int], int] = {}  # in the store
        self.leases: dict[str, tuple[int, str]] = {}

    def take(self, writer: str, seq: int) -> None:
        event = self.made[writer, seq]
        epoch, holder = self.leases.get(event.root, (0, ""))
        stale = event.epoch < epoch and writer != holder
        self.verdicts.setdefault((writer, seq), STALE if stale else ACCEPTED)

    def acknowledged(self, writer: str) -> int:
        number = 0
        while (writer, number + 1) in self.verdicts:
            number += 1
        return number

    def dropped(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for place, verdict in self.verdicts.items():
            event = self.made[place]
            if event.kind == "log" and verdict == ACCEPTED:
                found[event.root] = found.get(event.root, 0) + event.body["dropped"]
        return found

    def states(self) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        for place, verdict in self.verdicts.items():
            event = self.made[place]
            if verdict != ACCEPTED:
                continue
            if event.kind in {"flow_run", "task_run"}:
                found.setdefault(event.run, (0, 0, 0, 0, "PENDING"))
            runs = [event.run] if event.kind == "state" else []
            if event.kind == "states":
                runs = [element_id(event.run, index) for index in event.body["index"]]
            for run in runs:
                key = (event.epoch, event.attempt, event.rank, event.rseq, event.body["type"])
                found[run] = max(found.get(run, (0, 0, 0, 0, "PENDING")), key)
        return found


class Store(RuleBasedStateMachine):
    database: Database
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        hurry(self.database)
        empty(self.database)
        self.model = Model()
        self.drivers: list[tuple[str, str, int]] = []  # writer, root, epoch
        self.numbers: dict[tuple[str, int], int] = {}  # of the latest event of a root in an epoch
        self.start()

    # -- drivers ------------------------------------------------------------------------
    @rule()
    def start(self) -> None:
        """A driver starts a run of its own."""
        root = f"{len(self.drivers):032x}"
        self.drivers.append((self._writer(), root, 1))
        self._tell(self.drivers[-1], "flow_run", root, name=root[-4:], flow="f")

    def _writer(self) -> str:
        return f"e{len(self.drivers):031x}"

    @rule(pick=st.randoms(use_true_random=False))
    def take_over(self, pick: Any) -> None:
        """A new driver takes a run, whose owner may go on writing without knowing."""
        _, root, _ = pick.choice(self.drivers)
        epoch = max(one[2] for one in self.drivers if one[1] == root) + 1
        driver = (self._writer(), root, epoch)
        self.drivers.append(driver)
        self.model.leases[root] = (epoch, driver[0])
        with self.database.write() as connection:
            connection.execute(leases.delete().where(leases.c.root == root))
            connection.execute(leases.insert().values(root=root, epoch=epoch, holder=driver[0], renewed=0.0))

    @rule(pick=st.randoms(use_true_random=False), kind=st.sampled_from(["RUNNING", *TERMINAL]))
    def reach(self, pick: Any, kind: str) -> None:
        """A run reaches a state, in the spool of its driver."""
        driver = pick.choice(self.drivers)
        run, of = pick.choice(
            [(driver[1], "flow"), *((task(driver[1], number), "task") for number in range(RUNS))]
        )
        rank = 2 if kind in TERMINAL else 0
        self._tell(driver, "state", run, pick.randint(1, 3), rank, of=of, type=kind, name=kind.title())

    @rule(pick=st.randoms(use_true_random=False), index=st.lists(st.integers(0, 4), unique=True, min_size=1))
    def reach_many(self, pick: Any, index: list[int]) -> None:
        """Elements of a map reach a state."""
        driver = pick.choice(self.drivers)
        body = {"type": "COMPLETED", "name": "Completed", "index": index}
        self._tell(driver, "states", task(driver[1], 9), pick.randint(1, 3), 2, **body)

    @rule(pick=st.randoms(use_true_random=False), lines=st.integers(1, 9))
    def drop_lines(self, pick: Any, lines: int) -> None:
        """Lines of a log were not kept."""
        driver = pick.choice(self.drivers)
        self._tell(driver, "log", driver[1], lines=[], dropped=lines)

    def _tell(
        self, driver: tuple[str, str, int], kind: str, run: str, attempt: int = 0, rank: int = 0, **body: Any
    ) -> None:
        writer, root, epoch = driver
        rseq = self.numbers[root, epoch] = self.numbers.get((root, epoch), 0) + 1
        seq = 1 + sum(one == writer for one, _ in self.model.made)
        self.model.made[writer, seq] = Event(kind, run, root, 1.0, body, epoch, attempt, rank, rseq)

    # -- delivery -----------------------------------------------------------------------
    def _batches(self, pick: Any) -> list[Batch]:
        found = []
        for _ in range(pick.randint(1, 4)):
            writer = pick.choice(self.drivers)[0]
            last = sum(one == writer for one, _ in self.model.made)
            first = pick.randint(1, last) if last else 0
            if first:
                numbers = range(first, pick.randint(first, last) + 1)
                payloads = [pack(self.model.made[writer, number]) for number in numbers]
                found += [Batch(writer, first, payloads)] * pick.randint(1, 2)
        pick.shuffle(found)
        return found

    @rule(pick=st.randoms(use_true_random=False))
    def deliver(self, pick: Any) -> None:
        """Some of what is in the spools arrives: with gaps, repetitions, in any order."""
        batches = self._batches(pick)
        done = ingest(self.database, batches)
        for one in batches:
            for seq in range(one.first, one.last + 1):
                self.model.take(one.writer, seq)
        assert done == {one.writer: self.model.acknowledged(one.writer) for one in batches}

    @rule(pick=st.randoms(use_true_random=False))
    def deliver_and_crash(self, pick: Any) -> None:
        """The process dies inside the transaction: nothing of it is there."""
        acknowledge = ingesting._acknowledge

        def die(*others: Any) -> None:
            acknowledge(*others)
            raise Crash

        with mock.patch.object(ingesting, "_acknowledge", die), contextlib.suppress(Crash):
            ingest(self.database, self._batches(pick))
        self.database.close_writer()

    @rule()
    def rebuild(self) -> None:
        before = current(self.database)
        upkeep.rebuild(self.database)
        assert current(self.database) == before

    @precondition(lambda self: len(self.drivers) > 1)
    @rule()
    def retire(self) -> None:
        """All the spools arrive in full: now everything is acknowledged."""
        for writer in {one[0] for one in self.drivers}:
            last = sum(one == writer for one, _ in self.model.made)
            payloads = [pack(self.model.made[writer, number]) for number in range(1, last + 1)]
            assert ingest(self.database, [Batch(writer, 1, payloads)]) == {writer: last}
            for number in range(1, last + 1):
                self.model.take(writer, number)

    # -- what always holds --------------------------------------------------------------
    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        type(self).steps += 1
        with self.database.read() as connection:
            names = sorted({writer for writer, _ in self.model.made})
            known = acknowledged(connection, names)
            assert {name: known.get(name, 0) for name in names} == {
                name: self.model.acknowledged(name) for name in names
            }
            kept = sorted(row.verdict for row in connection.execute(events.select()))
            assert kept == sorted(self.model.verdicts.values())
        found = {}
        for table in ("flow_runs", "task_runs"):
            for row in self._rows(table):
                found[row["id"]] = tuple(
                    row[name] for name in ("epoch", "attempt", "rank", "rseq", "state_type")
                )
        assert found == self.model.states()
        assert {row["root"]: row["lines"] for row in self._rows("dropped_lines")} == self.model.dropped()

    def _rows(self, table: str) -> list[dict[str, Any]]:
        with self.database.read() as connection:
            statement = metadata.tables[table].select()
            return [dict(row._mapping) for row in connection.execute(statement)]


def task(root: str, number: int) -> str:
    """The id of a task run of a flow run."""
    return f"{number + 1:x}{root[1:]}"


@pytest.fixture
def machine(database: Database) -> type[Store]:
    return type("Store", (Store,), {"database": database})


def test_the_store_keeps_to_its_model(machine: type[Store], home: Path) -> None:
    given = examples(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    while machine.steps < 2_000:  # how long a run gets is for hypothesis to choose
        run_state_machine_as_test(machine, settings=given)


@pytest.mark.soak
def test_the_store_keeps_to_its_model_for_long(machine: type[Store], home: Path) -> None:
    given = examples(
        max_examples=12 * EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=given)
    assert machine.steps >= 20_000
