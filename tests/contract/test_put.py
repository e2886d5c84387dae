"""`penstock.put`: one copy near the workers, usable wherever a value is."""

import dataclasses
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from penstock import (
    MissingContextError,
    Reference,
    allow_failure,
    flow,
    put,
    task,
    unmapped,
)
from penstock.errors import UnserializableArgument
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def total(x: Any, more: Any = 0) -> float:
    return float(np.sum(x) + more)


@task
def nested(box: Any) -> float:
    return float(box["planes"][0].sum() + box["cube"].data.sum())


@task
def scaled(i: int, table: Any) -> float:
    return float(table[i])


@dataclasses.dataclass
class Cube:
    data: Any
    name: str = ""


class Plain:
    """A class of the user that penstock does not search."""

    def __init__(self, data: Any) -> None:
        self.data = data


@pytest.mark.parametrize("size", [10, 300_000], ids=["small", "large"])
def test_a_reference_is_an_argument(in_flow: InFlow, size: int) -> None:
    array = np.ones(size)

    def body() -> Any:
        reference = put(array)
        assert isinstance(reference, Reference)
        assert reference.done()
        assert reference.nbytes == array.nbytes
        one = total.submit(reference)
        two = total.submit(x=reference, more=one)
        three = nested.submit({"planes": (reference, 1), "cube": Cube(reference)})
        four = total.submit(allow_failure(reference))
        return [one, two, three, four, total(reference)]

    assert in_flow(body) == [size, 2 * size, 2 * size, size, size]


