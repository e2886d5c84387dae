"""Branches that the record shows."""

from typing import Any

import pytest

from penstock import PenstockFuture, Skip, branch, flow, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def check(x: int) -> bool:
    return x > 0


@task
def good() -> str:
    return "good"


@task
def bad() -> str:
    return "bad"


@task
def broken() -> bool:
    raise ValueError("no idea")


@task
def skip() -> bool:
    raise Skip("clouds")


@pytest.mark.parametrize(("x", "taken", "other"), [(1, "good", "bad"), (-1, "bad", "good")])
def test_the_arm_not_taken_is_skipped(
    x: int, taken: str, other: str, in_flow: InFlow, record: Record
) -> None:
    assert in_flow(lambda: branch(check.submit(x), then=good, else_=bad)) == taken
    cond, arm, left = record.task("check"), record.task(taken), record.task(other)
    assert (arm.type, left.type) == ("COMPLETED", "SKIPPED")
    assert left.state["message"] == f"Branch not taken: the condition (check) was {x > 0}."
    assert left.state["condition"] == str(x > 0)
    assert left.body["upstream"] in [[("condition", cond.id)], [["condition", cond.id]]]
    assert [parent for _, parent in arm.body["upstream"]] == [cond.id]


def test_plain_conditions_and_callables(in_flow: InFlow, record: Record) -> None:
    def ready() -> int:
        return 3

    def body() -> Any:
        assert branch(False, then=good) is None
        assert branch(True, ready, lambda: 4) == 3
        return branch(0, then=good, else_=lambda: check.submit(5))

    assert in_flow(body) is True
    assert record.types("good") == ["SKIPPED", "SKIPPED"]
    assert record.types("arm") == ["SKIPPED"]


def test_a_failed_condition_raises_and_a_skipped_one_skips_both(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        with pytest.raises(ValueError, match="no idea"):
            branch(broken.submit(), then=good, else_=bad)
        future = branch(skip.submit(), then=good, else_=bad)
        assert isinstance(future, PenstockFuture)
        assert future.result() is None
        return "end"

    assert in_flow(body) == "end"
    assert record.types("good") == record.types("bad") == ["SKIPPED"]
    assert "clouds" in record.task("bad").state["message"]


def test_a_branch_in_an_async_flow(runner: TaskRunner, record: Record) -> None:
    import asyncio

    @flow(task_runner=runner)
    async def night() -> Any:
        return await branch(await check.submit(1), then=good, else_=bad)

    assert asyncio.run(night()) == "good"
    assert record.types("bad") == ["SKIPPED"]
