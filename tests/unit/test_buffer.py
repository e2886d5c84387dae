"""When a batch of runs goes out."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.engine import buffer as module
from penstock.engine.buffer import BATCH, Buffer
from penstock.engine.calls import TaskRun
from penstock.engine.chunks import Packer


def run(number: int) -> TaskRun:
    made: Any = TaskRun.__new__(TaskRun)
    made._name = str(number)
    made.mapped = made.dependants = None
    found: TaskRun = made
    return found


@pytest.fixture
def pumped(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    monkeypatch.setattr(module, "PAUSE", 0.02)
    return threading.Event()


def test_the_first_after_a_pause_goes_at_once(pumped: threading.Event) -> None:
    buffer, first = Buffer(pumped.set), run(1)
    buffer.add(first, leading=True)
    assert buffer.due
    assert buffer.take() == [first]
    assert not buffer.due
    assert len(buffer) == 0


def test_the_next_ones_wait_for_company(pumped: threading.Event) -> None:
    buffer, runs = Buffer(pumped.set), [run(i) for i in range(3)]
    buffer.add(runs[0], leading=True)
    buffer.take()
    buffer.add(runs[1], leading=True)
    buffer.add(runs[2], leading=True)
    assert not buffer.due
    assert pumped.wait(5)
    assert buffer.due
    assert buffer.take() == runs[1:]


def test_a_generator_stays_until_somebody_looks(
    pumped: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ITEMS_PAUSE", 60.0)
    buffer, kept, other = Buffer(pumped.set), run(1), run(2)
    buffer.add(kept, leading=False)
    buffer.keep(kept)
    buffer.add(other, leading=False)
    assert pumped.wait(5)
    assert buffer.take() == [other]
    buffer.flush()
    assert not buffer.due, "news of other runs are no reason"
    assert kept in buffer
    assert len(buffer) == 1
    buffer.flush(everything=True)
    assert buffer.take() == [kept]
    assert kept not in buffer
    buffer.add(kept, leading=False)
    buffer.keep(kept)
    kept.dependants = [SimpleNamespace()]  # type: ignore[list-item]
    buffer.add(other, leading=False)
    assert buffer.take() == [kept, other], "what depends on it must not go before it"
    kept.dependants = None
    buffer.add(kept, leading=False)
    buffer.keep(kept)
    assert buffer.discard(kept)
    assert not buffer.discard(kept)
    assert len(buffer) == 0


def test_a_generator_that_nobody_asks_for_goes_all_the_same(
    pumped: threading.Event, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    monkeypatch.setattr(module, "ITEMS_PAUSE", 0.01)
    buffer, kept = Buffer(pumped.set), run(1)
    buffer.add(kept, leading=False)
    buffer.keep(kept)
    wait_until(lambda: buffer.due)
    assert buffer.take() == [kept]


def test_inside_a_task_nothing_goes_at_once(pumped: threading.Event) -> None:
    buffer = Buffer(pumped.set)
    buffer.add(run(1), leading=False)
    assert not buffer.due
    assert pumped.wait(5)
    assert buffer.due


def test_a_full_batch_goes_at_once(pumped: threading.Event) -> None:
    buffer = Buffer(pumped.set)
    for number in range(BATCH):
        assert not buffer.due
        buffer.add(run(number), leading=False)
    assert buffer.due
    assert len(buffer.take()) == BATCH


def test_somebody_looks(pumped: threading.Event) -> None:
    buffer = Buffer(pumped.set)
    buffer.flush()
    assert not buffer.due
    buffer.add(run(1), leading=False)
    buffer.flush()
    assert buffer.due


def test_a_run_is_taken_out(pumped: threading.Event) -> None:
    buffer, one, other = Buffer(pumped.set), run(1), run(2)
    buffer.add(one, leading=False)
    buffer.add(other, leading=False)
    assert buffer.discard(one)
    assert not buffer.discard(one)
    assert buffer.take() == [other]


def test_a_map_that_was_taken_back_keeps_nothing_waiting(pumped: threading.Event) -> None:
    options: Any = SimpleNamespace(chunk_size=4)
    packer = Packer(options, 2, 100)
    buffer, element, next_one = Buffer(pumped.set), run(1), run(2)
    element.mapped = SimpleNamespace(packer=packer)  # type: ignore[assignment]
    buffer.add(element, leading=True)
    assert element in buffer
    assert buffer.discard(element)
    assert not buffer.discard(element)
    assert not buffer._packers
    buffer.take()
    buffer._last = -module.PAUSE
    buffer.add(next_one, leading=True)
    assert buffer.due, "nothing waits: it may go at once"
