"""One slot is enough: whoever waits inside a task does the work himself, or makes room."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from penstock import as_completed, flow, task
from penstock.engine import context
from penstock.runners.base import TaskRunner
from tests.contract.test_nesting import add, chain_of, submit_down
from tests.record import Record


@pytest.mark.timeout(60, func_only=True)
def test_a_thousand_levels(one_worker: TaskRunner, record: Record) -> None:
    @flow(task_runner=one_worker)
    def deep() -> Any:
        return submit_down.submit(1000)

    assert deep() == 1000
    assert record.types("submit_down") == ["COMPLETED"] * 1001
    assert chain_of(record, "submit_down") == 1001


def test_wide_and_deep(one_worker: TaskRunner, record: Record) -> None:
    @task
    def tree(level: int) -> int:
        if level == 0:
            return 1
        return sum(tree.map([level - 1] * 3).result()) + add.submit(0).result()

    @flow(task_runner=one_worker)
    def wide() -> Any:
        return tree.submit(3)

    assert wide() == 27 + 9 + 3 + 1
    assert record.types("tree") == ["COMPLETED"] * 40


def test_a_child_that_waits_for_its_elder(one_worker: TaskRunner, record: Record) -> None:
    @task
    def outer() -> int:
        first = add.submit(1)
        second = add.submit(first)
        return second.result() + first.result()

    @flow(task_runner=one_worker)
    def ordered() -> Any:
        return [outer.submit(), outer.submit()]

    assert ordered() == [5, 5]


def test_awaiting_inside_a_task(one_worker: TaskRunner, record: Record) -> None:
    @task
    async def inner(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    @task
    async def outer(x: int) -> int:
        first = await inner.submit(x)
        both = await asyncio.gather(*(_value(inner.submit(first)) for _ in range(2)))
        return sum(both)

    @flow(task_runner=one_worker)
    def awaiting() -> Any:
        return outer.map([1, 2, 3])

    assert awaiting() == [6, 8, 10]
    assert record.types("inner") == ["COMPLETED"] * 9


async def _value(future: Any) -> Any:
    return await future


@contextlib.contextmanager
def slow_to_send() -> Iterator[None]:
    """Have the runner of the task around take its time to send."""
    scope = context.current()
    assert scope is not None
    runner: Any = scope.session.runner
    send = runner.send

    def send_late(submissions: Any) -> Any:
        time.sleep(0.1)  # work: of a connection
        return send(submissions)

    runner.send = send_late
    try:
        yield
    finally:
        del runner.send


def test_awaiting_what_is_on_its_way(one_worker: TaskRunner) -> None:
    @task
    async def inner(x: int) -> int:
        return x + 1

    @task
    async def outer(x: int) -> int:
        with slow_to_send():
            child = inner.submit(x)
            await asyncio.sleep(0.03)  # work: while another thread begins to send the child
            return await child

    @flow(task_runner=one_worker)
    def awaiting() -> Any:
        return outer.submit(1)

    assert awaiting() == 2


def test_awaiting_several_at_once(one_worker: TaskRunner) -> None:
    @task
    async def inner(seconds: float) -> float:
        await asyncio.sleep(seconds)  # work: so that the first ends well before the others begin
        return seconds

    @task
    async def outer() -> float:
        children = inner.with_options(chunk_size=1).map([0.01, 0.1, 0.1])
        await asyncio.sleep(0.03)  # work: until they are sent
        return sum(await asyncio.gather(*map(_value, children)))

    @flow(task_runner=one_worker)
    def awaiting() -> Any:
        return outer.submit()

    assert awaiting() == pytest.approx(0.21)


def test_completion_order_inside_a_task(one_worker: TaskRunner) -> None:
    @task
    def outer() -> int:
        return sum(future.result() for future in as_completed(add.map(range(5))))

    @flow(task_runner=one_worker)
    def counting() -> Any:
        return outer.submit()

    assert counting() == 15


def test_retries_with_a_delay_inside_a_task(one_worker: TaskRunner, record: Record) -> None:
    @task(retries=2, retry_delay_seconds=0.02)
    def stubborn() -> int:
        raise ConnectionError("again")

    @task
    def outer() -> str:
        return type(stubborn.submit().exception()).__name__

    @flow(task_runner=one_worker)
    def trying() -> Any:
        return outer.submit()

    assert trying() == "ConnectionError"
    assert record.task("stubborn").attempt == 3
