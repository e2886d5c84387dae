"""Task runs outside of flows: whoever drives them says so as a whole, and what a dead driver left is Crashed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock.api import counts, embedded, queries, upkeep
from penstock.api.commands import COMMANDS
from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.api.models import task_runs, writers
from penstock.api.reaper import Reaper
from penstock.engine.events import HOST, Event, element_id, pack
from penstock.engine.spool import Batch
from tests.drivers import SharedStore, Wait, driver

ALONE, MAP, FLOW, WITHIN = "a" * 32, "b" * 32, "c" * 32, "d" * 32
ME, YOU = "1" * 32, "2" * 32

CODE = """
from penstock.task_runners import ThreadPoolTaskRunner

@task
def hold(n):
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.05)  # work: until the test lets it go

@task
def nap(n):
    return n

if __name__ == "__main__":
    nap(1)
    with ThreadPoolTaskRunner(max_workers=4):
        nap.submit(2).result()
        runs = [hold.submit(n) for n in range(2)] + list(hold.map(range(6)))
        for run in runs:
            run.result()
"""


def alone(home: Path) -> dict[str, list[dict[str, Any]]]:
    with embedded.reading(home) as connection:
        found: dict[str, list[dict[str, Any]]] = {"nap": [], "hold": []}
        for run in queries.list_task_runs(connection):
            found[run["task"]].append(run)
        return found


@pytest.fixture
def go(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = home.parent / f"{home.name}-go"
    monkeypatch.setenv("GO", str(path))
    return path


def test_what_a_killed_driver_left_is_crashed_for_the_next_command(
    home: Path, database_url: str, go: Path, wait_until: Wait
) -> None:
    with driver(home, CODE) as process:
        wait_until(lambda: len(alone(home)["hold"]) == 8, 60)
        os.kill(process.pid, signal.SIGSTOP)
        assert {run["state"]["type"] for run in alone(home)["hold"]} <= {"PENDING", "RUNNING"}
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        left = alone(home)
    assert {(run["state"]["type"], run["state"]["cause"]) for run in left["hold"]} == {
        ("CRASHED", "HeartbeatLost")
    }
    assert {run["state"]["message"] for run in left["hold"]} == {
        f"its driver (pid {process.pid} on {HOST}) died"
    }
    assert [run["state"]["type"] for run in left["nap"]] == ["COMPLETED"] * 2
    database = Database(database_url)
    before = _rows(database)
    upkeep.rebuild(database)
    assert _rows(database) == before
    database.close()


def test_a_driver_that_lives_keeps_its_runs(home: Path, go: Path, wait_until: Wait) -> None:
    with driver(home, CODE) as process:
        wait_until(lambda: len(alone(home)["hold"]) == 8, 60)
        go.touch()
        assert process.wait(60) == 0, process.stdout and process.stdout.read()
        assert {run["state"]["type"] for run in alone(home)["hold"]} == {"COMPLETED"}


def _rows(database: Database) -> list[Any]:
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(sa.select(task_runs).order_by(task_runs.c.id))]


# -- by beats: drivers that share nothing but a connection -------------------------------------


@pytest.fixture
def shared(tmp_path: Path) -> Any:
    found = SharedStore(tmp_path / "shared.db")
    found.database.prepare()
    yield found
    found.close()


def test_a_driver_of_nothing_but_tasks_says_that_it_lives(
    home: Path, shared: SharedStore, go: Path, wait_until: Wait
) -> None:
    def seen() -> float:
        with shared.database.read() as connection:
            return float(connection.execute(sa.select(sa.func.max(writers.c.seen))).scalar() or 0.0)

    def states() -> set[str]:
        return {one["state"]["type"] for one in shared.ask({"what": "task_runs"}) if one["task"] == "hold"}

    with driver(home, CODE, shared=shared.database.path) as process:
        wait_until(lambda: len(shared.ask({"what": "task_runs"})) == 10, 60)
        wait_until(lambda: states() <= {"RUNNING", "PENDING"}, 60)
        told = seen()
        wait_until(lambda: seen() > told + 1.0, 60)  # long after its last event
        process.kill()
        process.wait(10)
    reaper = Reaper(shared.database, lease=1.0)
    reaper.look()
    assert states() <= {"RUNNING", "PENDING"}  # a reaper that begins grants a whole lease
    wait_until(lambda: reaper.look() is not None and states() == {"CRASHED"}, 10)


class Looks:
    """A reaper that looks every 5 s of a clock that the test turns."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.database, self.reaper = database, Reaper(database)
        self.now, self.passed = time.time(), 0.0
        monkeypatch.setattr("penstock.api.reaper.time.monotonic", lambda: self.passed)
        monkeypatch.setattr("penstock.api.leases.store_time", lambda connection: self.now)

    def after(self, seconds: float, beats: Callable[[], Any] = lambda: None) -> None:
        for _ in range(int(seconds // 5)):
            self.now, self.passed = self.now + 5, self.passed + 5
            beats()
            self.reaper.look(self.now)


@pytest.fixture
def looks(database: Database, monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(database, monkeypatch)


def tell(database: Database, writer: str, *events: Event, first: int = 1) -> None:
    ingest(database, [Batch(writer, first, [pack(event) for event in events])])


def made(database: Database) -> None:
    """Two kinds of task runs outside of flows, on a machine that is not this one, none of them ended."""
    now = time.time()
    about = {"task": "t", "name": "t", "host": "elsewhere", "pid": 5}
    tell(
        database,
        ME,
        Event("task_run", ALONE, ALONE, now, about, rseq=1),
        Event("state", ALONE, ALONE, now, _state("RUNNING"), 1, 1, 0, 2),
        Event("map_run", MAP, MAP, now, {**about, "count": 4}, rseq=3),
        Event("states", MAP, MAP, now, {**_state("COMPLETED"), "index": [1]}, 1, 1, 2, 4),
        Event("states", MAP, MAP, now, {**_state("RUNNING"), "index": [3], "attempt": [2]}, 1, 2, 0, 5),
    )


def _state(kind: str) -> dict[str, Any]:
    return {"of": "task", "type": kind, "name": kind.capitalize(), "message": ""}


def kinds(database: Database) -> dict[str, str]:
    with database.read() as connection:
        runs = {run["id"]: run["state"]["type"] for run in queries.list_task_runs(connection)}
    names = {ALONE: "alone", **{element_id(MAP, index): str(index) for index in range(4)}}
    return {names[run]: kind for run, kind in runs.items()}


OPEN = {"alone": "RUNNING", "0": "PENDING", "1": "COMPLETED", "2": "PENDING", "3": "RUNNING"}
LEFT = {"alone": "CRASHED", "0": "CRASHED", "1": "COMPLETED", "2": "CRASHED", "3": "CRASHED"}


def test_a_driver_that_is_silent_is_presumed_dead_and_one_that_beats_is_not(
    database: Database, looks: Looks
) -> None:
    made(database)
    looks.after(120, lambda: COMMANDS["beat"](database, holder=ME, roots={}))
    assert kinds(database) == OPEN
    looks.after(25, lambda: COMMANDS["beat"](database, holder=YOU, roots={}))
    assert kinds(database) == OPEN
    looks.after(10)
    assert kinds(database) == LEFT
    with database.read() as connection:
        run = queries.get_run(connection, element_id(MAP, 3))
    assert run is not None
    assert run["attempt"] == 2
    assert "pid 5 on elsewhere" in run["state"]["message"]


def test_the_last_word_of_the_driver_wins(database: Database, looks: Looks) -> None:
    made(database)
    looks.after(60)
    now = time.time()
    tell(
        database,
        ME,
        Event("state", ALONE, ALONE, now, _state("COMPLETED"), 1, 1, 2, 6),
        Event("states", MAP, MAP, now, {**_state("RUNNING"), "index": [0]}, 1, 1, 0, 7),
        Event("states", MAP, MAP, now, {**_state("COMPLETED"), "index": [3], "attempt": [2]}, 1, 2, 2, 8),
        first=6,
    )
    assert kinds(database) == LEFT | {"alone": "COMPLETED", "0": "RUNNING", "3": "COMPLETED"}
    before = _rows(database)
    upkeep.rebuild(database)
    assert _rows(database) == before


def test_runs_within_flows_are_their_flow_runs_business(database: Database, looks: Looks) -> None:
    now = time.time()
    tell(
        database,
        ME,
        Event(
            "state", WITHIN, FLOW, now, _state("RUNNING"), 1, 1, 0, 3
        ),  # before anything else of its flow run
    )
    looks.after(60)
    with database.read() as connection:
        assert [one.state_type for one in connection.execute(sa.select(task_runs))] == ["RUNNING"]


def test_nothing_of_a_dead_driver_counts_as_running(database: Database, looks: Looks) -> None:
    now = looks.now
    flow = {"of": "flow", "type": "RUNNING", "name": "Running"}
    events = [
        Event("flow_run", FLOW, FLOW, now, {"flow": "f", "name": "f", "host": "elsewhere", "pid": 1}, rseq=1),
        Event("state", FLOW, FLOW, now, flow, 1, 1, 0, 2),
        Event("task_run", WITHIN, FLOW, now, {"flow_run": FLOW, "task": "t", "name": "t"}, rseq=3),
        Event("state", WITHIN, FLOW, now, {**_state("RUNNING"), "started": now}, 1, 1, 0, 4),
    ]
    tell(database, ME, *events)

    def activity() -> dict[str, Any]:
        with database.read() as connection:
            return counts.get_activity(connection, root=FLOW, after=now - 10, before=now + 90, bins=10)

    assert activity()["running"] == [0] + [1] * 9
    looks.after(60)
    found = activity()
    assert found["running"][0] == 0
    assert found["running"][1] == 1
    assert found["running"][-1] == 0
    assert sum(found["failed"]) == sum(found["ended"]) == 1
    with database.read() as connection:
        later = counts.get_activity(connection, root=FLOW, after=now + 70, before=now + 90, bins=2)
    assert later["running"] == [0, 0]
