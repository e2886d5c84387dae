"""Marks around arguments."""

import pickle
from typing import Any

import pytest

from penstock import allow_failure, allow_skipped, freeze, opaque, quote, unmapped
from penstock.engine.annotations import Annotation

MARKS: list[Any] = [unmapped, allow_failure, allow_skipped, quote, opaque, freeze]


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_a_tuple_of_one(mark: Any) -> None:
    wrapped = mark([1, 2])
    assert isinstance(wrapped, tuple)
    assert isinstance(wrapped, Annotation)
    assert len(wrapped) == 1
    assert wrapped.unwrap() == [1, 2]
    assert wrapped.rewrap(3) == mark(3)
    assert repr(wrapped) == f"{mark.__name__}([1, 2])"
    assert pickle.loads(pickle.dumps(wrapped)) == wrapped


def test_marks_compare_by_kind_and_value() -> None:
    assert unmapped(1) == unmapped(1)
    assert unmapped(1) != unmapped(2)
    assert unmapped(1) != quote(1)
    assert quote(1) != (1,)
    assert len({unmapped(1), unmapped(1), quote(1)}) == 2


def test_unmapped_answers_for_every_position() -> None:
    assert [unmapped("x")[position] for position in (0, 5, 1000)] == ["x"] * 3
