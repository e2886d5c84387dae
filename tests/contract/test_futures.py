"""One class of futures: looking and waiting move nothing, `result` does."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from penstock import (
    Future,
    PenstockFuture,
    PenstockFutureList,
    as_completed,
    task,
    wait,
)
from penstock.errors import UnserializableArgument
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow


@task
def double(x: int) -> int:
    return 2 * x


@task
def fail(text: str = "no data") -> int:
    raise ValueError(text)


@task
def after(path: Path, value: int) -> int:
    """Return when the file is there."""
    while not path.exists():
        time.sleep(0.005)
    return value


def test_one_class() -> None:
    assert Future is PenstockFuture


def test_what_a_finished_future_tells(in_flow: InFlow) -> None:
    def body() -> None:
        future = double.submit(4)
        future.wait()
        assert isinstance(future, PenstockFuture)
        assert future.done()
        assert not future.running()
        assert not future.cancelled()
        assert future.state.is_completed()
        assert future.exception() is None
        assert future.nbytes > 0
        assert future.where
        assert future.result() == future.result() == 8
        assert future.result(timeout=0) == 8
        assert "double" in repr(future)

    in_flow(body)


def test_what_a_failed_future_tells(in_flow: InFlow) -> None:
    def body() -> None:
        future = fail.submit()
        assert isinstance(future.exception(), ValueError)
        assert future.state.is_failed()
        assert future.state.message == "Task run encountered an exception: ValueError: no data"
        found: Any = future.result(raise_on_failure=False)
        assert isinstance(found, ValueError)
        with pytest.raises(ValueError, match="no data"):
            future.result()

    in_flow(body)


def test_an_unfinished_future(parallel: TaskRunner, in_flow: InFlow, tmp_path: Path) -> None:
    def body() -> None:
        future = after.submit(tmp_path / "go", 5)
        assert future.wait(timeout=0.05) is None  # type: ignore[func-returns-value]
        assert not future.done()
        assert not future.state.is_final()
        assert future.nbytes == 0
        with pytest.raises(TimeoutError, match=r"did not complete within 0\.05 seconds"):
            future.result(timeout=0.05)
        with pytest.raises(TimeoutError, match=r"did not complete within 0\.05 seconds"):
            future.exception(timeout=0.05)
        (tmp_path / "go").touch()
        assert future.result() == 5

    in_flow(body)


def test_callbacks_are_called_once_with_the_future(in_flow: InFlow) -> None:
    called: list[PenstockFuture[int]] = []

    def body() -> None:
        future, failed = double.submit(1), fail.submit()
        arrived = threading.Event()

        def note(ended: PenstockFuture[int]) -> None:
            called.append(ended)
            arrived.set()

        future.add_done_callback(note)
        assert arrived.wait(10)
        assert called == [future]
        future.add_done_callback(called.append)  # at once, since it has ended
        assert called == [future, future]
        failed.wait()
        failed.add_done_callback(called.append)
        assert called[2].state.is_failed()

    in_flow(body)


def test_a_callback_that_fails_harms_nobody(in_flow: InFlow, caplog: pytest.LogCaptureFixture) -> None:
    def raise_anything(_: Any) -> None:
        raise RuntimeError("the callback is wrong")

    def body() -> Any:
        future = double.submit(1)
        future.add_done_callback(raise_anything)
        return double.submit(future)

    assert in_flow(body) == 4
    assert "the callback is wrong" in caplog.text


def test_futures_are_keys(in_flow: InFlow) -> None:
    def body() -> None:
        one, other = double.submit(1), double.submit(1)
        assert one != other
        assert len({one, other, one}) == 2

    in_flow(body)


def test_wait_sorts_futures(parallel: TaskRunner, in_flow: InFlow, tmp_path: Path) -> None:
    def body() -> None:
        slow, quick, failed = after.submit(tmp_path / "go", 1), double.submit(1), fail.submit()
        wait([quick, failed])
        found = wait([slow, quick, failed], timeout=0.05)
        assert found.done == {quick, failed}
        assert found.not_done == {slow}
        (tmp_path / "go").touch()
        done, not_done = wait([slow, quick, quick])
        assert done == {slow, quick}
        assert not_done == set()
        assert wait([]) == (set(), set())
        with pytest.raises(ValueError, match="'timeout' must be a non-negative number, got -1"):
            wait([slow], timeout=-1)

    in_flow(body)


def test_as_completed_yields_in_order_of_completion(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Path
) -> None:
    def body() -> list[int]:
        late = after.submit(tmp_path / "go", 1)
        found = []
        for future in as_completed([late, double.submit(5), late]):
            found.append(future.result())
            (tmp_path / "go").touch()
        return found

    assert in_flow(body) == [10, 1]


def test_as_completed_times_out(parallel: TaskRunner, in_flow: InFlow, tmp_path: Path) -> None:
    def body() -> None:
        late, quick = after.submit(tmp_path / "go", 1), double.submit(1)
        quick.wait()
        ended = as_completed([late, quick], timeout=0.1)
        assert next(ended) == quick
        with pytest.raises(TimeoutError, match=r"1 \(of 2\) futures unfinished"):
            next(ended)
        (tmp_path / "go").touch()

    in_flow(body)


def test_as_completed_of_what_has_ended(in_flow: InFlow) -> None:
    def body() -> list[int]:
        futures = double.map(range(5))
        futures.wait()
        assert list(as_completed([])) == []
        return sorted(future.result() for future in as_completed(futures))

    assert in_flow(body) == [0, 2, 4, 6, 8]


def test_a_list_of_futures(in_flow: InFlow) -> None:
    def body() -> None:
        futures = double.map([3, 1, 2])
        assert isinstance(futures, PenstockFutureList)
        assert futures.wait() is None  # type: ignore[func-returns-value]
        assert futures.result() == [6, 2, 4]
        assert isinstance(futures[:2], PenstockFutureList)
        assert futures[0].result() == 6
        twice: PenstockFutureList[int] = PenstockFutureList([futures[0], futures[0]])
        assert twice.result() == [6, 6]

    in_flow(body)


def test_a_list_fails_with_its_first_failure(in_flow: InFlow) -> None:
    def body() -> None:
        mixed: PenstockFutureList[int] = PenstockFutureList(
            [double.submit(1), fail.submit("one"), double.submit(2)]
        )
        with pytest.raises(ValueError, match="one"):
            mixed.result()
        found: list[Any] = mixed.result(raise_on_failure=False)
        assert [found[0], found[2]] == [2, 4]
        assert isinstance(found[1], ValueError)

    in_flow(body)


def test_a_list_does_not_wait_for_the_others_if_one_fails(
    parallel: TaskRunner, in_flow: InFlow, tmp_path: Path
) -> None:
    def body() -> None:
        mixed: PenstockFutureList[int] = PenstockFutureList([after.submit(tmp_path / "go", 1), fail.submit()])
        with pytest.raises(ValueError, match="no data"):
            mixed.result()
        (tmp_path / "go").touch()

    in_flow(body)


def test_a_list_times_out(parallel: TaskRunner, in_flow: InFlow, tmp_path: Path) -> None:
    def body() -> None:
        mixed: PenstockFutureList[int] = PenstockFutureList(
            [double.submit(1), after.submit(tmp_path / "go", 1)]
        )
        with pytest.raises(
            TimeoutError, match=r"Timed out waiting for all futures to complete within 0\.1 seconds"
        ):
            mixed.result(timeout=0.1)
        (tmp_path / "go").touch()

    in_flow(body)


def test_a_time_out_of_the_task_is_not_one_of_the_wait(in_flow: InFlow) -> None:
    @task
    def late() -> None:
        raise TimeoutError("the telescope does not answer")

    def body() -> None:
        with pytest.raises(TimeoutError, match=r"^the telescope does not answer"):
            late.submit().result(timeout=30)

    in_flow(body)


def test_a_future_cannot_be_pickled_by_hand(in_flow: InFlow) -> None:
    import pickle

    def body() -> None:
        with pytest.raises(UnserializableArgument, match="the future of 'double' cannot be pickled"):
            pickle.dumps(double.submit(1))

    in_flow(body)


def test_results_of_a_hundred_futures_in_any_order(in_flow: InFlow) -> None:
    def body() -> None:
        futures = [double.submit(i) for i in range(100)]
        for i in reversed(range(100)):
            assert futures[i].result() == 2 * i

    in_flow(body)
