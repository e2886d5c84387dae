"""States of runs: their types, the table of legal steps, and the only function that takes one.

`advance` is pure: it knows no clock, no thread and no store. In the driver the session calls
it, in the store the ingest orders what drivers sent; nothing else changes a state.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from penstock import errors
from penstock.engine import markup


class StateType(str, Enum):
    """What kind of state a run is in; names of states are free text within a type."""

    SCHEDULED = "SCHEDULED"
    """It will start at a later time."""
    PENDING = "PENDING"
    """It waits: for its upstreams, for a slot, for the cluster."""
    RUNNING = "RUNNING"
    """User code is running, or was sent to where it runs."""
    PAUSED = "PAUSED"
    """It waits for somebody."""
    CANCELLING = "CANCELLING"
    """Somebody asked it to stop, and its code has not ended yet."""
    COMPLETED = "COMPLETED"
    """User code returned."""
    FAILED = "FAILED"
    """User code raised, or exceeded its time."""
    CRASHED = "CRASHED"
    """The infrastructure failed."""
    CANCELLED = "CANCELLED"
    """Somebody asked it to stop, and it has."""
    SKIPPED = "SKIPPED"
    """There was nothing to do."""

    def __str__(self) -> str:
        """Show the bare name."""
        return self.value

    @property
    def is_final(self) -> bool:
        """Whether a run ends in this type, within its attempt."""
        return self in _FINAL


_FINAL = frozenset(
    {
        StateType.COMPLETED,
        StateType.FAILED,
        StateType.CRASHED,
        StateType.CANCELLED,
        StateType.SKIPPED,
    }
)

_S, _P, _R, _PA, _CG = (
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
)
_C, _F, _X, _CD, _SK = (
    StateType.COMPLETED,
    StateType.FAILED,
    StateType.CRASHED,
    StateType.CANCELLED,
    StateType.SKIPPED,
)

TRANSITIONS: dict[StateType | None, dict[StateType, str]] = {
    None: {_S: "made for later", _P: "made", _R: "called directly"},
    _S: {_P: "due", _R: "due, starts at once", _CD: "dropped", _SK: "not needed", _X: "the driver died"},
    _P: {
        _P: "the reason to wait changed (NotReady)",
        _R: "user code starts",
        _C: "a stored result was found",
        _F: "validation or start failed",
        _X: "the infrastructure failed before the start",
        _CG: "asked to stop",
        _CD: "dropped before it started",
        _SK: "skipped before it started",
        _PA: "waits for somebody",
    },
    _R: {
        _C: "returned",
        _F: "raised, or exceeded its time",
        _X: "the worker died",
        _CG: "asked to stop",
        _CD: "stopped",
        _SK: "skipped itself",
        _PA: "waits for somebody",
        _S: "will be tried again after a delay",
        _R: "is tried again at once (Retrying)",
        _P: "given back to the queue",
    },
    _PA: {_R: "resumed", _S: "resumes later", _F: "waited too long", _CG: "asked to stop", _CD: "dropped"},
    _CG: {_CD: "stopped", _C: "was faster", _F: "raised while it stopped", _X: "died while it stopped"},
    # A terminal state is terminal within its attempt; only a new attempt leaves it.
    _C: {},
    _F: {},
    _X: {},
    _CD: {},
    _SK: {},
}
"""For each type of state, the types that may follow within an attempt, and why."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    Attributes
    ----------
    type : StateType or None
        None before the first state.
    name : str
        Free text, such as "Retrying".
    attempt : int
        0 before the first execution.
    """

    type: StateType | None = None
    name: str = ""
    attempt: int = 0


class IllegalTransition(errors.PenstockError):
    """A run was told to enter a state that cannot follow the one it is in."""


def advance(
    position: Position, to: StateType, name: str | None = None, attempt: int | None = None
) -> Position:
    """Take one step.

    Parameters
    ----------
    position : Position
        Where the run stands.
    to : StateType
        Where it goes.
    name : str, optional
        Name of the new state; its type's by default.
    attempt : int, optional
        Number of the execution; the present one by default.

    Returns
    -------
    Position
        Where the run stands now.

    Raises
    ------
    IllegalTransition
        If the table does not allow the step: a late event of an older attempt, or a step out of
        a terminal state.
    """
    number = position.attempt if attempt is None else attempt
    name = to.value.capitalize() if name is None else name
    if number < position.attempt:
        message = f"attempt {number} is over; the run is in attempt {position.attempt}"
        raise IllegalTransition(message)
    reopened = number > position.attempt and position.type is not None and position.type.is_final
    if not reopened and to not in TRANSITIONS[position.type]:
        here = "no state" if position.type is None else f"{position.name} ({position.type})"
        message = f"a run in {here} cannot become {name} ({to}) within attempt {number}"
        raise IllegalTransition(message)
    return Position(to, name, number)


def rolled_back(position: Position) -> Position:
    """Return where a completed run stands once its transaction was rolled back: a name, and no other state.

    Raises
    ------
    IllegalTransition
        If it has not completed.
    """
    if position.type is not StateType.COMPLETED:
        message = f"a run in {position.name} ({position.type}) has nothing to roll back"
        raise IllegalTransition(message)
    return Position(position.type, "RolledBack", position.attempt)


@dataclass(slots=True)
class State:
    """A state of a run, as users see it.

    Attributes
    ----------
    type : StateType
        The kind of state.
    name : str
        Free text; the type in words by default.
    message : str
        Why.
    data : object
        Of a completed run its value or a reference to it, of a failed one the exception.
    state_details : dict
        ``flow_run_id``, ``task_run_id``, ``cause``, ``attempt``, …
    timestamp : float
        Seconds since 1970.
    """

    type: StateType
    name: str = ""
    message: str = ""
    data: Any = None
    state_details: dict[str, Any] = field(default_factory=dict)
    timestamp: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Fill in the name."""
        if not self.name:
            self.name = self.type.value.capitalize()

    def is_completed(self) -> bool:
        """Whether user code returned."""
        return self.type is StateType.COMPLETED

    def is_failed(self) -> bool:
        """Whether user code raised or exceeded its time."""
        return self.type is StateType.FAILED

    def is_crashed(self) -> bool:
        """Whether the infrastructure failed."""
        return self.type is StateType.CRASHED

    def is_cancelled(self) -> bool:
        """Whether somebody stopped it."""
        return self.type is StateType.CANCELLED

    def is_cancelling(self) -> bool:
        """Whether it was asked to stop and has not ended yet."""
        return self.type is StateType.CANCELLING

    def is_skipped(self) -> bool:
        """Whether there was nothing to do."""
        return self.type is StateType.SKIPPED

    def is_pending(self) -> bool:
        """Whether it waits."""
        return self.type is StateType.PENDING

    def is_scheduled(self) -> bool:
        """Whether it will start later."""
        return self.type is StateType.SCHEDULED

    def is_running(self) -> bool:
        """Whether user code is running."""
        return self.type is StateType.RUNNING

    def is_paused(self) -> bool:
        """Whether it waits for somebody."""
        return self.type is StateType.PAUSED

    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self.type.is_final

    def _repr_html_(self) -> str:
        """Show in a notebook."""
        rows: list[tuple[str, str]] = [("Message", self.message)] if self.message else []
        rows += [(name, str(value)) for name, value in self.state_details.items() if value is not None]
        if self.data is not None and not isinstance(self.data, Stored):
            kind = type(self.data).__name__
            shown = f"{kind}: {self.data}" if isinstance(self.data, BaseException) else kind
            rows.append(("Data", shown))
        return markup.card("State", "", [("State", markup.badge(self.type, self.name)), *rows])

    def result(self, raise_on_failure: bool = True, retry_result_failure: bool = True) -> Any:
        """Return the value of the run, fetched if needed.

        Parameters
        ----------
        raise_on_failure : bool
            False gives the exception instead of raising it.
        retry_result_failure : bool
            Try once more if the value cannot be fetched or loaded.

        Raises
        ------
        Exception
            The run's own, if it failed; `FailedRun`, `CrashedRun` or `CancelledRun` if it left
            none; `UnfinishedRun` if it has not ended; `MissingResult` if its value is gone.
        """
        try:
            return self._result(raise_on_failure, retry_result_failure)
        except BaseException as error:
            errors.hide_frames(error)
            raise

    def _result(self, raise_on_failure: bool, again: bool) -> Any:
        if self.type is StateType.COMPLETED:
            return _loaded(self.data, again) if isinstance(self.data, Stored) else self.data
        if self.type is StateType.SKIPPED:
            return None
        error = failure_of(self)
        if raise_on_failure:
            raise error
        return error


