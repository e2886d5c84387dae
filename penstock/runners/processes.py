"""Tasks in worker processes of this host; large values stay in shared memory."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from penstock import errors
from penstock.runners.base import Key, Ref, RunnerInfo, Submission, TaskRunner, new_tag
from penstock.runners.process_child import environment
from penstock.runners.process_nested import fetched
from penstock.runners.process_pool import Pool
from penstock.runners.process_work import Handle, Value, Work
from penstock.runners.shared_memory import SharedMemory
from penstock.runners.worker.pickling import dumps


class ProcessPoolTaskRunner(TaskRunner):
    """Runs tasks in processes of this machine.

    Each worker runs one task at a time. Results stay with the workers' host: up to 1 MiB as
    pickled bytes, above in a file in shared memory, which every process maps instead of copying.
    A worker that dies takes the task that it ran with it, and nothing else.

    Parameters
    ----------
    max_workers : int, optional
        Processes; the number of CPUs that this process may use if not given.
    initializer : callable, optional
        Called first in each worker.
    initargs : iterable
        Arguments of the initializer.

    Examples
    --------
    >>> @flow(task_runner=ProcessPoolTaskRunner(max_workers=4))
    ... def reduce(parts):
    ...     return [clean.submit(part) for part in parts]

    The code that uses the runner needs no ``if __name__ == "__main__"``: workers do not import it.
    """

    name = "processes"
    kills_on_timeout = True

    def __init__(
        self,
        max_workers: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
    ) -> None:
        super().__init__()
        if max_workers is not None and max_workers < 1:
            message = f"max_workers is {max_workers}; a pool needs at least one worker"
            raise ValueError(message)
        if initializer is not None and not callable(initializer):
            message = f"initializer is a {type(initializer).__name__}, not something to call"
            raise TypeError(message)
        self.max_workers = max_workers if max_workers is not None else _usable_cpus()
        self.initializer = initializer
        self.initargs = tuple(initargs)
        self._pool: Pool | None = None
        self._memory: SharedMemory | None = None
        self._put_names = (f"put-{new_tag()}", itertools.count())

    def __eq__(self, other: object) -> bool:
        """Compare settings."""
        return isinstance(other, ProcessPoolTaskRunner) and other._settings() == self._settings()

    def __hash__(self) -> int:
        """Hash by the setting that surely can be hashed."""
        return hash((type(self), self.max_workers))

    def duplicate(self) -> Self:
        """Return a pool with the same settings."""
        return type(self)(self.max_workers, self.initializer, self.initargs)

    def _settings(self) -> tuple[Any, ...]:
        return type(self), self.max_workers, self.initializer, self.initargs

    # -- life -----------------------------------------------------------------------------
    def start(self) -> None:
        """Start the workers.

        Raises
        ------
        RunnerUnavailable
            If no worker can be started, or the initializer fails.
        """
        if not sys.executable:
            message = "the process pool starts Python interpreters, but this program does not name its own"
            raise errors.RunnerUnavailable(message)
        try:
            memory = self._memory = SharedMemory.create()
        except OSError as error:
            message = f"the process pool found no directory for large values: {error}"
            raise errors.RunnerUnavailable(message) from error
        try:
            settings = {
                "directories": memory.directories,
                "initializer": self._packed_initializer(),
                "info": dataclasses.asdict(self.info),
            }
            workers_environment = environment(max(1, _usable_cpus() // self.max_workers))
            self._pool = Pool(self.max_workers, settings, workers_environment, memory, self.deliver)
            atexit.register(self._pool.close)
            self._pool.open()
        except BaseException:  # Ctrl-C, too
            self.stop()
            raise

    def stop(self) -> None:
        """End the workers, within three seconds whatever they do, and delete their files."""
        pool, self._pool = self._pool, None
        memory, self._memory = self._memory, None
        try:
            if pool is not None:
                atexit.unregister(pool.close)
                pool.close()
        finally:
            if memory is not None:
                memory.close()

    @property
    def info(self) -> RunnerInfo:
        """What the pool can do."""
        return RunnerInfo(
            name=self.name,
            workers=self.max_workers,
            threads=self.max_workers,
            interrupts=True,
            streams=True,
            versions=(("python", platform.python_version()),),
        )

    def inside(self) -> str:
        """Tasks find their way back by this name."""
        return self.name

    # -- work -----------------------------------------------------------------------------
    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        """Queue work whose references are finished."""
        pool = self._started()
        refs = []
        works = []
        for submission in submissions:
            handle = Handle()
            work = Work(
                submission.key,
                submission.order,
                _bytes(submission.function),
                _bytes(submission.arguments),
                handle=handle,
                priority=submission.priority,
                announce=submission.announce,
            )
            refs.append(Ref(submission.key, handle))
            works.append((work, [_handle(ref) for ref in submission.refs]))
        pool.send(works)
        return refs

    def cancel(self, refs: Sequence[Ref], *, force: bool = False) -> list[Key]:
        """Stop work.

        Work that no worker has got is removed, and its key returned. Other work is asked to
        stop; with `force` its process is killed instead, and the pool starts another one. Both
        end with a report.
        """
        return self._started().cancel([ref.key for ref in refs], force=force)

    def cancel_all(self) -> None:
        """Stop all work of all sessions; each piece ends with a report."""
        self._started().cancel_all()

    def take_back(self, ref: Ref) -> bool:
        """Withdraw work that no worker has got."""
        return self._started().take_back(ref.key)

    # -- values ---------------------------------------------------------------------------
    def put(self, values: Sequence[Any]) -> list[Ref]:
        """Pickle each value once; a large one goes to a file that every worker maps.

        Raises
        ------
        UnserializableArgument
            Naming the type.
        """
        pool = self._started()
        assert self._memory is not None
        refs = []
        for value in values:
            try:
                packed, nbytes = self._memory.export(value, by_value=True)
            except Exception as error:
                message = f"a value of type {type(value).__name__} cannot be sent to another process: {error}"
                raise errors.UnserializableArgument(message) from error
            name, counter = self._put_names
            refs.append(Ref((name, next(counter)), Handle(Value(packed, nbytes, pool.files)), nbytes))
        return refs

    def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """Unpickle values here; arrays in shared memory are mapped, and copied where written to."""
        handles = [_handle(ref) for ref in refs]
        values = [None if handle is None else handle.value for handle in handles]
        return [
            fetched(ref, None if value is None else value.packed)
            for ref, value in zip(refs, values, strict=True)
        ]

    def missing(self, refs: Sequence[Ref]) -> list[Ref]:
        """Return those whose value, or the file it lies in, no longer exists."""
        return [ref for ref in refs if not _exists(ref.handle)]

    def release(self, refs: Sequence[Ref]) -> None:
        """Let go of values; work that has been sent with them still gets them."""
        for ref in refs:
            handle = _handle(ref)
            if handle is not None:
                handle.release()

    # -- inside ---------------------------------------------------------------------------
    def _started(self) -> Pool:
        if self._pool is None:
            message = "Task runner is not started"
            raise RuntimeError(message)
        return self._pool

    def _packed_initializer(self) -> bytes | None:
        if self.initializer is None:
            return None
        return dumps((self.initializer, self.initargs))


def _handle(ref: Ref) -> Handle | None:
    return ref.handle if isinstance(ref.handle, Handle) else None


def _bytes(content: Any) -> bytes:
    if not isinstance(content, bytes):
        message = f"work for another process is bytes, not {type(content).__name__}"
        raise TypeError(message)
    return content


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _exists(handle: Handle) -> bool:
    if handle.value is None:
        return False
    packed = handle.value.packed
    return packed[0] != "file" or os.path.exists(packed[1])
