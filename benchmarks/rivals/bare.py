"""The bare side of a cluster."""

from __future__ import annotations

from benchmarks.clusters import Cluster
from benchmarks.harness import Side


def bare_side(cluster: Cluster) -> Side:
    """Return the bare back end of a cluster; only its own library is loaded."""
    if cluster.backend == "dask":
        from benchmarks.rivals.bare_dask import BareDask

        return BareDask(cluster)
    if cluster.backend == "ray":
        from benchmarks.rivals.bare_ray import BareRay

        return BareRay(cluster)
    from benchmarks.rivals.bare_threads import BareThreads

    return BareThreads(cluster)
