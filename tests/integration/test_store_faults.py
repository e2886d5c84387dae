"""Databases that are away, full, damaged or not for us: words that help, and nothing acknowledged is lost."""

import contextlib
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock import settings
from penstock.api import embedded, queries, upkeep
from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.api.refusals import explain
from penstock.engine.events import Event, bus, new_id, pack
from penstock.engine.spool import Batch, Spool
from penstock.engine.tracking import start_tracking, stop_tracking
from penstock.errors import ConfigurationError, PenstockError
from tests.postgres import Server
from tests.story import batch, count_events, story

Wait = Callable[..., None]


def command(*words: str) -> tuple[int, str, str]:
    program = [sys.executable, "-c", "from penstock.cli import main; main()", *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=100)
    return done.returncode, done.stdout, done.stderr


def leave(home: Path, found: list[Event]) -> Path:
    (home / "spool").mkdir(exist_ok=True)
    spool = Spool(home / "spool")
    for event in found:
        spool.append(pack(event))
    spool._lock.release()
    return spool.path


def flow_run(name: str) -> Event:
    run = new_id()
    return Event("flow_run", run, run, time.time(), {"name": name, "flow": "f"})


# -- PostgreSQL -----------------------------------------------------------------------------


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def point(url: str) -> None:
        monkeypatch.setenv("PENSTOCK_DATABASE_URL", url)
        settings.refresh()

    return point


@pytest.mark.postgres
def test_a_server_that_refuses_is_named_without_its_password(
    postgres_server: Server, home: Path, point_at: Callable[[str], None]
) -> None:
    leave(home, story().events)
    cases = {
        postgres_server.url("postgres", "wr0ngword"): "refuses the user or the password",
        postgres_server.url("nowhere"): "has no database of this name",
        "postgresql://penstock:wr0ngword@127.0.0.1:1/x": "cannot be reached",
    }
    for url, words in cases.items():
        point_at(url)
        with pytest.raises(PenstockError, match=words):
            embedded.drain(home)
        for words_of_command in (("runs",), ("spool", "drain"), ("db", "rebuild")):
            code, out, err = command(*words_of_command)
            assert code in {1, 2}
            assert out == ""
            assert words in err
            assert err.startswith("penstock: ")
            assert err.count("\n") == 1
            assert "wr0ngword" not in err
            assert "s3cret" not in err
    assert len(list((home / "spool").glob("*.log"))) == 1  # and nothing is lost


@pytest.mark.postgres
def test_a_user_without_rights_is_told_so(
    postgres_server: Server, home: Path, point_at: Callable[[str], None]
) -> None:
    url = postgres_server.new_database()
    postgres_server.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    point_at(url.replace("penstock:s3cret%2F%40word", "guest:guest"))
    with pytest.raises(ConfigurationError, match="does not let this user write"):
        embedded.drain(home)
    postgres_server.drop(url)
    postgres_server.execute("DROP ROLE guest")


