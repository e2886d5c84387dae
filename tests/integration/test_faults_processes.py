"""Workers of the process pool that die: who pays, what is counted, what is made again."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import errors, flow, task
from penstock.runners.base import TaskRunner
from penstock.runners.processes import ProcessPoolTaskRunner
from tests.faults import WAYS, check_count, check_random, dies, enter, executions, follows, works
from tests.record import Record

Run = Callable[..., Any]
WaitUntil = Callable[..., None]


@pytest.fixture(scope="module")
def pool() -> Iterator[TaskRunner]:
    found = ProcessPoolTaskRunner(max_workers=2).open()
    yield found
    found.close()


@pytest.fixture
def run(pool: TaskRunner) -> Run:
    def in_flow(body: Callable[[], Any]) -> Any:
        return flow(task_runner=pool)(body)()

    return in_flow


@pytest.mark.parametrize("way", WAYS)
def test_a_death_is_named_and_tried_again_once(run: Run, way: str, record: Record, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        killer = dies.submit(ledger, way, 9)
        others = works.map(ledger, range(6))
        killer.wait()
        assert others.result() == list(range(6))
        return killer.state

    with pytest.raises(errors.WorkerLost):
        run(body)
    row = record.task("dies")
    assert row.type == "CRASHED"
    assert row.attempt == 2, "one more by default"
    assert executions(ledger) == {"dies": 2, **{str(number): 1 for number in range(6)}}
    end = f"exited with code {way[-1]}" if way.startswith("exit") else f"died by {way}"
    assert end in row.state["message"]
    assert "pid" in row.state["message"]
    assert "attempt 2" in row.state["message"]
    assert {one.attempt for one in record.tasks("works")} == {1}


def test_the_budget_of_crashes_is_its_own(run: Run, record: Record, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    patient = dies.with_options(crash_retries=3, retries=0)
    assert run(lambda: patient.submit(ledger, "SIGKILL", 3).result()) == "alive"
    assert executions(ledger) == {"dies": 4}
    check_count(record, record.task("dies"), 4)


def test_what_must_not_run_twice_is_not_tried_again(run: Run, record: Record, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    once = dies.with_options(idempotent=False, crash_retries=5)
    with pytest.raises(errors.WorkerLost):
        run(lambda: once.submit(ledger, "SIGKILL", 9).result())
    assert executions(ledger) == {"dies": 1}
    assert "must not run twice" in record.task("dies").state["message"]


@task
def holds(ledger: Path, number: int, gate: Path) -> int:
    """Wait for a file, if it is number 2."""
    enter(ledger, number)
    while number == 2 and not gate.exists():
        time.sleep(0.01)  # work: until its process is ended
    return number


def test_what_a_process_had_run_before_it_was_ended_is_counted(
    run: Run, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """One element of a chunk is stopped by force; the others run again, and that is an attempt more."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"

    def body() -> Any:
        futures = holds.with_options(chunk_size=4).map(ledger, range(4), gate)
        wait_until(lambda: executions(ledger)["2"] == 1)
        futures[2].cancel(force=True)
        return [futures[number].result() for number in (0, 1, 3)]

    assert run(body) == [0, 1, 3]
    counted = {row.name.rpartition("-")[2]: row.attempt for row in record.tasks("holds")}
    assert executions(ledger) == counted == {"0": 2, "1": 2, "2": 1, "3": 1}


@task
def makes(ledger: Path, size: int) -> Any:
    enter(ledger, "makes")
    return np.arange(size, dtype=float)


@task
def sums(array: Any) -> float:
    return float(array.sum())


def lose_files(pool: ProcessPoolTaskRunner) -> None:
    for path in list(pool._pool.files):  # type: ignore[union-attr]
        os.unlink(path)


def test_a_lost_result_is_made_again_and_said_so(
    run: Run, pool: ProcessPoolTaskRunner, record: Record, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        made = makes.submit(ledger, 500_000)
        made.wait()
        lose_files(pool)
        total = sums.submit(made).result()  # a consumer needs it
        lose_files(pool)
        return total, float(made.result().sum())  # the driver needs it

    expected = float(np.arange(500_000, dtype=float).sum())
    assert run(body) == (expected, expected)
    row = record.task("makes")
    assert executions(ledger) == {"makes": 3}
    check_count(record, row, 3)
    assert row.names.count("Recomputed") == 2
    reasons = [one["reason"] for _, one in row.history if one["name"] == "Recomputed"]
    assert reasons == ["lost_result", "lost_result"]
    assert row.type == "COMPLETED"
    assert record.task("sums").attempt == 1


def test_a_lost_result_of_what_must_not_run_twice_is_a_crash(
    run: Run, pool: ProcessPoolTaskRunner, record: Record, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        made = makes.with_options(idempotent=False).submit(ledger, 500_000)
        made.wait()
        lose_files(pool)
        total = sums.submit(made)
        total.wait()
        return total.state.name, made.state.name, type(made.exception()).__name__

    assert run(body) == ("NotReady", "Crashed", "ResultLost")
    assert executions(ledger) == {"makes": 1}


def test_an_argument_that_was_put_is_put_again_unless_it_has_changed(
    run: Run, pool: ProcessPoolTaskRunner, record: Record, tmp_path: Path
) -> None:
    array = np.arange(500_000, dtype=float)
    gate = tmp_path / "gate"

    @task
    def blocks() -> None:
        while not gate.exists():
            pass

    def body(changed: bool) -> Any:
        doors = [blocks.submit(), blocks.submit()]  # both workers are busy: the next one waits
        total = sums.submit(array)
        lose_files(pool)
        if changed:
            array[0] = 7.0
        gate.touch()
        for door in doors:
            door.wait()
        total.wait()
        gate.unlink()
        return total.state

    state = run(lambda: body(False).result())
    assert state == array.sum()
    with pytest.raises(errors.ResultLost, match="may have changed"):
        run(lambda: body(True).result())


@pytest.mark.soak
def test_random_deaths(pool: ProcessPoolTaskRunner, record: Record, tmp_path: Path) -> None:
    random_deaths(pool, record, tmp_path, 100)


def test_a_few_random_deaths(pool: ProcessPoolTaskRunner, record: Record, tmp_path: Path) -> None:
    random_deaths(pool, record, tmp_path, 5)


def random_deaths(pool: ProcessPoolTaskRunner, record: Record, tmp_path: Path, orders: int) -> None:
    """Kill workers from outside while chains run, in a different order each time."""
    for order in range(orders):
        dice = random.Random(order)
        ledger = tmp_path / f"ledger{order}"
        record.events.clear()

        def body(dice: random.Random = dice, ledger: Path = ledger) -> Any:
            patient = works.with_options(crash_retries=9)
            first = patient.map(ledger, range(12), 0.02)
            second = follows.with_options(crash_retries=9).map(first)
            for _ in range(3):
                first[dice.randrange(12)].wait()
                children = list(pool._pool._schedule.children.values())  # type: ignore[union-attr]
                if children:
                    os.kill(dice.choice(children).pid, signal.SIGKILL)
            return second.result()

        assert flow(task_runner=pool)(body)() == list(range(12)), f"order {order}"
        check_random(record, executions(ledger))
