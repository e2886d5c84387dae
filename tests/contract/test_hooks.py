"""Hooks: called in the driver, in order, before a run counts as done for whoever waits."""

import asyncio
import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from penstock import CancelledRun, Skip, flow, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record

Seen = list[tuple[Any, ...]]


def noting(seen: Seen, what: str) -> Any:
    """Make a hook that writes down when it was called with what, and in which process."""

    def hook(thing: Any, run: Any, state: Any) -> None:
        seen.append((what, thing.name, run.name, str(state.type.value), state.name, os.getpid()))

    return hook


def all_hooks(seen: Seen) -> dict[str, Any]:
    kinds = ("on_completion", "on_failure", "on_running", "on_skipped")
    return {kind: [noting(seen, kind)] for kind in kinds}


@task
def work(x: Any = 0) -> Any:
    if x == "fail":
        raise ValueError("as asked")
    if x == "skip":
        raise Skip("as asked")
    return x


def shown(seen: Seen) -> list[tuple[Any, ...]]:
    return [(what, kind) for what, _, _, kind, _, _ in seen]


@pytest.mark.parametrize("how", ["submit", "call"])
@pytest.mark.parametrize(
    ("argument", "last"),
    [
        (1, ("on_completion", "COMPLETED")),
        ("fail", ("on_failure", "FAILED")),
        ("skip", ("on_skipped", "SKIPPED")),
    ],
)
def test_each_end_has_its_hook(in_flow: InFlow, how: str, argument: Any, last: tuple[str, str]) -> None:
    seen: Seen = []
    hooked = work.with_options(**all_hooks(seen))

    def body() -> None:
        if how == "submit":
            future = hooked.submit(argument)
            future.wait()
            assert future.done()
        else:
            hooked(argument, return_state=True)
        assert shown(seen) == [("on_running", "RUNNING"), last]

    in_flow(body)
    assert {entry[1:3] for entry in seen} == {("work", "work")}
    assert {entry[-1] for entry in seen} == {os.getpid()}


def test_results_and_callbacks_come_after_the_hooks(in_flow: InFlow) -> None:
    gate, seen = threading.Event(), []

    def slow(thing: Any, run: Any, state: Any) -> None:
        gate.wait(20)
        seen.append("hook")

    def body() -> Any:
        future = work.with_options(on_completion=[slow]).submit(5)
        future.add_done_callback(lambda one: seen.append("callback"))
        dependant = work.submit(future)
        assert dependant.result() == 5  # a dependant does not wait for the hooks of what it needs
        assert not future.done()
        future.wait(0.05)
        assert not future.done()
        with pytest.raises(TimeoutError):
            future.result(timeout=0.05)
        gate.set()
        assert future.result() == 5
        return seen[:1]

    assert in_flow(body) == ["hook"]
    assert seen == ["hook", "callback"]


def test_the_end_of_a_flow_waits_for_the_hooks(in_flow: InFlow, record: Record) -> None:
    seen, types = [], []

    def slow(thing: Any, run: Any, state: Any) -> None:
        threading.Event().wait(0.3)  # work: of the hook
        types.append(record.flow().type)
        seen.append(run.name)

    def body() -> None:
        work.with_options(on_completion=[slow]).submit(1)

    in_flow(body)
    assert (seen, types) == (["work"], ["RUNNING"])


def test_every_element_of_a_map_has_its_hooks(in_flow: InFlow) -> None:
    seen: Seen = []
    hooked = work.with_options(**all_hooks(seen))

    def body() -> Any:
        hooked.map([1, 2, "fail", 3, "skip"]).wait()
        return len(seen)

    assert in_flow(body) == 10
    assert sorted(entry[2] for entry in seen if entry[0] == "on_completion") == ["work-0", "work-1", "work-3"]
    assert [entry[2] for entry in seen if entry[0] == "on_failure"] == ["work-2"]
    assert [entry[2] for entry in seen if entry[0] == "on_skipped"] == ["work-4"]
    for name in ("work-0", "work-2", "work-4"):  # in order for each run
        assert next(entry[0] for entry in seen if entry[2] == name) == "on_running"


def test_retries_run_on_running_again_and_on_failure_once(in_flow: InFlow) -> None:
    seen: Seen = []
    hooked = work.with_options(retries=2, retry_delay_seconds=[0, 0.02], **all_hooks(seen))
    in_flow(lambda: hooked.submit("fail").wait())
    assert [entry[0] for entry in seen] == ["on_running"] * 3 + ["on_failure"]
    seen.clear()

    def body() -> None:
        hooked("fail", return_state=True)

    in_flow(body)
    assert [entry[0] for entry in seen] == ["on_running"] * 3 + ["on_failure"]


