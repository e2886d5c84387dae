"""Async flows and tasks: the loop is never blocked, and nothing exists twice."""

import asyncio
from typing import Any

import pytest

from penstock import UnfinishedRun, as_completed, flow, task
from penstock.runners.base import TaskRunner
from tests.record import Record


@task
def add(x: int, y: int = 1) -> int:
    return x + y


@task
async def add_later(x: int, y: int = 1) -> int:
    await asyncio.sleep(0.001)
    return x + y


@task
def fail() -> int:
    raise ValueError("no data")


@task
def slow() -> str:
    import time

    time.sleep(0.2)
    return "done"


def test_an_async_flow(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    async def gather(n: int) -> Any:
        direct = await add_later(n)
        awaited = await add.submit(direct)
        first, second = await asyncio.gather(_value(add_later.submit(awaited)), _value(add.submit(awaited)))
        return [first, second, add_later.submit(second), add.map([1, 2])]

    assert asyncio.run(gather(1)) == [4, 4, 5, [2, 3]]
    assert set(record.types()) == {"COMPLETED"}
    assert record.flow().type == "COMPLETED"


async def _value(future: Any) -> Any:
    return await future


def test_awaiting_a_failure(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    async def body() -> str:
        failed = fail.submit()
        never = add.submit(failed)
        with pytest.raises(ValueError, match="no data"):
            await failed
        with pytest.raises(UnfinishedRun):
            await never
        with pytest.raises(ValueError, match="no data"):
            await asyncio.gather(_value(add.submit(1)), _value(failed))
        return "goes on"

    assert asyncio.run(body()) == "goes on"


def test_the_loop_goes_on_while_tasks_run(runner: TaskRunner) -> None:
    ticks = []

    async def tick() -> None:
        while True:
            ticks.append(1)
            await asyncio.sleep(0.005)

    @flow(task_runner=runner)
    async def body() -> str:
        future = slow.submit()
        ticker = asyncio.create_task(tick())
        found = await future
        ticker.cancel()
        return found

    assert asyncio.run(body()) == "done"
    assert (len(ticks) > 5) is (runner.info.threads > 1)


def test_the_loop_goes_on_while_a_flow_ends(parallel: TaskRunner, record: Record) -> None:
    async def main() -> int:
        ticks = 0

        @flow(task_runner=parallel)
        async def body() -> None:
            slow.submit()

        running = asyncio.ensure_future(body())
        while not running.done():
            ticks += 1
            await asyncio.sleep(0.005)
        return ticks

    assert asyncio.run(main()) > 5
    assert record.types("slow") == ["COMPLETED"]


def test_async_iteration_over_what_completes(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    async def body() -> list[int]:
        return sorted([await future async for future in as_completed(add.map(range(5)))])

    assert asyncio.run(body()) == [1, 2, 3, 4, 5]


def test_result_in_a_loop_warns_and_works(parallel: TaskRunner) -> None:
    @flow(task_runner=parallel)
    async def body() -> str:
        with pytest.warns(UserWarning, match="blocks the running event loop"):
            return slow.submit().result()

    assert asyncio.run(body()) == "done"


def test_a_sync_flow_in_an_async_flow(runner: TaskRunner, record: Record) -> None:
    @flow
    def child(x: int) -> Any:
        return add.submit(x)

    @flow(task_runner=runner)
    async def parent() -> Any:
        return child(1)

    assert asyncio.run(parent()) == 2


def test_a_sync_flow_that_returns_an_awaitable(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    def body() -> Any:
        return add_later(1)

    assert body() == 2


def test_several_flows_in_one_loop(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    async def one(x: int) -> Any:
        return await add.submit(x)

    async def main() -> list[int]:
        return list(await asyncio.gather(*(one(x) for x in range(4))))

    assert asyncio.run(main()) == [1, 2, 3, 4]
    assert len({event.root for event in record.events}) == 4


def test_a_cancelled_loop(parallel: TaskRunner, record: Record) -> None:
    @flow(task_runner=parallel)
    async def body() -> None:
        await asyncio.sleep(30)

    async def main() -> None:
        running = asyncio.ensure_future(body())
        await asyncio.sleep(0.05)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert record.flow().type == "CRASHED"
    assert record.flow().state["message"] == "Execution was cancelled by the runtime environment."


def test_async_methods(runner: TaskRunner) -> None:
    class Telescope:
        gain = 4

        @task
        async def amplify(self, x: int) -> int:
            return self.gain * x

        @flow(task_runner=runner)
        async def run(self, x: int) -> Any:
            return [await self.amplify(x), self.amplify.submit(x)]

    assert asyncio.run(Telescope().run(2)) == [8, 8]
