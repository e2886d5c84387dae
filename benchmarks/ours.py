"""penstock as a user writes it, on the cluster that the bare side uses."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from benchmarks.clusters import Cluster
from benchmarks.harness import RECORD_TIMEOUT, Clock
from benchmarks.workloads.chain_large import TASKS, add_one, make, total
from benchmarks.workloads.fan_out_large import make_here, read
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import noop
from benchmarks.workloads.pipeline import step
from benchmarks.workloads.radps import add_all, sleep_and_make
from benchmarks.workloads.results_dropped import make_filled, mean
from penstock import PenstockFuture, PenstockFutureList, Task, TaskRunner, flow, task, unmapped
from penstock.engine.home import usable_home
from penstock.engine.tracking import stop_tracking
from penstock.settings import refresh, settings

POLL = 0.002  # seconds
COUNT = (
    "SELECT coalesce(sum(state_type = 'COMPLETED'), 0), coalesce(sum(state_type != 'COMPLETED'), 0) "
    "FROM task_runs WHERE flow_run = ?"
)
ChunkSize = int | Literal["auto"]
T = TypeVar("T")


@contextlib.contextmanager
def empty_home() -> Iterator[Path]:
    """Record into a fresh directory, with the default settings, whatever the user's own are."""
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-", ignore_cleanup_errors=True) as home:
        os.environ["PENSTOCK_HOME"] = home
        refresh()
        try:
            yield Path(home)
        finally:
            stop_tracking()


class Penstock:
    """The cases as flows; every task run is recorded, and a sample ends when the database shows it.

    Parameters
    ----------
    cluster : Cluster
        Open.
    chunk_size : int or "auto"
        Of the maps of `map_noop`; all else is as it comes.
    """

    name = "penstock"

    def __init__(self, cluster: Cluster, chunk_size: ChunkSize = "auto") -> None:
        self._cluster = cluster
        self._runner = _runner(cluster)
        self._database = Record(usable_home(settings().home).path / "penstock.db")
        self._flow_run = ""
        self._noop = task(noop).with_options(chunk_size=chunk_size)
        self._step, self._part_sum = task(step), task(part_sum)
        self._make, self._add_one, self._total = task(make), task(add_one), task(total)
        self._make_here, self._read = task(make_here), task(read)
        self._make_filled, self._mean = task(make_filled), task(mean)
        self._sleep_and_make, self._add_all = task(sleep_and_make), task(add_all)

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map and fetch the values."""

        def map_noop() -> list[int]:
            return self._noop.map(range(count)).result()

        return self._run(map_noop, count, clock)

    def pipeline(self, count: int, stages: int, clock: Clock) -> list[int]:
        """Map over the futures of the map before, and fetch the last values."""

        def pipeline() -> list[int]:
            futures = self._step.map(range(count))
            for _ in range(stages - 1):
                futures = self._step.map(futures)
            return futures.result()

        return self._run(pipeline, count * stages, clock)

    def latency(self, count: int, clock: Clock) -> tuple[list[int], list[float]]:
        """Submit and fetch, one by one."""
        seconds: list[float] = []

        def latency() -> list[int]:
            values = []
            for value in range(count):
                started = time.perf_counter()
                values.append(self._noop.submit(value).result())
                seconds.append(time.perf_counter() - started)
            return values

        return self._run(latency, count, clock), seconds

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times and fetch the sum."""

        def chain_large() -> float:
            array = self._add_one.submit(self._make.submit(items))
            return self._total.submit(array).result()

        return self._run(chain_large, TASKS, clock)

    def fan_out_large(self, items: int, readers: int, clock: Clock) -> list[tuple[int, int, float]]:
        """Submit the maker to one worker and the readers to the others; fetch the sums while the array is held."""

        def fan_out_large() -> list[tuple[int, int, float]]:
            maker, *others = self._cluster.addresses or [None] * (readers + 1)
            array = _at(self._make_here, maker).submit(items)
            sums = [_at(self._read, others[n]).submit(array, n) for n in range(readers)]
            values = PenstockFutureList(sums).result()
            clock.mark("values")
            del array
            return values

        return self._run(fan_out_large, readers + 1, clock, marked=True)

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Map with the array as an unmapped argument."""

        def map_large() -> list[float]:
            futures = self._part_sum.map(range(count), array=unmapped(array), parts=unmapped(count))
            values = futures.result()
            clock.mark("values")
            return values

        return self._run(map_large, count, clock, marked=True)

    def results_dropped(self, count: int, items: int, clock: Clock) -> list[float]:
        """Submit makers and readers; keep no future of an array."""

        def results_dropped() -> list[float]:
            sums = [self._mean.submit(self._make_filled.submit(index, items)) for index in range(count)]
            return PenstockFutureList(sums).result()

        return self._run(results_dropped, 2 * count, clock)

    def tree_sum(self, sleeps: list[float], items: int, clock: Clock) -> np.ndarray[Any, Any]:
        """Map, reduce on the cluster, fetch the sum."""

        def tree_sum() -> np.ndarray[Any, Any]:
            arrays = self._sleep_and_make.map(sleeps, items=unmapped(items))
            whole: PenstockFuture[np.ndarray[Any, Any]] = arrays.reduce(
                self._add_all, fanin=2, order="completion"
            )
            del arrays
            return whole.result()

        return self._run(tree_sum, len(sleeps), clock)

    def completed(self, expected: int, timeout: float) -> int:
        """Ask the database."""
        return self._database.wait(self._flow_run, expected, timeout)

    def close(self) -> None:
        """Give up a cluster that the runner kept."""
        self._runner.shutdown()

    def _run(self, body: Callable[[], T], tasks: int, clock: Clock, *, marked: bool = False) -> T:
        """Run a flow and wait until the database shows its tasks; nothing but the values leaves it."""
        values: list[T] = []

        def keep() -> None:
            values.append(body())
            if not marked:
                clock.mark("values")

        made = flow(name=body.__name__, task_runner=self._runner)(keep)
        state = made(return_state=True)
        clock.mark("returned")
        state.result()
        self._flow_run = state.state_details["flow_run_id"]
        self._database.wait(self._flow_run, tasks, RECORD_TIMEOUT)
        clock.mark("recorded")
        return values[0]


def _at(what: Task[..., Any], address: str | None) -> Task[..., Any]:
    return what if address is None else what.with_options(workers=address)


class Record:
    """The database of a home, read without penstock.

    Parameters
    ----------
    path : Path
        Need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._url = f"{path.as_uri()}?mode=ro"

    def wait(self, flow_run: str, expected: int, timeout: float) -> int:
        """Look until the database shows enough completed task runs, and no other; return how many."""
        deadline = time.monotonic() + timeout
        while True:
            completed, others = self._counts(flow_run)
            if (completed >= expected and not others) or time.monotonic() > deadline:
                return completed
            time.sleep(POLL)

    def _counts(self, flow_run: str) -> tuple[int, int]:
        try:
            with contextlib.closing(sqlite3.connect(self._url, uri=True, timeout=5.0)) as connection:
                completed, others = connection.execute(COUNT, (flow_run,)).fetchone()
                return int(completed), int(others)
        except sqlite3.OperationalError:
            return 0, 0  # the database is not there yet


def _runner(cluster: Cluster) -> TaskRunner:
    """Return the runner for a cluster; only its own library is loaded."""
    import penstock

    if cluster.backend == "threads":
        return penstock.ThreadPoolTaskRunner(max_workers=cluster.threads)
    if cluster.backend == "dask":
        return penstock.DaskTaskRunner(cluster=cluster.handle)
    return penstock.RayTaskRunner()  # attaches to the Ray of this process
