"""The record: from events in spools to rows in a real SQLite file, and back as answers."""

import contextlib
import errno
import json
import logging
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from penstock.api import db, embedded, queries
from penstock.api.db import Database
from penstock.api.ingest import acknowledged, ingest
from penstock.api.models import events, leases, metadata
from penstock.engine import home as homes
from penstock.engine import sender
from penstock.engine.events import Event, bus, element_id, new_id, pack
from penstock.engine.spool import HEADER, MAGIC, Batch, FileLock, Spool
from penstock.engine.tracking import start_tracking, stop_tracking
from penstock.errors import ConfigurationError

Wait = Callable[..., None]
ROOT, LOAD, MAP, CHILD, STAND_IN = (f"{number:032x}" for number in range(1, 6))


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


@pytest.fixture
def database(home: Path) -> Iterator[Database]:
    found = Database(f"sqlite:///{home / 'penstock.db'}")
    found.prepare()
    yield found
    found.close()


class Flow:
    """Makes the events of a flow run, numbered as its driver would."""

    def __init__(self, root: str = ROOT) -> None:
        self.root = root
        self.events: list[Event] = []

    def add(self, kind: str, run: str, attempt: int = 0, rank: int = 0, **body: Any) -> None:
        number = len(self.events) + 1
        self.events.append(Event(kind, run, self.root, 1000.0 + number, body, 1, attempt, rank, number))

    def state(self, run: str, kind: str, attempt: int = 1, of: str = "task", **body: Any) -> None:
        rank = 2 if kind in {"COMPLETED", "FAILED", "CRASHED"} else 0
        self.add("state", run, attempt, rank, **{"of": of, "type": kind, "name": kind.title(), **body})

    def states(self, run: str, kind: str, index: list[int], attempt: int = 1, **body: Any) -> None:
        rank = 2 if kind == "COMPLETED" else 0
        self.add("states", run, attempt, rank, type=kind, name=kind.title(), index=index, **body)


def story(count: int = 5) -> Flow:
    """A flow that loads, maps over what it loaded with one retry, and calls another flow."""
    flow = Flow()
    about: dict[str, Any] = {"flow_run": ROOT, "parent": None, "tags": ["blue"], "upstream": []}
    flow.add("flow_run", ROOT, flow="hello", name="brave-otter", tags=["a"], parameters={"n": "5"}, pid=7)
    flow.state(ROOT, "RUNNING", of="flow")
    flow.add("runner", ROOT, name="threads", workers=1)
    flow.add("task_run", LOAD, **about, task="load", name="load", parameters={"path": "'a'"})
    flow.state(LOAD, "COMPLETED", started=1003.0, seconds=1.5, worker="w1", nbytes=80, peak=4096)
    edges: dict[str, Any] = {
        "upstream": [["y", LOAD]],
        "upstream_maps": [["z", MAP, 1]],
        "upstream_elements": [],
    }
    flow.add(
        "map_run", MAP, **about | edges, task="inc", name="inc", parameters={"y": "3"}, start=0, count=count
    )
    flow.states(MAP, "RUNNING", list(range(count)), time=[1007.0] * count)
    done = [index for index in range(count) if index != 2]
    columns: dict[str, Any] = {
        "started": [1007.5] * len(done),
        "seconds": [0.5] * len(done),
        "nbytes": [8] * len(done),
    }
    places = [index % 2 for index in done]
    flow.states(MAP, "COMPLETED", done, attempt=1, worker=places, workers=["w1", "w2"], **columns)
    odd = element_id(MAP, 2)
    flow.state(odd, "FAILED", 1, error={"type": "ValueError", "message": "boom", "text": "Traceback"})
    flow.state(odd, "RUNNING", 2, name="Retrying")
    flow.state(odd, "COMPLETED", 2, started=1012.0, seconds=0.25)
    flow.add("log", LOAD, lines=[[1004.0, "INFO", "loading"], [1003.0, "DEBUG", "before"]], dropped=2)
    flow.add("log", ROOT, lines=[[1013.0, "ERROR", "from the flow"]], dropped=0)
    flow.add("task_run", STAND_IN, **about, task="child", name="child", child_flow_run=CHILD)
    flow.add(
        "flow_run", CHILD, flow="child", name="small-otter", parent_flow_run=ROOT, parent_task_run=STAND_IN
    )
    flow.state(CHILD, "COMPLETED", of="flow", seconds=1.0)
    flow.add("novelty", ROOT, something="that this version does not know")
    flow.state(ROOT, "COMPLETED", of="flow", started=1002.0, seconds=16.0)
    return flow


