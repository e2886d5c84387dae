"""The whole language once more with coroutines: async tasks in flows of both kinds, and options of async flows."""

import asyncio
import functools
import os
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import (
    CancelledRun,
    CrashedRun,
    FailedRun,
    ParameterTypeError,
    Skip,
    Skipped,
    State,
    UnfinishedRun,
    allow_failure,
    allow_skipped,
    as_completed,
    branch,
    first_completed,
    flow,
    get_run_context,
    get_run_logger,
    runtime,
    tags,
    task,
    unmapped,
)
from penstock.cache_policies import INPUTS
from penstock.runners.base import TaskRunner
from tests.record import Record

Run = Callable[..., Any]


def later(body: Callable[..., Any]) -> Callable[..., Any]:
    """Make a coroutine function that does the same, after a turn of the loop."""

    @functools.wraps(body)
    async def turned(*args: Any) -> Any:
        await asyncio.sleep(0)
        return body(*args)

    return turned


def finished(value: Any) -> Any:
    """Return what the call of a flow gives, sync or async."""
    return asyncio.run(value) if asyncio.iscoroutine(value) else value


@pytest.fixture(params=["flow", "async flow"])
def run(request: pytest.FixtureRequest, runner: TaskRunner) -> Run:
    """Run a body as a flow of each kind; it must not block, so it returns futures or waits for none."""

    def call(body: Callable[..., Any], *args: Any, return_state: bool = False, **options: Any) -> Any:
        made = body if request.param == "flow" else later(body)
        options.setdefault("name", "body")
        return finished(flow(task_runner=runner, **options)(made)(*args, return_state=return_state))

    call.runner = runner  # type: ignore[attr-defined]
    return call


@task
async def add(x: int, y: int = 1) -> int:
    await asyncio.sleep(0)
    return x + y


@task
async def fail(text: str = "no data") -> int:
    await asyncio.sleep(0)
    raise ValueError(text)


@task
async def skip(why: str = "clouds") -> int:
    await asyncio.sleep(0)
    raise Skip(why)


@task
async def show(x: Any) -> str:
    await asyncio.sleep(0)
    return f"got {getattr(x, 'name', x)}"


def mark(folder: Path, name: str) -> int:
    """Leave a mark; return how many there are."""
    (folder / f"{name}-{os.urandom(8).hex()}").touch()
    return len(list(folder.glob(f"{name}-*")))


