"""What code knows of its own run: contexts and `penstock.runtime`, in flows, tasks and everything nested."""

import datetime as dt
import pickle
from typing import Any

import pytest

from penstock import (
    FlowRunContext,
    MissingContextError,
    TaskRunContext,
    flow,
    get_run_context,
    get_run_logger,
    runtime,
    tags,
    task,
)
from penstock.context import FlowRunContext as SameContext
from penstock.engine.luggage import Luggage
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


def seen() -> dict[str, Any]:
    """Everything that runtime tells here."""
    return {
        "flow": {name: getattr(runtime.flow_run, name) for name in dir(runtime.flow_run)},
        "task": {name: getattr(runtime.task_run, name) for name in dir(runtime.task_run)},
    }


@task
def look(x: int, y: str = "default") -> dict[str, Any]:
    return seen()


@task
async def look_async(x: int) -> dict[str, Any]:
    return seen()


@task(tags=["outer"])
def look_down(x: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    before = seen()
    inside = look.submit(x + 1).result()
    return before, inside, seen()


@flow
def child(n: int) -> Any:
    return seen(), look.submit(n).result()


@task
def calls_a_flow(n: int) -> Any:
    return child(n), seen()


def test_everywhere(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, version="7", tags=["night"], flow_run_name="run of {x}")
    def night(x: int, table: Any) -> Any:
        with tags("block"):
            one = look.submit(x)
        elements = look.with_options(chunk_size=2).map([5, 6, 7])
        return {
            "here": seen(),
            "task": one.result(),
            "direct": look(2),
            "async": look_async.submit(3).result(),
            "elements": elements.result(),
            "down": look_down.submit(4).result(),
            "child": child(9),
            "inside": calls_a_flow.submit(8).result(),
        }

    found = night(1, table := list(range(100_000)))
    top, here = record.flow(), found["here"]
    assert here["flow"]["id"] == here["flow"]["root_flow_run_id"] == top.id
    assert here["flow"]["name"] == "run of 1"
    assert (here["flow"]["flow_name"], here["flow"]["flow_version"]) == ("night", "7")
    assert here["flow"]["tags"] == ["night"]
    assert here["flow"]["run_count"] == 1
    assert here["flow"]["parameters"] == {"x": 1, "table": table}
    assert here["task"]["id"] is None
    one = found["task"]
    row = record.tasks("look")[0]
    for name in ("id", "name", "flow_name", "flow_version", "tags", "run_count", "root_flow_run_id"):
        assert one["flow"][name] == here["flow"][name], name
    assert one["flow"]["scheduled_start_time"] == here["flow"]["scheduled_start_time"]
    assert one["flow"]["parameters"]["x"] == 1
    assert one["task"]["id"] == row.id
    assert (one["task"]["name"], one["task"]["task_name"], one["task"]["run_count"]) == ("look", "look", 1)
    assert one["task"]["tags"] == ["block", "night"]
    assert one["task"]["parameters"] == {"x": 1, "y": "default"}
    assert found["direct"]["task"]["parameters"] == {"x": 2, "y": "default"}
    assert found["async"]["task"]["parameters"] == {"x": 3}
    assert [element["task"]["parameters"]["x"] for element in found["elements"]] == [5, 6, 7]
    assert [element["task"]["name"] for element in found["elements"]] == ["look-0", "look-1", "look-2"]
    before, inside, after = found["down"]
    assert before == after
    assert before["task"]["tags"] == ["night", "outer"]
    assert inside["task"]["parameters"]["x"] == 5
    assert inside["flow"]["id"] == top.id
    in_child, below = found["child"]
    assert in_child["flow"]["parent_flow_run_id"] == below["flow"]["parent_flow_run_id"] == top.id
    assert in_child["flow"]["root_flow_run_id"] == top.id
    assert in_child["flow"]["parameters"] == below["flow"]["parameters"] == {"n": 9}
    (nested, deep), again = found["inside"]
    assert (nested["flow"]["flow_name"], nested["flow"]["parameters"]) == ("child", {"n": 8})
    assert deep["flow"]["id"] == nested["flow"]["id"]
    assert again["flow"]["id"] == top.id
    assert again["task"]["task_name"] == "calls_a_flow"


def test_the_contexts(in_flow: InFlow) -> None:
    assert SameContext is FlowRunContext

    @task
    def inside(x: int) -> Any:
        here = get_run_context()
        assert isinstance(here, TaskRunContext)
        around = FlowRunContext.get()
        assert around is not None
        assert here.flow_run is not None
        return here.task_run.id, here.task.name, here.parameters, around.flow_run.id, here.flow_run.id

    def body() -> Any:
        here = get_run_context()
        assert isinstance(here, FlowRunContext)
        assert TaskRunContext.get() is None
        future = inside.submit(3)
        assert future.result() == (
            future.task_run_id, "inside", {"x": 3}, here.flow_run.id, here.flow_run.id
        )  # fmt: skip
        return here.flow.name

    assert in_flow(body) == "body"


def test_outside_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingContextError, match="get_run_context"):
        get_run_context()
    assert FlowRunContext.get() is None
    assert TaskRunContext.get() is None
    assert runtime.flow_run.id is None
    assert runtime.flow_run.tags == []
    assert runtime.flow_run.parameters == runtime.deployment.parameters == {}
    assert runtime.task_run.run_count == 0
    assert isinstance(runtime.flow_run.scheduled_start_time, dt.datetime)
    assert "name" in dir(runtime.flow_run)
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        _ = runtime.flow_run.colour
    monkeypatch.setenv("PENSTOCK__RUNTIME__FLOW_RUN__NAME", "mine")
    monkeypatch.setenv("PENSTOCK__RUNTIME__TASK_RUN__RUN_COUNT", "3")
    monkeypatch.setenv("PENSTOCK__RUNTIME__FLOW_RUN__TAGS", "a, b")
    monkeypatch.setenv("PENSTOCK__RUNTIME__DEPLOYMENT__PARAMETERS", '{"n": 1}')
    monkeypatch.setenv("PENSTOCK__RUNTIME__FLOW_RUN__SCHEDULED_START_TIME", "2026-01-02T03:04:05")
    assert runtime.flow_run.name == "mine"
    assert runtime.task_run.run_count == 3
    assert runtime.flow_run.tags == ["a", "b"]
    assert runtime.deployment.parameters == {"n": 1}
    assert runtime.flow_run.scheduled_start_time.year == 2026