def batch(found: list[Event], writer: str = "a" * 32, first: int = 1) -> Batch:
    return Batch(writer, first, [pack(event) for event in found])


FOLDED = [metadata.tables[name] for name in ("flow_runs", "task_runs", "maps")]


def current(database: Database) -> dict[str, list[Any]]:
    with database.read() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(table.select())), key=repr) for table in FOLDED
        }


def empty(database: Database) -> None:
    with database.write() as connection:
        for table in metadata.tables.values():
            connection.execute(table.delete())


def hurry(database: Database) -> None:
    """Do without the disk where a test commits thousands of times."""
    raw = database._writing().connection.driver_connection
    assert raw is not None
    raw.execute("PRAGMA synchronous = OFF")


def count_events(database: Database) -> int:
    with database.read() as connection:
        return len(connection.execute(events.select()).all())


# -- ingest ---------------------------------------------------------------------------------


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


# -- answers --------------------------------------------------------------------------------


@pytest.fixture
def told(database: Database) -> Iterator[Any]:
    ingest(database, [batch(story().events)])
    with database.read() as connection:
        yield connection


def test_the_list_of_runs(told: Any) -> None:
    (run,) = queries.list_runs(told)
    assert (run["name"], run["flow"], run["state"]["type"]) == ("brave-otter", "hello", "COMPLETED")
    assert run["tasks"] == {"COMPLETED": 6, "PENDING": 1}
    assert (run["tags"], run["parameters"], run["backend"]) == (
        ["a"],
        {"n": "5"},
        {"name": "threads", "workers": 1},
    )
    assert (run["started"], run["seconds"], run["ended"]) == (1002.0, 16.0, 1018.0)
    assert [one["id"] for one in queries.list_runs(told, nested=True)] == [CHILD, ROOT]
    assert queries.list_runs(told, states=["failed"]) == []
    assert queries.list_runs(told, before=ROOT) == []
    assert queries.list_runs(told, flow="other") == []


def test_one_run_as_a_tree(told: Any) -> None:
    tree = queries.get_tree(told, ROOT, elements=1)
    assert tree is not None
    json.dumps(tree)
    load, inc, child = tree["nodes"]
    assert (load["kind"], load["name"], load["seconds"], load["worker"]) == ("task", "load", 1.5, "w1")
    assert (inc["kind"], inc["count"], inc["states"]) == ("map", 5, {"COMPLETED": 5})
    assert (inc["seconds"], inc["started"], inc["nbytes"]) == (2.25, 1007.5, 32)
    assert inc["upstream"] == [{"parameter": "y", "run": LOAD}]
    assert inc["upstream_maps"] == [{"parameter": "z", "map": MAP, "offset": 1}]
    (element,) = inc["nodes"]
    assert element["name"] == "inc-0"
    assert element["upstream"] == [
        {"parameter": "y", "run": LOAD},
        {"parameter": "z", "run": element_id(MAP, 1)},
    ]
    assert child["flow"]["name"] == "small-otter"
    whole = queries.get_tree(told, ROOT, elements=None)
    assert whole is not None
    assert [node["name"] for node in whole["nodes"][1]["nodes"]] == [f"inc-{index}" for index in range(5)]
    assert queries.get_tree(told, LOAD) is None


def test_the_history_of_an_element(told: Any) -> None:
    steps = queries.get_history(told, element_id(MAP, 2))
    assert [(step["name"], step["attempt"]) for step in steps] == [
        ("Pending", 0),
        ("Running", 1),
        ("Failed", 1),
        ("Retrying", 2),
        ("Completed", 2),
    ]
    assert steps[2]["error"]["message"] == "boom"
    assert [step["derived"] for step in steps] == [True, False, False, False, False]
    first = queries.get_history(told, element_id(MAP, 0))
    assert [(step["type"], step["time"], step["worker"]) for step in first] == [
        ("PENDING", 1006.0, None),
        ("RUNNING", 1007.0, None),
        ("COMPLETED", 1008.0, "w1"),
    ]


