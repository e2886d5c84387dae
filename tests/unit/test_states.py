"""States: the table of steps, the constructors, and what a state gives."""

import pickle
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from penstock import CancelledRun, CrashedRun, FailedRun, PausedRun, UnfinishedRun
from penstock.engine import states
from penstock.engine.states import (
    IllegalTransition,
    Position,
    State,
    StateGroup,
    StateType,
    Stored,
    advance,
    failure_of,
)

TYPES = list(StateType)
FINAL = [kind for kind in TYPES if kind.is_final]
STEP = st.tuples(st.sampled_from(TYPES), st.integers(0, 3))


@hypothesis.given(st.lists(STEP, max_size=30))
def test_terminal_stays_terminal_within_an_attempt(steps: list[tuple[StateType, int]]) -> None:
    position = Position()
    ended: dict[int, StateType] = {}
    for to, attempt in steps:
        before = position
        try:
            position = advance(position, to, attempt=attempt)
        except IllegalTransition:
            assert position is before
            continue
        assert position.attempt >= before.attempt
        assert position.attempt not in ended
        if to.is_final:
            ended[position.attempt] = to


@hypothesis.given(st.lists(STEP, max_size=30))
def test_a_step_is_in_the_table_or_opens_a_new_attempt(steps: list[tuple[StateType, int]]) -> None:
    position = Position()
    for to, attempt in steps:
        before = position
        try:
            position = advance(position, to, attempt=attempt)
        except IllegalTransition:
            continue
        reopened = attempt > before.attempt and before.type is not None and before.type.is_final
        assert reopened or to in states.TRANSITIONS[before.type]


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("to", TYPES)
def test_only_a_new_attempt_leaves_a_terminal_state(final: StateType, to: StateType) -> None:
    ended = Position(final, "over", 1)
    with pytest.raises(IllegalTransition, match="cannot become"):
        advance(ended, to)
    assert advance(ended, to, attempt=2) == Position(to, to.value.capitalize(), 2)


def test_an_older_attempt_has_no_say() -> None:
    with pytest.raises(IllegalTransition, match="attempt 1 is over; the run is in attempt 2"):
        advance(Position(StateType.RUNNING, "Running", 2), StateType.COMPLETED, attempt=1)


def test_the_table_is_complete() -> None:
    assert set(states.TRANSITIONS) == {None, *TYPES}
    assert all(states.TRANSITIONS[kind] == {} for kind in FINAL)
    assert all(reason for steps in states.TRANSITIONS.values() for reason in steps.values())
    reachable = {to for steps in states.TRANSITIONS.values() for to in steps}
    assert reachable == set(TYPES)


def test_every_type_can_come_to_an_end() -> None:
    for start in TYPES:
        seen, pending = {start}, [start]
        while pending:
            new = set(states.TRANSITIONS[pending.pop()]) - seen
            seen |= new
            pending.extend(new)
        assert seen & set(FINAL)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Scheduled", "SCHEDULED"),
        ("AwaitingRetry", "SCHEDULED"),
        ("Pending", "PENDING"),
        ("Running", "RUNNING"),
        ("Retrying", "RUNNING"),
        ("Paused", "PAUSED"),
        ("Cancelling", "CANCELLING"),
        ("Completed", "COMPLETED"),
        ("Failed", "FAILED"),
        ("Crashed", "CRASHED"),
        ("Cancelled", "CANCELLED"),
        ("Skipped", "SKIPPED"),
    ],
)
def test_constructors(name: str, kind: str) -> None:
    state: State = getattr(states, name)("why", cause="WorkerLost")
    assert (state.type, state.name, state.message) == (kind, name, "why")
    assert state.state_details == {"cause": "WorkerLost"}
    assert str(state.type) == kind
    assert state.is_final() is StateType(kind).is_final


def test_questions() -> None:
    for kind in TYPES:
        state = State(kind)
        answers = {other: getattr(state, f"is_{other.value.lower()}")() for other in TYPES}
        assert [other for other, answer in answers.items() if answer] == [kind]


class Elsewhere(Stored):
    def load(self) -> str:
        return "loaded"


def test_results() -> None:
    assert State(StateType.COMPLETED, data=5).result() == 5
    assert State(StateType.COMPLETED, data=Elsewhere()).result() == "loaded"
    assert State(StateType.SKIPPED, data=5).result() is None
    with pytest.raises(NotImplementedError):
        Stored().load()


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("FAILED", FailedRun),
        ("CRASHED", CrashedRun),
        ("CANCELLED", CancelledRun),
        ("PAUSED", PausedRun),
        ("RUNNING", UnfinishedRun),
        ("PENDING", UnfinishedRun),
        ("SCHEDULED", UnfinishedRun),
    ],
)
def test_a_state_without_a_value_raises(kind: str, error: type[Exception]) -> None:
    state = State(StateType(kind), message="the reason", state_details={"task_run_id": "a" * 32})
    with pytest.raises(error, match="the reason") as caught:
        state.result()
    assert vars(caught.value)["run_id"] == "a" * 32
    assert isinstance(state.result(raise_on_failure=False), error)


def test_an_unfinished_state_says_so() -> None:
    with pytest.raises(UnfinishedRun, match="Run is in Running state, its result is not available"):
        State(StateType.RUNNING).result()


def test_what_is_inside_is_raised() -> None:
    error = ValueError("inside")
    failed = State(StateType.FAILED, data=error)
    good = State(StateType.COMPLETED, data=1)
    values: list[Any] = [error, failed, [good, failed], (good, State(StateType.SKIPPED), failed)]
    for data in values:
        assert failure_of(State(StateType.FAILED, data=data)) is error
    assert str(failure_of(State(StateType.FAILED, data="as text"))) == "as text"


def test_states_pickle() -> None:
    state = State(StateType.FAILED, "TimedOut", "too late", ValueError("x"))
    arrived = pickle.loads(pickle.dumps(state))
    assert (arrived.type, arrived.name, arrived.message, str(arrived.data)) == (
        "FAILED",
        "TimedOut",
        "too late",
        "x",
    )


def test_a_group_counts() -> None:
    made = [states.Completed(), states.Failed(), states.Crashed(), states.Cancelled(), states.Running()]
    group = StateGroup([*made, states.Paused(), states.Skipped()])
    assert len(group) == group.total_count == 7
    assert (group.fail_count, group.completed_count, group.not_final_count) == (2, 1, 2)
    assert group.any_failed()
    assert group.any_cancelled()
    assert group.any_paused()
    assert not group.all_final()
    assert not group.all_completed()
    assert group.counts_message() == (
        "2/7 states are not final, 2/7 states failed, 1/7 states cancelled, 1/7 states paused, "
        "1/7 states skipped."
    )
    good = StateGroup([states.Completed(), states.Skipped()])
    assert good.all_completed()
    assert not good.all_skipped()
    assert good.all_final()
    assert StateGroup([states.Completed()]).counts_message() == "All states completed."
    assert StateGroup([states.Skipped()]).all_skipped()


def test_a_result_that_cannot_be_read_is_asked_for_once_more() -> None:
    class Flaky(Stored):
        asked = 0

        def load(self) -> int:
            self.asked += 1
            if self.asked == 1:
                raise OSError("try again")
            return 5

    assert State(StateType.COMPLETED, data=Flaky()).result() == 5
    with pytest.raises(OSError, match="try again"):
        State(StateType.COMPLETED, data=Flaky()).result(retry_result_failure=False)


def test_states_can_be_imported_by_name() -> None:
    import penstock
    import penstock.states

    for name in penstock.states.__all__:
        assert getattr(penstock, name) is getattr(states, name)
