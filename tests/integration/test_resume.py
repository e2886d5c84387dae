"""A run whose driver died goes on: what is stored is not computed again, and nothing is lost."""

import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from penstock.api import embedded, queries
from penstock.engine.results import load_result
from tests.drivers import Wait, command, driver

CODE = """
LEDGER = os.environ["LEDGER"]

def note(*words):
    with open(LEDGER, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

@task(persist_result=True)
def load(n):
    note("load", n)
    time.sleep(0.05)  # work:
    return ("load", n)

@task(persist_result=True, chunk_size=2)
def inc(pair, by):
    note("inc", pair[1] + by)
    time.sleep(0.05)  # work:
    return ("inc", pair[1] + by)

@task
def free(pair):
    note("free", pair[1])
    return pair[1]

@flow
def inner(pair):
    return inc.submit(pair, 1000)

@flow(task_runner=os.environ.get("RUNNER") or None)
def work(count: int, by: int = 100):
    first = load(-1)
    loaded = load.map(range(count))
    more = inc.map(loaded, by)
    last = inner(more[0]).result()
    total = sum(free.map(more).result()) + last[1] + first[1]
    with open(LEDGER + ".result", "w") as file:
        file.write(str(total))
    return total

if __name__ == "__main__":
    work(8)
"""


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


def ledger(path: Path) -> Counter[str]:
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def committed(home: Path) -> set[str]:
    found = [load_result(path) for path in (home / "storage").rglob("*.result")]
    return {f"{name} {number}" for name, number in found}


def the_run(home: Path, flow: str = "work") -> dict[str, Any]:
    with embedded.reading(home) as connection:
        (run,) = queries.list_runs(connection, flow=flow)
    return run


def tasks_of(home: Path, run: str) -> list[dict[str, Any]]:
    with embedded.reading(home) as connection:
        flows = [run, *(queries.get_run(connection, run) or {})["flows"]]
        return [one for flow_run in flows for one in queries.list_task_runs(connection, flow_run, limit=1000)]


RUNNERS = ["sequential", "threads", "processes"]
SLOW = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("dask", "ray")]
RESULT = sum(range(100, 108)) + 1100 - 1


