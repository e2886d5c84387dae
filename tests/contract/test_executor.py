"""The executor of the standard library over a runner: plain functions, which nobody records."""

import asyncio
import concurrent.futures
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import MissingContextError, errors, flow, get_run_context, task
from penstock.runners.base import TaskRunner
from tests.record import Record


def add(x: int, y: int = 1) -> int:
    return x + y


def fail(x: int) -> int:
    raise ValueError(f"no data for {x}")


def hold(path: str, then: int = 0) -> int:
    while not Path(path).exists():
        time.sleep(0.005)  # work: it is busy until the test lets it go
    return then


def say(path: str) -> None:
    Path(path).touch()


def hold_and_tell(path: str) -> int:
    say(f"{path}-began-{os.getpid()}-{time.monotonic_ns()}")
    return hold(path)


@pytest.fixture
def executor(runner: TaskRunner) -> Iterator[Executor]:
    with runner.get_executor() as found:
        yield found


@pytest.fixture
def several(parallel: TaskRunner) -> Iterator[Executor]:
    with parallel.get_executor() as found:
        yield found


def test_it_is_an_executor(executor: Executor) -> None:
    assert isinstance(executor, Executor)
    offset = 100
    future = executor.submit(lambda x: x + offset, 1)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(20) == 101
    assert future.done()
    assert not future.running()
    assert not future.cancel()
    assert future.exception() is None
    assert executor.submit(add, 2, y=3).result(20) == 5


def test_map_keeps_the_order(executor: Executor) -> None:
    assert list(executor.map(add, range(300), range(0, 3000, 10))) == [11 * x for x in range(300)]
    assert list(executor.map(add, [1, 2, 3], chunksize=2)) == [2, 3, 4]
    assert list(executor.map(add, [])) == []
    with pytest.raises(ValueError, match="chunksize must be >= 1"):
        executor.map(add, [1], chunksize=0)


def test_an_exception_shows_the_lines_of_the_user(executor: Executor) -> None:
    future = executor.submit(fail, 7)
    with pytest.raises(ValueError, match="no data for 7") as caught:
        future.result(20)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert (frames[-1].filename, frames[-1].name) == (__file__, "fail")
    assert not any("penstock/runners/worker" in frame.filename for frame in frames)
    assert any("'fail', on " in note for note in caught.value.__notes__)
    values = executor.map(fail, [1, 2])
    with pytest.raises(ValueError, match="no data for 1"):
        next(values)


def test_arrays_and_other_objects(executor: Executor) -> None:
    found = executor.submit(lambda a: {"sum": a.sum(), "twice": 2 * a}, np.arange(200_000.0)).result(20)
    assert found["sum"] == 199_999 * 100_000
    np.testing.assert_array_equal(found["twice"], 2 * np.arange(200_000.0))


def test_an_argument_may_be_written_to(executor: Executor) -> None:
    def fill(a: Any) -> Any:
        a[:] = 3
        return a

    assert executor.submit(fill, np.zeros(4)).result(20).tolist() == [3, 3, 3, 3]


def test_coroutines_and_generators_run_to_their_end(executor: Executor) -> None:
    async def later(x: int) -> int:
        await asyncio.sleep(0.001)
        return x + 1

    def count(n: int) -> Iterator[int]:
        yield from range(n)

    either: list[Any] = [later, count]
    assert [executor.submit(one, 2).result(20) for one in either] == [3, [0, 1]]


def test_the_tools_of_the_standard_library(executor: Executor) -> None:
    futures = [executor.submit(add, x) for x in range(6)]
    assert concurrent.futures.wait(futures, 20).not_done == set()
    assert sorted(one.result() for one in concurrent.futures.as_completed(futures, 20)) == [1, 2, 3, 4, 5, 6]
    heard: list[int] = []
    futures[0].add_done_callback(lambda future: heard.append(future.result()))
    assert heard == [1]

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(executor, add, x) for x in range(3)))

    assert asyncio.run(main()) == [1, 2, 3]


def test_nothing_is_recorded(runner: TaskRunner, record: Record) -> None:
    def where() -> str:
        try:
            get_run_context()
        except MissingContextError:
            return "nowhere"
        return "in a run"

    @flow(task_runner=runner)
    def body() -> str:
        with runner.get_executor() as executor:
            return executor.submit(where).result(20)

    if runner.info.threads > 1:  # the sequential one calls in the thread of the flow, as a call would be
        assert body() == "nowhere"
    else:
        assert body() == "in a run"
    assert len(record.flows()) == 1
    assert record.tasks() == []


