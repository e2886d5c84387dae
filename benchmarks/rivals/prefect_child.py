"""Runs in Prefect's environment: the cases as flows of Prefect, beside the bare back end.

Called as ``python -m benchmarks.rivals.prefect_child ORDER ANSWER``, two JSON files; see `prefect`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clusters import WORKERS, Cluster, opened
from benchmarks.harness import Clock, Comparison
from benchmarks.rivals.bare import bare_side
from benchmarks.rivals.prefect import post
from benchmarks.workloads import chain_large, map_large, map_noop

POLL = 0.05  # seconds
RECORD_TIMEOUT = 120.0


class Prefect:
    """The cases as flows, with the caching of results switched off: it would hash every array."""

    name = "prefect"

    def __init__(self, cluster: Cluster) -> None:
        from prefect import task  # type: ignore[import-not-found]
        from prefect.cache_policies import NO_CACHE  # type: ignore[import-not-found]

        functions = (
            map_noop.noop,
            map_large.part_sum,
            chain_large.make,
            chain_large.add_one,
            chain_large.total,
        )
        made = [task(function, cache_policy=NO_CACHE) for function in functions]
        self._noop, self._part_sum, self._make, self._add_one, self._total = made
        self._runner = _runner(cluster)
        self._flow_run = ""

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Map, fetch the values, and wait until the server shows every task run as completed."""
        values: list[int] = []

        def map_noop() -> None:
            values.extend(self._noop.map(range(count)).result())
            clock.mark("values")

        self._run(map_noop, clock)
        self.completed(count, RECORD_TIMEOUT)
        clock.mark("recorded")
        return values

    def chain_large(self, items: int, clock: Clock) -> float:
        """Submit three times and fetch the sum."""
        values: list[float] = []

        def chain_large() -> None:
            array = self._add_one.submit(self._make.submit(items))
            values.append(self._total.submit(array).result())
            clock.mark("values")

        self._run(chain_large, clock)
        return values[0]

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Map with the array as an unmapped argument."""
        from prefect import unmapped

        values: list[float] = []

        def map_large() -> None:
            futures = self._part_sum.map(range(count), array=unmapped(array), parts=unmapped(count))
            values.extend(futures.result())
            clock.mark("values")

        self._run(map_large, clock)
        return values

    def completed(self, expected: int, timeout: float) -> int:
        """Ask the server until it shows enough."""
        query = {
            "flow_runs": {"id": {"any_": [self._flow_run]}},
            "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        }
        deadline = time.monotonic() + timeout
        while True:
            found = int(post(f"{os.environ['PREFECT_API_URL']}/task_runs/count", query))
            if found >= expected or time.monotonic() > deadline:
                return found
            time.sleep(POLL)

    def _run(self, body: Callable[[], None], clock: Clock) -> None:
        from prefect import flow, runtime

        ids: list[str] = []

        def with_id() -> None:
            ids.append(str(runtime.flow_run.id))
            body()

        flow(with_id, name=body.__name__, task_runner=self._runner)()
        clock.mark("returned")
        self._flow_run = ids[0]


def _runner(cluster: Cluster) -> Any:
    if cluster.backend == "dask":
        from prefect_dask import DaskTaskRunner  # type: ignore[import-not-found]

        return DaskTaskRunner(address=cluster.handle.scheduler_address)
    if cluster.backend == "ray":
        from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]

        return RayTaskRunner()  # attaches to the Ray of this process
    from prefect.task_runners import ThreadPoolTaskRunner  # type: ignore[import-not-found]

    return ThreadPoolTaskRunner(max_workers=WORKERS)


def main(order: Path, answer: Path) -> None:
    """Carry out an order; the answer is complete after each sample."""
    wanted = json.loads(order.read_text())
    case, repeats = wanted["case"], wanted["repeats"]

    def tell(comparison: Comparison) -> None:
        draft = answer.with_suffix(".draft")
        draft.write_text(json.dumps(comparison.as_json()))
        draft.replace(answer)

    store = 8 * wanted["megabytes"] * 10**6
    with opened(wanted["backend"], object_store=store) as cluster:
        sides = (bare_side(cluster), Prefect(cluster))
        if case == "map_noop":
            map_noop.compare(cluster, sides, count=wanted["count"], repeats=repeats, tell=tell)
        else:
            workload = {"chain_large": chain_large, "map_large": map_large}[case]
            workload.compare(cluster, sides, megabytes=wanted["megabytes"], repeats=repeats, tell=tell)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
