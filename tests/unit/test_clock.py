"""The clock calls at the right time, and not what was taken back."""

import threading
import time

from penstock.engine.clock import Clock


def test_calls_come_in_the_order_of_their_times() -> None:
    clock, called, last = Clock(), [], threading.Event()
    for name, delay in (("late", 0.06), ("early", 0.01), ("middle", 0.03)):
        clock.call_later(delay, lambda name=name: called.append(name))  # type: ignore[misc]
    clock.call_later(0.08, last.set)
    assert last.wait(5)
    assert called == ["early", "middle", "late"]


def test_not_before_its_time() -> None:
    clock, rang, begun = Clock(), threading.Event(), time.monotonic()
    clock.call_later(0.05, rang.set)
    assert rang.wait(5)
    assert time.monotonic() - begun >= 0.05


def test_a_cancelled_call_is_not_made() -> None:
    clock, called, last = Clock(), [], threading.Event()
    alarm = clock.call_later(0.01, lambda: called.append(1))
    clock.call_later(0.05, last.set)
    alarm.cancel()
    alarm.cancel()
    assert last.wait(5)
    assert called == []


def test_an_earlier_call_wakes_the_sleeper() -> None:
    clock, rang = Clock(), threading.Event()
    clock.call_later(60, lambda: None)
    begun = time.monotonic()
    clock.call_later(0.01, rang.set)
    assert rang.wait(5)
    assert time.monotonic() - begun < 2


def test_calls_at_once() -> None:
    clock, rang = Clock(), threading.Event()
    clock.call_later(0, rang.set)
    assert rang.wait(5)


def test_its_thread_holds_no_process() -> None:
    clock = Clock()
    clock.call_later(60, lambda: None)
    assert clock._thread is not None
    assert clock._thread.daemon
