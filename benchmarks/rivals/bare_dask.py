"""Dask used directly: `Client.map`, `submit`, `scatter`, `gather`, and `dask.delayed` for the tree."""

from __future__ import annotations

import time
from typing import Any

import dask
import numpy as np
from distributed import Client

from benchmarks.clusters import Cluster
from benchmarks.harness import Clock
from benchmarks.workloads.chain_large import add_one, make, total
from benchmarks.workloads.fan_out_large import make_here, read
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import noop
from benchmarks.workloads.pipeline import step
from benchmarks.workloads.radps import add, sleep_and_make
from benchmarks.workloads.results_dropped import make_filled, mean


class BareDask:
    """The cases as somebody would write them who needs no record of runs."""

    name = "bare dask"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster.handle
        self._addresses = cluster.addresses

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map and gather."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            values: list[int] = client.gather(client.map(noop, range(count), pure=False))
            clock.mark("values")
        return values

    def pipeline(self, count: int, stages: int, clock: Clock) -> list[int]:
        """Map over the futures of the map before, and gather the last."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            futures = client.map(step, range(count), pure=False)
            for _ in range(stages - 1):
                futures = client.map(step, futures, pure=False)
            values: list[int] = client.gather(futures)
            clock.mark("values")
        return values

    def latency(self, count: int, clock: Clock) -> tuple[list[int], list[float]]:
        """Submit and fetch, one by one."""
        values, seconds = [], []
        with Client(self._cluster) as client:
            clock.mark("connected")
            for value in range(count):
                started = time.perf_counter()
                values.append(client.submit(noop, value, pure=False).result())
                seconds.append(time.perf_counter() - started)
            clock.mark("values")
        return values, seconds

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times and fetch the sum."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            array = client.submit(make, items, pure=False)
            array = client.submit(add_one, array, pure=False)
            value: float = client.submit(total, array, pure=False).result()
            clock.mark("values")
        return value

    def fan_out_large(self, items: int, readers: int, clock: Clock) -> list[tuple[int, int, float]]:
        """Submit the maker to one worker and the readers to the others; gather while the array is held."""
        maker, *others = self._addresses
        with Client(self._cluster) as client:
            clock.mark("connected")
            array = client.submit(make_here, items, workers=maker, pure=False)
            sums = [client.submit(read, array, n, workers=others[n], pure=False) for n in range(readers)]
            values: list[tuple[int, int, float]] = client.gather(sums)
            clock.mark("values")
        return values

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Scatter to all workers, map, gather."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            placed = client.scatter(array, hash=False, direct=True, broadcast=True)
            futures = client.map(part_sum, range(count), array=placed, parts=count, pure=False)
            values: list[float] = client.gather(futures)
            clock.mark("values")
        return values

    def results_dropped(self, count: int, items: int, clock: Clock) -> list[float]:
        """Submit makers and readers; keep no future of an array."""
        with Client(self._cluster) as client:
            clock.mark("connected")
            sums = [
                client.submit(mean, client.submit(make_filled, index, items, pure=False), pure=False)
                for index in range(count)
            ]
            values: list[float] = client.gather(sums)
            clock.mark("values")
        return values

    def tree_sum(self, sleeps: list[float], items: int, clock: Clock) -> np.ndarray[Any, Any]:
        """One graph in one compute, so that dask orders it depth first."""
        leaf, node = dask.delayed(sleep_and_make, pure=False), dask.delayed(add, pure=False)
        with Client(self._cluster) as client:
            clock.mark("connected")
            level = [leaf(seconds, items) for seconds in sleeps]
            while len(level) > 1:
                pairs = [node(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
                level = pairs + level[2 * len(pairs) :]
            value: np.ndarray[Any, Any] = client.compute(level[0]).result()
            clock.mark("values")
        return value

    def completed(self, expected: int, timeout: float) -> None:
        """Nothing is recorded."""
