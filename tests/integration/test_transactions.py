"""Transactions whose driver dies: nothing of them is visible, and a resumed run ends them."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from penstock.api import embedded, queries
from tests.drivers import Wait, command, driver

CODE = """
from penstock.cache_policies import INPUTS
from penstock.transactions import transaction

LEDGER = os.environ["LEDGER"]

def note(*words):
    with open(LEDGER, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

@task(cache_policy=INPUTS, on_commit=[lambda txn: note("commit")])
def load(n):
    note("load", n)
    return n

@flow(task_runner="threads")
def work():
    with transaction():
        load.map(range(5)).wait()
        load(5)
        note("staged")
        if not os.environ.get("FAST"):
            time.sleep(60)  # work:
    note("done")

@flow(task_runner="threads")
def other():
    note("other", *(future.state.name for future in load.map(range(6))))

if __name__ == "__main__":
    other() if os.environ.get("OTHER") else work()
"""


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


def test_a_driver_that_dies_in_a_block(home: Path, wait_until: Wait) -> None:
    path = home.parent / f"{home.name}-ledger"

    def ledger() -> Counter[str]:
        return Counter(path.read_text().splitlines()) if path.exists() else Counter()

    more = {"LEDGER": str(path)}
    with driver(home, CODE, shared=None, **more) as process:
        wait_until(lambda: "staged" in ledger() or process.poll() is not None, 60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    kept = [found.name for found in (home / "storage" / "cache").rglob("*.result")]
    assert len(kept) == 6
    assert all(".staged-" in name for name in kept)  # beside their places, where nobody looks
    with embedded.reading(home) as connection:
        (run,) = queries.list_runs(connection, flow="work")
    done = command(home, "resume", run["id"], FAST="1", **more)
    assert done.returncode == 0, done.stderr
    assert "6 task runs reused" in done.stderr
    assert ledger() == Counter({**{f"load {n}": 1 for n in range(6)}, "commit": 6, "staged": 2, "done": 1})
    with driver(home, CODE, shared=None, OTHER="1", **more) as process:
        assert process.wait(60) == 0
    assert "other " + " ".join(["Cached"] * 6) in ledger()
