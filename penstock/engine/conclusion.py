"""How a flow run ends: its final state from what its function returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from penstock.engine import refs
from penstock.engine.calls import TaskRun
from penstock.engine.futures import run_of
from penstock.engine.states import State, StateType, failure_of


@dataclasses.dataclass(slots=True)
class Members:
    """What a returned value says about the end of a flow.

    Attributes
    ----------
    runs : list of TaskRun
        Behind the futures in it, in the order in which they stand.
    states : list of State
        The states in it, if the value consists of states and futures only.
    """

    runs: list[TaskRun]
    states: list[State]

    def __bool__(self) -> bool:
        """Whether the value decides the state of the flow."""
        return bool(self.runs or self.states)


def members_of(value: Any) -> Members:
    """Find the futures anywhere in a returned value, and the states if it holds only these."""
    runs: dict[TaskRun, None] = {}

    def leaf(item: Any, tolerant: int) -> Any:
        del tolerant
        run = run_of(item)
        if run is not None:
            runs[run] = None
        return item

    refs.replace(value, leaf)
    states: list[State] = []
    if isinstance(value, State):
        states = [value]
    elif isinstance(value, (list, tuple, set)) and value and all(_decides(item) for item in value):
        states = [item for item in value if isinstance(item, State)]
    return Members(list(runs), [state for state in states if run_of(state) is None])


def _decides(item: Any) -> bool:
    return isinstance(item, State) or run_of(item) is not None


def is_handmade(value: Any) -> bool:
    """Whether a flow returned one state that somebody wrote down."""
    return (
        isinstance(value, State)
        and "task_run_id" not in value.state_details
        and "flow_run_id" not in value.state_details
    )


def aggregate(states: Iterable[State]) -> State:
    """Return the state of a flow whose members ended in these states.

    Returns
    -------
    State
        COMPLETED if all completed or were skipped (SKIPPED if all were), CANCELLED or PAUSED if
        any is, else FAILED; the message counts.
    """
    found = list(states)
    total = len(found)
    skipped = sum(state.is_skipped() for state in found)
    if skipped == total:
        return State(StateType.SKIPPED, message="All states skipped.")
    if all(state.is_completed() or state.is_skipped() for state in found):
        return State(StateType.COMPLETED, message="All states completed.")
    for kind, word in ((StateType.CANCELLED, "cancelled"), (StateType.PAUSED, "paused")):
        count = sum(state.type is kind for state in found)
        if count:
            return State(kind, message=f"{count}/{total} states {word}.", data=_first_failure(found))
    failed = sum(state.is_failed() or state.is_crashed() for state in found)
    unfinished = sum(not state.is_final() for state in found)
    message = f"{failed}/{total} states failed." if failed else f"{unfinished}/{total} states are not final."
    return State(StateType.FAILED, message=message, data=_first_failure(found))


def _first_failure(states: list[State]) -> BaseException | None:
    for state in states:
        if not (state.is_completed() or state.is_skipped()):
            return failure_of(state)
    return None


def with_values(value: Any, values: dict[TaskRun, Any]) -> Any:
    """Put values in the place of futures; a list of futures becomes a plain list."""

    def leaf(item: Any, tolerant: int) -> Any:
        del tolerant
        run = run_of(item)
        return values[run] if run is not None and run in values and not isinstance(item, State) else item

    return refs.replace(value, leaf)
