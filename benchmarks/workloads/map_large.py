"""`map_large`: one large array of the driver that every task of a map is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clusters import Cluster
from benchmarks.harness import (
    Comparison,
    Sample,
    Sampling,
    Side,
    check,
    finish,
    interleave,
    items_of,
    measure,
)

NAME = "map_large"
DONE = (
    "an array of float64 that lies in the driver, as the unmapped argument of a map whose tasks each sum "
    "their part of it. penstock: until the database shows every task run COMPLETED. bare: the array is placed "
    "once by scatter(broadcast=True) or ray.put, inside the timed interval, until all sums are in the driver. "
    "copies is the growth of the host's memory over the size of the array, beside the driver's own."
)
COUNT = 32
WARM = 8  # megabytes

Array = np.ndarray[Any, np.dtype[np.float64]]


def part_sum(part: int, array: Array, parts: int) -> float:
    """Sum one part of an array."""
    width = len(array) // parts
    return float(array[part * width : (part + 1) * width].sum())


def compare(
    cluster: Cluster, sides: tuple[Side, Side], sampling: Sampling, *, megabytes: float, count: int = COUNT
) -> Comparison:
    """Compare two sides on a cluster."""

    def take(side: Side, size: float = megabytes) -> Sample:
        # a new array each time: one that an engine has seen before might not have to travel
        array = np.ones(items_of(size))
        sample, values = measure(lambda clock: side.map_large(array, count, clock), host=True)
        check(values == [float(len(array) // count)] * count, side, "sums")
        sample.figures["copies_peak"] = sample.figures["host_growth"] / array.nbytes
        sample.figures["copies_held"] = sample.figures["host_at_values"] / array.nbytes
        return finish(sample, side, count, cluster.settle)

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=count)
    return interleave(comparison, sides, sampling, lambda side: take(side, min(megabytes, WARM)), take)
