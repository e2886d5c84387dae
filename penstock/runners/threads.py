"""Work in threads of this process: the default runner."""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

from penstock.runners.base import Key, Ref, Report, RunnerInfo, Submission, TaskRunner
from penstock.runners.worker.coroutines import close_loop
from penstock.runners.worker.execution import execute
from penstock.runners.worker.interruption import cancel
from penstock.runners.worker.sizes import size_of


class ThreadPoolTaskRunner(TaskRunner):
    """Runs tasks in threads; objects are shared, nothing is pickled.

    Parameters
    ----------
    max_workers : int, optional
        Tasks that run at once; ``min(32, CPUs + 4)`` by default. A task that waits for its own
        children does not count.
    """

    name = "threads"
    in_process = True

    def __init__(self, max_workers: int | None = None) -> None:
        super().__init__()
        self.max_workers = max_workers or min(32, (os.cpu_count() or 1) + 4)
        if self.max_workers < 1:
            message = f"'max_workers' must be at least 1, got {max_workers}."
            raise ValueError(message)
        self._queue: list[tuple[int, int, Submission, Ref]] = []
        self._order = itertools.count()
        self._work = threading.Condition(threading.Lock())
        self._queued: set[Key] = set()
        self._threads = 0
        self._idle = 0
        self._blocked = 0
        self._open = False

    def __eq__(self, other: object) -> bool:
        """Compare settings."""
        return type(other) is type(self) and other.max_workers == self.max_workers

    def duplicate(self) -> Self:
        """Return a pool of the same size."""
        return type(self)(self.max_workers)

    def __hash__(self) -> int:
        """Hash by settings."""
        return hash((type(self), self.max_workers))

    def start(self) -> None:
        """Threads start with the first tasks."""
        self._open = True

    def stop(self) -> None:
        """Let idle threads end; one that runs a task ends after it."""
        with self._work:
            self._open = False
            self._queue.clear()
            self._queued.clear()
            self._work.notify_all()

    @property
    def info(self) -> RunnerInfo:
        """One process with `max_workers` threads."""
        return RunnerInfo("threads", threads=self.max_workers, in_process=True, streams=True)

    def put(self, values: Sequence[Any]) -> list[Ref]:
        """Share the objects."""
        return [Ref(("put", id(value)), value) for value in values]

    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        """Queue the work and start threads as far as allowed."""
        refs = []
        with self._work:
            for one in submissions:
                ref = Ref(one.key, None)
                refs.append(ref)
                heapq.heappush(self._queue, (-one.priority, next(self._order), one, ref))
                self._queued.add(one.key)
            self._start_threads()
            self._work.notify(len(submissions))
        return refs

    def _start_threads(self) -> None:
        wanted = len(self._queued) - self._idle
        room = self.max_workers + self._blocked - self._threads
        for _ in range(min(wanted, room)):
            self._threads += 1
            threading.Thread(target=self._serve, name="penstock-worker", daemon=True).start()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            self._do(*taken)
            del taken  # the thread waits for its next task without holding the last one's objects
        close_loop()

    def _take(self) -> tuple[Submission, Ref] | None:
        with self._work:
            while True:
                if self._threads > self.max_workers + self._blocked or (not self._open and not self._queue):
                    self._threads -= 1
                    return None
                while self._queue:
                    _, _, one, ref = heapq.heappop(self._queue)
                    if one.key in self._queued:
                        self._queued.discard(one.key)
                        return one, ref
                    del one, ref  # withdrawn: an idle thread must not keep it
                self._idle += 1
                try:
                    self._work.wait()
                finally:
                    self._idle -= 1

    def _do(self, one: Submission, ref: Ref) -> None:
        def announce() -> None:
            self.deliver([Report(one.key, "started")])

        values = [upstream.handle for upstream in one.refs]
        ref.handle, record = execute(
            one.order,
            one.function,
            one.arguments,
            values,
            one.key,
            announce if one.announce else None,
            on_item=functools.partial(self._yielded, one.key),
        )
        worker = f"thread {threading.get_ident() % 100_000:05d} of pid {os.getpid()}"
        self.deliver([Report(one.key, "ended", record, worker=worker)])

    def _yielded(self, key: Key, number: int, item: Any) -> None:
        self.deliver_item(key, number, item, size_of(item))

    def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """Return the objects."""
        return [ref.handle for ref in refs]

    def release(self, refs: Sequence[Ref]) -> None:
        """Forget the objects."""
        for ref in refs:
            ref.handle = None

    def cancel(self, refs: Sequence[Ref], *, force: bool = False) -> list[Key]:
        """Drop what is queued; ask what runs to stop at its next bytecode."""
        del force
        stopped, running = [], []
        with self._work:
            for ref in refs:
                if ref.key in self._queued:
                    self._queued.discard(ref.key)
                    stopped.append(ref.key)
                else:
                    running.append(ref.key)
            self._tidy()
        cancel(running)
        return stopped

    def cancel_all(self) -> None:
        """Drop all queued work."""
        with self._work:
            self._queue.clear()
            self._queued.clear()

    def take_back(self, ref: Ref) -> bool:
        """Withdraw a task that is still queued."""
        with self._work:
            if ref.key not in self._queued:
                return False
            self._queued.discard(ref.key)
            self._tidy()
            return True

    def _tidy(self) -> None:
        """Let go of work that was withdrawn, and of the values in it: nobody may come to take it."""
        if len(self._queue) > 2 * len(self._queued):
            self._queue = [entry for entry in self._queue if entry[2].key in self._queued]
            heapq.heapify(self._queue)

    @contextlib.contextmanager
    def blocked(self, refs: Sequence[Ref]) -> Iterator[None]:
        """Let another thread work while this one waits."""
        del refs
        with self._work:
            self._blocked += 1
            self._start_threads()
        try:
            yield
        finally:
            with self._work:
                self._blocked -= 1
