"""Somebody asks a run to stop who is not its driver: `penstock cancel` and requests over a store."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.api import embedded, queries
from tests.drivers import SharedStore, Wait, command, driver

CODE = """
import asyncio, threading

@task
def nap(seconds):
    time.sleep(seconds)  # work:
    return seconds

@flow
def computes():
    number = 0
    while True:
        number += 1

@flow
def sleeps():
    time.sleep(600)  # work:

@flow(task_runner="processes")
def waits():
    nap.submit(600).result()

@flow(task_runner="processes")
def swallows():
    while True:
        try:
            nap.submit(600).result()
        except Exception:
            pass

@flow
async def awaits():
    await asyncio.sleep(600)

@flow(task_runner="processes")
def one_task():
    other, one = nap.submit(3), nap.with_options(name="victim").submit(600)
    one.wait()
    print("the task is", one.state.name, flush=True)
    return other.result()

@flow(task_runner="processes")
def mapped():
    some = nap.with_options(chunk_size=1).map([600, 1, 1])
    some.wait()
    print([one.state.name for one in some], flush=True)
    return "on"

@flow
def within():
    try:
        sleeps()
    except Exception as error:
        print("the child is", type(error).__name__, error, flush=True)
    return "on"

@flow
def direct():
    nap(600)

def call(name):
    started = globals()[name]
    return asyncio.run(started()) if started.isasync else started()

def main():
    try:
        print("returned", call(os.environ["FLOW"]), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)

if __name__ == "__main__":
    if os.environ.get("ASIDE"):
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
    else:
        main()
"""


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


def find(home: Path, name: str) -> dict[str, Any] | None:
    with embedded.reading(home) as connection:
        found = queries.find_runs(connection, name)
    return found[0] if found else None


def begun(home: Path, name: str) -> bool:
    run = find(home, name)
    return run is not None and (run["kind"] == "task" or run["state"]["type"] == "RUNNING")


@pytest.mark.parametrize("aside", ["", "1"], ids=["main", "thread"])
@pytest.mark.parametrize("name", ["computes", "sleeps", "waits", "swallows", "awaits", "direct"])
def test_a_flow_ends_wherever_its_code_is(home: Path, wait_until: Wait, name: str, aside: str) -> None:
    if aside and name in {"sleeps", "direct"}:
        pytest.skip("a thread that sleeps in C cannot be interrupted")
    with driver(home, CODE, FLOW=name, ASIDE=aside) as process:
        wait_until(lambda: begun(home, name), 20)
        done = command(home, "cancel", name, "--wait", "20")
        assert done.returncode == 0, done.stderr
        assert "has ended: Cancelled" in done.stdout
        output, _ = process.communicate(timeout=20)
    assert "CancelledRun Cancelled by " in output
    run = find(home, name)
    assert run is not None
    assert run["state"]["type"] == "CANCELLED"
    assert re.search(r"Cancelled by \S+ on \S+", run["state"]["message"])
    with embedded.reading(home) as connection:
        history = [step["name"] for step in queries.get_history(connection, run["id"])]
        assert (
            queries.list_task_runs(connection, run["id"], states=["running", "pending", "cancelling"]) == []
        )
    assert history[-2:] == ["Cancelling", "Cancelled"]


def test_a_request_reaches_the_driver_within_two_seconds(home: Path, wait_until: Wait) -> None:
    with driver(home, CODE, FLOW="sleeps") as process:
        wait_until(lambda: begun(home, "sleeps"), 20)
        wait_until(lambda: time.time() - (find(home, "sleeps") or {})["created"] > 2.0, 20)
        store = embedded.EmbeddedStore(home)
        run = find(home, "sleeps")
        assert run is not None
        asked = time.monotonic()
        store.ask({"what": "ask", "run": run["id"], "kind": "cancel", "by": "me"})
        process.communicate(timeout=20)
        assert time.monotonic() - asked < 2.0 + 1.0  # the second one is the driver's end
        store.close()
    run = find(home, "sleeps")
    assert run is not None
    assert run["ended"] - asked_at(home) < 2.0


def asked_at(home: Path) -> float:
    store = embedded.EmbeddedStore(home)
    with store.database.read() as connection:
        made = connection.exec_driver_sql("select made from requests").scalar_one()
    store.close()
    return float(made)


def test_a_flow_within_another_is_cancelled_alone(home: Path, wait_until: Wait) -> None:
    with driver(home, CODE, FLOW="within") as process:
        wait_until(lambda: begun(home, "sleeps"), 20)
        assert command(home, "cancel", "sleeps").returncode == 0
        output, _ = process.communicate(timeout=20)
    assert "the child is CancelledRun Cancelled by" in output
    assert "returned on" in output
    inner, outer = find(home, "sleeps"), find(home, "within")
    assert inner is not None
    assert outer is not None
    assert (inner["state"]["type"], outer["state"]["type"]) == ("CANCELLED", "COMPLETED")


def test_one_task_is_cancelled_alone(home: Path, wait_until: Wait) -> None:
    with driver(home, CODE, FLOW="one_task") as process:
        wait_until(lambda: begun(home, "victim"), 20)
        assert command(home, "cancel", "victim").returncode == 0
        output, _ = process.communicate(timeout=20)
    assert "the task is Cancelled" in output
    assert "returned 3" in output


@pytest.mark.parametrize("whole", [True, False], ids=["map", "element"])
def test_a_map_or_one_of_its_elements_is_cancelled(home: Path, wait_until: Wait, whole: bool) -> None:
    with driver(home, CODE, FLOW="mapped") as process:
        wait_until(lambda: begun(home, "nap-0"), 20)
        run = find(home, "nap-0")
        assert run is not None
        done = command(home, "cancel", run["map"] if whole else run["id"])
        assert done.returncode == 0, done.stderr
        output, _ = process.communicate(timeout=20)
    assert "['Cancelled', " in output
    assert "returned on" in output


def test_what_has_ended_or_is_not_there_cannot_be_cancelled(home: Path) -> None:
    with driver(home, "@flow\ndef short(): ...\nshort()") as process:
        process.communicate(timeout=20)
    done = command(home, "cancel", "short")
    assert (done.returncode, "has ended: Completed" in done.stdout) == (1, True)
    done = command(home, "cancel", "nobody")
    assert (done.returncode, "there is no run 'nobody'" in done.stderr) == (1, True)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedStore]:
    found = SharedStore(tmp_path / "shared.db")
    found.database.prepare()
    yield found
    found.close()


def test_a_request_over_a_store_that_is_elsewhere(home: Path, shared: SharedStore, wait_until: Wait) -> None:
    with driver(home, CODE, shared=shared.database.path, FLOW="computes") as process:
        wait_until(lambda: any(run["state"]["type"] == "RUNNING" for run in shared.ask({"what": "runs"})), 20)
        (run,) = shared.ask({"what": "runs"})
        request = shared.ask({"what": "ask", "run": run["id"], "kind": "cancel", "by": "me"})
        output, _ = process.communicate(timeout=20)
    assert "CancelledRun Cancelled by me." in output
    assert shared.ask({"what": "request", "request": request})["outcome"] == "asked to stop"
    assert shared.ask({"what": "runs"})[0]["state"]["message"] == "Cancelled by me."
