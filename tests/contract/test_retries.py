"""Retries: decided in the driver; who waits for the next attempt holds no slot."""

import asyncio
import functools
import time
from pathlib import Path
from typing import Any

import pytest

from penstock import State, StateType, flow, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def note(marker: Path, good_at: int = 99) -> int:
    """Fail until the file has that many lines."""
    with marker.open("a") as file:
        file.write("x")
    if marker.stat().st_size < good_at:
        raise ConnectionError("try again")
    return marker.stat().st_size


def only_connections(task: Any, run: Any, state: Any, *, kind: type = ConnectionError) -> bool:
    return isinstance(state.data, kind)


async def awaited(task: Any, run: Any, state: Any) -> bool:
    await asyncio.sleep(0.01)
    return only_connections(task, run, state)


class Chooser:
    def __call__(self, task: Any, run: Any, state: Any) -> bool:
        return only_connections(task, run, state)

    def method(self, task: Any, run: Any, state: Any) -> bool:
        return only_connections(task, run, state)


CONDITIONS: dict[str, Any] = {
    "function": only_connections,
    "partial": functools.partial(only_connections, kind=ConnectionError),
    "coroutine function": awaited,
    "object": Chooser(),
    "method": Chooser().method,
}


@pytest.mark.parametrize("how", ["submit", "call", "map"])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_any_callable_is_a_condition(
    in_flow: InFlow, record: Record, tmp_path: Path, kind: str, how: str
) -> None:
    eager = note.with_options(retries=4, retry_condition_fn=CONDITIONS[kind])
    ways: dict[str, Any] = {
        "submit": lambda: eager.submit(tmp_path / "a", 3).result(),
        "call": lambda: eager(tmp_path / "a", 3),
        "map": lambda: eager.map([tmp_path / "a"], 3).result()[0],
    }
    assert in_flow(ways[how]) == 3
    other = eager.with_options(retry_condition_fn=functools.partial(only_connections, kind=KeyError))
    assert in_flow(lambda: other.submit(tmp_path / "b").exception() and None) is None
    assert (tmp_path / "b").read_text() == "x"


def test_a_condition_that_raises_means_no_retry(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    def broken(task: Any, run: Any, state: Any) -> bool:
        raise OSError("cannot say")

    eager = note.with_options(retries=4, retry_condition_fn=broken)
    in_flow(lambda: eager.submit(tmp_path / "a").wait())
    row = record.task("note")
    assert (row.type, row.attempt) == ("FAILED", 1)
    assert "retry_condition_fn raised OSError('cannot say'): no retry" in row.logs


def test_what_a_condition_is_told(in_flow: InFlow, tmp_path: Path) -> None:
    told = []

    def condition(task: Any, run: Any, state: Any) -> bool:
        told.append((task.name, run.name, run.run_count, state.type, str(state.data)))
        return True

    eager = note.with_options(retries=2, retry_condition_fn=condition, task_run_name="named")
    in_flow(lambda: eager.submit(tmp_path / "a").wait())
    assert told == [("note", "named", attempt, "FAILED", "try again") for attempt in (1, 2)]


def test_a_condition_may_wait_for_other_runs(in_flow: InFlow, tmp_path: Path) -> None:
    @task
    def allowed() -> bool:
        return True

    def condition(task: Any, run: Any, state: Any) -> bool:
        return bool(allowed.submit().result())

    eager = note.with_options(retries=3, retry_condition_fn=condition)
    assert in_flow(lambda: eager.submit(tmp_path / "a", 3)) == 3


def test_a_state_that_was_returned_is_tried_again(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    @task(retries=2)
    def returns(marker: Path) -> Any:
        with marker.open("a") as file:
            file.write("x")
        return State(StateType.FAILED, message="not yet") if marker.stat().st_size < 3 else "done"

    assert in_flow(lambda: returns.submit(tmp_path / "a")) == "done"
    assert in_flow(lambda: returns(tmp_path / "b")) == "done"
    assert [row.attempt for row in record.tasks("returns")] == [3, 3]


def test_delays_with_jitter(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    slow = note.with_options(retries=2, retry_delay_seconds=[0.2, 0.1], retry_jitter_factor=0.5)
    begun = time.monotonic()
    in_flow(lambda: slow.submit(tmp_path / "a").wait())
    assert time.monotonic() - begun >= 0.3


def test_the_history_of_retries(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    in_flow(lambda: note.with_options(retries=1).submit(tmp_path / "a", 2).wait())
    assert record.task("note").names[-2:] == ["Retrying", "Completed"]
    assert "AwaitingRetry" not in record.task("note").names
    late = note.with_options(name="late", retries=1, retry_delay_seconds=0.01)
    in_flow(lambda: late.submit(tmp_path / "b", 2).wait())
    assert record.task("late").names[-3:] == ["AwaitingRetry", "Retrying", "Completed"]
    direct = late.with_options(name="direct")
    in_flow(lambda: direct(tmp_path / "c", 2))
    assert record.task("direct").names[-3:] == ["AwaitingRetry", "Retrying", "Completed"]


@pytest.mark.parametrize("how", ["submit", "map"])
def test_who_waits_for_a_retry_holds_no_slot(one_worker: TaskRunner, tmp_path: Path, how: str) -> None:
    late = note.with_options(retries=1, retry_delay_seconds=1.5)

    @task
    def quick(x: int) -> int:
        return x

    @flow(task_runner=one_worker)
    def body() -> tuple[bool, Any]:
        waits = (
            late.map([tmp_path / "a", tmp_path / "b"], 2)[0]
            if how == "map"
            else late.submit(tmp_path / "a", 2)
        )
        while not (tmp_path / "a").exists():
            time.sleep(0.01)  # work: until the first attempt was made
        answers = quick.map(range(3)).result()
        return not waits.done(), [*answers, waits.result()]

    assert body() == (True, [0, 1, 2, 2])


def test_an_async_task_is_tried_again(runner: TaskRunner, tmp_path: Path) -> None:
    @task(retries=2, retry_delay_seconds=0.01, retry_condition_fn=awaited)
    async def stubborn(marker: Path) -> int:
        with marker.open("a") as file:
            file.write("x")
        if marker.stat().st_size < 3:
            raise ConnectionError("try again")
        return 3

    @flow(task_runner=runner)
    async def body() -> list[int]:
        return [await stubborn(tmp_path / "a"), await stubborn.submit(tmp_path / "b")]

    assert asyncio.run(body()) == [3, 3]


def test_a_run_that_is_cancelled_while_its_condition_thinks(in_flow: InFlow, tmp_path: Path) -> None:
    futures: list[Any] = []

    def condition(task: Any, run: Any, state: Any) -> bool:
        while not futures:
            time.sleep(0.01)  # work: of the condition
        futures[0].cancel()
        return True

    def body() -> str:
        futures.append(note.with_options(retries=3, retry_condition_fn=condition).submit(tmp_path / "a"))
        futures[0].wait()
        return str(futures[0].state.type)

    assert in_flow(body) == "CANCELLED"
    assert (tmp_path / "a").read_text() == "x"
