"""Events into a real SQLite file: each once, in any order; the schema that holds them."""

import contextlib
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from penstock.api import db, embedded, queries
from penstock.api.db import Database
from penstock.api.ingest import _portions, acknowledged, ingest
from penstock.api.models import events, leases, metadata
from penstock.engine.events import Event, bus, element_id, pack
from penstock.engine.spool import Batch
from penstock.engine.tracking import start_tracking, stop_tracking
from penstock.errors import ConfigurationError
from tests.story import LOAD, MAP, ROOT, Flow, batch, count_events, current, empty, hurry, story


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Runs that reach states in whatever order, each event with a number of its own."""
    flow = Flow()
    flow.add("flow_run", ROOT, name="x")
    flow.add("task_run", LOAD, flow_run=ROOT, name="load")
    flow.add("map_run", MAP, flow_run=ROOT, name="inc", count=4)
    runs = st.sampled_from(
        [(ROOT, "flow"), (LOAD, "task"), *((element_id(MAP, i), "task") for i in range(4))]
    )
    kinds = st.sampled_from(["PENDING", "RUNNING", "COMPLETED", "FAILED"])
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.booleans()):
            run, of = draw(runs)
            flow.state(run, draw(kinds), draw(st.integers(0, 3)), of, message=str(len(flow.events)))
        else:
            index = draw(st.lists(st.integers(0, 3), unique=True, min_size=1))
            attempts = draw(st.lists(st.integers(0, 3), min_size=len(index), max_size=len(index)))
            body = {"type": draw(kinds), "name": "Any", "index": index, "attempt": attempts}
            flow.events.append(Event("states", MAP, ROOT, 1.0, body, 1, 1, 0, len(flow.events) + 1))
    return flow.events


@given(found=histories(), choices=st.randoms(use_true_random=False))
@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_repetition_and_company_change_nothing(
    database: Database, found: list[Event], choices: random.Random
) -> None:
    hurry(database)
    empty(database)
    assert ingest(database, [batch(found)]) == {"a" * 32: len(found)}
    expected = current(database)

    empty(database)
    by_writer: dict[str, list[Event]] = {"b" * 32: [], "c" * 32: []}
    for event in found:
        by_writer[choices.choice(list(by_writer))].append(event)
    pieces = []
    for writer, mine in by_writer.items():
        begin = 0
        while begin < len(mine):
            size = choices.randint(1, 4)
            pieces += [batch(mine[begin : begin + size], writer, begin + 1)] * choices.randint(1, 3)
            begin += size
    choices.shuffle(pieces)
    while pieces:
        some = [pieces.pop() for _ in range(min(len(pieces), choices.randint(1, 3)))]
        ingest(database, some)
    with database.read() as connection:
        done = acknowledged(connection, list(by_writer))
    assert {writer: done.get(writer, 0) for writer in by_writer} == {w: len(m) for w, m in by_writer.items()}
    assert count_events(database) == len(found)
    assert current(database) == expected


def test_portions_change_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    found = story(count=40).events
    ingest(database, [batch(found)])
    expected = current(database)
    empty(database)
    monkeypatch.setattr("penstock.api.ingest.LARGE", 0)
    monkeypatch.setattr("penstock.api.ingest.PORTION", 300)
    monkeypatch.setattr("penstock.api.db.OUTDATED", 1)
    first, second = batch(found[:7]), batch(found[7:], "b" * 32)
    assert len(list(_portions([first, second]))) > 3 or database.is_sqlite
    done = ingest(database, [second, first, batch(found[3:7], first=4)])
    assert done == {"a" * 32: 7, "b" * 32: len(found) - 7}
    assert current(database) == expected
    assert count_events(database) == len(found)


@given(
    sizes=st.lists(st.lists(st.integers(0, 12), max_size=6), max_size=6),
    large=st.integers(0, 8),
    portion=st.integers(1, 30),
)
def test_portions_are_the_batches_in_their_order(sizes: list[list[int]], large: int, portion: int) -> None:
    batches = [
        Batch(f"{place:032x}", 5, [b"x" * size for size in found]) for place, found in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.api.ingest.LARGE", large)
        patch.setattr("penstock.api.ingest.PORTION", portion)
        portions = list(_portions(batches))
        again = [list(_portions(one)) for one in portions]
    told = [
        (one.writer, one.first + place, payload)
        for one in batches
        for place, payload in enumerate(one.payloads)
    ]
    pieces = [piece for one in portions for piece in one]
    assert told == [
        (one.writer, one.first + place, payload)
        for one in pieces
        for place, payload in enumerate(one.payloads)
    ]
    assert {one.writer for one in pieces} == {one.writer for one in batches}
    assert all(len(one) <= 1 for one in again)


def test_a_gap_holds_the_acknowledgement_back(database: Database) -> None:
    found = story().events
    assert ingest(database, [batch(found[3:6], first=4)]) == {"a" * 32: 0}
    assert ingest(database, [batch(found[1:2], first=2)]) == {"a" * 32: 0}
    assert ingest(database, [batch(found[0:1], first=1)]) == {"a" * 32: 2}
    assert ingest(database, [batch(found[0:4], first=1)]) == {"a" * 32: 6}
    assert count_events(database) == 6


def test_a_terminal_state_is_terminal_within_its_attempt(database: Database) -> None:
    flow = Flow()
    flow.add("task_run", LOAD, name="load")
    flow.state(LOAD, "COMPLETED", 1)
    flow.state(LOAD, "RUNNING", 1)
    flow.state(LOAD, "PENDING", 0)
    ingest(database, [batch(flow.events)])
    with database.read() as connection:
        run = queries.get_run(connection, LOAD)
        assert run is not None
        assert run["state"]["type"] == "COMPLETED"
        types = [step["type"] for step in queries.get_history(connection, LOAD)]
    assert types == ["PENDING", "RUNNING", "COMPLETED"]


def test_what_cannot_be_read_holds_up_nobody(database: Database) -> None:
    flow = Flow()
    flow.add("task_run", LOAD, name="load")
    good = [pack(event) for event in flow.events]
    flow.add("state", LOAD, 1, 2)  # no type
    flow.add("states", MAP, 1, 0, type="RUNNING", name="Running", index=[1, 2], time=[1.0])  # unequal columns
    flow.add("map_run", MAP, count="many")
    flow.add("state", LOAD, 1, 0, type="RUNNING", name="Running", nbytes=[1])
    flow.add(
        "states", MAP, 1, 0, type="RUNNING", name="Running", index=[1], nbytes=[1 << 63]
    )  # not for SQLite
    flow.add("state", "x" * 99, 1, 0, type="RUNNING", name="Running")
    bad = [pack(event) for event in flow.events[1:]] + [
        b"\xc1",
        b"nonsense",
        pack(Event("k", "r", "r", 0.0, {}, -1)),
    ]
    flow.state(LOAD, "COMPLETED")
    payloads = [*good, *bad, pack(flow.events[-1])]
    assert ingest(database, [Batch("a" * 32, 1, payloads)]) == {"a" * 32: len(payloads)}
    with database.read() as connection:
        run = queries.get_run(connection, LOAD)
        verdicts = [row.verdict for row in connection.execute(events.select().order_by(events.c.seq))]
    assert run is not None
    assert run["state"]["type"] == "COMPLETED"
    assert verdicts == [0, *[2] * len(bad), 0]


def test_a_late_owner_changes_nothing_and_stays_visible(database: Database) -> None:
    flow = Flow()
    flow.add("flow_run", ROOT, name="x")
    ingest(database, [batch(flow.events)])
    with database.write() as connection:
        connection.execute(leases.insert().values(root=ROOT, epoch=2, holder="b" * 32, renewed=0.0))
    flow.state(ROOT, "COMPLETED", of="flow")
    late = batch(flow.events[1:], first=2)
    ingest(database, [late])
    with database.write() as connection:
        connection.execute(leases.delete())
    ingest(database, [late])  # the verdict was given when it came
    with database.read() as connection:
        (run,) = queries.list_runs(connection)
        steps = queries.get_history(connection, ROOT)
    assert run["state"]["type"] == "PENDING"
    assert [(step["type"], step["stale"]) for step in steps] == [("PENDING", False), ("COMPLETED", True)]


def test_ten_thousand_elements_are_a_matter_of_moments(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, size = Flow(), 10_000
    flow.add("map_run", MAP, flow_run=ROOT, task="inc", name="inc", count=size)
    columns: dict[str, Any] = {"started": [1.0] * size, "seconds": [0.5] * size, "worker": [0] * size}
    flow.states(MAP, "COMPLETED", list(range(size)), workers=["w"], **columns)
    statements: list[str] = []
    upsert = Database.upsert

    def counted(self: Database, connection: Any, name: str, *others: Any) -> None:
        statements.append(name)
        upsert(self, connection, name, *others)

    monkeypatch.setattr(Database, "upsert", counted)
    ingest(database, [batch(flow.events)])
    assert len(statements) == len(set(statements)) <= 12  # one per kind of row, however many rows
    assert count_events(database) == 2
    with database.read() as connection:
        assert len(queries.list_task_runs(connection, ROOT, states=["COMPLETED"], limit=2 * size)) == size


# -- the schema -----------------------------------------------------------------------------


def schema(path: Path) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: " ".join(sql.split()) for name, sql in rows}


def test_a_new_database_is_what_the_migrations_make(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    new, old = tmp_path / "new.db", tmp_path / "old.db"
    database = Database(f"sqlite:///{new}")
    database.prepare()
    database.close()
    with contextlib.closing(sqlite3.connect(old)) as connection:  # a store before the first revision
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
    database = Database(f"sqlite:///{old}")
    database.prepare()
    with database.read() as reader:
        assert compare_metadata(MigrationContext.configure(reader), metadata) == []
        assert db.schema_version(reader) == db.REVISIONS[-1]
    database.close()
    made, migrated = schema(new), schema(old)
    made.pop("alembic_version")
    migrated.pop("alembic_version")
    assert made == migrated


def test_every_revision_is_listed() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(db.__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == db.REVISIONS


def test_a_store_from_the_future_is_refused(
    home: Path, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with database.write() as connection:
        connection.execute(db.VERSION_TABLE.update().values(version_num="9999"))
    database.close()
    with pytest.raises(ConfigurationError, match="newer penstock"):
        embedded.drain(home)
    tracker = start_tracking()
    bus.publish(story().events[0])
    assert not tracker.flush(20)
    assert not stop_tracking()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(list((home / "spool").glob("*.log"))) == 1


def test_the_store_is_private_and_survives_power_failures(home: Path, database: Database) -> None:
    if not database.is_sqlite:
        with database.write() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        return
    assert (home / "penstock.db").stat().st_mode & 0o077 == 0
    with database.write() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_readers_cannot_write(database: Database) -> None:
    with database.read() as connection, pytest.raises(Exception, match=r"readonly|read-only"):
        connection.execute(leases.insert().values(root="r", epoch=1, holder="h", renewed=0.0))


def test_a_database_that_was_removed_is_made_anew(home: Path, database: Database) -> None:
    if not database.is_sqlite:
        pytest.skip("nobody removes the file of a server")
    ingest(database, [batch(story().events)])
    for path in home.glob("penstock.db*"):
        path.unlink()
    assert ingest(database, [batch(story().events)]) == {"a" * 32: len(story().events)}
    assert count_events(database) == len(story().events)
