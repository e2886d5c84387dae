"""Ray used directly: remote functions made once, `ray.put`, `ray.get`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray

from benchmarks.clusters import Cluster
from benchmarks.harness import Clock
from benchmarks.workloads.chain_large import add_one, make, total
from benchmarks.workloads.fan_out_large import make_here, read
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import noop
from benchmarks.workloads.pipeline import step
from benchmarks.workloads.radps import add, sleep_and_make
from benchmarks.workloads.results_dropped import make_filled, mean

WINDOW = 8  # arrays in the store at a time: Ray starts all makers before the first reader


class BareRay:
    """The cases as somebody would write them who needs no record of runs."""

    name = "bare ray"

    def __init__(self, cluster: Cluster) -> None:
        self._noop, self._step, self._part_sum = map(ray.remote, (noop, step, part_sum))
        self._make, self._add_one, self._total = map(ray.remote, (make, add_one, total))
        self._make_here, self._read = map(ray.remote, (make_here, read))
        self._make_filled, self._mean = map(ray.remote, (make_filled, mean))
        self._sleep_and_make, self._add = map(ray.remote, (sleep_and_make, add))

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Call and get."""
        values: list[int] = ray.get([self._noop.remote(value) for value in range(count)])
        clock.mark("values")
        return values

    def pipeline(self, count: int, stages: int, clock: Clock) -> list[int]:
        """Call with the references of the calls before, and get the last."""
        references = [self._step.remote(value) for value in range(count)]
        for _ in range(stages - 1):
            references = [self._step.remote(one) for one in references]
        values: list[int] = ray.get(references)
        clock.mark("values")
        return values

    def latency(self, count: int, clock: Clock) -> tuple[list[int], list[float]]:
        """Call and get, one by one."""
        values, seconds = [], []
        for value in range(count):
            started = time.perf_counter()
            values.append(ray.get(self._noop.remote(value)))
            seconds.append(time.perf_counter() - started)
        clock.mark("values")
        return values, seconds

    def chain_large(self, items: int, clock: Clock) -> float:
        """Call three times and get the sum."""
        array = self._add_one.remote(self._make.remote(items))
        value: float = ray.get(self._total.remote(array))
        clock.mark("values")
        return value

    def fan_out_large(self, items: int, readers: int, clock: Clock) -> list[tuple[int, int, float]]:
        """Call the maker and the readers, and get the sums while the array is held."""
        array = self._make_here.remote(items)
        values: list[tuple[int, int, float]] = ray.get([self._read.remote(array, n) for n in range(readers)])
        clock.mark("values")
        del array
        return values

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Put, call, get."""
        placed = ray.put(array)
        values: list[float] = ray.get([self._part_sum.remote(part, placed, count) for part in range(count)])
        clock.mark("values")
        return values

    def results_dropped(self, count: int, items: int, clock: Clock) -> list[float]:
        """Call makers and readers, as many at a time as the store is to hold."""
        sums: list[Any] = []
        for index in range(count):
            if index >= WINDOW:
                ray.wait([sums[index - WINDOW]])
            sums.append(self._mean.remote(self._make_filled.remote(index, items)))
        values: list[float] = ray.get(sums)
        clock.mark("values")
        return values

    def tree_sum(self, sleeps: list[float], items: int, clock: Clock) -> np.ndarray[Any, Any]:
        """Call for both halves, then add them: the order of calls is depth first."""
        value: np.ndarray[Any, Any] = ray.get(self._half(sleeps, items))
        clock.mark("values")
        return value

    def _half(self, sleeps: list[float], items: int) -> Any:
        if len(sleeps) == 1:
            return self._sleep_and_make.remote(sleeps[0], items)
        middle = len(sleeps) // 2
        return self._add.remote(self._half(sleeps[:middle], items), self._half(sleeps[middle:], items))

    def completed(self, expected: int, timeout: float) -> None:
        """Nothing is recorded."""
