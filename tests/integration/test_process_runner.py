"""ProcessPoolTaskRunner, driven by hand-made submissions: values, deaths, cancels, nesting, leftovers."""

import contextlib
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest

from penstock import errors
from penstock.runners import process_channel, shared_memory
from penstock.runners.base import Key, Ref, Report, Submission, TaskRunner, new_tag
from penstock.runners.processes import ProcessPoolTaskRunner
from penstock.runners.worker.failure import Failed

pytestmark = pytest.mark.processes

SECONDS = 20
ROOT = Path(__file__).parent.parent.parent


class Slot:
    """Stands for an upstream value in hand-made arguments."""

    def __init__(self, position: int) -> None:
        self.position = position


class ArgumentPickler(cloudpickle.Pickler):
    def persistent_id(self, value: Any) -> int | None:
        return value.position if type(value) is Slot else None


@contextlib.contextmanager
def by_value() -> Iterator[None]:
    """Spare the workers the import of this file, which loads pytest."""
    module = sys.modules.get(__name__)
    if module is None or __name__ in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def packed(function: Callable[..., Any]) -> bytes:
    with by_value():
        data: bytes = cloudpickle.dumps(function)
    return data


class Session:
    """What the engine does, in small: sends, listens, waits."""

    def __init__(self, runner: TaskRunner) -> None:
        self.runner = runner
        self.tag = new_tag()
        self.reports: dict[Key, Report] = {}
        self.started: list[Key] = []
        self._numbers = itertools.count()
        self._news = threading.Condition()
        runner.listen(self.tag, self._on_reports)

    def _on_reports(self, reports: list[Report]) -> None:
        with self._news:
            for report in reports:
                if report.kind == "started":
                    self.started.append(report.key)
                else:
                    assert report.key not in self.reports, "two reports for one key"
                    self.reports[report.key] = report
            self._news.notify_all()

    def make(self, function: Any, *args: Any, refs: Sequence[Ref] = (), **fields: Any) -> Submission:
        buffer = io.BytesIO()
        slots = [Slot(position) for position in range(len(refs))]
        with by_value():
            ArgumentPickler(buffer, protocol=5).dump(((*slots, *args), {}))
        return Submission(
            key=(f"work-{self.tag}", next(self._numbers)),
            order=pickle.dumps({"run": "r"}),
            function=function if isinstance(function, bytes) else packed(function),
            arguments=buffer.getvalue(),
            refs=tuple(refs),
            **fields,
        )

    def submit(self, function: Any, *args: Any, **fields: Any) -> Ref:
        return self.runner.send([self.make(function, *args, **fields)])[0]

    def wait(self, *refs: Ref) -> list[Report]:
        keys = [ref.key for ref in refs]
        with self._news:
            assert self._news.wait_for(lambda: all(key in self.reports for key in keys), SECONDS), "no report"
        return [self.reports[key] for key in keys]

    def wait_for_start(self, *refs: Ref) -> None:
        with self._news:
            assert self._news.wait_for(lambda: {ref.key for ref in refs} <= set(self.started), SECONDS)

    def record(self, ref: Ref) -> dict[str, Any]:
        (report,) = self.wait(ref)
        assert report.kind == "ended", report
        unpacked: dict[str, Any] = pickle.loads(report.record)
        return unpacked

    def result(self, ref: Ref) -> Any:
        record = self.record(ref)
        assert record["status"] == "completed", record
        return self.runner.fetch([ref])[0]


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def own_directories(pid: int) -> list[Path]:
    return [path for root in shared_memory.default_roots() for path in Path(root).glob(f"penstock-{pid}-*")]


def own_files() -> list[Path]:
    return [path for directory in own_directories(os.getpid()) for path in directory.iterdir()]


