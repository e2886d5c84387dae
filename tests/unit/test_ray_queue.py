"""What Ray is told of, and when."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest

from penstock.runners.base import Options, Submission
from penstock.runners.ray_pump import Flight, Handle
from penstock.runners.ray_queue import LEAST_SHARE, MOST, UNSEEN_SHARE, Held, Queue, kind_of

THREADS, CAPACITY = 2, 1_000_000_000


def held(name: str, *upstream: Held, priority: int = 0, options: Options | None = None) -> Held:
    submission = Submission((name, 1), b"", b"", b"", priority=priority, options=options or Options())
    return Held(submission, Handle(submission.key, None, None), tuple(one.handle for one in upstream), ())


def pair(number: int) -> list[Held]:
    """Return a producer and its consumer."""
    make = held(f"make-{number}")
    return [make, held(f"use-{number}", make, priority=1)]


def go_on(queue: Queue) -> list[Held]:
    """Send what there is room for."""
    found = []
    while (one := queue.take()) is not None:
        one.handle.value, one.handle.note = f"value of {name(one)}", f"note of {name(one)}"
        queue.sent(one)
        found.append(one)
    return found


def name(one: Held) -> str:
    return one.handle.key[0]


def end(queue: Queue, one: Held, nbytes: int = -1) -> None:
    handle = one.handle
    kind = kind_of(one.submission.options)
    queue.ended(Flight(handle, handle.value, handle.note, (), announce=False, kind=kind), nbytes)


def test_small_results_leave_nothing_behind() -> None:
    queue = Queue(THREADS, CAPACITY)
    queue.add([held(f"t-{number}") for number in range(100)])
    first = go_on(queue)
    assert len(first) == UNSEEN_SHARE * THREADS
    end(queue, first[0], nbytes=28)
    assert len(go_on(queue)) == 100 - len(first)
    assert not queue


def test_large_results_leave_room_for_few() -> None:
    queue = Queue(THREADS, CAPACITY)
    queue.add([held(f"t-{number}") for number in range(100)])
    first = go_on(queue)
    for one in first:
        end(queue, one, nbytes=50_000_000)
    assert len(go_on(queue)) == 5  # a quarter of the store
    assert len(queue) == 100 - len(first) - 5


def test_huge_results_still_give_every_cpu_something_to_do() -> None:
    queue = Queue(THREADS, CAPACITY)
    queue.add([held(f"t-{number}") for number in range(100)])
    for one in go_on(queue):
        end(queue, one, nbytes=CAPACITY)
    assert len(go_on(queue)) == LEAST_SHARE * THREADS


def test_consumers_go_before_further_producers() -> None:
    queue = Queue(1, CAPACITY)
    queue.add([one for number in range(50) for one in pair(number)])
    assert [name(one) for one in go_on(queue)] == [
        f"{what}-{n}" for n in range(4) for what in ("make", "use")
    ]


def test_what_depends_on_something_held_waits_and_gets_its_value() -> None:
    queue = Queue(1, CAPACITY)
    make, use = pair(0)
    queue.add([held(f"t-{number}") for number in range(UNSEEN_SHARE)])
    first = go_on(queue)
    queue.add([make, use])
    assert not go_on(queue)
    end(queue, first[0], nbytes=1)
    assert go_on(queue) == [make, use]
    make.handle.value = None  # the engine lets go of it
    assert use.given[make.handle] == ("value of make-0", "note of make-0")


def test_a_kind_that_cannot_run_takes_no_room_of_others() -> None:
    queue = Queue(1, CAPACITY)
    wanting = Options(resources=(("GPU", 1.0),))
    queue.add([held(f"gpu-{number}", options=wanting) for number in range(20)])
    assert len(go_on(queue)) == UNSEEN_SHARE
    queue.add([held("cpu")])
    assert [name(one) for one in go_on(queue)] == ["cpu"]


def test_options_without_a_hash_are_a_kind_too() -> None:
    environment: Any = {"env_vars": {"A": "1"}}
    options = dataclasses.replace(Options(), native=(("runtime_env", environment),))
    queue = Queue(1, CAPACITY)
    queue.add([held("t", options=options)])
    assert [name(one) for one in go_on(queue)] == ["t"]


def test_what_is_dropped_never_goes_and_names_what_depends_on_it() -> None:
    queue = Queue(1, CAPACITY)
    queue.add([held(f"t-{number}") for number in range(UNSEEN_SHARE)])
    first = go_on(queue)
    make, use = pair(0)
    last = held("last", use, priority=2)
    other = held("other")
    queue.add([make, use, last, other])
    dropped, orphans = queue.drop([make.handle, first[0].handle])
    assert dropped == [make]
    assert orphans == [use, last]
    end(queue, first[0], nbytes=1)
    assert go_on(queue) == [other]
    assert not queue


def test_long_tasks_open_the_room_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cluster that grows with what it is asked for would never grow."""
    now = 100.0
    monkeypatch.setattr("penstock.runners.ray_queue.time.monotonic", lambda: now)
    queue = Queue(1, CAPACITY)
    queue.add([held(f"t-{number}") for number in range(1_000)])
    assert len(go_on(queue)) == UNSEEN_SHARE
    now += 3
    assert len(go_on(queue)) == 7 * UNSEEN_SHARE


def test_a_cluster_that_grows_gets_more() -> None:
    queue = Queue(1, CAPACITY)
    queue.add([held(f"t-{number}") for number in range(100)])
    for one in go_on(queue):
        end(queue, one, nbytes=CAPACITY)
    assert len(go_on(queue)) == LEAST_SHARE
    queue.resize(10, CAPACITY)
    assert len(go_on(queue)) == 9 * LEAST_SHARE


def test_an_unknown_store_counts_results_as_small() -> None:
    queue = Queue(1, 0)
    queue.add([held(f"t-{number}") for number in range(MOST + 1)])
    assert len(go_on(queue)) == MOST


class Value:
    """Something that can be watched."""


def test_what_is_dropped_holds_no_value_any_longer() -> None:
    queue = Queue(1, CAPACITY)
    made = held("made")
    queue.add([made, *(held(f"t-{number}") for number in range(UNSEEN_SHARE))])
    go_on(queue)
    made.handle.value = Value()
    seen = weakref.ref(made.handle.value)
    use = held("use", made)
    queue.add([use])
    queue.drop([use.handle])
    made.handle.value = None
    del made, use
    gc.collect()
    assert seen() is None