def test_a_task_is_refused_with_the_cure(executor: Executor) -> None:
    with pytest.raises(TypeError, match=r"is a task: use its own 'submit' or 'map', or .*task\.fn"):
        executor.submit(task(add), 1)
    assert executor.submit(task(add).fn, 1).result(20) == 2


def test_what_cannot_travel_is_refused_at_submit(apart: TaskRunner) -> None:
    import threading

    with apart.get_executor() as executor:
        with pytest.raises(errors.UnserializableArgument, match="the arguments of 'add' cannot be sent"):
            executor.submit(add, threading.Lock())  # type: ignore[arg-type] # the point
        lock = threading.Lock()
        with pytest.raises(errors.UnserializableArgument, match="cannot be sent to another process"):
            executor.submit(lambda: lock.locked())
        assert isinstance(executor.submit(threading.Lock).exception(20), errors.UnserializableResult)
        assert executor.submit(add, 1).result(20) == 2


def test_a_call_that_waits_its_turn_is_cancelled(
    several: Executor, parallel: TaskRunner, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    gate = str(tmp_path / "gate")
    running = [several.submit(hold_and_tell, gate) for _ in range(parallel.info.threads)]
    wait_until(lambda: all(one.running() for one in running), 20.0)
    waiting = [several.submit(hold_and_tell, gate) for _ in range(4)]
    assert [one.cancel() for one in waiting] == [True] * 4
    assert [one.cancelled() for one in waiting] == [True] * 4
    assert concurrent.futures.wait(waiting, 10).not_done == set()
    with pytest.raises(CancelledError):
        waiting[0].result()
    assert waiting[0].cancel()
    assert not running[0].cancel()
    say(gate)
    assert [one.result(20) for one in running] == [0] * len(running)
    assert len(list(tmp_path.glob("gate-began-*"))) == len(running)


def test_map_with_a_time_out(several: Executor, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    values = several.map(hold, [str(tmp_path), gate, gate, gate, gate, gate, gate], range(7), timeout=1.0)
    assert next(values) == 0
    with pytest.raises(TimeoutError):
        next(values)
    say(gate)


def test_shutdown_withdraws_what_has_not_begun(
    parallel: TaskRunner, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    gate = str(tmp_path / "gate")
    executor = parallel.get_executor()
    running = [executor.submit(hold, gate, 5) for _ in range(parallel.info.threads)]
    wait_until(lambda: all(one.running() for one in running), 20.0)
    waiting = [executor.submit(hold, gate) for _ in range(3)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(one.cancelled() for one in waiting)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(add, 1)
    say(gate)
    assert [one.result(20) for one in running] == [5] * len(running)
    executor.shutdown()


def test_shutdown_waits(runner: TaskRunner) -> None:
    executor = runner.get_executor()
    futures = [executor.submit(add, x) for x in range(5)]
    executor.shutdown()
    assert all(one.done() for one in futures)
    executor.shutdown()
    assert runner.is_open  # others use it, too


def test_a_block_of_the_runner_ends_its_executors(runner: TaskRunner) -> None:
    with runner:
        executor = runner.get_executor()
        futures = [executor.submit(add, x) for x in range(3)]
    assert [one.result(0) for one in futures] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(add, 1)


def test_who_drops_the_executor_still_gets_the_results(runner: TaskRunner) -> None:
    futures = [runner.get_executor().submit(add, x) for x in range(3)]
    assert [one.result(20) for one in futures] == [1, 2, 3]


def test_the_runner_has_to_be_started(runner: TaskRunner) -> None:
    with pytest.raises(RuntimeError, match=r"(Task runner is not|The task runner must be) started"):
        type(runner)().get_executor()


@pytest.mark.timeout(90, func_only=True)
def test_a_worker_that_dies(apart: TaskRunner) -> None:
    with apart.get_executor() as executor:
        lost = executor.submit(os._exit, 3)
        assert isinstance(lost.exception(60), errors.WorkerLost)
        assert executor.submit(add, 1).result(60) == 2


def test_executors_and_tasks_side_by_side(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    def body() -> Any:
        with runner.get_executor() as executor:
            plain = executor.submit(add, 1)
            future = task(add).submit(2)
            return plain.result(20), future.result()

    assert body() == (2, 3)
    assert record.types("add") == ["COMPLETED"]
