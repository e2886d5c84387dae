"""`latency`: one small task at a time, as somebody would work by hand."""

from __future__ import annotations

import statistics

from benchmarks.clusters import Cluster
from benchmarks.harness import Comparison, Sample, Sampling, Side, check, finish, interleave, measure

NAME = "latency"
DONE = (
    "submit and result of a no-op, n times one after the other; compared is the median time of one. "
    "Connecting and, on penstock's side, the last commit are in the time of the sample, not in the median."
)


def compare(cluster: Cluster, sides: tuple[Side, Side], sampling: Sampling, *, count: int) -> Comparison:
    """Compare two sides on a cluster with `count` tasks per sample."""

    def take(side: Side, many: int = count) -> Sample:
        sample, (values, seconds) = measure(lambda clock: side.latency(many, clock))
        check(values == list(range(many)), side, "values")
        sample.figures["latency_median"] = statistics.median(seconds)
        sample.figures["latency_p90"] = statistics.quantiles(seconds, n=10)[-1]
        sample.figures["latency_first"] = seconds[0]
        return finish(sample, side, many, cluster.settle)

    comparison = Comparison(
        cluster.configuration, sides[0].name, sides[1].name, tasks=count, by="latency_median"
    )
    return interleave(comparison, sides, sampling, lambda side: take(side, min(count, 10)), take)
