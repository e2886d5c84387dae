"""Tasks inside tasks, flows inside flows, flows inside tasks: one runner, no deadlock, a row each."""

import asyncio
from typing import Any

import pytest

from penstock import UnfinishedRun, as_completed, flow, task, wait
from penstock.engine.futures import PenstockFuture
from penstock.errors import NestingTooDeep
from penstock.runners.base import TaskRunner
from penstock.settings import refresh
from tests.conftest import InFlow
from tests.record import Record


@task
def add(x: int, y: int = 1) -> int:
    return x + y


@task
def fail(text: str = "deep down") -> int:
    raise ValueError(text)


@task
def total(parts: list[int]) -> int:
    return sum(parts)


@task
def fibonacci(n: int) -> int:
    if n < 2:
        return n
    left = fibonacci.submit(n - 1)
    right = fibonacci.submit(n - 2)
    return left.result() + right.result()


@task
def submit_down(level: int) -> int:
    return 0 if level == 0 else 1 + submit_down.submit(level - 1).result()


@task
def call_down(level: int) -> int:
    return 0 if level == 0 else 1 + call_down(level - 1)


def chain_of(record: Record, task: str) -> int:
    """Length of the chain from the first run of a task down to the last."""
    rows = record.tasks(task)
    children = {row.parent: row for row in rows}
    length, at = 0, None
    while at in children:
        at = children[at].id
        length += 1
    return length


# -------------------------------------------------------------------------------------- tasks inside tasks


def test_a_task_submits_and_calls_tasks(in_flow: InFlow, record: Record) -> None:
    @task
    def outer() -> int:
        return add(1) + add.submit(2).result() + sum(add.map([3, 4]).result())

    assert in_flow(lambda: outer.submit()) == 2 + 3 + 4 + 5
    row = record.task("outer")
    assert [inner.parent for inner in record.tasks("add")] == [row.id] * 4
    assert record.types("add") == ["COMPLETED"] * 4
    assert {inner.body["flow_run"] for inner in record.tasks()} == {record.flow().id}
    assert len(record.tasks()) == 5


def test_a_task_called_in_place_submits_tasks(in_flow: InFlow, record: Record) -> None:
    @task
    def outer() -> int:
        return add.submit(2).result()

    assert in_flow(lambda: outer()) == 3
    assert record.task("add").parent == record.task("outer").id


def test_futures_in_what_a_task_returns_become_values(in_flow: InFlow, record: Record) -> None:
    @task
    def outer() -> dict[str, Any]:
        return {"one": add.submit(1), "list": add.map([1, 2])}

    assert in_flow(lambda: outer.submit()) == {"one": 2, "list": [2, 3]}
    assert record.types("add") == ["COMPLETED"] * 3


def test_a_task_ends_when_its_children_have_ended(in_flow: InFlow, record: Record) -> None:
    @task
    def slow() -> None:
        import time

        time.sleep(0.05)

    @task
    def outer() -> str:
        slow.submit()
        slow.submit()
        return "ended"

    assert in_flow(lambda: outer.submit()) == "ended"
    assert record.types("slow") == ["COMPLETED"] * 2


def test_dependencies_inside_a_task(in_flow: InFlow, record: Record) -> None:
    @task
    def outer() -> int:
        first = add.submit(1)
        second = add.submit(first)
        third = add.submit(second, wait_for=[first])
        return total.submit([first, second, third]).result()

    assert in_flow(lambda: outer.submit()) == 2 + 3 + 4
    upstream = [len(row.body["upstream"]) for row in record.tasks("add")]
    assert upstream == [0, 1, 2]


def test_waiting_inside_a_task(in_flow: InFlow) -> None:
    @task
    def outer() -> list[int]:
        futures = [add.submit(i) for i in range(4)]
        wait(futures[:2])
        found = [future.result() for future in as_completed(futures)]
        return sorted(found)

    assert in_flow(lambda: outer.submit()) == [1, 2, 3, 4]


def test_a_failure_inside_a_task(in_flow: InFlow, record: Record) -> None:
    @task
    def careful() -> str:
        future = fail.submit("caught")
        never = add.submit(future)
        try:
            never.result()
        except UnfinishedRun:
            return str(future.exception())
        return "nothing"

    @task
    def careless() -> int:
        return fail.submit("not caught").result()

    assert in_flow(lambda: careful.submit()) == "caught"
    with pytest.raises(ValueError, match="not caught"):
        in_flow(lambda: careless.submit())
    assert [row.type for row in record.tasks() if row.task != "add"] == [
        "COMPLETED",
        "FAILED",
        "FAILED",
        "FAILED",
    ]
    assert record.task("add").state["name"] == "NotReady"


def test_retries_inside_a_task(in_flow: InFlow, record: Record, tmp_path: Any) -> None:
    counter = tmp_path / "counter"

    @task(retries=2)
    def stubborn() -> int:
        with counter.open("a") as file:
            file.write("x")
        if counter.stat().st_size < 3:
            raise ValueError("again")
        return counter.stat().st_size

    @task
    def outer() -> int:
        return stubborn.submit().result()

    assert in_flow(lambda: outer.submit()) == 3
    assert (record.task("stubborn").type, record.task("stubborn").attempt) == ("COMPLETED", 3)


