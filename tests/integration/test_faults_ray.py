"""Workers and nodes of Ray that die: who pays, what is counted, what is made again."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("ray")

from penstock import errors, flow
from penstock.runners.ray import RayTaskRunner
from tests.faults import WAYS, began, check_random, dies, executions, follows, works
from tests.record import Record

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def runner() -> Iterator[RayTaskRunner]:
    """Two CPUs; all rows run on it, one after the other."""
    options = {"num_cpus": 2, "object_store_memory": 150 << 20, "include_dashboard": False}
    found = RayTaskRunner(init_kwargs=options).open()
    yield found
    found.close()


@pytest.fixture
def run(runner: RayTaskRunner) -> Run:
    def in_flow(body: Callable[[], Any]) -> Any:
        return flow(task_runner=runner)(body)()

    return in_flow


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
    assert (row.type, row.attempt) == ("CRASHED", 2)
    assert executions(ledger) == {"dies": 2, **{str(number): 1 for number in range(6)}}
    assert began(row) == ["yes", "yes"]
    end = f"exited with code {way[-1]}" if way.startswith("exit") else f"by {way}"
    assert end in row.state["message"], row.state["message"]
    assert "worker pid " in row.state["message"]
    assert "attempt 2" in row.state["message"]
    assert {one.attempt for one in record.tasks("works")} == {1}


def test_what_must_not_run_twice_is_not_tried_again(run: Run, record: Record, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    once = dies.with_options(idempotent=False, crash_retries=5)
    with pytest.raises(errors.WorkerLost):
        run(lambda: once.submit(ledger, "SIGKILL", 9).result())
    assert executions(ledger) == {"dies": 1}
    assert "must not run twice" in record.task("dies").state["message"]


@pytest.mark.soak
def test_random_deaths(runner: RayTaskRunner, record: Record, tmp_path: Path) -> None:
    random_deaths(runner, record, tmp_path, 100)


def test_a_few_random_deaths(runner: RayTaskRunner, record: Record, tmp_path: Path) -> None:
    random_deaths(runner, record, tmp_path, 3)


def workers_of_ray() -> list[int]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name().startswith("ray::penstock") or "ray::works" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


def random_deaths(runner: RayTaskRunner, record: Record, tmp_path: Path, orders: int) -> None:
    """Kill workers from outside while chains run, in a different order each time."""
    for order in range(orders):
        dice = random.Random(order)
        ledger = tmp_path / f"ledger{order}"
        record.events.clear()

        def body(dice: random.Random = dice, ledger: Path = ledger) -> Any:
            patient = works.with_options(crash_retries=9)
            first = patient.map(ledger, range(12), 0.05)
            second = follows.with_options(crash_retries=9).map(first)
            for _ in range(3):
                first[dice.randrange(12)].wait()
                if victims := workers_of_ray():
                    os.kill(dice.choice(victims), signal.SIGKILL)
            return second.result()

        assert flow(task_runner=runner)(body)() == list(range(12)), f"order {order}"
        check_random(record, executions(ledger))


# ------------------------------------------------------------ nodes, memory and the head: each in a Ray of its own

NODES = """
import os, sys, time
from pathlib import Path
import numpy as np, ray
from ray.cluster_utils import Cluster
from penstock import flow, task
from penstock.engine.events import bus
from penstock.runners.ray import RayTaskRunner
from tests.faults import check_random, enter, executions
from tests.record import Record

record = Record()
bus.subscribe(record.events.append)
ledger = Path(sys.argv[1])
once = sys.argv[2] == "once"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
node = cluster.add_node(num_cpus=1, resources={"far": 1}, object_store_memory=100 << 20)
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

@task(resources={"far": 1}, idempotent=not once)
def makes(path):
    enter(path, "makes")
    return np.arange(500_000.0)

@task
def sums(array):
    return float(array.sum())

@flow(task_runner=RayTaskRunner(strict=False))
def main():
    made = makes.submit(ledger)
    made.wait()
    cluster.remove_node(node)
    cluster.add_node(num_cpus=1, resources={"far": 1}, object_store_memory=100 << 20)
    total = sums.submit(made)
    total.wait()
    return total.state.name, made.state.name, None if total.state.is_pending() else total.result()

print(main(), executions(ledger)["makes"], record.task("makes").attempt, record.task("makes").names, flush=True)
ray.shutdown()
cluster.shutdown()
"""


def outside(code: str, *arguments: str, seconds: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own: it starts and ends whole clusters."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.mark.parametrize("kind", ["again", "once"])
def test_a_value_that_is_lost_with_its_node(kind: str, tmp_path: Path) -> None:
    found = outside(NODES, str(tmp_path / "ledger"), kind)
    total = float(np.arange(500_000.0).sum())
    if kind == "again":
        assert f"('Completed', 'Completed', {total}) 2 2" in found.stdout, found.stdout + found.stderr
        assert "Recomputed" in found.stdout
    else:
        assert "('NotReady', 'Crashed', None) 1 2" in found.stdout, found.stdout + found.stderr


HEAD = """
import os, signal, sys, time
from pathlib import Path
import psutil
from penstock import flow, task
from penstock.runners.ray import RayTaskRunner
from tests.faults import check_random, works

@flow(task_runner=RayTaskRunner(init_kwargs={"num_cpus": 1, "object_store_memory": 100 << 20}))
def main():
    futures = works.map(Path(sys.argv[1]), range(50), 0.1)
    futures[2].wait()
    for child in psutil.Process().children(recursive=True):
        if child.name() == sys.argv[2]:
            child.kill()
    return futures.result()

print("state", main(return_state=True), flush=True)
"""


@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_the_death_of_the_head_ends_the_flow_with_a_reason(process: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    found = outside(HEAD, str(tmp_path / "ledger"), process)
    assert time.monotonic() - begun < 80
    if process == "raylet":
        assert "CRASHED" in found.stdout, found.stdout + found.stderr
        assert "SchedulerLost" in found.stdout
    else:  # what is under way needs no head
        assert "COMPLETED" in found.stdout, found.stdout + found.stderr


MEMORY = """
import os
os.environ["RAY_memory_usage_threshold"] = "0.0001"
os.environ["RAY_memory_monitor_refresh_ms"] = "100"
import time
from penstock import flow, task
from penstock.runners.ray import RayTaskRunner

@task(crash_retries=0)
def grows():
    held = bytearray(os.urandom(1) * 50_000_000)
    time.sleep(20)  # work: until the monitor strikes
    return len(held)

@flow(task_runner=RayTaskRunner(init_kwargs={"num_cpus": 1, "object_store_memory": 100 << 20}))
def main():
    future = grows.submit()
    future.wait()
    print(future.state.type, type(future.exception()).__name__, future.state.message, flush=True)

main(return_state=True)
"""


def test_a_worker_that_the_memory_monitor_ends(tmp_path: Path) -> None:
    found = outside(MEMORY)
    assert "CRASHED OutOfMemory" in found.stdout, found.stdout + found.stderr
    assert "memory" in found.stdout