@pytest.fixture
def start() -> Iterator[Callable[..., Session]]:
    runners: list[TaskRunner] = []
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def make(workers: int = 2, **options: Any) -> Session:
        runners.append(ProcessPoolTaskRunner(workers, **options).open())
        return Session(runners[-1])

    yield make
    for runner in runners:
        runner.close()
    assert own_directories(os.getpid()) == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


Start = Callable[..., Session]


# ------------------------------------------------------------------------------------------ tasks


def add(a: Any, b: Any) -> Any:
    return a + b


def echo(value: Any) -> Any:
    return value


def hold(flag: str) -> str:
    """Run until the file `flag` exists, in short steps, so that a request to stop is seen."""
    Path(f"{flag}.{os.getpid()}").touch()
    while not os.path.exists(flag):
        time.sleep(0.002)  # work: stands for a long computation
    return flag


def die(how: str) -> None:
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(60)  # work: until the signal comes


def deaf() -> None:
    signal.pause()  # a call into C that does not return: no request is seen


def variable(name: str) -> str | None:
    return os.environ.get(name)


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def make_array(size: int) -> Any:
    return np.arange(size, dtype=np.float64)


# ----------------------------------------------------------------------------------------- values


def test_small_values_go_from_task_to_task(start: Start) -> None:
    session = start()
    first = session.submit(add, 1, 2)
    session.wait(first)
    second = session.submit(add, 10, refs=[first])
    assert session.result(second) == 13
    assert session.record(second)["pid"] != os.getpid()
    assert own_files() == []


def test_medium_arrays_travel_in_messages(start: Start) -> None:
    session = start()
    array = session.submit(make_array, 100_000)
    session.wait(array)
    doubled = session.submit(lambda a: a * 2, refs=[array])
    np.testing.assert_array_equal(session.result(doubled), np.arange(100_000) * 2.0)
    session.result(array)[0] = 1.0  # as writable as it would be on any other runner


def test_a_large_array_is_mapped_by_its_readers(start: Start) -> None:
    def look(array: Any) -> tuple[float, bool, bool, int]:
        with open("/proc/self/status") as file:
            anonymous = int(file.read().partition("RssAnon:")[2].split()[0])
        total = float(array.sum())
        with open("/proc/self/status") as file:
            grown = int(file.read().partition("RssAnon:")[2].split()[0]) - anonymous
        with open("/proc/self/maps") as file:
            mapped = "penstock-" in file.read()
        return total, array.flags.writeable, mapped, grown

    session = start()
    memory = psutil.Process().memory_info
    before = memory().rss
    array = session.submit(make_array, 10_000_000)
    (report,) = session.wait(array)
    assert report.nbytes >= 80_000_000
    readers = [session.submit(look, refs=[array]) for _ in range(4)]
    for reader in readers:
        total, writable, mapped, grown = session.result(reader)
        assert total == 49999995000000.0
        assert mapped
        assert not writable
        assert grown < 5_000
    assert memory().rss - before < 10_000_000, "nobody asked for the value here"
    assert len(own_files()) == 1
    here = session.runner.fetch([array])[0]
    assert here[-1] == 9_999_999.0
    here[0] = -1.0  # a page of our own
    assert session.runner.fetch([array])[0][0] == 0.0


def test_the_file_goes_with_the_last_reference_and_the_mapping_stays(start: Start) -> None:
    session = start()
    array = session.submit(make_array, 1_000_000)
    value = session.result(array)
    assert len(own_files()) == 1
    del array
    eventually(lambda: own_files() == [])
    assert value[-1] == 999_999.0


def test_a_released_value_is_gone_and_queued_work_still_gets_it(start: Start, tmp_path: Path) -> None:
    session = start(1)
    array = session.submit(make_array, 1_000_000)
    session.wait(array)
    blocker = session.submit(hold, str(tmp_path / "go"))
    reader = session.submit(lambda a: float(a[-1]), refs=[array])
    session.runner.release([array])
    with pytest.raises(errors.ResultLost, match="does not exist"):
        session.runner.fetch([array])
    (tmp_path / "go").touch()
    assert session.result(reader) == 999_999.0
    session.wait(blocker)
    eventually(lambda: own_files() == [])
    late = session.submit(echo, 1, refs=[array])
    assert session.wait(late)[0].kind == "upstream"


