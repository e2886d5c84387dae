"""`map_noop`: many tasks that do nothing, so that only the engine is measured."""

from __future__ import annotations

from benchmarks.clusters import Cluster
from benchmarks.harness import Comparison, Sample, Sampling, Side, check, finish, interleave, measure

NAME = "map_noop"
DONE = (
    "penstock: one flow maps a no-op over range(n); done when the database shows n task runs COMPLETED, "
    "all values being in the driver before that. bare: map and gather of the values; it records nothing. "
    "Both connect to the cluster inside the timed interval."
)


def noop(value: int) -> int:
    """Return what comes in."""
    return value


def compare(cluster: Cluster, sides: tuple[Side, Side], sampling: Sampling, *, count: int) -> Comparison:
    """Compare two sides on a cluster with `count` tasks per sample."""

    def take(side: Side, many: int = count) -> Sample:
        sample, values = measure(lambda clock: side.map_noop(many, clock))
        check(values == list(range(many)), side, "values")
        del values
        sample.figures["tasks_per_second"] = many / sample.seconds
        return finish(sample, side, many, cluster.settle)

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=count)
    return interleave(comparison, sides, sampling, lambda side: take(side, min(count, 100)), take)
