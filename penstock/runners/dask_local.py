"""A Dask cluster of this machine: quiet, interruptible, and gone with the process that started it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any, ClassVar

import dask
from dask.system import CPU_COUNT
from distributed import LocalCluster, Nanny
from distributed.deploy.cluster import Cluster
from distributed.deploy.utils import nprocesses_nthreads

SATURATION = 8.0
"""Tasks that a worker holds for each of its threads.

Dask's default of 1.1 makes short tasks wait for a round trip each (370 tasks a second on two
threads, 1,200 with 8; the scheduler's share of the CPU halves). What it costs elsewhere, the
blame of tasks that happened to wait on a dying worker, is avoided by `worker.starts`.
"""

LOSSES = 10
"""Deaths of workers that a task may see before Dask gives it up.

Only tasks that had not begun are left to Dask; one that had is taken away by the tracker before
it starts elsewhere, and reported.
"""


def shape(cores: int) -> tuple[int, int]:
    """Return processes and threads for a cluster of this machine.

    Up to four cores each gets a process of its own: code that holds the GIL uses all of them. With
    more cores Dask's own balance is kept, since arrays are shared without a copy by the threads of
    one process only.
    """
    if cores <= 4:
        return max(cores, 1), 1
    processes, threads = nprocesses_nthreads(cores)
    return int(processes), int(threads)


def start(kwargs: dict[str, Any]) -> Any:
    """Start a cluster.

    Parameters
    ----------
    kwargs : dict
        What the user wants of `distributed.LocalCluster`.
    """
    options: dict[str, Any] = {"silence_logs": logging.CRITICAL}
    if "n_workers" not in kwargs and "threads_per_worker" not in kwargs:
        options["n_workers"], options["threads_per_worker"] = shape(CPU_COUNT)
    if kwargs.get("processes", True):
        options["host"] = "127.0.0.1"
        if "worker_class" not in kwargs:
            options["worker_class"] = LocalNanny
            options["preload"] = [__name__]
    options.update(kwargs)
    if options.get("dashboard_address") is None:  # to Dask that means port 8787, and a warning if it is taken
        options["dashboard_address"] = "127.0.0.1:0"
    config = {
        "distributed.scheduler.allowed-failures": LOSSES,
        "distributed.nanny.pre-spawn-environ": {
            **_THREADS,
            **dask.config.get("distributed.nanny.pre-spawn-environ"),
        },
    }
    if dask.config.get("distributed.scheduler.worker-saturation") == 1.1:  # else it is somebody's wish
        config["distributed.scheduler.worker-saturation"] = SATURATION
    with dask.config.set(config):
        return _interruptible(lambda: _Cluster(**options))


_THREADS = {  # one core for each task, whatever library does its linear algebra
    "OMP_NUM_THREADS": 1,
    "OPENBLAS_NUM_THREADS": 1,
    "MKL_NUM_THREADS": 1,
    "BLIS_NUM_THREADS": 1,
    "VECLIB_MAXIMUM_THREADS": 1,
    "NUMEXPR_NUM_THREADS": 1,
}


def _interruptible(start: Callable[[], Any]) -> Any:
    """Start a cluster in a thread of its own.

    Threads and processes that come of it inherit a blocked SIGINT, so that Ctrl-C reaches the
    driver only; which waits here where it can be interrupted, and then closes what has started.
    """
    box: list[Any] = []
    abandoned = threading.Event()

    def target() -> None:
        try:
            cluster = start()
        except BaseException as error:
            box.append(error)
            return
        box.append(cluster)
        if abandoned.is_set():
            close(cluster)

    thread = threading.Thread(target=target, name="penstock-dask-start", daemon=True)
    resource_tracker.ensure_running()  # it unblocks the signal in the thread that starts it
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        while thread.is_alive():
            thread.join(0.2)
    except BaseException:
        abandoned.set()
        thread.join(10)
        if box and not isinstance(box[0], BaseException):
            close(box[0])
        raise
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def end_workers(cluster: Any) -> None:
    """End the workers of a cluster that is about to be closed in the middle of its work.

    A nanny gives its worker four seconds to finish what it does; nobody waits for that any more.
    """
    with contextlib.suppress(Exception):
        for nanny in list(cluster.workers.values()):
            if isinstance(nanny, LocalNanny) and nanny.pid:
                nanny.close_gracefully()  # it will not start another one
                os.kill(nanny.pid, signal.SIGKILL)


def close(cluster: Any) -> None:
    """Close a cluster that we started, of whatever class; never raises."""
    with contextlib.suppress(Exception):
        cluster.close(timeout=10)


class _Cluster(LocalCluster):  # type: ignore[misc]
    """A local cluster that does not give up a worker which is slow to come back.

    Dask removes a worker for good, nanny and all, if 15 seconds after its death no successor has
    registered: on a busy machine, or if the successor dies as well, the cluster would dwindle.
    """

    def _update_worker_status(self, op: str, msg: Any) -> None:
        Cluster._update_worker_status(self, op, msg)


def dask_setup(worker: Any) -> None:
    """Prepare a worker process; Dask calls this since the module is a preload of it."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    importlib.import_module("penstock.runners.dask_plugin")  # rather now than with the first task


class LocalNanny(Nanny):  # type: ignore[misc]
    """Watches a worker process of a cluster of ours and remembers how it ended."""

    ends: ClassVar[OrderedDict[int, int]] = OrderedDict()  # process id → exit code, negative for a signal
    started: ClassVar[OrderedDict[int, int]] = OrderedDict()  # process id → 0
    worker_pid: int = 0

    async def instantiate(self) -> Any:
        """Start the worker process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread; children inherit it
        noting = asyncio.ensure_future(self._note_process(self.worker_pid))
        try:
            with _unchanged:
                return await super().instantiate()
        finally:
            noting.cancel()

    async def _note_process(self, earlier: int) -> None:
        """Note the process as soon as there is one: its first task may end it before Dask calls it started."""
        while (pid := self._present_pid()) in {0, earlier}:  # noqa: ASYNC110 - Dask tells nobody
            await asyncio.sleep(0.005)
        self.worker_pid = pid
        self.ends.pop(pid, None)  # an earlier process with the same number
        self._note(self.started, 0)

    def _present_pid(self) -> int:
        try:
            return int(self.pid or 0)
        except (AssertionError, AttributeError, ValueError):  # the earlier one is just being closed
            return 0

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        self._note(self.ends, exitcode)
        super()._on_worker_exit_sync(exitcode)

    def _note(self, table: OrderedDict[int, int], value: int) -> None:
        table[self.worker_pid] = value
        while len(table) > 1000:
            table.popitem(last=False)


class _Unchanged:
    """Keeps two things of this process as they are while worker processes start.

    `multiprocessing` imports the user's script again in each child, which costs time and starts
    its flow anew if the script has no guard; tasks do not need it, they travel by value. So the
    script is out of sight meanwhile. And a nanny sets the environment of its worker in this
    process, where it is not meant to stay.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._main: dict[str, Any] = {}
        self._names: set[str] = set()

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            main = vars(sys.modules["__main__"])
            self._main = {name: main[name] for name in ("__file__", "__spec__") if name in main}
            main.pop("__file__", None)
            main["__spec__"] = None
            self._names = set(os.environ)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            vars(sys.modules["__main__"]).update(self._main)
            for name in set(os.environ) - self._names:
                if name in _THREADS or name in {"MALLOC_TRIM_THRESHOLD_", "PYTHONHASHSEED"}:
                    del os.environ[name]


_unchanged = _Unchanged()
