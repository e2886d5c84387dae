"""RayTaskRunner, driven by hand-made submissions: values, deaths, cancels, slots, attaching, leftovers."""

import contextlib
import gc
import http.server
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import psutil
import pytest

pytest.importorskip("ray")

import ray
from ray import exceptions

from penstock import errors
from penstock.runners import ray_cluster, ray_errors
from penstock.runners.base import Key, Options, Ref, Report, Submission, TaskRunner, new_tag
from penstock.runners.ray import RayTaskRunner
from penstock.runners.worker.failure import Failed

pytestmark = pytest.mark.ray

SECONDS = 30
ROOT = Path(__file__).parent.parent.parent
WHOLE = Options(threads=2)  # every CPU of the Ray of this file


class Slot:
    """Stands for an upstream value in hand-made arguments."""

    def __init__(self, position: int) -> None:
        self.position = position


class ArgumentPickler(cloudpickle.Pickler):
    def persistent_id(self, value: Any) -> int | None:
        return value.position if type(value) is Slot else None


def packed(function: Callable[..., Any]) -> bytes:
    module = sys.modules.get(__name__)
    if module is not None:  # spares the workers the import of pytest
        cloudpickle.register_pickle_by_value(module)
    try:
        data: bytes = cloudpickle.dumps(function)
    finally:
        if module is not None:
            cloudpickle.unregister_pickle_by_value(module)
    return data


class Session:
    """What the engine does, in small: sends, listens, waits."""

    def __init__(self, runner: TaskRunner) -> None:
        self.runner = runner
        self.tag = new_tag()
        self.reports: dict[Key, Report] = {}
        self.started: dict[Key, float] = {}
        self._numbers = itertools.count()
        self._news = threading.Condition()
        runner.listen(self.tag, self._on_reports)

    def _on_reports(self, reports: list[Report]) -> None:
        with self._news:
            for report in reports:
                if report.kind == "started":
                    assert report.key not in self.reports
                    self.started[report.key] = time.time()
                else:
                    assert report.key not in self.reports
                    self.reports[report.key] = report
            self._news.notify_all()

    def submission(
        self,
        function: Callable[..., Any],
        *args: Any,
        refs: Sequence[Ref] = (),
        prints: bool = False,
        **more: Any,
    ) -> Submission:
        buffer = io.BytesIO()
        ArgumentPickler(buffer, 5).dump((tuple(args), {}))
        order = {"run": "x", "attempt": 1, "task": "job", "name": "job", "prints": prints, "context": {}}
        key = (f"job-{self.tag}", next(self._numbers))
        return Submission(
            key, pickle.dumps(order, 4), packed(function), buffer.getvalue(), tuple(refs), **more
        )

    def send(self, function: Callable[..., Any], *args: Any, **more: Any) -> Ref:
        return self.runner.send([self.submission(function, *args, **more)])[0]

    def wait(self, *refs: Ref, seconds: float = SECONDS) -> list[Report]:
        with self._news:
            done = self._news.wait_for(lambda: all(ref.key in self.reports for ref in refs), seconds)
            assert done, f"{[ref.key for ref in refs if ref.key not in self.reports]} of {self.reports}"
        return [self.reports[ref.key] for ref in refs]

    def wait_start(self, *refs: Ref) -> None:
        with self._news:
            assert self._news.wait_for(lambda: all(ref.key in self.started for ref in refs), SECONDS)

    def value(self, ref: Ref) -> Any:
        report = self.wait(ref)[0]
        assert status(report) == "completed", report
        return self.runner.fetch([ref])[0]

    def close(self) -> None:
        self.runner.unlisten(self.tag)


def status(report: Report) -> str:
    return str(pickle.loads(report.record)["status"]) if report.kind == "ended" else report.kind


# ----------------------------------------------------------------------------------- a Ray that is there already


