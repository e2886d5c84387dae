"""Transactions whose driver or workers die: nothing of them is visible too early, and they come to their end."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from penstock import FileSystemLockManager, IsolationLevel, ProcessPoolTaskRunner, flow, task, transaction
from penstock.api import embedded, queries
from penstock.cache_policies import INPUTS
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


@pytest.mark.processes
def test_a_worker_that_dies_in_a_block(tmp_path: Path) -> None:
    @task(cache_policy=INPUTS)
    def make(mark: str) -> int:
        if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 7

    @flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
    def body() -> list[str]:
        with transaction() as txn:
            make.submit(str(tmp_path / "mark"))
        assert txn.is_committed()
        again = make.submit(str(tmp_path / "mark"))
        again.wait()
        return [again.state.name, str(again.result())]

    assert body() == ["Cached", "7"]


@pytest.mark.processes
def test_under_a_lock_a_result_is_removed_by_a_rollback(tmp_path: Path) -> None:
    """Whoever gets the lock next finds the value until then: there is never a second one under the key."""
    policy = INPUTS.configure(
        lock_manager=FileSystemLockManager(tmp_path / "locks"), isolation_level=IsolationLevel.SERIALIZABLE
    )

    @task(cache_policy=policy, result_storage=tmp_path / "results")
    def make(x: int) -> int:
        return x

    @flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
    def body(stop: bool) -> list[str]:
        with transaction():
            futures = make.map([1, 1, 1])
            futures.wait()
            if stop:
                raise KeyError
        return sorted(future.state.name for future in futures)

    with pytest.raises(KeyError):
        body(True)
    assert [path for path in (tmp_path / "results").rglob("*") if path.is_file()] == []
    assert body(False) == ["Cached", "Cached", "Completed"]