class Stored:
    """Data of a state that is not here: `load` brings it.

    Attributes
    ----------
    keeps : bool
        Whether what was loaded may stay in memory.
    """

    keeps = True

    def load(self) -> Any:
        """Return the value."""
        raise NotImplementedError


def _loaded(data: Stored, again: bool) -> Any:
    try:
        return data.load()
    except (OSError, errors.StorageRefused):
        if not again:
            raise
        return data.load()


class StateGroup:
    """Counts of several states, such as those of the members of a flow.

    Parameters
    ----------
    states : iterable of State
        In any order.

    Attributes
    ----------
    states : list of State
        As given.
    total_count, completed_count, skipped_count, cancelled_count, paused_count, not_final_count : int
        How many there are of each kind.
    fail_count : int
        FAILED and CRASHED together.
    """

    def __init__(self, states: Iterable[State]) -> None:
        self.states = list(states)
        self.total_count = len(self.states)
        self.completed_count = self._count(StateType.COMPLETED)
        self.skipped_count = self._count(StateType.SKIPPED)
        self.fail_count = self._count(StateType.FAILED) + self._count(StateType.CRASHED)
        self.cancelled_count = self._count(StateType.CANCELLED)
        self.paused_count = self._count(StateType.PAUSED)
        self.not_final_count = sum(not state.is_final() for state in self.states)

    def _count(self, kind: StateType) -> int:
        return sum(state.type is kind for state in self.states)

    def all_completed(self) -> bool:
        """Whether every one completed or was skipped, and one at least completed."""
        done = self.completed_count + self.skipped_count
        return done == self.total_count and (self.completed_count > 0 or self.total_count == 0)

    def all_skipped(self) -> bool:
        """Whether there are any, and every one was skipped."""
        return 0 < self.total_count == self.skipped_count

    def any_failed(self) -> bool:
        """Whether any failed or crashed."""
        return self.fail_count > 0

    def any_cancelled(self) -> bool:
        """Whether any was cancelled."""
        return self.cancelled_count > 0

    def any_paused(self) -> bool:
        """Whether any waits for somebody."""
        return self.paused_count > 0

    def all_final(self) -> bool:
        """Whether every one has ended."""
        return self.not_final_count == 0

    def counts_message(self) -> str:
        """Say in words how many there are of each kind."""
        parts = [
            f"{count}/{self.total_count} states {word}"
            for count, word in (
                (self.not_final_count, "are not final"),
                (self.fail_count, "failed"),
                (self.cancelled_count, "cancelled"),
                (self.paused_count, "paused"),
                (self.skipped_count, "skipped"),
            )
            if count
        ]
        return (", ".join(parts) or "All states completed") + "."

    def __len__(self) -> int:
        """How many states there are."""
        return self.total_count

    def __repr__(self) -> str:
        """Show the counts."""
        return f"<StateGroup {self.counts_message()}>"


