"""A driver that maps, holds the futures, and tells how its memory has grown.

Called as ``python -m benchmarks.holder ORDER ANSWER``, two JSON files; see `workloads.map_memory`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.clusters import WORKERS, opened
from benchmarks.harness import RECORD_TIMEOUT, Clock, Driver, Sample, trim
from benchmarks.workloads.map_noop import noop

WARM = 100  # tasks
SETTLE = 0.5  # seconds for threads to drop what they had in hand

Hold = Callable[[int, Clock], Any]


def measured(hold: Hold, count: int) -> Sample:
    """Map `count` no-ops and return the sample; `hold` maps, waits and returns what holds the futures."""
    hold(WARM, Clock())
    before = _private()
    with Driver() as driver:
        clock = Clock()
        futures = hold(count, clock)
        seconds = clock.seconds
        time.sleep(SETTLE)
    held = _private() - before
    sample = Sample(
        seconds=seconds,
        marks=clock.marks,
        cpu_seconds=driver.cpu_seconds,
        rss_growth=driver.rss_growth,
        private_growth=driver.private_growth,
        completed=count,
    )
    sample.figures = {
        "bytes_per_task": held / count,
        "peak_bytes_per_task": driver.private_growth / count,
        "tasks_per_second": count / seconds,
    }
    del futures
    return sample


def _private() -> int:
    for _ in range(3):
        gc.collect()
    trim()
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


@contextlib.contextmanager
def _bare_dask(address: str) -> Iterator[Hold]:
    from distributed import Client, wait

    with Client(address) as client:

        def hold(count: int, clock: Clock) -> Any:
            futures = client.map(noop, range(count), pure=False)
            wait(futures)
            clock.mark("ended")
            return futures

        yield hold


@contextlib.contextmanager
def _bare_ray() -> Iterator[Hold]:
    import ray

    with opened("ray"):
        remote = ray.remote(noop)

        def hold(count: int, clock: Clock) -> Any:
            references = [remote.remote(value) for value in range(count)]
            ray.wait(references, num_returns=count, fetch_local=False)
            clock.mark("ended")
            return references

        yield hold


@contextlib.contextmanager
def _bare_threads() -> Iterator[Hold]:
    from concurrent.futures import ThreadPoolExecutor, wait

    with ThreadPoolExecutor(WORKERS) as pool:

        def hold(count: int, clock: Clock) -> Any:
            futures = [pool.submit(noop, value) for value in range(count)]
            wait(futures)
            clock.mark("ended")
            return futures

        yield hold


def _bare(order: dict[str, Any]) -> Sample:
    sides = {"dask": lambda: _bare_dask(order["address"]), "ray": _bare_ray, "threads": _bare_threads}
    with sides[order["backend"]]() as hold:
        return measured(hold, order["count"])


def _penstock(order: dict[str, Any]) -> Sample:
    import penstock
    from benchmarks.ours import empty_home

    kept: list[Sample] = []
    with empty_home() as home, contextlib.ExitStack() as stack:
        if order["backend"] == "dask":
            runner: Any = penstock.DaskTaskRunner(address=order["address"])
        elif order["backend"] == "ray":
            stack.enter_context(opened("ray"))
            runner = penstock.RayTaskRunner()
        else:
            runner = penstock.ThreadPoolTaskRunner(max_workers=WORKERS)
        made = penstock.task(noop)
        total = [0]

        def hold(count: int, clock: Clock) -> Any:
            futures = made.map(range(count))
            futures.wait()
            clock.mark("ended")
            total[0] += count
            _wait_for_record(home / "penstock.db", total[0])
            clock.mark("recorded")
            return futures

        def holder() -> None:
            kept.append(measured(hold, order["count"]))

        penstock.flow(holder).with_options(task_runner=runner)()
        runner.shutdown()
    return kept[0]


def _wait_for_record(database: Path, expected: int) -> None:
    """Wait until the database shows so many task runs as completed."""
    deadline = time.monotonic() + RECORD_TIMEOUT
    query = "SELECT count(*) FROM task_runs WHERE state_type = 'COMPLETED'"
    while time.monotonic() < deadline:
        with contextlib.suppress(sqlite3.OperationalError):
            url = f"{database.as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(url, uri=True, timeout=5.0)) as connection:
                if connection.execute(query).fetchone()[0] >= expected:
                    return
        time.sleep(0.02)
    message = f"the record does not show {expected} completed task runs"
    raise TimeoutError(message)


def main(order: Path, answer: Path) -> None:
    """Carry out an order."""
    wanted = json.loads(order.read_text())
    sample = _penstock(wanted) if wanted["side"] == "penstock" else _bare(wanted)
    answer.write_text(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
