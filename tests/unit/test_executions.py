"""What the loss of an attempt says of the number of executions."""

import itertools
from typing import Any

import pytest

from penstock import errors
from penstock.engine.executions import is_before, spelled, was_executed


def lost(**known: Any) -> errors.WorkerLost:
    cause = errors.WorkerLost("gone")
    for name, value in known.items():
        setattr(cause, name, value)
    return cause


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, None),
        ({"began": False}, False),
        ({"began": True}, True),  # a back end that cannot tell more
        ({"began": True, "called": True}, True),
        ({"began": True, "called": False}, False),  # the worker died as it loaded the function
    ],
)
def test_executed_is_what_was_called(known: dict[str, Any], expected: bool | None) -> None:
    assert was_executed(lost(**known)) is expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"element": 4, "called": True}, [True, True, False, True, True, False]),
        ({"element": 4, "called": False}, [True, True, False, True, False, False]),
        ({"element": 2, "called": True}, [True, True, True, True, True, False]),
        ({"element": 0, "called": False}, [False] * 6),
        ({"element": None}, [None] * 6),
        ({"began": False}, [False] * 6),
    ],
)
def test_of_a_chunk_only_what_had_its_turn(known: dict[str, Any], expected: list[bool | None]) -> None:
    """Three elements in two stages: places 0 3 1 4 2 5 have their turns one after the other."""
    cause = lost(**{"began": True, **known})
    assert [was_executed(cause, place, 3) for place in range(6)] == expected


def test_turns_go_element_by_element() -> None:
    turns = [0, 3, 1, 4, 2, 5]
    for one, other in itertools.product(range(6), repeat=2):
        assert is_before(one, other, 3) is (turns.index(one) < turns.index(other))
        assert is_before(one, other, 0) is (one < other)


def test_what_is_no_death_tells_nothing() -> None:
    assert was_executed(RuntimeError("what a runner ought not to say")) is None
    assert [spelled(one) for one in (True, False, None)] == ["yes", "no", "unknown"]