class Caller:
    """A hook that is an object."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __call__(self, thing: Any, run: Any, state: Any) -> None:
        self.seen.append("object")

    def method(self, thing: Any, run: Any, state: Any) -> None:
        self.seen.append("method")


@pytest.mark.parametrize("how", ["submit", "call"])
def test_hooks_of_any_kind_in_their_order(in_flow: InFlow, record: Record, how: str) -> None:
    seen: list[str] = []

    def named(word: str, thing: Any, run: Any, state: Any, extra: str = "!") -> None:
        seen.append(word + extra)

    async def awaited(thing: Any, run: Any, state: Any) -> None:
        await asyncio.sleep(0)
        seen.append("async")

    def broken(thing: Any, run: Any, state: Any) -> None:
        raise OSError("no mail")

    caller = Caller(seen)
    hooks: list[Any] = [functools.partial(named, "partial"), broken, awaited, caller, caller.method]
    hooked = work.with_options(on_completion=hooks)
    in_flow(lambda: hooked.submit(1).wait() if how == "submit" else hooked(1))
    assert seen == ["partial!", "async", "object", "method"]
    assert [line for line in record.task("work").logs if "no mail" in line] == [
        "hook 'test_hooks_of_any_kind_in_their_order.<locals>.broken' raised OSError: no mail"
    ]


def test_hooks_as_decorators(in_flow: InFlow, runner: TaskRunner) -> None:
    seen = []

    @task
    def fragile(x: int) -> float:
        return 1 / x

    @fragile.on_completion
    def well(thing: Any, run: Any, state: Any) -> None:
        seen.append(("well", run.run_count))

    @fragile.on_failure
    async def badly(thing: Any, run: Any, state: Any) -> None:
        seen.append(("badly", type(state.result(raise_on_failure=False)).__name__))

    assert callable(well)
    assert len(fragile.options.hooks.on_failure) == 1

    def body() -> None:
        fragile.submit(1).wait()
        fragile.submit(0).wait()

    in_flow(body)
    assert sorted(seen) == [("badly", "ZeroDivisionError"), ("well", 1)]


def test_async_tasks_and_flows(runner: TaskRunner) -> None:
    seen: list[Any] = []

    async def noted(thing: Any, run: Any, state: Any) -> None:
        await asyncio.sleep(0.01)
        seen.append((thing.name, state.name))

    def plain(thing: Any, run: Any, state: Any) -> None:
        seen.append((thing.name, "plain"))

    @task(on_completion=[noted])
    async def child(x: int) -> int:
        return x

    @flow(task_runner=runner, on_completion=[noted, plain], on_running=[plain])
    async def parent() -> list[int]:
        future = child.submit(1)
        first = await future
        assert seen[1:] == [("child", "Completed")]
        second = await child(2)
        assert seen[2:] == [("child", "Completed")]
        return [first, second]

    assert asyncio.run(parent()) == [1, 2]
    assert seen[:1] == [("parent", "plain")]
    assert seen[3:] == [("parent", "Completed"), ("parent", "plain")]


def test_a_skipped_upstream_skips_with_hooks(in_flow: InFlow) -> None:
    seen: Seen = []
    hooked = work.with_options(**all_hooks(seen))
    in_flow(lambda: hooked.submit(work.submit("skip")).wait())
    assert shown(seen) == [("on_skipped", "SKIPPED")]


def test_a_run_that_never_starts_has_no_hooks(in_flow: InFlow) -> None:
    seen: Seen = []
    hooked = work.with_options(**all_hooks(seen))
    in_flow(lambda: hooked.submit(work.submit("fail")).wait())
    assert seen == []


def test_hooks_may_submit_tasks(in_flow: InFlow, record: Record) -> None:
    seen = []

    def more(thing: Any, run: Any, state: Any) -> None:
        seen.append(
            work.with_options(name="more", on_completion=[noting(deeper, "deeper")]).submit(7).result()
        )

    deeper: Seen = []
    in_flow(lambda: work.with_options(on_completion=[more]).map(range(12)) and None)
    assert seen == [7] * 12
    assert len(deeper) == 12
    assert {row.type for row in record.tasks("more")} == {"COMPLETED"}


# ------------------------------------------------------------------------------------------------ flows


def flow_hooks(seen: Seen) -> dict[str, Any]:
    kinds = ("on_completion", "on_failure", "on_cancellation", "on_crashed", "on_running", "on_skipped")
    return {kind: [noting(seen, kind)] for kind in kinds}


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (None, ("on_completion", "COMPLETED")),
        (ValueError, ("on_failure", "FAILED")),
        (KeyboardInterrupt, ("on_crashed", "CRASHED")),
        (Skip, ("on_skipped", "SKIPPED")),
    ],
)
def test_each_end_of_a_flow_has_its_hook(runner: TaskRunner, error: Any, last: tuple[str, str]) -> None:
    seen: Seen = []

    @flow(task_runner=runner, **flow_hooks(seen))
    def ends() -> None:
        work.submit(1)
        if error is not None:
            raise error

    try:
        ends(return_state=True)
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert shown(seen) == [("on_running", "RUNNING"), last]


def test_a_cancelled_flow(runner: TaskRunner) -> None:
    seen: Seen = []

    @flow(task_runner=runner)
    def ends() -> Any:
        future = work.submit(1)
        future.wait()
        return [_cancelled()]

    @ends.on_cancellation
    def cancelled(thing: Any, run: Any, state: Any) -> None:
        seen.append((thing.name, state.message))

    with pytest.raises(CancelledRun):
        ends()
    assert seen == [("ends", "1/1 states cancelled.")]


def _cancelled() -> Any:
    from penstock import State, StateType

    return State(StateType.CANCELLED, message="somebody asked")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_flow_that_is_cancelled_before_it_begins(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, kind: str
) -> None:
    seen: list[Any] = []

    def noted(thing: Any, run: Any, state: Any) -> None:
        row = next(row for row in record.flows() if row.id == run.id)
        seen.append((thing.name, state.message, row.type))

    async def noted_later(thing: Any, run: Any, state: Any) -> None:
        await asyncio.sleep(0.01)
        seen.append((thing.name, await work.submit("from a hook")))

    async def code(x: int) -> None:
        seen.append("begun")

    body_of = code if kind == "async" else lambda x: seen.append("begun")
    late = flow(name="late", on_cancellation=[noted, noted_later], on_completion=[noted])(body_of)

    def body() -> None:
        upstream = hold.submit(tmp_path / "go on")
        future: Any = late.submit(1, wait_for=[upstream])
        assert future.cancel()
        with pytest.raises(CancelledRun):
            future.result(timeout=20)
        assert len(seen) == 2
        (tmp_path / "go on").touch()
        upstream.wait(20)

    in_flow(body)
    assert seen == [("late", "Cancelled before it started.", "PENDING"), ("late", "from a hook")]
    row = next(row for row in record.flows() if row.task == "late")
    assert row.names == ["Pending", "Cancelled"]


def test_many_flows_that_are_cancelled_before_they_begin(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path
) -> None:
    seen: list[str] = []

    def noted(thing: Any, run: Any, state: Any) -> None:
        seen.append(run.id)

    @flow(on_cancellation=[noted])
    def late(x: int) -> None:
        pass

    def body() -> None:
        upstream = hold.submit(tmp_path / "go on")
        futures: Any = late.map(range(40), wait_for=[upstream])
        futures.cancel()
        futures.wait(20)
        assert all(future.cancelled() for future in futures)
        (tmp_path / "go on").touch()

    in_flow(body)
    assert sorted(seen) == sorted(row.id for row in record.flows() if row.task == "late")
    assert len(seen) == 40


@task
def hold(gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.01)  # work: until the test lets it go


def test_hooks_of_a_flow_end_before_its_state_is_recorded(runner: TaskRunner, record: Record) -> None:
    types = []

    @flow(task_runner=runner)
    def parent() -> int:
        return child()

    @flow(on_completion=[lambda thing, run, state: types.append(record.flows()[-1].type)])
    def child() -> int:
        return 3

    assert parent() == 3
    assert types == ["RUNNING"]
    assert [row.type for row in record.flows()] == ["COMPLETED"] * 2


def test_a_flow_hook_that_fails(runner: TaskRunner, record: Record, tmp_path: Path) -> None:
    def broken(thing: Any, run: Any, state: Any) -> None:
        raise OSError("no mail")

    marker = tmp_path / "marker"

    @flow(task_runner=runner, on_completion=[broken, lambda *_: marker.touch()])
    def goes_on() -> int:
        return 1

    assert goes_on() == 1
    assert marker.exists()
    assert any("OSError: no mail" in line for line in record.flow().logs)


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["on_completion", "on_failure", "on_running", "on_skipped"])
def test_what_is_no_list_of_hooks(kind: str) -> None:
    decorators: list[tuple[str, Any]] = [("task", task), ("flow", flow)]
    for owner, decorator in decorators:
        example = f"@{owner}({kind}=[hook1, hook2])\ndef my_{owner}():\n\tpass"
        with pytest.raises(TypeError) as caught:
            decorator(**{kind: lambda *_: None})(lambda: None)
        assert str(caught.value) == (
            f"Expected iterable for '{kind}'; got function instead. Please provide a list of hooks to "
            f"'{kind}':\n\n{example}"
        )
        with pytest.raises(TypeError) as caught:
            decorator(**{kind: ["test"]})(lambda: None)
        assert str(caught.value) == (
            f"Expected callables in '{kind}'; got str instead. Please provide a list of hooks to "
            f"'{kind}':\n\n{example}"
        )


def test_hooks_that_are_coroutines_leave_no_loop_open(in_flow: InFlow, wait_until: Any) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def hook(_task: Any, _run: Any, _state: Any) -> None:
        loops.append(asyncio.get_running_loop())

    @task(on_completion=[hook])
    def noted(x: int) -> int:
        return x

    assert in_flow(lambda: noted.map([1, 2, 3]).result()) == [1, 2, 3]
    assert len(loops) == 3
    wait_until(lambda: all(loop.is_closed() for loop in loops))