def marks(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


# -- attempts -----------------------------------------------------------------------------------------


def test_retries(run: Run, record: Record) -> None:
    @task(retries=3, retry_delay_seconds=[0, 0.01], retry_jitter_factor=0.5)
    async def fragile() -> int:
        await asyncio.sleep(0)
        if runtime.task_run.run_count < 3:
            raise OSError("not yet")
        return int(runtime.task_run.run_count)

    assert run(lambda: fragile.submit()) == 3
    assert (record.task("fragile").type, record.task("fragile").attempt) == ("COMPLETED", 3)


def test_a_condition_that_is_a_coroutine(run: Run, record: Record) -> None:
    async def condition(task: Any, task_run: Any, state: State) -> bool:
        await asyncio.sleep(0)
        return "no such" not in (state.message or "")

    once = fail.with_options(name="once", retries=2, retry_condition_fn=condition)

    def body() -> None:
        once.submit("no such file")
        once.submit("timed out")

    run(body)
    assert record.types("once") == ["FAILED", "FAILED"]
    assert sorted(row.attempt for row in record.tasks("once")) == [1, 3]


@pytest.mark.timeout(90, func_only=True)
def test_a_worker_that_dies(apart: TaskRunner, run: Run, record: Record, tmp_path: Path) -> None:
    @task
    async def deadly() -> str:
        await asyncio.sleep(0)
        if mark(tmp_path, "began") == 1:
            os._exit(3)
        return "survived"

    assert run(lambda: deadly.submit()) == "survived"
    assert record.task("deadly").attempt == 2


def test_time_out(run: Run, record: Record) -> None:
    @task(timeout_seconds=0.2)
    async def slow() -> None:
        await asyncio.sleep(30)

    def body() -> Any:
        first = slow.submit()
        states = [slow.submit(return_state=True), show.submit(first, return_state=True)]
        return {"states": states, "independent": show.submit(1)}

    found = run(body)
    (timed_out, never), independent = found["states"], found["independent"]
    assert (timed_out.type, timed_out.name) == ("FAILED", "TimedOut")
    assert never.name == "NotReady"
    assert independent == "got 1"


# -- hooks, names, logs -------------------------------------------------------------------------------


def test_hooks(run: Run) -> None:
    seen: list[tuple[str, str]] = []

    async def noted(task: Any, task_run: Any, state: State) -> None:
        await asyncio.sleep(0)
        seen.append((task_run.name.partition("-")[0], state.name))

    every: dict[str, Any] = {name: [noted] for name in ("on_completion", "on_failure", "on_skipped")}
    hooked = [one.with_options(**every, task_run_name=f"{one.name}-") for one in (add, fail, skip)]

    def body() -> None:
        for one, argument in zip(hooked, (1, "text", "why"), strict=True):
            one.submit(argument)

    run(body)
    assert sorted(seen) == [("add", "Completed"), ("fail", "Failed"), ("skip", "Skipped")]


@pytest.mark.parametrize("end", ["completed", "failed", "skipped"])
def test_hooks_of_async_flows(runner: TaskRunner, end: str) -> None:
    seen: list[str] = []

    def hook(name: str) -> Any:
        async def noted(flow: Any, flow_run: Any, state: State) -> None:
            await asyncio.sleep(0)
            seen.append(f"{name} {state.name}")

        return noted

    names = ("on_running", "on_completion", "on_failure", "on_skipped", "on_crashed", "on_cancellation")
    hooks: dict[str, Any] = {name: [hook(name)] for name in names}

    @flow(task_runner=runner, **hooks)
    async def body() -> int:
        await add.submit(1)
        if end == "failed":
            raise ValueError("no")
        if end == "skipped":
            raise Skip("nothing to do")
        return 1

    finished(body(return_state=True))
    last = {
        "completed": "on_completion Completed",
        "failed": "on_failure Failed",
        "skipped": "on_skipped Skipped",
    }
    assert seen == ["on_running Running", last[end]]


def test_names(run: Run, record: Record) -> None:
    named = add.with_options(task_run_name="add-{x}-to-{y:03d}")

    def body(day: int) -> Any:
        first = named.submit(day)
        return [first, named.submit(first, y=2), *named.map([5, 6])]

    assert run(body, 4, flow_run_name="of-{day}") == [5, 7, 6, 7]
    assert record.flow().name == "of-4"
    assert sorted(renamed(record, "add")) == ["add-4-to-001", "add-5-to-001", "add-5-to-002", "add-6-to-001"]


def renamed(record: Record, task_name: str) -> list[str]:
    """Names of the runs of a task, with those that workers have made."""
    found = {row.id: row.name for row in record.tasks(task_name)}
    for event in record.events:
        if event.kind == "named" and event.run in found:
            found[event.run] = event.body["name"]
    return list(found.values())


def test_prints_and_loggers(run: Run, record: Record) -> None:
    @task
    async def talk(text: str) -> None:
        print("hello", text)
        await asyncio.sleep(0)
        get_run_logger().warning("and %s", text)

    def body() -> None:
        print("from the flow")
        talk.submit("you")
        talk.map(["a", "b"])

    run(body, log_prints=True)
    assert record.flow().logs == ["from the flow"]
    assert sorted(row.logs for row in record.tasks("talk")) == [
        ["hello a", "and a"],
        ["hello b", "and b"],
        ["hello you", "and you"],
    ]


def test_where_am_i(run: Run, record: Record) -> None:
    @task
    async def where(x: int) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        context: Any = get_run_context()
        assert isinstance(runtime.task_run.seed, int)
        return context.task_run.id, context.parameters, runtime.flow_run.name, sorted(runtime.task_run.tags)

    def body() -> Any:
        with tags("night"):
            return where.submit(3)

    run_id, parameters, flow_run_name, found_tags = run(body, flow_run_name="here")
    assert run_id == record.task("where").id
    assert parameters == {"x": 3}
    assert flow_run_name == "here"
    assert found_tags == ["night"]


# -- results ------------------------------------------------------------------------------------------


def test_a_cached_result(run: Run, record: Record, tmp_path: Path) -> None:
    @task(cache_policy=INPUTS, result_storage=str(tmp_path / "results"))
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        mark(tmp_path, "call")
        return 10 * x

    assert [run(lambda: [work.submit(1), *work.map([2, 2])]) for _ in range(2)] == [[10, 20, 20]] * 2
    first = [row.state["name"] for row in record.tasks("work")]
    assert first[3:] == ["Cached"] * 3
    assert marks(tmp_path, "call") <= 3


def test_a_cached_direct_call(runner: TaskRunner, record: Record, tmp_path: Path) -> None:
    @task(cache_policy=INPUTS, result_storage=str(tmp_path / "results"))
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return 10 * x + mark(tmp_path, "call")

    @flow(task_runner=runner)
    async def body() -> list[int]:
        return [await work(1), await work(1), await work.submit(1)]

    assert finished(body()) == [11, 11, 11]
    assert [row.state["name"] for row in record.tasks("work")] == ["Completed", "Cached", "Cached"]


def test_stored_results_and_arrays(run: Run, tmp_path: Path) -> None:
    @task(persist_result=True, result_storage=str(tmp_path / "results"))
    async def double(a: Any) -> Any:
        await asyncio.sleep(0)
        assert not a.flags.writeable
        return 2 * a

    state = run(lambda: double.submit(double.submit(np.arange(300_000.0)), return_state=True))
    np.testing.assert_array_equal(state.result(), 4 * np.arange(300_000.0))
    assert state.state_details["stored"]


# -- maps and order -----------------------------------------------------------------------------------


def test_maps(run: Run, record: Record) -> None:
    def body() -> Any:
        first = add.map(range(40), y=unmapped(10))
        return add.map(first, range(40))

    assert run(body) == [10 + 2 * x for x in range(40)]
    assert set(record.types("add")) == {"COMPLETED"}
    assert len(record.types("add")) == 80


def test_elements_that_fail_are_skipped_or_retried(run: Run, record: Record) -> None:
    @task(retries=1)
    async def odd(x: int) -> int:
        await asyncio.sleep(0)
        if x == 3 and runtime.task_run.run_count < 2:
            raise OSError("not yet")
        if x == 4:
            raise Skip("even")
        if x == 5:
            raise ValueError("five")
        return x

    states = run(lambda: {"states": odd.map(range(7), return_state=True)})["states"]
    assert [state.type for state in states] == [*["COMPLETED"] * 4, "SKIPPED", "FAILED", "COMPLETED"]
    assert [row.attempt for row in record.tasks("odd")] == [1, 1, 1, 2, 1, 2, 1]


def test_wait_for(run: Run, tmp_path: Path) -> None:
    @task
    async def write(seconds: float) -> None:
        await asyncio.sleep(seconds)
        mark(tmp_path, "written")

    @task
    async def read() -> int:
        await asyncio.sleep(0)
        return marks(tmp_path, "written")

    assert run(lambda: read.submit(wait_for=[write.submit(0.1), [write.submit(0.05)]])) == 2


def test_the_first_one_wins(parallel: TaskRunner, record: Record) -> None:
    @task
    async def after(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @flow(task_runner=parallel)
    def body() -> Any:
        futures = [after.submit(seconds) for seconds in (30, 0.01)]
        winner = first_completed(futures, cancel_rest=True)
        futures[0].wait(15)
        return winner.result(), futures[0].state

    seconds, other = body()
    assert seconds == 0.01
    assert other.is_cancelled()
    assert sorted(record.types("after")) == ["CANCELLED", "COMPLETED"]


def test_as_they_complete(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    async def body() -> list[int]:
        futures = [add.submit(x) for x in range(4)]
        found = [await future async for future in as_completed([*futures, futures[0]])]
        return sorted(found)

    assert finished(body()) == [1, 2, 3, 4]


def test_cancel(parallel: TaskRunner, record: Record, tmp_path: Path, wait_until: Any) -> None:
    @task
    async def wait_long(path: Path) -> None:
        path.touch()
        await asyncio.sleep(30)

    @flow(task_runner=parallel)
    async def body() -> Any:
        future = wait_long.submit(tmp_path / "began")
        never = show.submit(future)
        await asyncio.to_thread(wait_until, (tmp_path / "began").exists, 20.0)
        assert future.cancel()
        with pytest.raises(CancelledRun):
            await future
        with pytest.raises(UnfinishedRun):
            await never
        return await add.submit(1)

    assert finished(body()) == 2
    assert record.task("wait_long").type == "CANCELLED"
    assert record.task("show").state["name"] == "NotReady"


def test_a_coroutine_cleans_up(parallel: TaskRunner, tmp_path: Path, wait_until: Any) -> None:
    @task
    async def careful(folder: Path) -> None:
        try:
            (folder / "began").touch()
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)
            (folder / "cleaned").touch()

    @flow(task_runner=parallel)
    def body() -> Any:
        future = careful.submit(tmp_path)
        wait_until((tmp_path / "began").exists, 20.0)
        future.cancel()
        future.wait(20)
        return {"state": future.state, "next": add.submit(1)}

    found = body()
    assert found["state"].is_cancelled()
    assert found["next"] == 2
    wait_until((tmp_path / "cleaned").exists)


# -- skips, branches, failures ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raised", "returned", "asked before"])
def test_skips(run: Run, record: Record, how: str) -> None:
    @task
    async def returned(why: str) -> State:
        await asyncio.sleep(0)
        return Skipped(why)

    asked = add.with_options(name="asked", skip_if=lambda parameters: "clouds")
    one: Any = {"raised": (skip, "clouds"), "returned": (returned, "clouds"), "asked before": (asked, 1)}[how]

    def body() -> Any:
        skipped = one[0].submit(one[1])
        return [
            show.submit(skipped, return_state=True),
            show.with_options(on_skip="none").submit(skipped),
            show.with_options(on_skip="run").submit(skipped),
            show.submit(allow_skipped(skipped)),
        ]

    state, *values = run(body, return_state=True).result()
    assert state.is_skipped()
    assert "clouds" in state.message
    assert values == ["got None", "got Skipped", "got None"]
    assert record.types("show") == ["SKIPPED", *["COMPLETED"] * 3]


def test_an_async_flow_skips_itself(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    async def body() -> int:
        await asyncio.sleep(0)
        raise Skip("nothing new")

    assert finished(body()) is None
    assert record.flow().state["message"] == "nothing new"
    assert record.flow().type == "SKIPPED"


@pytest.mark.parametrize("kind", ["flow", "async flow"])
@pytest.mark.parametrize("x", [1, -1])
def test_branches(runner: TaskRunner, record: Record, x: int, kind: str) -> None:
    @task
    async def check(x: int) -> bool:
        await asyncio.sleep(0)
        return x > 0

    @task
    async def good() -> str:
        await asyncio.sleep(0)
        return "good"

    @task
    async def bad() -> str:
        await asyncio.sleep(0)
        return "bad"

    @flow(task_runner=runner)
    def waits() -> Any:
        return branch(check.submit(x), then=good, else_=bad)

    @flow(task_runner=runner)
    async def awaits() -> Any:
        return await branch(await check.submit(x), then=good, else_=bad)

    taken, other = ("good", "bad") if x > 0 else ("bad", "good")
    assert finished((waits if kind == "flow" else awaits)()) == taken
    assert (record.task(taken).type, record.task(other).type) == ("COMPLETED", "SKIPPED")


def test_failures_go_on(run: Run, record: Record) -> None:
    def body() -> Any:
        failed = fail.submit()
        never = [
            show.submit(failed, return_state=True),
            show.submit("x", wait_for=[failed], return_state=True),
        ]
        return {
            "never": never,
            "alone": show.submit(allow_failure(failed)),
            "inside": show.submit([1, allow_failure(failed)]),
            "after": show.submit("x", wait_for=[allow_failure(failed)]),
        }

    found = run(body)
    assert [state.name for state in found["never"]] == ["NotReady", "NotReady"]
    assert (found["alone"], found["after"]) == ("got no data", "got x")
    assert "no data" in found["inside"]


def test_the_lines_of_the_user(run: Run) -> None:
    @task
    async def inner(a: Any) -> None:
        await asyncio.sleep(0)
        await deeper(a)

    async def deeper(a: Any) -> None:
        raise KeyError("spectral window")

    error = run(lambda: inner.submit(np.zeros((2, 3))), return_state=True).result(raise_on_failure=False)
    assert isinstance(error, KeyError)
    frames = traceback.extract_tb(error.__traceback__)
    assert [frame.name for frame in frames if frame.filename == __file__][-2:] == ["inner", "deeper"]
    assert any("a: ndarray(2, 3) float64" in note for note in error.__notes__)


def test_what_returned_futures_say(run: Run) -> None:
    state = run(lambda: [add.submit(1), fail.submit(), fail.submit()], return_state=True)
    assert (state.type, state.message) == ("FAILED", "2/3 states failed.")
    with pytest.raises(ValueError, match="no data"):
        state.result()
    state = run(lambda: (add.submit(1), {"b": add.submit(2)}), return_state=True)
    assert (state.type, state.message) == ("COMPLETED", "All states completed.")
    assert state.result() == (2, {"b": 3})


# -- flows --------------------------------------------------------------------------------------------


def test_states_of_async_flows_and_tasks(runner: TaskRunner) -> None:
    @flow(task_runner=runner)
    async def child(x: int) -> int:
        return await add(x)

    @flow(task_runner=runner)
    async def body() -> Any:
        some: tuple[Any, ...] = (add, fail, child)
        direct = await some[0](1, return_state=True)
        failed = await some[1](return_state=True)
        inner = await some[2](5, return_state=True)
        assert failed.is_failed()
        return direct.result(), inner.result()

    assert finished(body(return_state=True)).result() == (2, 6)


def test_parameters_of_async_flows(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    async def body(x: int, names: list[str]) -> Any:
        return x, names

    given: Any = body
    assert finished(given("3", ("a", "b"))) == (3, ["a", "b"])
    with pytest.raises(ParameterTypeError):
        finished(given("three", []))
    assert [row.type for row in record.flows()] == ["COMPLETED", "FAILED"]


def test_retries_of_async_flows(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, retries=2, retry_delay_seconds=0)
    async def body() -> int:
        count = int(runtime.flow_run.run_count)
        await add.submit(count)
        if count < 3:
            raise OSError("not yet")
        return count

    assert finished(body()) == 3
    assert (record.flow().type, record.flow().attempt) == ("COMPLETED", 3)


def test_async_flows_beside_one_another(runner: TaskRunner, record: Record) -> None:
    @flow
    async def child(x: int) -> int:
        return await add.submit(x)

    @flow(task_runner=runner)
    async def body() -> Any:
        return [await child.submit(1), child.submit(2), *child.map([3, 4])]

    assert finished(body()) == [2, 3, 4, 5]
    assert [row.type for row in record.flows()] == ["COMPLETED"] * 5


def test_an_async_flow_that_cancels_what_is_left(
    parallel: TaskRunner, record: Record, tmp_path: Path
) -> None:
    @task
    async def wait_long() -> None:
        await asyncio.sleep(30)

    @flow(task_runner=parallel, on_exit="cancel")
    async def body() -> int:
        wait_long.submit()
        return await add.submit(1)

    assert finished(body()) == 2
    assert record.task("wait_long").type == "CANCELLED"


def test_async_generators(run: Run, runner: TaskRunner, record: Record) -> None:
    @task
    async def count(n: int) -> AsyncIterator[int]:
        for x in range(n):
            await asyncio.sleep(0)
            yield x

    assert run(lambda: [count.submit(3), show.submit(count.submit(2))]) == [[0, 1, 2], "got [0, 1]"]
    assert record.types("count") == ["COMPLETED"] * 2

    @flow(task_runner=runner)
    async def body() -> list[int]:
        return [x async for x in count(3)]

    assert finished(body()) == [0, 1, 2]


def test_tasks_in_async_tasks(run: Run, record: Record) -> None:
    @task
    async def outer(x: int) -> Any:
        futures = [add.submit(x), add.submit(x + 1)]
        found = await asyncio.gather(*(_value(future) for future in futures))
        return [*found, await add(x), add.submit(100)]

    assert run(lambda: outer.submit(1)) == [2, 3, 2, 101]
    assert record.types("add") == ["COMPLETED"] * 4


async def _value(future: Any) -> Any:
    return await future


def test_kinds_of_async_tasks(runner: TaskRunner, record: Record) -> None:
    class Adder:
        def __init__(self, y: int) -> None:
            self.y = y

        async def __call__(self, x: int) -> int:
            await asyncio.sleep(0)
            return x + self.y

        @task
        async def method(self, x: int) -> int:
            await asyncio.sleep(0)
            return x + self.y

        @task
        @classmethod
        async def of_class(cls, x: int) -> str:
            await asyncio.sleep(0)
            return f"{cls.__name__} {x}"

        @task
        @staticmethod
        async def static(x: int) -> int:
            await asyncio.sleep(0)
            return x

    some: list[Any] = [
        task(Adder(1)),
        task(functools.partial(add.fn, y=10)),
        Adder(100).method,
        Adder.of_class,
        Adder.static,
    ]

    @flow(task_runner=runner)
    async def body() -> Any:
        direct = [await one(1) for one in some]
        return direct, [one.submit(1) for one in some], [one.map([1])[0] for one in some]

    assert finished(body()) == ([2, 11, 101, "Adder 1", 1],) * 3
    assert record.types() == ["COMPLETED"] * 15


def test_maps_over_values_that_lie_elsewhere(run: Run) -> None:
    @task
    async def many(n: int) -> list[int]:
        await asyncio.sleep(0)
        return list(range(n))

    def body() -> Any:
        return add.map(x for x in range(5)), add.map(add.map([1, 2]), y=unmapped(add.submit(3)))

    assert run(body) == ([1, 2, 3, 4, 5], [6, 7])

    @flow(task_runner=run.runner)  # type: ignore[attr-defined] # set by the fixture
    async def awaits() -> Any:
        return add.map(await many.submit(3)), add.map(await many(2))

    assert finished(awaits()) == ([1, 2, 3], [1, 2])


@pytest.mark.parametrize("inputs", ["readonly", "copy"])
def test_what_arrays_are_to_a_coroutine(run: Run, inputs: Any) -> None:
    @task(inputs=inputs)
    async def write(a: Any) -> Any:
        await asyncio.sleep(0)
        a[0] = 7
        return a

    @task
    async def make() -> Any:
        await asyncio.sleep(0)
        return np.zeros(200_000)

    state = run(lambda: write.submit(make.submit()), return_state=True)
    if inputs == "copy":
        assert state.result()[0] == 7
    else:
        with pytest.raises(ValueError, match="read-only"):
            state.result()


def test_combined_by_a_coroutine(runner: TaskRunner) -> None:
    async def both(parts: list[int]) -> int:
        await asyncio.sleep(0)
        return sum(parts)

    @flow(task_runner=runner)
    async def body() -> Any:
        return await add.map(range(20)).reduce(both, fanin=4, order="index")

    assert finished(body()) == sum(range(1, 21))


def test_a_failed_state_made_by_hand(run: Run, record: Record) -> None:
    @task(retries=1)
    async def by_hand() -> State:
        await asyncio.sleep(0)
        from penstock import Failed

        return Failed(message="by hand")

    state = run(lambda: by_hand.submit(return_state=True), return_state=True)
    assert state.is_failed()
    with pytest.raises(FailedRun, match="by hand"):
        state.result()
    assert record.task("by_hand").attempt == 2


# -- what remains of the options ----------------------------------------------------------------------


def test_on_running(run: Run) -> None:
    seen: list[tuple[str, str]] = []

    async def note(which: Any, task_run: Any, state: State) -> None:
        await asyncio.sleep(0)
        seen.append((which.name, state.name))

    @task(on_running=[note], on_completion=[note])
    async def observe() -> int:
        await asyncio.sleep(0)
        return 1

    assert run(lambda: observe.submit()) == 1
    assert seen == [("observe", "Running"), ("observe", "Completed")]


def test_cached_results_expire_and_are_refreshed(run: Run, tmp_path: Path) -> None:
    @task(cache_policy=INPUTS, result_storage=str(tmp_path / "results"), cache_expiration=3600)
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return 10 * x + mark(tmp_path, "call")

    assert [run(lambda: work.submit(1)) for _ in range(2)] == [11, 11]
    assert run(lambda: work.with_options(refresh_cache=True).submit(1)) == 12
    assert run(lambda: work.submit(1)) == 12
    assert run(lambda: work.with_options(cache_expiration=1e-9).submit(1)) in (
        12,
        13,
    )  # of what is stored from now on
    assert run(lambda: work.with_options(refresh_cache=True, cache_expiration=1e-9).submit(1)) > 12
    count = marks(tmp_path, "call")
    assert run(lambda: work.submit(1)) == 10 + count + 1


def test_on_exit_detach(parallel: TaskRunner, record: Record, tmp_path: Path, wait_until: Any) -> None:
    @task
    async def nap(seconds: float) -> None:
        await asyncio.sleep(seconds)  # work: it goes on after the flow
        mark(tmp_path, "nap")

    @flow(task_runner=parallel, on_exit="detach")
    async def night() -> Any:
        nap.submit(0.5)
        return add.submit(1)

    assert finished(night()) == 2
    assert record.flow().type == "COMPLETED"
    wait_until(lambda: marks(tmp_path, "nap") == 1, 20)
    wait_until(lambda: record.types("nap") == ["COMPLETED"], 20)


def test_a_task_that_must_not_run_twice(apart: TaskRunner, run: Run, tmp_path: Path) -> None:
    @task(idempotent=False, crash_retries=5)
    async def die() -> None:
        await asyncio.sleep(0)
        mark(tmp_path, "death")
        os._exit(3)

    with pytest.raises(CrashedRun):
        run(lambda: die.submit())
    assert marks(tmp_path, "death") == 1


def test_where_a_task_runs(run: Run) -> None:
    """Options of placement that every runner takes."""

    @task(threads=1, priority=3)
    async def here() -> int:
        await asyncio.sleep(0)
        return os.getpid()

    pid = run(lambda: here.submit())
    assert (pid == os.getpid()) == run.runner.info.in_process  # type: ignore[attr-defined]
