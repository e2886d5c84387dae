"""Flows beside one another: `submit`, `map`, retries, exits, and each cancelled alone."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import (
    CancelledRun,
    ConfigurationError,
    MappingLengthMismatch,
    PausedRun,
    PenstockFuture,
    PenstockFutureList,
    Skip,
    UnfinishedRun,
    first_completed,
    flow,
    quote,
    task,
    unmapped,
)
from penstock.engine import cancelling
from penstock.engine.states import Paused
from penstock.errors import TaskTimeout
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def add(x: Any, y: Any = 1) -> Any:
    return x + y


@task
def fail() -> int:
    raise ValueError("no data")


@task
def nap(seconds: float, mark: Path | None = None) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)  # work: something to stop
    if mark is not None:
        mark.touch()
    return seconds


@flow
def child(x: int, y: Any = 1) -> Any:
    return add.submit(x, y)


@flow
async def async_child(x: int) -> int:
    return int(await add.submit(x))


# -------------------------------------------------------------------------------------------------- submit


def test_a_submitted_flow_gives_a_future(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        future = child.submit(1)
        assert isinstance(future, PenstockFuture)
        assert future.result() == 2
        assert future.state.is_completed()
        assert future.state.state_details["child_flow_run_id"]
        return [add.submit(future, 10), async_child.submit(5), child.submit(future), add(future)]

    assert in_flow(body) == [12, 6, 3, 3]
    (parent,) = [row for row in record.flows() if row.body["parent_flow_run"] is None]
    children = [row for row in record.flows() if row.body["parent_flow_run"] == parent.id]
    assert [row.type for row in children] == ["COMPLETED"] * 3
    assert {row.body["runner"] for row in children} != {""}


def test_flows_run_side_by_side(parallel: TaskRunner, in_flow: InFlow) -> None:
    import threading

    meeting = threading.Barrier(3, timeout=20)

    @flow
    def meets(x: int) -> int:
        meeting.wait()
        return x

    assert in_flow(lambda: [meets.submit(x) for x in range(3)]) == [0, 1, 2]


def test_submitted_from_an_async_flow(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    async def night() -> Any:
        futures = [async_child.submit(x) for x in range(3)]
        return await asyncio.gather(*futures), await child.submit(7)

    assert asyncio.run(night()) == ([1, 2, 3], 8)


def test_what_a_submitted_flow_returns(in_flow: InFlow) -> None:
    @flow
    def structure(x: int) -> Any:
        return {"a": add.submit(x), "b": [add.map([x, x]), None], "c": x}

    def body() -> Any:
        future = structure.submit(1)
        return future, add.submit([0], [future]), future.result()

    whole, inside, value = in_flow(body)
    assert whole == value == {"a": 2, "b": [[2, 2], None], "c": 1}
    assert inside == [0, whole]


def test_failures_of_submitted_flows(in_flow: InFlow, record: Record) -> None:
    @flow
    def broken() -> Any:
        return fail()

    @flow
    def skipped() -> None:
        raise Skip("clouds")

    def body() -> Any:
        future = broken.submit()
        with pytest.raises(ValueError, match="no data"):
            future.result()
        after = add.submit(future)
        after.wait()
        assert after.state.name == "NotReady"
        never = child.submit(1, wait_for=[future])
        with pytest.raises(UnfinishedRun):
            never.result()
        nothing = skipped.submit()
        assert nothing.result() is None
        assert add.submit(nothing).result() is None
        return "end"

    assert in_flow(body) == "end"
    kinds = [row.type for row in record.flows()]
    assert sorted(kinds) == ["COMPLETED", "FAILED", "PENDING", "SKIPPED"]


def test_the_parent_waits_for_flows_nobody_asked_for(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    @flow
    def slow() -> Any:
        return nap.submit(0.2, tmp_path / "mark")

    def body() -> str:
        slow.submit()
        return "end"

    assert in_flow(body) == "end"
    assert (tmp_path / "mark").exists()
    assert [row.type for row in record.flows()] == ["COMPLETED", "COMPLETED"]


def test_a_map_of_flows(in_flow: InFlow, record: Record) -> None:
    @task
    def numbers() -> list[int]:
        return [10, 20]

    def body() -> Any:
        futures = child.map(range(5), unmapped(100))
        assert isinstance(futures, PenstockFutureList)
        with pytest.raises(MappingLengthMismatch):
            child.map([1, 2], [1, 2, 3])
        inner = child.map(add.map([1, 2]))
        return futures, inner, async_child.map(x for x in [1, 2]), child.map(numbers.submit())

    assert in_flow(body) == ([100, 101, 102, 103, 104], [3, 4], [2, 3], [11, 21])


def test_submit_needs_a_flow_or_an_open_runner(runner: TaskRunner) -> None:
    with pytest.raises(RuntimeError, match="Unable to determine task runner"):
        child.submit(1)
    with _shared(runner):
        assert child.submit(1).result() == 2


def _shared(runner: TaskRunner) -> Any:
    import contextlib

    from penstock.runners.base import ambient_runner

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        token = ambient_runner.set(runner)
        try:
            yield
        finally:
            ambient_runner.reset(token)

    return block()


# ------------------------------------------------------------------------------------------------- retries


def test_a_flow_is_tried_again_in_the_same_run(runner: TaskRunner, record: Record) -> None:
    tried: list[int] = []

    @flow(task_runner=runner, retries=2, retry_delay_seconds=[0.01, 0])
    def stubborn() -> Any:
        tried.append(1)
        if len(tried) < 3:
            raise ValueError(f"attempt {len(tried)}")
        return add.submit(1)

    assert stubborn() == 2
    row = record.flow()
    assert (row.type, row.attempt) == ("COMPLETED", 3)
    assert [body["name"] for _, body in sorted(row.history, key=lambda entry: entry[0])] == [
        "Pending", "Running", "AwaitingRetry", "Retrying", "Retrying", "Retrying", "Completed",
    ]  # fmt: skip


def test_a_flow_that_never_succeeds(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, retries=1)
    async def hopeless() -> Any:
        return fail.submit()

    with pytest.raises(ValueError, match="no data"):
        asyncio.run(hopeless())
    assert (record.flow().type, record.flow().attempt) == ("FAILED", 2)
    assert record.types("fail") == ["FAILED", "FAILED"]
    with pytest.raises(ConfigurationError):
        flow(retries=-1)(lambda: None)


def test_persisted_tasks_are_restored_and_others_run_again(
    runner: TaskRunner, record: Record, tmp_path: Path
) -> None:
    stored = add.with_options(persist_result=True, result_storage=tmp_path)
    kept, elements = stored.with_options(name="kept"), stored.with_options(name="elements")
    tried: list[int] = []

    @flow(persist_result=True, result_storage=tmp_path)
    def stays(x: int) -> Any:
        tried.append(100)
        return x

    @flow(task_runner=runner, retries=1)
    def night() -> Any:
        first = kept.submit(1)
        other = add.submit(first)
        mapped = elements.map([11, 12, 13])
        direct = kept(41)
        nested = stays(5)
        values = [first.result(), other.result(), mapped.result(), direct, nested]
        tried.append(1)
        if tried.count(1) == 1:
            raise ValueError("once")
        return values, add.submit(first)

    assert night() == ([2, 3, [12, 13, 14], 42, 5], 3)
    assert [row.state["name"] for row in record.tasks("kept")] == ["Completed"] * 2 + ["Cached"] * 2
    assert [row.state["name"] for row in record.tasks("elements")] == ["Completed"] * 3 + ["Cached"] * 3
    assert [row.state["name"] for row in record.tasks("add")] == ["Completed"] * 3
    assert tried.count(100) == 1


def test_a_child_flow_is_tried_again(in_flow: InFlow, record: Record) -> None:
    tried: list[int] = []

    @flow(retries=1)
    def stubborn() -> int:
        tried.append(1)
        if len(tried) % 2:
            raise ValueError("once")
        return 7

    assert in_flow(lambda: (stubborn(), stubborn.submit())) == (7, 7)
    assert [row.attempt for row in record.flows() if row.body["parent_flow_run"]] == [2, 2]


# ------------------------------------------------------------------------------------- values, generators


def test_generators(runner: TaskRunner) -> None:
    @flow
    def some(n: int) -> Iterator[Any]:
        for x in range(n):
            yield add.submit(x)

    @flow
    async def some_async(n: int) -> AsyncIterator[Any]:
        for x in range(n):
            yield await add.submit(x)

    @flow(task_runner=runner)
    def night() -> Any:
        inside = some(2)
        assert all(isinstance(item, PenstockFuture) for item in inside)  # type: ignore[unused-ignore]
        return inside, some_async.submit(2), quote([1])

    @flow(task_runner=runner)
    async def async_night() -> Any:
        return await some_async(3)  # type: ignore[misc]

    alone: Any = some.with_options(task_runner=runner)(3)
    assert alone == [1, 2, 3]
    first, second, third = night()
    assert (first, second, third) == ([1, 2], [1, 2], [1])
    assert asyncio.run(async_night()) == [1, 2, 3]


def test_a_paused_child(in_flow: InFlow, record: Record) -> None:
    @flow
    def waits() -> Any:
        return Paused("for somebody")

    def body() -> str:
        with pytest.raises(PausedRun):
            waits()
        with pytest.raises(PausedRun):
            waits.submit().result()
        return "end"

    assert in_flow(body) == "end"
    assert [row.type for row in record.flows() if row.task == "waits"] == ["PAUSED", "PAUSED"]


# -------------------------------------------------------------------------------------------------- cancel


@flow
def endless(started: Path) -> Any:
    future = nap.submit(60)
    started.touch()
    return future.result()


@flow
def busy(started: Path) -> None:
    started.touch()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.005)  # work: a loop that never calls us


@flow
async def endless_async(started: Path) -> Any:
    started.touch()
    return await asyncio.sleep(60)


@pytest.mark.parametrize("flow_to_stop", [endless, busy, endless_async], ids=["waits", "loops", "awaits"])
def test_a_flow_in_the_background_is_cancelled_alone(
    flow_to_stop: Any, parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> Any:
        future = flow_to_stop.submit(tmp_path / "started")
        other = child.submit(1)
        wait_until((tmp_path / "started").exists)
        assert future.cancel()
        with pytest.raises(CancelledRun, match="was cancelled"):
            future.result(timeout=15)
        assert future.cancelled()
        assert not future.cancel()
        return other, add.submit(5)

    assert in_flow(body) == (2, 6)
    row = next(row for row in record.flows() if row.task == flow_to_stop.name)
    assert row.names == ["Pending", "Running", "Cancelling", "Cancelled"]
    assert record.flow().type == "COMPLETED"
    if flow_to_stop is endless:
        assert record.types("nap") == ["CANCELLED"]


def test_a_nested_flow_is_cancelled_alone(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    import threading

    def stop() -> None:
        wait_until((tmp_path / "started").exists)
        row = next(row for row in record.flows() if row.task == "endless")
        assert cancelling.cancel_flow(row.id)

    def body() -> str:
        helper = threading.Thread(target=stop)
        helper.start()
        with pytest.raises(CancelledRun):
            endless(tmp_path / "started")
        helper.join()
        return "end"

    assert in_flow(body) == "end"
    assert record.flow().type == "COMPLETED"


def test_one_of_a_gather_is_cancelled(
    runner: TaskRunner, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    import threading

    def stop() -> None:
        wait_until((tmp_path / "started").exists)
        row = next(row for row in record.flows() if row.task == "endless-async")
        assert cancelling.cancel_flow(row.id)

    @flow(task_runner=runner)
    async def night() -> Any:
        helper = threading.Thread(target=stop)
        helper.start()
        both: Any = await asyncio.gather(
            endless_async(tmp_path / "started"), async_child(1), return_exceptions=True
        )
        helper.join()
        assert isinstance(both[0], CancelledRun)
        return both[1]

    assert asyncio.run(night()) == 2
    assert record.flow().type == "COMPLETED"


def test_the_flow_at_the_top_is_cancelled_with_all_in_it(
    parallel: TaskRunner, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    import threading

    @flow(task_runner=parallel)
    def night() -> Any:
        futures = [endless.submit(tmp_path / str(number)) for number in range(2)]
        return [future.result() for future in futures]

    def stop() -> None:
        wait_until(lambda: all((tmp_path / str(number)).exists() for number in range(2)))
        assert cancelling.cancel_flow(record.flow().id)

    helper = threading.Thread(target=stop)
    helper.start()
    with pytest.raises(CancelledRun):
        night()
    helper.join()
    assert [row.type for row in record.flows()] == ["CANCELLED"] * 3
    assert not cancelling.cancel_flow(record.flow().id)


def test_the_first_one_wins(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    @task
    def long(started: Path) -> None:
        started.touch()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.005)  # work: something to stop

    def body() -> Any:
        futures: list[Any] = [long.submit(tmp_path / "started")]
        wait_until((tmp_path / "started").exists)
        futures += [add.submit(1), fail.submit()]
        first = first_completed(futures, cancel_rest=True)
        futures[0].wait(timeout=20)
        assert futures[0].cancelled()
        with pytest.raises(ValueError, match="at least one"):
            first_completed([])
        return first

    assert in_flow(body) == 2


# --------------------------------------------------------------------------------------- time-out and exit


def test_a_child_in_the_background_exceeds_its_time(in_flow: InFlow, record: Record) -> None:
    @flow(timeout_seconds=0.2)
    def slow() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.005)  # work: longer than allowed

    def body() -> str:
        begun = time.monotonic()
        with pytest.raises(TaskTimeout, match="exceeded timeout"):
            slow.submit().result(timeout=20)
        assert time.monotonic() - begun < 10
        return "end"

    assert in_flow(body) == "end"
    row = next(row for row in record.flows() if row.task == "slow")
    assert (row.type, row.state["name"]) == ("FAILED", "TimedOut")


def test_on_exit_cancel(parallel: TaskRunner, record: Record, tmp_path: Path) -> None:
    @flow(task_runner=parallel, on_exit="cancel")
    def night() -> Any:
        nap.submit(60, tmp_path / "mark")
        return add.submit(add.submit(1))

    assert night() == 3
    assert record.types("nap") == ["CANCELLED"]
    assert record.flow().type == "COMPLETED"


def test_on_exit_detach(parallel: TaskRunner, record: Record, tmp_path: Path, wait_until: Any) -> None:
    @flow(task_runner=parallel, on_exit="detach")
    def night() -> Any:
        nap.submit(0.5, tmp_path / "mark")
        return add.submit(1)

    assert night() == 2
    assert record.flow().type == "COMPLETED"
    wait_until((tmp_path / "mark").exists, 20)
    wait_until(lambda: record.types("nap") == ["COMPLETED"], 20)


def test_on_exit_is_checked() -> None:
    make: Callable[..., Any] = flow
    with pytest.raises(ConfigurationError, match="on_exit"):
        make(on_exit="run away")(lambda: None)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_flow_that_waits_for_its_next_attempt_is_cancelled(
    kind: str, in_flow: InFlow, record: Record, wait_until: Any
) -> None:
    @flow(retries=1, retry_delay_seconds=60)
    def hopeless() -> None:
        raise ValueError("no")

    @flow(retries=1, retry_delay_seconds=60, name="hopeless")
    async def hopeless_async() -> None:
        raise ValueError("no")

    def body() -> str:
        future = (hopeless if kind == "sync" else hopeless_async).submit()
        wait_until(lambda: any(row.state["name"] == "AwaitingRetry" for row in record.flows()))
        assert future.cancel()
        with pytest.raises(CancelledRun):
            future.result(timeout=10)
        return "end"

    assert in_flow(body) == "end"
    row = next(row for row in record.flows() if row.task == "hopeless")
    assert (row.type, row.attempt) == ("CANCELLED", 1)


def test_a_flow_that_waits_for_an_upstream_is_dropped_at_once(
    parallel: TaskRunner, in_flow: InFlow, record: Record
) -> None:
    def body() -> str:
        upstream = nap.submit(60)
        future = child.submit(1, wait_for=[upstream])
        assert future.cancel()
        assert future.done()
        with pytest.raises(CancelledRun):
            future.result()
        upstream.cancel()
        return "end"

    assert in_flow(body) == "end"
    row = next(row for row in record.flows() if row.task == "child")
    assert row.names == ["Pending", "Cancelled"]


def test_flows_submitted_inside_a_task(in_flow: InFlow, record: Record) -> None:
    @task
    def fan_out(n: int) -> list[int]:
        futures = [child.submit(x) for x in range(n)]
        return [future.result() for future in futures] + child.map([10, 20]).result()

    assert in_flow(lambda: fan_out.submit(3)) == [1, 2, 3, 11, 21]
    assert [row.type for row in record.flows()] == ["COMPLETED"] * 6


def test_a_task_that_is_cancelled_ends_the_flow_in_it(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    @task
    def around(started: Path) -> None:
        busy(started)

    def body() -> str:
        future = around.submit(tmp_path / "started")
        wait_until((tmp_path / "started").exists)
        assert future.cancel()
        future.wait(timeout=20)
        assert future.cancelled()
        return "end"

    assert in_flow(body) == "end"
    assert record.task("around").type == "CANCELLED"


def test_the_plan_of_a_flow_that_submits_flows() -> None:
    @flow
    def night() -> Any:
        return add.submit(child.submit(1), 2)

    assert "add" in str(night.explain())


def test_states_go_to_flows_by_annotation(in_flow: InFlow) -> None:
    from penstock import State

    @flow
    def by_value(x: int) -> int:
        return x

    @flow
    def by_state(x: State) -> str:
        return x.name

    def body() -> Any:
        future = add.submit(1)
        future.wait()
        state: Any = future.state
        return by_value(state), by_state(state)

    assert in_flow(body) == (2, "Completed")
