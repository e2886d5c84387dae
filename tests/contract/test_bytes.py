"""Values stay where they were made: counted from outside, by memory and by sockets."""

import gc
import os
import socket
import time
from typing import Any, Self

import numpy as np
import psutil
import pytest

from penstock import flow, task, unmapped, wait
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record

MEGABYTE = 1 << 20
SIZE = 40 * MEGABYTE  # beyond what malloc keeps for itself
COUNT = 2
SLACK = 20 * MEGABYTE


@task
def make(seed: int = 0) -> Any:
    return np.full(SIZE // 8, float(seed))


@task
def add_one(x: Any) -> Any:
    return x + 1


@task
def first_of(x: Any) -> float:
    return float(x[0])


def private_memory() -> int:
    """Bytes that this process alone holds; what is mapped from shared memory does not count."""
    gc.collect()
    found = psutil.Process().memory_full_info()
    return int(found.uss)


class Bytes:
    """What a block adds to the driver's memory, and what Python reads from sockets and pipes meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = self.read = self._before = 0
        self._count(monkeypatch, socket.socket, "recv")
        self._count(monkeypatch, socket.socket, "recv_into")
        self._count(monkeypatch, os, "read")

    def _count(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            self.read += found if isinstance(found, int) else len(found)
            return found

        monkeypatch.setattr(owner, name, counted)

    def __enter__(self) -> Self:
        self._before, self.read = private_memory(), 0
        return self

    def __exit__(self, *error: object) -> None:
        self.memory = private_memory() - self._before


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Bytes:
    return Bytes(monkeypatch)


def warm(in_flow: InFlow) -> None:
    in_flow(lambda: first_of.submit(make.submit()))


def test_waiting_looking_and_leaving_move_nothing(
    apart: TaskRunner, in_flow: InFlow, record: Record, counted: Bytes
) -> None:
    warm(in_flow)

    def body() -> None:
        with counted:
            futures = [add_one.submit(make.submit(i)) for i in range(COUNT)]
            wait(futures)
            assert all(future.done() for future in futures)
            assert all(future.state.is_completed() for future in futures)
            assert [future.exception() for future in futures] == [None] * COUNT
            assert all(SIZE <= future.nbytes < SIZE + 10_000 for future in futures)

    in_flow(body)
    assert counted.memory < SLACK
    assert counted.read < MEGABYTE
    assert record.flows()[-1].state["driver_bytes"] == 0


def test_a_chain_does_not_touch_the_driver(
    apart: TaskRunner, in_flow: InFlow, record: Record, counted: Bytes
) -> None:
    warm(in_flow)

    def body() -> float:
        with counted:
            future: Any = make.submit(1)
            for _ in range(4):
                future = add_one.submit(future)
            found: float = first_of.submit(future).result()
        return found

    assert in_flow(body) == 5.0
    assert counted.memory < SLACK
    assert counted.read < MEGABYTE
    assert 0 < record.flows()[-1].state["driver_bytes"] < 1000


def test_result_moves_what_was_asked_for(in_flow: InFlow, runner: TaskRunner, record: Record) -> None:
    def body() -> float:
        futures = make.map(range(COUNT))
        wait(futures)
        return float(futures[1].result()[0])

    assert in_flow(body) == 1.0
    moved = record.flow().state["driver_bytes"]
    assert (moved == 0) is runner.info.in_process
    assert moved == 0 or SIZE <= moved < SIZE + 10_000


def test_returned_futures_are_downloaded_at_the_top_only(
    in_flow: InFlow, runner: TaskRunner, record: Record
) -> None:
    @flow
    def child() -> Any:
        return make.submit(3)

    def body() -> Any:
        return first_of.submit(child())

    assert in_flow(body) == 3.0
    assert record.flow().state["driver_bytes"] < 1000


def test_a_large_argument_crosses_once(
    apart: TaskRunner, in_flow: InFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = np.ones(SIZE // 8)
    sent: list[Any] = []
    put = apart.put

    def noted(values: Any) -> Any:
        sent.extend(values)
        return put(values)

    monkeypatch.setattr(apart, "put", noted)
    assert in_flow(lambda: add.map(range(20), unmapped(table))) == [float(i + 1) for i in range(20)]
    assert sum(value is table for value in sent) == 1


@task
def add(i: int, table: Any) -> float:
    return float(table[i]) + i


def held(pids: set[int]) -> int:
    """Bytes in workers and in shared memory."""
    total = psutil.virtual_memory().shared
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


def test_a_dropped_future_frees_its_value(apart: TaskRunner, in_flow: InFlow, wait_until: Any) -> None:
    """The cluster never holds more than a few of the values that nobody asked for."""

    @task
    def pid(x: int) -> int:
        time.sleep(0.02)
        return os.getpid()

    @task
    def rest() -> None:
        time.sleep(0.4)  # values are freed in the background

    def body() -> None:
        pids = set(pid.map(range(8)).result())
        touched = make.map(range(3))  # a store that was used once does not shrink: it is used again
        touched.wait()
        del touched
        gc.collect()
        rest.submit().wait()
        before = held(pids)
        for i in range(5):  # two more than were touched
            make.submit(i).wait()  # nobody keeps the future
            gc.collect()
            rest.submit().wait()
        wait_until(lambda: held(pids) - before < SIZE, 10)

    in_flow(body)


def test_a_dropped_future_frees_its_value_in_this_process(in_flow: InFlow) -> None:
    import weakref

    class Plane:
        pass

    references: list[Any] = []

    @task
    def plane() -> Any:
        made = Plane()
        references.append(weakref.ref(made))
        return made

    def body() -> None:
        future = plane.submit()
        future.wait()
        del future
        gc.collect()

    in_flow(body)
    gc.collect()
    assert [reference() for reference in references if reference() is not None] == []


def test_the_driver_keeps_nothing_after_the_flow(in_flow: InFlow) -> None:
    warm(in_flow)
    before = private_memory()
    for i in range(4):
        in_flow(lambda i=i: first_of.submit(add_one.submit(make.submit(i))))
    assert private_memory() - before < SLACK + SIZE


@pytest.mark.parametrize("size", [10, SIZE // 8], ids=["small", "large"])
def test_sizes_are_in_the_record(in_flow: InFlow, record: Record, size: int) -> None:
    @task
    def zeros() -> Any:
        return np.zeros(size)

    in_flow(lambda: zeros.submit().wait())
    assert record.task("zeros").state["nbytes"] >= 8 * size
