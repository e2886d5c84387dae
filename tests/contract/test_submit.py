"""Calling and submitting: functions, coroutines, generators, methods, options."""

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from penstock import ParameterBindError, ReservedArgumentError, State, flow, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def add(x: int, y: int = 10) -> int:
    return x + y


@task
async def add_later(x: int, y: int = 10) -> int:
    return x + y


@task
def count(n: int) -> Iterator[int]:
    yield from range(n)


@task
async def count_later(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


class Telescope:
    def __init__(self, gain: int) -> None:
        self.gain = gain

    @task
    def amplify(self, signal: int) -> int:
        return self.gain * signal

    @staticmethod
    @task
    def invert(signal: int) -> int:
        return -signal

    @classmethod
    @task
    def name_of(cls, signal: int) -> str:
        return f"{cls.__name__}-{signal}"


class Scale:
    """Calls itself a task."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: int) -> int:
        return self.factor * x


def test_a_call_runs_in_place_and_is_recorded(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: add(1, y=2)) == 3
    row = record.task("add")
    assert (row.type, row.attempt, row.body["parameters"]) == ("COMPLETED", 1, {"x": "1", "y": "2"})


def test_submit_gives_a_future(in_flow: InFlow, record: Record) -> None:
    seen = []

    def body() -> Any:
        future = add.submit(1, 2)
        seen.append((future.task_run_id, future.name))
        return future

    assert in_flow(body) == 3
    ((run_id, name),) = seen
    assert re.fullmatch("[0-9a-f]{32}", run_id)
    assert name == "add"
    row = record.task("add")
    assert (row.id, row.type) == (run_id, "COMPLETED")
    assert row.names[0] == "Pending"
    assert row.names[-1] == "Completed"


def test_arguments_by_position_and_by_name(in_flow: InFlow) -> None:
    assert in_flow(lambda: [add.submit(1), add.submit(1, 2), add.submit(y=3, x=1)]) == [11, 3, 4]


def test_an_async_task_is_submitted_like_any_other(in_flow: InFlow) -> None:
    assert in_flow(lambda: add_later.submit(1).result()) == 11


def test_generators_give_lists(in_flow: InFlow) -> None:
    assert in_flow(lambda: [count.submit(3), count_later.submit(4)]) == [[0, 1, 2], [0, 1, 2, 3]]


def test_methods(in_flow: InFlow) -> None:
    telescope = Telescope(5)

    def body() -> Any:
        assert telescope.amplify(3) == 15
        return [telescope.amplify.submit(2), Telescope.invert.submit(7), Telescope.name_of.submit(1)]

    assert in_flow(body) == [10, -7, "Telescope-1"]


def test_a_method_can_be_a_flow(runner: TaskRunner) -> None:
    class Reduction:
        gain = 3

        @flow(task_runner=runner)
        def run(self, x: int) -> Any:
            return add.submit(self.gain, x)

    assert Reduction().run(4) == 7


def test_callable_objects_and_lambdas(in_flow: InFlow, record: Record) -> None:
    triple = task(Scale(3))
    negate = task(lambda x: -x)
    assert in_flow(lambda: [triple.submit(2), negate.submit(2)]) == [6, -2]
    assert [row.task for row in record.tasks()] == ["Scale", "unknown-lambda"]


def test_closures_travel(in_flow: InFlow) -> None:
    factor = 7

    @task
    def scaled(x: int) -> int:
        return factor * x

    assert in_flow(lambda: scaled.submit(6)) == 42


def test_arguments_that_do_not_fit_are_refused_at_once(in_flow: InFlow, record: Record) -> None:
    @task
    def exact(x: int, y: int) -> int:
        return x + y

    for args, kwargs, sentence in (
        ((1,), {}, "missing a required argument: 'y'"),
        ((1,), {"x": 1}, "multiple values for argument 'x'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1, 2), {"z": 1}, "unexpected keyword argument 'z'"),
    ):
        with pytest.raises(ParameterBindError, match=sentence) as caught:
            in_flow(lambda args=args, kwargs=kwargs: exact.submit(*args, **kwargs))
        assert isinstance(caught.value, TypeError)
    assert record.tasks() == []
    assert [row.type for row in record.flows()] == ["FAILED"] * 4


@pytest.mark.parametrize("name", ["return_state", "wait_for"])
def test_reserved_names(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def takes({name}): ...", namespace)
    with pytest.raises(ReservedArgumentError, match=f"'{name}' is a reserved argument name"):
        task(namespace["takes"])


def test_return_state(in_flow: InFlow) -> None:
    seen: list[State] = []
    in_flow(lambda: seen.extend([add(1, return_state=True), add.submit(2, return_state=True)]))
    assert [(state.type, state.name) for state in seen] == [("COMPLETED", "Completed")] * 2
    assert [state.result() for state in seen] == [11, 12]


def test_wait_for_orders_without_a_value(in_flow: InFlow, record: Record, tmp_path: Any) -> None:
    target = tmp_path / "written"

    @task
    def write() -> None:
        target.write_text("there")

    @task
    def read() -> str:
        return target.read_text()

    def body() -> Any:
        first = write.submit()
        second = write.submit()
        one = read.submit(wait_for=[first])
        two = read.submit(wait_for=[first, second, "plain values are ignored"])
        return [one, two, read.submit(wait_for=first)]

    assert in_flow(body) == ["there"] * 3
    upstream = [parameter for row in record.tasks("read") for parameter, _ in row.body["upstream"]]
    assert upstream == ["wait_for"] * 4


def test_wait_for_takes_any_iterable_of_futures(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        mapped = add.map([1, 2, 3])
        return [
            add.submit(0, wait_for=mapped),
            add.submit(0, wait_for=(future for future in mapped)),
            add.submit(0, wait_for=[mapped]),
        ]

    assert in_flow(body) == [10, 10, 10]
    assert [len(row.body["upstream"]) for row in record.tasks("add")[3:]] == [3, 3, 3]


def test_options_make_a_new_task(in_flow: InFlow, record: Record) -> None:
    other = add.with_options(name="plus", tags=["a"], task_run_name="plus-{x}-{y}")
    assert in_flow(lambda: [other.submit(1), add.submit(2)]) == [11, 12]
    assert [(row.task, row.name, row.body["tags"]) for row in record.tasks()] == [
        ("plus", "plus-1-10", ["a"]),
        ("add", "add", []),
    ]


def test_names_of_runs_from_a_callable(in_flow: InFlow, record: Record) -> None:
    named = add.with_options(
        task_run_name=lambda parameters: f"sum of {parameters['x']} and {parameters['y']}"
    )
    plain = add.with_options(task_run_name=lambda: "plain")
    in_flow(lambda: [named.submit(1), plain.submit(1)])
    assert [row.name for row in record.tasks()] == ["sum of 1 and 10", "plain"]


def test_a_chain_moves_values_from_task_to_task(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        future = add.submit(0, 1)
        for _ in range(9):
            future = add.submit(future, 1)
        return future

    assert in_flow(body) == 10
    rows = record.tasks()
    assert [row.body["upstream"] for row in rows[1:]] == [[("x", row.id)] for row in rows[:-1]]


def test_fan_out_and_fan_in(in_flow: InFlow) -> None:
    @task
    def total(parts: list[int]) -> int:
        return sum(parts)

    def body() -> Any:
        root = add.submit(0, 1)
        return total.submit([add.submit(root, i) for i in range(8)])

    assert in_flow(body) == sum(1 + i for i in range(8))


def test_more_tasks_than_slots(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: [add.submit(i, i) for i in range(60)]) == [2 * i for i in range(60)]
    assert record.types("add") == ["COMPLETED"] * 60