def test_one_copy_for_many_calls_and_maps(
    apart: TaskRunner, in_flow: InFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = np.arange(300_000.0)
    placed: list[int] = []
    original = apart.put

    def counted(values: Any) -> Any:
        placed.extend(id(value) for value in values)
        return original(values)

    monkeypatch.setattr(apart, "put", counted)

    def body() -> Any:
        reference = put(table)
        futures = [scaled.submit(i, reference) for i in range(5)]
        return [
            *futures,
            *scaled.map(range(5), unmapped(reference)),
            *scaled.map(range(2), table=unmapped(reference)),
        ]

    assert in_flow(body) == [0.0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert len(placed) == 1


def test_what_is_put_can_be_taken_apart(in_flow: InFlow) -> None:
    @task
    def double(x: Any) -> int:
        return int(2 * x)

    assert in_flow(lambda: double.map(put([1, 2, 3]))) == [2, 4, 6]
    assert in_flow(lambda: double.map(put(np.arange(4)))) == [0, 2, 4, 6]


def test_the_users_own_classes(in_flow: InFlow) -> None:
    @task
    def named(x: Any) -> tuple[str, float]:
        return type(x).__name__, float(x.data.sum())

    @task
    def first(items: Any) -> float:
        return float(items[0].data[0])

    data = np.ones(300_000)
    assert in_flow(lambda: named.submit(put(Cube(data)))) == ("Cube", 300_000)
    assert in_flow(lambda: named.submit(put(Plain(data)))) == ("Plain", 300_000)
    assert in_flow(lambda: first.submit(put([Plain(data)]))) == 1.0
    assert in_flow(lambda: first.submit([Plain(np.ones(2)) for _ in range(20_000)])) == 1.0
    assert in_flow(lambda: named.submit(Plain(data))) == ("Plain", 300_000)


def test_small_values_and_none(in_flow: InFlow) -> None:
    @task
    def same(*values: Any) -> Any:
        return values

    assert in_flow(lambda: same.submit(put(None), put(0), put("x"), put(()))) == (None, 0, "x", ())


def test_the_reference_gives_the_value_back(in_flow: InFlow) -> None:
    array = np.ones(300_000)
    assert in_flow(lambda: put(array)) is not None
    assert (in_flow(lambda: put(array)) == array).all()
    assert in_flow(lambda: put({"a": 1}).result()) == {"a": 1}


def test_nothing_is_written_to_the_record(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: total.submit(put(np.ones(3))))
    assert [run.name for run in record.tasks()] == ["total"]
    assert list(record.task("total").body["upstream"]) == []
    in_flow(lambda: scaled.map(put([0, 0]), unmapped(put(np.ones(3)))))
    assert {edge for row in record.tasks("scaled") for edge in row.body.get("upstream", ())} == set()


def test_inside_a_task(in_flow: InFlow) -> None:
    @task
    def outer() -> float:
        reference = put(np.ones(300_000))
        return sum(total.map([1, 2], more=unmapped(0)).result()) + total.submit(reference).result()

    @task
    def returns() -> Any:
        return {"data": put(np.ones(300_000))}

    @task
    def with_a_list() -> float:
        reference = put([Cube(np.ones(3)), 2])
        return float(sum(future.result() for future in [count.submit(reference) for _ in range(4)]))

    assert in_flow(lambda: outer.submit()) == 300_003
    assert in_flow(lambda: with_a_list.submit()) == 20
    assert in_flow(lambda: total.submit(unpacked.submit(returns.submit()))) == 300_000


@task
def count(box: Any) -> float:
    return float(box[0].data.sum() + box[1])


@task
def unpacked(box: Any) -> Any:
    return box["data"]


def test_in_another_flow(in_flow: InFlow, runner: TaskRunner) -> None:
    kept: list[Any] = []

    def first() -> None:
        kept.append(put(np.ones(300_000)))

    in_flow(first)
    assert in_flow(lambda: total.submit(kept[0])) == 300_000

    @flow  # of the default runner
    def elsewhere() -> None:
        kept.append(put(np.full(300_000, 2.0)))

    elsewhere()
    assert in_flow(lambda: [total.submit(kept[1]), *scaled.map([1, 2], unmapped(kept[1]))]) == [600_000, 2, 2]

    @flow
    def child(table: Any) -> Any:
        return total.submit(table)

    assert in_flow(lambda: child(put(np.ones(10)))) == 10


def test_the_value_lives_as_long_as_its_reference(in_flow: InFlow) -> None:
    @dataclasses.dataclass(eq=False)
    class Held:
        data: Any

    seen: list[Any] = []

    def body() -> None:
        value = Held([1])
        seen.append(weakref.ref(value))
        reference = put(value)
        del value
        gc.collect()
        assert seen[0]() is not None
        del reference
        gc.collect()
        assert seen[0]() is None

    in_flow(body)


def test_a_dropped_reference_still_serves_its_tasks(in_flow: InFlow) -> None:
    def body() -> Any:
        reference = put(np.ones(300_000))
        futures = scaled.map(range(6), unmapped(reference))
        del reference
        gc.collect()
        return futures

    assert in_flow(body) == [1.0] * 6


def test_without_a_runner() -> None:
    with pytest.raises(MissingContextError, match=r"put\(ndarray\) has no task runner"):
        put(np.ones(3))


def test_in_a_block_of_a_runner(runner: TaskRunner) -> None:
    with runner:
        assert total.submit(put(np.ones(300_000))).result() == 300_000


def test_a_future_is_a_reference_already(in_flow: InFlow) -> None:
    with pytest.raises(TypeError, match="is a reference already"):
        in_flow(lambda: put(total.submit([1])))


def test_what_cannot_be_sent_is_refused_at_once(apart: TaskRunner, in_flow: InFlow) -> None:
    import threading

    with pytest.raises(UnserializableArgument, match="cannot be sent"):
        in_flow(lambda: put(threading.Lock()))
    with pytest.raises(UnserializableArgument, match="cannot be sent"):
        in_flow(lambda: put([threading.Lock()]))


def test_a_value_is_captured_when_it_is_put(apart: TaskRunner, in_flow: InFlow) -> None:
    def body() -> Any:
        array = np.ones(300_000)
        reference = put(array)
        array[:] = 7
        return total.submit(reference)

    assert in_flow(body) == 300_000
