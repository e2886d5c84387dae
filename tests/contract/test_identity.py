"""Who a run is: versions, keys, descriptions, tags and names, recorded by themselves."""

import datetime as dt
import functools
import subprocess
from pathlib import Path
from typing import Any

import pytest

from penstock import ParameterTypeError, flow, runtime, tags, task
from penstock.cache_policies import INPUTS
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def documented(x: Any = 1) -> Any:
    """Give it back."""
    return x


def known(record: Record) -> list[dict[str, Any]]:
    return [event.body for event in record.events if event.kind == "task"]


def test_versions_are_recorded_by_themselves(runner: TaskRunner, record: Record) -> None:
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)

    @flow(task_runner=runner)
    def body() -> None:
        documented.submit(1)
        documented.map([1, 2])
        documented(3)

    body()
    if done.returncode == 0:
        assert record.flow().body["version"].removesuffix("-dirty") == done.stdout.strip().removesuffix(
            "-dirty"
        )
    else:
        assert record.flow().body["version"].startswith("source-")
    (one,) = known(record)
    assert one["version"] == record.flow().body["version"]
    assert (one["task"], one["description"]) == ("documented", "Give it back.")
    assert one["key"] == documented.task_key
    assert one["key"].startswith("documented-")


def test_a_version_that_was_given(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, version="7")
    def body() -> None:
        documented.with_options(version="8").submit(1)

    body()
    assert (record.flow().body["version"], known(record)[0]["version"]) == ("7", "8")


def test_tags_come_together(runner: TaskRunner, record: Record) -> None:
    tagged = documented.with_options(tags={"own"})

    @flow(task_runner=runner, tags=["flow"])
    def body() -> None:
        with tags("ambient"), tags("inner"):
            tagged.submit(1)
            tagged.map([1])
            tagged(1)
        tagged.with_options(tags=["other"]).submit(1)
        child()

    @flow(tags=["child"])
    def child() -> None:
        documented.with_options(name="deep").submit(1)

    body()
    rows = record.tasks("documented")
    assert [row.body["tags"] for row in rows[:3]] == [["ambient", "flow", "inner", "own"]] * 3
    assert rows[3].body["tags"] == ["flow", "other"]
    assert record.flow().body["tags"] == ["flow"]
    assert record.task("deep").body["tags"] == ["child", "flow"]


DATE = dt.date(2026, 1, 5)


def test_names_of_task_runs(in_flow: InFlow, record: Record) -> None:
    calls = []

    def named(parameters: dict[str, Any]) -> str:
        calls.append(1)
        return f"made-{parameters['input']['number']}"

    @task(task_run_name="{date:%A}-{input[number]:03}-{factor}", retries=1)
    def reduce(date: dt.date, input: dict[str, int], factor: int = 2) -> None:
        raise ValueError

    def body() -> None:
        reduce.submit(DATE, {"number": 3}).wait()
        reduce(DATE, {"number": 4}, factor=9, return_state=True)
        reduce.with_options(task_run_name=named).submit(DATE, {"number": 7}).wait()
        reduce.with_options(task_run_name=lambda: "plain").submit(DATE, {"number": 7}).wait()

    in_flow(body)
    assert [row.name for row in record.tasks()] == ["Monday-003-2", "Monday-004-9", "made-7", "plain"]
    assert [row.attempt for row in record.tasks()] == [2] * 4
    assert calls == [1]  # once per run, not per attempt


def test_names_that_need_a_value_from_elsewhere(in_flow: InFlow, record: Record) -> None:
    named = documented.with_options(name="named", task_run_name="x is {x[0]:02}")
    called = documented.with_options(name="called", task_run_name=lambda parameters: f"x={parameters['x']}")
    plain = documented.with_options(name="plain", task_run_name="plain")

    def body() -> list[Any]:
        up = documented.submit([3])
        futures = [named.submit(up), called.submit(up), plain.submit(up)]
        direct = named(up)
        for future in futures:
            future.wait()
        names = [future.name for future in futures]
        return [names, direct]

    assert in_flow(body) == [["x is 03", "x=[3]", "plain"], [3]]
    assert sorted(row.name for row in record.tasks()) == [
        "documented",
        "plain",
        "x is 03",
        "x is 03",
        "x=[3]",
    ]
    assert {row.type for row in record.tasks()} == {"COMPLETED"}


def test_names_of_elements(in_flow: InFlow, record: Record) -> None:
    named = documented.with_options(task_run_name="x is {x}")
    in_flow(lambda: named.map([3, 4]))
    assert [row.name for row in record.tasks()] == ["x is 3", "x is 4"]


