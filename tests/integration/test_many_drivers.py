"""Many drivers on one record while others look at it: no lock error anywhere, nothing lost; and its size."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from penstock import flow, task
from penstock.api import embedded, queries
from penstock.api.db import Database
from penstock.api.models import events
from penstock.engine.tracking import stop_tracking

DRIVERS = 16

DRIVER = """
import json, logging, sys, time
from penstock import flow, task
from penstock.engine.tracking import stop_tracking

@task
def work(x):
    time.sleep(0.01)
    return x

@flow
def many(n):
    return sum(work.map(range(n)).result()) + work.submit(1).result()

complaints = []
class Keep(logging.Handler):
    def emit(self, record):
        complaints.append(record.getMessage())
logging.getLogger().addHandler(Keep(logging.WARNING))
flows, end = 0, time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    assert many(20) == 191
    flows += 1
sent = stop_tracking(60)
print(json.dumps({"flows": flows, "sent": sent, "complaints": complaints}))
"""


def look(home: Path) -> int:
    """What a person does meanwhile: the list, one run, its log, one question more."""
    with embedded.reading(home, patience=0.5) as connection:
        found = queries.list_runs(connection, limit=20)
        for run in found[:3]:
            queries.get_tree(connection, run["id"])
            queries.get_logs(connection, run["id"])
        return len(found)


def drive(home: Path, database_url: str, seconds: float) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", DRIVER, str(seconds)]
    drivers = [subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe) for _ in range(DRIVERS)]
    looked, errors = 0, []
    while any(one.poll() is None for one in drivers):
        try:
            look(home)
            looked += 1
        except Exception as error:  # counted, not raised: the drivers have to end in any case
            errors.append(repr(error))
        time.sleep(0.05)  # work: a page that is refreshed often
    ends = [one.communicate() for one in drivers]
    assert [err for _, err in ends if err] == []
    told = [json.loads(out) for out, _ in ends]
    assert [complaint for one in told for complaint in one["complaints"]] == []
    assert errors == []
    assert looked >= 3
    flows = sum(one["flows"] for one in told)
    assert embedded.drain(home, 60)
    assert list((home / "spool").iterdir()) == []
    database = Database(database_url)
    with contextlib.closing(database), database.read() as connection:
        runs = queries.list_runs(connection, limit=100_000)
        assert len(runs) == flows
        assert {run["state"]["type"] for run in runs} == {"COMPLETED"}
        assert all(run["tasks"] == {"COMPLETED": 21} for run in runs)
        column, func = events.c, sa.func
        lacking = sa.select(func.max(column.seq) - func.count()).group_by(column.writer)
        assert set(connection.execute(lacking).scalars()) == {0}
    print(f"{DRIVERS} drivers, {flows} flows, looked {looked} times")


@pytest.mark.timeout(240)
def test_sixteen_drivers_do_not_meet(home: Path, database_url: str) -> None:
    drive(home, database_url, 10.0)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_sixteen_drivers_do_not_meet_for_long(home: Path, database_url: str) -> None:
    drive(home, database_url, 60.0)


SIZE = "SELECT pg_database_size(current_database())"


def test_a_hundred_thousand_mapped_tasks_take_little_room(home: Path, database_url: str) -> None:
    count = 100_000
    empty = 0
    if not database_url.startswith("sqlite"):
        with contextlib.closing(Database(database_url)) as database:
            database.prepare()
            with database.read() as connection:
                empty = connection.exec_driver_sql(SIZE).scalar() or 0

    @task
    def transform_visibilities(part: int) -> int:
        return part + 1

    @flow(task_runner="threads")
    def reduce_everything() -> int:
        return sum(transform_visibilities.map(range(count)).result())

    assert reduce_everything() == count * (count + 1) // 2
    stop_tracking()
    assert embedded.drain(home)
    database = Database(database_url)
    with contextlib.closing(database):
        with database.read() as connection:
            (run,) = queries.list_runs(connection)
            assert run["tasks"] == {"COMPLETED": count}
            if not database.is_sqlite:
                size = (connection.exec_driver_sql(SIZE).scalar() or 0) - empty
                print(f"{size / 1e6:.1f} MB, and {empty / 1e6:.1f} MB of an empty database")
                assert size <= 60e6
                return
        raw = database.raw_writer()
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    size = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB")
    assert size <= 60e6
