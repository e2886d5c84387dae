"""Time-outs: a deadline in the driver, whatever the code does."""

import asyncio
import concurrent.futures
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock import ConfigurationError, flow, task
from penstock.errors import TaskTimeout
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def identity(x: Any = 1) -> Any:
    return x


@task(timeout_seconds=0.2)
def sleepy(seconds: float) -> str:
    """Sleep in one call into C."""
    time.sleep(seconds)
    return "awake"


def test_a_task_that_exceeds_its_time(in_flow: InFlow, record: Record) -> None:
    def body() -> float:
        begun = time.monotonic()
        future = sleepy.submit(1.5)
        never = identity.submit(future)
        sibling = identity.submit(3)
        future.wait()
        seconds = time.monotonic() - begun
        assert (future.state.type, future.state.name) == ("FAILED", "TimedOut")
        assert "exceeded timeout of 0.2 second(s)" in future.state.message
        error = future.exception()
        assert isinstance(error, TaskTimeout)
        assert isinstance(error, TimeoutError)
        never.wait()
        assert never.state.name == "NotReady"
        assert sibling.result() == 3
        return seconds

    assert in_flow(body) < 1.4
    assert (record.task("sleepy").type, record.task("sleepy").state["name"]) == ("FAILED", "TimedOut")


def test_a_task_that_keeps_to_its_time(in_flow: InFlow) -> None:
    quick = sleepy.with_options(timeout_seconds=10)
    assert in_flow(lambda: [quick.submit(0.01), quick(0.01)]) == ["awake", "awake"]


def test_an_async_task_that_exceeds_its_time(in_flow: InFlow, record: Record) -> None:
    @task(timeout_seconds=0.1)
    async def dreamy() -> None:
        await asyncio.sleep(1.0)

    with pytest.raises(TaskTimeout, match=r"exceeded timeout of 0\.1 second\(s\)"):
        in_flow(lambda: dreamy.submit())
    assert record.task("dreamy").state["name"] == "TimedOut"


def test_a_time_out_is_tried_again(in_flow: InFlow, record: Record, tmp_path: Any) -> None:
    marker = tmp_path / "marker"

    @task(timeout_seconds=0.3, retries=1)
    def slow_once() -> str:
        if not marker.exists():
            marker.touch()
            time.sleep(0.8)
        return "done"

    assert in_flow(lambda: slow_once.submit()) == "done"
    assert (record.task("slow_once").type, record.task("slow_once").attempt) == ("COMPLETED", 2)


def test_the_deadline_counts_from_the_start_of_the_code(in_flow: InFlow, record: Record) -> None:
    brief = sleepy.with_options(timeout_seconds=2.0)
    assert in_flow(lambda: brief.map([0.1] * 12)) == ["awake"] * 12


def test_a_map_with_a_time_out(in_flow: InFlow, record: Record) -> None:
    def body() -> list[str]:
        futures = sleepy.with_options(timeout_seconds=0.5).map([0.0, 1.2, 0.0])
        futures.wait()
        return [future.state.name for future in futures]

    assert in_flow(body) == ["Completed", "TimedOut", "Completed"]


def test_a_direct_call_that_exceeds_its_time(in_flow: InFlow, record: Record) -> None:
    with pytest.raises(TaskTimeout, match="exceeded timeout"):
        in_flow(lambda: sleepy(0.5))
    assert record.task("sleepy").state["name"] == "TimedOut"


def test_a_time_out_of_the_users_own_is_not_relabelled(in_flow: InFlow, record: Record) -> None:
    @task(timeout_seconds=10)
    def own() -> None:
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError, match="no answer"):
        in_flow(lambda: own.submit())
    assert record.task("own").state["name"] == "Failed"


def test_a_flow_that_exceeds_its_time(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, timeout_seconds=0.2)
    def slow() -> None:
        time.sleep(5)  # work: the flow function exceeds its time

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"exceeded timeout of 0\.2 second\(s\)"):
        slow()
    assert time.monotonic() - begun < 3
    assert (record.flow().type, record.flow().state["name"]) == ("FAILED", "TimedOut")


def test_an_async_flow_that_exceeds_its_time(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, timeout_seconds=0.2)
    async def slow() -> None:
        await asyncio.sleep(5)

    with pytest.raises(TimeoutError, match="exceeded timeout"):
        asyncio.run(slow())
    assert record.flow().state["name"] == "TimedOut"


def test_the_runner_goes_on_after_a_time_out(in_flow: InFlow) -> None:
    def body() -> Any:
        sleepy.submit(0.6).wait()
        return identity.map(range(6))

    assert in_flow(body) == list(range(6))


