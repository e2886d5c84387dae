"""The clusters that both sides of a comparison share: two workers with one thread each, unless a case needs more."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

WORKERS = 2
SETTLE = 10.0  # seconds
RAY_ATTEMPTS = 5
RAY_PAUSE = 5.0  # seconds before another attempt
BACKENDS = ("threads", "dask", "ray")


@dataclass(slots=True)
class Cluster:
    """An open cluster.

    Attributes
    ----------
    backend : str
        "threads", "dask" or "ray".
    configuration : str
        In words.
    handle : object
        The LocalCluster of Dask; None on Ray, which belongs to the process.
    held : callable
        Returns how many tasks the cluster still holds.
    threads : int
        That run tasks, of all workers.
    addresses : tuple of str
        Of the workers, on Dask.
    spill : Path or None
        Where values go for want of memory, on Ray.
    """

    backend: str
    configuration: str
    handle: Any
    held: Callable[[], int]
    threads: int = WORKERS
    addresses: tuple[str, ...] = ()
    spill: Path | None = None

    def settle(self) -> int:
        """Wait until the cluster has forgotten the last sample; return the tasks that it does not forget."""
        gc.collect()
        deadline = time.monotonic() + SETTLE
        while (left := self.held()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


@contextlib.contextmanager
def opened(
    backend: str, *, saturation: str = "", object_store: int = 0, workers: int = WORKERS, threads: int = 1
) -> Iterator[Cluster]:
    """Open a cluster for a while.

    Parameters
    ----------
    backend : str
        "threads", "dask" or "ray".
    saturation : str
        Of the Dask scheduler; its default if empty.
    object_store : int
        Bytes of Ray's object store; at least half a gigabyte.
    workers, threads : int
        Worker processes, and threads of each. Ray gets as many CPUs as both make.
    """
    total = workers * threads
    if backend == "threads":
        yield Cluster("threads", f"{total} threads", None, lambda: 0, total)
    elif backend == "dask":
        with _dask(saturation, workers, threads) as cluster:
            yield cluster
    else:
        with _ray(object_store, total) as cluster:
            yield cluster


@contextlib.contextmanager
def _dask(saturation: str, workers: int, threads: int) -> Iterator[Cluster]:
    import dask
    from distributed import LocalCluster

    key = "distributed.scheduler.worker-saturation"
    configured = dask.config.get(key)
    wanted = float(saturation) if saturation else configured
    with (
        dask.config.set({key: wanted}),
        LocalCluster(n_workers=workers, threads_per_worker=threads, dashboard_address=None) as cluster,
    ):
        plural = "threads" if threads > 1 else "thread"
        words = f"{workers} processes x {threads} {plural}, worker-saturation {wanted}"
        addresses = tuple(sorted(cluster.scheduler.workers))
        yield Cluster(
            "dask", words, cluster, lambda: len(cluster.scheduler.tasks), workers * threads, addresses
        )


@contextlib.contextmanager
def _ray(object_store: int, cpus: int) -> Iterator[Cluster]:
    import ray

    store = max(object_store, 1 << 29)
    _start_ray(store, cpus)
    try:
        words = f"{cpus} CPUs, object store {store / 1e9:.1f} GB"
        yield Cluster("ray", words, None, lambda: 0, cpus, spill=_session_folder())
    finally:
        ray.shutdown()


def _session_folder() -> Path | None:
    from ray._private.worker import global_worker

    node = global_worker.node
    return Path(node.get_session_dir_path()) if node is not None else None


def _start_ray(store: int, cpus: int) -> None:
    """Start Ray; a busy machine needs more than the 30 s that it allows itself, so more than once if need be."""
    import ray

    for attempt in range(1, RAY_ATTEMPTS + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # about accelerators, which no case uses
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=store,
                    log_to_driver=False,
                )
        except Exception as error:  # Ray raises no finer one
            ray.shutdown()
            if "timed out" not in str(error) or attempt == RAY_ATTEMPTS:
                raise
            time.sleep(RAY_PAUSE)
        else:
            return


def check_memory(needed: int) -> None:
    """Refuse a case that this machine cannot hold.

    Raises
    ------
    SystemExit
        With one sentence.
    """
    available = psutil.virtual_memory().available
    if available < needed:
        message = f"this case needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free; use --megabytes"
        raise SystemExit(message)
