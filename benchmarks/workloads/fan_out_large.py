"""`fan_out_large`: a large array made in one process and read in others of the same host."""

from __future__ import annotations

import os
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

NAME = "fan_out_large"
READERS = 4
WORKERS = READERS + 1
DONE = (
    f"an array of float64 is made in one process and summed by {READERS} tasks in {READERS} other processes, "
    "on workers with one thread each; on Dask both sides name the worker of each task. penstock: until the "
    "database shows all tasks COMPLETED. bare: until all sums are in the driver. copies is the growth of the "
    "host's memory over the size of the array: the peak, and when the sums were there and the array still held."
)
WARM = 8  # megabytes

Array = np.ndarray[Any, np.dtype[np.float64]]


def make_here(items: int) -> Array:
    """Make an array of ones, but the first item, which is the id of the process."""
    array = np.ones(items)
    array[0] = os.getpid()
    return array


def read(array: Array, reader: int) -> tuple[int, int, float]:
    """Return the process that reads, the process that made the array, and the sum of the rest."""
    return os.getpid(), int(array[0]), float(array[1:].sum())


def compare(
    cluster: Cluster,
    sides: tuple[Side, Side],
    sampling: Sampling,
    *,
    megabytes: float,
    readers: int = READERS,
) -> Comparison:
    """Compare two sides on a cluster."""

    def take(side: Side, size: float = megabytes) -> Sample:
        items = items_of(size)
        sample, found = measure(lambda clock: side.fan_out_large(items, readers, clock), host=True)
        check(len(found) == readers and all(value == items - 1 for _, _, value in found), side, "sums")
        processes = {reader for reader, _, _ in found}
        if cluster.backend == "dask":  # Ray maps its object store into every process, whichever it takes
            apart = len(processes) == readers and found[0][1] not in processes
            check(apart, side, "process ids: a reader did not run in a process of its own")
        sample.figures["processes"] = len(processes)
        sample.figures["copies_peak"] = sample.figures["host_growth"] / (8 * items)
        sample.figures["copies_held"] = sample.figures["host_at_values"] / (8 * items)
        return finish(sample, side, readers + 1, cluster.settle)

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=readers + 1)
    return interleave(comparison, sides, sampling, lambda side: take(side, min(megabytes, WARM)), take)
