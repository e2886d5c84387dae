"""Workers and schedulers of Dask that die: who pays, what is counted, what is made again."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import distributed  # noqa: F401 - its defaults have to be there before a test changes one
import numpy as np
import pytest

from penstock import allow_failure, errors, flow, task
from penstock.runners.dask import DaskTaskRunner
from tests.faults import (
    WAYS,
    Tally,
    check_count,
    check_random,
    dies,
    enter,
    executions,
    follows,
    tallies,
    works,
)
from tests.record import Record

pytestmark = [pytest.mark.dask, pytest.mark.filterwarnings("ignore")]

Run = Callable[..., Any]
WaitUntil = Callable[..., None]


def scheduler_of(runner: DaskTaskRunner) -> Any:
    return runner.client.cluster.scheduler


@pytest.fixture(scope="module")
def cluster() -> Iterator[DaskTaskRunner]:
    """Two workers of one thread; all rows run on it, one after the other."""
    kwargs = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "300MB", "dashboard_address": None}
    found = DaskTaskRunner(cluster_kwargs=kwargs).open()
    yield found
    found.close()


@pytest.fixture
def runner(cluster: DaskTaskRunner, wait_until: WaitUntil) -> DaskTaskRunner:
    wait_until(lambda: len(scheduler_of(cluster).workers) == 2, 30.0)
    return cluster


@pytest.fixture
def run(runner: DaskTaskRunner) -> Run:
    def in_flow(body: Callable[[], Any]) -> Any:
        return flow(task_runner=runner)(body)()

    return in_flow


# ---------------------------------------------------------------------------------------------------- who pays


@pytest.mark.parametrize("way", WAYS)
def test_a_death_is_named_and_tried_again_once(run: Run, way: str, record: Record, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        killer = dies.submit(ledger, way, 9)
        others = works.map(ledger, range(6))
        assert others.result() == list(range(6))
        return killer.result()

    with pytest.raises(errors.WorkerLost):
        run(body)
    row = record.task("dies")
    assert row.type == "CRASHED"
    assert executions(ledger)["dies"] in {2, 3}, "three if the first loss was shared or unknown"
    check_count(record, row, executions(ledger)["dies"])
    end = f"exited with code {way[-1]}" if way.startswith("exit") else f"died by {way}"
    assert end in row.state["message"]
    assert "(pid " in row.state["message"]
    assert f"attempt {row.attempt}" in row.state["message"]
    for other in record.tasks("works"):
        assert other.type == "COMPLETED"
        check_count(record, other, executions(ledger)[other.name.rpartition("-")[2]])


def test_what_must_not_run_twice_is_not_tried_again(run: Run, record: Record, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    once = dies.with_options(idempotent=False, crash_retries=5)
    with pytest.raises(errors.WorkerLost):
        run(lambda: once.submit(ledger, "SIGKILL", 9).result())
    assert executions(ledger) == {"dies": 1}
    assert "must not run twice" in record.task("dies").state["message"]


@pytest.mark.parametrize("saturation", [1.1, float("inf")], ids=str)
def test_innocents_on_a_worker_of_many_threads_are_not_harmed(
    saturation: float, record: Record, tmp_path: Path
) -> None:
    """Forty neighbours and one killer, on one worker of eight threads."""
    ledger, tally = tmp_path / "ledger", Tally(tmp_path / "tally", 40)
    kwargs = {"n_workers": 1, "threads_per_worker": 8, "memory_limit": 0, "dashboard_address": None}

    def body() -> Any:
        innocents = [tallies.submit(tally, number, 0.05) for number in range(20)]
        killer = dies.submit(ledger, "SIGKILL", 99)
        innocents += [tallies.submit(tally, number, 0.05) for number in range(20, 40)]
        heir = follows.submit(innocents[39])
        assert [one.result() for one in innocents] == list(range(40))
        assert heir.result() == 39
        killer.wait()
        return killer.result()

    with dask.config.set({"distributed.scheduler.worker-saturation": saturation}):
        runner = DaskTaskRunner(cluster_kwargs=kwargs)
        with pytest.raises(errors.WorkerLost), runner:
            flow(task_runner=runner)(body)()
    assert record.types("tallies") == ["COMPLETED"] * 40
    row = record.task("dies")
    assert row.type == "CRASHED"
    assert executions(ledger)["dies"] <= 2 + 2, "two in company at most, and its budget alone"
    check_count(record, row, executions(ledger)["dies"])
    rows = record.tasks("tallies")
    shared = [body for one in rows for _, body in one.history if body["name"] == "Quarantined"]
    assert shared, "nobody was lost in company: the test has tested nothing"
    counted = [one.attempt for one in rows]
    assert counted == tally.executions(), [one.names for one in rows]


# ------------------------------------------------------------------------------------------ values that are lost


@task
def makes(ledger: Path, size: int) -> Any:
    enter(ledger, "makes")
    return np.arange(size, dtype=float)


@task
def sums(array: Any) -> float:
    return float(array.sum())


def kill_holder(runner: DaskTaskRunner, future: Any, wait_until: WaitUntil) -> None:
    """Kill the worker that holds the value of a future, and wait until Dask has noticed."""
    scheduler = scheduler_of(runner)
    (holder,) = scheduler.tasks[future._run.key].who_has
    os.kill(holder.pid, signal.SIGKILL)
    wait_until(lambda: holder.address not in scheduler.workers, 10.0)


def test_a_lost_result_is_made_again_and_said_so(
    run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        made = makes.submit(ledger, 1_000)
        made.wait()
        kill_holder(runner, made, wait_until)
        total = sums.submit(made).result()
        wait_until(lambda: made.state.state_details["attempt"] == 2)
        return total

    assert run(body) == np.arange(1_000).sum()
    row = record.task("makes")
    assert executions(ledger) == {"makes": 2}
    assert (row.type, row.attempt) == ("COMPLETED", 2)
    assert [one["reason"] for _, one in row.history if one["name"] == "Recomputed"] == ["lost_result"]
    assert record.task("sums").type == "COMPLETED"


@task
def blocks(path: Path) -> None:
    """Hold a worker until a file is there."""
    while not path.exists():
        time.sleep(0.01)  # work: it holds the worker


@task
def falls(ledger: Path, when: int) -> str:
    """Die at one of the executions."""
    if enter(ledger, "falls") == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_death_while_a_lost_result_is_made_again_counts(
    run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        made = falls.submit(ledger, 2)
        made.wait()
        kill_holder(runner, made, wait_until)  # Dask makes it again, and kills the next worker with it
        wait_until(lambda: made.state.state_details["attempt"] == 3 and made.state.is_completed(), 30.0)
        return made.result()

    assert run(body) == "alive"
    row = record.task("falls")
    assert executions(ledger) == {"falls": 3}
    assert (row.type, row.attempt) == ("COMPLETED", 3)
    check_count(record, row, 3)


def attempts(record: Record, name: str) -> dict[str, int]:
    """What the record says of each run of a task."""
    return {row.name.rpartition("-")[2]: row.attempt for row in record.tasks(name)}


def test_a_death_is_counted_though_a_consumer_misses_the_value_first(
    run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Who waits for the value hears at once that it is gone, the news of the death comes a moment later."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"

    def body() -> Any:
        made = falls.submit(ledger, 2)
        made.wait()
        heir = follows.submit(made, wait_for=[blocks.submit(gate)])
        scheduler = scheduler_of(runner)
        wait_until(lambda: any(str(key[0]).startswith("follows") for key in scheduler.tasks))
        kill_holder(runner, made, wait_until)
        wait_until(lambda: executions(ledger)["falls"] == 3, 30.0)
        gate.touch()
        return heir.result()

    assert run(body) == "alive"
    assert executions(ledger) == {"falls": 3}
    assert record.task("falls").attempt == 3
    assert record.types() == ["COMPLETED"] * 3


def test_a_death_as_the_flow_ends_leaves_nothing_open(
    run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> None:
        made = falls.submit(ledger, 2)
        made.wait()
        kill_holder(runner, made, wait_until)
        wait_until(lambda: bool(made._run.carrier.remaking) or made._run.attempt > 1)

    run(body)
    row = record.task("falls")
    assert executions(ledger)["falls"] in {2, 3}, "three if the news came before the flow had ended"
    assert (row.type, row.attempt) == ("COMPLETED", executions(ledger)["falls"])


@task
def hesitates(ledger: Path, number: int) -> int:
    """Take so long at one of the first executions that a chunk ends with it."""
    if enter(ledger, number) == 1 and number == 4:
        time.sleep(0.4)  # work: longer than a chunk of tiny elements may take
    return number


@task
def refuses(ledger: Path, number: int) -> int:
    """Fail for one number."""
    enter(ledger, number)
    if number == 2:
        raise ValueError("number 2")
    return number


@pytest.mark.parametrize(("function", "size", "count"), [(hesitates, "auto", 40), (refuses, 5, 5)])
def test_a_chunk_that_is_made_again_runs_what_it_had_and_no_more(
    function: Any,
    size: Any,
    count: int,
    run: Run,
    runner: DaskTaskRunner,
    record: Record,
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """What a chunk had left undone has run elsewhere meanwhile; what failed in it is over."""
    ledger = tmp_path / "ledger"

    def body() -> None:
        futures = function.with_options(chunk_size=size).map(ledger, range(count))
        futures.wait()
        assert executions(ledger) == dict.fromkeys(map(str, range(count)), 1)
        made = futures[4]
        assert made._run.place == (0 if size == "auto" else 4), "its chunk began otherwise"
        kill_holder(runner, made, wait_until)
        wait_until(lambda: made.state.state_details["attempt"] == 2 and made.state.is_completed(), 30.0)

    run(body)
    assert executions(ledger)["4"] == 2
    assert executions(ledger) == attempts(record, function.name)
    if function is refuses:
        assert executions(ledger)["2"] == 1


@task
def strikes(ledger: Path, number: int, at: int) -> int:
    """Die at the first execution of one number."""
    if enter(ledger, f"strikes-{number}") == 1 and number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@task
def strikes_too(ledger: Path, number: int, at: int) -> int:
    """Die at the first execution of one number, in a second stage."""
    if enter(ledger, f"strikes_too-{number}") == 1 and number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("stage", [0, 1])
def test_of_fused_stages_the_one_that_kills_pays_and_all_are_counted(
    run: Run, record: Record, tmp_path: Path, stage: int
) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    budgets = [int(stage == 0), int(stage == 1)]

    def body() -> Any:
        first = strikes.with_options(chunk_size=5, crash_retries=budgets[0])
        second = strikes_too.with_options(chunk_size=5, crash_retries=budgets[1])
        door = blocks.submit(gate)  # the chunk is packed when its end is known: both stages are there by then
        made = first.map(ledger, range(5), 2 if stage == 0 else -1, wait_for=[allow_failure(door)])
        ended = second.map(ledger, made, 2 if stage == 1 else -1)
        gate.touch()
        return ended.result()

    assert run(body) == list(range(5))
    counted = {row.name: row.attempt for name in ("strikes", "strikes_too") for row in record.tasks(name)}
    assert executions(ledger) == counted
    again = {f"strikes-{number}" for number in range(3)} | {"strikes_too-0", "strikes_too-1"}
    assert {name for name, count in counted.items() if count > 1} == again | (
        {"strikes_too-2"} if stage else set()
    )


class Awaited:
    """An argument that, the first time, arrives only when its worker is dead."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return _arrive, (self.marker,)


