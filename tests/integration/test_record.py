"""The record: from spools to the store, through dead, locked, full and forked places."""

import contextlib
import errno
import json
import logging
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock import flow, task
from penstock.api import db, embedded, queries
from penstock.api.db import Database
from penstock.api.models import events, writers
from penstock.engine import home as homes
from penstock.engine import sender
from penstock.engine.events import Event, bus, new_id, pack
from penstock.engine.spool import HEADER, MAGIC, FileLock, Spool
from penstock.engine.tracking import start_tracking, stop_tracking
from tests.story import count_events, empty, story

Wait = Callable[..., None]


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


def census(database_url: str) -> tuple[int, set[int], bool]:
    """How many events there are, what their numbers lack to be gapless, whether the file is sound."""
    database = Database(database_url)
    with contextlib.closing(database), database.read() as connection:
        column, func = events.c, sa.func
        total = connection.execute(sa.select(func.count()).select_from(events)).scalar() or 0
        lacking = sa.select(func.max(column.seq) - func.count()).group_by(column.writer)
        gaps = set(connection.execute(lacking).scalars())
        sound = (
            not database.is_sqlite or connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        )
    return total, gaps, sound


def test_a_recorded_run_is_visible_to_the_next_command(home: Path, database_url: str) -> None:
    start_tracking()
    for event in story().events:
        bus.publish(event)
    (run,) = runs(home)  # while the driver still lives, and has not loaded the store
    assert run["tasks"] == {"COMPLETED": 6, "PENDING": 1}
    stop_tracking()
    assert runs(home) == [run]
    assert list((home / "spool").iterdir()) == []


def test_tracking_reaches_the_store(home: Path, database_url: str) -> None:
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert tracker.flush(20)
    assert stop_tracking()
    assert list((home / "spool").iterdir()) == []
    assert [run["name"] for run in runs(home)] == ["brave-otter"]


def test_spools_of_the_dead_are_drained_and_removed(home: Path, database_url: str) -> None:
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
    found = [Event("task_run", f"{number:032x}", f"{number:032x}", 1.0, {}) for number in range(3)]
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
        # That their driver is dead is told besides.
        assert count_events(store.database, "task_run") == complete
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


def test_a_driver_commits_what_others_left(home: Path, database_url: str, wait_until: Wait) -> None:
    left = leave(home, story("abc".count("b")).events)
    tracker = start_tracking()
    bus.publish(Event("flow_run", new_id(), new_id(), 1.0, {"name": "mine"}))
    assert tracker.flush(20)
    wait_until(lambda: not left.exists())
    assert {run["name"] for run in runs(home)} == {"mine", "brave-otter"}


def test_whoever_does_not_get_the_lock_leaves_its_events_to_the_holder(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "spool").mkdir()
    lock = FileLock.take(home / "penstock.db.lock", os.O_RDWR | os.O_CREAT)
    assert lock is not None
    (home / "penstock.db").touch()  # the holder is making it
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert not tracker.flush(0.5)
    assert caplog.records == []
    assert not embedded.drain(home, patience=0.1)
    holder = embedded.EmbeddedStore(home)
    holder.database.prepare()
    holder._sweep(None)  # what the holder of the lock does: live spools, too
    assert tracker.flush(20)
    holder.close()
    lock.release()


