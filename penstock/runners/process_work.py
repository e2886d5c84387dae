"""Work and values of the process pool, as the driver keeps them."""

from __future__ import annotations

import heapq
import itertools
import os
from typing import TYPE_CHECKING, Any

from penstock.runners import shared_memory
from penstock.runners.base import Key
from penstock.runners.shared_memory import Packed

if TYPE_CHECKING:
    from penstock.runners.process_child import Child


class Value:
    """A packed value; the file of a large one is deleted with the object.

    Work that needs the value holds it too, so a reference may be released while work waits.

    Parameters
    ----------
    packed : tuple
        See `shared_memory.Packed`; or ``("failed", record)``.
    nbytes : int
        Size in bytes.
    files : set of str
        The files that somebody holds; the value enters its own.
    """

    __slots__ = ("_files", "_process", "nbytes", "packed")

    def __init__(self, packed: Packed, nbytes: int, files: set[str]) -> None:
        self.packed = packed
        self.nbytes = nbytes
        self._files = files
        self._process = os.getpid()
        if packed[0] == "file":
            files.add(packed[1])

    def __del__(self) -> None:
        # No lock: the garbage collector may come here from anywhere. In a fork of the driver the
        # file is not ours.
        if self.packed[0] == "file" and os.getpid() == self._process:
            shared_memory.remove(self.packed[1])
            self._files.discard(self.packed[1])


class Handle:
    """What a `Ref` of the process pool holds: a value, once it is there.

    Attributes
    ----------
    pending : bool
        The work has not ended yet.
    value : Value or None
        None while it is pending, and if it was lost or released.
    """

    __slots__ = ("_released", "pending", "value")

    def __init__(self, value: Value | None = None) -> None:
        self.pending = value is None
        self.value = value
        self._released = False

    def __reduce__(self) -> Any:
        message = "a reference belongs to the process that submitted the work; pass its value on"
        raise TypeError(message)

    def finish(self, value: Value | None) -> None:
        """Take the value; None if there will never be one."""
        self.pending = False
        self.value = None if self._released else value

    def release(self) -> None:
        """Let go of the value, also of one that is still to come."""
        self._released = True
        self.value = None


class Work:
    """A submission on its way.

    Parameters
    ----------
    key, order, function, arguments, priority, announce
        As in `Submission`.
    handle : Handle
        Where the value goes.
    values : tuple of Value
        The upstream values.
    parent : Work or None
        The work in which it was submitted.
    origin : Child or None
        The worker that submitted it; None for the driver.
    """

    __slots__ = (
        "announce",
        "arguments",
        "child",
        "function",
        "handle",
        "is_cancelled",
        "is_orphan",
        "is_pending",
        "key",
        "level",
        "order",
        "origin",
        "parent",
        "rank",
        "seconds",
        "values",
    )

    def __init__(
        self,
        key: Key,
        order: bytes,
        function: bytes,
        arguments: bytes,
        *,
        handle: Handle,
        values: tuple[Value, ...] = (),
        priority: int = 0,
        announce: bool = False,
        parent: Work | None = None,
        origin: Child | None = None,
    ) -> None:
        self.key = key
        self.order = order
        self.function = function
        self.arguments = arguments
        self.handle = handle
        self.values = values
        self.announce = announce
        self.origin = origin
        self.parent = parent
        # What a task in a slot waits for goes before what could be started besides: otherwise
        # all parents would be started, each in a process of its own, before the first child.
        self.level: int = 0 if origin is None else 1 if parent is None else parent.level + 1
        self.rank = (-self.level, -priority, next(_sequence))
        self.child: Child | None = None  # who has it
        self.seconds = 0.0  # how long it is expected to take
        self.is_pending = False
        self.is_cancelled = False
        self.is_orphan = False  # nobody wants to hear of it any more

    @property
    def task(self) -> str:
        """Name of the task, for messages."""
        return self.key[0].rpartition("-")[0] or self.key[0]


_sequence = itertools.count()


class Backlog:
    """Work that no worker has yet: by level and priority, then first come, first served."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Work]] = []
        self._withdrawn = 0

    def __len__(self) -> int:
        return len(self._heap) - self._withdrawn

    def push(self, work: Work) -> None:
        """Queue work; work that was queued before gets its old place."""
        work.is_pending = True
        heapq.heappush(self._heap, (work.rank, work))

    def pop(self) -> Work | None:
        """Take the next work, None if there is none."""
        while self._heap:
            work = heapq.heappop(self._heap)[1]
            if work.is_pending:
                work.is_pending = False
                return work
            self._withdrawn -= 1
        return None

    @property
    def holds_nested(self) -> bool:
        """Whether work that a task has submitted waits: it would be the first."""
        return bool(self._heap) and self._heap[0][0][0] < 0

    def withdraw(self, work: Work) -> None:
        """Take certain work out."""
        work.is_pending = False
        self._withdrawn += 1
        if self._withdrawn * 2 > len(self._heap):  # it holds values, which nobody may come to take
            self._heap = [entry for entry in self._heap if entry[1].is_pending]
            heapq.heapify(self._heap)
            self._withdrawn = 0
