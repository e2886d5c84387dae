"""Tasks that yield: their value is the list of what they yielded."""

import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import UpstreamTaskError, put, task
from penstock.engine.clock import clock
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def planes(count: int, fails_at: int = -1) -> Iterator[Any]:
    for number in range(count):
        if number == fails_at:
            raise ValueError(f"plane {number} is missing")
        yield np.full(50_000, float(number))


@task
async def planes_later(count: int) -> AsyncIterator[Any]:
    for number in range(count):
        yield np.full(50_000, float(number))


@task
def first(plane: Any) -> float:
    return float(plane[0])


@task
def overwrite(plane: Any) -> float:
    plane[0] = 9
    return float(plane[0])


@pytest.mark.parametrize("source", [planes, planes_later])
def test_what_was_yielded_goes_to_consumers(in_flow: InFlow, source: Any) -> None:
    assert in_flow(lambda: first.map(source.submit(5))) == [0, 1, 2, 3, 4]
    assert [plane[0] for plane in in_flow(lambda: source.submit(3))] == [0, 1, 2]


def test_consumers_share_what_was_yielded(in_flow: InFlow) -> None:
    def body() -> Any:
        source = planes.submit(3)
        written = overwrite.with_options(inputs="copy").map(source)
        refused = [future.exception() for future in overwrite.map(source)]
        assert all("read-only" in str(error) for error in refused)
        return [written.result(), first.map(source).result()]

    assert in_flow(body) == [[9, 9, 9], [0, 1, 2]]


def test_a_generator_that_yields_nothing(in_flow: InFlow) -> None:
    assert in_flow(lambda: planes.submit(0)) == []
    assert in_flow(lambda: first.map(planes.submit(0))) == []


def test_a_generator_that_fails_midway(in_flow: InFlow, record: Record) -> None:
    """Its error is seen as that of any task; where items come one by one, those before it are mapped over."""

    def body() -> Any:
        source = planes.submit(5, fails_at=3)
        with pytest.raises(UpstreamTaskError, match="plane 3 is missing"):
            first.map(source)
        return source.exception()

    error = in_flow(body)
    assert isinstance(error, ValueError)
    assert record.task("planes").type == "FAILED"
    assert record.types("first") in ([], ["COMPLETED"] * 3)


def test_a_generator_is_no_value(in_flow: InFlow) -> None:
    """One made by the caller runs in the caller; it is drawn when it is mapped over."""
    assert in_flow(lambda: first.map(np.full(3, float(i)) for i in range(3))) == [0, 1, 2]
    assert in_flow(lambda: first.map(put([np.full(3, float(i)) for i in range(3)]))) == [0, 1, 2]


# ------------------------------------------------------------------------------------- items, one by one


@task
def in_step(folder: str, count: int, patience: float) -> Iterator[Any]:
    """Yield the next plane when somebody has seen the last one, or patience ends."""
    for number in range(count):
        yield np.full(200_000, float(number))
        deadline = time.monotonic() + patience
        while number + 1 < count and not os.path.exists(f"{folder}/{number}"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody has seen plane {number}")
            time.sleep(0.01)  # work: the generator goes on when its item has been used


@task
def seen(plane: Any, folder: str) -> float:
    Path(folder, str(int(plane[0]))).touch()
    return float(plane[0])


def test_consumers_run_while_the_generator_goes_on(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Path
) -> None:
    """Who asks at once gets items one by one: nothing is sent meanwhile, however slow this machine is."""
    streams = parallel.info.streams
    asked = threading.Event()

    def hold() -> None:
        asked.wait(30)

    def body() -> Any:
        if streams:  # the batch that the generator waits in goes out by the clock
            clock.call_later(0, hold)
        source = in_step.submit(str(tmp_path), 4, 60.0 if streams else 0.0)
        if streams:
            items = source.items()
            asked.set()
            return [seen.submit(item, str(tmp_path)) for item in items]
        with pytest.raises(TimeoutError, match="nobody has seen plane 0"):
            list(source.items())
        return [0.0, 1.0, 2.0, 3.0]

    assert in_flow(body) == [0, 1, 2, 3]


@pytest.mark.parametrize("source", [planes, planes_later])
def test_items_and_the_list_of_them(in_flow: InFlow, source: Any) -> None:
    def body() -> Any:
        future = source.submit(4)
        consumed = [first.submit(item) for item in future.items()]
        assert [item.result()[0] for item in future.items()] == [0, 1, 2, 3]
        values = future.result()
        assert [value[0] for value in values] == [0, 1, 2, 3]
        return [consumed, total.submit(future), first.map(future), total.submit([future], nested=True)]

    assert in_flow(body) == [[0, 1, 2, 3], 6, [0, 1, 2, 3], 6]


@task
def total(planes: Any, nested: bool = False) -> float:
    return float(sum(plane[0] for plane in (planes[0] if nested else planes)))


def test_items_of_what_has_ended(in_flow: InFlow) -> None:
    def body() -> Any:
        future = planes.submit(3)
        future.wait()
        return [first.submit(item) for item in future.items()]

    assert in_flow(body) == [0, 1, 2]


def test_items_of_any_list(in_flow: InFlow) -> None:
    @task
    def listed() -> Any:
        return [np.ones(3), np.zeros(3)]

    assert in_flow(lambda: [first.submit(item) for item in listed.submit().items()]) == [1, 0]


def test_items_before_a_failure_are_consumed(in_flow: InFlow, runner: TaskRunner, record: Record) -> None:
    def body() -> Any:
        futures = []
        with pytest.raises(ValueError, match="plane 3 is missing"):
            for item in planes.submit(5, fails_at=3).items():
                futures.append(first.submit(item))
        return [future.result() for future in futures]

    assert in_flow(body) == ([0, 1, 2] if runner.info.streams else [])
    assert record.task("planes").type == "FAILED"


def test_a_retry_goes_on_where_the_items_ended(in_flow: InFlow, tmp_path: Path) -> None:
    @task(retries=1)
    def once(path: str) -> Iterator[Any]:
        for number in range(4):
            if number == 2 and not os.path.exists(path):
                Path(path).touch()
                raise OSError("the disk was away")
            yield np.full(10, float(number))

    assert in_flow(lambda: [first.submit(item) for item in once.submit(str(tmp_path / "x")).items()]) == [
        0,
        1,
        2,
        3,
    ]


def test_items_in_a_task(in_flow: InFlow) -> None:
    @task
    def outer() -> list[float]:
        return [first.submit(item).result() for item in planes.submit(3).items()]

    assert in_flow(lambda: outer.submit()) == [0, 1, 2]


def test_a_task_that_came_first_gets_the_list(in_flow: InFlow) -> None:
    def body() -> Any:
        future = planes.submit(3)
        summed = total.submit(future)
        return [summed, *[first.submit(item) for item in future.items()]]

    assert in_flow(body) == [3, 0, 1, 2]


def test_items_are_mapped_over_as_they_come(runner: TaskRunner, in_flow: InFlow) -> None:
    if not runner.info.streams:
        pytest.skip("this runner brings items when the generator has ended")

    @task
    def produce() -> Any:
        for number in range(3):
            yield number
            time.sleep(0.5)  # work: long enough for the item to be consumed meanwhile

    @task
    def moment(x: int) -> float:
        return time.time()

    def body() -> Any:
        source = produce.submit()
        moments = moment.map(source)
        return moments.result(), source._run.ended

    moments, end = in_flow(body)
    assert len(moments) == 3
    if not runner.info.dependencies:  # a scheduler of its own may queue the consumer behind its producer
        assert moments[0] < end - 0.5
