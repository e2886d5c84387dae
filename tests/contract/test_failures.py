"""Bad days: exceptions, bad arguments, dead workers; each has its sentence and its state."""

import os
import signal
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock
from penstock import CrashedRun, FailedRun, exponential_backoff, flow, task, unmapped
from penstock.engine import compile as compiling
from penstock.errors import UnserializableArgument, UnserializableResult, WorkerLost
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record

PACKAGE = str(Path(penstock.__file__).parent)


@task
def identity(x: Any) -> Any:
    return x


def inner(x: int) -> float:
    return 1 / x


@task
def divide(x: int = 0) -> float:
    return inner(x)


class OddError(Exception):
    """Takes other arguments than it hands on."""

    def __init__(self, code: int, *, station: str) -> None:
        super().__init__(f"{station} answered {code}")
        self.code = code
        self.station = station


def frames_of(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


@pytest.mark.parametrize("how", ["call", "submit", "map", "flow"])
def test_the_traceback_shows_the_users_lines_only(in_flow: InFlow, how: str) -> None:
    bodies = {
        "call": lambda: divide(0),
        "submit": lambda: divide.submit(0).result(),
        "map": lambda: divide.map([1, 0]).result(),
        "flow": lambda: divide.submit(0),
    }
    with pytest.raises(ZeroDivisionError) as caught:
        in_flow(bodies[how])
    frames = frames_of(caught.value)
    assert [frame.name for frame in frames][-2:] == ["divide", "inner"]
    assert [frame.filename for frame in frames if frame.filename.startswith(PACKAGE)] == []
    assert {frame.filename for frame in frames[-2:]} == {__file__}


@pytest.mark.parametrize("how", ["call", "submit", "map", "async"])
def test_a_note_tells_the_inputs_and_where(in_flow: InFlow, record: Record, how: str) -> None:
    @task
    def use(image: Any, name: str, factor: float = 0.5, extra: Any = None) -> None:
        raise ValueError("no beam")

    @task
    async def use_async(image: Any, name: str, factor: float = 0.5, extra: Any = None) -> None:
        raise ValueError("no beam")

    image = np.zeros((3, 4), np.float32)
    bodies = {
        "call": lambda: use(image, "secret", extra=[image]),
        "submit": lambda: use.submit(identity.submit(image), "secret", extra=[image]).result(),
        "map": lambda: use.map([image], "secret", extra=unmapped([image])).result(),
        "async": lambda: use_async.submit(image, "secret", extra=[image]).result(),
    }
    with pytest.raises(ValueError, match="no beam") as caught:
        in_flow(bodies[how])
    inputs, where = caught.value.__notes__[:2]
    name = {"map": "use-0", "async": "use_async"}.get(how, "use")
    assert inputs == (
        f"inputs of {name!r}: image: ndarray(3, 4) float32, name: str of 6 characters, "
        "extra: list of 1, the first ndarray(3, 4) float32"
    )
    assert where.startswith(f"(task run {name!r}, attempt 1, on ")
    row = next(row for row in record.tasks() if row.name == name)
    assert inputs in row.error["text"]
    assert "secret" not in row.error["text"].split("inputs of")[1]


def test_the_cause_chain_comes_along(in_flow: InFlow) -> None:
    @task
    def chained() -> None:
        try:
            inner(0)
        except ZeroDivisionError as error:
            raise LookupError("no station") from error

    with pytest.raises(LookupError) as caught:
        in_flow(lambda: chained.submit().result())
    text = "".join(traceback.format_exception(caught.value))
    assert "no station" in text
    shown = text + str(getattr(caught.value, "__notes__", ""))
    assert "ZeroDivisionError" in shown
    assert PACKAGE not in shown


def test_the_record_keeps_the_error(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: divide.submit(0).wait())
    row = record.task("divide")
    assert row.type == "FAILED"
    assert row.state["message"] == "Task run encountered an exception: ZeroDivisionError: division by zero"
    assert row.error["type"] == "ZeroDivisionError"
    assert "in inner" in row.error["text"]
    assert PACKAGE not in row.error["text"]


def test_an_error_with_an_odd_init(in_flow: InFlow) -> None:
    @task
    def ask() -> None:
        raise OddError(503, station="Effelsberg")

    with pytest.raises(Exception, match="Effelsberg answered 503") as caught:
        in_flow(lambda: ask.submit())
    assert type(caught.value).__name__ == "OddError"
    assert vars(caught.value)["code"] == 503


def test_an_error_that_the_driver_cannot_import(in_flow: InFlow, runner: TaskRunner, record: Record) -> None:
    sys.modules.pop("only_on_the_worker", None)  # left by a runner in this process

    @task
    def strange() -> None:
        module = types.ModuleType("only_on_the_worker")
        sys.modules["only_on_the_worker"] = module
        exec("class StrangeError(Exception): pass", vars(module))
        raise module.StrangeError("nobody knows me")

    with pytest.raises(Exception, match="nobody knows me") as caught:
        in_flow(lambda: strange.submit())
    assert isinstance(caught.value, FailedRun) is not runner.info.in_process
    assert "StrangeError" in "".join(traceback.format_exception(caught.value))
    assert record.task("strange").error["type"] == "StrangeError"


def test_an_error_that_cannot_be_pickled(in_flow: InFlow) -> None:
    @task
    def hold() -> None:
        error = ValueError("holds a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    with pytest.raises(ValueError, match="holds a lock"):
        in_flow(lambda: hold.submit())


def test_the_cause_of_an_error(in_flow: InFlow, runner: TaskRunner, record: Record) -> None:
    @task
    def chained() -> None:
        try:
            inner(0)
        except ZeroDivisionError as error:
            raise RuntimeError("no solution") from error

    with pytest.raises(RuntimeError, match="no solution"):
        in_flow(lambda: chained.submit())
    assert "ZeroDivisionError: division by zero" in record.task("chained").error["text"]


def test_an_error_whose_text_fails(in_flow: InFlow, record: Record) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @task
    def mute() -> None:
        raise MuteError

    in_flow(lambda: mute.submit().wait())
    assert record.task("mute").type == "FAILED"
    assert record.task("mute").error["type"].endswith("MuteError")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_task_that_raises_what_ends_programs(
    in_flow: InFlow, record: Record, error: type[BaseException]
) -> None:
    @task
    def leave() -> None:
        raise error

    def body() -> str:
        future = leave.submit()
        future.wait()
        assert future.state.is_crashed()
        return "goes on"

    assert in_flow(body) == "goes on"
    assert record.task("leave").type == "CRASHED"
    assert record.task("leave").state["message"].startswith("Execution was aborted by")


# ------------------------------------------------------------------------------------- what cannot travel


class Holder:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_an_argument_that_cannot_be_pickled(apart: TaskRunner, in_flow: InFlow, record: Record) -> None:
    with pytest.raises(
        UnserializableArgument, match=r"argument .*\.lock of task 'identity' cannot be sent"
    ) as caught:
        in_flow(lambda: identity.submit(Holder()))
    assert "cannot pickle '_thread.lock'" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert record.tasks() == []
    assert record.flow().type == "FAILED"


def test_what_cannot_be_pickled_is_shared_inside_one_process(in_flow: InFlow, runner: TaskRunner) -> None:
    holder = Holder()
    seen = []

    def body() -> None:
        try:
            seen.append(identity.submit(holder).result() is holder)
        except UnserializableArgument:
            seen.append(False)

    in_flow(body)
    assert seen == [runner.info.in_process]


def test_a_result_that_cannot_be_pickled(apart: TaskRunner, in_flow: InFlow, record: Record) -> None:
    @task
    def make() -> Holder:
        return Holder()

    with pytest.raises(
        UnserializableResult, match=r"a result of type .*Holder cannot be sent to another process"
    ):
        in_flow(lambda: make.submit())
    assert record.task("make").type == "FAILED"


def test_a_function_that_cannot_be_pickled(apart: TaskRunner, in_flow: InFlow, record: Record) -> None:
    lock = threading.Lock()

    @task
    def locked() -> bool:
        return lock.locked()

    with pytest.raises(
        UnserializableArgument, match=r"function .*locked.* cannot be sent to another process"
    ):
        in_flow(lambda: locked.submit())
    assert record.flow().type == "FAILED"


def test_a_future_where_nobody_looks(apart: TaskRunner, in_flow: InFlow) -> None:
    class Box:
        def __init__(self, content: Any) -> None:
            self.content = content

    with pytest.raises(TypeError, match=r"argument .*\.content of task 'identity'.*future of task run"):
        in_flow(lambda: identity.submit(Box(identity.submit(1))))


# ------------------------------------------------------------------------------------------------ retries


@task
def succeed_at(counter: Path, attempt: int) -> int:
    """Fail until the file has that many lines."""
    with counter.open("a") as file:
        file.write("x")
    if counter.stat().st_size < attempt:
        raise ConnectionError("try again")
    return counter.stat().st_size


@pytest.mark.parametrize("delay", [None, 0.02, [0.01, 0.03], exponential_backoff(0.01)])
def test_retries(in_flow: InFlow, record: Record, tmp_path: Path, delay: Any) -> None:
    stubborn = succeed_at.with_options(retries=2, retry_delay_seconds=delay, retry_jitter_factor=0.1)
    assert in_flow(lambda: stubborn.submit(tmp_path / "counter", 3)) == 3
    row = record.task("succeed_at")
    assert (row.type, row.attempt) == ("COMPLETED", 3)


def test_retries_of_a_direct_call(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    stubborn = succeed_at.with_options(retries=2, retry_delay_seconds=0.01)
    assert in_flow(lambda: stubborn(tmp_path / "counter", 3)) == 3
    assert record.task("succeed_at").attempt == 3


def test_retries_come_to_an_end(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        in_flow(lambda: succeed_at.with_options(retries=1).submit(tmp_path / "counter", 9))
    assert (record.task("succeed_at").type, record.task("succeed_at").attempt) == ("FAILED", 2)
    assert (tmp_path / "counter").read_text() == "xx"


def test_dependants_wait_for_the_last_attempt(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    def body() -> Any:
        first = succeed_at.with_options(retries=3, retry_delay_seconds=0.02).submit(tmp_path / "counter", 3)
        return [*identity.map([first, first]), identity.submit(0, wait_for=[first])]

    assert in_flow(body) == [3, 3, 0]
    assert [row.attempt for row in record.tasks("identity")] == [1, 1, 1]


class NoMore:
    """A condition that is an object."""

    def __call__(self, task: Any, run: Any, state: Any) -> bool:
        return "again" not in state.message


def test_a_condition_decides(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    asked = []

    def never(task: Any, run: Any, state: Any) -> bool:
        asked.append((task.name, state.name, str(state.result(raise_on_failure=False))))
        return False

    def raises(task: Any, run: Any, state: Any) -> bool:
        raise RuntimeError

    def body() -> None:
        conditions: list[Any] = [never, NoMore(), raises]
        for number, condition in enumerate(conditions):
            eager = succeed_at.with_options(retries=5, retry_condition_fn=condition)
            assert isinstance(eager.submit(tmp_path / str(number), 9).exception(), ConnectionError)

    in_flow(body)
    assert [row.attempt for row in record.tasks()] == [1, 1, 1]
    assert [entry[:2] for entry in asked] == [("succeed_at", "Failed")]
    assert asked[0][2].startswith("try again")


# --------------------------------------------------------------------------------------------- dead workers


@task
def die(marker: Path, times: int) -> str:
    """Kill the process as often as asked, then live."""
    with marker.open("a") as file:
        file.write("x")
    if marker.stat().st_size <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_worker_that_dies_is_a_crash(
    apart: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path
) -> None:
    def body() -> str:
        future = die.with_options(crash_retries=0).submit(tmp_path / "deaths", 1)
        never = identity.submit(future)
        never.wait()
        assert future.state.is_crashed()
        assert isinstance(future.exception(), WorkerLost | CrashedRun)
        assert never.state.name == "NotReady"
        sibling: str = identity.submit("others go on").result()
        return sibling

    assert in_flow(body) == "others go on"
    row = record.task("die")
    assert (row.type, row.attempt) == ("CRASHED", 1)
    assert row.state["message"]


def test_a_crash_is_tried_again(apart: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    assert in_flow(lambda: die.with_options(crash_retries=2).submit(tmp_path / "deaths", 2)) == "alive"
    assert (record.task("die").type, record.task("die").attempt) == ("COMPLETED", 3)


def test_a_task_that_must_not_run_twice(
    apart: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path
) -> None:
    once = die.with_options(idempotent=False, crash_retries=5)
    with pytest.raises(CrashedRun):
        in_flow(lambda: once.submit(tmp_path / "deaths", 5))
    assert (tmp_path / "deaths").read_text() == "x"


def test_a_death_does_not_count_as_a_failure(apart: TaskRunner, in_flow: InFlow, tmp_path: Path) -> None:
    with pytest.raises(CrashedRun):
        in_flow(lambda: die.with_options(retries=5, crash_retries=0).submit(tmp_path / "deaths", 9))
    assert (tmp_path / "deaths").read_text() == "x"


def test_a_map_survives_a_death(apart: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    marker = tmp_path / "deaths"

    @task(crash_retries=2)
    def work(x: int) -> int:
        if x == 7 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    assert in_flow(lambda: work.map(range(20))) == list(range(20))
    assert record.types("work") == ["COMPLETED"] * 20


def test_a_crash_inside_a_nested_flow(
    apart: TaskRunner, in_flow: InFlow, record: Record, tmp_path: Path
) -> None:
    @flow
    def child() -> Any:
        return die.with_options(crash_retries=0).submit(tmp_path / "deaths", 1)

    with pytest.raises(CrashedRun):
        in_flow(child)
    assert record.flow().type == "FAILED"


def test_a_defect_of_ours_ends_the_flow(in_flow: InFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("a defect")

    def body() -> Any:
        monkeypatch.setattr(compiling, "submissions", broken)
        return identity.map(range(3))

    with pytest.raises(CrashedRun, match="penstock itself failed, please report it: RuntimeError: a defect"):
        in_flow(body)