def _arrive(marker: Path) -> Awaited:
    deadline = time.monotonic() + 60
    first = not marker.exists()
    marker.touch()
    while first and time.monotonic() < deadline:
        time.sleep(0.01)  # work: until the process is killed
    return Awaited(marker)


@task
def takes(ledger: Path, argument: Any) -> None:
    enter(ledger, "takes")


@task
def shoots(marker: Path) -> None:
    """Kill the worker once, as soon as the other one's argument is on its way."""
    while not marker.exists():
        time.sleep(0.01)  # work: it holds the worker
    if not marker.with_suffix(".shot").exists():
        marker.with_suffix(".shot").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_had_not_been_called_is_a_suspect_and_no_execution(record: Record, tmp_path: Path) -> None:
    ledger, marker = tmp_path / "ledger", tmp_path / "marker"
    kwargs = {"n_workers": 1, "threads_per_worker": 2, "memory_limit": 0, "dashboard_address": None}

    def body() -> None:
        taken = takes.submit(ledger, Awaited(marker))
        shoots.submit(marker).result()
        taken.result()

    with DaskTaskRunner(cluster_kwargs=kwargs) as runner:
        flow(task_runner=runner)(body)()
    row = record.task("takes")
    assert "Quarantined" in row.names, row.history
    assert executions(ledger) == {"takes": 1}
    assert (row.type, row.attempt) == ("COMPLETED", 1)
    assert record.task("shoots").attempt == 2


