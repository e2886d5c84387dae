"""Ray used directly: remote functions, `ray.put`, `ray.get`."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from benchmarks.clusters import Cluster
from benchmarks.harness import Clock
from benchmarks.workloads.chain_large import add_one, make, total
from benchmarks.workloads.map_large import part_sum
from benchmarks.workloads.map_noop import noop


class BareRay:
    """The cases as somebody would write them who needs no record of runs."""

    name = "bare ray"

    def __init__(self, cluster: Cluster) -> None:
        self._noop, self._make, self._add_one, self._total, self._part_sum = (
            ray.remote(function) for function in (noop, make, add_one, total, part_sum)
        )

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Call and get."""
        values: list[int] = ray.get([self._noop.remote(value) for value in range(count)])
        clock.mark("values")
        return values

    def chain_large(self, items: int, clock: Clock) -> float:
        """Call three times and get the sum."""
        array = self._add_one.remote(self._make.remote(items))
        value: float = ray.get(self._total.remote(array))
        clock.mark("values")
        return value

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Put, call, get."""
        placed = ray.put(array)
        values: list[float] = ray.get([self._part_sum.remote(part, placed, count) for part in range(count)])
        clock.mark("values")
        return values

    def completed(self, expected: int, timeout: float) -> None:
        """Nothing is recorded."""
