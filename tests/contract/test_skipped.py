"""SKIPPED: runs that had nothing to do, and what that means to those who wait for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from penstock import (
    ConfigurationError,
    Skip,
    Skipped,
    State,
    allow_failure,
    allow_skipped,
    flow,
    task,
)
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def skip(why: str = "clouds") -> int:
    raise Skip(why)


@task
async def skip_async(why: str = "rain") -> int:
    raise Skip(why)


@task
def skipped_by_hand() -> State:
    return Skipped("by hand")


@task
def show(x: Any, y: Any = None) -> str:
    name = getattr(x, "name", None)
    return f"{name or x} {y}"


@task
async def show_async(x: Any) -> str:
    return f"got {x}"


@task
def odd(x: int) -> int:
    if x % 2 == 0:
        raise Skip(f"{x} is even")
    return x


@dataclass
class Box:
    inside: Any


@pytest.mark.parametrize("skipper", [skip, skip_async, skipped_by_hand])
def test_reason_and_origin_go_down_the_chain(skipper: Any, in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        first = skipper.submit()
        end = show.submit(show.submit(first))
        end.wait()
        assert end.result() is None
        return first.task_run_id, end.state, first.state.message

    origin, state, why = in_flow(body)
    assert why in {"clouds", "rain", "by hand"}
    assert state.is_skipped()
    assert state.message == f"Upstream task run '{origin}' was skipped: {why}"
    assert state.state_details["upstream"] == origin
    assert record.types() == ["SKIPPED"] * 3
    assert record.tasks("show")[1].state["message"] == state.message


@pytest.mark.parametrize("how", ["none", "run"])
def test_a_task_that_runs_after_a_skip(how: Any, in_flow: InFlow, record: Record) -> None:
    tolerant = show.with_options(on_skip=how)

    def body() -> Any:
        upstream = skip.submit()
        return [
            tolerant.submit(upstream),
            tolerant.submit([upstream, 1]),
            tolerant.submit(Box(upstream)),
            tolerant.submit({"a": upstream}, 2),
            tolerant.submit(7, wait_for=[upstream]),
            tolerant(upstream),
        ]

    found = in_flow(body)
    there = "None" if how == "none" else "Skipped"
    assert found[0] == f"{there} None"
    for text in found[1:4]:
        assert ("None" if how == "none" else "SKIPPED") in text.replace("StateType.", "").removesuffix("None")
    assert found[4] == "7 None"
    assert found[5] == f"{there} None"
    assert record.types("show") == ["COMPLETED"] * 6


def test_allow_skipped_admits_one_argument(in_flow: InFlow) -> None:
    def body() -> Any:
        upstream = skip.submit()
        one = show.submit(allow_skipped(upstream), 3)
        nested = show.submit([allow_skipped(upstream)])
        after = show.submit(1, wait_for=[allow_skipped(upstream)])
        other = show.submit(allow_skipped(upstream), upstream)
        failure = show.submit(allow_failure(upstream))
        other.wait()
        failure.wait()
        assert other.state.is_skipped()
        assert failure.state.is_skipped()
        direct = show(allow_skipped(upstream))
        assert show(upstream) is None
        return [one, nested, after, direct]

    assert in_flow(body) == ["None 3", "[None] None", "1 None", "None None"]


def test_wait_for_a_skipped_run_skips(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        show.submit(1, wait_for=[skip.submit()])

    in_flow(body)
    assert record.task("show").type == "SKIPPED"


def test_an_async_flow_sees_the_skip(runner: TaskRunner) -> None:
    import asyncio

    @flow(task_runner=runner)
    async def night() -> Any:
        upstream = skip_async.submit()
        assert await upstream is None
        assert await show_async(upstream) is None
        return await show_async.with_options(on_skip="none").submit(upstream)

    assert asyncio.run(night()) == "got None"


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_elements_of_maps(size: Any, in_flow: InFlow, record: Record) -> None:
    first = odd.with_options(chunk_size=size)
    strict = show.with_options(name="strict", chunk_size=size)
    lax = show.with_options(name="lax", on_skip="none", chunk_size=size)

    def body() -> Any:
        numbers = first.map(range(40))
        same = strict.map(numbers)
        some = lax.map(numbers)
        return numbers.result(), same.result(), some.result()

    numbers, same, some = in_flow(body)
    assert numbers == [x if x % 2 else None for x in range(40)]
    assert same == [f"{x} None" if x % 2 else None for x in range(40)]
    assert some == [f"{x} None" if x % 2 else "None None" for x in range(40)]
    assert record.types("strict") == ["SKIPPED", "COMPLETED"] * 20
    assert record.types("lax") == ["COMPLETED"] * 40
    assert "0 is even" in record.tasks("strict")[0].state["message"]


# -------------------------------------------------------------------------------------------------- skip_if


def test_a_predicate_on_what_is_at_hand_starts_nothing(in_flow: InFlow, record: Record) -> None:
    @task(skip_if=lambda x: x < 0 and "negative")
    def root(x: int, places: int = 2) -> float:
        return round(x**0.5, places)

    def body() -> Any:
        below = root.submit(-1)
        assert below.state.message == "negative"
        assert below.result() is None
        assert root(-2) is None
        return root.submit(4)

    assert in_flow(body) == 2.0
    rows = record.tasks("root")
    assert [row.type for row in rows] == ["SKIPPED", "SKIPPED", "COMPLETED"]
    assert rows[0].names == ["Pending", "Skipped"]


def test_a_predicate_on_a_value_from_a_task(in_flow: InFlow, record: Record) -> None:
    @task
    def make(x: int) -> list[int]:
        return list(range(x))

    @task
    def use(items: list[int]) -> int:
        return sum(items)

    @use.skip_if
    def nothing(items: list[int]) -> bool:
        return not items

    def body() -> Any:
        empty = use.submit(make.submit(0))
        empty.wait()
        assert empty.state.message == "skip_if: nothing is true of its parameters"
        mapped = use.map([make.submit(0), make.submit(3)])
        return [empty, use.submit(make.submit(4)), *mapped]

    assert in_flow(body) == [None, 6, None, 3]
    assert record.types("use") == ["SKIPPED", "SKIPPED", "COMPLETED", "COMPLETED"]


@pytest.mark.parametrize("size", [1, "auto"])
def test_a_predicate_in_a_map(size: Any, in_flow: InFlow, record: Record) -> None:
    @task(skip_if=lambda parameters: parameters["x"] in parameters["without"], chunk_size=size)
    def twice(x: int, without: tuple[int, ...] = (3, 4)) -> int:
        return 2 * x

    assert in_flow(lambda: twice.map(range(30))) == [None if x in (3, 4) else 2 * x for x in range(30)]
    assert record.types("twice").count("SKIPPED") == 2


def test_a_predicate_that_fails_fails_the_run(in_flow: InFlow, record: Record) -> None:
    @task(skip_if=lambda x: x["missing"])
    def use(x: Any) -> Any:
        return x

    def body() -> None:
        with pytest.raises(KeyError):
            use.submit({}).result()

    in_flow(body)
    assert record.task("use").type == "FAILED"


def test_options_are_checked() -> None:
    def two(x: int, y: int) -> int:
        return x + y

    with pytest.raises(ConfigurationError, match="on_skip"):
        task(on_skip="perhaps")(two)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="asks for z"):
        task(skip_if=lambda z: z)(two)
    with pytest.raises(TypeError, match="callable"):
        task(skip_if="z")(two)  # type: ignore[call-overload]
    assert task(on_skip="none")(two).with_options(on_skip="run").options.on_skip == "run"


# ------------------------------------------------------------------------------------------------ in flows


@pytest.mark.parametrize("hint", ["value", "container"])
def test_a_nested_flow_is_skipped_with_its_argument(hint: str, in_flow: InFlow, record: Record) -> None:
    @flow
    def value(n: int) -> int:
        raise AssertionError("must not run")

    @flow
    def container(n: list[int]) -> int:
        raise AssertionError("must not run")

    @flow
    def lax(n: int | None = 0) -> Any:
        return n

    children: dict[str, Callable[[Any], Any]] = {"value": value, "container": lambda f: container([f])}

    def body() -> Any:
        upstream = skip.submit()
        assert children[hint](upstream) is None
        return lax(allow_skipped(upstream))  # type: ignore[call-overload]

    assert in_flow(body) is None
    (row,) = [row for row in record.flows() if row.task == hint]
    assert row.type == "SKIPPED"
    assert "clouds" in row.state["message"]


def test_values_in_containers_go_to_flows_by_their_annotation(in_flow: InFlow) -> None:
    @flow
    def total(parts: list[int], label: Any = None) -> Any:
        return sum(parts), type(label[0]).__name__

    def body() -> Any:
        futures = [odd.submit(1), odd.submit(3)]
        return total(futures, futures)  # type: ignore[arg-type]

    assert in_flow(body) == (4, "PenstockFuture")
