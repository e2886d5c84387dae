"""Who is dead and who is well: leases, the reaper, and the end of drivers."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import errors
from penstock.api import embedded, leases, queries
from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.api.leases import NOBODY, Lease
from penstock.api.reaper import Reaper
from penstock.engine.events import Event, pack
from penstock.engine.spool import Batch, Spool
from tests.drivers import SharedStore, Wait, driver

ROOT, OTHER, CHILD, TASK = "a" * 32, "b" * 32, "c" * 32, "d" * 32
ME, YOU = "1" * 32, "2" * 32
HOUR = 3600.0


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


@pytest.fixture
def database(home: Path) -> Iterator[Database]:
    found = Database(f"sqlite:///{home / 'penstock.db'}")
    found.prepare()
    yield found
    found.close()


def tell(database: Database, writer: str, *events: Event, first: int = 1) -> None:
    ingest(database, [Batch(writer, first, [pack(event) for event in events])])


def state(run: str, kind: str, *order: int, of: str = "flow", root: str = ROOT) -> Event:
    body = {"of": of, "type": kind, "name": kind.capitalize(), "message": ""}
    return Event("state", run, root, time.time(), body, *order)


def begin(database: Database, writer: str = ME) -> None:
    """A flow with a subflow and a task, none of them ended, on a machine that is not this one."""
    whereabouts = {"name": "r", "flow": "f", "host": "elsewhere", "pid": 1}
    tell(
        database,
        writer,
        Event("flow_run", ROOT, ROOT, time.time(), whereabouts, rseq=1),
        state(ROOT, "RUNNING", 1, 1, 0, 2),
        Event("flow_run", CHILD, ROOT, time.time(), {"parent_flow_run": ROOT, "flow": "g"}, rseq=3),
        Event("task_run", TASK, ROOT, time.time(), {"flow_run": ROOT, "task": "t"}, rseq=4),
        state(TASK, "RUNNING", 1, 1, 0, 5, of="task"),
    )


def shown(database: Database, run: str = ROOT) -> dict[str, Any]:
    with database.read() as connection:
        found = queries.get_run(connection, run)
    assert found is not None
    state_of: dict[str, Any] = found["state"]
    return state_of


def lease_of(database: Database) -> Lease | None:
    with database.read() as connection:
        return leases.find(connection, [ROOT]).get(ROOT)


def beat(database: Database, holder: str = ME, epoch: int = 1) -> dict[str, Any]:
    with database.write() as connection:
        return leases.beat(connection, holder, {ROOT: epoch}, write=True)


class Looks:
    """A reaper that looks every 5 s of a clock that the test turns."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reaper = Reaper(database)
        self.now, self.passed = time.time(), 0.0
        monkeypatch.setattr("penstock.api.reaper.time.monotonic", lambda: self.passed)

    def after(self, seconds: float, *, step: float = 5.0, beats: Any = None) -> list[str]:
        found: list[str] = []
        for _ in range(int(seconds // step)):
            self.now, self.passed = self.now + step, self.passed + step
            if beats is not None:
                beats(self.now)
            found += self.reaper.look(self.now)
        return found


@pytest.fixture
def looks(database: Database, monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(database, monkeypatch)


def renewed(database: Database, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver's beat at the time of a `Looks`."""

    def at(now: float) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("penstock.api.leases.store_time", lambda _: now)
            assert beat(database) == {"lost": [], "presumed": [], "requests": []}

    return at


# -- by leases --------------------------------------------------------------------------------


def test_a_driver_that_is_silent_for_a_lease_is_presumed_dead(
    database: Database, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(database)
    assert looks.after(300, beats=renewed(database, monkeypatch)) == []
    assert looks.after(30) == []
    assert looks.after(5) == [ROOT]  # 35 s after its last beat
    state_of = shown(database)
    assert (state_of["type"], state_of["cause"]) == ("CRASHED", "HeartbeatLost")
    assert "pid 1 on elsewhere" in state_of["message"]
    assert looks.after(60) == []  # told once


def test_a_driver_that_never_beat_counts_from_its_creation(database: Database, looks: Looks) -> None:
    begin(database)
    assert looks.after(30) == []
    assert looks.after(10) == [ROOT]


def test_what_a_dead_driver_left_is_shown_crashed_everywhere(database: Database, looks: Looks) -> None:
    begin(database)
    looks.after(60)
    for run in (ROOT, CHILD, TASK):
        assert shown(database, run)["type"] == "CRASHED"
        assert "presumed dead" in shown(database, run)["message"]
    with database.read() as connection:
        (found,) = queries.list_runs(connection, states=["CRASHED"])
        assert found["tasks"] == {"CRASHED": 1}
        assert queries.list_runs(connection, states=["RUNNING"], nested=True) == []
        assert len(queries.list_runs(connection, states=["CRASHED"], nested=True)) == 2
        assert [one["id"] for one in queries.list_task_runs(connection, ROOT, states=["crashed"])] == [TASK]
        assert queries.list_task_runs(connection, ROOT, states=["running"]) == []
        tree = queries.get_tree(connection, ROOT)
        assert tree is not None
        assert [node["state"]["type"] for node in tree["nodes"]] == ["CRASHED", "CRASHED"]


def test_the_last_word_of_the_owner_wins_while_nobody_took_the_run(database: Database, looks: Looks) -> None:
    begin(database)
    looks.after(60)
    tell(
        database,
        ME,
        state(ROOT, "COMPLETED", 1, 1, 2, 9),
        state(TASK, "COMPLETED", 1, 1, 2, 8, of="task"),
        first=6,
    )
    assert shown(database)["type"] == "COMPLETED"
    assert shown(database, TASK)["type"] == "COMPLETED"


def test_late_events_of_the_living_do_not_reopen_what_is_presumed(database: Database, looks: Looks) -> None:
    begin(database)
    looks.after(60)
    tell(database, ME, state(ROOT, "RUNNING", 1, 1, 0, 9), first=6)
    assert shown(database)["type"] == "CRASHED"


@pytest.mark.parametrize("gap", [11.0, 40.0, HOUR])
def test_a_reaper_that_was_stopped_grants_a_whole_lease(
    database: Database, looks: Looks, monkeypatch: pytest.MonkeyPatch, gap: float
) -> None:
    begin(database)
    renew = renewed(database, monkeypatch)
    looks.after(60, beats=renew)
    assert looks.after(gap, step=gap) == []  # nobody could reach the server either
    assert looks.after(10) == []
    assert looks.after(60, beats=renew) == []
    assert looks.after(40) == [ROOT]


def test_a_new_reaper_grants_a_whole_lease(
    database: Database, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(database)
    looks.now += HOUR
    assert looks.after(30) == []
    assert looks.after(60, beats=renewed(database, monkeypatch)) == []


@pytest.mark.parametrize("jump", [HOUR, -HOUR, 60.0])
def test_a_clock_that_jumps_kills_nobody(
    database: Database, looks: Looks, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    begin(database)
    renew = renewed(database, monkeypatch)
    looks.after(60, beats=renew)
    looks.now += jump
    assert looks.after(30) == []
    assert looks.after(60, beats=renew) == []


# -- owners -----------------------------------------------------------------------------------


def test_a_run_is_taken_once(database: Database, looks: Looks) -> None:
    begin(database)
    beat(database)
    with database.write() as connection, pytest.raises(errors.RunOwnedElsewhere, match="pid 1 on elsewhere"):
        leases.take(connection, ROOT, YOU)
    looks.after(60)
    assert lease_of(database) == Lease(ROOT, 1, NOBODY, 0.0)
    assert beat(database)["presumed"] == [ROOT]
    with database.write() as connection:
        assert leases.take(connection, ROOT, YOU, epoch=1) == 2
        with pytest.raises(errors.RunOwnedElsewhere):
            leases.take(connection, ROOT, ME, epoch=1)
    assert beat(database) == {"lost": [ROOT], "presumed": [], "requests": []}


def test_takeover_of_a_run_whose_driver_lives(database: Database) -> None:
    begin(database)
    beat(database)
    with database.write() as connection:
        assert leases.take(connection, ROOT, YOU, takeover=True) == 2
    assert beat(database)["lost"] == [ROOT]


def test_late_events_of_the_old_owner_are_stale(database: Database, looks: Looks) -> None:
    begin(database)
    looks.after(60)
    with database.write() as connection:
        leases.take(connection, ROOT, YOU)
    tell(database, YOU, state(ROOT, "RUNNING", 2, 1, 0, 1))
    tell(
        database,
        ME,
        state(ROOT, "COMPLETED", 1, 1, 2, 9),
        state(TASK, "COMPLETED", 1, 1, 2, 8, of="task"),
        first=6,
    )
    assert shown(database)["type"] == "RUNNING"
    assert shown(database, TASK)["type"] == "RUNNING"


def test_a_run_that_does_not_exist_cannot_be_taken(database: Database) -> None:
    with database.write() as connection, pytest.raises(errors.ConfigurationError, match="no root flow run"):
        leases.take(connection, OTHER, ME)


# -- by proof ---------------------------------------------------------------------------------


def test_the_lock_on_a_spool_decides_at_once(home: Path, database: Database) -> None:
    (home / "spool").mkdir()
    spool = Spool(home / "spool")
    begin(database, spool.writer)
    assert Reaper(database, home, local=True).look(time.time() + HOUR) == []
    spool._lock.release()
    assert Reaper(database, home, local=True).look() == [ROOT]
    assert shown(database)["message"].endswith("died")


def test_a_writer_that_has_gone_on_to_another_spool_still_lives(home: Path, database: Database) -> None:
    (home / "spool").mkdir()
    spool = Spool(home / "spool")
    begin(database, spool.writer)
    spool.retire()
    assert Reaper(database, home, local=True).look() == []
    assert embedded.drain(home)
    assert Reaper(database, home, local=True).look() == []
    spool.close(spool.last)
    assert list((home / "spool").iterdir()) == []


FLOW = """
@task
def nap():
    time.sleep(60)  # work:

@flow
def inner():
    nap.submit().wait()

@flow
def outer():
    nap.submit()
    inner()

outer()
"""


def running(home: Path, tasks: int) -> bool:
    with embedded.reading(home) as connection:
        runs = queries.list_runs(connection, nested=True, states=["RUNNING"])
    counts = [count for run in runs for kind, count in run["tasks"].items() if kind in {"PENDING", "RUNNING"}]
    return sum(counts) == tasks


def test_a_killed_driver_is_crashed_for_the_next_command(home: Path, wait_until: Wait) -> None:
    with driver(home, FLOW) as process:
        wait_until(lambda: running(home, 3), 20)
        os.kill(process.pid, signal.SIGSTOP)
        assert running(home, 3)  # who is stopped is not dead
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        with embedded.reading(home) as connection:
            runs = queries.list_runs(connection, nested=True)
            tasks = [one for run in runs for one in queries.list_task_runs(connection, run["id"])]
    assert [(run["state"]["type"], run["state"]["cause"]) for run in runs] == 2 * [
        ("CRASHED", "HeartbeatLost")
    ]
    assert [one["state"]["type"] for one in tasks] == 3 * ["CRASHED"]
    assert f"pid {process.pid}" in runs[0]["state"]["message"]


# -- over a store that drivers share with nobody's home ----------------------------------------

LONG = """
@flow
def long():
    time.sleep(float(os.environ["SECONDS"]))  # work:
    return "done"

try:
    print(long(), flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedStore]:
    found = SharedStore(tmp_path / "shared.db")
    found.database.prepare()
    yield found
    found.close()


def only(store: SharedStore) -> dict[str, Any]:
    found = store.ask({"what": "runs"})
    return found[0] if found else {"id": "", "state": {"type": "", "name": ""}}


def test_a_driver_that_comes_back_takes_its_run_again(
    home: Path, shared: SharedStore, wait_until: Wait
) -> None:
    reaper = Reaper(shared.database, lease=1.5)
    path = shared.database.path
    with driver(home, LONG, shared=path, SECONDS="4") as process:
        wait_until(lambda: bool(only(shared)["id"] and lease(shared)), 20)
        reaper.look()
        assert only(shared)["state"]["type"] == "RUNNING"
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: bool(reaper.look()), 20)
        assert only(shared)["state"]["cause"] == "HeartbeatLost"
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: only(shared)["state"]["type"] != "CRASHED", 20)
        output, _ = process.communicate(timeout=30)
    assert "done" in output
    run = only(shared)
    assert run["state"]["type"] == "COMPLETED"
    history = [step["name"] for step in shared.ask({"what": "history", "run": run["id"]})]
    assert "Crashed" in history
    assert history[-1] == "Completed"


def lease(store: SharedStore) -> Lease | None:
    with store.database.read() as connection:
        root = only(store)["id"]
        return leases.find(connection, [root]).get(root)


def test_a_driver_whose_run_was_taken_stops_and_says_so(
    home: Path, shared: SharedStore, wait_until: Wait
) -> None:
    with driver(home, LONG, shared=shared.database.path, SECONDS="60") as process:
        wait_until(lambda: bool(only(shared)["id"] and lease(shared)), 20)
        os.kill(process.pid, signal.SIGSTOP)
        root = only(shared)["id"]
        epoch = shared.ask({"what": "take", "root": root, "holder": YOU, "takeover": True})
        tell(shared.database, YOU, state(root, "RUNNING", epoch, 1, 0, 1, root=root))
        os.kill(process.pid, signal.SIGCONT)
        output, _ = process.communicate(timeout=30)
    assert "RunOwnedElsewhere" in output
    assert only(shared)["state"]["type"] == "RUNNING"  # what the old owner told is stale
