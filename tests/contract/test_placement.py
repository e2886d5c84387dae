"""The work runs where the runner says: in this thread, another thread, or another process."""

import os
import threading
import time
from typing import Any

from penstock import flow, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def where(x: int = 0) -> tuple[int, int]:
    time.sleep(0.05)
    return os.getpid(), threading.get_ident()


def here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def test_submitted_work_runs_where_the_runner_says(in_flow: InFlow, runner: TaskRunner) -> None:
    pid, thread = in_flow(lambda: where.submit())
    info = runner.info
    assert (pid == os.getpid()) is info.in_process
    in_this_thread = (pid, thread) == here()
    assert in_this_thread is (info.in_process and info.threads == 1)


def test_called_work_runs_here(in_flow: InFlow) -> None:
    assert in_flow(lambda: where()) == here()


def test_things_run_at_the_same_time_on_all_workers(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Any
) -> None:
    @task
    def meet(mine: str, theirs: str) -> tuple[str, int]:
        """End only if the other one runs, too."""
        (tmp_path / mine).touch()
        end = time.monotonic() + 20
        while not (tmp_path / theirs).exists():
            if time.monotonic() > end:
                return "alone", os.getpid()
            time.sleep(0.005)
        return "met", os.getpid()

    first, second = in_flow(lambda: [meet.submit("a", "b"), meet.submit("b", "a")])
    assert (first[0], second[0]) == ("met", "met")
    assert len({first[1], second[1]}) == min(2, parallel.info.workers)


def test_the_record_names_the_worker(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: where.map(range(3)))
    assert all(row.state["worker"] for row in record.tasks("where"))


def test_a_nested_flow_uses_the_same_workers(in_flow: InFlow, runner: TaskRunner) -> None:
    @flow
    def child() -> Any:
        return where.map(range(6))

    def body() -> Any:
        return [where.map(range(6)), child()]

    first, second = in_flow(body)
    assert {pid for pid, _ in first} | {pid for pid, _ in second} == {pid for pid, _ in first}


def test_nested_tasks_stay_on_the_workers(in_flow: InFlow, runner: TaskRunner) -> None:
    @task
    def outer() -> tuple[int, int]:
        return where.submit().result()

    pid, _ = in_flow(lambda: outer.submit())
    assert (pid == os.getpid()) is runner.info.in_process
