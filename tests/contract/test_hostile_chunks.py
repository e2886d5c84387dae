"""Elements that do to their chunk what they can: each harms itself and none of its neighbours."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import Skip, allow_failure, flow, task, wait
from penstock.engine.states import Cancelled, Completed, Failed
from penstock.runners.base import TaskRunner
from tests.record import Record

InFlow = Callable[..., Any]
COUNT = 12


def names(futures: Any) -> list[str]:
    wait(futures, timeout=60)
    return [future.state.name for future in futures]


@task(chunk_size=6)
def after(value: Any) -> str:
    return type(value).__name__


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_element_raises_what_ends_programs(
    in_flow: InFlow, record: Record, error: type[BaseException]
) -> None:
    @task(chunk_size=6)
    def leave(x: int) -> int:
        if x == 4:
            raise error
        return x

    def body() -> Any:
        futures = leave.map(range(COUNT))
        later = after.map(futures)
        return names(futures), names(later)

    first, second = in_flow(body)
    expected = {"Crashed", "Failed"} if error is GeneratorExit else {"Crashed"}
    assert first[4] in expected
    assert [name for x, name in enumerate(first) if x != 4] == ["Completed"] * (COUNT - 1)
    assert second == ["NotReady" if x == 4 else "Completed" for x in range(COUNT)]
    assert {row.attempt for row in record.tasks("leave")} == {1}


def test_an_element_makes_its_own_state(in_flow: InFlow) -> None:
    @task(chunk_size=6)
    def by_hand(x: int) -> Any:
        if x == 1:
            return Failed("by hand")
        if x == 2:
            return Cancelled("by hand")
        if x == 3:
            return Completed("by hand", data=33)
        if x == 4:
            raise Skip("nothing observed")
        return x

    def body() -> Any:
        futures = by_hand.map(range(COUNT))
        later = after.map(futures)
        return names(futures), names(later), futures[5].result()

    first, second, value = in_flow(body)
    assert first[1:5] == ["Failed", "Cancelled", "Completed", "Skipped"]
    assert second[1:3] == ["NotReady", "NotReady"]
    assert second[3] == "Completed"
    assert second[4] == "Skipped"
    assert set(first[5:]) == set(second[5:]) == {"Completed"}
    assert value == 5


@pytest.mark.timeout(60, func_only=True)
def test_an_element_ends_its_process_in_a_chain(
    apart: TaskRunner, in_flow: InFlow, tmp_path: Path, record: Record
) -> None:
    """A process that leaves in the middle of a fused chain: only the element that did it crashes."""
    folder = str(tmp_path)

    @task(chunk_size=6)
    def first(x: int) -> int:
        with open(os.path.join(folder, f"first-{x}"), "a") as file:
            file.write("x")
        return x

    @task(chunk_size=6)
    def leave(x: int) -> int:
        with open(os.path.join(folder, f"leave-{x}"), "a") as file:
            file.write("x")
        if x == 3:
            os._exit(3)
        return x

    def body() -> Any:
        began = first.map(range(6))
        ended = leave.map(began)
        later = after.map(ended)
        return names(began), names(ended), names(later)

    began, ended, later = in_flow(body)
    assert [name for x, name in enumerate(began) if x != 3] == ["Completed"] * 5
    assert began[3] in {"Completed", "Crashed"}  # whichever of the two stages is held to have been at it
    assert ended[3] in {"Crashed", "NotReady"}
    assert [name for x, name in enumerate(ended) if x != 3] == ["Completed"] * 5
    assert later == ["NotReady" if x == 3 else "Completed" for x in range(6)]
    for row in record.tasks("leave"):
        if row.type != "PENDING":
            number = row.name.rpartition("-")[2]
            ran = os.path.getsize(tmp_path / f"leave-{number}")
            assert ran <= row.attempt, (row.name, row.names)


def test_elements_map_inside_one_worker(one_worker: TaskRunner) -> None:
    """A chunk holds the only slot, and each of its elements maps in chunks, two levels deep."""

    @task(chunk_size=3)
    def leaf(x: int) -> int:
        return x + 1

    @task(chunk_size=3)
    def branch(x: int) -> int:
        return sum(leaf.map(range(x, x + 4)).result())

    @task(chunk_size=3)
    def root(x: int) -> int:
        children = branch.map([x, x + 1])
        return sum(children.result()) + leaf.submit(x).result()

    @flow(task_runner=one_worker)
    def tree() -> list[int]:
        return list(root.map(range(4)).result())

    expected = [2 * sum(range(x + 1, x + 5)) + 4 + x + 1 for x in range(4)]
    assert tree() == expected


def test_an_element_changes_its_surroundings(apart: TaskRunner, in_flow: InFlow, tmp_path: Path) -> None:
    """What an element does to its process others see; it must not break how they are run."""
    folder = str(tmp_path)

    @task(chunk_size=6)
    def move(x: int) -> int:
        if x == 2:
            os.chdir(folder)
            os.environ["HOME"] = folder
            os.environ.pop("PATH", None)
            os.umask(0o077)
        return x

    @task
    def back(home: str, place: str, path: str) -> None:
        os.chdir(place)
        os.environ.update(HOME=home, PATH=path)

    def body() -> Any:
        futures = move.map(range(COUNT))
        later = after.map(futures)
        found = futures.result(), later.result()
        wait([back.submit(os.environ["HOME"], os.getcwd(), os.environ["PATH"]) for _ in range(8)])
        return found

    assert in_flow(body) == (list(range(COUNT)), ["int"] * COUNT)


def test_results_that_cannot_travel_in_company_of_large_ones(apart: TaskRunner, in_flow: InFlow) -> None:
    @task(chunk_size=6)
    def make(x: int) -> Any:
        if x == 1:
            return threading.Lock()
        if x == 2:
            return bytes(12 << 20)  # more than a chunk may hold: what follows is handed back
        if x == 3:
            return iter([1])
        return x

    def body() -> Any:
        futures = make.map(range(COUNT))
        later = after.map(futures)
        wait(later, timeout=60)
        return names(futures), names(later), futures[2].nbytes, futures[11].result()

    first, second, nbytes, last = in_flow(body)
    assert first[1] == "Failed"
    assert second[1] == "NotReady"
    assert nbytes >= 12 << 20
    assert first[4:] == second[4:] == ["Completed"] * (COUNT - 4)
    assert first[2] == second[2] == "Completed"
    assert last == 11


def test_a_deadline_of_elements(parallel: TaskRunner, in_flow: InFlow, record: Record) -> None:
    @task(chunk_size=6, timeout_seconds=0.5)
    def sleep(x: int) -> int:
        deadline = time.monotonic() + (20 if x == 2 else 0)
        while time.monotonic() < deadline:
            time.sleep(0.01)  # work: longer than allowed
        return x

    def body() -> Any:
        futures = sleep.map(range(6))
        later = after.map(allow_failure(futures))
        return names(futures), later.result()

    first, second = in_flow(body)
    assert first == ["TimedOut" if x == 2 else "Completed" for x in range(6)]
    assert second == ["TaskTimeout" if x == 2 else "int" for x in range(6)]


def test_a_generator_that_raises_midway(in_flow: InFlow) -> None:
    @task(chunk_size=6)
    def several(x: int) -> Iterator[int]:
        yield x
        if x == 3:
            raise ValueError(x)
        yield x + 1

    def body() -> Any:
        futures = several.map(range(6))
        later = after.map(futures)
        return names(futures), names(later), futures[4].result()

    first, second, value = in_flow(body)
    assert first == ["Failed" if x == 3 else "Completed" for x in range(6)]
    assert second == ["NotReady" if x == 3 else "Completed" for x in range(6)]
    assert value == [4, 5]


def test_a_drawn_generator_that_raises_leaves_its_elements_alone(in_flow: InFlow) -> None:
    seen: list[Any] = []

    def numbers() -> Iterator[int]:
        yield from range(8)
        message = "no more"
        raise OSError(message)

    def body() -> Any:
        with pytest.raises(OSError, match="no more"):
            after.map(numbers())
        future = after.submit(1)
        seen.append(future.result())
        return seen

    assert in_flow(body) == ["int"]


def test_retries_go_on_while_the_chain_waits(in_flow: InFlow, tmp_path: Path, record: Record) -> None:
    """An element of the first stage fails twice; those behind it wait for it, and for nothing else."""
    folder = str(tmp_path)

    @task(chunk_size=6, retries=2, retry_delay_seconds=0.05)
    def flaky(x: int) -> int:
        with open(os.path.join(folder, str(x)), "a") as file:
            file.write("x")
        if x == 4 and os.path.getsize(os.path.join(folder, str(x))) < 3:
            raise ValueError(x)
        return x

    def body() -> Any:
        futures = flaky.map(range(6))
        later = after.map(futures)
        return later.result(), futures.result()

    assert in_flow(body) == (["int"] * 6, list(range(6)))
    assert [os.path.getsize(tmp_path / str(x)) for x in range(6)] == [1, 1, 1, 1, 3, 1]
    assert {row.attempt for row in record.tasks("after")} == {1}


def test_an_error_that_cannot_be_pickled_fails_alone(in_flow: InFlow) -> None:
    class Odd(Exception):
        def __init__(self, lock: Any) -> None:
            super().__init__(lock)
            self.lock = lock

        def __reduce__(self) -> Any:
            message = "never"
            raise TypeError(message)

    @task(chunk_size=6)
    def fail(x: int) -> int:
        if x == 2:
            raise Odd(threading.Lock())
        return x

    def body() -> Any:
        futures = fail.map(range(6))
        return names(futures), type(futures[2].exception()).__name__

    states, kind = in_flow(body)
    assert states == ["Failed" if x == 2 else "Completed" for x in range(6)]
    assert kind in {"Odd", "TaskFailed", "RemoteError"}
