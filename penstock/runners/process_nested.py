"""The runner that a task in a worker process uses: it passes submissions on to the driver's pool."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.runners import shared_memory
from penstock.runners.base import Key, Ref, Report, RunnerInfo, Submission, TaskRunner
from penstock.runners.process_channel import FunctionsSent
from penstock.runners.worker.failure import Failed

if TYPE_CHECKING:
    from penstock.runners.process_worker import Worker


class WorkerHandle:
    """A value that the driver keeps for this worker, until the handle is dropped."""

    __slots__ = ("_mail", "number")

    def __init__(self, number: int, mail: queue.SimpleQueue[Any]) -> None:
        self.number = number
        self._mail = mail

    def __del__(self) -> None:
        self._mail.put(self.number)  # safe wherever the garbage collector may strike

    def __reduce__(self) -> Any:
        message = "a reference belongs to the process that submitted the work; pass its value on"
        raise TypeError(message)


class WorkerProcessRunner(TaskRunner):
    """Submits to the pool of the driver from within a task; found by `current_worker_runner`.

    Parameters
    ----------
    worker : Worker
        The connection to the driver.
    """

    name = "processes"

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker
        self._info = RunnerInfo(**worker.settings["info"])
        self._functions = FunctionsSent()
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._mail: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._carry, name="penstock-mail", daemon=True).start()

    def start(self) -> None:
        """Do nothing: the pool runs as long as its driver wants it."""

    def stop(self) -> None:
        """Do nothing: the pool belongs to the driver."""

    @property
    def info(self) -> RunnerInfo:
        """What the pool can do."""
        return self._info

    def inside(self) -> str:
        """Tasks of tasks find this very runner."""
        return self.name

    # -- work -----------------------------------------------------------------------------
    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        """Pass the work to the driver's pool."""
        refs = [self._ref(submission.key) for submission in submissions]
        with self._sending:
            try:
                items = [
                    (
                        ref.handle.number,
                        item.key,
                        item.order,
                        *self._functions.pack(_bytes(item.function)),
                        _bytes(item.arguments),
                        [_number(upstream) for upstream in item.refs],
                        item.priority,
                        item.announce,
                    )
                    for ref, item in zip(refs, submissions, strict=True)
                ]
                self._worker.send(("send", items))
            except BaseException:  # a request to stop may have struck between packing and sending
                self._functions.forget()
                raise
        return refs

    def cancel(self, refs: Sequence[Ref], *, force: bool = False) -> list[Key]:
        """Have the driver stop work; see `ProcessPoolTaskRunner.cancel`."""
        keys: list[Key] = self._worker.ask("cancel", [ref.key for ref in refs], force)
        return keys

    def take_back(self, ref: Ref) -> bool:
        """Withdraw work that no worker has got yet."""
        return bool(self._worker.ask("take", ref.key))

    @contextmanager
    def blocked(self, refs: Sequence[Ref]) -> Iterator[None]:
        """Let the pool run one more process while the body waits."""
        self._worker.block()
        try:
            yield
        finally:
            self._worker.unblock()

    # -- values ---------------------------------------------------------------------------
    def put(self, values: Sequence[Any]) -> list[Ref]:
        """Pickle each value once; a large one goes to a file that every process maps."""
        refs = []
        for value in values:
            try:
                packed, nbytes = self._worker.memory.export(value)
            except Exception as error:
                message = f"a value of type {type(value).__name__} cannot be sent to another process: {error}"
                raise errors.UnserializableArgument(message) from error
            ref = self._ref((f"put-{os.getpid()}", next(self._numbers)), nbytes)
            self._worker.send(("put", ref.handle.number, packed, nbytes))
            refs.append(ref)
        return refs

    def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """Map or unpickle values that the driver keeps."""
        packed = self._worker.ask("fetch", [_number(ref) for ref in refs])
        return [fetched(ref, item) for ref, item in zip(refs, packed, strict=True)]

    def release(self, refs: Sequence[Ref]) -> None:
        """Have the driver free values."""
        self._worker.send(("release", [_number(ref) for ref in refs]))

    def _ref(self, key: Key, nbytes: int = 0) -> Ref:
        return Ref(key, WorkerHandle(next(self._numbers), self._mail), nbytes)

    # -- what comes from the driver -------------------------------------------------------
    def arrived(self, reports: list[tuple[Any, ...]]) -> None:
        """Take reports from the receiving thread, which must not wait for anybody."""
        self._mail.put(reports)

    def _carry(self) -> None:
        """Deliver reports, and tell the driver which references were dropped."""
        while True:
            item = self._mail.get()
            dropped = []
            while isinstance(item, int):
                dropped.append(item)
                item = None if self._mail.empty() else self._mail.get()
            if dropped:
                self._worker.send(("release", dropped))
            if item is not None:
                try:
                    self.deliver([Report(*report) for report in item])
                except Exception:  # the session's fault: the next report must still arrive
                    logging.getLogger(__name__).exception("a session failed over a report")


def fetched(ref: Ref, packed: shared_memory.Packed | None) -> Any:
    """Make the value of a reference, for the code that asked for it.

    Raises
    ------
    ResultLost
        If there is none (any more).
    """
    if packed is not None and packed[0] == "failed":
        return Failed(packed[1])
    try:
        if packed is not None:
            return shared_memory.load(packed, private=True)
    except shared_memory.Vanished:
        pass  # somebody has emptied the directory
    message = f"the value of {ref.key} does not exist (any more)"
    raise errors.ResultLost(message)


def _number(ref: Ref) -> int:
    return ref.handle.number if isinstance(ref.handle, WorkerHandle) else -1


def _bytes(content: Any) -> bytes:
    if not isinstance(content, bytes):
        message = f"work for another process is bytes, not {type(content).__name__}"
        raise TypeError(message)
    return content
