"""DaskTaskRunner, driven by hand-made submissions: values, deaths, cancels, attaching, leftovers."""

import contextlib
import gc
import io
import itertools
import json
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
import psutil
import pytest

pytest.importorskip("distributed")

from penstock import errors, flow, load_result, task
from penstock.runners import attach, dask_graph, dask_watch
from penstock.runners.base import Key, Options, Ref, Report, Submission, TaskRunner, new_tag
from penstock.runners.dask import DaskTaskRunner
from penstock.runners.worker.running import current

pytestmark = pytest.mark.dask

SECONDS = 30
ROOT = Path(__file__).parent.parent.parent


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


def wait_until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.01)


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
                    self.reports.setdefault(report.key, report)
            self._news.notify_all()

    def submission(
        self,
        function: Callable[..., Any],
        *args: Any,
        refs: Sequence[Ref] = (),
        name: str = "job",
        **more: Any,
    ) -> Submission:
        buffer = io.BytesIO()
        ArgumentPickler(buffer, 5).dump((tuple(args), {}))
        order = {"run": name, "attempt": 1, "task": name, "name": name, "context": {}}
        key = (f"{name}-{self.tag}", next(self._numbers))
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

    def wait_start(self, ref: Ref, seconds: float = SECONDS) -> None:
        with self._news:
            assert self._news.wait_for(lambda: ref.key in self.started, seconds)

    def value(self, ref: Ref) -> Any:
        report = self.wait(ref)[0]
        assert status(report) == "completed", report
        return self.runner.fetch([ref])[0]

    def close(self) -> None:
        self.runner.unlisten(self.tag)


def status(report: Report) -> str:
    return str(pickle.loads(report.record)["status"]) if report.kind == "ended" else report.kind


def scheduler_of(runner: DaskTaskRunner) -> Any:
    return runner.client.cluster.scheduler


# ---------------------------------------------------------------------------------------------- a local cluster


@pytest.fixture(scope="module")
def runner() -> Iterator[DaskTaskRunner]:
    found = DaskTaskRunner(
        cluster_kwargs={"n_workers": 2, "threads_per_worker": 1, "memory_limit": "1GB"}
    ).open()
    yield found
    found.close()


@pytest.fixture
def session(runner: DaskTaskRunner) -> Iterator[Session]:
    wait_until(lambda: len(scheduler_of(runner).workers) == 2)  # after a test that has killed one
    found = Session(runner)
    yield found
    found.close()


def test_a_chain_in_one_message_hands_values_on(session: Session) -> None:
    first = session.submission(lambda: 20)
    second = session.submission(lambda x, y: x + y, Slot(0), 1, refs=[Ref(first.key, None)])
    third = session.submission(lambda x: [x, x], Slot(0), refs=[Ref(second.key, None)], priority=2)
    refs = session.runner.send([first, second, third])
    assert session.value(refs[2]) == [21, 21]
    assert session.runner.fetch(refs) == [20, 21, [21, 21]]
    report = session.reports[refs[0].key]
    assert report.nbytes > 0
    assert report.worker.startswith("tcp://127.0.0.1:")
    assert refs[0].worker == report.worker


def test_the_public_way_to_send_does_the_same(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_graph, "_takes_priorities", lambda client: False)
    first = session.send(lambda: 1)
    second = session.send(lambda x: x + 1, Slot(0), refs=[first], after=(first,), priority=3)
    assert session.value(second) == 2


def test_many_tasks_of_several_wishes_travel_together(session: Session) -> None:
    workers = list(scheduler_of(session.runner).workers)  # type: ignore[arg-type]
    wishes = [Options(workers=(workers[number % 2],)) for number in range(200)]
    refs = session.runner.send(
        [session.submission(lambda x: x, n, options=wish) for n, wish in enumerate(wishes)]
    )
    assert [report.worker for report in session.wait(*refs)] == [workers[n % 2] for n in range(200)]
    assert session.runner.fetch(refs) == list(range(200))


def test_a_failure_comes_with_its_record_and_spares_what_depends_on_it(session: Session) -> None:
    def fail() -> None:
        raise LookupError("nothing there")

    first = session.send(fail)
    second = session.send(lambda x: x, Slot(0), refs=[first])
    third = session.send(lambda x: x, Slot(0), refs=[second])
    report = session.wait(first)[0]
    record = pickle.loads(report.record)
    assert record["status"] == "failed"
    assert record["error"]["type"] == "LookupError"
    assert [frame[2] for frame in record["error"]["frames"]] == ["fail"]
    assert [one.kind for one in session.wait(second, third)] == ["upstream", "upstream"]