def test_a_put_value_is_written_once_and_mapped_by_all(start: Start, tmp_path: Path) -> None:
    def inode(array: Any, flag: str) -> tuple[int, str]:
        with open("/proc/self/maps") as file:
            lines = [line.split() for line in file if "/penstock-" in line]
        hold(flag)  # so that the other worker has to take the other task
        return os.getpid(), lines[0][4]

    session = start()
    ref, small = session.runner.put([np.ones(10_000_000), {"a": 1}])
    assert ref.nbytes >= 80_000_000
    assert len(own_files()) == 1
    flag = str(tmp_path / "go")
    looks = [session.submit(inode, flag, refs=[ref]) for _ in range(2)]
    eventually(lambda: len(list(tmp_path.iterdir())) == 2)
    Path(flag).touch()
    seen = [session.result(look) for look in looks]
    assert len({pid for pid, _ in seen}) == 2
    assert len({number for _, number in seen}) == 1
    assert session.runner.fetch([small]) == [{"a": 1}]
    with pytest.raises(errors.UnserializableArgument, match="lock"):
        session.runner.put([threading.Lock()])


def test_the_bytes_of_a_function_are_sent_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start(1)
    sent: list[int] = []
    frame = process_channel._frame

    def counted(message: process_channel.Message) -> bytes:
        data = frame(message)
        sent.append(len(data))
        return data

    monkeypatch.setattr(process_channel, "_frame", counted)
    ballast = os.urandom(1_000_000)
    function = packed(lambda value: value + len(ballast))
    refs = [session.submit(function, value) for value in range(20)]
    assert [session.result(ref) for ref in refs] == [1_000_000 + value for value in range(20)]
    assert 1_000_000 < sum(sent) < 1_100_000


# --------------------------------------------------------------------------------------- failures


def test_a_failure_comes_as_a_record(start: Start) -> None:
    session = start()
    failed = session.submit(lambda: 1 / 0)
    record = session.record(failed)
    assert record["status"] == "failed"
    assert record["error"]["type"] == "ZeroDivisionError"
    assert isinstance(session.runner.fetch([failed])[0], Failed)
    assert pickle.loads(session.wait(session.submit(echo, refs=[failed]))[0].record)["status"] == "upstream"


@pytest.mark.parametrize("make", [threading.Lock, lambda: (n for n in [threading.Lock()])])
def test_a_result_that_cannot_be_pickled_fails_and_names_its_type(start: Start, make: Any) -> None:
    session = start()
    record = session.record(session.submit(make))
    assert record["status"] == "failed"
    assert record["error"]["type"] == "UnserializableResult"
    assert "_thread.lock" in record["error"]["message"]
    assert isinstance(pickle.loads(record["error"]["pickle"]), errors.UnserializableResult)


def test_arguments_that_cannot_be_loaded_fail_the_task(start: Start) -> None:
    session = start()
    session_work = session.make(echo, 1)
    session_work.arguments = b"cno_such_module\nthing\n."
    (ref,) = session.runner.send([session_work])
    assert session.record(ref)["error"]["type"] == "ModuleNotFoundError"
    assert session.result(session.submit(echo, 1)) == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [("SIGKILL", "died by SIGKILL"), ("SIGSEGV", "died by SIGSEGV"), ("exit", "with code 3")],
)
def test_a_dead_worker_loses_its_task_and_nothing_else(
    start: Start, how: str, words: str, tmp_path: Path
) -> None:
    session = start()
    bystander = session.submit(hold, str(tmp_path / "go"))
    eventually(lambda: list(tmp_path.iterdir()))
    killed = session.submit(die, how)
    queued = [session.submit(echo, number) for number in range(5)]
    (report,) = session.wait(killed)
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.WorkerLost)
    assert words in str(report.cause)
    assert f"pid {report.worker.removeprefix('process-')}" in str(report.cause)
    assert "while running 'work'" in str(report.cause)
    assert [session.result(ref) for ref in queued] == list(range(5)), "a fresh worker takes over"
    (tmp_path / "go").touch()
    assert session.result(bystander)
    with pytest.raises(errors.ResultLost):
        session.runner.fetch([killed])


