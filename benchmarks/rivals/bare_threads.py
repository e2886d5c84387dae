"""A thread pool used directly: no engine can come near it on no-ops, it is here to check the harness."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.clusters import Cluster
from benchmarks.harness import Clock
from benchmarks.workloads.chain_large import add_one, make, total
from benchmarks.workloads.fan_out_large import make_here, read
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import noop
from benchmarks.workloads.pipeline import step
from benchmarks.workloads.radps import add, sleep_and_make
from benchmarks.workloads.results_dropped import make_filled, mean


class BareThreads:
    """The cases on `concurrent.futures`."""

    name = "bare threads"

    def __init__(self, cluster: Cluster) -> None:
        self._workers = cluster.threads

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map."""
        with ThreadPoolExecutor(self._workers) as pool:
            values = list(pool.map(noop, range(count)))
            clock.mark("values")
        return values

    def pipeline(self, count: int, stages: int, clock: Clock) -> list[int]:
        """Map again and again."""
        values = list(range(count))
        with ThreadPoolExecutor(self._workers) as pool:
            for _ in range(stages):
                values = list(pool.map(step, values))
            clock.mark("values")
        return values

    def latency(self, count: int, clock: Clock) -> tuple[list[int], list[float]]:
        """Submit and fetch, one by one."""
        values, seconds = [], []
        with ThreadPoolExecutor(self._workers) as pool:
            for value in range(count):
                started = time.perf_counter()
                values.append(pool.submit(noop, value).result())
                seconds.append(time.perf_counter() - started)
            clock.mark("values")
        return values, seconds

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times."""
        with ThreadPoolExecutor(self._workers) as pool:
            array = pool.submit(make, items).result()
            array = pool.submit(add_one, array).result()
            value = pool.submit(total, array).result()
            clock.mark("values")
        return value

    def fan_out_large(self, items: int, readers: int, clock: Clock) -> list[tuple[int, int, float]]:
        """Submit the readers when the array is there."""
        with ThreadPoolExecutor(self._workers) as pool:
            array = pool.submit(make_here, items).result()
            futures = [pool.submit(read, array, n) for n in range(readers)]
            values = [future.result() for future in futures]
            clock.mark("values")
        return values

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Submit each part."""
        with ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(part_sum, part, array, count) for part in range(count)]
            values = [future.result() for future in futures]
            clock.mark("values")
        return values

    def results_dropped(self, count: int, items: int, clock: Clock) -> list[float]:
        """Make and read in one call."""
        with ThreadPoolExecutor(self._workers) as pool:
            values = list(pool.map(lambda index: mean(make_filled(index, items)), range(count)))
            clock.mark("values")
        return values

    def tree_sum(self, sleeps: list[float], items: int, clock: Clock) -> np.ndarray[Any, Any]:
        """Map, then add level by level."""
        with ThreadPoolExecutor(self._workers) as pool:
            level = list(pool.map(sleep_and_make, sleeps, [items] * len(sleeps)))
            while len(level) > 1:
                pairs = list(pool.map(add, level[0:-1:2], level[1::2]))
                level = pairs + level[2 * len(pairs) :]
            clock.mark("values")
        return level[0]

    def completed(self, expected: int, timeout: float) -> None:
        """Nothing is recorded."""
