"""`chain_large`: a large array through three tasks, whose bytes must never visit the driver."""

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

NAME = "chain_large"
DONE = (
    "make -> add one -> sum, three tasks on one array of float64. penstock: until the database shows all "
    "three COMPLETED. bare: until the sum is in the driver. rss_growth is that of the driver process. "
    "The first array of this size on a new cluster is timed apart from later ones."
)
TASKS = 3
WARM = 8  # megabytes

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


def sample_of(side: Side, cluster: Cluster, megabytes: float) -> Sample:
    """Take one sample."""
    items = items_of(megabytes)
    sample, value = measure(lambda clock: side.chain_large(items, clock), host=True)
    check(value == 2.0 * items, side, "sum")
    return finish(sample, side, TASKS, cluster.settle)


def warm(side: Side, cluster: Cluster, megabytes: float) -> None:
    """Run the case with a small array."""
    sample_of(side, cluster, min(megabytes, WARM))


def compare(
    cluster: Cluster, sides: tuple[Side, Side], sampling: Sampling, *, megabytes: float
) -> Comparison:
    """Compare two sides on a cluster that has seen arrays of this size."""
    comparison = Comparison(
        cluster.configuration, sides[0].name, sides[1].name, tasks=TASKS, what="later runs"
    )
    return interleave(
        comparison,
        sides,
        sampling,
        lambda side: warm(side, cluster, megabytes),
        lambda side: sample_of(side, cluster, megabytes),
    )
