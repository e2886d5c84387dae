"""States of runs and of flows: how each end is told, and what it does to those who wait."""

from typing import Any

import pytest

from penstock import (
    CancelledRun,
    FailedRun,
    PausedRun,
    Skip,
    State,
    UnfinishedRun,
    allow_failure,
    flow,
    quote,
    task,
)
from penstock.engine.states import Cancelled, Completed, Failed, Paused, Skipped
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def add(x: Any, y: int = 1) -> Any:
    return x + y


@task
def fail(text: str = "no data") -> int:
    raise ValueError(text)


@task
def skip() -> int:
    raise Skip("nothing observed")


@task
def cancelled() -> State:
    state: State = Cancelled("somebody asked")
    return state


# -------------------------------------------------------------------------------------- of task runs


def test_a_state_made_by_hand_ends_the_run(in_flow: InFlow, record: Record) -> None:
    @task
    def by_hand(kind: str) -> State:
        made: State = {"Failed": Failed, "Cancelled": Cancelled, "Skipped": Skipped}[kind](f"{kind} by hand")
        return made

    def body() -> Any:
        futures = [by_hand.submit(kind) for kind in ("Failed", "Cancelled", "Skipped")]
        for future, error in zip(futures, (FailedRun, CancelledRun), strict=False):
            with pytest.raises(error, match="by hand"):
                future.result()
        assert futures[2].result() is None

    in_flow(body)
    assert record.types() == ["FAILED", "CANCELLED", "SKIPPED"]


def test_a_completed_state_made_by_hand_holds_the_value(in_flow: InFlow) -> None:
    @task
    def value() -> State:
        state: State = Completed(data=5)
        return state

    assert in_flow(lambda: value.submit().result()) == 5