@pytest.mark.parametrize("chunk_size", ["auto", 1, 3])
def test_names_of_elements_that_need_a_value_from_elsewhere(
    in_flow: InFlow, record: Record, chunk_size: Any
) -> None:
    def called(parameters: dict[str, Any]) -> str:
        return f"{parameters['x']}!"

    @task(chunk_size=chunk_size)
    def give(x: int) -> int:
        return x * 10

    @task
    def many(n: int) -> list[int]:
        return [100 + x for x in range(n)]

    @task(chunk_size=chunk_size)
    def take(x: int, y: int = 0) -> int:
        if x == 20:
            raise ValueError("twenty")
        return x

    templates: dict[str, Any] = {
        "text": "x is {x:03}",
        "function": called,
        "mixed": "{x}",
        "items": "item {x}",
    }
    tasks = {name: take.with_options(name=name, task_run_name=one) for name, one in templates.items()}

    def body() -> dict[str, list[str]]:
        given = give.map([1, 2, 3])
        futures: dict[str, Any] = {
            "text": tasks["text"].map(given),
            "function": tasks["function"].map(given),
            "mixed": tasks["mixed"].map([5, given[2], 6]),
            "items": tasks["items"].map(many.submit(3)),
        }
        plain = take.with_options(name="plain", task_run_name="y is {y}").map(given, y=[7, 8, 9])
        for some in [*futures.values(), plain]:
            some.wait()
        return {name: [future.name for future in some] for name, some in futures.items()}

    expected = {
        "text": ["x is 010", "x is 020", "x is 030"],
        "function": ["10!", "20!", "30!"],
        "mixed": ["5", "30", "6"],
        "items": ["item 100", "item 101", "item 102"],
    }
    assert in_flow(body) == expected
    for name, names in expected.items():
        assert [row.name for row in record.tasks(name)] == names
    assert [row.name for row in record.tasks("plain")] == ["y is 7", "y is 8", "y is 9"]
    assert record.types("text") == ["COMPLETED", "FAILED", "COMPLETED"]


def test_an_element_is_named_once(in_flow: InFlow, record: Record, tmp_path: Any) -> None:
    def called(parameters: dict[str, Any]) -> str:
        with (tmp_path / "calls").open("a") as file:
            file.write("x")
        return f"<{parameters['x']}>"

    @task
    def give(x: int) -> int:
        return x

    @task(retries=2, task_run_name=called)
    def fragile(x: int) -> int:
        if runtime.task_run.run_count < 3:
            raise OSError(runtime.task_run.name)
        return x

    assert in_flow(lambda: fragile.map(give.map([4, 5]))) == [4, 5]
    assert [row.name for row in record.tasks("fragile")] == ["<4>", "<5>"]
    assert [row.attempt for row in record.tasks("fragile")] == [3, 3]
    assert (tmp_path / "calls").read_text() == "xx"


def test_names_of_flow_runs(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, flow_run_name="{date:%A}-{n}")
    def weekly(date: dt.date, n: int = 4) -> None: ...

    weekly(DATE)
    weekly.with_options(flow_run_name=lambda: "nameless")(DATE)
    weekly.with_options(flow_run_name=lambda parameters: f"n={parameters['n']}")(DATE)
    given: Any = weekly
    given(DATE.isoformat(), "5")  # named after what the function gets
    assert [row.name for row in record.flows()] == ["Monday-4", "nameless", "n=4", "Monday-5"]
    with pytest.raises(ParameterTypeError, match="n: "):
        given(DATE, "many")
    assert record.flows()[-1].type == "FAILED"


def test_names_that_are_no_text(in_flow: InFlow) -> None:
    with pytest.raises(TypeError, match="for 'task_run_name' returned type int"):
        in_flow(lambda: documented.with_options(task_run_name=lambda: 3).submit(1))  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="for 'flow_run_name' returned type int"):
        flow(flow_run_name=lambda: 3)(lambda: None)()  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="Expected string or callable for 'task_run_name'; got int instead"):
        documented.with_options(task_run_name=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected string or callable for 'flow_run_name'; got int instead"):
        flow(flow_run_name=3)(lambda: None)  # type: ignore[call-overload]


def test_options_are_attributes() -> None:
    def hook(*_: Any) -> None: ...

    given: dict[str, Any] = dict(
        description="one",
        task_run_name="{x}",
        retries=2,
        retry_delay_seconds=[1, 2],
        retry_jitter_factor=0.5,
        retry_condition_fn=hook,
        timeout_seconds=3.0,
        log_prints=True,
        persist_result=True,
        result_serializer="json",
        version="9",
        threads=2,
        priority=3,
        resources={"GPU": 1},
    )
    made = task(**given, on_completion=[hook])(documented.fn)
    for name, value in given.items():
        assert getattr(made, name) == value, name
    assert made.fn is documented.fn
    assert (made.on_completion_hooks, made.on_failure_hooks) == ([hook], [])
    with pytest.raises(AttributeError, match="'Task' object has no attribute 'nothing'"):
        made.nothing
    cached: dict[str, Any] = dict(
        cache_policy=INPUTS,
        cache_expiration=60.0,
        refresh_cache=True,
        cache_result_in_memory=False,
        on_skip="run",
    )
    made = task(**cached)(documented.fn)
    assert {name: getattr(made, name) for name in cached} == cached
    whole = flow(timeout_seconds=3.0, flow_run_name="n", version="2", retries=3, tags={"a"})(documented.fn)
    assert (whole.timeout_seconds, whole.flow_run_name, whole.version) == (3.0, "n", "2")
    assert (whole.retries, whole.tags, whole.on_exit) == (3, {"a"}, "wait")
    assert whole.should_validate_parameters is True
    with pytest.raises(AttributeError):
        whole.retry_condition_fn


def test_keys_follow_the_code() -> None:
    one = task(lambda x: x)
    two = task(lambda x: x + 1)
    assert one.task_key != two.task_key
    assert task(name="partial")(functools.partial(documented.fn, 1)).task_key.startswith("partial-")
    assert task(max).task_key.startswith("max-")