@pytest.fixture(scope="module")
def attached() -> Iterator[None]:
    """A Ray that the user has initialised; the runners of these tests attach to it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        "local",
        num_cpus=2,
        resources={"special": 1},
        include_dashboard=False,
        object_store_memory=300 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    ray_cluster._print_messages(wanted=False)
    yield
    assert ray.is_initialized()
    ray.shutdown(wait_for_processes=True)
    ray_cluster._print_messages(wanted=True)
    signal.signal(signal.SIGTERM, before)
    patch.undo()


@pytest.fixture(scope="module")
def runner(attached: None) -> Iterator[RayTaskRunner]:
    with RayTaskRunner() as found:
        yield found


@pytest.fixture
def session(runner: RayTaskRunner) -> Iterator[Session]:
    found = Session(runner)
    yield found
    found.close()


def nap(seconds: float) -> float:
    """Sleep in one call into C."""
    time.sleep(seconds)  # work: one call into C
    return seconds


def loop(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)  # work: many bytecodes


# ---------------------------------------------------------------------------------------------- values and records


def test_values_travel_by_reference(session: Session) -> None:
    first = session.submission(lambda: 20)
    second = session.submission(lambda x, y: x + y, Slot(0), 1, refs=[Ref(first.key, None)])
    refs = session.runner.send([first, second])
    third = session.send(lambda x, *, y=2: [x, x][:y], Slot(0), refs=[refs[1]])
    assert session.value(third) == [21, 21]
    assert session.runner.fetch(refs) == [20, 21]
    report = session.reports[refs[0].key]
    assert report.nbytes == sys.getsizeof(20)
    assert report.worker == pickle.loads(report.record)["worker"] != ""


def test_many_tasks_each_report_once(session: Session) -> None:
    refs = session.runner.send([session.submission(lambda x: x, number) for number in range(1500)])
    assert {status(report) for report in session.wait(*refs)} == {"completed"}
    assert session.runner.fetch(refs) == list(range(1500))


def test_a_failure_comes_with_its_record_and_spares_what_depends_on_it(session: Session) -> None:
    def fail() -> None:
        raise LookupError("nothing there")

    first = session.send(fail)
    second = session.send(lambda x: x, Slot(0), refs=[first])
    third = session.send(lambda x: x, Slot(0), refs=[second])
    ordered = session.send(lambda: 1, after=(first,))
    record = pickle.loads(session.wait(first)[0].record)
    assert (record["status"], record["error"]["type"]) == ("failed", "LookupError")
    assert [frame[2] for frame in record["error"]["frames"]] == ["fail"]
    assert [report.kind for report in session.wait(second, third, ordered)] == ["upstream"] * 3
    late = session.send(lambda: 1, after=(first,))
    assert session.wait(late)[0].kind == "upstream"
    assert isinstance(session.runner.fetch([first])[0], Failed)


def test_a_result_that_cannot_travel_is_a_failure_with_its_logs(session: Session) -> None:
    def closes() -> Any:
        print("here it is")
        return {"lock": threading.Lock()}

    first = session.send(closes, prints=True)
    second = session.send(lambda x: x, Slot(0), refs=[first])
    record = pickle.loads(session.wait(first)[0].record)
    assert record["error"]["type"] == "UnserializableResult"
    assert "_thread.lock" in record["error"]["message"]
    assert [line[2] for line in record["logs"]] == ["here it is"]
    assert session.wait(second)[0].kind == "upstream"


def test_frames_and_containers_arrive_whole(session: Session) -> None:
    def make() -> Any:
        return {"frame": pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}), "array": np.arange(100_000)}

    ref = session.send(make)
    found = session.value(ref)
    assert list(found["frame"]["b"]) == ["x", "y"]
    assert not found["array"].flags.writeable
    total = session.send(lambda x: int(x["array"].sum()) + len(x["frame"]), Slot(0), refs=[ref])
    assert session.value(total) == sum(range(100_000)) + 2


def test_waiting_moves_no_bytes_to_the_driver(session: Session) -> None:
    def chain(count: int) -> tuple[Ref, int]:
        big = session.send(lambda: np.ones(count))
        after = session.send(lambda: "after", after=(big,))
        total = session.send(lambda x: float(x.sum()), Slot(0), refs=[big])
        assert session.value(total) == count
        gc.collect()
        return big, session.wait(big, after)[0].nbytes

    chain(10)
    before = psutil.Process().memory_info().rss
    big, nbytes = chain(10_000_000)
    assert nbytes == 80_000_000
    assert psutil.Process().memory_info().rss - before < 10_000_000
    assert session.runner.fetch([big])[0].nbytes == 80_000_000


def test_work_that_comes_first_ends_first(session: Session, tmp_path: Path) -> None:
    def mark(path: str) -> None:
        time.sleep(0.3)  # work: the other one would be faster
        Path(path).touch()

    first = session.send(mark, str(tmp_path / "done"))
    second = session.send(lambda path: Path(path).exists(), str(tmp_path / "done"), after=(first,))
    assert session.value(second) is True


def test_a_put_value_is_placed_once_and_released(session: Session) -> None:
    array = np.arange(200_000.0)
    ref, odd = session.runner.put([array, {"a": [1]}])
    assert ref.nbytes == array.nbytes
    refs = [
        session.send(lambda x, y: float(x.sum()) + y["a"][0], Slot(0), Slot(1), refs=[ref, odd])
        for _ in range(4)
    ]
    assert [session.value(one) for one in refs] == [array.sum() + 1] * 4
    assert np.array_equal(session.runner.fetch([ref])[0], array)
    session.runner.release([ref, odd, *refs])
    with pytest.raises(errors.ResultLost):
        session.runner.fetch([ref])


def test_what_cannot_be_put_is_refused(session: Session) -> None:
    with pytest.raises(errors.UnserializableArgument):
        session.runner.put([threading.Lock()])


def test_a_reference_may_go_before_the_work_ends(session: Session) -> None:
    ref = session.send(nap, 0.2)
    key = ref.key
    session.runner.release([ref])
    del ref
    assert status(session.wait(Ref(key, None))[0]) == "completed"


def test_a_large_function_is_stored_once(session: Session, runner: RayTaskRunner) -> None:
    ballast = os.urandom(300_000)
    submission = session.submission(lambda x: len(ballast) + x, 1)
    other = Submission((submission.key[0], 999), submission.order, submission.function, submission.arguments)
    refs = runner.send([submission, other])
    assert [session.value(ref) for ref in refs] == [300_001, 300_001]
    assert submission.function in runner._functions


def test_a_coroutine_is_awaited_and_options_reach_ray(session: Session) -> None:
    async def ask() -> Any:
        context = ray.get_runtime_context()
        return context.get_assigned_resources(), os.environ["OMP_NUM_THREADS"]

    wish = Options(resources=(("special", 0.5),), threads=2)
    resources, _ = session.value(session.send(ask, options=wish))
    assert (resources["CPU"], resources["special"]) == (2, 0.5)
    assert session.value(session.send(ask))[1] == "1"
    node = ray.get_runtime_context().get_node_id()
    assert session.value(session.send(ask, options=Options(workers=(node[:12],))))[0]["CPU"] == 1


# ---------------------------------------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, 0, 1], ids=str)
def test_a_worker_that_dies_is_reported_at_once(session: Session, how: int) -> None:
    def die(how: int, path: str) -> None:
        Path(path).touch()
        if isinstance(how, signal.Signals):
            os.kill(os.getpid(), how)
        os._exit(how)

    ready = session.send(lambda: 1)
    session.wait(ready)
    ref = session.send(die, how, os.devnull)
    heir = session.send(lambda x: x, Slot(0), refs=[ref])
    second = session.send(lambda x: x, Slot(0), refs=[heir])
    others = session.runner.send([session.submission(lambda x: x, number) for number in range(10)])
    report = session.wait(ref, seconds=10)[0]
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.WorkerLost)
    assert [one.kind for one in session.wait(heir, second)] == ["upstream"] * 2
    assert {status(one) for one in session.wait(*others)} == {"completed"}


def test_leaving_the_process_from_a_task_crashes_the_task_only(session: Session) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def leave() -> None:
        sys.exit(3)

    assert [status(one) for one in session.wait(session.send(interrupt), session.send(leave))] == [
        "crashed"
    ] * 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (exceptions.WorkerCrashedError(), errors.WorkerLost),
        (exceptions.NodeDiedError("node"), errors.WorkerLost),
        (exceptions.OutOfMemoryError("1 worker was killed. It used 3 GB."), errors.OutOfMemory),
        (exceptions.ObjectLostError("ab", "", ""), errors.ResultLost),
        (exceptions.OwnerDiedError("ab", None, ""), errors.ResultLost),
        (exceptions.TaskCancelledError(), errors.CancelledRun),
        (exceptions.LocalRayletDiedError(), errors.SchedulerLost),
        (exceptions.RuntimeEnvSetupError("no pip"), errors.WorkerLost),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_errors_of_ray_become_ours(error: Exception, kind: type[Exception]) -> None:
    found = ray_errors.neutral(error)
    assert type(found) is kind
    assert len(str(found)) < 400
    assert type(pickle.loads(pickle.dumps(found))) is kind


# --------------------------------------------------------------------------------------------------------- cancels


def test_what_has_not_started_is_dropped(session: Session) -> None:
    busy = session.send(loop, 20.0, options=WHOLE, announce=True)
    session.wait_start(busy)
    pending = [session.send(nap, 1.0) for _ in range(5)]
    heir = session.send(lambda x: x, Slot(0), refs=[pending[0]])
    assert session.runner.cancel([*pending, busy]) == [ref.key for ref in pending]
    assert session.wait(heir)[0].kind == "upstream"
    assert status(session.wait(busy)[0]) == "cancelled"
    assert session.runner.cancel([busy]) == []
    assert not any(ref.key in session.reports for ref in pending)


@pytest.mark.parametrize("code", [loop, nap])
def test_running_code_is_stopped(session: Session, code: Callable[..., Any]) -> None:
    ref = session.send(code, 20.0, announce=True)
    session.wait_start(ref)
    begun = time.monotonic()
    assert session.runner.cancel([ref]) == []
    assert status(session.wait(ref)[0]) == "cancelled"
    assert time.monotonic() - begun < 2
    assert session.value(session.send(lambda: 5)) == 5


def deaf() -> int:
    """Stay in C code that holds Python's lock."""
    return sum(range(10**11))


