"""A Dask cluster of this machine: quiet, interruptible, and gone with the process that started it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import dask
from distributed import LocalCluster, Nanny

SATURATION = 8.0
"""Tasks that a worker holds for each of its threads.

Dask's default of 1.1 makes short tasks wait for a round trip each (370 tasks a second on two
threads, 1,200 with 8; the scheduler's share of the CPU halves). What it costs elsewhere, the
blame of tasks that happened to wait on a dying worker, is avoided by `dask_plugin.Marks`.
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
    from distributed.deploy.utils import nprocesses_nthreads

    processes, threads = nprocesses_nthreads(cores)
    return int(processes), int(threads)


def _local_cluster(kwargs: dict[str, Any]) -> Any:
    """Start a cluster on this machine: interruptible, quiet, and gone with this process."""
    import dask
    from dask.system import CPU_COUNT
    from distributed import LocalCluster

    options: dict[str, Any] = {
        "dashboard_address": "127.0.0.1:0",  # None means port 8787, and a warning if it is taken
        "silence_logs": logging.CRITICAL,
        "host": "127.0.0.1",
    }
    if "n_workers" not in kwargs and "threads_per_worker" not in kwargs:
        options["n_workers"], options["threads_per_worker"] = shape(CPU_COUNT)
    if kwargs.get("processes", True) and "worker_class" not in kwargs:
        from penstock.runners.dask_plugin import LocalNanny

        options["worker_class"] = LocalNanny
        options["preload"] = ["penstock.runners.dask_plugin"]
    options.update(kwargs)
    config = {
        "distributed.scheduler.allowed-failures": 10,
        "distributed.nanny.pre-spawn-environ": {**_THREADS, **dask.config.get("distributed.nanny.pre-spawn-environ")},
    }
    if dask.config.get("distributed.scheduler.worker-saturation") == 1.1:  # else it is somebody's wish
        config["distributed.scheduler.worker-saturation"] = SATURATION
    with dask.config.set(config), _environment_kept():
        return _interruptible(lambda: LocalCluster(**options))


_THREADS = {  # one core for each task, whatever library does its linear algebra
    "OMP_NUM_THREADS": 1,
    "OPENBLAS_NUM_THREADS": 1,
    "MKL_NUM_THREADS": 1,
    "BLIS_NUM_THREADS": 1,
    "VECLIB_MAXIMUM_THREADS": 1,
    "NUMEXPR_NUM_THREADS": 1,
}


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Nannies set the variables of their workers in this process; they are not for the user's code."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if name in _THREADS or name in {"MALLOC_TRIM_THRESHOLD_", "PYTHONHASHSEED"}:
                del os.environ[name]


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
            _close_cluster(cluster)

    thread = threading.Thread(target=target, name="penstock-dask-start", daemon=True)
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
            _close_cluster(box[0])
        raise
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def close(cluster: Any) -> None:
    """Close a cluster that we started, of whatever class; never raises."""
    with contextlib.suppress(Exception):
        cluster.close(timeout=10)


class LocalNanny(Nanny):
    """Watches a worker process of a cluster of ours and remembers how it ended."""

    ends = OrderedDict()  # process id → exit code, negative for a signal
    started = OrderedDict()  # process id → True
    worker_pid = None

    @classmethod
    def known(cls, pid):
        """Whether a process is or was a worker of ours."""
        return pid in cls.started

    async def instantiate(self):
        """Start the worker process without running the user's script in it once more.

        `multiprocessing` imports ``__main__`` again in each child, which costs time and starts
        a flow anew if the script has no guard. Tasks do not need it: they travel by value.
        """
        main = sys.modules["__main__"]
        kept = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        try:
            status = await super().instantiate()
        finally:
            main.__dict__.update(kept)
        self.worker_pid = self.pid
        self.ends.pop(self.pid, None)  # an earlier process with the same number
        self._note(self.started, True)
        return status

    def _on_worker_exit_sync(self, exitcode):
        self._note(self.ends, exitcode)
        super()._on_worker_exit_sync(exitcode)

    def _note(self, table, value):
        table[self.worker_pid] = value
        while len(table) > 1000:
            table.popitem(last=False)
