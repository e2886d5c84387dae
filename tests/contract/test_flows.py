"""Flows: parameters, names, tags, exits."""

import dataclasses
from typing import Any

import numpy as np
import pydantic
import pytest

from penstock import (
    InvalidNameError,
    ParameterBindError,
    ParameterTypeError,
    ReservedArgumentError,
    flow,
    tags,
    task,
)
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def add(x: int, y: int = 1) -> int:
    return x + y


class Window(pydantic.BaseModel):
    start: int
    stop: int = 10


# --------------------------------------------------------------------------------------------- parameters


def test_parameters_are_coerced(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    def typed(n: int, window: Window, names: tuple[str, ...] = (), scale: float = 1) -> Any:
        return n, window, names, scale

    found = typed("3", {"start": "4"}, names=["a", "b"])  # type: ignore[call-overload]
    assert found == (3, Window(start=4), ("a", "b"), 1.0)


def test_parameters_are_checked_without_a_run(record: Record) -> None:
    @flow
    def body(x: int, *, names: list[str] = []) -> None: ...  # noqa: B006 - nobody changes it

    assert body.validate_parameters({"x": "3"}) == {"x": 3, "names": []}
    with pytest.raises(ParameterTypeError, match="invalid parameters: x: "):
        body.validate_parameters({"x": "three"})
    with pytest.raises(ParameterBindError, match="missing a required argument: 'x'"):
        body.validate_parameters({"names": ()})
    assert record.flows() == []


def test_wrong_parameters_fail_the_run(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    def typed(n: int, window: Window) -> None:
        raise AssertionError("must not run")

    with pytest.raises(ParameterTypeError) as caught:
        typed("three", {"start": 1})  # type: ignore[call-overload]
    sentence = "Validation of flow parameters failed with error: "
    assert str(caught.value).startswith(sentence)
    assert "n: Input should be a valid integer" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert record.flow().type == "FAILED"
    assert record.flow().state["message"].startswith(sentence)
    assert typed(1, {"stop": 1}, return_state=True).is_failed()


def test_arguments_that_do_not_fit(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    def exact(n: int) -> int:
        return n

    for args, kwargs in (((), {}), ((1, 2), {}), ((1,), {"m": 1})):
        with pytest.raises(ParameterBindError):
            exact(*args, **kwargs)
    assert [row.type for row in record.flows()] == ["FAILED"] * 3


def test_validation_can_be_switched_off(runner: TaskRunner) -> None:
    @flow(task_runner=runner, validate_parameters=False)
    def free(n: int) -> Any:
        return n

    assert free("three") == "three"  # type: ignore[call-overload]


def test_parameters_of_any_size_and_kind(runner: TaskRunner, record: Record) -> None:
    class Opaque:
        pass

    @flow(task_runner=runner)
    def large(cube: np.ndarray, thing: Opaque, numbers: list[int], anything: Any = None) -> Any:
        return cube.nbytes, type(thing).__name__, len(numbers), anything

    cube = np.zeros((64, 128, 128))
    found = large(cube, Opaque(), list(range(100_000)), anything=object)
    assert found == (cube.nbytes, "Opaque", 100_000, object)
    parameters = record.flow().body["parameters"]
    assert parameters["cube"] == "ndarray(64, 128, 128) float64 8.0 MiB"
    assert sum(len(text) for text in parameters.values()) < 4096


def test_parameters_are_not_copied(runner: TaskRunner) -> None:
    cube = np.zeros(10)
    seen = []

    @flow(task_runner=runner)
    def same(cube: np.ndarray, other: Any) -> None:
        seen.append((cube, other))

    same(cube, cube)
    assert seen[0][0] is cube
    assert seen[0][1] is cube


def test_defaults_and_variadic_parameters(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    def many(first: int, *rest: int, scale: int = 2, **others: int) -> Any:
        return first, rest, scale, others

    assert many(1, 2, 3, a=4) == (1, (2, 3), 2, {"a": 4})


def test_reserved_names() -> None:
    with pytest.raises(ReservedArgumentError, match="'wait_for' is a reserved argument name"):

        @flow
        def reserved(wait_for: int) -> None: ...


# ------------------------------------------------------------------------------------------ names and tags


def test_names(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    def reduce_night(date: str, number: int = 3) -> None: ...

    assert reduce_night.name == "reduce-night"
    reduce_night("monday")
    reduce_night.with_options(flow_run_name="{date}-{number:03}")("tuesday")
    reduce_night.with_options(flow_run_name=lambda: "by hand", name="Other Name")("friday")
    rows = record.flows()
    assert [row.body["flow"] for row in rows] == ["reduce-night", "reduce-night", "Other Name"]
    assert rows[0].name
    assert [row.name for row in rows[1:]] == ["tuesday-003", "by hand"]


@pytest.mark.parametrize("name", ["a/b", "50%", "a&b", "<x>"])
def test_names_with_a_forbidden_character(name: str) -> None:
    with pytest.raises(InvalidNameError, match="contains an invalid character"):
        flow(name=name)(lambda: None)


def test_tags(runner: TaskRunner, record: Record) -> None:
    tagged = add.with_options(tags=["own"])

    @flow
    def child() -> Any:
        return add.submit(5)

    @flow(task_runner=runner, tags=["flow"])
    def night() -> Any:
        with tags("block", "other"):
            first = tagged.submit(1)
            with tags("inner"):
                second = add.map([2])
        return [first, second, add(3), child()]

    with tags("outside"):
        night()
    rows = record.tasks("add")
    found = [set(row.body["tags"]) for row in rows]
    base = {"flow", "outside"}
    block = base | {"block", "other"}
    assert found == [block | {"own"}, block | {"inner"}, base, base]
    assert set(record.flow().body["tags"]) == base


def test_one_run_name_for_each_retry(in_flow: InFlow, record: Record) -> None:
    made = []

    def name() -> str:
        made.append(1)
        return f"run-{len(made)}"

    @task(retries=2, task_run_name=name)
    def stubborn() -> None:
        raise ValueError("again")

    in_flow(lambda: stubborn.submit().wait())
    assert record.task("stubborn").name == "run-1"
    assert made == [1]


def test_options_make_a_new_flow(runner: TaskRunner) -> None:
    @flow(name="one")
    def plain() -> Any:
        return add.submit(1)

    other = plain.with_options(name="two", task_runner=runner)
    assert (plain.name, other.name) == ("one", "two")
    assert other() == 2


# ------------------------------------------------------------------------------------------- what comes out


def test_values_at_the_top(in_flow: InFlow) -> None:
    found = in_flow(lambda: {"a": add.submit(1), "b": [add.map([1, 2]), (add.submit(3),)], "c": "text"})
    assert found == {"a": 2, "b": [[2, 3], (4,)], "c": "text"}
    assert type(found["b"][0]) is list


def test_a_flow_without_tasks(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: 5) == 5
    assert record.tasks() == []
    assert (record.flow().type, record.flow().names) == ("COMPLETED", ["Pending", "Running", "Completed"])


def test_the_record_names_the_runner(in_flow: InFlow, runner: TaskRunner, record: Record) -> None:
    in_flow(lambda: None)
    (event,) = [event for event in record.events if event.kind == "runner"]
    known = dataclasses.asdict(runner.info)
    told = {name: event.body[name] for name in event.body.keys() & known.keys() - {"versions"}}
    assert told.items() <= known.items()
    assert told["workers"] >= 1
    assert event.run == record.flow().id


def test_flows_run_one_after_the_other_on_one_open_runner(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "start", lambda: pytest.fail("it was open"))
    monkeypatch.setattr(runner, "stop", lambda: pytest.fail("it must stay open"))
    repeated = flow(task_runner=runner)(lambda: add.submit(1))
    assert [repeated() for _ in range(5)] == [2] * 5
    assert runner.is_open


def test_flows_in_threads_of_the_user_share_the_runner(runner: TaskRunner) -> None:
    from concurrent.futures import ThreadPoolExecutor

    @flow(task_runner=runner)
    def one(x: int) -> Any:
        return add.map(range(x, x + 3))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(6))) == [[x + 1, x + 2, x + 3] for x in range(6)]
