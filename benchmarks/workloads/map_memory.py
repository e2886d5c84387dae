"""`map_memory`: what a driver keeps of each task of a map while somebody holds the futures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.clusters import Cluster
from benchmarks.harness import Comparison, Sample, Sampling

NAME = "map_memory"
ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 900.0  # seconds
DONE = (
    "a driver in a process of its own, beside the Dask scheduler, maps a no-op over range(n) and holds the "
    "futures without asking for values. Compared is the growth of its private memory per task, after a "
    "garbage collection and after free memory was given back, when all tasks have ended (and, of penstock, "
    "are recorded); the peak on the way stands beside it. Nothing traces allocations."
)


def compare(cluster: Cluster, sampling: Sampling, *, count: int, engine: str = "penstock") -> Comparison:
    """Start drivers in turn.

    Parameters
    ----------
    cluster : Cluster
        Open; on Ray and with threads each driver has its own.
    sampling : Sampling
        How many.
    count : int
        Tasks.
    engine : str
        What is compared with the bare back end.
    """
    bare = f"bare {cluster.backend}"
    comparison = Comparison(cluster.configuration, bare, engine, tasks=count, by="bytes_per_task")
    for repeat in range(sampling.repeats):
        for name in (bare, engine) if repeat % 2 == 0 else (engine, bare):
            if name == bare and not sampling.bare:
                continue
            sample = _driver(cluster, name, count)
            (comparison.bare_samples if name == bare else comparison.samples).append(sample)
            sampling.tell(comparison)
    return comparison


def _driver(cluster: Cluster, name: str, count: int) -> Sample:
    """Run one driver."""
    address = cluster.handle.scheduler_address if cluster.backend == "dask" else ""
    order = {"side": name, "backend": cluster.backend, "address": address, "count": count}
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as folder:
        ask, answer = Path(folder, "order.json"), Path(folder, "answer.json")
        ask.write_text(json.dumps(order))
        command = [sys.executable, "-m", "benchmarks.holder", str(ask), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, cwd=ROOT)
        if done.returncode != 0:
            message = f"the driver of {name} failed:\n{done.stderr[-2000:]}"
            raise RuntimeError(message)
        found: dict[str, Any] = json.loads(answer.read_text())
        return Sample(**found)
