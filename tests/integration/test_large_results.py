"""A result that does not fit where it was made ends its own run, and nothing else."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from penstock import (
    DaskTaskRunner,
    ProcessPoolTaskRunner,
    RayTaskRunner,
    ResultTooLarge,
    StateType,
    flow,
    task,
)
from penstock.runners.base import TaskRunner
from tests.conftest import required

GIGABYTE = 1 << 30


@task
def zeros(nbytes: int) -> Any:
    return np.zeros(nbytes // 8)  # the kernel gives no memory for what nobody writes to


@task
def pieces(count: int) -> Any:
    """Many views of one array; whoever pickles them copies each."""
    array = np.zeros(GIGABYTE // 8)
    return {"planes": [array[: len(array) - i] for i in range(count)]}


@task(chunk_size=1)
def pid(gate: Any = None) -> int:
    threading.Event().wait(0.3)  # work: the other worker takes the other task
    return os.getpid()


@task
def sibling(x: int, started: Any = None) -> int:
    threading.Event().wait(0.5)  # work: it runs while the large result is made
    return x


def workers() -> set[int]:
    """Process ids of both workers: each does one of two tasks that overlap."""
    return set(pid.map(range(2)).result())


def check(runner: TaskRunner, large: Any, limit: str) -> None:
    """Run a flow with one result that is too large; its siblings and the workers must stay as they are."""

    @flow(task_runner=runner)
    def body() -> Any:
        before = workers()
        siblings = sibling.map(range(6))
        future = large()
        future.wait()
        unharmed = siblings.result()  # they have ended, and left both workers free
        after = workers()
        return [future.state, future.exception(), unharmed, before == after]

    state, error, siblings, alive = body()
    assert state.type is StateType.FAILED
    assert isinstance(error, ResultTooLarge)
    assert limit in str(error)
    assert "larger than its worker can keep" in str(error)
    assert siblings == list(range(6))
    assert alive


@pytest.fixture
def dask_runner() -> Iterator[TaskRunner]:
    required("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "400MB", "dashboard_address": None}
    runner = DaskTaskRunner(cluster_kwargs=options).open()
    yield runner
    runner.shutdown()
    runner.close()


@pytest.fixture
def process_runner() -> Iterator[TaskRunner]:
    runner = ProcessPoolTaskRunner(max_workers=2).open()
    yield runner
    runner.close()


@pytest.mark.dask
@pytest.mark.timeout(90)
def test_larger_than_a_dask_worker(dask_runner: TaskRunner) -> None:
    check(dask_runner, lambda: zeros.submit(GIGABYTE), "the memory_limit of the Dask worker")
    check(dask_runner, lambda: pieces.submit(3), "allows 380,000,000")


@pytest.mark.dask
@pytest.mark.timeout(90)
def test_what_fits_into_a_dask_worker_stays(dask_runner: TaskRunner) -> None:
    @flow(task_runner=dask_runner)
    def body() -> Any:
        future = zeros.submit(GIGABYTE // 4)
        future.wait()
        return future.state

    assert body().is_completed()


@pytest.mark.processes
@pytest.mark.timeout(90)
def test_larger_than_shared_memory_and_disk(process_runner: TaskRunner) -> None:
    check(process_runner, lambda: pieces.submit(2000), "no room for 2,1")


@pytest.mark.ray
@pytest.mark.timeout(90)
def test_larger_than_the_object_store_and_the_disk() -> None:
    required("ray")
    options = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    runner = RayTaskRunner(init_kwargs=options).open()
    try:
        check(runner, lambda: pieces.submit(2000), "Ray's object store with the disk behind it allows")
    finally:
        runner.shutdown()
        runner.close()