def test_leaving_the_process_from_a_task_crashes_the_task_only(session: Session) -> None:
    pids = {state.pid for state in scheduler_of(session.runner).workers.values()}  # type: ignore[arg-type]

    def leave() -> None:
        sys.exit(3)

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert [status(one) for one in session.wait(session.send(leave), session.send(interrupt))] == [
        "crashed"
    ] * 2
    assert {state.pid for state in scheduler_of(session.runner).workers.values()} == pids  # type: ignore[arg-type]


def test_a_result_that_cannot_travel_is_a_failure(session: Session) -> None:
    ref = session.send(threading.Lock)
    record = pickle.loads(session.wait(ref)[0].record)
    assert record["error"]["type"] == "UnserializableResult"
    assert "_thread.lock" in record["error"]["message"]


def test_a_coroutine_is_awaited(session: Session) -> None:
    async def double(x: int) -> int:
        return 2 * x

    assert session.value(session.send(double, 4)) == 8


def test_a_large_function_is_sent_once(session: Session) -> None:
    ballast = os.urandom(200_000)
    refs = session.runner.send([session.submission(lambda x: len(ballast) + x, n) for n in range(8)])
    session.wait(*refs)
    assert session.runner.fetch(refs) == [200_000 + n for n in range(8)]


def test_waiting_for_a_task_moves_none_of_its_bytes(session: Session) -> None:
    one, other = list(scheduler_of(session.runner).workers)  # type: ignore[arg-type]
    big = session.send(lambda: np.zeros(1_000_000), options=Options(workers=(one,)))
    late = session.submission(lambda: "after", after=(big,), options=Options(workers=(other,)))
    ref = session.runner.send([late])[0]
    assert session.value(ref) == "after"
    holders = scheduler_of(session.runner).tasks[big.key].who_has  # type: ignore[arg-type]
    assert [state.address for state in holders] == [one]


def test_a_large_result_stays_away_until_it_is_fetched(session: Session) -> None:
    session.value(session.send(lambda: 1))
    gc.collect()
    before = psutil.Process().memory_info().rss
    ref = session.send(lambda: np.ones(10_000_000))
    assert session.wait(ref)[0].nbytes == 80_000_000
    assert session.value(session.send(lambda x: float(x.sum()), Slot(0), refs=[ref])) == 1e7
    assert psutil.Process().memory_info().rss - before < 10_000_000
    assert session.runner.fetch([ref])[0].nbytes == 80_000_000


def test_a_put_value_is_placed_once_and_freed(session: Session) -> None:
    client = session.runner.client  # type: ignore[attr-defined]
    array = np.arange(1000.0)
    ref, odd = session.runner.put([array, {"a": [1]}])
    refs = [
        session.send(lambda x, y: float(x.sum()) + y["a"][0], Slot(0), Slot(1), refs=[ref, odd])
        for _ in range(4)
    ]
    assert [session.value(one) for one in refs] == [array.sum() + 1] * 4
    assert np.array_equal(session.runner.fetch([ref])[0], array)
    keys = [one.key for one in (ref, odd, *refs)]
    session.runner.release([ref, odd, *refs])
    wait_until(lambda: not set(keys) & set(scheduler_of(session.runner).tasks))  # type: ignore[arg-type]
    assert not set(keys) & set(client.futures)
    with pytest.raises(errors.ResultLost):
        session.runner.fetch([ref])


def test_what_cannot_be_put_is_refused(session: Session) -> None:
    with pytest.raises(errors.UnserializableArgument):
        session.runner.put([threading.Lock()])


def test_the_last_reference_frees_the_value(session: Session) -> None:
    ref = session.send(lambda: 5)
    key = ref.key
    session.wait(ref)
    del ref
    gc.collect()
    wait_until(lambda: key not in scheduler_of(session.runner).tasks)  # type: ignore[arg-type]


def test_a_reference_may_go_before_the_work_ends(session: Session) -> None:
    ref = session.send(lambda: 5)
    key = ref.key
    del ref
    assert status(session.wait(Ref(key, None))[0]) == "completed"


# ------------------------------------------------------------------------------------------------------- deaths


