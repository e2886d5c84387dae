"""`.map`: one run for each element, arguments taken apart where they lie."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import (
    MappingLengthMismatch,
    MappingMissingIterable,
    UpstreamTaskError,
    allow_failure,
    errors,
    quote,
    task,
    unmapped,
)
from penstock.engine import mapping
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def add(x: Any, y: Any = 10) -> Any:
    return x + y


@task
def pair(x: Any, y: Any = None) -> tuple[Any, Any]:
    return x, y


@task
def make(n: int) -> list[int]:
    return list(range(n))


@task
def fail(x: int = 0) -> int:
    raise ValueError(f"element {x}")


@task
def fail_if_odd(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x


@task
def total(parts: list[int]) -> int:
    return sum(parts)


@pytest.mark.parametrize(
    "elements",
    [[1, 2, 3], (1, 2, 3), range(1, 4), np.arange(1, 4), {1: "a", 2: "b", 3: "c"}.keys()],
    ids=["list", "tuple", "range", "array", "keys"],
)
def test_over_anything_that_can_be_iterated(in_flow: InFlow, record: Record, elements: Any) -> None:
    assert in_flow(lambda: add.map(elements)) == [11, 12, 13]
    assert [row.name for row in record.tasks("add")] == ["add-0", "add-1", "add-2"]
    assert record.types("add") == ["COMPLETED"] * 3


def test_over_sets_and_generators(in_flow: InFlow) -> None:
    assert sorted(in_flow(lambda: add.map({1, 2, 3}))) == [11, 12, 13]
    assert in_flow(lambda: add.map(i * i for i in range(4))) == [10, 11, 14, 19]


def test_arguments_go_side_by_side(in_flow: InFlow) -> None:
    assert in_flow(lambda: add.map([1, 2], [10, 20])) == [11, 22]
    assert in_flow(lambda: add.map(x=[1, 2], y=[10, 20])) == [11, 22]


def test_what_is_not_taken_apart(in_flow: InFlow, tmp_path: Path) -> None:
    assert in_flow(lambda: pair.map([1, 2], 5)) == [(1, 5), (2, 5)]
    assert in_flow(lambda: pair.map([1, 2], "text")) == [(1, "text"), (2, "text")]
    assert in_flow(lambda: pair.map([1, 2], b"bytes")) == [(1, b"bytes"), (2, b"bytes")]
    assert in_flow(lambda: pair.map([1, 2], unmapped([3, 4]))) == [(1, [3, 4]), (2, [3, 4])]
    assert in_flow(lambda: pair.map([1, 2], y=unmapped((3,)))) == [(1, (3,)), (2, (3,))]


def test_arguments_of_any_name_by_keyword(in_flow: InFlow) -> None:
    @task
    def collect(x: int, **others: Any) -> dict[str, Any]:
        return {"x": x, **others}

    found = in_flow(lambda: collect.map([1, 2], a=[3, 4], b=unmapped([5])))
    assert found == [{"x": 1, "a": 3, "b": [5]}, {"x": 2, "a": 4, "b": [5]}]


def test_marks_are_taken_off_and_put_on_each_element(in_flow: InFlow) -> None:
    def body() -> Any:
        mixed = fail_if_odd.map([0, 1, 2])
        return pair.map(allow_failure(mixed), quote([7, 8, 9]))

    (first, second, third) = in_flow(body)
    assert (first, third) == ((0, 7), (2, 9))
    assert isinstance(second[0], ValueError)
    assert second[1] == 8


def test_nothing_to_map_over(in_flow: InFlow, record: Record) -> None:
    for args in ((1,), ("text",), (unmapped([1]),), (io.StringIO("file"),)):
        with pytest.raises(MappingMissingIterable, match="No iterable parameters were received"):
            in_flow(lambda args=args: add.map(*args))
    assert record.tasks() == []
    assert [row.type for row in record.flows()] == ["FAILED"] * 4


def test_unequal_lengths(in_flow: InFlow, record: Record) -> None:
    with pytest.raises(MappingLengthMismatch, match="to have the same length, got"):
        in_flow(lambda: add.map([1, 2], [1, 2, 3]))
    assert record.tasks() == []
    assert record.flow().type == "FAILED"
    assert "MappingLengthMismatch" in record.flow().error["type"]


def test_an_empty_map(in_flow: InFlow) -> None:
    def body() -> None:
        futures = add.map([])
        assert futures == []
        assert futures.result() == []
        futures.wait()

    in_flow(body)


def test_keys_of_a_dict_with_a_warning(in_flow: InFlow) -> None:
    with pytest.warns(UserWarning, match="iterates over the keys of a dict"):
        assert in_flow(lambda: add.map({1: "a", 2: "b"})) == [11, 12]


def test_over_futures(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: add.map(add.map([1, 2, 3]), 1)) == [12, 13, 14]
    first, second = record.tasks("add")[:3], record.tasks("add")[3:]
    assert [row.body["upstream"][0][1] for row in second] == [row.id for row in first]


def test_over_a_mixture_of_values_and_futures(in_flow: InFlow) -> None:
    assert in_flow(lambda: add.map([1, add.submit(2), 3])) == [11, 22, 13]


def test_over_the_future_of_a_list(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: add.map(make.submit(4))) == [10, 11, 12, 13]
    assert len(record.tasks()) == 5  # the length and the elements are no runs of the user


def test_over_the_future_of_an_array(in_flow: InFlow) -> None:
    @task
    def cube() -> Any:
        return np.arange(6).reshape(3, 2)

    @task
    def plane_sum(plane: Any) -> int:
        return int(plane.sum())

    assert in_flow(lambda: plane_sum.map(cube.submit())) == [1, 5, 9]


def test_over_a_future_beside_a_list(in_flow: InFlow) -> None:
    assert in_flow(lambda: add.map(make.submit(3), [1, 2, 3])) == [1, 3, 5]
    assert in_flow(lambda: pair.map([1, 2], unmapped(make.submit(2)))) == [(1, [0, 1]), (2, [0, 1])]
    with pytest.raises(MappingLengthMismatch, match="to have the same length"):
        in_flow(lambda: add.map(make.submit(3), [1, 2]))


def test_over_the_future_of_what_cannot_be_taken_apart(in_flow: InFlow) -> None:
    with pytest.raises(TypeError, match="has no len"):
        in_flow(lambda: add.map(add.submit(1)))


def test_over_a_future_that_failed(in_flow: InFlow, record: Record) -> None:
    with pytest.raises(UpstreamTaskError, match=r"add\.map got the future of 'fail', which ended as Failed"):
        in_flow(lambda: add.map(fail.submit()))
    assert record.types() == ["FAILED"]


def test_one_failure_leaves_the_others_alone(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        futures = fail_if_odd.map(range(4))
        futures.wait()
        found: list[Any] = futures.result(raise_on_failure=False)
        return [str(one) for one in found]

    assert in_flow(body) == ["0", "1 is odd", "2", "3 is odd"]
    assert record.types("fail_if_odd") == ["COMPLETED", "FAILED", "COMPLETED", "FAILED"]


def test_wait_for(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        first = add.map([1, 2])
        return pair.map([1, 2], wait_for=[first])

    in_flow(body)
    assert [len(row.body["upstream"]) for row in record.tasks("pair")] == [2, 2]


def test_return_state(in_flow: InFlow) -> None:
    def body() -> None:
        states: Any = fail_if_odd.map([0, 1], return_state=True)
        assert [state.name for state in states] == ["Completed", "Failed"]

    in_flow(body)


def test_names_of_runs(in_flow: InFlow, record: Record) -> None:
    named = add.with_options(task_run_name="{x} plus {y}", tags=["sum"])
    in_flow(lambda: named.map([1, 2], y=unmapped(3)))
    assert [(row.name, row.body["tags"]) for row in record.tasks()] == [
        ("1 plus 3", ["sum"]),
        ("2 plus 3", ["sum"]),
    ]


def test_an_async_task(in_flow: InFlow) -> None:
    @task
    async def later(x: int) -> int:
        return x * x

    assert in_flow(lambda: later.map(range(5))) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("order", ["index", "completion"])
def test_reduce_is_a_tree_on_the_cluster(in_flow: InFlow, record: Record, order: str) -> None:
    def body() -> Any:
        return add.map(range(20), 0).reduce(total, fanin=4, order=order)

    assert in_flow(body) == sum(range(20))
    # Level by level the last node of a level may have less to do; whatever comes first leaves no such gap.
    assert len(record.tasks("total")) == (5 + 2 + 1 if order == "index" else 7)
    assert set(record.types()) == {"COMPLETED"}


def test_reduce_by_index_keeps_the_order(in_flow: InFlow) -> None:
    @task
    def join(parts: list[str]) -> str:
        return "(" + " ".join(parts) + ")"

    @task
    def letter(i: int) -> str:
        return chr(97 + i)

    assert in_flow(lambda: letter.map(range(5)).reduce(join, fanin=2)) == "(((a b) (c d)) ((e)))"


def test_reduce_of_a_plain_function_and_of_nothing(in_flow: InFlow) -> None:
    assert in_flow(lambda: add.map(range(3), 0).reduce(max)) == 2
    with pytest.raises(MappingMissingIterable, match="there is nothing to reduce"):
        in_flow(lambda: add.map([]).reduce(total))


def test_a_map_of_many(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: add.map(range(500), 1).reduce(total, fanin=32)) == sum(range(1, 501))
    assert record.types("add") == ["COMPLETED"] * 500


def test_a_generator_is_drawn_as_there_is_room(
    runner: TaskRunner, in_flow: InFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "PIECE", 8)
    monkeypatch.setattr(runner, "max_in_flight", 16, raising=False)
    yielded: list[int] = []
    done_when_drawn: list[int] = []

    @task
    def keep(x: int) -> int:
        return x

    def items() -> Iterator[int]:
        for x in range(100):
            yielded.append(x)
            yield x

    def body() -> Any:
        futures = keep.map(items())
        done_when_drawn.append(sum(future._run.done for future in futures))
        return futures.result()

    assert in_flow(body) == list(range(100))
    assert yielded == list(range(100))
    assert done_when_drawn[0] >= 100 - 16 - 8


def test_generators_of_unequal_length(in_flow: InFlow) -> None:
    @task
    def plus(x: int, y: int) -> int:
        return x + y

    def body() -> Any:
        return plus.map((x for x in range(5)), y=[1, 2, 3]).result()

    with pytest.raises(errors.MappingLengthMismatch, match="same length"):
        in_flow(body)
    assert in_flow(lambda: plus.map((x for x in range(3)), y=[1, 2, 3]).result()) == [1, 3, 5]


def test_a_generator_that_raises(in_flow: InFlow, record: Record) -> None:
    @task
    def keep(x: int) -> int:
        return x

    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        in_flow(lambda: keep.map(items()).result())
    assert record.types("keep") == ["COMPLETED", "COMPLETED"]
