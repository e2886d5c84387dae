"""A thread pool used directly: no engine can come near it on no-ops, it is here to check the harness."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.clusters import WORKERS, Cluster
from benchmarks.harness import Clock
from benchmarks.workloads.chain_large import add_one, make, total
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import noop


class BareThreads:
    """The cases on `concurrent.futures`."""

    name = "bare threads"

    def __init__(self, cluster: Cluster) -> None:
        self._workers = WORKERS

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map."""
        with ThreadPoolExecutor(self._workers) as pool:
            values = list(pool.map(noop, range(count)))
            clock.mark("values")
        return values

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times."""
        with ThreadPoolExecutor(self._workers) as pool:
            array = pool.submit(make, items).result()
            array = pool.submit(add_one, array).result()
            value = pool.submit(total, array).result()
            clock.mark("values")
        return value

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Submit each part."""
        with ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(part_sum, part, array, count) for part in range(count)]
            values = [future.result() for future in futures]
            clock.mark("values")
        return values

    def completed(self, expected: int, timeout: float) -> None:
        """Nothing is recorded."""
