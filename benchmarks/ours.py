"""penstock as a user writes it, on the cluster that the bare side uses."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clusters import WORKERS, Cluster
from benchmarks.harness import Clock
from benchmarks.workloads.chain_large import add_one, make, total
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import RECORD_TIMEOUT, noop
from penstock import TaskRunner, flow, task, unmapped
from penstock.engine.home import usable_home
from penstock.engine.tracking import stop_tracking
from penstock.settings import refresh, settings

POLL = 0.005  # seconds
COUNT = "SELECT count(*) FROM task_runs WHERE flow_run = ? AND state_type = 'COMPLETED'"


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
    """The cases as flows; every task run is recorded."""

    name = "penstock"

    def __init__(self, cluster: Cluster) -> None:
        self._runner = _runner(cluster)
        self._database = Record(usable_home(settings().home).path / "penstock.db")
        self._flow_run = ""
        self._noop, self._part_sum = task(noop), task(part_sum)
        self._make, self._add_one, self._total = task(make), task(add_one), task(total)

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map, fetch the values, and wait until the database shows every task run as completed."""
        values: list[int] = []

        def map_noop() -> None:
            values.extend(self._noop.map(range(count)).result())
            clock.mark("values")

        self._run(map_noop, clock)
        self._database.wait(self._flow_run, count, RECORD_TIMEOUT)
        clock.mark("recorded")
        return values

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times and fetch the sum."""
        values: list[float] = []

        def chain_large() -> None:
            array = self._add_one.submit(self._make.submit(items))
            values.append(self._total.submit(array).result())
            clock.mark("values")

        self._run(chain_large, clock)
        return values[0]

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Map with the array as an unmapped argument."""
        values: list[float] = []

        def map_large() -> None:
            futures = self._part_sum.map(range(count), array=unmapped(array), parts=unmapped(count))
            values.extend(futures.result())
            clock.mark("values")

        self._run(map_large, clock)
        return values

    def completed(self, expected: int, timeout: float) -> int:
        """Ask the database."""
        return self._database.wait(self._flow_run, expected, timeout)

    def close(self) -> None:
        """Give up a cluster that the runner kept."""
        self._runner.shutdown()

    def _run(self, body: Callable[[], None], clock: Clock) -> None:
        state = flow(body).with_options(task_runner=self._runner)(return_state=True)
        clock.mark("returned")
        state.result()
        self._flow_run = state.state_details["flow_run_id"]


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
        """Look until the database shows enough completed task runs; return how many there are."""
        deadline = time.monotonic() + timeout
        while True:
            completed = self._completed(flow_run)
            if completed >= expected or time.monotonic() > deadline:
                return completed
            time.sleep(POLL)

    def _completed(self, flow_run: str) -> int:
        try:
            with contextlib.closing(sqlite3.connect(self._url, uri=True, timeout=5.0)) as connection:
                return int(connection.execute(COUNT, (flow_run,)).fetchone()[0])
        except sqlite3.OperationalError:
            return 0  # the database is not there yet


def _runner(cluster: Cluster) -> TaskRunner:
    """Return the runner for a cluster; only its own library is loaded."""
    import penstock

    if cluster.backend == "threads":
        return penstock.ThreadPoolTaskRunner(max_workers=WORKERS)
    if cluster.backend == "dask":
        return penstock.DaskTaskRunner(cluster=cluster.handle)
    return penstock.RayTaskRunner()  # attaches to the Ray of this process
