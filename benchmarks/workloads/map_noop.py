"""`map_noop`: many tasks that do nothing, so that only the engine is measured."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.clusters import Cluster
from benchmarks.harness import Comparison, Sample, Side, interleave, measure

NAME = "map_noop"
DONE = (
    "penstock: one flow maps a no-op over range(n); done when the database shows n task runs COMPLETED, "
    "all values being in the driver before that. bare: map and gather of the values; it records nothing. "
    "Both connect to the cluster inside the timed interval."
)
RECORD_TIMEOUT = 600.0


def noop(value: int) -> int:
    """Return what comes in."""
    return value


def compare(
    cluster: Cluster,
    sides: tuple[Side, Side],
    *,
    count: int,
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
    count : int
        Tasks per sample.
    repeats : int
        Pairs of samples.
    tell : callable, optional
        Called after each sample.
    """

    def take(side: Side, many: int = count) -> Sample:
        sample, values = measure(lambda clock: side.map_noop(many, clock))
        if values != list(range(many)):
            message = f"{side.name} returned wrong values"
            raise RuntimeError(message)
        del values
        sample.completed = side.completed(many, RECORD_TIMEOUT)
        sample.left_behind = cluster.settle()
        return sample

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=count)
    return interleave(comparison, sides, repeats, lambda side: take(side, min(count, 100)), take, tell)