def test_work_that_was_sent_ahead_survives_the_death_of_its_worker(start: Start) -> None:
    session = start(1)
    function = packed(lambda number: os.kill(os.getpid(), 9) if number == 150 else number)
    refs = session.runner.send([session.make(function, number) for number in range(300)])
    reports = session.wait(*refs)
    assert [number for number, report in enumerate(reports) if report.kind == "lost"] == [150]
    assert len({report.worker for report in reports}) == 2


def test_a_worker_killed_while_it_writes_leaves_no_file(start: Start) -> None:
    def slow(size: int) -> Any:
        class Slow:
            def __reduce__(self) -> Any:
                return list, (), None, iter([pickle.PickleBuffer(bytearray(size)), 1])

        original = os.pwrite

        def pwrite(descriptor: int, data: Any, position: int) -> int:
            original(descriptor, data[:1000], position)
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        os.pwrite = pwrite
        return Slow()

    session = start(1)
    ref = session.submit(slow, 3_000_000)
    assert "SIGKILL" in str(session.wait(ref)[0].cause)
    assert own_files() == []


def test_a_vanished_file_is_a_lost_result(start: Start) -> None:
    session = start()
    array = session.submit(make_array, 1_000_000)
    session.wait(array)
    own_files()[0].unlink()
    reader = session.submit(echo, refs=[array])
    (report,) = session.wait(reader)
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.ResultLost)
    with pytest.raises(errors.ResultLost):
        session.runner.fetch([array])


def test_work_sent_before_its_upstream_has_ended_is_refused(start: Start, tmp_path: Path) -> None:
    session = start()
    running = session.submit(hold, str(tmp_path / "go"))
    (report,) = session.wait(session.submit(echo, refs=[running]))
    assert report.kind == "lost"
    assert "before the work that it depends on" in str(report.cause)


# ----------------------------------------------------------------------------- order, start, cancel


def test_higher_priority_goes_first_and_then_first_come_first_served(start: Start, tmp_path: Path) -> None:
    session = start(1)
    blocker = session.submit(hold, str(tmp_path / "go"))
    ends: list[int] = []
    numbered = packed(time.perf_counter)
    refs = [session.submit(numbered, priority=priority) for priority in (0, 5, 1, 5, 0)]
    (tmp_path / "go").touch()
    session.wait(blocker)
    ends = sorted(range(5), key=lambda position: session.result(refs[position]))
    assert ends == [1, 3, 2, 0, 4]


def test_the_start_is_announced_if_asked_for(start: Start) -> None:
    session = start()
    quiet, loud = session.submit(echo, 1), session.submit(echo, 2, announce=True)
    session.wait(quiet, loud)
    assert session.started == [loud.key]


def test_cancelled_work_that_waits_does_not_run(start: Start, tmp_path: Path) -> None:
    session = start(1)
    blocker = session.submit(hold, str(tmp_path / "go"))
    waiting = [session.submit(lambda path: Path(path).touch(), str(tmp_path / "ran")) for _ in range(3)]
    assert session.runner.cancel(waiting[:2]) == [ref.key for ref in waiting[:2]]
    assert session.runner.take_back(waiting[2])
    assert not session.runner.take_back(waiting[2])
    assert not session.runner.take_back(blocker)
    (tmp_path / "go").touch()
    session.wait(blocker, session.submit(echo, 1))
    assert not (tmp_path / "ran").exists()
    assert not {ref.key for ref in waiting} & set(session.reports)


