"""Dask used directly: `Client.map`, `submit`, `scatter`, `gather`."""

from __future__ import annotations

from typing import Any

import numpy as np
from distributed import Client

from benchmarks.clusters import Cluster
from benchmarks.harness import Clock
from benchmarks.workloads.chain_large import add_one, make, total
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import noop


class BareDask:
    """The cases as somebody would write them who needs no record of runs."""

    name = "bare dask"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster.handle

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map and gather."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            values: list[int] = client.gather(client.map(noop, range(count), pure=False))
            clock.mark("values")
        return values

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times and fetch the sum."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            array = client.submit(make, items, pure=False)
            array = client.submit(add_one, array, pure=False)
            value: float = client.submit(total, array, pure=False).result()
            clock.mark("values")
        return value

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Scatter straight to a worker, map, gather."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            placed = client.scatter(array, hash=False, direct=True)
            futures = client.map(part_sum, range(count), array=placed, parts=count, pure=False)
            values: list[float] = client.gather(futures)
            clock.mark("values")
        return values

    def completed(self, expected: int, timeout: float) -> None:
        """Nothing is recorded."""
