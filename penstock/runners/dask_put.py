"""Large values of the driver, in shared memory that every worker of its Dask cluster sees.

A value is written to a file once, when it is put: that is the value which tasks get, whatever
becomes of the object. Tasks name the file in their arguments, and each process that runs one maps
it; nothing is sent, and the scheduler has nothing to manage. As soon as a worker is known that does
not see the file, Dask's own way is taken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from penstock.runners import dask_graph, shared_memory
from penstock.runners.base import Key, Submission
from penstock.runners.shared_memory import SharedMemory

log = logging.getLogger("penstock.runners.dask")

LEAST = 1 << 20  # bytes from which a value is written to a file
LATEST = 2.0  # seconds for which the list of workers is believed
NEAR = 3  # workers that another one may ask for a value which it does not see


class File:
    """A value in shared memory; deleted with the last reference to this object.

    Attributes
    ----------
    key : dask_memory.Placed
        What a batch says in the place of a key.
    status : str
        As of a future of Dask.
    """

    status = "finished"

    def __init__(self, placed: Any) -> None:
        self.key = placed
        weakref.finalize(self, shared_memory.remove, placed.packed[1], by=os.getpid())

    def load(self) -> Any:
        """Return the value; arrays in it can be written to, without effect on anybody else."""
        return shared_memory.load(self.key.packed, private=True)


class Placement:
    """Places values for the workers of one cluster.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    runtime : dask_runtime.Runtime
        The worker code as the cluster knows it.
    """

    def __init__(self, client: Any, runtime: Any) -> None:
        self._client = client
        self._runtime = runtime
        self._lock = threading.Lock()
        self._memory: SharedMemory | None = None
        self._near: dict[str, bool] = {}  # worker → whether it sees our memory
        self._asked = 0.0
        self._answer = False
        self._in_use: dict[Key, list[File]] = {}  # until the task has ended
        self._told = False
        self._closed = False

    def put(self, value: Any) -> File | None:
        """Write a value to a file, if it is made of large buffers and every worker will see it."""
        least = _size_of_buffers(value)
        if least is not None and least < LEAST:
            return None
        try:
            if not self.reaches_all(refresh=True):
                return None
            assert self._memory is not None
            packed = self._memory.export_buffers(value, LEAST, by_value=True)
        except OSError as error:
            if not self._told:
                self._told = True
                log.warning(
                    "a large argument goes by TCP, since shared memory is out of reach: %s",
                    error.strerror or error,
                )
            return None
        if packed is None:
            return None
        near = tuple([address for address, sees in self._near.items() if sees][:NEAR])
        return File(self._runtime.memory.Placed(packed, near))

    def reaches_all(self, *, refresh: bool = False) -> bool:
        """Whether every worker sees the memory of this process, as far as is known.

        Parameters
        ----------
        refresh : bool
            Ask the scheduler now who is there, instead of every other second.
        """
        with self._lock:
            if self._closed:
                return False
            if refresh or time.monotonic() - self._asked > LATEST:
                self._asked = time.monotonic()
                try:
                    self._answer = self._ask()
                except Exception as error:
                    log.debug("shared memory is not used: %s: %s", type(error).__name__, error)
                    self._answer = False
            return self._answer

    def _ask(self) -> bool:
        workers = dask_graph.ask(self._client, self._runtime.tracker.addresses, timeout=5.0)
        if not workers or any(self._near.get(one) is False for one in workers):
            return False
        if self._memory is None:
            self._memory = SharedMemory.create(shared_memory.memory_roots())
        path, text = self._memory.proof()
        new = [one for one in workers if one not in self._near]
        for some in (new[:1], new[1:]):  # a cluster of other hosts is asked once
            answers = dask_graph.ask_workers(self._client, self._runtime.memory.sees, path, workers=some)
            for one in some:
                if one in answers:
                    self._near[one] = answers[one] == text
            if not all(self._near.get(one) for one in some):
                return False
        for one in self._near.keys() - set(workers):
            del self._near[one]
        return True

    # -- what is in use -----------------------------------------------------------------------
    def use(self, submissions: Iterable[Submission]) -> None:
        """Keep the files of tasks that are about to be sent."""
        for one in submissions:
            files = [ref.handle for ref in one.refs if isinstance(ref.handle, File)]
            if files:
                self._in_use[one.key] = files

    def scatter_unseen(self, submissions: Sequence[Submission], scatter: Any) -> None:
        """Hand values to Dask after all, if a worker has come that does not see them."""
        refs = {id(ref): ref for one in submissions for ref in one.refs if isinstance(ref.handle, File)}
        if not refs or self.reaches_all():
            return
        for ref in refs.values():
            ref.handle = scatter(ref.key, ref.handle.load())

    def ended(self, keys: Iterable[Key]) -> None:
        """Let go of the files of tasks that have ended or were withdrawn."""
        for key in keys:
            self._in_use.pop(key, None)

    def close(self) -> None:
        """Delete all files."""
        with self._lock:
            self._closed = True
            memory, self._memory = self._memory, None
        self._in_use.clear()
        if memory is not None:
            memory.close()


def _size_of_buffers(value: Any) -> int | None:
    """Return the size of what is plainly one buffer, None of anything else."""
    nbytes = getattr(value, "nbytes", None)
    return nbytes if isinstance(nbytes, int) and hasattr(value, "strides") else None


def sweep() -> None:
    """Delete what dead workers of this host left behind."""
    with contextlib.suppress(OSError):
        shared_memory.sweep_dead_owners(shared_memory.memory_roots())


def is_file(handle: Any) -> bool:
    """Whether the handle of a reference is a file."""
    return isinstance(handle, File)


__all__ = ["File", "Placement", "is_file", "sweep"]