def test_running_work_is_asked_to_stop(start: Start, tmp_path: Path) -> None:
    session = start()
    running = session.submit(hold, str(tmp_path / "never"), announce=True)
    session.wait_for_start(running)
    assert session.runner.cancel([running]) == []
    assert session.record(running)["status"] == "cancelled"
    pid = session.record(running)["pid"]
    eventually(lambda: not psutil.pid_exists(pid))  # who knows where it was struck
    assert session.result(session.submit(echo, 1)) == 1


def test_force_ends_the_process(start: Start, tmp_path: Path) -> None:
    session = start(1)
    stuck = session.submit(deaf, announce=True)
    queued = session.submit(echo, 7)
    session.wait_for_start(stuck)
    assert session.runner.cancel([stuck], force=True) == []
    (report,) = session.wait(stuck)
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.CancelledRun)
    assert session.result(queued) == 7


def test_cancel_all_ends_everything_with_a_report(start: Start, tmp_path: Path) -> None:
    session = start(1)
    assert isinstance(session.runner, ProcessPoolTaskRunner)
    running = session.submit(hold, str(tmp_path / "never"), announce=True)
    waiting = session.submit(echo, 1)
    session.wait_for_start(running)
    session.runner.cancel_all()
    assert session.record(running)["status"] == "cancelled"
    assert isinstance(session.wait(waiting)[0].cause, errors.CancelledRun)


def test_a_worker_that_does_not_listen_holds_up_nobody(start: Start, tmp_path: Path) -> None:
    session = start()
    victim = session.submit(hold, str(tmp_path / "go"))
    eventually(lambda: list(tmp_path.iterdir()))
    (mark,) = tmp_path.iterdir()
    pid = int(mark.suffix[1:])
    os.kill(pid, signal.SIGSTOP)
    refs = [session.submit(echo, os.urandom(900_000)) for _ in range(20)]
    session.runner.cancel([victim] * 10)
    session.wait(*refs)
    assert session.runner.cancel([victim], force=True) == []
    assert isinstance(session.wait(victim)[0].cause, errors.CancelledRun)


# ----------------------------------------------------------------------------------------- nesting


def nested(depth: int, session_class: Any) -> int:
    """Submit a task that submits a task …, and wait for it as the engine does."""
    from penstock.runners import inside_worker

    if depth == 0:
        return 1
    runner = inside_worker("processes")
    session = session_class(runner)
    child = session.submit(nested, depth - 1, session_class)
    with runner.blocked([child]):
        session.wait(child)
    total = session.submit(add, 1, refs=[child])  # what one child made is an argument of the next
    with runner.blocked([total]):
        session.wait(total)
    result: int = runner.fetch([total])[0]
    return result


def test_tasks_submit_tasks_with_one_worker(start: Start) -> None:
    others = set(psutil.Process().children())  # such as the helpers of multiprocessing, once it was used
    session = start(1)
    assert session.result(session.submit(nested, 3, Session)) == 4
    assert session.result(session.submit(nested, 2, Session)) == 3
    eventually(lambda: len(set(psutil.Process().children()) - others) <= 1)  # those beyond the number retire


def test_a_task_that_waits_without_a_word_gets_a_process_for_its_child(start: Start) -> None:
    def parent(session_class: Any, add: Any) -> int:
        from penstock.runners import inside_worker

        session = session_class(inside_worker("processes"))
        result: int = session.result(session.submit(add, 1, 2))  # nobody calls `blocked`
        return result

    session = start(2)
    parents = [session.submit(parent, Session, add) for _ in range(5)]
    assert [session.result(ref) for ref in parents] == [3] * 5