def test_a_tree_of_tasks(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: fibonacci.submit(7)) == 13
    assert len(record.tasks("fibonacci")) == 41
    assert set(record.types()) == {"COMPLETED"}


def test_more_parents_than_slots(in_flow: InFlow, record: Record) -> None:
    @task
    def parent(x: int) -> int:
        return sum(add.map(range(x, x + 3)).result())

    assert in_flow(lambda: parent.map(range(16))) == [3 * x + 6 for x in range(16)]
    assert record.types("add") == ["COMPLETED"] * 48


def test_async_tasks_inside_async_tasks(in_flow: InFlow) -> None:
    @task
    async def inner(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    @task
    async def outer(x: int) -> int:
        called = await inner(x)
        submitted = await inner.submit(called)
        return submitted

    assert in_flow(lambda: outer.submit(1)) == 3


def test_nesting_has_a_limit(in_flow: InFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_TASKS_MAX_NESTING", "20")
    refresh()
    with pytest.raises(
        NestingTooDeep, match=r"call_down in call_down .* PENSTOCK_TASKS_MAX_NESTING=20"
    ) as caught:
        in_flow(lambda: call_down(30))
    assert isinstance(caught.value, RecursionError)


# -------------------------------------------------------------------------------------- flows inside flows


def test_a_flow_inside_a_flow_uses_the_same_runner(in_flow: InFlow, record: Record) -> None:
    @flow
    def child(x: int) -> Any:
        return add.submit(x)

    assert in_flow(lambda: [child(1), child(2)]) == [2, 3]
    top = record.flow()
    rows = [row for row in record.flows() if row.id != top.id]
    assert [row.body["parent_flow_run"] for row in rows] == [top.id] * 2
    assert len({event.root for event in record.events}) == 1
    assert [event.kind for event in record.events].count("runner") == 1
    stand_ins = record.tasks("child")
    assert [row.body["child_flow_run"] for row in stand_ins] == [row.id for row in rows]
    assert [row.type for row in stand_ins] == ["COMPLETED"] * 2
    assert [row.body["flow_run"] for row in record.tasks("add")] == [row.id for row in rows]


def test_inside_a_flow_futures_stay_references(in_flow: InFlow) -> None:
    @flow
    def child() -> Any:
        return {"sum": add.submit(1), "plain": 2}

    def body() -> Any:
        found = child()
        assert isinstance(found["sum"], PenstockFuture)
        return add.submit(found["sum"], found["plain"])

    assert in_flow(body) == 4


def test_a_child_flow_that_fails(in_flow: InFlow, record: Record) -> None:
    @flow
    def child() -> Any:
        return fail.submit()

    def body() -> str:
        with pytest.raises(ValueError, match="deep down"):
            child()
        assert child(return_state=True).is_failed()
        return "goes on"

    assert in_flow(body) == "goes on"
    assert record.types("child") == ["FAILED", "FAILED"]


def test_a_child_flow_whose_upstream_failed_never_runs(in_flow: InFlow, record: Record) -> None:
    @flow
    def child(x: int) -> int:
        raise AssertionError("must not run")

    def body() -> str:
        failed = fail.submit()
        with pytest.raises(UnfinishedRun) as caught:
            child(failed)  # type: ignore[call-overload]
        assert isinstance(caught.value.__cause__, ValueError)
        state = child(failed, return_state=True)
        assert (state.type, state.name) == ("PENDING", "NotReady")
        return "goes on"

    assert in_flow(body) == "goes on"


def test_a_gather_of_async_flows(runner: TaskRunner, record: Record) -> None:
    @flow
    async def child(x: int) -> int:
        first = await add.submit(x)
        return await add.submit(first)

    @flow(task_runner=runner)
    async def parent() -> list[int]:
        return list(await asyncio.gather(*(child(x) for x in range(5))))

    assert asyncio.run(parent()) == [2, 3, 4, 5, 6]
    flows = {row.id for row in record.flows()} - {record.flow().id}
    assert len(flows) == 5
    assert [sum(row.body["flow_run"] == one for row in record.tasks("add")) for one in flows] == [2] * 5
    assert set(record.types()) == {"COMPLETED"}


# -------------------------------------------------------------------------------------- flows inside tasks


def test_a_flow_called_in_a_task(in_flow: InFlow, record: Record) -> None:
    @flow
    def child(x: int) -> Any:
        return total.submit([add.submit(x), add.submit(x)])

    @task
    def outer(x: int) -> int:
        found: Any = child(x)
        value: int = found.result() if isinstance(found, PenstockFuture) else found
        return value

    assert in_flow(lambda: outer.map([1, 2])) == [4, 6]
    children = [row for row in record.flows() if row.body["parent_flow_run"]]
    assert [row.type for row in children] == ["COMPLETED", "COMPLETED"]
    assert [row.type for row in record.tasks("add")] == ["COMPLETED"] * 4
    assert {row.body["flow_run"] for row in record.tasks("add")} == {row.id for row in children}
