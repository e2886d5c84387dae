"""`chain_large`: a large array through three tasks, whose bytes must never visit the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.clusters import Cluster
from benchmarks.harness import Comparison, Sample, Side, interleave, measure

NAME = "chain_large"
DONE = (
    "make -> add one -> sum, three tasks on one array of float64. penstock: until the flow has returned. "
    "bare: until the sum is in the driver. rss_growth is that of the driver process."
)
TASKS = 3
RECORD_TIMEOUT = 60.0

Array = np.ndarray[Any, np.dtype[np.float64]]


def make(items: int) -> Array:
    """Make an array of ones."""
    return np.ones(items)


def add_one(array: Array) -> Array:
    """Add one to every item, in a new array."""
    return array + 1.0


def total(array: Array) -> float:
    """Sum an array."""
    return float(array.sum())


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
        items = size * 10**6 // 8
        sample, value = measure(lambda clock: side.chain_large(items, clock))
        if value != 2.0 * items:
            message = f"{side.name} returned a wrong sum"
            raise RuntimeError(message)
        sample.completed = side.completed(TASKS, RECORD_TIMEOUT)
        sample.left_behind = cluster.settle()
        return sample

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=TASKS)
    return interleave(comparison, sides, repeats, lambda side: take(side, min(megabytes, 8)), take, tell)