@pytest.mark.parametrize("softly_first", [False, True])
def test_force_ends_the_process_also_of_code_that_does_not_listen(
    session: Session, softly_first: bool
) -> None:
    ref = session.send(deaf, announce=True)
    session.wait_start(ref)
    if softly_first:
        assert session.runner.cancel([ref]) == []
    begun = time.monotonic()
    assert session.runner.cancel([ref], force=True) == []
    report = session.wait(ref)[0]
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.CancelledRun)
    assert report.worker != ""
    assert time.monotonic() - begun < 8


def test_a_start_is_announced_soon(session: Session) -> None:
    session.value(session.send(lambda: 1))

    def report_time() -> float:
        begun = time.time()
        time.sleep(1.5)  # work: longer than the news may take
        return begun

    ref = session.send(report_time, announce=True)
    silent = session.send(lambda: 1)
    assert session.started.get(ref.key, 0) - session.value(ref) < 0.5
    session.wait(silent)
    assert list(session.started) == [ref.key]


# ------------------------------------------------------------------------------------------- tasks that submit tasks


def inner_session() -> Any:
    """Runs in a worker: a session of the kind above over the runner that a task finds."""
    from penstock.runners import inside_worker

    return Session(inside_worker("ray").open())


def parent(
    root: str, children: int, seconds: float, patience: float, mark: str = os.devnull
) -> tuple[list[Any], float, list[str]]:
    sys.path.insert(0, root)
    session = inner_session()
    begun = time.monotonic()

    def child(number: int) -> int:
        Path(mark).touch()
        time.sleep(seconds)  # work: what the parent waits for
        return number

    try:
        refs = [session.send(child, number) for number in range(children)]
        with contextlib.suppress(AssertionError), session.runner.blocked(refs):
            session.wait(*refs, seconds=patience)
        waited = time.monotonic() - begun
        values = session.runner.fetch(refs) if len(session.reports) == children else []
    finally:
        session.runner.close()  # stops children that still run
    return (
        values,
        waited,
        [thread.name for thread in threading.enumerate() if thread.name.startswith("penstock")],
    )


