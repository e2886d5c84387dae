"""Work in the caller's thread, at submit: the reference implementation and a test double."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Self

from penstock.runners.base import Key, Ref, Report, RunnerInfo, Submission, TaskRunner
from penstock.runners.worker.execution import execute
from penstock.runners.worker.interruption import cancel, signal_of
from penstock.runners.worker.sizes import size_of


class SequentialTaskRunner(TaskRunner):
    """Runs each task when it is submitted, in the thread that submits it."""

    name = "sequential"
    in_process = True

    def __eq__(self, other: object) -> bool:
        """Compare: there is nothing to set."""
        return type(other) is type(self)

    def __hash__(self) -> int:
        """Hash by type."""
        return hash(type(self))

    def duplicate(self) -> Self:
        """Return another one."""
        return type(self)()

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    @property
    def info(self) -> RunnerInfo:
        """One worker: this thread."""
        return RunnerInfo("sequential", in_process=True)

    def put(self, values: Sequence[Any]) -> list[Ref]:
        """Share the objects."""
        return [Ref(("put", id(value)), value) for value in values]

    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        """Do the work, then report it."""
        refs = []
        reports = []
        for one in submissions:
            if one.announce:
                self.deliver([Report(one.key, "started")])
            values = [ref.handle for ref in one.refs]
            value, record = execute(
                one.order,
                one.function,
                one.arguments,
                values,
                one.key,
                on_item=functools.partial(self._yielded, one.key),
            )
            refs.append(Ref(one.key, value))
            reports.append(Report(one.key, "ended", record, worker=f"pid {os.getpid()}"))
            error = signal_of(value)
            if error is not None:
                self.deliver(reports)
                raise error  # it was meant for the driver: what has not run yet will not
        self.deliver(reports)
        return refs

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
        """Ask the task that runs now to stop."""
        del force
        cancel([ref.key for ref in refs])
        return []
