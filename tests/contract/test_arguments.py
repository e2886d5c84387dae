"""What goes into a task: futures in containers, arrays, marks, large values."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
import pytest

from penstock import flow, quote, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record

MEGABYTE = 1 << 20


@task
def identity(x: Any = None, *rest: Any, **others: Any) -> Any:
    return x


@task
def everything(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


@task
def ones(n: int = 1000) -> Any:
    return np.ones(n)


@task
def describe(x: Any) -> str:
    return repr(x)


@dataclasses.dataclass
class Observation:
    name: str
    data: Any
    more: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    data: Any


class Model(pydantic.BaseModel):
    content: Any


class Point(NamedTuple):
    x: Any
    y: Any


# ------------------------------------------------------------------------------------ futures in arguments


def test_by_position_and_by_keyword(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        return everything.submit(identity.submit(1), identity.submit(2), a=identity.submit(3), b=4)

    assert in_flow(body) == ((1, 2), {"a": 3, "b": 4})
    assert len(record.task("everything").body["upstream"]) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: [f, 2],
        lambda f: (f, 2),
        lambda f: {"key": f},
        lambda f: {"key": [{"deep": (f,)}]},
        lambda f: Observation("m51", f, [f, [f]]),
        lambda f: Frozen(f),
        lambda f: Point(f, 2),
        lambda f: Model(content=[f]),
        lambda f: [Observation("m51", {"plane": Point(0, f)})],
    ],
    ids=["list", "tuple", "dict", "deep", "dataclass", "frozen", "namedtuple", "pydantic", "mixed"],
)
def test_inside_containers(in_flow: InFlow, record: Record, wrap: Any) -> None:
    expected = repr(wrap(1))
    assert in_flow(lambda: describe.submit(wrap(identity.submit(1)))) == expected
    (edge,) = record.task("describe").body["upstream"]
    assert edge == ("x", record.task("identity").id)


def test_in_sets_and_as_keys(in_flow: InFlow) -> None:
    assert in_flow(lambda: identity.submit({identity.submit(1), 2})) == {1, 2}
    assert in_flow(lambda: identity.submit(frozenset([identity.submit(1)]))) == frozenset([1])
    assert in_flow(lambda: identity.submit({identity.submit("key"): 1})) == {"key": 1}


def test_one_future_twice_is_one_value(in_flow: InFlow) -> None:
    @task
    def same(x: Any, y: Any) -> bool:
        return x is y

    def body() -> Any:
        value = identity.submit([1, 2, 3])
        return same.submit(value, value)

    assert in_flow(body) is True


def test_direct_calls_take_futures(in_flow: InFlow) -> None:
    assert in_flow(
        lambda: everything(identity.submit(1), [identity.submit(2)], a={"k": identity.submit(3)})
    ) == (
        (1, [2]),
        {"a": {"k": 3}},
    )


def test_a_list_from_a_map_is_an_argument(in_flow: InFlow) -> None:
    assert in_flow(lambda: identity.submit(identity.map([1, 2, 3]))) == [1, 2, 3]


def test_states_are_arguments(in_flow: InFlow) -> None:
    def body() -> Any:
        state = identity.submit(5, return_state=True)
        return everything.submit(state, [state])

    assert in_flow(body) == ((5, [5]), {})


def test_quote_is_not_searched(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: identity.submit(quote([1, [2]]))) == [1, [2]]
    assert in_flow(lambda: identity(quote({"a": 1}))) == {"a": 1}


def test_a_large_container_without_futures(in_flow: InFlow) -> None:
    assert in_flow(lambda: identity.submit(list(range(50_000)))) == list(range(50_000))


def test_arguments_are_captured_when_submit_returns(in_flow: InFlow, runner: TaskRunner) -> None:
    @task
    def late(numbers: list[int], gate: Any) -> list[int]:
        return list(numbers)

    def body() -> Any:
        numbers = [1]
        future = late.submit(numbers, identity.submit(0))
        future.wait()
        numbers.append(2)
        return future

    assert in_flow(body) == [1]


# ------------------------------------------------------------------------------------------------- arrays


def test_a_chain_of_arrays(in_flow: InFlow) -> None:
    @task
    def add_one(x: Any) -> Any:
        return x + 1

    def body() -> Any:
        a = ones.submit(200_000)
        b = add_one.submit(a)
        return add_one.submit(b)

    found = in_flow(body)
    assert found.shape == (200_000,)
    assert (found == 3).all()


def test_arrays_of_other_tasks_are_read_only(in_flow: InFlow, record: Record) -> None:
    @task
    def overwrite(x: Any) -> None:
        x[0] = 5

    with pytest.raises(ValueError, match="read-only") as caught:
        in_flow(lambda: overwrite.submit(ones.submit()))
    notes = " ".join(caught.value.__notes__)
    assert "inputs='copy'" in notes
    assert "inputs='copy'" in record.task("overwrite").error["text"]


@pytest.mark.parametrize("size", [10, 300_000], ids=["small", "large"])
def test_arrays_as_a_copy(in_flow: InFlow, size: int) -> None:
    @task(inputs="copy")
    def overwrite(x: Any) -> Any:
        x[0] = 5
        return x

    def body() -> Any:
        source = ones.submit(size)
        changed = overwrite.submit(source)
        return [source, changed]

    source, changed = in_flow(body)
    assert (source[0], changed[0]) == (1, 5)


@pytest.mark.parametrize("size", [10, 300_000], ids=["small", "large"])
def test_an_array_of_the_caller(in_flow: InFlow, size: int) -> None:
    @task
    def total(x: Any, y: Any = None) -> float:
        return float(x.sum() + (y.sum() if y is not None else 0))

    array = np.ones(size)
    assert in_flow(lambda: total.submit(array, y=array)) == 2 * size
    assert in_flow(lambda: total.submit({"a": array}["a"])) == size
    assert array.flags.writeable


def test_large_arguments_of_many_kinds(in_flow: InFlow) -> None:
    text, data = "x" * (2 * MEGABYTE), b"y" * (2 * MEGABYTE)
    numbers = list(range(200_000))

    @task
    def lengths(*values: Any) -> list[int]:
        return [len(value) for value in values]

    assert in_flow(lambda: lengths.submit(text, data, numbers)) == [len(text), len(data), len(numbers)]


def test_large_results_of_many_kinds(in_flow: InFlow) -> None:
    @task
    def make(kind: str) -> Any:
        if kind == "text":
            return "x" * (2 * MEGABYTE)
        if kind == "dict":
            return {"plane": np.ones(200_000), "name": "m51"}
        return list(range(200_000))

    text, planes, numbers = in_flow(lambda: make.map(["text", "dict", "list"]))
    assert len(text) == 2 * MEGABYTE
    assert planes["plane"].sum() == 200_000
    assert numbers[-1] == 199_999


def test_one_large_argument_for_a_whole_map(in_flow: InFlow) -> None:
    from penstock import unmapped

    array = np.arange(300_000)

    @task
    def pick(i: int, table: Any) -> int:
        return int(table[i])

    assert in_flow(lambda: pick.map(range(20), unmapped(array))) == list(range(20))


def test_results_that_look_odd(in_flow: InFlow) -> None:
    @task
    def odd(kind: str) -> Any:
        return {"none": None, "nothing": (), "error": ValueError("a value"), "type": int, "path": Path("/x")}[
            kind
        ]

    none, nothing, error, kind, path = in_flow(lambda: odd.map(["none", "nothing", "error", "type", "path"]))
    assert (none, nothing, kind, path) == (None, (), int, Path("/x"))
    assert isinstance(error, ValueError)


def test_classes_of_the_users_script(in_flow: InFlow) -> None:
    @task
    def make(name: str) -> Observation:
        return Observation(name, [1])

    @task
    def name_of(observation: Observation) -> str:
        return observation.name

    assert in_flow(lambda: name_of.submit(make.submit("m51"))) == "m51"


def test_a_future_in_its_own_dependencies(in_flow: InFlow) -> None:
    """A task that waits for the run around it is told so, instead of waiting for ever."""
    box: list[Any] = []

    def body() -> Any:
        future = outer.submit()
        box.append(future)
        return future.result(timeout=20)

    @task
    def outer() -> str:
        try:
            identity.submit(wait_for=box or [outer_future()]).result(timeout=10)
        except ValueError as error:
            return str(error)
        return "it did not see it"

    def outer_future() -> Any:
        from penstock.engine.context import current
        from penstock.engine.futures import PenstockFuture

        scope = current()
        assert scope is not None
        assert scope.task_run is not None
        return PenstockFuture(scope.task_run)

    assert "deadlock" in in_flow(body)


# -------------------------------------------------------------------------------- futures and nested flows


def test_references_cross_into_a_flow_and_out_again(in_flow: InFlow, record: Record) -> None:
    seen: list[Any] = []

    @flow
    def child(plane: Any, number: int) -> Any:
        seen.append(type(plane).__name__)
        seen.append(number)
        return identity.submit(plane)

    def body() -> Any:
        found = child(ones.submit(10), identity.submit(3))  # type: ignore[call-overload]
        seen.append(type(found).__name__)
        return identity.submit(found)

    assert in_flow(body).sum() == 10
    assert seen == ["PenstockFuture", 3, "PenstockFuture"]
