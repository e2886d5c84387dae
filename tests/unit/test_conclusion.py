"""How a flow ends, from what its function returned."""

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from penstock.engine import states
from penstock.engine.calls import TaskRun
from penstock.engine.conclusion import aggregate, is_handmade, members_of, with_values
from penstock.engine.futures import PenstockFuture, PenstockFutureList
from penstock.engine.states import State, StateType
from penstock.engine.task import task

FINAL = [kind for kind in StateType if kind.is_final]


@task
def work() -> None: ...


def future() -> PenstockFuture[Any]:
    return PenstockFuture(TaskRun(work, "work"))


def test_futures_are_found_everywhere() -> None:
    futures = [future() for _ in range(5)]
    value = {
        "a": futures[0],
        "b": [futures[1], (futures[2],)],
        "c": {futures[3]: 1},
        "d": futures[0],
        "e": futures[4],
    }
    assert members_of(value).runs == [one._run for one in futures]
    assert not members_of({"a": 1})
    assert not members_of(None)


def test_states_count_only_among_themselves() -> None:
    good, bad = State(StateType.COMPLETED), State(StateType.FAILED)
    assert members_of([good, bad]).states == [good, bad]
    assert members_of((good,)).states == [good]
    assert members_of(good).states == [good]
    assert members_of([good, "text"]).states == []
    assert members_of({"a": good}).states == []
    assert members_of([]).states == []
    one = future()
    mixed = members_of([good, one])
    assert (mixed.runs, mixed.states) == ([one._run], [good])


def test_a_state_of_a_run_is_not_made_by_hand() -> None:
    assert is_handmade(State(StateType.FAILED))
    assert not is_handmade(State(StateType.FAILED, state_details={"task_run_id": "1"}))
    assert not is_handmade("state")


@pytest.mark.parametrize(
    ("kinds", "kind", "message"),
    [
        ("CC", "COMPLETED", "All states completed."),
        ("CS", "COMPLETED", "All states completed."),
        ("SS", "SKIPPED", "All states skipped."),
        ("CFF", "FAILED", "2/3 states failed."),
        ("CX", "FAILED", "1/2 states failed."),
        ("FDC", "CANCELLED", "1/3 states cancelled."),
        ("CP", "PAUSED", "1/2 states paused."),
        ("N", "FAILED", "1/1 states are not final."),
        ("NF", "FAILED", "1/2 states failed."),
    ],
)
def test_the_state_of_a_flow(kinds: str, kind: str, message: str) -> None:
    made = {
        "C": states.Completed,
        "S": states.Skipped,
        "F": states.Failed,
        "X": states.Crashed,
        "D": states.Cancelled,
        "P": states.Paused,
        "N": states.Pending,
    }
    state = aggregate([made[one]("why") for one in kinds])
    assert (state.type, state.message) == (kind, message)


@hypothesis.given(st.lists(st.sampled_from(list(StateType)), min_size=1, max_size=8))
def test_a_flow_completes_if_and_only_if_all_members_do(kinds: list[StateType]) -> None:
    state = aggregate([State(kind) for kind in kinds])
    well = all(kind in {StateType.COMPLETED, StateType.SKIPPED} for kind in kinds)
    assert (state.is_completed() or state.is_skipped()) is well
    assert isinstance(state.data, BaseException) is not well


def test_the_first_failure_is_the_flows() -> None:
    errors = [ValueError("first"), ValueError("second")]
    members = [State(StateType.COMPLETED), *(State(StateType.FAILED, data=error) for error in errors)]
    assert aggregate(members).data is errors[0]


def test_values_in_the_place_of_futures() -> None:
    one, other = future(), future()
    futures: PenstockFutureList[Any] = PenstockFutureList([one, other])
    values: dict[TaskRun, Any] = {one._run: 1, other._run: 2}
    found = with_values({"list": futures, "one": (one,), "text": "x"}, values)
    assert found == {"list": [1, 2], "one": (1,), "text": "x"}
    assert type(found["list"]) is list