def failure_of(state: State) -> BaseException:
    """Return the exception that a state without a value stands for."""
    data = state.data
    if isinstance(data, BaseException):
        return data
    if isinstance(data, State):
        return failure_of(data)
    if isinstance(data, (list, tuple)):
        for member in data:
            if isinstance(member, State) and not (member.is_completed() or member.is_skipped()):
                return failure_of(member)
    kinds: dict[StateType, type[errors.RunError]] = {
        StateType.FAILED: errors.FailedRun,
        StateType.CRASHED: errors.CrashedRun,
        StateType.CANCELLED: errors.CancelledRun,
        StateType.PAUSED: errors.PausedRun,
    }
    kind = kinds.get(state.type)
    run_id = state.state_details.get("task_run_id") or state.state_details.get("flow_run_id")
    if kind is None:
        message = state.message or f"Run is in {state.name} state, its result is not available."
        return errors.UnfinishedRun(message).of_run(run_id)
    text = data if isinstance(data, str) else state.message
    return kind(text or f"the run ended as {state.name}").of_run(run_id)


class Constructor(Protocol):
    """What makes a state of one type."""

    def __call__(self, message: str = "", data: Any = None, name: str = ..., **details: Any) -> State:
        """Make the state."""


def _constructor(kind: StateType, name: str) -> Constructor:
    def make(message: str = "", data: Any = None, name: str = name, **details: Any) -> State:
        return State(kind, name, message, data, details)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"Make a state of type {kind} with the name {name!r}."
    return make


Scheduled = _constructor(_S, "Scheduled")
Late = _constructor(_S, "Late")
AwaitingRetry = _constructor(_S, "AwaitingRetry")
AwaitingConcurrencySlot = _constructor(_S, "AwaitingConcurrencySlot")
Resuming = _constructor(_S, "Resuming")
Pending = _constructor(_P, "Pending")
Submitting = _constructor(_P, "Submitting")
InfrastructurePending = _constructor(_P, "InfrastructurePending")
Running = _constructor(_R, "Running")
Retrying = _constructor(_R, "Retrying")
Paused = _constructor(_PA, "Paused")
Suspended = _constructor(_PA, "Suspended")
Cancelling = _constructor(_CG, "Cancelling")
Completed = _constructor(_C, "Completed")
Cached = _constructor(_C, "Cached")
RolledBack = _constructor(_C, "RolledBack")
Failed = _constructor(_F, "Failed")
TimedOut = _constructor(_F, "TimedOut")
Crashed = _constructor(_X, "Crashed")
Cancelled = _constructor(_CD, "Cancelled")
Skipped = _constructor(_SK, "Skipped")
