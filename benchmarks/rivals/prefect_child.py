"""Runs in Prefect's environment: the cases as flows of Prefect, beside the bare back end.

Called as ``python -m benchmarks.rivals.prefect_child ORDER ANSWER``, two JSON files; see `prefect`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.clusters import Cluster, opened
from benchmarks.harness import Clock, Comparison, Sampling
from benchmarks.plan import CASES
from benchmarks.rivals import prefect as rival
from benchmarks.rivals.bare import bare_side
from benchmarks.workloads import (
    chain_large,
    fan_out_large,
    map_large,
    map_noop,
    pipeline,
    radps,
    results_dropped,
)

POLL = 0.05  # seconds
RECORD_TIMEOUT = 120.0
T = TypeVar("T")
STORE = 1 << 30  # bytes of Ray's object store, at least


class Prefect:
    """The cases as flows, with the caching of results switched off: it would hash every array."""

    name = "prefect"

    def __init__(self, cluster: Cluster) -> None:
        self._noop, self._step = _task(map_noop.noop), _task(pipeline.step)
        self._part_sum = _task(map_large.part_sum)
        self._make, self._add_one = _task(chain_large.make), _task(chain_large.add_one)
        self._total = _task(chain_large.total)
        self._make_here, self._read = _task(fan_out_large.make_here), _task(fan_out_large.read)
        self._make_filled, self._mean = _task(results_dropped.make_filled), _task(results_dropped.mean)
        self._sleep_and_make, self._add = _task(radps.sleep_and_make), _task(radps.add)
        self._addresses = cluster.addresses
        self._runner = _runner(cluster)
        self._flow_run = ""

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map and fetch the values."""

        def body() -> list[int]:
            values: list[int] = self._noop.map(range(count)).result()
            return values

        return self._run(body, "map_noop", count, clock)

    def pipeline(self, count: int, stages: int, clock: Clock) -> list[int]:
        """Map over the futures of the map before, and fetch the last values."""

        def body() -> list[int]:
            futures = self._step.map(range(count))
            for _ in range(stages - 1):
                futures = self._step.map(futures)
            values: list[int] = futures.result()
            return values

        return self._run(body, "pipeline", count * stages, clock)

    def latency(self, count: int, clock: Clock) -> tuple[list[int], list[float]]:
        """Submit and fetch, one by one."""
        seconds: list[float] = []

        def body() -> list[int]:
            values = []
            for value in range(count):
                started = time.perf_counter()
                values.append(self._noop.submit(value).result())
                seconds.append(time.perf_counter() - started)
            return values

        return self._run(body, "latency", count, clock), seconds

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times and fetch the sum."""

        def body() -> float:
            array = self._add_one.submit(self._make.submit(items))
            value: float = self._total.submit(array).result()
            return value

        return self._run(body, "chain_large", chain_large.TASKS, clock)

    def fan_out_large(self, items: int, readers: int, clock: Clock) -> list[tuple[int, int, float]]:
        """Submit the maker to one worker and the readers to the others, where the runner knows workers."""

        def body() -> list[tuple[int, int, float]]:
            maker, *others = self._addresses or [None] * (readers + 1)
            with _on(maker):
                array = self._make_here.submit(items)
            array.wait()  # Prefect's Dask runner places a task by what surrounds its submit
            sums = []
            for reader in range(readers):
                with _on(others[reader]):
                    sums.append(self._read.submit(array, reader))
            values = [one.result() for one in sums]
            clock.mark("values")
            del array
            return values

        return self._run(body, "fan_out_large", readers + 1, clock, marked=True)

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Map with the array as an unmapped argument."""
        from prefect import unmapped  # type: ignore[import-not-found]

        def body() -> list[float]:
            given = unmapped(rival.GIVEN["array"])
            futures = self._part_sum.map(range(count), array=given, parts=unmapped(count))
            values: list[float] = futures.result()
            clock.mark("values")
            return values

        rival.GIVEN["array"] = array
        try:
            return self._run(body, "map_large", count, clock, marked=True)
        finally:
            rival.GIVEN.clear()

    def results_dropped(self, count: int, items: int, clock: Clock) -> list[float]:
        """Submit makers and readers; keep no future of an array."""

        def body() -> list[float]:
            sums = [self._mean.submit(self._make_filled.submit(index, items)) for index in range(count)]
            return [one.result() for one in sums]

        return self._run(body, "results_dropped", 2 * count, clock)

    def tree_sum(self, sleeps: list[float], items: int, clock: Clock) -> np.ndarray[Any, Any]:
        """Map, then submit the tree level by level."""
        from prefect import unmapped

        def body() -> np.ndarray[Any, Any]:
            level = list(self._sleep_and_make.map(sleeps, items=unmapped(items)))
            while len(level) > 1:
                pairs = [self._add.submit(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
                level = pairs + level[2 * len(pairs) :]
            value: np.ndarray[Any, Any] = level[0].result()
            return value

        return self._run(body, "tree_sum", 2 * len(sleeps) - 1, clock)

    def completed(self, expected: int, timeout: float) -> int:
        """Ask the server until it shows enough."""
        query = {
            "flow_runs": {"id": {"any_": [self._flow_run]}},
            "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        }
        deadline = time.monotonic() + timeout
        while True:
            found = int(rival.post(f"{os.environ['PREFECT_API_URL']}/task_runs/count", query))
            if found >= expected or time.monotonic() > deadline:
                return found
            time.sleep(POLL)

    def _run(self, body: Callable[[], T], name: str, tasks: int, clock: Clock, *, marked: bool = False) -> T:
        """Run a flow and wait until the server shows every task run as completed."""
        from prefect import flow, runtime

        ids: list[str] = []
        values: list[T] = []

        def with_id() -> None:
            ids.append(str(runtime.flow_run.id))
            values.append(body())
            if not marked:
                clock.mark("values")

        flow(with_id, name=name, task_runner=self._runner)()
        clock.mark("returned")
        self._flow_run = ids[0]
        self.completed(tasks, RECORD_TIMEOUT)
        clock.mark("recorded")
        return values[0]


def _task(function: Callable[..., Any]) -> Any:
    from prefect import task
    from prefect.cache_policies import NO_CACHE  # type: ignore[import-not-found]

    return task(function, cache_policy=NO_CACHE)


def _on(address: str | None) -> Any:
    """Return a context in which tasks go to one worker of Dask."""
    if address is None:
        return contextlib.nullcontext()
    import dask

    return dask.annotate(workers=[address])


def _runner(cluster: Cluster) -> Any:
    if cluster.backend == "dask":
        from prefect_dask import DaskTaskRunner  # type: ignore[import-not-found]

        return DaskTaskRunner(address=cluster.handle.scheduler_address)
    if cluster.backend == "ray":
        from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]

        return RayTaskRunner()  # attaches to the Ray of this process
    from prefect.task_runners import ThreadPoolTaskRunner  # type: ignore[import-not-found]

    return ThreadPoolTaskRunner(max_workers=cluster.threads)


def main(order: Path, answer: Path) -> None:
    """Carry out an order; the answer is complete after each sample."""
    wanted = json.loads(order.read_text())

    def tell(comparison: Comparison) -> None:
        draft = answer.with_suffix(".draft")
        draft.write_text(json.dumps(comparison.as_json()))
        draft.replace(answer)

    workers, threads = wanted["shape"]
    store = max(STORE, int(8 * wanted["sizes"].get("megabytes", 0) * 10**6))
    with opened(wanted["backend"], object_store=store, workers=workers, threads=threads) as cluster:
        sides = (bare_side(cluster), Prefect(cluster))
        rival.ready_file(answer).touch()
        sampling = Sampling(wanted["repeats"], untouched=False, tell=tell)
        CASES[wanted["case"]].compare(cluster, sides, sampling, **wanted["sizes"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