def test_a_killed_worker_is_reported_and_its_queue_goes_elsewhere(session: Session, tmp_path: Path) -> None:
    def die(folder: str) -> None:
        Path(folder, str(time.time_ns())).touch()
        time.sleep(0.3)  # work: the others are assigned meanwhile
        os.kill(os.getpid(), signal.SIGKILL)

    begun = time.monotonic()
    killer = session.send(die, str(tmp_path), name="killer")
    heir = session.send(lambda x: x, Slot(0), refs=[killer])
    others = session.runner.send([session.submission(lambda x: x, number) for number in range(20)])
    report = session.wait(killer)[0]
    assert time.monotonic() - begun < 5
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.WorkerLost)
    assert "died by SIGKILL while it ran task 'killer'" in str(report.cause)
    assert report.cause.began is True
    assert session.wait(heir)[0].kind == "upstream"
    assert [status(one) for one in session.wait(*others)] == ["completed"] * 20
    assert session.runner.fetch(others) == list(range(20))
    assert len(list(tmp_path.iterdir())) == 1, "it was not started again"


def test_an_exit_code_is_told(session: Session) -> None:
    report = session.wait(session.send(lambda: os._exit(7)))[0]
    assert "exited with code 7" in str(report.cause)


def test_results_that_died_with_their_worker_are_made_again(session: Session, tmp_path: Path) -> None:
    def trace(folder: str) -> int:
        Path(folder, str(time.time_ns())).touch()
        return 3

    ref = session.send(trace, str(tmp_path))
    holder = session.wait(ref)[0].worker
    pid = {state.address: state.pid for state in scheduler_of(session.runner).workers.values()}[holder]  # type: ignore[arg-type]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    assert session.runner.fetch([ref]) == [3]


def test_a_put_value_that_is_gone_is_said_to_be(session: Session) -> None:
    client = session.runner.client  # type: ignore[attr-defined]
    ref = session.runner.put([b"x" * 100])[0]
    holder = client.who_has([ref.handle])[ref.handle.key][0]
    os.kill(scheduler_of(session.runner).workers[holder].pid, signal.SIGKILL)  # type: ignore[arg-type]
    wait_until(lambda: ref.handle.status == "cancelled")
    report = session.wait(session.send(len, Slot(0), refs=[ref]))[0]
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.ResultLost)
    with pytest.raises(errors.ResultLost):
        session.runner.fetch([ref])


def test_too_much_memory_is_told_apart(session: Session) -> None:
    def grow() -> None:
        kept = []
        for _ in range(200):
            kept.append(np.ones(1_250_000))
            time.sleep(0.02)  # work: the nanny looks every tenth of a second

    report = session.wait(session.send(grow))[0]
    assert report.kind == "lost"
    assert isinstance(report.cause, errors.OutOfMemory), report.cause
    assert "of the 1,000 MB it may" in str(report.cause)