def test_a_start_that_only_the_end_tells_is_shown(told: Any) -> None:
    steps = queries.get_history(told, LOAD)
    assert [(step["type"], step["time"], step["derived"]) for step in steps] == [
        ("PENDING", 1004.0, True),
        ("RUNNING", 1003.0, True),
        ("COMPLETED", 1005.0, False),
    ]


def test_the_logs_of_a_run_and_of_its_tasks(told: Any) -> None:
    log = queries.get_logs(told, ROOT)
    assert [(line["text"], line["name"]) for line in log["lines"]] == [
        ("before", "load"),
        ("loading", "load"),
        ("from the flow", "brave-otter"),
    ]
    assert log["dropped"] == 2
    assert [line["text"] for line in queries.get_logs(told, LOAD, level="info")["lines"]] == ["loading"]
    assert [line["text"] for line in queries.get_logs(told, ROOT, limit=1)["lines"]] == ["from the flow"]
    assert queries.get_logs(told, CHILD)["lines"] == []
    assert queries.get_logs(told, "f" * 32) == {"lines": [], "dropped": 0}


def test_runs_are_found_by_what_people_remember(told: Any) -> None:
    odd = element_id(MAP, 2)
    for text in (odd, odd[:31], odd[-8:], "inc-2"):
        assert [run["id"] for run in queries.find_runs(told, text)] == [odd]
    assert [run["kind"] for run in queries.find_runs(told, "brave-otter")] == ["flow"]
    assert [run["name"] for run in queries.find_runs(told, "hello")] == ["brave-otter"]
    assert queries.find_runs(told, "nothing") == []
    assert queries.find_runs(told, "'; DROP TABLE events; --") == []


def test_one_task_run_with_everything(told: Any) -> None:
    run = queries.get_run(told, element_id(MAP, 3))
    assert run is not None
    assert (run["parameters"], run["element"], run["map"]) == ({"y": "3"}, 3, MAP)
    assert run["upstream"][0] == {"parameter": "y", "run": LOAD, "name": "load"}
    assert queries.get_run(told, "f" * 32) is None
    assert [one["name"] for one in queries.list_task_runs(told, ROOT, states=["PENDING"])] == ["child"]
    flow = queries.get_run(told, ROOT)
    assert flow is not None
    assert flow["flows"] == [CHILD]


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
    assert (home / "penstock.db").stat().st_mode & 0o077 == 0
    with database.write() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_readers_cannot_write(database: Database) -> None:
    with database.read() as connection, pytest.raises(Exception, match="readonly"):
        connection.execute(leases.insert().values(root="r", epoch=1, holder="h", renewed=0.0))


def test_a_database_that_was_removed_is_made_anew(home: Path, database: Database) -> None:
    ingest(database, [batch(story().events)])
    for path in home.glob("penstock.db*"):
        path.unlink()
    assert ingest(database, [batch(story().events)]) == {"a" * 32: len(story().events)}
    assert count_events(database) == len(story().events)


# -- spools into the store ------------------------------------------------------------------


def leave(home: Path, found: list[Event]) -> Path:
    """Leave a spool behind as a killed driver does."""
    (home / "spool").mkdir(exist_ok=True)
    spool = Spool(home / "spool")
    for event in found:
        spool.append(pack(event))
    spool._lock.release()
    return spool.path


def runs(home: Path) -> list[Any]:
    with embedded.reading(home) as connection:
        return queries.list_runs(connection)


def test_a_recorded_run_is_visible_to_the_next_command(home: Path) -> None:
    start_tracking()
    for event in story().events:
        bus.publish(event)
    (run,) = runs(home)  # while the driver still lives, and has not loaded the store
    assert run["tasks"] == {"COMPLETED": 6, "PENDING": 1}
    stop_tracking()
    assert runs(home) == [run]
    assert list((home / "spool").iterdir()) == []


def test_tracking_reaches_the_store(home: Path) -> None:
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert tracker.flush(20)
    assert stop_tracking()
    assert list((home / "spool").iterdir()) == []
    assert [run["name"] for run in runs(home)] == ["brave-otter"]


def test_spools_of_the_dead_are_drained_and_removed(home: Path) -> None:
    found = story().events
    for number in range(150):  # more than are held at a time
        leave(home, [Event("flow_run", new_id(), f"{number:032x}", 1.0, {"name": str(number)})])
    leave(home, found)
    leave(home, [])
    assert embedded.drain(home)
    assert list((home / "spool").iterdir()) == []
    with embedded.reading(home) as connection:
        assert len(queries.list_runs(connection, limit=1000)) == 151


