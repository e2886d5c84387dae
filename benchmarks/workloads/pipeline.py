"""`pipeline`: maps one after the other, where a compiler can put several steps into one message."""

from __future__ import annotations

from benchmarks.clusters import Cluster
from benchmarks.harness import Comparison, Sample, Sampling, Side, check, finish, interleave, measure

NAME = "pipeline"
DONE = (
    "a step that adds one, mapped over range(n), then over the results of that, and so on; the last values "
    "are fetched. penstock: until the database shows every task run of every stage COMPLETED. "
    "bare: chained maps or calls, until the last values are in the driver."
)
STAGES = 10


def step(value: int) -> int:
    """Add one."""
    return value + 1


def compare(
    cluster: Cluster, sides: tuple[Side, Side], sampling: Sampling, *, count: int, stages: int = STAGES
) -> Comparison:
    """Compare two sides on a cluster with `stages` maps over `count` elements per sample."""

    def take(side: Side, many: int = count) -> Sample:
        sample, values = measure(lambda clock: side.pipeline(many, stages, clock))
        check(values == list(range(stages, many + stages)), side, "values")
        sample.figures["tasks_per_second"] = many * stages / sample.seconds
        return finish(sample, side, many * stages, cluster.settle)

    comparison = Comparison(cluster.configuration, sides[0].name, sides[1].name, tasks=count * stages)
    return interleave(comparison, sides, sampling, lambda side: take(side, min(count, 10)), take)
