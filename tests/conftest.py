"""Fixtures of all tests: a clean environment, the five runners, the record of what happened."""

import gc
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock import flow, settings
from penstock.engine.events import bus
from penstock.engine.tracking import stop_tracking
from penstock.runners import base, runner_class
from penstock.runners.base import TaskRunner, shutdown_all
from tests.record import Record

CLASSES = {
    "sequential": "SequentialTaskRunner",
    "threads": "ThreadPoolTaskRunner",
    "processes": "ProcessPoolTaskRunner",
    "dask": "DaskTaskRunner",
    "ray": "RayTaskRunner",
}
LIBRARIES = {"dask": "distributed", "ray": "ray"}
RAY_STORE = 250 << 20  # bytes of shared memory

InFlow = Callable[..., Any]


# ---------------------------------------------------------------------------------------- the environment


@pytest.fixture(autouse=True)
def clean_environment(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A home of its own for each test, and no setting from outside."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PENSTOCK_HOME", str(home))
    settings.refresh()
    yield home
    shutdown_all()  # a flow keeps the cluster that it has started, until the process ends
    stop_tracking()
    settings._current = None


@pytest.fixture
def record() -> Iterator[Record]:
    """The events of a test."""
    found = Record()
    unsubscribe = bus.subscribe(found.events.append)
    yield found
    unsubscribe()


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Look again until something holds; fail after a time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.01)


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    return wait_until


# ------------------------------------------------------------------------------------------- the runners


def required(library: str) -> None:
    """Fail where everything has to be installed, skip elsewhere."""
    if importlib.util.find_spec(library) is None:
        reason = f"{library} is not installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def made(name: str, workers: int) -> TaskRunner:
    options: dict[str, dict[str, Any]] = {
        "sequential": {},
        "threads": {"max_workers": 2 * workers},
        "processes": {"max_workers": workers},
        "dask": {
            "cluster_kwargs": {
                "n_workers": workers,
                "threads_per_worker": 1,
                "memory_limit": "2GB",
                "dashboard_address": None,
            }
        },
        "ray": {
            "init_kwargs": {"num_cpus": workers, "object_store_memory": RAY_STORE, "include_dashboard": False}
        },
    }
    if workers == 1:
        options["threads"] = {"max_workers": 1}
    return runner_class(CLASSES[name])(**options[name])


class Bench:
    """Keeps one runner open, from the first test that asks for it until one asks for another."""

    def __init__(self) -> None:
        self._asked: tuple[str, int] | None = None
        self._open: TaskRunner | None = None

    def open(self, name: str, workers: int = 2) -> TaskRunner:
        if self._open is None or self._asked != (name, workers):
            self.close()
            if name in LIBRARIES:
                required(LIBRARIES[name])
            self._open, self._asked = made(name, workers).open(), (name, workers)
        return self._open

    def close(self) -> None:
        if self._open is not None:
            runner, self._open = self._open, None
            runner.shutdown()
            runner.close()
            assert not runner.is_open


@pytest.fixture(scope="session")
def nothing_left_behind() -> Iterator[None]:
    """After the last runner is closed no thread of ours holds the process, and no child is left."""
    yield
    gc.collect()
    try:
        wait_until(lambda: not stray_threads(), 5.0)
        wait_until(lambda: not stray_processes(), 10.0)
    except AssertionError as error:
        left = [(one.pid, one.status(), " ".join(one.cmdline())[:300]) for one in stray_processes()]
        kept = [repr(one) for one in base._kept_runners]
        pytest.fail(f"left behind: threads {stray_threads()}, kept {kept}, processes {left} ({error})")


def stray_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]


def stray_processes() -> list[psutil.Process]:
    helpers = (
        "multiprocessing.resource_tracker",
        "multiprocessing.forkserver",
    )  # the library's, until the end
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and not any(
                one in " ".join(child.cmdline()) for one in helpers
            ):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="session")
def bench(nothing_left_behind: None) -> Iterator[Bench]:
    found = Bench()
    yield found
    found.close()


@pytest.fixture(
    scope="session", params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in CLASSES]
)
def runner_name(request: pytest.FixtureRequest) -> str:
    """The parameter of the suite; of session scope, so that the tests of one runner stand together."""
    name: str = request.param
    return name


@pytest.fixture
def runner(runner_name: str, bench: Bench, clean_environment: Path) -> TaskRunner:
    """An open runner with two workers."""
    return bench.open(runner_name)


@pytest.fixture
def one_worker(runner_name: str, bench: Bench, clean_environment: Path) -> TaskRunner:
    """An open runner with one slot."""
    return bench.open(runner_name, 1)


@pytest.fixture
def apart(runner: TaskRunner) -> TaskRunner:
    """A runner whose tasks run in other processes."""
    if runner.info.in_process:
        pytest.skip("tasks of this runner share the driver's process")
    return runner


@pytest.fixture
def parallel(runner: TaskRunner) -> TaskRunner:
    """A runner that does several things at once."""
    if not runner.info.in_process:  # after a test that killed a worker its successor is on the way
        wait_until(lambda: runner.info.threads >= 2, 20.0)
    elif runner.info.threads < 2:
        pytest.skip("this runner does one thing after the other")
    return runner


@pytest.fixture
def in_flow(runner: TaskRunner) -> InFlow:
    """Run a function as a flow on the runner."""

    def run(body: Callable[..., Any], *args: Any, return_state: bool = False) -> Any:
        return flow(task_runner=runner)(body)(*args, return_state=return_state)

    return run
