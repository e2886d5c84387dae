"""`radps`: the public benchmark of the RADPS project, a tree sum of arrays that come after a sleep.

Its definition, from the wiki page "Workflow Manager Technology Down Select for ALMA Demonstrator": n tasks from 1,000
to 128,000, each of which sleeps for a random time (mean 1.0, deviation 0.1 s; or 6.0 and 4.0 s) and returns an array
of 0.1 or 10 MB; a sum reduction in a binary tree; 16 cores. The figure is the overhead in per cent,
100 * (wall - S) / S, where S is the sum of the sleeps over the number of threads.
"""

from __future__ import annotations

import random
import time
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

NAME = "radps"
WORKERS, THREADS = 2, 8
DONE = (
    "n tasks sleep for a random time and return an array; all arrays are added in a binary tree on the "
    "cluster. Compared is the overhead: 100 * (wall - S) / S per cent with S = sum of sleeps / number of "
    "threads. penstock: until the database shows every task run COMPLETED. bare: one graph of dask.delayed in "
    "one compute, which dask orders depth first; on Ray calls in the order of the tree."
)
SEED = 20_260_901
SHORTEST = 0.001  # seconds

Array = np.ndarray[Any, np.dtype[np.float64]]


def sleep_and_make(seconds: float, items: int) -> Array:
    """Sleep, then return an array of ones."""
    time.sleep(seconds)
    return np.ones(items)


def add(left: Array, right: Array) -> Array:
    """Add two arrays."""
    return left + right


def add_all(arrays: list[Array]) -> Array:
    """Add two arrays, or return the one that has no partner."""
    left, *others = arrays
    return add(left, others[0]) if others else left


def sleeps_of(count: int, mean: float, deviation: float) -> list[float]:
    """Return random times, the same in every run."""
    numbers = random.Random(SEED)
    return [max(SHORTEST, numbers.gauss(mean, deviation)) for _ in range(count)]


def compare(
    cluster: Cluster,
    sides: tuple[Side, Side],
    sampling: Sampling,
    *,
    count: int,
    megabytes: float,
    mean: float = 0.1,
    deviation: float = 0.01,
) -> Comparison:
    """Compare two sides on a cluster.

    Parameters
    ----------
    cluster : Cluster
        Open.
    sides : tuple of Side
        Bare, engine.
    sampling : Sampling
        How many samples.
    count : int
        Tasks that sleep.
    megabytes : float
        Size of each array.
    mean, deviation : float
        Seconds of sleep.
    """
    items = items_of(megabytes)

    def take(side: Side, many: int = count) -> Sample:
        sleeps = sleeps_of(many, mean, deviation)
        sample, value = measure(lambda clock: side.tree_sum(sleeps, items, clock), host=True)
        check(value.shape == (items,) and bool((value == many).all()), side, "sum")
        ideal = sum(sleeps) / cluster.threads
        sample.figures["ideal_seconds"] = ideal
        sample.figures["overhead_percent"] = 100 * (sample.seconds - ideal) / ideal
        return finish(sample, side, many, cluster.settle)

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=count)
    return interleave(comparison, sides, sampling, lambda side: take(side, min(count, 16)), take)