def test_nested_values_large_put_released_and_taken_back(start: Start) -> None:
    def parent(session_class: Any, add: Any, make_array: Any) -> dict[str, Any]:
        from penstock.runners import inside_worker

        runner = inside_worker("processes")
        session = session_class(runner)
        seen: dict[str, Any] = {"workers": runner.info.workers, "inside": runner.inside()}
        array = session.submit(make_array, 1_000_000)
        with runner.blocked([array]):
            session.wait(array)
        (put,) = runner.put([np.ones(1_000_000)])
        both = session.submit(add, refs=[array, put])
        with runner.blocked([both]):
            session.wait(both)
        seen["last"] = float(runner.fetch([both])[0][-1])
        waiting = session.submit(add, 1, 2)  # this process is the only one
        seen["back"] = runner.take_back(waiting)
        other = session.submit(add, 1, 2)
        seen["cancelled"] = runner.cancel([other]) == [other.key]
        runner.release([array])
        failed = session.submit(add, 1, "x")
        with runner.blocked([failed]):
            seen["failed"] = session.record(failed)["status"]
        return seen

    session = start(1)
    seen = session.result(session.submit(parent, Session, add, make_array))
    assert seen == {
        "workers": 1,
        "inside": "processes",
        "last": 1_000_000.0,
        "back": True,
        "cancelled": True,
        "failed": "failed",
    }
    eventually(lambda: own_files() == [])


def test_a_dead_parent_takes_its_children_with_it(start: Start, tmp_path: Path) -> None:
    def parent(session_class: Any, hold: Any, flag: str) -> None:
        from penstock.runners import inside_worker

        runner = inside_worker("processes")
        session = session_class(runner)
        child = session.submit(hold, flag, announce=True)
        session.submit(hold, flag)
        session.wait_for_start(child)
        os.kill(os.getpid(), signal.SIGKILL)

    session = start(2)
    ref = session.submit(parent, Session, hold, str(tmp_path / "never"))
    assert "SIGKILL" in str(session.wait(ref)[0].cause)
    assert [session.result(session.submit(echo, number)) for number in range(10)] == list(range(10))
    both = [session.submit(hold, str(tmp_path / "go")) for _ in range(2)]
    eventually(lambda: len(list(tmp_path.glob("go.*"))) == 2)  # no worker is left in an orphan
    (tmp_path / "go").touch()
    session.wait(*both)


def test_short_tasks_behind_a_long_one_go_to_an_idle_worker(start: Start, tmp_path: Path) -> None:
    def quick_but_once(number: int, flag: str) -> int:
        if number == 40:
            while not os.path.exists(flag):
                time.sleep(0.002)  # work: an unexpectedly long task
        return number

    session = start(2)
    function = packed(quick_but_once)
    flag = str(tmp_path / "go")
    refs = session.runner.send([session.make(function, number, flag) for number in range(200)])
    session.wait(*refs[:40], *refs[41:])
    assert refs[40].key not in session.reports
    Path(flag).touch()
    assert session.result(refs[40]) == 40


# ------------------------------------------------------------------------------------ start and end


def test_the_runner_has_to_be_started() -> None:
    runner = ProcessPoolTaskRunner(1)
    with pytest.raises(RuntimeError, match="not started"):
        runner.send([])
    runner.stop()
    with pytest.raises(ValueError, match="at least one"):
        ProcessPoolTaskRunner(0)
    assert ProcessPoolTaskRunner(1) == runner
    assert ProcessPoolTaskRunner(2) != runner


def test_workers_outlive_the_thread_that_started_them() -> None:
    runner = ProcessPoolTaskRunner(1)
    starter = threading.Thread(target=runner.open)
    starter.start()
    starter.join()
    session = Session(runner)
    pids = {session.record(session.submit(echo, number))["pid"] for number in range(5)}
    runner.close()
    assert len(pids) == 1


def test_the_initializer_runs_first_in_each_worker(start: Start) -> None:
    session = start(2, initializer=set_variable, initargs=("PENSTOCK_TEST_MARK", "here"))
    assert session.result(session.submit(variable, "PENSTOCK_TEST_MARK")) == "here"


