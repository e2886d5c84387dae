"""The clusters that both sides of a comparison share: two workers with one thread each."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

WORKERS = 2
SETTLE = 10.0  # seconds
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
    """

    backend: str
    configuration: str
    handle: Any
    held: Callable[[], int]

    def settle(self) -> int:
        """Wait until the cluster has forgotten the last sample; return the tasks that it does not forget."""
        gc.collect()
        deadline = time.monotonic() + SETTLE
        while (left := self.held()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


@contextlib.contextmanager
def opened(backend: str, *, saturation: str = "", object_store: int = 0) -> Iterator[Cluster]:
    """Open a cluster for a while.

    Parameters
    ----------
    backend : str
        "threads", "dask" or "ray".
    saturation : str
        Of the Dask scheduler; its default if empty.
    object_store : int
        Bytes of Ray's object store; at least half a gigabyte.
    """
    if backend == "threads":
        yield Cluster("threads", f"{WORKERS} threads", None, lambda: 0)
    elif backend == "dask":
        with _dask(saturation) as cluster:
            yield cluster
    else:
        with _ray(object_store) as cluster:
            yield cluster


@contextlib.contextmanager
def _dask(saturation: str) -> Iterator[Cluster]:
    import dask
    from distributed import LocalCluster

    key = "distributed.scheduler.worker-saturation"
    configured = dask.config.get(key)
    wanted = float(saturation) if saturation else configured
    with (
        dask.config.set({key: wanted}),
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        words = f"{WORKERS} processes x 1 thread, worker-saturation {wanted}"
        yield Cluster("dask", words, cluster, lambda: len(cluster.scheduler.tasks))


@contextlib.contextmanager
def _ray(object_store: int) -> Iterator[Cluster]:
    import ray

    store = max(object_store, 1 << 29)
    _start_ray(store)
    try:
        yield Cluster("ray", f"{WORKERS} CPUs, object store {store / 1e9:.1f} GB", None, lambda: 0)
    finally:
        ray.shutdown()


def _start_ray(store: int, attempts: int = 3) -> None:
    import ray

    for attempt in range(attempts):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # about accelerators, which no case uses
                ray.init(
                    address="local",
                    num_cpus=WORKERS,
                    include_dashboard=False,
                    object_store_memory=store,
                    log_to_driver=False,
                )
        except (
            Exception
        ) as error:  # Ray raises no finer one; a busy machine needs more than the 30 s it allows
            ray.shutdown()
            if "timed out" not in str(error) or attempt + 1 == attempts:
                raise
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