def test_what_is_made_again_is_no_company_for_a_suspect(record: Record, tmp_path: Path) -> None:
    """Values that died with the worker are made again before a suspect goes alone, and it pays the next time."""
    ledger = tmp_path / "ledger"
    kwargs = {"n_workers": 1, "threads_per_worker": 4, "memory_limit": 0, "dashboard_address": None}

    def body() -> Any:
        kept = [works.submit(ledger, number, 0.3) for number in range(12)]
        for one in kept:
            one.wait()
        company = works.submit(ledger, 12, 1.0)
        while not executions(ledger)["12"]:
            time.sleep(0.01)  # work: the killer is not to come alone
        killer = dies.submit(ledger, "SIGKILL", 99)
        assert company.result() == 12
        killer.wait()
        assert [one.result() for one in kept] == list(range(12))
        return killer.result()

    with pytest.raises(errors.WorkerLost), DaskTaskRunner(cluster_kwargs=kwargs) as runner:
        flow(task_runner=runner)(body)()
    row = record.task("dies")
    assert executions(ledger)["dies"] == row.attempt == 3, "in company, alone, and once for its budget"
    assert row.names.count("Quarantined") == 1
    assert record.types("works") == ["COMPLETED"] * 13


@task
def relapses(ledger: Path) -> str:
    """Fail at the second execution."""
    if enter(ledger, "relapses") == 2:
        time.sleep(0.5)  # work: the flow ends meanwhile, if it does not wait
        raise ValueError("not again")
    return "alive"