def test_a_torn_spool_is_drained_at_every_offset(home: Path) -> None:
    found = [Event("flow_run", f"{number:032x}", f"{number:032x}", 1.0, {}) for number in range(3)]
    whole = leave(home, found).read_bytes()
    lengths = [HEADER.size + len(pack(event)) for event in found]
    store = embedded.EmbeddedStore(home)
    for length in range(len(MAGIC), len(whole) + 1, 7):
        if store.database._writer is not None:
            empty(store.database)
        for path in (home / "spool").glob("*"):
            path.unlink()
        path = home / "spool" / f"{length:032x}.log"
        path.write_bytes(whole[:length])
        assert store.drain()
        assert not path.exists()
        complete = sum(len(MAGIC) + sum(lengths[: number + 1]) <= length for number in range(3))
        assert count_events(store.database) == complete
    store.close()


def test_a_damaged_spool_gives_what_it_can_and_is_kept_aside(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave(home, story().events)
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + HEADER.size + len(pack(story().events[0])) + HEADER.size + 3] ^= 0x55
    path.write_bytes(data)
    assert [run["name"] for run in runs(home)] == ["brave-otter"]
    assert [one.suffix for one in (home / "spool").iterdir()] == [".rejected"]
    assert "damaged" in caplog.text


def test_a_driver_commits_what_others_left(home: Path, wait_until: Wait) -> None:
    left = leave(home, story("abc".count("b")).events)
    tracker = start_tracking()
    bus.publish(Event("flow_run", new_id(), new_id(), 1.0, {"name": "mine"}))
    assert tracker.flush(20)
    wait_until(lambda: not left.exists())
    assert {run["name"] for run in runs(home)} == {"mine", "brave-otter"}


def test_whoever_does_not_get_the_lock_leaves_its_events_to_the_holder(home: Path) -> None:
    (home / "spool").mkdir()
    lock = FileLock.take(home / "penstock.db.lock", os.O_RDWR | os.O_CREAT)
    assert lock is not None
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert not tracker.flush(1.0)
    assert not embedded.drain(home, patience=0.1)
    holder = embedded.EmbeddedStore(home)
    holder.database.prepare()
    holder._sweep(None)  # what the holder of the lock does: live spools, too
    assert tracker.flush(20)
    holder.close()
    lock.release()