def test_a_task_skips_itself(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        future = skip.submit()
        assert future.result() is None
        assert future.exception() is None
        assert future.state.is_skipped()
        assert skip() is None

    in_flow(body)
    assert [(row.type, row.state["message"]) for row in record.tasks()] == [
        ("SKIPPED", "nothing observed")
    ] * 2


def test_what_waits_for_a_skipped_run_is_skipped(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        end = add.submit(add.submit(skip.submit()))
        end.wait()
        assert end.state.is_skipped()
        assert "nothing observed" in end.state.message

    in_flow(body)
    assert record.types() == ["SKIPPED"] * 3


def test_a_failed_upstream_stops_the_chain(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        first = fail.submit()
        second = add.submit(first)
        third = add.submit(second)
        sibling = add.submit(1)
        third.wait()
        assert third.done()
        assert (third.state.type, third.state.name) == ("PENDING", "NotReady")
        assert (
            second.state.message
            == f"Upstream task run '{first.task_run_id}' did not reach a 'COMPLETED' state."
        )
        assert (
            third.state.message
            == f"Upstream task run '{second.task_run_id}' did not reach a 'COMPLETED' state."
        )
        with pytest.raises(UnfinishedRun) as caught:
            second.result()
        assert isinstance(caught.value.__cause__, ValueError)
        assert sibling.result() == 2

    in_flow(body)
    assert [(row.type, row.state["name"]) for row in record.tasks()] == [
        ("FAILED", "Failed"),
        ("PENDING", "NotReady"),
        ("PENDING", "NotReady"),
        ("COMPLETED", "Completed"),
    ]


def test_wait_for_a_failed_run(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        failed = fail.submit()
        refused = add.submit(1, wait_for=[failed])
        admitted = add.submit(2, wait_for=[allow_failure(failed)])
        refused.wait()
        assert refused.state.name == "NotReady"
        assert admitted.result() == 3

    in_flow(body)


def test_allow_failure_admits_the_exception(in_flow: InFlow) -> None:
    @task
    def kind_of(x: Any, more: Any = ()) -> list[str]:
        return [type(one).__name__ for one in (x, *more)]

    def body() -> Any:
        failed = fail.submit()
        never = add.submit(failed)
        return [
            kind_of.submit(allow_failure(failed)),
            kind_of.submit(allow_failure(add.submit(1))),
            kind_of.submit(1, more=allow_failure([failed, add.submit(1)])),
            kind_of.submit(allow_failure(never)),
        ]

    assert in_flow(body) == [["ValueError"], ["int"], ["int", "ValueError", "int"], ["UnfinishedRun"]]


def test_the_states_of_a_run_that_is_tried_again(in_flow: InFlow, record: Record) -> None:
    @task(retries=2, retry_delay_seconds=[0, 0.02])
    def stubborn() -> None:
        raise ValueError("again")

    in_flow(lambda: stubborn.submit().wait())
    row = record.task("stubborn")
    assert row.attempt == 3
    assert {"Retrying", "AwaitingRetry", "Failed"} <= set(row.names)


# -------------------------------------------------------------------------------------- of flow runs


def ended(in_flow: InFlow, value: Any) -> tuple[str, str, str]:
    """Type, name and message of a flow that returns what a callable gives."""
    state = in_flow(value, return_state=True)
    return str(state.type), state.name, state.message


def test_plain_values_complete_a_flow(in_flow: InFlow) -> None:
    values: list[Any] = [None, 0, [], "text", {"a": 1}]
    for value in values:
        assert in_flow(lambda value=value: value) == value
        assert ended(in_flow, lambda value=value: value) == ("COMPLETED", "Completed", "")


def test_a_failure_that_nobody_returned_or_raised_does_not_fail_the_flow(
    in_flow: InFlow, record: Record
) -> None:
    def body() -> str:
        fail.submit()
        return "done"

    assert in_flow(body) == "done"
    assert record.types() == ["FAILED"]
    assert record.flow().type == "COMPLETED"


@pytest.mark.parametrize(
    "build", [list, tuple, lambda members: {"key": members}, lambda members: [[members]]]
)
def test_returned_futures_decide(in_flow: InFlow, record: Record, build: Any) -> None:
    good = ended(in_flow, lambda: build([add.submit(1), add.submit(2)]))
    assert good == ("COMPLETED", "Completed", "All states completed.")
    bad = ended(in_flow, lambda: build([add.submit(1), fail.submit(), fail.submit()]))
    assert bad == ("FAILED", "Failed", "2/3 states failed.")
    with pytest.raises(ValueError, match="first"):
        in_flow(lambda: build([add.submit(1), fail.submit("first"), fail.submit("second")]))


def test_cancelled_and_skipped_members(in_flow: InFlow) -> None:
    assert ended(in_flow, lambda: [add.submit(1), cancelled.submit(), fail.submit()]) == (
        "CANCELLED",
        "Cancelled",
        "1/3 states cancelled.",
    )
    assert ended(in_flow, lambda: [add.submit(1), skip.submit()])[0] == "COMPLETED"
    assert ended(in_flow, lambda: [skip.submit(), skip.submit()])[0] == "SKIPPED"
    assert in_flow(lambda: [add.submit(1), skip.submit()]) == [2, None]


def test_members_that_never_started(in_flow: InFlow) -> None:
    assert ended(in_flow, lambda: [add.submit(fail.submit())]) == (
        "FAILED",
        "Failed",
        "1/1 states are not final.",
    )
    with pytest.raises(UnfinishedRun, match="did not reach a 'COMPLETED' state"):
        in_flow(lambda: add.submit(fail.submit()))


def test_returned_states_decide(in_flow: InFlow) -> None:
    def both() -> list[State]:
        return [add.submit(1, return_state=True), fail.submit(return_state=True)]

    assert ended(in_flow, both) == ("FAILED", "Failed", "1/2 states failed.")
    assert ended(in_flow, lambda: add.submit(1, return_state=True))[0] == "COMPLETED"
    with pytest.raises(ValueError, match="no data"):
        in_flow(lambda: fail.submit(return_state=True))


def test_states_among_other_values_decide_nothing(in_flow: InFlow) -> None:
    assert ended(in_flow, lambda: [fail.submit(return_state=True), "a value"])[0] == "COMPLETED"


def test_a_state_made_by_hand_is_the_state_of_the_flow(in_flow: InFlow, record: Record) -> None:
    assert ended(in_flow, lambda: Failed("by hand")) == ("FAILED", "Failed", "by hand")
    assert ended(in_flow, lambda: Completed("fine", data=3)) == ("COMPLETED", "Completed", "fine")
    with pytest.raises(FailedRun, match="by hand"):
        in_flow(lambda: Failed("by hand"))
    with pytest.raises(PausedRun):
        in_flow(lambda: Paused("wait for a person"))
    assert in_flow(lambda: Completed(data=3)) == 3
    assert [row.type for row in record.flows()] == ["FAILED", "COMPLETED", "FAILED", "PAUSED", "COMPLETED"]


def test_a_flow_skips_itself(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        raise Skip("clouds")

    assert in_flow(body) is None
    assert (record.flow().type, record.flow().state["message"]) == ("SKIPPED", "clouds")


def test_a_flow_that_raises(in_flow: InFlow, record: Record) -> None:
    def body() -> None:
        raise KeyError("antenna 7")

    with pytest.raises(KeyError, match="antenna 7"):
        in_flow(body)
    state = in_flow(body, return_state=True)
    assert state.is_failed()
    assert state.message == "Flow run encountered an exception: KeyError: 'antenna 7'"
    with pytest.raises(KeyError):
        state.result()
    assert isinstance(state.result(raise_on_failure=False), KeyError)
    assert [row.error["type"] for row in record.flows()] == ["KeyError", "KeyError"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_flow_that_raises_what_ends_programs(
    in_flow: InFlow, record: Record, error: type[BaseException]
) -> None:
    def body() -> None:
        raise error

    with pytest.raises(error):
        in_flow(body, return_state=True)
    assert record.flow().type == "CRASHED"
    assert record.flow().state["message"].startswith("Execution was aborted by")


def test_quote_hides_what_it_holds(in_flow: InFlow) -> None:
    state = in_flow(lambda: quote({"plain": [1]}), return_state=True)
    assert (state.type, state.message) == ("COMPLETED", "")
    assert state.result() == {"plain": [1]}


def test_a_returned_state_outlives_the_flow(in_flow: InFlow) -> None:
    state = in_flow(lambda: {"sum": add.submit(1), "list": add.map([1, 2])}, return_state=True)
    assert state.result() == {"sum": 2, "list": [2, 3]}
    assert type(state.result()["list"]) is list


def test_a_flow_waits_for_what_it_started(in_flow: InFlow, record: Record) -> None:
    @task
    def work() -> None:
        import time

        time.sleep(0.05)

    in_flow(lambda: len([work.submit() for _ in range(3)]))
    assert record.types("work") == ["COMPLETED"] * 3
    assert record.events[-1].run == record.flow().id


def test_a_flow_that_fails_cancels_what_has_not_started(in_flow: InFlow, record: Record) -> None:
    @task
    def work(after: Any = None) -> None:
        import time

        time.sleep(0.05)

    def body() -> None:
        future = None
        for _ in range(30):
            future = work.submit(future)
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        in_flow(body)
    assert record.flow().type == "FAILED"
    assert set(record.types("work")) <= {"COMPLETED", "CANCELLED", "PENDING"}
    assert {row.state["name"] for row in record.tasks("work")} <= {"Completed", "Cancelled", "NotReady"}


def test_runs_of_one_flow_share_its_id(runner: TaskRunner, record: Record) -> None:
    @flow(task_runner=runner)
    def twice() -> Any:
        return [add.submit(1), add(2)]

    twice()
    twice()
    first, second = record.flows()
    assert [row.body["flow_run"] for row in record.tasks()] == [first.id] * 2 + [second.id] * 2
