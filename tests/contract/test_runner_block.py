"""Runners without flows: ``with runner:``, and what happens without it."""

from typing import Any

import pytest

from penstock import ParameterBindError, flow, task, unmapped
from penstock.runners.base import TaskRunner
from tests.record import Record


@task
def add(x: int, y: int = 1) -> int:
    return x + y


@task
def outer(x: int) -> int:
    return add.submit(x).result() + add(x)


@task
def fail() -> None:
    raise ValueError("no data")


def test_submit_and_map_in_a_block(runner: TaskRunner, record: Record) -> None:
    with runner as entered:
        assert entered is runner
        future = add.submit(1)
        mapped = add.map([future, 5])
        assert future.result() == 2
        assert mapped.result() == [3, 6]
    assert record.types("add") == ["COMPLETED"] * 3
    assert record.flows() == []
    assert {row.body["flow_run"] for row in record.tasks()} == {None}


def test_submit_and_map_by_the_runner(runner: TaskRunner, record: Record) -> None:
    @task
    def collect(first: int, *more: int, **named: int) -> list[Any]:
        return [first, *more, *sorted(named.items())]

    with runner:
        future = runner.submit(add, {"x": 1})
        late = runner.submit(add, {"x": future, "y": 5}, wait_for=[future])
        assert late.result() == 7
        assert runner.map(add, {"x": [1, 2], "y": unmapped(3)}).result() == [4, 5]
        assert runner.submit(collect, {"first": 1, "more": (2, 3), "named": {"k": 4}}).result() == [
            1,
            2,
            3,
            ("k", 4),
        ]
        with pytest.raises(ParameterBindError, match="unexpected argument 'z'"):
            runner.submit(add, {"x": 1, "z": 2})
    assert record.types("add") == ["COMPLETED"] * 4

    def body() -> Any:
        return runner.submit(add, {"x": 8}), runner.map(add, {"x": [1]}), add.submit(9)

    assert flow(task_runner=runner)(body)() == (9, [2], 10)
    assert record.types() == ["COMPLETED"] * 8


def test_a_duplicate_is_equal(runner: TaskRunner) -> None:
    assert runner.duplicate() == runner
    assert hash(runner.duplicate()) == hash(runner)


def test_the_end_of_the_block_waits(runner: TaskRunner, record: Record) -> None:
    with runner:
        for i in range(5):
            add.submit(i)
    assert record.types("add") == ["COMPLETED"] * 5


def test_tasks_inside_tasks_in_a_block(runner: TaskRunner, record: Record) -> None:
    with runner:
        assert outer.submit(1).result() == 4
        assert outer(2) == 6
    assert [row.type for row in record.tasks()] == ["COMPLETED"] * 6


def test_a_direct_call_in_a_block(runner: TaskRunner, record: Record) -> None:
    with runner:
        assert add(1) == 2
    assert record.types("add") == ["COMPLETED"]


def test_failures_in_a_block(runner: TaskRunner, record: Record) -> None:
    with runner:
        future: Any = fail.submit()
        with pytest.raises(ValueError, match="no data"):
            future.result()
        never = add.submit(future)
        never.wait()
        assert never.state.name == "NotReady"
    assert [row.state["name"] for row in record.tasks()] == ["Failed", "NotReady"]


def test_a_runner_is_entered_once(runner: TaskRunner) -> None:
    with runner, pytest.raises(RuntimeError, match="This task runner is already started"), runner:
        pass
    with runner:
        assert add.submit(1).result() == 2


def test_a_flow_in_a_block(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    def inner() -> Any:
        return add.submit(1)

    with runner:
        assert inner() == 2
        assert add.submit(2).result() == 3


def test_the_block_is_over(runner: TaskRunner) -> None:
    with runner:
        pass
    with pytest.raises(RuntimeError, match="Unable to determine task runner to use for submission of 'add'"):
        add.submit(1)
    with pytest.raises(RuntimeError, match="inside a flow, or inside a block"):
        add.map([1])


def test_a_direct_call_needs_nothing(record: Record) -> None:
    assert add(1) == 2
    assert outer_without_submit(3) == 4
    assert [row.type for row in record.tasks()] == ["COMPLETED"] * 3


@task
def outer_without_submit(x: int) -> int:
    return add(x)
