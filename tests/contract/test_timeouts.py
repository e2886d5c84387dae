"""Time-outs: a deadline in the driver, whatever the code does."""

import asyncio
import time
from typing import Any

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


def test_wrong_time_outs() -> None:
    for wrong in (0, -1):
        with pytest.raises(ConfigurationError, match="'timeout_seconds' must be positive"):
            task(timeout_seconds=wrong)(lambda: None)