def test_a_foreign_lock_on_the_database_loses_nothing(
    home: Path, sqlite_database: Database, caplog: pytest.LogCaptureFixture
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
    assert count_events(sqlite_database) == len(story().events)
    assert caplog.records == []


def test_a_lock_that_outlasts_the_patience_of_sqlite_raises_nothing(
    home: Path, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(db, "BUSY_TIMEOUT", 0.1)
    foreign = sqlite3.connect(home / "penstock.db", isolation_level=None)
    foreign.execute("BEGIN EXCLUSIVE")
    tracker = start_tracking()
    for event in story().events:
        bus.publish(event)
    assert not tracker.flush(1.5)
    foreign.execute("COMMIT")
    foreign.close()
    assert tracker.flush(20)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_sender_is_quiet_about_what_goes_well(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=sender.logger.name):
        tracker = start_tracking()
        bus.publish(story().events[0])
        assert tracker.flush(20)
    assert caplog.records == []


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


def test_a_short_script_ends_without_loading_the_store(home: Path, database_url: str) -> None:
    out, err = driver(3, "end").communicate(timeout=60)
    assert (out, err) == ("False\n", "")
    (run,) = runs(home)
    assert (run["state"]["type"], run["tasks"]) == ("COMPLETED", {"COMPLETED": 3})


def test_processes_that_record_at_once_do_not_meet(home: Path, database_url: str) -> None:
    count = 800
    drivers = [driver(count, "flush") for _ in range(3)]
    ends = [one.communicate(timeout=100) for one in drivers]
    assert [end for end in ends if end != ("True\n", "")] == []
    found = runs(home)
    assert [run["state"]["type"] for run in found] == ["COMPLETED"] * 3
    assert [run["tasks"] for run in found] == [{"COMPLETED": count}] * 3
    total, gaps, healthy = census(database_url)
    assert total == 3 * (2 * count + 3)
    assert gaps == {0}
    assert healthy
    assert list((home / "spool").iterdir()) == []


def test_a_killed_driver_has_lost_nothing(home: Path, database_url: str) -> None:
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


def test_a_forked_process_records_under_a_name_of_its_own(home: Path, database_url: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {run["name"] for run in runs(home)} == {"before", "parent", "child", "late child"}
    with embedded.reading(home) as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(writers)).scalar() == 2


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


# -- commands -------------------------------------------------------------------------------


def command(*words: str) -> tuple[int, str, str]:
    program = [sys.executable, "-c", "from penstock.cli import main; main()", *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_the_spools_are_shown_and_drained(home: Path, database_url: str) -> None:
    assert command("spool", "status") == (0, f"no events wait in {home / 'spool'}\n", "")
    left = leave(home, story().events)
    with driver(200, "wait") as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        code, out, err = command("spool", "status")
        assert (code, err) == (0, "")
        assert f"pid {one.pid}" in out
        assert left.stem[:8] in out
        assert "dead" in out
        told = {entry["writer"]: entry for entry in json.loads(command("spool", "status", "--json")[1])}
        assert told[left.stem]["unsent"] == len(story().events)
        assert command("spool", "drain")[0] == 0
        assert not left.exists()
        database = Database(database_url)  # and not `reading`, which would drain, too
        with contextlib.closing(database), database.read() as connection:
            counts = {run["name"]: run["tasks"] for run in queries.list_runs(connection)}
        assert counts.pop("brave-otter") == {"COMPLETED": 6, "PENDING": 1}
        assert list(counts.values()) == [{"COMPLETED": 200}]  # of the living one, too
        one.kill()
    assert command("spool", "drain")[0] == 0
    assert list((home / "spool").iterdir()) == []


def test_a_record_that_is_switched_off_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "flow.py"
    script.write_text(
        "from penstock import flow, task\n@task\ndef one(x):\n    return x\n"
        "@flow\ndef many():\n    return sum(one.map(range(20)).result())\nassert many() == 190\n"
    )
    monkeypatch.setenv("PENSTOCK_TRACKING", "off")
    home.rmdir()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert not home.exists()


@task
def tenfold(x: int) -> int:
    return x * 10


@task(task_run_name="x is {x}")
def named(x: int) -> int:
    return x


@flow(task_runner="threads")
def names_from_values() -> Any:
    return named.map(tenfold.map([1, 2, 3]))


def test_names_that_workers_make_for_elements_are_in_the_record(clean_environment: Path) -> None:
    assert names_from_values() == [10, 20, 30]
    stop_tracking()
    (run,) = runs(clean_environment)
    with embedded.reading(clean_environment) as connection:
        rows = [row for row in queries.list_task_runs(connection, run["id"]) if row["task"] == "named"]
    assert [(row["name"], row["element"]) for row in rows] == [("x is 10", 0), ("x is 20", 1), ("x is 30", 2)]
    assert len({row["map"] for row in rows}) == 1
    assert {row["state"]["type"] for row in rows} == {"COMPLETED"}
