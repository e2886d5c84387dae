"""What Ray is told of later: where results are large, few tasks at a time, deep ones first."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.runners.base import Options, Submission
from penstock.runners.ray_pump import Flight, Handle

MOST = 5_000  # tasks with equal options that Ray knows of; more would not make it faster
UNSEEN_SHARE = 8  # the same per CPU, before any result was seen; each second without one doubles it
LEAST_SHARE = 2  # and per CPU where results are very large
STORE_SHARE = 0.25  # of Ray's object store, that the results of what Ray knows of may take
MEMORY = 0.1  # weight of the newest result in the mean


@dataclass(slots=True, eq=False)
class Held:
    """A submission that Ray does not know of yet.

    Attributes
    ----------
    submission : Submission
        What is to be sent.
    handle : Handle
        What the engine holds.
    upstream, before : tuple of Handle
        Whose values it takes, and what has to end first.
    given : dict
        Value and note of each of these, kept from the moment at which Ray knew them: the engine may
        let go of them.
    missing : int
        How many of them Ray does not know yet.
    dropped : bool
        It was cancelled.
    kind : object
        By what it is counted.
    """

    submission: Submission
    handle: Handle
    upstream: tuple[Handle, ...]
    before: tuple[Handle, ...]
    given: dict[Handle, tuple[Any, Any]] = field(default_factory=dict)
    missing: int = 0
    dropped: bool = False
    kind: Any = field(init=False)

    def __post_init__(self) -> None:
        self.kind = kind_of(self.submission.options)


class Queue:
    """Holds submissions back until there is room.

    Ray runs tasks in the order in which they become ready, whatever waits for their results. Of a
    thousand pairs of producer and consumer it runs all producers first; their results fill its store
    and then the disk.

    Parameters
    ----------
    threads : int
        How many tasks run at once.
    capacity : int
        Size of the object store in bytes; 0 if it is not known, and results count as small then.

    Attributes
    ----------
    lock : RLock
        To be held from `take` to `sent`.
    """

    def __init__(self, threads: int, capacity: int) -> None:
        self.lock = threading.RLock()
        self.resize(threads, capacity)
        self._mean = -1.0
        self._first_sent = 0.0
        self._out: Counter[Any] = Counter()
        self._ended: deque[tuple[Any, int]] = deque()
        self._heaps: dict[Any, list[tuple[int, int, Held]]] = {}
        self._held: dict[Handle, Held] = {}
        self._waiting: dict[Handle, list[Held]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._held)

    def resize(self, threads: int, capacity: int) -> None:
        """Go by the size that the cluster has now."""
        self._threads = threads
        self._budget = STORE_SHARE * capacity

    def add(self, submissions: Iterable[Held]) -> None:
        """Take submissions, each after those that it depends on."""
        with self.lock:
            for held in submissions:
                for handle in dict.fromkeys((*held.upstream, *held.before)):
                    if handle in self._held:
                        self._waiting.setdefault(handle, []).append(held)
                        held.missing += 1
                    else:
                        held.given[handle] = (handle.value, handle.note)
                self._held[held.handle] = held
                if not held.missing:
                    self._push(held)

    def take(self) -> Held | None:
        """Return what is to go next: the deepest for which there is room."""
        self._count()
        room = self._room()
        heaps = [heap for kind, heap in self._heaps.items() if heap and self._out[kind] < room]
        return heapq.heappop(min(heaps))[2] if heaps else None

    def sent(self, held: Held) -> None:
        """Say that Ray knows of what was taken: what depends on it may follow."""
        handle = held.handle
        self._first_sent = self._first_sent or time.monotonic()
        del self._held[handle]
        self._out[held.kind] += 1
        for follower in self._waiting.pop(handle, ()):
            follower.given[handle] = (handle.value, handle.note)
            follower.missing -= 1
            if not follower.missing and not follower.dropped:
                self._push(follower)

    def ended(self, flight: Flight, nbytes: int = -1) -> None:
        """Say that something has ended; its value has that many bytes, if it has one.

        It waits for no lock: the thread that hears of ends must not wait for one that sends.
        """
        self._ended.append((flight.kind, nbytes))

    def drop(self, handles: Iterable[Handle]) -> tuple[list[Held], list[Held]]:
        """Forget submissions; return those that were held, and those that depend on them."""
        with self.lock:
            dropped = [held for handle in handles if (held := self._forget(handle)) is not None]
            orphans: list[Held] = []
            parents = list(dropped)
            while parents:
                for follower in self._waiting.pop(parents.pop().handle, ()):
                    if self._forget(follower.handle) is not None:
                        orphans.append(follower)
                        parents.append(follower)
            if dropped:
                self._sweep()
            return dropped, orphans

    def clear(self) -> Sequence[Held]:
        """Forget everything, and return it."""
        with self.lock:
            return self.drop(list(self._held))[0]

    def _count(self) -> None:
        while self._ended:
            kind, nbytes = self._ended.popleft()
            self._out[kind] -= 1
            if nbytes >= 0:
                self._mean = nbytes if self._mean < 0 else self._mean + MEMORY * (nbytes - self._mean)

    def _room(self) -> int:
        if not self._budget or 0 <= self._mean * MOST <= self._budget:
            return MOST
        if self._mean < 0:
            seconds = time.monotonic() - self._first_sent if self._first_sent else 0.0
            return int(UNSEEN_SHARE * self._threads * 2 ** min(seconds, 10.0))
        return max(LEAST_SHARE * self._threads, int(self._budget / self._mean))

    def _push(self, held: Held) -> None:
        heap = self._heaps.setdefault(held.kind, [])
        heapq.heappush(heap, (-held.submission.priority, next(self._numbers), held))

    def _sweep(self) -> None:
        """Let go of what was dropped, and of the values that it holds."""
        for heap in self._heaps.values():
            heap[:] = [entry for entry in heap if not entry[2].dropped]
            heapq.heapify(heap)
        for handle, followers in list(self._waiting.items()):
            left = [one for one in followers if not one.dropped]
            if left:
                self._waiting[handle] = left
            else:
                del self._waiting[handle]

    def _forget(self, handle: Handle) -> Held | None:
        held = self._held.pop(handle, None)
        if held is not None:
            held.dropped = True
        return held


def kind_of(options: Options) -> Any:
    """Return by what tasks are counted that ask for the same: one kind must not take another's room."""
    try:
        hash(options)
    except TypeError:  # a native option that is a dict, such as runtime_env
        return repr(options)
    return options