def test_a_task_that_waits_gives_its_cpu_back(session: Session) -> None:
    for _ in range(3):  # in the same worker process, if Ray likes
        ref = session.send(parent, str(ROOT), 3, 0.1, SECONDS, options=WHOLE)
        values, _, threads = session.value(ref)
        assert values == [0, 1, 2]
        assert threads == ["penstock-watch"]  # one for the process, none for each runner


def test_a_task_that_is_tired_of_waiting_goes_on(session: Session) -> None:
    ref = session.send(parent, str(ROOT), 1, 6.0, 1.0, options=WHOLE)
    values, waited, _ = session.value(ref)
    assert values == []
    assert 1.0 <= waited < 3.0


def test_a_task_that_waits_can_be_cancelled(session: Session, tmp_path: Path, wait_until: Any) -> None:
    ref = session.send(parent, str(ROOT), 1, 20.0, 30.0, str(tmp_path / "child"), options=WHOLE)
    wait_until((tmp_path / "child").exists, SECONDS)
    begun = time.monotonic()
    session.runner.cancel([ref])
    assert status(session.wait(ref)[0]) == "cancelled"
    assert time.monotonic() - begun < 3


# ------------------------------------------------------------------------------------------- attaching and leaving


def test_runners_are_equal_by_settings_and_travel_as_an_address(runner: RayTaskRunner) -> None:
    one = RayTaskRunner("ray://here:1", {"num_cpus": 2})
    assert one == one.duplicate() != RayTaskRunner("ray://here:1")
    assert hash(one) == hash(one.duplicate())
    assert pickle.loads(pickle.dumps(one)).address == "ray://here:1"
    assert (
        pickle.loads(pickle.dumps(runner)).address
        == runner.info.address
        == ray.get_runtime_context().gcs_address
    )
    assert runner.inside() == "ray"
    assert (runner.info.threads, runner.info.dependencies, runner.info.interrupts) == (2, True, True)