@pytest.mark.parametrize("waits", [True, False], ids=["needed", "over"])
def test_a_failure_while_a_lost_result_is_made_again_counts(
    waits: bool, run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        made = relapses.submit(ledger)
        made.wait()
        kill_holder(runner, made, wait_until)
        if not waits:
            wait_until(lambda: bool(made._run.carrier.remaking) or made._run.attempt > 1)
            return None
        wait_until(lambda: made.state.state_details["attempt"] == 3 and made.state.is_completed(), 30.0)
        return made.result()

    assert run(body) == ("alive" if waits else None)
    row = record.task("relapses")
    assert executions(ledger)["relapses"] in ({3} if waits else {2, 3})
    assert (row.type, row.attempt) == ("COMPLETED", executions(ledger)["relapses"])


def test_a_lost_result_of_what_must_not_run_twice_is_a_crash(
    run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        made = makes.with_options(idempotent=False).submit(ledger, 1_000)
        made.wait()
        kill_holder(runner, made, wait_until)
        wait_until(lambda: made.state.is_crashed())
        total = sums.submit(made)
        total.wait()
        return total.state.name, made.state.name, type(made.exception()).__name__

    assert run(body) == ("NotReady", "Crashed", "ResultLost")
    assert executions(ledger) == {"makes": 1}


def test_an_argument_that_was_put_is_put_again(
    runner: DaskTaskRunner, record: Record, tmp_path: Path, wait_until: WaitUntil
) -> None:
    # In shared memory the argument would be the driver's own, and no worker could lose it.
    scattering = DaskTaskRunner(runner.info.address, shared_memory="off")
    array = np.arange(500_000, dtype=float)
    gate = tmp_path / "gate"

    def body() -> Any:
        door = blocks.submit(gate)
        total = sums.with_options(crash_retries=0).submit(array, wait_for=[door])
        scheduler = scheduler_of(runner)

        def put() -> Any:
            return next((one for key, one in scheduler.tasks.items() if str(key[0]).startswith("put-")), None)

        wait_until(lambda: put() is not None and put().who_has)
        (holder,) = put().who_has
        os.kill(holder.pid, signal.SIGKILL)
        wait_until(lambda: holder.address not in scheduler.workers)
        gate.touch()
        return total.result()

    assert flow(task_runner=scattering)(body)() == array.sum()
    assert record.task("sums").attempt == 1


# ------------------------------------------------------------------------------- rows 4 and 5: memory, and moves


def test_what_a_generator_has_yielded_is_held_by_the_driver(
    run: Run, runner: DaskTaskRunner, wait_until: WaitUntil
) -> None:
    """The worker lets its own reference go after a while: by then the driver has to be known as an owner."""

    @task
    def three() -> Iterator[int]:
        yield from range(3)

    def owners(key: Any) -> set[str]:
        return {one.client_key for one in scheduler_of(runner).tasks[key].who_wants}

    def body() -> Any:
        items = list(three.submit().items())
        keys = [item._run.ref.key for item in items if item._run.ref is not None]
        wait_until(lambda: all(runner.client.id in owners(key) for key in keys))
        return [item.result() for item in items]

    assert run(body) == [0, 1, 2]


def test_a_worker_that_needs_too_much_memory_says_how_much(run: Run, record: Record) -> None:
    @task  # at the same size it would not fit again, so nobody tries unless asked to
    def grows() -> int:
        held = []
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            held.append(bytearray(os.urandom(1) * 20_000_000))
            time.sleep(0.05)  # work: slowly enough for the nanny
        return len(held)

    with pytest.raises(errors.OutOfMemory, match=r"it used \d+ MB of the 300 MB"):
        run(lambda: grows.submit().result())
    assert record.task("grows").state["cause"] == "OutOfMemory"
    assert record.task("grows").attempt == 1


def test_a_worker_that_is_retired_takes_nothing_along(record: Record, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    kwargs = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    runner = DaskTaskRunner(cluster_kwargs=kwargs)

    def body() -> Any:
        futures = works.with_options(crash_retries=0).map(ledger, range(40), 0.02)
        futures[3].wait()
        runner.client.retire_workers([next(iter(scheduler_of(runner).workers))])
        return futures.result()

    with runner:
        assert flow(task_runner=runner)(body)() == list(range(40))
    assert record.types("works") == ["COMPLETED"] * 40
    attempts = {row.name.rpartition("-")[2]: row.attempt for row in record.tasks("works")}
    assert executions(ledger) == attempts  # what ran there at that moment ran twice, counted and at no cost


def test_workers_that_are_restarted_in_good_order_cost_nothing(
    run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        futures = works.with_options(crash_retries=0, chunk_size=1).map(ledger, range(40), 0.02)
        futures[3].wait()
        address = next(iter(scheduler_of(runner).workers))
        runner.client.restart_workers([address], timeout=30)
        return futures.result()

    assert run(body) == list(range(40))
    assert record.types("works") == ["COMPLETED"] * 40


def test_a_restart_of_the_cluster_costs_nothing(
    run: Run, runner: DaskTaskRunner, record: Record, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"

    def body() -> Any:
        futures = works.with_options(crash_retries=0).map(ledger, range(40), 0.02)
        futures[3].wait()
        runner.client.restart(timeout=30)
        return futures.result()

    assert run(body) == list(range(40))
    assert record.types("works") == ["COMPLETED"] * 40


# --------------------------------------------------------------------------------------- row 6: the scheduler dies


class Outside:
    """A scheduler and a worker in processes of their own, at a fixed port."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = 0
        self.scheduler = self.start_scheduler()
        self.start_worker()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        if not self.port:
            import socket

            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        return self._start(
            *(
                "dask_scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--no-dashboard",
                "--no-jupyter",
            )
        )

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self._start(
            *("dask_worker", self.address, "--nthreads", "2", "--no-dashboard", "--no-nanny"),
            *("--host", "127.0.0.1", "--death-timeout", "20"),
        )

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    found = Outside(tmp_path)
    yield found
    found.close()


def test_a_scheduler_that_does_not_come_back_is_a_crash(
    outside: Outside, record: Record, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    runner = DaskTaskRunner(outside.address, client_kwargs={"timeout": 30}, reconnect_timeout=3)

    def body() -> Any:
        futures = works.map(ledger, range(40), 0.1)
        futures[3].wait()
        outside.scheduler.kill()
        return futures.result()

    begun = time.monotonic()
    state = flow(task_runner=runner)(body)(return_state=True)
    assert time.monotonic() - begun < 30
    assert state.is_crashed()
    assert isinstance(state.result(raise_on_failure=False), errors.SchedulerLost)
    assert set(record.types("works")) == {"COMPLETED", "CRASHED"}
    for row in record.tasks("works"):
        if row.type == "CRASHED":
            assert row.state["cause"] == "SchedulerLost"
            assert row.attempt == 1


def test_a_scheduler_that_comes_back_gets_the_work_again(
    outside: Outside, record: Record, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    runner = DaskTaskRunner(outside.address, client_kwargs={"timeout": 30}, reconnect_timeout=30)

    def body() -> Any:
        futures = works.with_options(crash_retries=0).map(ledger, range(40), 0.05)
        heirs = follows.map(futures)
        futures[3].wait()
        outside.scheduler.kill()
        outside.scheduler.wait()
        outside.scheduler = outside.start_scheduler()
        outside.start_worker()
        return heirs.result()

    assert flow(task_runner=runner)(body)() == list(range(40))
    assert record.types("works") == ["COMPLETED"] * 40
    assert all(executions(ledger)[str(number)] >= 1 for number in range(40))


# ------------------------------------------------------------------------------------------------- random orders


@pytest.mark.soak
def test_random_deaths(runner: DaskTaskRunner, record: Record, tmp_path: Path) -> None:
    random_deaths(runner, record, tmp_path, 100)


def test_a_few_random_deaths(runner: DaskTaskRunner, record: Record, tmp_path: Path) -> None:
    random_deaths(runner, record, tmp_path, 3)


@pytest.mark.parametrize("orders", [2, pytest.param(40, marks=pytest.mark.soak)])
def test_random_deaths_under_chunks(
    runner: DaskTaskRunner, record: Record, tmp_path: Path, orders: int
) -> None:
    random_deaths(runner, record, tmp_path, orders, chunk_size="auto", elements=48)


def random_deaths(
    runner: DaskTaskRunner,
    record: Record,
    tmp_path: Path,
    orders: int,
    chunk_size: Any = 1,
    elements: int = 12,
) -> None:
    """Kill workers from outside while chains run, in a different order each time."""
    for order in range(orders):
        dice = random.Random(order)
        ledger = tmp_path / f"ledger{order}"
        record.events.clear()

        def body(dice: random.Random = dice, ledger: Path = ledger) -> Any:
            patient = works.with_options(crash_retries=9, chunk_size=chunk_size)
            first = patient.map(ledger, range(elements), 0.02)
            second = follows.with_options(crash_retries=9, chunk_size=chunk_size).map(first)
            for _ in range(2):
                first[dice.randrange(elements)].wait()
                workers = list(scheduler_of(runner).workers.values())
                with contextlib.suppress(ProcessLookupError):  # the scheduler has not noticed the first kill
                    if workers:
                        os.kill(dice.choice(workers).pid, signal.SIGKILL)
            return second.result()

        assert flow(task_runner=runner)(body)() == list(range(elements)), f"order {order}"
        check_random(record, executions(ledger))
