"""Cached results: keys, hits that take no slot, and never a wrong value."""

import asyncio
import datetime as dt
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import (
    CachePolicy,
    ConfigurationError,
    FileSystemLockManager,
    IsolationLevel,
    MemoryLockManager,
    MissingResult,
    ResultCorrupt,
    flow,
    task,
    task_input_hash,
)
from penstock import settings as configuration
from penstock.cache_policies import FLOW_PARAMETERS, INPUTS, NO_CACHE, RUN_ID, TASK_SOURCE
from penstock.engine import cache, lookups
from penstock.engine.states import Stored
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record

LARGE = 3 << 20  # bytes of an array that is neither inline nor in a message


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Where tasks leave a file for each call of their function."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def mark(folder: Path, name: object = "call") -> None:
    (folder / f"{name}-{time.time_ns()}-{os.getpid()}-{threading.get_ident()}").touch()


def calls(folder: Path, name: object = "call") -> int:
    return len(list(folder.glob(f"{name}-*")))


def names(record: Record, task_name: str) -> list[str]:
    return [row.state["name"] for row in record.tasks(task_name)]


def squares(marks: Path, **options: Any) -> Any:
    @task(**{"cache_policy": INPUTS, **options})
    def square(x: Any) -> Any:
        mark(marks)
        return x * x

    return square


def twice(square: Any) -> None:
    """Call a task with one argument, one time after the other."""
    for _ in range(2):
        square.submit(2).wait()


# -- hits -----------------------------------------------------------------------------------------


def test_a_second_run_finds_the_result_of_the_first(in_flow: InFlow, record: Record, marks: Path) -> None:
    square = squares(marks)

    def body() -> Any:
        future = square.submit(7)
        return future.result(), future.state.name, future.state.is_completed()

    assert in_flow(body) == (49, "Completed", True)
    assert in_flow(body) == (49, "Cached", True)
    assert calls(marks) == 1
    first, second = record.tasks("square")
    assert second.type == "COMPLETED"
    assert second.names == ["Pending", "Cached"]  # it has never run
    assert second.state["stored"] == first.state["stored"]