@pytest.mark.timeout(60, func_only=True)
def test_a_worker_that_is_killed_at_the_deadline(
    apart: TaskRunner, in_flow: InFlow, wait_until: Any, tmp_path: Path
) -> None:
    marker = tmp_path / "pid"

    @task(timeout_seconds=0.5, timeout_action="kill_worker")
    def deaf() -> None:
        marker.write_text(str(os.getpid()))
        time.sleep(300)

    def body() -> tuple[str, Any]:
        future = deaf.submit()
        future.wait()
        wait_until(lambda: not psutil.pid_exists(int(marker.read_text())), 30)
        return future.state.name, identity.map(range(4)).result()

    assert in_flow(body) == ("TimedOut", [0, 1, 2, 3])


def test_an_async_task_that_sleeps_in_a_call_into_c(in_flow: InFlow, record: Record) -> None:
    @task(timeout_seconds=0.2)
    async def deaf() -> None:
        time.sleep(3.0)

    def body() -> float:
        begun = time.monotonic()
        deaf.submit().wait()
        return time.monotonic() - begun

    assert in_flow(body) < 2.5
    assert record.task("deaf").state["name"] == "TimedOut"


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_the_tasks_of_a_flow_end_with_its_time(
    runner: TaskRunner, record: Record, wait_until: Any, where: str
) -> None:
    @flow(task_runner=runner, timeout_seconds=0.6)
    def slow() -> None:
        identity.submit(1).wait()
        for _ in range(200):
            sleepy.with_options(timeout_seconds=None).submit(0.1).result()
        raise AssertionError

    def call() -> None:
        with pytest.raises(TimeoutError, match=r"exceeded timeout of 0\.6 second\(s\)"):
            slow()

    begun = time.monotonic()
    if where == "main thread":
        call()
    else:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(call).result()
    assert time.monotonic() - begun < 6
    assert (record.flow().type, record.flow().state["name"]) == ("FAILED", "TimedOut")
    assert "Flow run exceeded timeout of 0.6 second(s)" in record.flow().state["message"]
    assert {row.type for row in record.tasks()} <= {"COMPLETED", "CANCELLED", "FAILED"}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_time_of_a_flow_covers_its_subflows(runner: TaskRunner, record: Record, kind: str) -> None:
    @flow
    def child() -> None:
        identity(1)
        time.sleep(5)  # work: interrupted

    @flow
    async def async_child() -> None:
        identity(1)
        await asyncio.sleep(5)

    @flow(task_runner=runner, timeout_seconds=0.3)
    def parent() -> None:
        child()

    @flow(task_runner=runner, timeout_seconds=0.3)
    async def async_parent() -> None:
        await async_child()

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"exceeded timeout of 0\.3 second\(s\)"):
        parent() if kind == "sync" else asyncio.run(async_parent())
    assert time.monotonic() - begun < 4
    assert [row.state["name"] for row in record.flows()] == ["TimedOut", "TimedOut"]


def test_the_time_of_a_subflow_is_its_own(runner: TaskRunner, record: Record) -> None:
    @flow(timeout_seconds=0.2)
    def child() -> None:
        time.sleep(5)  # work: interrupted

    @flow(task_runner=runner)
    def parent() -> str:
        with pytest.raises(TimeoutError):
            child()
        return "goes on"

    assert parent() == "goes on"
    assert [row.state["name"] for row in record.flows()] == ["Completed", "TimedOut"]

    @flow(task_runner=runner)
    def unaware() -> None:
        child()

    with pytest.raises(TimeoutError):
        unaware()
    assert record.flows()[2].state["name"] == "Failed"


def test_a_direct_call_in_a_flow_whose_time_is_over(runner: TaskRunner, record: Record) -> None:
    calls = []

    @task(retries=5)
    def slow() -> None:
        calls.append(1)
        time.sleep(5)  # work: interrupted

    @flow(task_runner=runner, timeout_seconds=0.3)
    def body() -> None:
        slow()

    with pytest.raises(TimeoutError):
        body()
    assert (len(calls), record.flow().state["name"]) == (1, "TimedOut")


def test_wrong_time_outs() -> None:
    for wrong in (0, -1):
        with pytest.raises(ConfigurationError, match="'timeout_seconds' must be positive"):
            task(timeout_seconds=wrong)(lambda: None)
    with pytest.raises(ConfigurationError, match="'timeout_action' must be 'abandon' or 'kill_worker'"):
        task(timeout_action="explode")(lambda: None)  # type: ignore[call-overload]