def test_the_count_of_attempts(in_flow: InFlow) -> None:
    @task(retries=2)
    def third() -> int:
        count: int = runtime.task_run.run_count
        if count < 3:
            raise ValueError("again")
        return count

    assert in_flow(lambda: third.submit()) == 3


def test_what_travels_is_small(runner: TaskRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = Luggage.context_of

    def measured(self: Luggage, scope: Any) -> dict[str, Any]:
        found = original(self, scope)
        sizes.append(len(pickle.dumps({**found, "runner": None})))
        return found

    monkeypatch.setattr(Luggage, "context_of", measured)

    @flow(task_runner=runner, tags=["night", "calibration"], version="1.2.3")
    def night(table: Any, text: str, **others: Any) -> Any:
        return look.submit(1)

    night(list(range(100_000)), "x" * 10_000, **{f"parameter_{n}": n for n in range(100)})
    assert sizes
    assert max(sizes) < 1000


def test_a_logger_for_a_context(in_flow: InFlow, record: Record) -> None:
    def body() -> str:
        here = get_run_context()
        logger = get_run_logger(here, band="L")
        assert dict(logger.extra or {}) == {
            "flow_run_id": runtime.flow_run.id, "flow_run_name": runtime.flow_run.name, "band": "L"
        }  # fmt: skip
        logger.info("the sky is clear")
        return runtime.flow_run.id or ""

    in_flow(body)
    assert record.flow().logs == ["the sky is clear"]


def test_the_seed_is_the_same_at_every_attempt_of_task_and_flow(runner: TaskRunner) -> None:
    @task(retries=1)
    def drawn(x: int = 0) -> int:
        seed: int = runtime.task_run.seed
        if runtime.task_run.run_count == 1:
            raise ValueError(str(seed))
        return seed

    seen_seeds: list[list[int]] = []

    @flow(task_runner=runner, retries=1)
    def night() -> Any:
        futures = [drawn.submit(), drawn.submit(), *drawn.with_options(chunk_size=2).map([1, 2])]
        seen_seeds.append([*(future.result() for future in futures), drawn()])
        if len(seen_seeds) == 1:
            raise ValueError("once")
        return runtime.task_run.seed

    assert night() is None
    first, second = seen_seeds
    assert first == second
    assert len(set(first)) == 5