def test_a_hit_goes_to_no_worker(
    in_flow: InFlow, runner: TaskRunner, record: Record, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    square = squares(marks)
    in_flow(lambda: square.map(range(20)).wait())
    sent: list[Any] = []
    send = runner.send

    def counted(batch: Any) -> Any:
        sent.extend(batch)
        return send(batch)

    monkeypatch.setattr(runner, "send", counted)
    assert in_flow(lambda: square.map(range(20)).result()) == [x * x for x in range(20)]
    assert sent == []
    assert calls(marks) == 20
    assert names(record, "square")[20:] == ["Cached"] * 20


def test_of_a_map_only_the_elements_that_miss_go(in_flow: InFlow, record: Record, marks: Path) -> None:
    square = squares(marks, chunk_size=5)
    in_flow(lambda: square.map(range(0, 30, 3)).wait())
    assert in_flow(lambda: square.map(range(30)).result()) == [x * x for x in range(30)]
    assert calls(marks) == 30
    second = names(record, "square")[10:]
    assert second == ["Cached" if x % 3 == 0 else "Completed" for x in range(30)]


def test_a_direct_call_finds_and_leaves_results(in_flow: InFlow, record: Record, marks: Path) -> None:
    square = squares(marks)

    def body() -> Any:
        return square(3), square.submit(3).result(), square(3, return_state=True).name

    assert in_flow(body) == (9, 9, "Cached")
    assert calls(marks) == 1
    assert names(record, "square") == ["Completed", "Cached", "Cached"]


def test_async_tasks_are_cached_too(in_flow: InFlow, runner: TaskRunner, record: Record, marks: Path) -> None:
    @task(cache_policy=INPUTS)
    async def square(x: int) -> int:
        mark(marks)
        return x * x

    @flow(task_runner=runner)
    async def body() -> Any:
        return (
            await square(2),
            await square.submit(2),
            await square(4),
            [await one for one in square.map([2, 4])],
        )

    assert asyncio.run(body()) == (4, 4, 16, [4, 16])
    assert calls(marks) == 2
    assert sorted(names(record, "square")) == ["Cached"] * 3 + ["Completed"] * 2


def test_tasks_inside_tasks_are_cached(in_flow: InFlow, record: Record, marks: Path) -> None:
    square = squares(marks)

    @task
    def outer(x: int) -> Any:
        return square.submit(x).result() + sum(square.map([x, x + 1]).result()) + square(x)

    in_flow(lambda: outer.submit(5).result())
    in_flow(lambda: outer.submit(5).result())
    assert calls(marks) == 2
    assert names(record, "square")[-4:] == ["Cached"] * 4


def test_the_default_finds_repeated_calls_of_one_run_only(
    in_flow: InFlow, record: Record, marks: Path
) -> None:
    @task(persist_result=True)
    def square(x: int) -> int:
        mark(marks)
        return x * x

    def body() -> Any:
        square.submit(3).wait()
        second = square.submit(3)
        second.wait()
        return second.state.name

    assert in_flow(body) == "Cached"
    assert calls(marks) == 1
    assert in_flow(body) == "Cached"
    assert calls(marks) == 2


def test_without_stored_results_nothing_is_hashed(in_flow: InFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.engine import hashing

    @task
    def square(x: int) -> int:
        return x * x

    @task(cache_policy=NO_CACHE, persist_result=True)
    def stored(x: int) -> int:
        return x * x

    monkeypatch.setattr(hashing, "stable_hash", lambda *_: pytest.fail("a key was made"))
    monkeypatch.setattr(hashing, "code_of", lambda *_: pytest.fail("a key was made"))
    assert (
        in_flow(lambda: [square.submit(2).result(), square(2), *square.map([2]).result(), stored(2)])
        == [4] * 4
    )


# -- what counts ----------------------------------------------------------------------------------


def test_tasks_with_equal_inputs_do_not_share_results(in_flow: InFlow) -> None:
    @task(cache_policy=INPUTS)
    def double(x: int) -> int:
        return 2 * x

    @task(cache_policy=INPUTS)
    def triple(x: int) -> int:
        return 3 * x

    assert in_flow(lambda: [double.submit(2).result(), triple.submit(2).result()]) == [4, 6]


def test_an_argument_can_be_left_out(in_flow: InFlow, marks: Path) -> None:
    @task(cache_policy=INPUTS - "verbose")
    def work(x: int, verbose: Any = None) -> int:
        mark(marks)
        return x

    in_flow(lambda: work.submit(1, verbose=1).wait())
    in_flow(lambda: work.submit(1, verbose=2).wait())
    in_flow(lambda: work.submit(1).wait())
    assert calls(marks) == 1


def test_other_code_is_another_task(in_flow: InFlow, marks: Path) -> None:
    def made(factor: int) -> Any:
        @task(cache_policy=INPUTS + TASK_SOURCE)
        def scale(x: int) -> int:
            mark(marks)
            return factor * x

        return scale

    assert [in_flow(lambda f=f: made(f).submit(2).result()) for f in (3, 4, 3)] == [6, 8, 6]
    assert calls(marks) == 2


def test_parameters_of_the_flow_count(runner: TaskRunner, marks: Path) -> None:
    @task(cache_policy=FLOW_PARAMETERS)
    def work() -> int:
        mark(marks)
        return 1

    @task
    def outer() -> int:
        return work.submit().result()

    @flow(task_runner=runner)
    def body(day: str) -> int:
        return work.submit().result()

    @flow(task_runner=runner)
    def nested(day: str) -> int:
        return outer.submit().result()

    for day in ("Monday", "Tuesday", "Monday"):
        body(day)
    assert calls(marks) == 2
    for day in ("Monday", "Sunday"):
        nested(day)
    assert calls(marks) == 3


def test_large_parameters_of_the_flow_count_in_nested_tasks(runner: TaskRunner, marks: Path) -> None:
    @task(cache_policy=FLOW_PARAMETERS)
    def work() -> int:
        mark(marks)
        return 1

    @task
    def outer() -> int:
        return work.submit().result() + work()

    @flow(task_runner=runner)
    def nested(data: Any) -> int:
        return outer.submit().result()

    first, second = np.zeros(LARGE, np.uint8), np.ones(LARGE, np.uint8)
    for data in (first, second, first.copy()):
        assert nested(data) == 2
    assert calls(marks) == 2


def test_parameters_that_were_not_hashed_give_no_other_key(
    apart: TaskRunner, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @task
    def outer() -> int:
        from penstock import task

        @task(cache_policy=INPUTS + FLOW_PARAMETERS)
        def work(x: int) -> int:
            mark(marks)
            return x

        return work.submit(1).result()

    @flow(task_runner=apart)
    def nested(data: Any) -> int:
        return outer.submit().result()

    monkeypatch.setattr(cache, "_heeding", [])  # no task of this process heeds them
    with pytest.raises(ValueError, match=r"were not hashed, since no task with FLOW_PARAMETERS is known"):
        nested(np.zeros(LARGE, np.uint8))
    assert calls(marks) == 0
    assert nested("Monday") == 1
    assert calls(marks) == 1


def test_parameters_without_content_are_named_in_nested_tasks(apart: TaskRunner, marks: Path) -> None:
    @task(cache_policy=FLOW_PARAMETERS)
    def work() -> int:
        mark(marks)
        return 1

    @task
    def outer() -> int:
        return work.submit().result()

    @flow(task_runner=apart)
    def nested(lock: Any) -> int:
        return outer.submit().result()

    with pytest.raises(ValueError, match=r"a parameter of the flow cannot be part of a cache key"):
        nested(threading.Lock())
    assert calls(marks) == 0


def test_keys_of_ones_own(in_flow: InFlow, record: Record, marks: Path) -> None:
    class ByParity(CachePolicy):
        def compute_key(self, task_ctx: Any, inputs: Any, flow_parameters: Any, **_: Any) -> str | None:
            return None if inputs["x"] < 0 else f"{task_ctx.task.name}-{inputs['x'] % 2}"

    @task(cache_policy=ByParity())
    def one(x: int) -> int:
        mark(marks, "one")
        return x

    @task(cache_key_fn=lambda context, arguments: f"{context.task.name}-{arguments['x']}")
    def two(x: int) -> int:
        mark(marks, "two")
        return x

    @task(cache_key_fn=task_input_hash)
    def three(x: int) -> int:
        mark(marks, "three")
        return x

    @task
    def give(x: int) -> int:
        return x

    def body() -> Any:
        found = [one.submit(x).result() for x in (1, 3, 2, -1, -1)]
        found += [fn.submit(x).result() for fn in (two, three) for x in (5, 5, give.submit(5))]
        return found

    assert in_flow(body) == [1, 1, 2, -1, -1, 5, 5, 5, 5, 5, 5]
    assert (calls(marks, "one"), calls(marks, "two"), calls(marks, "three")) == (4, 1, 1)


def test_what_has_no_content_is_refused_with_the_cure(
    in_flow: InFlow, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "_warned", set())

    @task(cache_policy=INPUTS)
    def work(x: int, lock: Any) -> int:
        return x

    def body() -> None:
        with pytest.raises(
            ValueError, match=r"argument 'lock' cannot be part of a cache key.*INPUTS - \"lock\""
        ):
            work(1, threading.Lock())

    in_flow(body)

    @task(persist_result=True)
    def implied(x: int, lock: Any) -> int:
        return x

    def warned() -> int:
        with pytest.warns(UserWarning, match="its results are stored, but not found again"):
            return int(implied(2, threading.Lock()))

    assert in_flow(warned) == 2


# -- values of other tasks ------------------------------------------------------------------------


@task(cache_policy=INPUTS)
def ramp(n: int) -> Any:
    return np.arange(n, dtype="f8")


@task(cache_policy=INPUTS)
def total(x: Any, folder: Path) -> float:
    mark(folder, "total")
    return float(x.sum())


@task
def fresh(n: int) -> Any:
    return np.arange(n, dtype="f8")


@task
def halved(x: Any) -> float:
    return float(x.sum()) / 2


SUM = float(np.arange(LARGE // 8).sum())


def test_a_future_counts_as_the_key_of_its_task(in_flow: InFlow, record: Record, marks: Path) -> None:
    def body() -> Any:
        return total.submit(ramp.submit(LARGE // 8), marks).result()

    assert in_flow(body) == SUM
    assert in_flow(body) == SUM
    assert calls(marks, "total") == 1
    assert names(record, "total") == ["Completed", "Cached"]
    assert names(record, "ramp") == ["Completed", "Cached"]
    assert [row.state["driver_bytes"] for row in record.flows()][1] < 10_000


def test_any_other_is_hashed_where_it_lies(in_flow: InFlow, record: Record, marks: Path) -> None:
    def body() -> Any:
        total.submit(fresh.submit(LARGE // 8), marks).wait()

    in_flow(body)
    in_flow(body)
    assert calls(marks, "total") == 1
    assert names(record, "total") == ["Completed", "Cached"]
    assert [row.state["driver_bytes"] for row in record.flows()] == [0, 0]


def test_elements_are_hashed_where_they_lie(in_flow: InFlow, record: Record, marks: Path) -> None:
    from penstock import unmapped

    def body() -> Any:
        return total.map(fresh.map([10, 20, 30]), unmapped(marks)).result()

    assert in_flow(body) == in_flow(body) == [45.0, 190.0, 435.0]
    assert calls(marks, "total") == 3


def test_what_needs_a_hit_reads_it_where_it_runs(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        halved.submit(ramp.submit(LARGE // 8)).wait()
        halved.map(ramp.map([LARGE // 8, 10])).wait()

    in_flow(body)
    in_flow(body)
    assert names(record, "ramp")[3:] == ["Cached"] * 3
    rows = record.tasks("halved")
    assert [row.type for row in rows] == ["COMPLETED"] * 6
    assert [row.state["driver_bytes"] for row in record.flows()] == [0, 0]


def test_a_hit_waits_for_its_upstreams(in_flow: InFlow, marks: Path) -> None:
    square = squares(marks)

    @task
    def breaks() -> None:
        raise RuntimeError("no")

    in_flow(lambda: square.submit(2).wait())

    def body() -> Any:
        late = square.submit(2, wait_for=[breaks.submit()])
        late.wait()
        return late.state.name

    assert in_flow(body) == "NotReady"


# -- expiry, refresh, switches ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.2, dt.timedelta(seconds=0.2)])
def test_a_result_expires(in_flow: InFlow, marks: Path, wait_until: Callable[..., None], limit: Any) -> None:
    square = squares(marks, cache_expiration=limit)
    in_flow(lambda: square.submit(2).wait())
    end = time.monotonic() + 0.3
    wait_until(lambda: time.monotonic() > end)
    in_flow(lambda: square.submit(2).wait())
    assert calls(marks) == 2
    in_flow(lambda: square.with_options(cache_expiration=None).submit(2).wait())
    assert calls(marks) <= 3  # the writer's limit counts for readers without one
    in_flow(lambda: square.with_options(cache_expiration=3600).submit(4).wait())
    in_flow(lambda: square.with_options(cache_expiration=3600).submit(4).wait())
    assert calls(marks) <= 4


def test_a_refresh_makes_it_again_and_stores_it(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    source = tmp_path / "source"

    @task(cache_policy=INPUTS - "where")
    def load(where: Path, x: int) -> str:
        return where.read_text()

    source.write_text("old")
    assert in_flow(lambda: load.submit(source, 1).result()) == "old"
    source.write_text("new")
    assert in_flow(lambda: load.submit(source, 1).result()) == "old"
    assert in_flow(lambda: load.with_options(refresh_cache=True).submit(source, 1).result()) == "new"
    assert in_flow(lambda: load.submit(source, 1).result()) == "new"
    assert names(record, "load") == ["Completed", "Cached", "Completed", "Cached"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("TASKS_REFRESH_CACHE", 2), ("TASKS_DISABLE_CACHING", 2), ("TASKS_DEFAULT_NO_CACHE", 1)],
)
def test_settings_switch_caching(
    in_flow: InFlow, marks: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: int
) -> None:
    square = squares(marks)

    @task
    def outer(x: int) -> Any:
        return square.submit(x).result()

    in_flow(lambda: outer.submit(2).result())
    monkeypatch.setenv(f"PENSTOCK_{name}", "true")
    configuration.refresh()
    in_flow(lambda: outer.submit(2).result())
    assert calls(marks) == expected


def test_results_that_are_stored_by_default_are_cached_by_default(
    in_flow: InFlow, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @task
    def square(x: int) -> int:
        mark(marks)
        return x * x

    monkeypatch.setenv("PENSTOCK_RESULTS_PERSIST_BY_DEFAULT", "true")
    configuration.refresh()
    in_flow(lambda: twice(square))
    assert calls(marks) == 1
    monkeypatch.setenv("PENSTOCK_TASKS_DEFAULT_NO_CACHE", "true")
    configuration.refresh()
    in_flow(lambda: twice(square))
    assert calls(marks) == 3


# -- damage, races, locks ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 40_000])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header"])
def test_a_damaged_result_is_made_again(
    in_flow: InFlow, record: Record, clean_environment: Path, marks: Path, size: int, damage: str
) -> None:
    @task(cache_policy=INPUTS)
    def made(n: int) -> Any:
        mark(marks)
        return np.arange(n)

    in_flow(lambda: made.submit(size).wait())
    folder = clean_environment / "storage" / "cache"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    commit = next(path for path in files if path.suffix == ".result")
    path = commit if damage == "header" else next((one for one in files if one is not commit), commit)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-9] ^= 1
    elif damage == "cut":
        del data[-3:]
    elif damage == "empty":
        data.clear()
    else:
        data[60] ^= 1
    path.write_bytes(data)
    assert in_flow(lambda: int(made.submit(size).result()[-1])) == size - 1
    assert calls(marks) == 2
    assert list(folder.rglob("*.corrupt"))
    assert any("CacheCorrupt" in line for row in record.tasks("made") for line in row.logs)
    in_flow(lambda: made.submit(size).wait())
    assert names(record, "made")[-1] == "Cached"


def test_of_many_that_make_a_result_the_first_one_counts(in_flow: InFlow, marks: Path, parallel: Any) -> None:
    @task(cache_key_fn=lambda *_: "one key", chunk_size=1)
    def draw(x: int) -> Any:
        mark(marks)
        return os.urandom(100_000)

    first = in_flow(lambda: draw.map(range(12)).result())
    again = in_flow(lambda: draw.map(range(12)).result())
    assert len(set(again)) == 1
    assert again[0] in first


def test_serializable_runs_wait_for_the_one_that_makes_it(
    in_flow: InFlow, runner: TaskRunner, marks: Path, tmp_path: Path
) -> None:
    policy = INPUTS.configure(
        lock_manager=FileSystemLockManager(tmp_path / "locks"), isolation_level=IsolationLevel.SERIALIZABLE
    )

    @task(cache_policy=policy - "number", chunk_size=1)
    def slow(x: int, number: int) -> int:
        mark(marks)
        time.sleep(0.2)  # work: the others arrive meanwhile
        return x

    assert in_flow(lambda: slow.map([1] * 6, range(6)).result()) == [1] * 6
    assert in_flow(lambda: slow(1, 9)) == 1
    assert calls(marks) == 1


def test_coroutines_of_one_loop_wait_for_each_other(runner: TaskRunner, marks: Path, tmp_path: Path) -> None:
    policy = INPUTS.configure(
        lock_manager=FileSystemLockManager(tmp_path / "locks"), isolation_level=IsolationLevel.SERIALIZABLE
    )

    @task(cache_policy=policy)
    async def slow(x: int) -> int:
        mark(marks)
        await asyncio.sleep(0.1)  # work: the others arrive meanwhile
        return x

    @flow(task_runner=runner)
    async def body() -> list[int]:
        return list(await asyncio.gather(*(slow(1) for _ in range(4))))

    assert asyncio.run(body()) == [1] * 4
    assert calls(marks) == 1


def test_what_is_found_damaged_where_it_is_needed_is_refused(
    in_flow: InFlow, apart: TaskRunner, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "READ_THROUGH", 0)  # as if the file were large

    def body() -> float:
        return halved.submit(ramp.submit(LARGE // 8)).result()

    assert in_flow(body) == SUM / 2
    (data,) = (clean_environment / "storage" / "cache").rglob("*.npy")
    content = bytearray(data.read_bytes())
    content[-9] ^= 1
    data.write_bytes(content)
    with pytest.raises(ResultCorrupt, match="was set aside"):
        in_flow(body)
    assert in_flow(body) == SUM / 2


def test_locks_that_would_not_hold_are_refused(in_flow: InFlow, runner: TaskRunner, marks: Path) -> None:
    text = "Isolation level SERIALIZABLE is not supported by provided configuration"
    with pytest.raises(ConfigurationError, match=text):
        squares(marks, cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
    policy = INPUTS.configure(isolation_level="SERIALIZABLE", lock_manager=MemoryLockManager())
    square = squares(marks, cache_policy=policy)
    if runner.info.in_process:
        assert in_flow(lambda: square.map([3, 3, 3]).result()) == [9, 9, 9]
        assert calls(marks) == 1
    else:
        with pytest.raises(ConfigurationError, match=text):
            in_flow(lambda: square.submit(3).result())


# -- places and formats ---------------------------------------------------------------------------


class Shout:
    """A serializer of a user."""

    def dumps(self, value: str) -> bytes:
        return value.upper().encode()

    def loads(self, data: bytes) -> str:
        return data.decode()


@pytest.mark.parametrize(
    "serializer", ["pickle", "json", "compressed/pickle", "compressed/json", Shout(), Shout]
)
def test_hits_come_in_every_format(in_flow: InFlow, record: Record, serializer: Any) -> None:
    given = serializer() if isinstance(serializer, type) else serializer

    @task(cache_policy=INPUTS, result_serializer=given)
    def say(x: str) -> str:
        return x

    @task
    def ask(x: str) -> str:
        return x

    in_flow(lambda: say.submit("HELLO").wait())
    assert in_flow(lambda: ask.submit(say.submit("HELLO")).result()) == "HELLO"
    assert names(record, "say") == ["Completed", "Cached"]


def test_a_result_lies_where_its_parameters_say(
    in_flow: InFlow, record: Record, clean_environment: Path, marks: Path
) -> None:
    @task(
        cache_policy=INPUTS,
        result_storage_key="{parameters[name]}-{parameters[n]:03d}",
        result_serializer="json",
    )
    def made(name: str, n: int = 7) -> int:
        mark(marks)
        return n

    @task(result_storage_key="plain/{parameters[name]}")
    def plain(name: str) -> str:
        return name

    def body() -> Any:
        plain.submit("x").wait()
        return made.submit("day/one").result(), made.map(["a", "b"], n=[1, 2]).result(), made("../../up", 3)

    assert in_flow(body) == (7, [1, 2], 3)
    assert in_flow(body) == (7, [1, 2], 3)
    assert calls(marks) == 4
    storage = clean_environment / "storage"
    found = {str(path.relative_to(storage)) for path in storage.rglob("*.result")}
    assert found == {
        "plain/x.result",
        "day_one-007.result",
        "a-001.result",
        "b-002.result",
        ".._.._up-003.result",
    }


def test_a_policy_may_bring_its_storage(in_flow: InFlow, record: Record, tmp_path: Path, marks: Path) -> None:
    square = squares(marks, cache_policy=INPUTS.configure(key_storage=tmp_path / "keys"))
    in_flow(lambda: square.submit(2).wait())
    in_flow(lambda: square.submit(2).wait())
    assert calls(marks) == 1
    assert record.tasks("square")[1].state["stored"].startswith(str(tmp_path / "keys"))


def test_a_value_need_not_stay_in_memory(in_flow: InFlow, record: Record) -> None:
    @task(persist_result=True, cache_result_in_memory=False)
    def made(n: int) -> Any:
        return np.arange(n)

    @task
    def last(x: Any) -> int:
        return int(x[-1])

    def body() -> Any:
        future = made.submit(1000)
        future.wait()
        assert future._run.ref is None
        return last.submit(future).result(), int(future.result()[-1]), future._run.value is None

    assert in_flow(body) == (999, 999, True)


@pytest.mark.parametrize("how", ["value", "state", "future"])
def test_what_a_flow_returns_need_not_stay_in_memory(runner: TaskRunner, tmp_path: Path, how: str) -> None:
    options: dict[str, Any] = {"persist_result": True, "cache_result_in_memory": False}

    @task
    def made(n: int) -> Any:
        return np.arange(n)

    @flow(task_runner=runner, result_storage=tmp_path / "results", **options)
    def top(n: int) -> Any:
        return [made.submit(n), n]

    @flow(result_storage=tmp_path / "results", **options)
    def child(n: int) -> Any:
        return {"n": n}

    @task
    def use(found: Any) -> int:
        return int(found["n"]) + 1

    @flow(task_runner=runner)
    def around() -> Any:
        future: Any = child.submit(3)
        first, second = future.result(), future.result()
        assert use.submit(future).result() == use(future) == 4
        return first, second, future._run.value

    if how == "value":
        array, n = top(1000)
        assert (int(array[-1]), n) == (999, 1000)
    elif how == "state":
        state = top(1000, return_state=True)
        assert isinstance(state.data, Stored)
        stored = Path(state.state_details["stored"])
        assert stored.is_relative_to(tmp_path / "results")
        assert [int(state.result()[0][-1]) for _ in range(2)] == [999, 999]
        assert state.result()[0] is not state.result()[0]
        stored.unlink()
        with pytest.raises(MissingResult):
            state.result()
    else:
        first, second, kept = around()
        assert first == second == {"n": 3}
        assert first is not second
        assert isinstance(kept, Stored)


def test_what_a_flow_returns_stays_where_nothing_is_stored(runner: TaskRunner) -> None:
    @flow(task_runner=runner, cache_result_in_memory=False)
    def body() -> Any:
        return {"n": 3}

    assert body(return_state=True).data == {"n": 3}
    assert body.cache_result_in_memory is False
    assert body.with_options(cache_result_in_memory=True).cache_result_in_memory is True


def test_no_caching_where_nothing_is_stored(in_flow: InFlow, marks: Path) -> None:
    with pytest.warns(UserWarning, match="Ignoring 'cache_policy' because 'persist_result' is False"):
        square = squares(marks, persist_result=False)
    in_flow(lambda: twice(square))
    assert calls(marks) == 2


def test_the_run_id_makes_keys_of_one_run(in_flow: InFlow, marks: Path) -> None:
    square = squares(marks, cache_policy=RUN_ID + INPUTS)
    for _ in range(2):
        in_flow(twice, square)
    assert calls(marks) == 2