def test_a_foreign_lock_on_the_database_loses_nothing(
    home: Path, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = sqlite3.connect(home / "penstock.db", isolation_level=None, check_same_thread=False)
    foreign.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(2.0, foreign.execute, ["COMMIT"])
    timer.start()
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert not tracker.flush(0.5)
    assert tracker.flush(20)
    timer.join()
    foreign.close()
    assert stop_tracking()
    assert count_events(database) == len(story().events)
    assert caplog.records == []


def test_a_lock_that_outlasts_the_patience_of_sqlite_raises_nothing(
    home: Path, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(db, "BUSY_TIMEOUT", 0.1)
    foreign = sqlite3.connect(home / "penstock.db", isolation_level=None)
    foreign.execute("BEGIN EXCLUSIVE")
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert not tracker.flush(3.0)
    foreign.execute("COMMIT")
    foreign.close()
    assert tracker.flush(20)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# -- several processes ----------------------------------------------------------------------

DRIVER = """
import sys, time
from penstock.engine.events import Event, bus, new_id
from penstock.engine.tracking import start_tracking
tracker = start_tracking()
root, count, end = new_id(), int(sys.argv[1]), sys.argv[2]
number = 0
def tell(kind, run, attempt=0, rank=0, **body):
    global number
    number += 1
    bus.publish(Event(kind, run, root, time.time(), body, 1, attempt, rank, number))
tell("flow_run", root, flow="f", name=f"run-{root}")
tell("state", root, 1, of="flow", type="RUNNING", name="Running")
for index in range(count):
    task = new_id()
    tell("task_run", task, flow_run=root, task="t", name=f"t-{index}")
    tell("state", task, 1, 2, of="task", type="COMPLETED", name="Completed", started=time.time(), seconds=0.0)
tell("state", root, 1, 2, of="flow", type="COMPLETED", name="Completed")
if end == "flush":
    assert tracker.flush(30)
if end == "wait":
    print("ready", flush=True)
    sys.stdin.read()
print("sqlalchemy" in sys.modules)
"""


def driver(count: int, end: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "error", "-c", DRIVER, str(count), end]
    return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def test_a_short_script_ends_without_loading_the_store(home: Path) -> None:
    out, err = driver(3, "end").communicate(timeout=60)
    assert (out, err) == ("False\n", "")
    (run,) = runs(home)
    assert (run["state"]["type"], run["tasks"]) == ("COMPLETED", {"COMPLETED": 3})


def test_processes_that_record_at_once_do_not_meet(home: Path) -> None:
    count = 1500
    drivers = [driver(count, "flush") for _ in range(3)]
    ends = [one.communicate(timeout=100) for one in drivers]
    assert [end for end in ends if end != ("True\n", "")] == []
    found = runs(home)
    assert [run["state"]["type"] for run in found] == ["COMPLETED"] * 3
    assert [run["tasks"] for run in found] == [{"COMPLETED": count}] * 3
    with contextlib.closing(sqlite3.connect(home / "penstock.db")) as connection:
        total = connection.execute(
            "SELECT count(*), count(DISTINCT writer || ' ' || seq) FROM events"
        ).fetchone()
        gaps = connection.execute("SELECT max(seq) - count(*) FROM events GROUP BY writer").fetchall()
        healthy = connection.execute("PRAGMA integrity_check").fetchone()
    assert total == (3 * (2 * count + 3),) * 2
    assert set(gaps) == {(0,)}
    assert healthy == ("ok",)
    assert list((home / "spool").iterdir()) == []


def test_a_killed_driver_has_lost_nothing(home: Path) -> None:
    with driver(200, "wait") as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        one.kill()
    (run,) = runs(home)
    assert run["tasks"] == {"COMPLETED": 200}
    assert list((home / "spool").iterdir()) == []


FORKING = """
import os
from penstock.engine.events import Event, bus, new_id
from penstock.engine.tracking import start_tracking
def tell(name):
    bus.publish(Event("flow_run", new_id(), new_id(), 1.0, {"name": name}))
tracker = start_tracking()
tell("before")
assert tracker.flush(30)
child = os.fork()
if child == 0:
    tell("child")
    assert tracker.flush(30)
    tell("late child")
    os._exit(0)
tell("parent")
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_records_under_a_name_of_its_own(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {run["name"] for run in runs(home)} == {"before", "parent", "child", "late child"}
    with contextlib.closing(sqlite3.connect(home / "penstock.db")) as connection:
        assert connection.execute("SELECT count(*) FROM writers").fetchone() == (2,)


FULL = """
import resource
from penstock.engine import tracking
from penstock.engine.events import Event, bus, new_id
tracking.DISK_RETRY = 0.0
tracker = tracking.start_tracking()
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
for number in range(500):
    bus.publish(Event("flow_run", f"{number:032x}", f"{number:032x}", 1.0, {"name": str(number)}))
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
"""


def test_a_full_disk_does_not_stop_the_run(home: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "takes no events" in done.stderr
    with embedded.reading(home) as connection:
        assert len(queries.list_runs(connection, limit=1000)) == 500


def test_a_home_that_cannot_be_written_to_has_a_stand_in(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = tempfile.mkstemp

    def read_only(dir: Path, **options: Any) -> Any:
        if home in Path(dir).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    monkeypatch.setattr(homes, "LOCAL", tmp_path)
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert tracker.flush(20)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"PENSTOCK_HOME {home} cannot be written to (Read-only file system)" in caplog.text
    with embedded.reading() as connection:  # the next command looks in the same place
        assert [run["name"] for run in queries.list_runs(connection)] == ["brave-otter"]
    assert tracker.home.path.parent.parent == tmp_path


# -- speed ----------------------------------------------------------------------------------


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
    assert len(statements) == 7  # one per table, however many rows
    assert count_events(database) == 2
    with database.read() as connection:
        assert len(queries.list_task_runs(connection, ROOT, states=["COMPLETED"], limit=2 * size)) == size


def test_the_sender_is_quiet_about_what_goes_well(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=sender.logger.name):
        tracker = start_tracking()
        bus.publish(story().events[0])
        assert tracker.flush(20)
    assert caplog.records == []
