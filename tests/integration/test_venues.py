"""Several runners in one flow: tasks and subflows that name theirs; values cross through the driver."""

import os
from typing import Any

import numpy as np
import pytest

from penstock import ConfigurationError, PenstockFuture, SequentialTaskRunner, flow, task
from penstock.runners import runner_class
from penstock.runners.base import TaskRunner
from tests.record import Record


@task
def where(x: Any = 0) -> int:
    return os.getpid()


@task
def double(x: Any) -> Any:
    return 2 * x


@task
def ones(n: int) -> Any:
    return np.ones(n)


@task
def total(x: Any) -> float:
    return float(np.sum(x))


def test_a_task_has_a_runner_of_its_own(runner: TaskRunner, record: Record) -> None:
    at_home = where.with_options(task_runner=SequentialTaskRunner())

    @flow(task_runner=runner)
    def body() -> list[Any]:
        return [at_home.submit(), at_home.map([1, 2]), where.submit()]

    first, mapped, other = body()
    assert [first, *mapped] == [os.getpid()] * 3
    assert (other == os.getpid()) is runner.info.in_process
    assert record.types() == ["COMPLETED"] * 4


def test_names_in_the_mapping_of_a_flow(runner: TaskRunner) -> None:
    @flow(task_runner={"main": runner, "quick": SequentialTaskRunner()})
    def body() -> list[Any]:
        return [
            where.submit(),
            where.with_options(task_runner="main").submit(),
            where.with_options(task_runner="quick").submit(),
            child(),
        ]

    @flow
    def child() -> Any:
        return where.with_options(task_runner="quick").submit().result()

    first, named, quick, nested = body()
    assert (first == os.getpid()) is (named == os.getpid()) is runner.info.in_process
    assert quick == nested == os.getpid()


def test_dependants_wait_across_runners(runner: TaskRunner, record: Record) -> None:
    elsewhere = double.with_options(task_runner=SequentialTaskRunner())

    @flow(task_runner=runner)
    def body() -> list[Any]:
        there = elsewhere.submit(double.submit(1))
        back = double.submit(there)
        mapped = double.map(elsewhere.map([1, 2]))
        ordered = double.submit(5, wait_for=[there])
        taken_apart = double.map(task(task_runner=SequentialTaskRunner())(lambda: [7, 8]).submit())
        return [back, mapped, ordered, taken_apart]

    assert body() == [8, [4, 8], 10, [14, 16]]


def test_a_failure_crosses_too(runner: TaskRunner) -> None:
    @task(task_runner=SequentialTaskRunner())
    def fail() -> None:
        raise ValueError("as asked")

    @flow(task_runner=runner)
    def body() -> str:
        future = double.submit(fail.submit())
        future.wait()
        return future.state.name

    assert body() == "NotReady"


def test_large_values_cross_with_a_warning(runner: TaskRunner, record: Record) -> None:
    n = 1 << 18  # two megabytes
    elsewhere = total.with_options(task_runner=SequentialTaskRunner())

    @flow(task_runner=runner)
    def body() -> list[Any]:
        made = ones.submit(n)
        return [elsewhere.submit(made), elsewhere.submit(made), double.submit(elsewhere.submit(made))]

    assert body() == [n, n, 2 * n]
    said = [line for line in record.flow().logs if "through the driver" in line]
    assert len(said) == 1
    assert "the value of 'ones', " in said[0]
    assert f"moves from {runner.name} to {SequentialTaskRunner.name}" in said[0]


def test_a_subflow_with_a_runner_of_its_own(runner: TaskRunner, record: Record) -> None:
    @flow
    def child(x: PenstockFuture[Any]) -> Any:
        return [double.submit(x), where.submit()]

    @flow(task_runner=runner)
    def parent() -> list[Any]:
        made = double.submit(1)
        future, place = child.with_options(task_runner=SequentialTaskRunner())(made)
        return [double.submit(future), place, child(made)[0]]

    crossed, place, same = parent()
    assert (crossed, place, same) == (8, os.getpid(), 4)
    assert [row.type for row in record.flows()] == ["COMPLETED"] * 3


def test_a_runner_that_the_flow_opened_is_closed_with_it(runner: TaskRunner) -> None:
    other = SequentialTaskRunner()

    @flow(task_runner=runner)
    def body() -> None:
        where.with_options(task_runner=other).submit()
        assert other.is_open

    body()
    assert not other.is_open


@pytest.mark.parametrize("wish", ["class", "instance", "name"])
def test_the_runner_of_a_flow_in_every_form(runner: TaskRunner, wish: str) -> None:
    kind = runner_class("ThreadPoolTaskRunner")
    wishes: dict[str, Any] = {"class": kind, "instance": kind(), "name": kind.name}
    for given in (wishes[wish], {"a": wishes[wish]}):
        assert flow(task_runner=given)(lambda: where.submit().result())() == os.getpid()


def test_wrong_runners() -> None:
    with pytest.raises(ConfigurationError, match="needs names as keys, and at least one"):
        flow(task_runner={})(lambda: None)
    with pytest.raises(
        ConfigurationError, match="a task runner must be a name, a class or an instance, got int"
    ):
        flow(task_runner={"a": 3})(lambda: None)
    with pytest.raises(
        ConfigurationError, match="a task runner must be a name, a class or an instance, got int"
    ):
        task(task_runner=3)(lambda: None)  # type: ignore[call-overload]