@pytest.mark.postgres
def test_a_server_that_crashes_and_comes_back_loses_nothing(
    postgres_server: Server, home: Path, point_at: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres_server.new_database()
    point_at(url)
    tracker = start_tracking()
    for number in range(300):
        bus.publish(flow_run(str(number)))
        if number == 100:
            assert tracker.flush(20)
            postgres_server.kill()
    assert not tracker.flush(0.5)
    postgres_server.start()
    assert tracker.flush(30)
    assert stop_tracking()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be reached" in caplog.text or "takes no" in caplog.text or "cannot be used" in caplog.text
    with embedded.reading(home) as connection:
        assert {run["name"] for run in queries.list_runs(connection, limit=1000)} == set(map(str, range(300)))
    postgres_server.drop(url)


@pytest.mark.postgres
def test_several_that_write_the_same_runs_do_not_wait_in_a_circle(postgres_server: Server) -> None:
    url = postgres_server.new_database()
    first = Database(url)
    first.prepare()
    found = [story(30).events for _ in range(6)]
    writers = [f"{number:032x}" for number in range(6)]
    batches = [
        Batch(writer, begin + 1, [pack(event) for event in mine[begin : begin + 4]])
        for writer, mine in zip(writers, found, strict=True)
        for begin in range(0, len(mine), 4)
    ]
    errors: list[Exception] = []

    def bring(number: int) -> None:
        database = Database(url)
        mine = batches[number:] + batches[:number]
        try:
            for place in range(0, len(mine), 3):
                some = mine[place : place + 3]
                ingest(database, some if number % 2 else some[::-1])
        except Exception as error:
            errors.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=bring, args=(number * 7,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(100)
    assert errors == []
    assert count_events(first) == 6 * len(found[0])
    first.close()
    postgres_server.drop(url)


# -- SQLite ---------------------------------------------------------------------------------


def test_a_damaged_database_is_named_with_the_remedy_and_set_aside(
    home: Path, sqlite_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    path = home / "penstock.db"
    for number in range(200):
        ingest(sqlite_database, [batch([flow_run(str(number))], f"{number:032x}")])
    upkeep.give_back_space(sqlite_database)
    sqlite_database.close()
    with path.open("r+b") as file:  # every page but the first
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))
    left = leave(home, story().events)
    code, _, err = command("runs")
    assert code == 1
    assert err.startswith(f"penstock: The database {path} is damaged; run `penstock db reset`")
    tracker = start_tracking()
    bus.publish(flow_run("after"))
    assert not tracker.flush(10)
    assert not stop_tracking()
    assert "is damaged" in caplog.text
    assert left.exists()
    code, out, err = command("db", "reset", "--yes")
    assert (code, err) == (0, "")
    assert "the damaged file is" in out
    (aside,) = [one for one in home.glob("penstock.db.damaged-*") if one.suffix not in {"-wal", "-shm"}]
    assert aside.stat().st_size > 4096
    with embedded.reading(home) as connection:  # what was not committed before is here now
        assert {run["name"] for run in queries.list_runs(connection)} == {"brave-otter", "after"}


def test_a_disk_that_is_full_under_the_store_keeps_events_in_the_spool(
    home: Path, sqlite_database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = batch(story().events)
    ingest(sqlite_database, [told])
    sqlite_database.close()
    limit = 60  # pages

    def small(connection: Any, record: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {limit}")

    sa.event.listen(sa.Engine, "connect", small)
    try:
        tracker = start_tracking()
        for number in range(3000):
            bus.publish(flow_run(str(number)))
        assert not tracker.flush(3)
        assert "takes nothing more" in caplog.text
        caplog.clear()
        with embedded.reading(home) as connection:  # reading goes on
            assert "brave-otter" in {run["name"] for run in queries.list_runs(connection, limit=5000)}
        assert "may not be the latest" in caplog.text
        limit = 1 << 30
        assert tracker.flush(60)  # it recovers by itself
    finally:
        sa.event.remove(sa.Engine, "connect", small)
    assert stop_tracking()
    with embedded.reading(home) as connection:
        assert len(queries.list_runs(connection, limit=5000)) == 3001


SMALL_FILES = """
import resource, signal, sys, time
from penstock.engine import sender, tracking
from penstock.engine.events import Event, bus, new_id
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sender.START_DELAY = tracking.DISK_RETRY = 0.0
tracker = tracking.start_tracking()
def tell(name):
    run = new_id()
    bus.publish(Event("flow_run", run, run, time.time(), {"name": name, "flow": "f" * 200}))
tell("first")
assert tracker.flush(30)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))  # neither spool nor store may grow beyond
for number in range(3000):
    tell(str(number))
assert not tracker.flush(1)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
assert tracker.flush(60)
"""


def test_files_that_must_not_grow_lose_nothing(home: Path, database_url: str) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", SMALL_FILES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    with embedded.reading(home) as connection:
        assert len(queries.list_runs(connection, limit=5000)) == 3001


def test_a_database_that_may_only_be_read_is_named(home: Path, sqlite_database: Database) -> None:
    with contextlib.closing(sqlite3.connect(f"file:{home}/penstock.db?mode=ro", uri=True)) as connection:
        with pytest.raises(sqlite3.OperationalError) as caught:
            connection.execute("DELETE FROM events")
    sentence = explain(sqlite_database, caught.value)
    assert sentence.startswith(
        f"The database {home}/penstock.db cannot be written to (attempt to write a readonly"
    )


# -- clocks ---------------------------------------------------------------------------------


def test_clocks_decide_nothing(database: Database) -> None:
    """Each event an hour before the one before it: the states are those of a good clock."""
    found = story().events
    astray = [
        Event(
            one.kind,
            one.run,
            one.root,
            1e9 - 3600.0 * place,
            one.body,
            one.epoch,
            one.attempt,
            one.rank,
            one.rseq,
        )
        for place, one in enumerate(found)
    ]
    ingest(database, [batch(astray)])
    with database.read() as connection:
        (run,) = queries.list_runs(connection)
        assert (run["state"]["type"], run["tasks"]) == ("COMPLETED", {"COMPLETED": 6, "PENDING": 1})
        assert run["seconds"] == 16.0
        for one in queries.list_task_runs(connection, run["id"]):
            assert (one["seconds"] or 0.0) >= 0.0


def test_a_clock_that_jumps_back_under_a_driver_changes_no_order(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = time.time
    tracker = start_tracking()
    for place, event in enumerate(story().events):
        monkeypatch.setattr(time, "time", lambda place=place: true() - 3600.0 * place)
        bus.publish(event)
    assert tracker.flush(20)
    monkeypatch.setattr(time, "time", lambda: true() - 7200.0)
    assert stop_tracking()
    monkeypatch.setattr(time, "time", true)
    with embedded.reading(home) as connection:
        (run,) = queries.list_runs(connection)
    assert run["state"]["type"] == "COMPLETED"
