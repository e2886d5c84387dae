"""Cancel: what has not started is dropped, running code is asked to stop."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from penstock import CancelledRun, allow_failure, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def add(x: Any = 1, y: int = 1) -> Any:
    return x + y


@task
def loop(started: Path, seconds: float = 30.0) -> str:
    """Run Python code for a long time."""
    started.touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)
    return "not stopped"


def test_running_code_is_stopped(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> float:
        future = loop.submit(tmp_path / "started")
        wait_until((tmp_path / "started").exists)
        begun = time.monotonic()
        assert future.cancel()
        future.wait(timeout=15)
        seconds = time.monotonic() - begun
        assert future.cancelled()
        assert future.done()
        assert future.state.is_cancelled()
        assert isinstance(future.exception(), CancelledRun)
        with pytest.raises(CancelledRun):
            future.result()
        assert not future.cancel()
        return seconds

    assert in_flow(body) < 2.0
    assert record.task("loop").type == "CANCELLED"


def test_force_ends_what_does_not_listen(
    apart: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    @task(crash_retries=3)
    def deaf(started: Path) -> None:
        started.touch()
        time.sleep(30)  # one call into C, which no request interrupts

    def body() -> int:
        future = deaf.submit(tmp_path / "started")
        wait_until((tmp_path / "started").exists)
        assert future.cancel(force=True)
        future.wait(timeout=20)
        assert future.cancelled()
        found: int = add.submit(1).result()
        return found

    assert in_flow(body) == 2
    assert (record.task("deaf").type, record.task("deaf").attempt) == ("CANCELLED", 1)


def test_what_has_not_started_is_dropped(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    ran = tmp_path / "ran"

    @task
    def never(after: Any) -> None:
        ran.touch()

    def body() -> None:
        first = loop.submit(tmp_path / "started")
        second = never.submit(first)
        third = never.submit(second)
        wait_until((tmp_path / "started").exists)
        assert second.cancel()
        second.wait(timeout=5)
        assert second.cancelled()
        third.wait(timeout=5)
        assert third.state.name == "NotReady"
        first.cancel()

    in_flow(body)
    assert not ran.exists()
    assert [row.state["name"] for row in record.tasks()] == ["Cancelled", "Cancelled", "NotReady"]


def test_allow_failure_does_not_admit_what_was_cancelled(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> None:
        first = loop.submit(tmp_path / "started")
        second = add.submit(allow_failure(first))
        wait_until((tmp_path / "started").exists)
        first.cancel()
        second.wait(timeout=15)
        assert second.state.name == "NotReady"

    in_flow(body)


def test_dependants_of_a_cancelled_run(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> None:
        first = loop.submit(tmp_path / "started")
        second = add.submit(first)
        wait_until((tmp_path / "started").exists)
        first.cancel()
        second.wait(timeout=15)
        assert (second.state.type, second.state.name) == ("PENDING", "NotReady")

    in_flow(body)


def test_a_cancelled_run_is_not_tried_again(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> None:
        future = loop.with_options(retries=5, crash_retries=5).submit(tmp_path / "started")
        wait_until((tmp_path / "started").exists)
        future.cancel()
        future.wait(timeout=15)

    in_flow(body)
    assert (record.task("loop").type, record.task("loop").attempt) == ("CANCELLED", 1)


def test_a_finished_run_cannot_be_cancelled(in_flow: InFlow, record: Record) -> None:
    def body() -> Any:
        future = add.submit(1)
        future.wait()
        assert not future.cancel()
        assert not future.cancelled()
        return future

    assert in_flow(body) == 2
    assert record.types() == ["COMPLETED"]


def test_a_whole_map(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> None:
        futures = loop.map([tmp_path / str(i) for i in range(12)])
        wait_until(lambda: any(tmp_path.iterdir()))
        assert futures.cancel()
        futures.wait(timeout=20)
        assert all(future.cancelled() for future in futures)

    in_flow(body)
    assert record.types("loop") == ["CANCELLED"] * 12


def test_a_flow_ends_cancelled_with_its_member(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> Any:
        future = loop.submit(tmp_path / "started")
        wait_until((tmp_path / "started").exists)
        future.cancel()
        return future

    with pytest.raises(CancelledRun):
        in_flow(body)
    assert (record.flow().type, record.flow().state["message"]) == ("CANCELLED", "1/1 states cancelled.")


def test_a_direct_call_cannot_outlive_ctrl_c(in_flow: InFlow, record: Record) -> None:
    @task
    def pressed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_flow(lambda: pressed())
    assert record.task("pressed").type == "CRASHED"
    assert record.flow().type == "CRASHED"


def test_a_cancel_that_comes_as_the_run_ends(
    parallel: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path
) -> None:
    """Completed means that there is a value; cancelled before it started, that nothing was executed."""

    @task
    def quick(folder: Path, number: int) -> int:
        (folder / str(number)).touch()
        return number

    def body() -> list[str]:
        wrong = []
        for number in range(60):
            future = quick.submit(tmp_path, number)
            future.wait(number % 12 / 2000)
            future.cancel()
            value = future.result(timeout=20, raise_on_failure=False)
            state = future.state
            if state.is_completed() and value != number:
                wrong.append(f"{number}: {value!r}")
            if "before it" in state.message and (tmp_path / str(number)).exists():
                wrong.append(f"{number}: was executed, and {state.message!r}")
        return wrong

    assert in_flow(body) == []
    assert set(record.types("quick")) <= {"COMPLETED", "CANCELLED"}


class Deaf:
    """Swallows what strikes while it goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __del__(self) -> None:
        (self.folder / "going").touch()
        end = time.monotonic() + 10
        while time.monotonic() < end and not (self.folder / "asked").exists():
            pass
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass


@task
def drop_and_loop(folder: Path) -> str:
    Deaf(folder)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.005)  # work: something to stop
    return "not stopped"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_request_that_is_swallowed_is_made_again(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Path, wait_until: Any
) -> None:
    def body() -> tuple[str, float]:
        future = drop_and_loop.submit(tmp_path)
        wait_until((tmp_path / "going").exists)
        begun = time.monotonic()
        threading.Timer(0.1, (tmp_path / "asked").touch).start()
        future.cancel()
        future.wait(timeout=15)
        return future.state.name, time.monotonic() - begun

    name, seconds = in_flow(body)
    assert (name, seconds < 5) == ("Cancelled", True)
