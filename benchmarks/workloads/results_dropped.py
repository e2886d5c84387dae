"""`results_dropped`: far more bytes of results than memory, each result read once and dropped."""

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

NAME = "results_dropped"
DONE = (
    "n times: a task makes an array, another one sums it, nobody keeps the array; all are submitted at once. "
    "Compared is the peak of the memory of the driver, of the workers and of shared memory over their start. "
    "penstock: until the database shows every task run COMPLETED. bare Ray would fill its store and then the "
    "disk, so it is given at most eight arrays at a time."
)

Array = np.ndarray[Any, np.dtype[np.float64]]


def make_filled(index: int, items: int) -> Array:
    """Make an array of one number."""
    return np.full(items, float(index))


def mean(array: Array) -> float:
    """Return the mean of the first and the last item, after a sum over all of them."""
    array.sum()
    return float((array[0] + array[-1]) / 2)


def compare(
    cluster: Cluster, sides: tuple[Side, Side], sampling: Sampling, *, count: int, megabytes: float
) -> Comparison:
    """Compare two sides on a cluster."""

    def take(side: Side, many: int = count) -> Sample:
        items = items_of(megabytes)
        sample, values = measure(
            lambda clock: side.results_dropped(many, items, clock), host=True, spill=cluster.spill
        )
        check(values == [float(index) for index in range(many)], side, "values")
        return finish(sample, side, 2 * many, cluster.settle)

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=2 * count)
    return interleave(comparison, sides, sampling, lambda side: take(side, min(count, 4)), take)
