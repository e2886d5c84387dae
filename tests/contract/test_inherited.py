"""What runs inherit from what surrounds them, and what is taken for the sake of existing scripts."""

import pytest

from penstock import flow, task
from penstock.engine import options
from penstock.runners.base import TaskRunner
from tests.record import Record


@task
def prints(text: str) -> None:
    print(text)


@task(log_prints=False)
def mute(text: str) -> None:
    print(text)


@flow
def child(text: str) -> None:
    print(f"{text} child")
    prints.with_options(name="grandchild").submit(f"{text} grandchild").wait()


@task
def calls_a_flow(text: str) -> None:
    child(text)


def test_prints_are_logged_from_the_flow_down(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, log_prints=True)
    def parent() -> None:
        print("parent")
        prints.submit("submitted").wait()
        prints("called")
        prints.map(["mapped"]).wait()
        mute.submit("nothing").wait()
        child("sub")

    parent()
    assert record.flow().logs == ["parent"]
    assert [row.logs for row in record.tasks("prints")] == [["submitted"], ["called"], ["mapped"]]
    assert record.task("mute").logs == []
    assert record.flows()[1].logs == ["sub child"]
    assert record.task("grandchild").logs == ["sub grandchild"]


def test_a_subflow_may_say_otherwise(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner, log_prints=True)
    def parent() -> None:
        child.with_options(log_prints=False)("sub")

    parent()
    assert record.flows()[1].logs == []
    assert record.task("grandchild").logs == []


def test_a_flow_in_a_task_inherits_from_the_task(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    def parent() -> None:
        calls_a_flow.with_options(log_prints=True).submit("loud").wait()

    parent()
    assert record.task("grandchild").logs == ["loud grandchild"]
    around = record.task("calls_a_flow").logs  # code of a flow in a task is code of the task
    assert [*around, *record.flows()[1].logs] == ["loud child"]


def test_options_without_effect_are_taken_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_warned", set())
    with pytest.warns(UserWarning, match="'viz_return_value' has no effect in penstock"):
        made = task(viz_return_value=3)(len)
    with pytest.warns(UserWarning, match="'asset_deps' has no effect in penstock"):
        made.with_options(asset_deps=["a"])
    task(viz_return_value=4, asset_deps=["b"])(len)  # said before
    assert made([1, 2]) == 2
