"""Logs: prints and loggers end up with their run, on every runner."""

import logging
from typing import Any

import pytest

from penstock import MissingContextError, flow, get_run_logger, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task(log_prints=True)
def talk(text: str) -> None:
    print("hello", text, sep=", ")


@task
def report(text: str) -> None:
    get_run_logger().info("found %s", text)
    get_run_logger().warning("twice")


@task
def whisper() -> None:
    print("not kept")


def test_the_logger_of_a_task(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: [report.submit("m51"), report("m31")])
    assert [row.logs for row in record.tasks("report")] == [["found m51", "twice"], ["found m31", "twice"]]
    lines = [line for event in record.events if event.kind == "log" for line in event.body["lines"]]
    assert [level for _, level, _ in lines] == ["INFO", "WARNING"] * 2


def test_prints_of_a_task(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: [talk.submit("you"), talk("me"), whisper.submit()])
    assert [row.logs for row in record.tasks("talk")] == [["hello, you"], ["hello, me"]]
    assert record.task("whisper").logs == []


def test_prints_of_a_map(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: talk.map([str(i) for i in range(10)]))
    assert [row.logs for row in record.tasks("talk")] == [[f"hello, {i}"] for i in range(10)]


def test_prints_of_a_failed_task(in_flow: InFlow, record: Record) -> None:
    @task(log_prints=True)
    def fail() -> None:
        print("last words")
        raise ValueError("over")

    in_flow(lambda: fail.submit().wait())
    assert record.task("fail").logs == ["last words"]


def test_prints_are_inherited_from_the_flow(runner: TaskRunner, record: Record) -> None:
    @task(log_prints=False)
    def quiet() -> None:
        print("on the screen")

    @flow
    def child() -> None:
        print("from the child")
        whisper.submit()

    @flow(task_runner=runner, log_prints=True)
    def parent() -> None:
        print("from the flow")
        whisper.submit()
        quiet.submit()
        child()

    parent()
    assert record.flow().logs == ["from the flow"]
    assert [row.logs for row in record.flows()[1:]] == [["from the child"]]
    assert [row.logs for row in record.tasks("whisper")] == [["not kept"], ["not kept"]]
    assert record.task("quiet").logs == []


def test_the_logger_of_a_flow(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: get_run_logger().error("in the flow"))
    assert record.flow().logs == ["in the flow"]


def test_loggers_propagate(in_flow: InFlow, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        in_flow(lambda: get_run_logger().info("to the handlers of the user"))
    assert "to the handlers of the user" in caplog.text


def test_there_is_no_logger_outside_of_runs() -> None:
    with pytest.raises(MissingContextError, match="no active flow or task run"):
        get_run_logger()


def test_logs_of_tasks_inside_tasks(in_flow: InFlow, record: Record) -> None:
    @task
    def outer() -> None:
        get_run_logger().info("before")
        report.submit("inner").wait()
        talk("directly")
        get_run_logger().info("after")

    in_flow(lambda: outer.submit())
    assert record.task("outer").logs == ["before", "after"]
    assert record.task("report").logs == ["found inner", "twice"]
    assert record.task("talk").logs == ["hello, directly"]


def test_odd_lines(in_flow: InFlow, record: Record) -> None:
    @task(log_prints=True)
    def odd() -> None:
        print()
        print("ü", "\udcff", "a\0b")
        print("x" * 100_000)
        print("several\nlines")

    in_flow(lambda: odd.submit())
    logs = record.task("odd").logs
    assert logs[0] == ""
    assert logs[1].startswith("ü")
    assert "\0" not in logs[1]
    assert len(logs[2]) < 70_000
    assert "more characters" in logs[2]
    assert logs[3] == "several\nlines"


def test_lines_beyond_the_quota_are_counted(in_flow: InFlow, record: Record) -> None:
    @task(log_prints=True)
    def noisy() -> None:
        for i in range(10_500):
            print(i)

    in_flow(lambda: noisy.submit())
    dropped = sum(event.body["dropped"] for event in record.events if event.kind == "log")
    assert len(record.task("noisy").logs) == 10_000
    assert dropped == 500


def test_logs_of_a_retried_task_are_all_kept(in_flow: InFlow, record: Record) -> None:
    @task(log_prints=True, retries=2)
    def stubborn() -> Any:
        print("trying")
        raise ValueError("again")

    in_flow(lambda: stubborn.submit().wait())
    assert record.task("stubborn").logs == ["trying"] * 3
