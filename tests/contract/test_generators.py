"""Tasks that yield: their value is the list of what they yielded."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from penstock import UpstreamTaskError, put, task
from tests.conftest import InFlow
from tests.record import Record


@task
def planes(count: int, fails_at: int = -1) -> Iterator[Any]:
    for number in range(count):
        if number == fails_at:
            raise ValueError(f"plane {number} is missing")
        yield np.full(50_000, float(number))


@task
async def planes_later(count: int) -> AsyncIterator[Any]:
    for number in range(count):
        yield np.full(50_000, float(number))


@task
def first(plane: Any) -> float:
    return float(plane[0])


@task
def overwrite(plane: Any) -> float:
    plane[0] = 9
    return float(plane[0])


@pytest.mark.parametrize("source", [planes, planes_later])
def test_what_was_yielded_goes_to_consumers(in_flow: InFlow, source: Any) -> None:
    assert in_flow(lambda: first.map(source.submit(5))) == [0, 1, 2, 3, 4]
    assert [plane[0] for plane in in_flow(lambda: source.submit(3))] == [0, 1, 2]


def test_consumers_share_what_was_yielded(in_flow: InFlow) -> None:
    def body() -> Any:
        source = planes.submit(3)
        written = overwrite.with_options(inputs="copy").map(source)
        refused = [future.exception() for future in overwrite.map(source)]
        assert all("read-only" in str(error) for error in refused)
        return [written.result(), first.map(source).result()]

    assert in_flow(body) == [[9, 9, 9], [0, 1, 2]]


def test_a_generator_that_yields_nothing(in_flow: InFlow) -> None:
    assert in_flow(lambda: planes.submit(0)) == []
    assert in_flow(lambda: first.map(planes.submit(0))) == []


def test_a_generator_that_fails_midway(in_flow: InFlow, record: Record) -> None:
    """Its error is seen as that of any task; there are no elements to map over."""

    def body() -> Any:
        source = planes.submit(5, fails_at=3)
        with pytest.raises(UpstreamTaskError, match="plane 3 is missing"):
            first.map(source)
        return source.exception()

    error = in_flow(body)
    assert isinstance(error, ValueError)
    assert record.task("planes").type == "FAILED"
    assert record.tasks("first") == []


def test_a_generator_is_no_value(in_flow: InFlow) -> None:
    """One made by the caller runs in the caller; it is drawn when it is mapped over."""
    assert in_flow(lambda: first.map(np.full(3, float(i)) for i in range(3))) == [0, 1, 2]
    assert in_flow(lambda: first.map(put([np.full(3, float(i)) for i in range(3)]))) == [0, 1, 2]