def test_an_end_whose_message_is_lost_is_found(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = session.runner._watch  # type: ignore[attr-defined]
    monkeypatch.setattr(watch, "_read", lambda message: [])
    monkeypatch.setattr(dask_watch, "LATE_SECONDS", 0.5)

    def fail() -> None:
        raise ValueError

    good, bad = session.send(lambda: 1), session.send(fail)
    assert [status(one) for one in session.wait(good, bad)] == ["completed", "failed"]
    assert session.runner.fetch([good]) == [1]


def test_a_wish_that_no_worker_grants_is_told(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dask_watch, "WAITING_SECONDS", 0.1)
    ref = session.send(lambda: 1, name="trained", options=Options(resources=(("GPU", 1.0),)))
    wait_until(lambda: "task 'trained' waits for a worker" in caplog.text)
    assert session.runner.cancel([ref]) == [ref.key]


# ------------------------------------------------------------------------------------------------------ cancels


def nap(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)  # work: may be interrupted between two steps


def test_work_that_waits_is_withdrawn(session: Session) -> None:
    blockers = session.runner.send([session.submission(nap, 2.0) for _ in range(2)])
    waiting = [session.submission(nap, 0.0) for _ in range(40)]
    waiting.append(session.submission(lambda x: x, Slot(0), refs=[Ref(waiting[-1].key, None)]))
    *queued, heir = session.runner.send(waiting)
    stopped = session.runner.cancel(queued)
    assert set(stopped) == {ref.key for ref in queued}
    assert session.wait(heir)[0].kind == "upstream"
    assert [status(one) for one in session.wait(*blockers)] == ["completed"] * 2
    assert not set(stopped) & set(session.reports)


def test_running_code_is_asked_to_stop(session: Session) -> None:
    ref = session.send(nap, 60.0, announce=True)
    session.wait_start(ref)
    begun = time.monotonic()
    assert session.runner.cancel([ref]) == []
    assert status(session.wait(ref)[0]) == "cancelled"
    assert time.monotonic() - begun < 2


def test_force_ends_the_process_and_moves_its_neighbours(session: Session) -> None:
    ref = session.send(lambda: time.sleep(60), announce=True)  # work: not to be interrupted
    session.wait_start(ref)
    others = session.runner.send([session.submission(lambda x: x, number) for number in range(10)])
    begun = time.monotonic()
    assert session.runner.cancel([ref], force=True) == [ref.key]
    assert time.monotonic() - begun < 5
    assert [status(one) for one in session.wait(*others)] == ["completed"] * 10
    assert ref.key not in session.reports


def test_a_session_that_leaves_takes_its_work_along(runner: DaskTaskRunner) -> None:
    session = Session(runner)
    refs = runner.send([session.submission(nap, 0.2) for _ in range(30)])
    session.close()
    keys = {ref.key for ref in refs}
    wait_until(lambda: not keys & set(scheduler_of(runner).tasks))


# ------------------------------------------------------------------------------------------------------ nesting


def parent(number: int) -> int:
    """Submit a child through the worker's own connection, and wait for it without holding a slot."""
    runner = DaskTaskRunner._from_worker().open()
    session = Session(runner)
    child = session.send(lambda x: x + 1, number)
    with runner.blocked([child]):
        session.wait(child)
    value = int(session.value(child))
    session.close()
    runner.close()
    return value


def test_parents_that_fill_all_slots_give_them_to_their_children(session: Session) -> None:
    refs = session.runner.send([session.submission(parent, number) for number in range(6)])
    assert [session.value(ref) for ref in refs] == [1, 2, 3, 4, 5, 6]
    assert session.runner.inside() == "dask"


# ------------------------------------------------------------------------------------------------- other clusters


def nannies_of(address: str) -> list[str]:
    """Return the states of the nannies: one whose worker dies while it starts takes `dask worker` along."""
    from distributed import Client

    def state(dask_worker: Any) -> str:
        return str(dask_worker.status.name)

    with Client(address, set_as_default=False) as client:
        return list(client.run(state, nanny=True, on_error="ignore").values())


@contextlib.contextmanager
def foreign_cluster(folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """A scheduler and workers as somebody else has started them, where penstock is not installed."""
    hidden = folder / "sitecustomize.py"
    hidden.write_text(f"import sys\nsys.path[:] = [one for one in sys.path if one != {str(ROOT)!r}]\n")
    file = folder / "scheduler.json"
    with (folder / "log.txt").open("w") as log:
        shared: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": str(folder)}, "cwd": folder}
        shared |= {"stdout": subprocess.DEVNULL, "stderr": log}
        command = [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        command += ["--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file)]
        processes = [subprocess.Popen(command, **shared)]
        wait_until(file.exists)
        address = json.loads(file.read_text())["address"]
        if workers:
            command = [
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                address,
                "--nthreads",
                "1",
                "--no-dashboard",
            ]
            processes.append(subprocess.Popen([*command, "--nworkers", str(workers)], **shared))
        wait_until(lambda: nannies_of(address).count("running") == workers)
        yield {"address": address, "file": str(file), "processes": processes}
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with foreign_cluster(tmp_path_factory.mktemp("foreign"), 2) as found:
        yield found


def plugins_of(address: str) -> list[str]:
    from distributed import Client

    def listed(dask_scheduler: Any) -> list[str]:
        return [*dask_scheduler.plugins, *dask_scheduler.worker_plugins, *dask_scheduler._broker._topics]

    with Client(address, set_as_default=False) as client:
        found = client.run_on_scheduler(listed)
    return [name for name in found if name.startswith("penstock")]


def test_a_cluster_without_penstock_does_the_work_and_is_left_clean(foreign: dict[str, Any]) -> None:
    def fail(x: int) -> None:
        raise ValueError(x)

    with contextlib.ExitStack() as stack:
        runner = DaskTaskRunner(foreign["address"]).open()
        stack.callback(runner.close)
        second = DaskTaskRunner(scheduler_file=foreign["file"]).open()
        assert runner.info.address == second.info.address == foreign["address"]
        wait_until(lambda: runner.info.workers == 2)
        session = Session(runner)
        good = session.send(lambda x: x + 1, 1)
        bad = session.send(fail, Slot(0), refs=[good])
        assert session.value(good) == 2
        assert pickle.loads(pickle.loads(session.wait(bad)[0].record)["error"]["pickle"]).args == (2,)
        assert "penstock" not in runner.client.submit(lambda: list(sys.modules), pure=False).result()
        other = Session(second)
        assert other.value(other.send(lambda: 5)) == 5
        second.close()
        assert session.value(session.send(lambda: 6)) == 6, "the first still needs what both had brought"
        put = runner.put([b"x"])[0]
        assert runner.fetch([put]) == [b"x"]
        session.close()
    wait_until(lambda: plugins_of(foreign["address"]) == [], 5)
    assert all(process.poll() is None for process in foreign["processes"])


def test_a_worker_without_penstock_stores_results(foreign: dict[str, Any], tmp_path: Path) -> None:
    runner = DaskTaskRunner(foreign["address"])

    @task
    def loaded(value: Any) -> Any:
        return [name for name in sys.modules if name.startswith("penstock")] or value

    def body() -> list[Any]:
        good = loaded.submit(np.arange(100_000))
        bad = loaded.with_options(result_serializer="json").submit((1, 2))
        with pytest.raises(errors.UnserializableResult, match="which JSON does not give back"):
            bad.result()
        good.wait()
        return [good.state.state_details["stored"]]

    (where,) = flow(task_runner=runner, result_storage=tmp_path)(body)()
    assert np.array_equal(load_result(where), np.arange(100_000))


def test_a_client_of_the_users_stays_as_it_is(foreign: dict[str, Any]) -> None:
    from distributed import Client

    with Client(foreign["address"], set_as_default=False) as client:
        runner = DaskTaskRunner(client=client)
        with runner:
            session = Session(runner)
            assert session.value(session.send(lambda: 1)) == 1
            session.close()
        assert client.status == "running"
        assert client.submit(abs, -3).result() == 3


def test_a_death_on_a_foreign_cluster_is_told(foreign: dict[str, Any]) -> None:
    with DaskTaskRunner(foreign["address"]) as runner:
        session = Session(runner)
        ref = session.send(lambda: os.kill(os.getpid(), signal.SIGKILL), name="killer")
        report = session.wait(ref)[0]
        session.close()
    assert report.kind == "lost"
    assert "died while it ran task 'killer'" in str(report.cause)


def test_a_cluster_without_workers_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_watch, "QUIET_SECONDS", 0.2)
    with foreign_cluster(tmp_path, 0) as foreign, DaskTaskRunner(foreign["address"]) as runner:
        session = Session(runner)
        session.send(lambda: 1)
        wait_until(lambda: any("has no workers" in one.getMessage() for one in caplog.records))
        session.close()
    assert f"the Dask cluster at {foreign['address']} has no workers: 1 tasks wait" in caplog.text


def test_a_scheduler_that_dies_is_told_at_once(tmp_path: Path) -> None:
    with foreign_cluster(tmp_path, 1) as foreign:
        runner = DaskTaskRunner(foreign["address"], client_kwargs={"timeout": 3}, reconnect_timeout=0).open()
        session = Session(runner)
        refs = runner.send([session.submission(nap, 60.0, announce=True) for _ in range(3)])
        session.wait_start(refs[0])
        foreign["processes"][0].kill()
        begun = time.monotonic()
        for report in session.wait(*refs):
            assert report.kind == "lost"
            assert isinstance(report.cause, errors.SchedulerLost)
        assert time.monotonic() - begun < 3
        assert isinstance(session.wait(session.send(lambda: 1))[0].cause, errors.SchedulerLost)
        begun = time.monotonic()
        session.close()
        runner.close()
        assert time.monotonic() - begun < 8


def test_an_address_where_nobody_is_says_so() -> None:
    begun = time.monotonic()
    with pytest.raises(errors.RunnerUnavailable, match=r"no Dask scheduler answers at tcp://127.0.0.1:1 "):
        DaskTaskRunner("tcp://127.0.0.1:1", client_kwargs={"timeout": 1}).open()
    assert time.monotonic() - begun < 8


def test_a_cluster_of_the_users_is_used_and_left_open(runner: DaskTaskRunner) -> None:
    cluster = runner.client.cluster
    attached = DaskTaskRunner(cluster=cluster)
    assert not attached.keeps
    with attached:
        session = Session(attached)
        assert session.value(session.send(lambda: 4)) == 4
        assert attached.info.address == cluster.scheduler_address
        session.close()
    assert cluster.status.name == "running"


def test_versions_that_do_not_fit_are_refused(
    runner: DaskTaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = runner.client.get_versions()
    found["scheduler"]["packages"]["numpy"] = "1.26.4"
    monkeypatch.setattr(runner.client, "get_versions", lambda: found)
    with pytest.raises(errors.RunnerUnavailable, match=r"numpy +2\.\S+ +1\.26\.4"):
        attach.check_versions(runner.client, strict=True)
    attach.check_versions(runner.client, strict=False)
    found["scheduler"]["packages"]["python"] = "3.99.0"
    with pytest.raises(errors.RunnerUnavailable, match=r"3\.99\.0"):
        attach.check_versions(runner.client, strict=False)


# ------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "settings",
    [
        {"address": "tcp://a:1", "cluster_kwargs": {"n_workers": 1}},
        {"address": "tcp://a:1", "cluster_class": "distributed.LocalCluster"},
        {"address": "tcp://a:1", "adapt_kwargs": {"maximum": 2}},
        {"address": "tcp://a:1", "scheduler_file": "s.json"},
        {"cluster": object(), "cluster_kwargs": {"n_workers": 1}},
        {"cluster": object(), "client": object()},
        {"client": object(), "client_kwargs": {"timeout": 1}},
        {"client_kwargs": {"asynchronous": True}},
        {"cluster_kwargs": {"asynchronous": True}},
        {"max_in_flight": 0},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'"):
        DaskTaskRunner(**settings)


def test_runners_are_equal_by_what_they_use(tmp_path: Path) -> None:
    cluster = type("Cluster", (), {"scheduler_address": "tcp://b:2"})()
    assert DaskTaskRunner() == DaskTaskRunner() != DaskTaskRunner(cluster_kwargs={"n_workers": 1})
    assert DaskTaskRunner("tcp://a:1") == DaskTaskRunner(address="tcp://a:1") != DaskTaskRunner("tcp://a:2")
    assert DaskTaskRunner(cluster=cluster) == DaskTaskRunner(cluster=cluster) != DaskTaskRunner()
    assert DaskTaskRunner().keeps
    assert not DaskTaskRunner("tcp://a:1").keeps
    shared = DaskTaskRunner()
    assert shared.duplicate() == shared
    assert pickle.loads(pickle.dumps(DaskTaskRunner(cluster=cluster))) == DaskTaskRunner("tcp://b:2")
    assert pickle.loads(pickle.dumps(DaskTaskRunner(cluster_kwargs={"n_workers": 3}))) == DaskTaskRunner(
        cluster_kwargs={"n_workers": 3}
    )
    path = tmp_path / "runner.yaml"
    path.write_text("cluster_kwargs: {n_workers: 3}\nclient_kwargs: {timeout: 9}\n")
    assert DaskTaskRunner.from_yaml(path) == DaskTaskRunner(
        cluster_kwargs={"n_workers": 3}, client_kwargs={"timeout": 9}
    )
    path.write_text("colour: red\n")
    with pytest.raises(errors.ConfigurationError, match="colour"):
        DaskTaskRunner.from_yaml(path)


def test_the_environment_names_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    assert attach.named_by_environment() == {}
    monkeypatch.setenv("DASK_SCHEDULER_FILE", "s.json")
    assert attach.named_by_environment() == {"scheduler_file": "s.json"}
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://a:1")
    assert attach.named_by_environment() == {"address": "tcp://a:1"}


def test_an_unopened_runner_says_so() -> None:
    with pytest.raises(RuntimeError, match="must be started before submitting work"):
        DaskTaskRunner().put([1])


def test_batches_keep_their_order_and_a_bearable_size() -> None:
    def made(number: int, size: int) -> Submission:
        return Submission(("job-00000000", number), b"", b"", b"x" * size)

    many = [made(number, 1) for number in range(dask_graph.TASKS + 5)]
    assert [len(batch) for batch in dask_graph.batches(many)] == [dask_graph.TASKS, 5]
    large = [made(number, 3_000_000) for number in range(5)]
    assert [[one.key[1] for one in batch] for batch in dask_graph.batches(large)] == [[0, 1], [2, 3], [4]]
    assert list(dask_graph.batches([])) == []


def test_a_loss_says_what_is_known() -> None:
    details = {
        "worker": "tcp://a:1",
        "pid": 0,
        "limit": 2e9,
        "rss": 0,
        "silent": False,
        "began": None,
        "shared": 3,
    }
    cause: Any = dask_watch.loss(("job-00000000", 1), details)
    assert str(cause) == "worker tcp://a:1 (pid 0) died while it had task 'job'"
    assert cause.began is None
    assert cause.shared == 3
    cause = dask_watch.loss(("job-00000000", 1), {**details, "rss": 1.9e9, "began": True})
    assert isinstance(cause, errors.OutOfMemory)
    assert "used 1,900 MB of the 2,000 MB it may" in str(cause)


# ----------------------------------------------------------------------------------------------------- leftovers

SCRIPT = """
    import os, pickle, signal, sys, threading, time
    import cloudpickle
    from penstock.runners.base import Submission
    from penstock.runners.dask import DaskTaskRunner

    runner = DaskTaskRunner(cluster_kwargs={"n_workers": 2}).open()
    ended = threading.Event()
    runner.listen("0000abcd", lambda reports: ended.set())
    order = pickle.dumps({"run": "r", "attempt": 1, "task": "nap", "name": "nap", "context": {}})
    def nap(seconds):
        time.sleep(seconds)
        raise ValueError("a failure makes Dask log a lot")
    def send(number, seconds):
        return runner.send([Submission(
            ("nap-0000abcd", number), order, cloudpickle.dumps(nap), pickle.dumps(((seconds,), {})))])
    kept = send(0, 0)
    ended.wait(30)
    kept += send(1, 60)
    try:
        print("ready", *(state.pid for state in runner.client.cluster.scheduler.workers.values()), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        runner.close()
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A script without a guard that has opened a cluster, in a process group of its own."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line[:1] == ["ready"], process.communicate()
    yield process, [int(pid) for pid in line[1:]]
    process.kill()
    process.communicate()


def gone(pids: Sequence[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_ctrl_c_reaches_the_driver_only_and_leaves_nothing(driver: Any) -> None:
    process, pids = driver
    os.killpg(process.pid, signal.SIGINT)
    output, noise = process.communicate(timeout=20)
    assert output.strip() == "interrupted"
    assert noise == ""
    assert process.returncode == 0
    wait_until(lambda: gone(pids), 5)


def test_workers_do_not_outlive_a_killed_driver(driver: Any) -> None:
    process, pids = driver
    process.kill()
    wait_until(lambda: gone(pids), 10)


def test_ctrl_c_while_the_cluster_starts_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import distributed, penstock.runners.dask as d\nprint('go', flush=True)\n"
        "try:\n    d.DaskTaskRunner(cluster_kwargs={'n_workers': 2}).open()\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    command = [sys.executable, str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    watched = psutil.Process(process.pid)
    wait_until(lambda: len(watched.children()) > 1)
    children = watched.children()
    os.killpg(process.pid, signal.SIGINT)
    output, noise = process.communicate(timeout=30)
    assert (output, noise) == ("interrupted\n", "")
    wait_until(lambda: gone([child.pid for child in children]), 5)


def test_nothing_is_left_when_the_runner_closes() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    environment = dict(os.environ)
    runner = DaskTaskRunner(cluster_kwargs={"n_workers": 1, "dashboard_address": None})
    with runner:
        runner.open().close()
        assert runner.is_open, "users are counted"
        assert runner.info.workers == 1
        session = Session(runner)
        seen = session.value(
            session.send(lambda: (os.environ["OMP_NUM_THREADS"], "__file__" in vars(sys.modules["__main__"])))
        )
        assert seen == ("1", False)
        session.close()
        flow(task_runner=runner)(lambda: None)()
    assert not runner.is_open, "flows keep only what they have started"
    assert {name for name in os.environ if not name.startswith("__DASK")} <= set(environment)
    helpers = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

    def strays() -> list[psutil.Process]:
        children = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
        return [
            one
            for one in children
            if one.is_running() and not any(h in " ".join(one.cmdline()) for h in helpers)
        ]

    wait_until(lambda: not strays(), 5)
    assert current() is None
