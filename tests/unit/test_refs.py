"""Finding leaves in structures, and putting others in their place."""

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pydantic
import pytest
from hypothesis import strategies as st

from penstock import allow_failure, quote, unmapped
from penstock.engine.refs import WALKED, Slot, fill, replace


class Point(NamedTuple):
    x: Any
    y: Any


class Model(pydantic.BaseModel):
    name: str
    content: Any = None


class Mark:
    """What is looked for."""


@dataclasses.dataclass
class Record:
    name: str
    content: Any
    derived: int = dataclasses.field(default=0, init=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    content: Any


def swapped(value: Any) -> Any:
    return replace(value, lambda item, _: "found" if isinstance(item, Mark) else item)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Mark(), "found"),
        ([Mark(), 1], ["found", 1]),
        ((Mark(),), ("found",)),
        ({1: Mark()}, {1: "found"}),
        ({Mark(): 1}, {"found": 1}),
        ({Mark()}, {"found"}),
        (frozenset([Mark()]), frozenset(["found"])),
        (Point(1, Mark()), Point(1, "found")),
        ([[[{"a": (Mark(),)}]]], [[[{"a": ("found",)}]]]),
        (Record("m51", [Mark()]), Record("m51", ["found"])),
        (Slotted(Mark()), Slotted("found")),
        (Model(name="m51", content=[Mark()]), Model(name="m51", content=["found"])),
    ],
)
def test_places_that_are_searched(value: Any, expected: Any) -> None:
    found = swapped(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("value", ["text", b"bytes", np.array([1, 2]), OrderedDict(a=1), range(3), None, int])
def test_places_that_are_left_alone(value: Any) -> None:
    assert swapped(value) is value


def test_what_is_untouched_is_not_copied() -> None:
    inner: list[Any] = [1, 2]
    record = Record("m51", inner)
    value = [record, {"key": inner}, (1, inner)]
    assert swapped(value) is value
    changed = swapped([value, Mark()])
    assert changed[0] is value


def test_the_original_is_never_changed() -> None:
    mark = Mark()
    record, listed = Record("m51", mark), [mark]
    record.derived = 7
    found = swapped([record, listed])
    assert record.content is mark
    assert listed == [mark]
    assert found[0].derived == 7


def test_long_lists_without_a_find_are_given_up() -> None:
    late = [0] * WALKED + [Mark()]
    assert swapped(late) is late
    early = [Mark()] + [0] * WALKED + [Mark()]
    assert swapped(early) == ["found"] + [0] * WALKED + ["found"]
    table = dict.fromkeys(range(WALKED), 0) | {"late": Mark()}
    assert swapped(table) is table


def test_marks() -> None:
    seen: list[tuple[Any, int]] = []

    def leaf(value: Any, tolerant: int) -> Any:
        seen.append((value, tolerant))
        return value

    assert replace([allow_failure([1, [2]]), unmapped(3), 4], leaf) == [[1, [2]], 3, 4]
    assert seen == [(1, True), (2, True), (3, False), (4, False)]
    seen.clear()
    assert replace(quote([Mark]), leaf) == [Mark]
    assert seen == []


STRUCTURES = st.recursive(
    st.integers() | st.text(max_size=3) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(), inner, max_size=3)
        | st.builds(Record, st.just("r"), inner)
    ),
    max_leaves=12,
)


@hypothesis.given(STRUCTURES)
def test_slots_out_and_values_in_again(value: Any) -> None:
    values: list[Any] = []

    def out(item: Any, _: int) -> Any:
        if not isinstance(item, int):
            return item
        values.append(item)
        return Slot(len(values) - 1)

    emptied = replace(value, out)
    assert fill(emptied, values) == value