@pytest.mark.parametrize("name", [*RUNNERS, *SLOW])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_is_resumed_until_it_is_done(home: Path, wait_until: Wait, name: str, seed: int) -> None:
    chance = random.Random(f"{seed}{name}")
    path = home.parent / f"{home.name}-ledger"
    more = {"LEDGER": str(path), "RUNNER": name, "PENSTOCK_RUNNER": name}
    goal = chance.randrange(1, 16)
    with driver(home, CODE, shared=None, **more) as process:
        wait_until(lambda: sum(ledger(path).values()) >= goal or process.poll() is not None, 60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    run = the_run(home)
    assert run["state"]["type"] == "CRASHED"
    before, kept = ledger(path), committed(home)
    done = command(home, "resume", run["id"], **more)
    assert done.returncode == 0, done.stderr
    after = ledger(path)
    assert path.with_name(path.name + ".result").read_text() == str(RESULT)
    assert {line: after[line] for line in kept} == {line: before[line] for line in kept}
    run = the_run(home)
    assert run["state"]["type"] == "COMPLETED"
    tasks = tasks_of(home, run["id"])
    assert {one["state"]["type"] for one in tasks} == {"COMPLETED"}
    executed = sum(after.values())
    own = [one for one in tasks if one["child_flow_run"] is None]
    assert executed <= sum(one["attempt"] for one in own)
    assert f"{len(kept)} task runs reused" in done.stderr


ONCE = """
LEDGER = os.environ["LEDGER"]

@task(idempotent=False, persist_result=True)
def launch():
    with open(LEDGER, "a") as file:
        file.write("launch\\n")
    if not os.environ.get("FAST"):
        time.sleep(60)  # work:
    return "away"

@flow
def mission():
    return launch.submit().result()

if __name__ == "__main__":
    mission()
"""


def test_what_must_not_run_twice_needs_a_word(home: Path, wait_until: Wait) -> None:
    path = home.parent / f"{home.name}-ledger"
    more = {"LEDGER": str(path)}
    with driver(home, ONCE, shared=None, **more) as process:
        wait_until(lambda: bool(ledger(path)), 20)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    done = command(home, "resume", "mission", **more, FAST="1")
    assert done.returncode == 1
    assert "allow it with --rerun launch" in done.stderr
    (task,) = tasks_of(home, the_run(home, "mission")["id"])
    assert task["state"]["type"] == "CRASHED"
    assert ledger(path)["launch"] == 1
    done = command(home, "resume", "mission", "--rerun", "launch", **more, FAST="1")
    assert done.returncode == 0, done.stderr
    assert ledger(path)["launch"] == 2
    (task,) = tasks_of(home, the_run(home, "mission")["id"])
    assert (task["state"]["type"], task["attempt"]) == ("COMPLETED", 2)


CHANGING = """
@task(persist_result=True)
def one(value):
    return value

@task(persist_result=True)
def other(value):
    return value

@flow
def changing():
    wanted = os.environ["WAY"]
    one(1)
    if wanted == "other":
        other(2)
    else:
        one(int(wanted))
    if os.environ.get("FAIL"):
        raise ValueError("not this time")

if __name__ == "__main__":
    changing()
"""


@pytest.mark.parametrize(
    ("way", "said"),
    [("3", "the parameters of its call of 'one'"), ("other", "it calls 'other', where it had called 'one'")],
)
def test_a_flow_that_diverges_says_where(home: Path, way: str, said: str) -> None:
    with driver(home, CHANGING, WAY="2", FAIL="1") as process:
        process.communicate(timeout=30)
    done = command(home, "resume", "changing", WAY=way)
    assert done.returncode == 1
    assert said in done.stderr
    assert the_run(home, "changing")["state"]["type"] == "FAILED"
    done = command(home, "resume", "changing", WAY="2")
    assert done.returncode == 0, done.stderr
    assert "2 task runs reused, 0 " in done.stderr


LIVE = """
@flow
def alive():
    time.sleep(float(os.environ["SECONDS"]))  # work:
    return "here"

if __name__ == "__main__":
    try:
        print(alive(), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def test_a_run_whose_driver_lives_is_taken_by_request_only(home: Path, wait_until: Wait) -> None:
    with driver(home, LIVE, SECONDS="60") as process:
        wait_until(lambda: _is_running(home), 20)
        done = command(home, "resume", "alive", SECONDS="0")
        assert done.returncode == 1
        assert f"pid {process.pid}" in done.stderr
        assert "--takeover" in done.stderr
        done = command(home, "resume", "alive", "--takeover", SECONDS="0")
        assert done.returncode == 0, done.stderr
        output, _ = process.communicate(timeout=20)
    assert "RunOwnedElsewhere" in output
    run = the_run(home, "alive")
    assert run["state"]["type"] == "COMPLETED"
    assert run["pid"] != process.pid


def _is_running(home: Path) -> bool:
    with embedded.reading(home) as connection:
        return bool(queries.list_runs(connection, flow="alive", states=["RUNNING"]))


def test_what_cannot_be_resumed_says_why(home: Path) -> None:
    code = """
    def make():
        @flow
        def hidden():
            raise ValueError("no")
        return hidden

    make()()
    """
    with driver(home, code) as process:
        process.communicate(timeout=30)
    done = command(home, "resume", "hidden")
    assert (done.returncode, "it is defined inside a function" in done.stderr) == (2, True)
    with driver(home, "@flow\ndef good(): ...\ngood()") as process:
        process.communicate(timeout=30)
    done = command(home, "resume", "good")
    assert (done.returncode, "nothing to resume" in done.stderr) == (1, True)


def test_a_resume_that_dies_is_resumed(home: Path, wait_until: Wait) -> None:
    path = home.parent / f"{home.name}-ledger"
    more = {"LEDGER": str(path), "RUNNER": "threads", "PENSTOCK_RUNNER": "threads"}
    kept: set[str] = set()
    before: Counter[str] = Counter()
    for number, goal in enumerate((2, 8, 12)):
        again = "from penstock.cli import main\nsys.argv = ['penstock', 'resume', 'work']\nmain()"
        beside = home.parent / f"{home.name}-work.py"  # the place that the run remembers
        if number == 0:
            beside.write_text("import os, time\nfrom penstock import flow, task\n" + CODE)
            again = f"import runpy\nrunpy.run_path({str(beside)!r}, run_name='__main__')"
        with driver(home, again, shared=None, **more) as process:
            wait_until(lambda: sum(ledger(path).values()) >= goal or process.poll() is not None, 60)  # noqa: B023
            os.kill(process.pid, signal.SIGKILL)
            process.wait(10)
        assert {line: ledger(path)[line] for line in kept} == {line: before[line] for line in kept}
        before, kept = ledger(path), committed(home)
    done = command(home, "resume", "work", **more)
    assert done.returncode == 0, done.stderr
    assert path.with_name(path.name + ".result").read_text() == str(RESULT)
    assert {line: ledger(path)[line] for line in kept} == {line: before[line] for line in kept}
    run = the_run(home)
    assert run["state"]["type"] == "COMPLETED"
    assert {one["state"]["type"] for one in tasks_of(home, run["id"])} == {"COMPLETED"}


RETRYING = """
LEDGER = os.environ["LEDGER"]

def note(*words):
    with open(LEDGER, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

@task(persist_result=True)
def part(n):
    note("part", n)
    return n

@task(persist_result=True)
def shaky(n):
    note("shaky", n)
    if os.environ.get("HANG") and n == 2:
        time.sleep(60)  # work:
    return n

@flow
def child(n):
    return shaky(n)

@flow(retries=2)
def retrying():
    note("attempt")
    found = part(1)
    attempts = sum(line == "attempt" for line in open(LEDGER).read().splitlines())
    if attempts in {1, 3}:
        raise ValueError("not yet")
    part(5)
    return found + child(2) + part(3)

if __name__ == "__main__":
    retrying()
"""


def test_a_flow_with_retries_goes_on_with_its_latest_attempt(home: Path, wait_until: Wait) -> None:
    path = home.parent / f"{home.name}-ledger"
    with driver(home, RETRYING, shared=None, LEDGER=str(path), HANG="1") as process:
        wait_until(lambda: "shaky 2" in ledger(path), 30)  # in the second attempt
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    assert ledger(path) == {"attempt": 2, "part 1": 1, "part 5": 1, "shaky 2": 1}
    done = command(home, "resume", "retrying", LEDGER=str(path))  # the third fails, the fourth does not
    assert done.returncode == 0, done.stderr
    assert ledger(path) == {"attempt": 4, "part 1": 1, "part 5": 1, "shaky 2": 2, "part 3": 1}
    run = the_run(home, "retrying")
    assert (run["state"]["type"], run["attempt"]) == ("COMPLETED", 4)
    with embedded.reading(home) as connection:
        begun = [(s["name"], s["attempt"]) for s in queries.get_history(connection, run["id"])]
    assert [one for one in begun if one[0] in {"Running", "Retrying"} and one[1] > 2][-1] == ("Retrying", 4)
    assert ("Running", 3) in begun
    states = {one["state"]["type"] for one in tasks_of(home, run["id"])}
    assert states <= {"COMPLETED", "CRASHED"}


AWAITING = """
@task(persist_result=True)
async def fetch(n):
    return n

@task(persist_result=True)
def many():
    yield from range(5)

@task(persist_result=True)
def twice(n):
    return 2 * n

@flow
async def awaiting(count: int):
    one = await fetch(1)
    found = [await future for future in [fetch.submit(n) for n in range(count)]]
    doubled = twice.map(many.submit()).result()
    drawn = twice.map(iter(range(3))).result()
    if os.environ.get("FAIL"):
        raise ValueError("not this time")
    print("total", one + sum(found) + sum(doubled) + sum(drawn), flush=True)

if __name__ == "__main__":
    import asyncio
    asyncio.run(awaiting(3))
"""


def test_async_flows_and_generators_are_resumed(home: Path) -> None:
    with driver(home, AWAITING, FAIL="1") as process:
        process.communicate(timeout=60)
    done = command(home, "resume", "awaiting")
    assert done.returncode == 0, done.stderr
    assert f"total {1 + 3 + 20 + 6}" in done.stdout
    assert " task runs reused" in done.stderr


BESIDE = """
import asyncio, contextvars
from concurrent.futures import ThreadPoolExecutor

LEDGER = os.environ["LEDGER"]
FIRST = bool(os.environ.get("FAIL"))

def note(*words):
    with open(LEDGER, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

@task(persist_result=True)
def load(n):
    note("load", n)
    return n

@task(persist_result=True)
def double(x):
    note("double", x)
    return 2 * x

@task(persist_result=True, cache_policy=None)
def total(values):  # the record tells of them only how many there are
    note("total", sum(values))
    return sum(values)

@flow
def child(n):
    return double.submit(n).result() + 1

def pause(n):  # the other way round when it is resumed
    return 0.05 * (n if FIRST else 5 - n)

def one(n):
    time.sleep(pause(n))  # work:
    doubled = double.submit(load.submit(n))
    return doubled.result() + total.submit([n] * 20).result() + child(1000 + n)

@flow
def threads():
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(contextvars.copy_context().run, one, n) for n in range(6)]
        own = [load.submit(100), load.submit(200)]
        found = [other.result() for other in others]
        mine = [future.result() for future in own]
    last = total.submit([1] * 20).result()
    if FIRST:
        raise ValueError("not this time")
    print("found", found, mine, last, flush=True)

async def one_of_many(n):
    await asyncio.sleep(pause(n))
    doubled = await double.submit(load.submit(n))
    await asyncio.sleep(0.01)
    return doubled + await total.submit([n] * 20) + await awaited_child(1000 + n)

@flow
async def awaited_child(n):
    return await double.submit(n) + 1

@flow
async def coroutines():
    own = load.submit(100)
    found = await asyncio.gather(*(one_of_many(n) for n in range(6)))
    mine = [await own, await load.submit(200)]
    last = await total.submit([1] * 20)
    if FIRST:
        raise ValueError("not this time")
    print("found", found, mine, last, flush=True)

if __name__ == "__main__":
    if os.environ["WHICH"] == "threads":
        threads()
    else:
        asyncio.run(coroutines())
"""


@pytest.mark.parametrize("which", ["threads", "coroutines"])
def test_calls_of_other_threads_and_asyncio_tasks_come_in_any_order(home: Path, which: str) -> None:
    path = home.parent / f"{home.name}-ledger"
    more: dict[str, Any] = {"LEDGER": str(path), "WHICH": which}
    with driver(home, BESIDE, FAIL="1", **more) as process:
        process.communicate(timeout=60)
    before = ledger(path)
    done = command(home, "resume", which, **more)
    assert done.returncode == 0, done.stderr
    found = [2 * n + 20 * n + 2 * (1000 + n) + 1 for n in range(6)]
    assert f"found {found} [100, 200] 20" in done.stdout
    again = ledger(path) - before
    assert again == Counter(
        {f"total {20 * n}": 1 for n in range(6)}
    )  # the only calls that nothing tells apart
    assert "21 task runs reused, 0 that had begun computed again, 6 calls of other threads" in done.stderr


BARRED = """
import contextvars, threading

@task(idempotent=False, persist_result=True, cache_policy=None)
def launch(parts):
    with open(os.environ["LEDGER"], "a") as file:
        file.write("launch\\n")
    return len(parts)

@flow
def mission():
    found = []
    def start():
        found.append(launch.submit(list(range(20))))
    thread = threading.Thread(target=contextvars.copy_context().run, args=(start,))
    thread.start()
    thread.join()
    found[0].result()
    if os.environ.get("FAIL"):
        raise ValueError("not this time")

if __name__ == "__main__":
    mission()
"""


def test_what_must_not_run_twice_is_not_run_from_another_thread_either(home: Path) -> None:
    path = home.parent / f"{home.name}-ledger"
    with driver(home, BARRED, FAIL="1", LEDGER=str(path)) as process:
        process.communicate(timeout=60)
    run = the_run(home, "mission")["id"]
    done = command(home, "resume", run, LEDGER=str(path))
    assert done.returncode == 1
    assert "allow it with --rerun launch" in done.stderr
    assert ledger(path) == Counter({"launch": 1})
    done = command(home, "resume", run, "--rerun", "launch", LEDGER=str(path))
    assert done.returncode == 0, done.stderr
    assert ledger(path) == Counter({"launch": 2})
