"""`map_large`: one large array of the driver that every task of a map is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.clusters import Cluster
from benchmarks.harness import Comparison, Sample, Side, interleave, measure

NAME = "map_large"
DONE = (
    "an array of float64 that lies in the driver, as the unmapped argument of a map whose tasks each sum "
    "their part of it. penstock: until the flow has returned. bare: the array is placed once by scatter or "
    "ray.put, inside the timed interval, until all sums are in the driver."
)
COUNT = 32
RECORD_TIMEOUT = 60.0

Array = np.ndarray[Any, np.dtype[np.float64]]


def part_sum(part: int, array: Array, parts: int) -> float:
    """Sum one part of an array."""
    width = len(array) // parts
    return float(array[part * width : (part + 1) * width].sum())


def _sample(side: Side, array: Array) -> Sample:
    sample, values = measure(lambda clock: side.map_large(array, COUNT, clock))
    if values != [float(len(array) // COUNT)] * COUNT:
        message = f"{side.name} returned wrong sums"
        raise RuntimeError(message)
    return sample


def compare(
    cluster: Cluster,
    sides: tuple[Side, Side],
    *,
    megabytes: int,
    repeats: int,
    tell: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Compare two sides on a cluster.

    Parameters
    ----------
    cluster : Cluster
        Open.
    sides : tuple of Side
        Bare, engine.
    megabytes : int
        Size of the array.
    repeats : int
        Pairs of samples.
    tell : callable, optional
        Called after each sample.
    """

    def take(side: Side, size: int = megabytes) -> Sample:
        # a new array each time: one that an engine has seen before might not have to travel
        sample = _sample(side, np.ones(size * 10**6 // 8))
        sample.completed = side.completed(COUNT, RECORD_TIMEOUT)
        sample.left_behind = cluster.settle()
        return sample

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=COUNT)
    return interleave(comparison, sides, repeats, lambda side: take(side, min(megabytes, 8)), take, tell)
