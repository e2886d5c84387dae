"""Many elements in one unit of work: every element is still a run of its own."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import allow_failure, errors, get_run_logger, task, unmapped, wait
from penstock.runners.base import TaskRunner
from tests.record import Record

InFlow = Callable[..., Any]


@task(chunk_size=8)
def double(x: int) -> int:
    return 2 * x


@task(chunk_size=8)
def add(x: int, y: int = 0, *, z: int = 0) -> int:
    return x + y + z


@task(chunk_size=8)
def picky(x: int) -> int:
    if x % 5 == 3:
        raise ValueError(x)
    return x


def units(futures: Any) -> int:
    return len({future.key for future in futures})


def test_elements_go_together(in_flow: InFlow) -> None:
    def body() -> Any:
        futures = double.map(range(30))
        values = futures.result()
        return values, units(futures), [future.state.name for future in futures]

    values, sent, names = in_flow(body)
    assert values == [2 * x for x in range(30)]
    assert sent == 4
    assert set(names) == {"Completed"}


def test_a_chunk_of_one_is_a_task(in_flow: InFlow) -> None:
    def body() -> Any:
        futures = double.with_options(chunk_size=1).map(range(10))
        futures.wait()
        return units(futures)

    assert in_flow(body) == 10


def test_tiny_elements_are_packed_unasked(in_flow: InFlow) -> None:
    def body() -> Any:
        futures = double.with_options(chunk_size="auto").map(range(2000))
        return futures.result() == [2 * x for x in range(2000)], units(futures)

    right, sent = in_flow(body)
    assert right
    assert sent < 400


def test_long_elements_go_alone_unasked(parallel: TaskRunner, in_flow: InFlow) -> None:
    @task
    def sleep(x: int) -> int:
        time.sleep(0.05)  # work: long enough to go alone
        return x

    def body() -> Any:
        futures = sleep.map(range(24))
        return futures.result(), units(futures)

    assert in_flow(body) == (list(range(24)), 24)


def test_elements_that_turn_out_slow_are_handed_back(parallel: TaskRunner, in_flow: InFlow) -> None:
    slots = parallel.info.threads

    @task
    def work(x: int) -> int:
        if x >= 2 * slots:
            time.sleep(0.15)  # work: the first ones promised to be quick
        return x

    def body() -> Any:
        count = 2 * slots + 12
        futures = work.map(range(count))
        return futures.result() == list(range(count)), units(futures)

    right, sent = in_flow(body)
    assert right
    assert sent > 2 * slots + 1  # one chunk did not keep them all


def test_large_results_go_alone_unasked(in_flow: InFlow) -> None:
    @task
    def make(x: int) -> bytes:
        return bytes(3 << 20)

    def body() -> Any:
        futures = make.map(range(10))
        futures.wait()
        return units(futures), {future.nbytes for future in futures}

    sent, sizes = in_flow(body)
    assert sent == 10
    assert min(sizes) >= 3 << 20


def test_every_element_is_in_the_record(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: double.map(range(20)).result())
    runs = [run for run in record.tasks() if run.task == "double"]
    assert len({run.id for run in runs}) == 20
    assert {run.type for run in runs} == {"COMPLETED"}
    assert {run.attempt for run in runs} == {1}


def test_a_failed_element_fails_alone(in_flow: InFlow) -> None:
    def body() -> Any:
        futures = picky.map(range(16))
        wait(futures)
        return [future.state.name for future in futures], futures.result(raise_on_failure=False)

    names, values = in_flow(body)
    assert [name == "Failed" for name in names] == [x % 5 == 3 for x in range(16)]
    assert [value if isinstance(value, int) else value.args[0] for value in values] == list(range(16))
    assert isinstance(values[3], ValueError)


def test_a_failed_element_is_tried_again_alone(in_flow: InFlow, tmp_path: Any, record: Record) -> None:
    folder = str(tmp_path)

    @task(chunk_size=6, retries=2)
    def flaky(x: int) -> int:
        with open(os.path.join(folder, str(x)), "a") as file:
            file.write("x")
        if x == 4 and os.path.getsize(os.path.join(folder, str(x))) < 3:
            raise ValueError(x)
        return x

    assert in_flow(lambda: flaky.map(range(12)).result()) == list(range(12))
    assert [os.path.getsize(tmp_path / str(x)) for x in range(12)] == [3 if x == 4 else 1 for x in range(12)]
    attempts = {run.name: run.attempt for run in record.tasks() if run.task == "flaky"}
    assert attempts["flaky-4"] == 3
    assert attempts["flaky-5"] == 1


def test_other_arguments(in_flow: InFlow) -> None:
    def body() -> Any:
        one = double.submit(10)
        return (
            add.map(range(10), y=range(10), z=unmapped(5)).result(),
            add.map([1, 2, 3], unmapped(one)).result(),
            add.map(double.map(range(9)), y=[one] * 9).result(),
        )

    first, second, third = in_flow(body)
    assert first == [2 * x + 5 for x in range(10)]
    assert second == [21, 22, 23]
    assert third == [2 * x + 20 for x in range(9)]


def test_mutable_arguments_are_fresh_for_each_element(apart: TaskRunner, in_flow: InFlow) -> None:
    @task(chunk_size=5)
    def collect(x: int, seen: list[int], own: list[int]) -> Any:
        seen.append(x)
        own.append(x)
        return len(seen), own

    def body() -> Any:
        items = [[0] for _ in range(10)]
        futures = collect.map(range(10), seen=unmapped([]), own=items)
        items[9].append(99)
        return futures.result()

    assert in_flow(body) == [(1, [0, x]) for x in range(10)]


def test_one_element_is_passed_on(in_flow: InFlow) -> None:
    def body() -> Any:
        futures = double.map(range(20))
        return add.submit(futures[3], futures[17]).result(), add.submit(futures[5], 1).result()

    assert in_flow(body) == (40, 11)


def test_elements_inside_containers(in_flow: InFlow) -> None:
    @task(chunk_size=4)
    def total(parts: list[int], extra: dict[str, int]) -> int:
        return sum(parts) + extra["x"]

    def body() -> Any:
        futures = double.map(range(20))
        groups = [futures[start : start + 5] for start in range(0, 20, 5)]
        return total.map(groups, extra=unmapped({"x": futures[1]})).result()

    assert in_flow(body) == [sum(2 * x for x in range(s, s + 5)) + 2 for s in range(0, 20, 5)]


def test_a_chain_is_done_in_one_go(in_flow: InFlow, record: Record) -> None:
    @task(chunk_size=8)
    def third(x: int) -> str:
        return f"<{x}>"

    def body() -> Any:
        first = double.map(range(16))
        second = add.map(first, 1)
        last = third.map(second)
        return last.result(), second.result(), first.result()

    last, second, first = in_flow(body)
    assert first == [2 * x for x in range(16)]
    assert second == [2 * x + 1 for x in range(16)]
    assert last == [f"<{2 * x + 1}>" for x in range(16)]
    states = [(run.task, run.type) for run in record.tasks()]
    assert sorted(set(states)) == [("add", "COMPLETED"), ("double", "COMPLETED"), ("third", "COMPLETED")]
    assert len(states) == 48


def test_a_failure_in_a_chain_stops_its_element_only(in_flow: InFlow) -> None:
    def body() -> Any:
        first = double.map(range(10))
        second = picky.map(first)
        last = add.map(second, 1)
        wait(last)
        return [future.state.name for future in second], [future.state.name for future in last]

    second, last = in_flow(body)
    bad = [2 * x % 5 == 3 for x in range(10)]
    assert [name == "Failed" for name in second] == bad
    assert last == ["NotReady" if one else "Completed" for one in bad]


def test_failures_are_allowed(in_flow: InFlow) -> None:
    @task(chunk_size=4)
    def describe(x: Any) -> str:
        return type(x).__name__

    def body() -> Any:
        return describe.map(allow_failure(picky.map(range(10)))).result()

    assert in_flow(body) == ["ValueError" if x % 5 == 3 else "int" for x in range(10)]


def test_logs_belong_to_their_element(in_flow: InFlow, record: Record) -> None:
    @task(chunk_size=4, log_prints=True)
    def speak(x: int) -> int:
        if x % 2:
            print("odd", x)
        get_run_logger().warning("number %d", x)
        return x

    in_flow(lambda: speak.map(range(8)).result())
    for run in record.tasks():
        number = int(run.name.rpartition("-")[2])
        assert run.logs == ([f"odd {number}"] if number % 2 else []) + [f"number {number}"]


def test_an_element_submits_tasks(in_flow: InFlow, record: Record) -> None:
    @task
    def child(x: int) -> int:
        return x + 100

    @task(chunk_size=3)
    def parent(x: int) -> int:
        return child.submit(x).result()

    assert in_flow(lambda: parent.map(range(6)).result()) == [x + 100 for x in range(6)]
    assert sum(run.task == "child" for run in record.tasks()) == 6


def test_coroutines_and_generators(in_flow: InFlow) -> None:
    @task(chunk_size=3)
    async def later(x: int) -> int:
        return x + 1

    @task(chunk_size=3)
    def several(x: int) -> Any:
        yield from range(x)

    assert in_flow(lambda: (later.map(range(6)).result(), several.map(range(4)).result())) == (
        [1, 2, 3, 4, 5, 6],
        [list(range(x)) for x in range(4)],
    )


def test_a_result_that_cannot_travel_fails_alone(apart: TaskRunner, in_flow: InFlow) -> None:
    @task(chunk_size=6)
    def make(x: int) -> Any:
        return threading.Lock() if x == 2 else x

    def body() -> Any:
        futures = make.map(range(6))
        wait(futures)
        return [future.state.name for future in futures], futures[2].exception()

    names, problem = in_flow(body)
    assert names == ["Failed" if x == 2 else "Completed" for x in range(6)]
    assert isinstance(problem, errors.UnserializableResult)


def test_one_element_is_cancelled(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    started = tmp_path / "started"

    @task(chunk_size=4)
    def nap(x: int) -> int:
        with started.open("a") as file:
            file.write(str(x))
        deadline = time.monotonic() + (20 if x == 1 else 0)
        while time.monotonic() < deadline:
            time.sleep(0.01)  # work: until it is stopped
        return x

    def body() -> Any:
        futures = nap.map(range(4))
        wait_until(lambda: started.exists() and "1" in started.read_text(), 15.0)
        futures[1].cancel()
        wait(futures, timeout=15)
        return [future.state.name for future in futures]

    assert in_flow(body) == ["Completed", "Cancelled", "Completed", "Completed"]


def test_all_elements_are_cancelled(parallel: TaskRunner, in_flow: InFlow) -> None:
    @task(chunk_size=5)
    def nap(x: int) -> int:
        time.sleep(0.3)  # work: to be stopped in
        return x

    def body() -> Any:
        futures = nap.map(range(100))
        futures.cancel()
        wait(futures, timeout=20)
        return {future.state.name for future in futures}

    assert "Cancelled" in in_flow(body)


def test_arrays_of_other_elements_are_readonly(in_flow: InFlow) -> None:
    np = pytest.importorskip("numpy")

    @task(chunk_size=4)
    def make(x: int) -> Any:
        return np.full(3, x)

    @task(chunk_size=4)
    def write(a: Any) -> Any:
        a[0] = 7
        return a

    def body() -> Any:
        made = make.map(range(8))
        bad = write.map(made)
        good = write.with_options(inputs="copy").map(made)
        wait(bad)
        return [future.state.name for future in bad], [list(a) for a in good.result()], made.result()

    bad, good, made = in_flow(body)
    assert set(bad) == {"Failed"}
    assert good == [[7, x, x] for x in range(8)]
    assert [list(a) for a in made] == [[x, x, x] for x in range(8)]


@pytest.mark.parametrize("order", ["index", "completion"])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 100])
def test_values_are_combined(in_flow: InFlow, record: Record, order: str, count: int) -> None:
    @task
    def total(parts: list[int]) -> int:
        return sum(parts)

    assert in_flow(lambda: double.map(range(count)).reduce(total, fanin=4, order=order).result()) == sum(
        2 * x for x in range(count)
    )
    assert set(record.types("total")) == {"COMPLETED"}


@pytest.mark.parametrize("order", ["index", "completion"])
def test_a_missing_value_leaves_nothing_to_combine(in_flow: InFlow, record: Record, order: str) -> None:
    @task
    def total(parts: list[int]) -> int:
        return sum(parts)

    def body() -> Any:
        future = picky.map(range(30)).reduce(total, fanin=3, order=order)
        future.wait()
        return future.state.name

    assert in_flow(body) == "NotReady"
    assert set(record.types("total")) <= {"COMPLETED", "PENDING"}


def test_an_element_that_kills_its_worker_is_the_only_one_to_crash(
    apart: TaskRunner, in_flow: InFlow, tmp_path: Path, record: Record
) -> None:
    folder = str(tmp_path)

    @task(chunk_size=10, crash_retries=1)
    def deadly(x: int) -> int:
        with open(os.path.join(folder, str(x)), "a") as file:
            file.write("x")
        if x == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    def body() -> Any:
        futures = deadly.map(range(10))
        wait(futures, timeout=60)
        return [future.state.name for future in futures], futures.result(raise_on_failure=False)

    names, values = in_flow(body)
    assert names == ["Crashed" if x == 4 else "Completed" for x in range(10)]
    assert isinstance(values[4], errors.WorkerLost)
    executions = {x: os.path.getsize(tmp_path / str(x)) for x in range(10)}
    attempts = {int(run.name.rpartition("-")[2]): run.attempt for run in record.tasks("deadly")}
    assert executions == attempts
    assert executions[4] == 2
    assert all(executions[x] == 1 for x in range(5, 10))
