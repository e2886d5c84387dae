"""What can be a task: methods of all kinds, callable objects, builtins, generators."""

import asyncio
import functools
import operator
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from penstock import flow, get_run_logger, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


class Telescope:
    """Has tasks of every kind of method."""

    def __init__(self, size: int) -> None:
        self.size = size

    @task
    def gain(self, factor: int = 2) -> int:
        return self.size * factor

    @task
    async def slow_gain(self, factor: int = 2) -> int:
        await asyncio.sleep(0)
        return self.size * factor

    @task
    @classmethod
    def named(cls, suffix: str = "") -> str:
        return cls.__name__ + suffix

    @task
    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @staticmethod
    @task
    def triple(x: int) -> int:
        return 3 * x

    @task(task_run_name="{self.size}")
    def shown(self) -> int:
        return self.size


class Large(Telescope):
    """Inherits them."""


def test_methods(in_flow: InFlow, record: Record) -> None:
    one = Telescope(3)

    def body() -> list[Any]:
        return [
            one.gain(),
            one.gain.submit(factor=3).result(),
            one.gain.map([1, 2]).result(),
            one.slow_gain.submit(4).result(),
            one.gain.with_options(retries=1).submit(5).result(),
            Telescope.gain(one, 6),
            Telescope.gain.submit(one, 7).result(),
        ]

    assert in_flow(body) == [6, 9, [3, 6], 12, 15, 18, 21]
    assert {row.task for row in record.tasks()} == {"gain", "slow_gain"}


def test_self_is_a_parameter(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: Telescope(7).shown.submit().wait())
    assert record.task("shown").name == "7"
    assert set(record.task("shown").body["parameters"]) == {"self"}


def test_class_and_static_methods(in_flow: InFlow) -> None:
    def body() -> list[Any]:
        return [
            Telescope.named(),  # type: ignore[call-overload]
            Large.named.submit("!").result(),
            Large(1).named.submit("?").result(),
            Large.named.map(["a", "b"]).result(),
            Telescope.double(2),
            Telescope(1).double.submit(3).result(),
            Telescope.double.with_options(name="other").map([4]).result(),
            Telescope.triple.submit(5).result(),
            Telescope(1).triple(6),
        ]

    assert in_flow(body) == ["Telescope", "Large!", "Large?", ["Largea", "Largeb"], 4, 6, [8], 15, 18]


class Scale:
    """A callable object."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: int) -> int:
        return self.factor * x


class AsyncScale(Scale):
    async def __call__(self, x: int) -> int:  # type: ignore[override]
        return self.factor * x


class Counting(Scale):
    def __call__(self, x: int) -> Iterator[int]:  # type: ignore[override]
        yield from range(x)


def test_callable_objects(in_flow: InFlow, record: Record) -> None:
    def body() -> list[Any]:
        awaited = task(AsyncScale(3))
        assert awaited.isasync
        return [
            task(Scale(2))(3),
            task(Scale(2)).submit(4).result(),
            awaited.submit(5).result(),
            task(Counting(1)).submit(3).result(),
            list(task(Counting(1))(3)),
        ]

    assert in_flow(body) == [6, 8, 15, [0, 1, 2], [0, 1, 2]]
    assert [row.task for row in record.tasks()] == ["Scale", "Scale", "AsyncScale", "Counting", "Counting"]


def test_builtins_and_partials(in_flow: InFlow) -> None:
    def body() -> list[Any]:
        return [
            task(max).submit(3, 4).result(),
            task(operator.add).submit(1, 2).result(),
            task(len).map([[1], [1, 2]]).result(),
            task(name="thrice")(functools.partial(operator.mul, 3)).submit(4).result(),
            task(sorted)([2, 1]),
        ]

    assert in_flow(body) == [4, 3, [1, 2], 12, [1, 2]]


# ------------------------------------------------------------------------------------------- generators


@task
def count(n: int, fail_at: int = -1) -> Iterator[int]:
    get_run_logger().info("begun")
    for number in range(n):
        if number == fail_at:
            raise ValueError("as asked")
        yield number
    get_run_logger().info("exhausted")


@task
async def count_slowly(n: int) -> AsyncIterator[int]:
    for number in range(n):
        await asyncio.sleep(0)
        yield number


def test_a_direct_call_of_a_generator_is_lazy(in_flow: InFlow, record: Record) -> None:
    def body() -> list[int]:
        items = count(3)
        first = next(items)
        assert record.task("count").type == "RUNNING"
        get_run_logger().info("between")  # the caller's own code
        rest = list(items)
        assert record.task("count").type == "COMPLETED"
        return [first, *rest]

    assert in_flow(body) == [0, 1, 2]
    assert record.task("count").logs == ["begun", "exhausted"]
    assert record.flow().logs == ["between"]


def test_a_generator_that_is_closed(in_flow: InFlow, record: Record) -> None:
    def body() -> int:
        items = count(1_000_000)
        found = next(items)
        items.close()  # type: ignore[attr-defined]
        return found

    assert in_flow(body) == 0
    assert record.task("count").type == "COMPLETED"


def test_a_generator_that_fails_as_it_is_drawn(in_flow: InFlow, record: Record) -> None:
    def body() -> list[int]:
        found = []
        with pytest.raises(ValueError, match="as asked"):
            for item in count(5, 2):
                found += [item]
        return found

    assert in_flow(body) == [0, 1]
    assert record.task("count").type == "FAILED"


def test_a_generator_that_is_tried_again_goes_on_where_it_was(in_flow: InFlow, record: Record) -> None:
    failures = [1]

    @task(retries=1)
    def fragile() -> Iterator[int]:
        for number in range(4):
            if number == 2 and failures:
                failures.pop()
                raise ConnectionError
            yield number

    assert in_flow(lambda: list(fragile())) == [0, 1, 2, 3]
    assert record.task("fragile").attempt == 2


def test_tasks_are_submitted_between_items(in_flow: InFlow, record: Record) -> None:
    def body() -> list[int]:
        return [future.result() for future in [Telescope.double.submit(item) for item in count(3)]]

    assert in_flow(body) == [0, 2, 4]
    assert {row.parent for row in record.tasks("double")} == {None}


def test_an_async_generator(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    async def body() -> list[Any]:
        drawn = [item async for item in count_slowly(3)]
        submitted = await count_slowly.submit(2)
        async for item in count_slowly(5):
            if item == 1:
                break
        return [drawn, submitted]

    assert asyncio.run(body()) == [[0, 1, 2], [0, 1]]
    assert record.types("count_slowly")[:2] == ["COMPLETED"] * 2


def test_a_generator_outside_of_flows() -> None:
    assert list(count(3)) == [0, 1, 2]


def test_a_generator_has_no_state_to_give() -> None:
    with pytest.raises(ValueError, match="The return_type for a generator task must be 'result'"):
        count(3, return_state=True)