def test_a_ray_that_is_there_is_shared_and_left_open(session: Session, runner: RayTaskRunner) -> None:
    with runner.duplicate() as other:
        assert other.info.address == runner.info.address
        second = Session(other)
        left = second.send(loop, 20.0, announce=True)
        second.wait_start(left)
        assert second.value(second.send(lambda: 2)) == 2
    assert ray.is_initialized()
    with pytest.raises(RuntimeError, match="must be started"):
        other.fetch([left])
    # What the closed runner had left running was stopped, so both CPUs are free.
    assert session.value(session.send(lambda: 3, options=WHOLE)) == 3


@pytest.fixture
def stranger() -> Iterator[str]:
    """A server that is not Ray's."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_without_ray_is_refused_soon(stranger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    begun = time.monotonic()
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", stranger, "nonsense"):
        with pytest.raises(errors.RunnerUnavailable, match="no Ray answers"):
            RayTaskRunner(address).open()
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    with pytest.raises(errors.RunnerUnavailable, match="no Ray runs on this machine"):
        RayTaskRunner("auto").open()
    assert time.monotonic() - begun < 10


# ----------------------------------------------------------------------------------------------- a Ray of our own

DRIVER = """
    import os, pickle, signal, sys, threading, time
    import cloudpickle, psutil
    from penstock.runners.base import Submission
    from penstock.runners.ray import RayTaskRunner

    on_term = signal.getsignal(signal.SIGTERM)
    opened = []
    def start():
        opened.append(RayTaskRunner(init_kwargs={"num_cpus": 1, "object_store_memory": 100 << 20}).open())
    thread = threading.Thread(target=start)  # Ray has to outlive whoever has opened it
    thread.start()
    thread.join()
    [runner] = opened
    other = runner.duplicate().open()
    other.close()
    assert signal.getsignal(signal.SIGTERM) is on_term
    reports, news = [], threading.Event()
    runner.listen("tag", lambda batch: (reports.extend(batch), news.set()))

    def where():
        import sys
        return sys.modules["penstock.runners.worker"].__file__

    def send(number, function, *args):
        order = pickle.dumps({"context": {}})
        return runner.send([Submission(("t-tag", number), order, cloudpickle.dumps(function), pickle.dumps((args, {})))])[0]

    ref = send(0, where)
    assert news.wait(60)
    assert runner.fetch([ref]) == ["<penstock.runners>/worker/__init__.py"], "shipped as source, not imported"
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for one in process.net_connections("tcp"):
            assert one.status != "LISTEN" or one.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1"), (process, one)
    for number in range(1, 800, 8):  # a cancel that meets the end of a task has made Ray abort the driver
        refs = [send(number + more, time.sleep, 0.003) for more in range(8)]
        time.sleep(number % 100 / 5_000)
        runner.cancel(refs)
    send(1000, time.sleep, 60)
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_nothing_is_left_of_a_ray_of_our_own(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "driver.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(DRIVER)}")
    with subprocess.Popen(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        assert driver.stdout is not None
        pids = driver.stdout.readline().split()
        children = [psutil.Process(int(pid)) for pid in pids]
        os.killpg(driver.pid, how) if how == signal.SIGINT else driver.kill()
        output, problems = driver.communicate(timeout=30)
    assert len(pids) > 5, problems
    assert output == ""
    assert problems.splitlines()[-1:] == (["KeyboardInterrupt"] if how == signal.SIGINT else [])
    _, left = psutil.wait_procs(children, timeout=15)
    assert left == []