def test_a_failing_initializer_is_told_at_the_start() -> None:
    def broken() -> None:
        message = "no licence"
        raise RuntimeError(message)

    runner = ProcessPoolTaskRunner(2, initializer=broken)
    with pytest.raises(errors.RunnerUnavailable, match="no licence"):
        runner.open()
    assert not runner.is_open
    assert own_directories(os.getpid()) == []


def test_numerical_libraries_do_not_oversubscribe(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    session = start(64 if os.cpu_count() == 1 else os.cpu_count() or 1)
    assert session.result(session.submit(variable, "OMP_NUM_THREADS")) == "1"
    assert session.result(session.submit(variable, "MKL_NUM_THREADS")) == "7"


def test_closing_does_not_wait_for_tasks(start: Start, tmp_path: Path) -> None:
    session = start(2)
    refs = [session.submit(deaf, announce=True) for _ in range(2)]
    queued = session.submit(echo, 1)
    session.wait_for_start(*refs)
    before = time.monotonic()
    session.runner.close()
    assert time.monotonic() - before < 3
    assert all(isinstance(report.cause, errors.CancelledRun) for report in session.wait(*refs, queued))


SCRIPT = """
import os, pickle, signal, sys, threading, time
import cloudpickle, psutil
import numpy as np
from penstock.runners.base import Submission
from penstock.runners.processes import ProcessPoolTaskRunner

class Point:
    pass

def work(size, seconds):
    time.sleep(seconds)
    point = Point()
    point.array = np.zeros(size)
    return point

runner = ProcessPoolTaskRunner(2)
news = threading.Semaphore(0)
runner.listen("tag", lambda reports: [news.release() for _ in reports])
runner.open()
keys = iter(range(100))

def submit(*args):
    arguments = pickle.dumps((args, {}))
    order = pickle.dumps({})
    return runner.send([Submission(("t-tag", next(keys)), order, cloudpickle.dumps(work), arguments)])[0]

ref = submit(1_000_000, 0)
news.acquire()
assert type(runner.fetch([ref])[0]) is Point
submit(10, 600)
print(os.getpid(), *[child.pid for child in psutil.Process().children()], flush=True)
"""


def run_script(end: str) -> tuple["subprocess.Popen[str]", list[int]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(SCRIPT + end)
    process.stdin.close()
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 3, process.stderr and process.stderr.read()
    return process, pids


def finish(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        text = process.stderr.read()
        process.wait(SECONDS)
    return text


def are_gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_a_program_from_stdin_needs_no_guard_and_leaves_nothing() -> None:
    process, pids = run_script("runner.close()")
    text = finish(process)
    assert (process.returncode, text) == (0, "")
    assert are_gone(pids)
    assert own_directories(pids[0]) == []


def test_a_program_that_forgets_to_close_leaves_nothing() -> None:
    process, pids = run_script("")
    text = finish(process)
    assert (process.returncode, text) == (0, "")
    eventually(lambda: are_gone(pids))
    assert own_directories(pids[0]) == []


def test_ctrl_c_leaves_nothing() -> None:
    process, pids = run_script("signal.pause()")
    before = time.monotonic()
    for pid in pids:  # as a terminal does
        os.kill(pid, signal.SIGINT)
    text = finish(process)
    assert time.monotonic() - before < 3
    assert process.returncode == -signal.SIGINT
    assert text.count("Traceback") == 1, "the driver's own, and none from a worker"
    assert are_gone(pids)
    assert own_directories(pids[0]) == []


def test_a_killed_driver_leaves_no_process_and_the_next_start_sweeps_its_files(start: Start) -> None:
    process, pids = run_script("signal.pause()")
    process.kill()
    finish(process)
    eventually(lambda: are_gone(pids[1:]))
    assert own_directories(pids[0]) != []
    start(1)
    assert own_directories(pids[0]) == []
