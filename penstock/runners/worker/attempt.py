"""The frame around user code: begins an attempt, waits for its children, writes its record."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from .commit import commit, commit_of
from .errors import describe_error, note_inputs
from .failure import Failed
from .interruption import Cancelled, enter, leave
from .record import made_by_hand, status_of, write_record
from .running import RUNNING, Running


class Attempt:
    """The frame around user code: ``with attempt: attempt.value = function(...)``.

    It never raises what the block raised; `outcome` holds ``(value, record)`` afterwards. Code
    that has to await fills `value` itself.
    """

    def __init__(self, order: Any, key: Any = None, scope: Any = None) -> None:
        self.running = Running(order, key)
        self.running.scope = scope or self.running.order.get("scope")
        self.value: Any = None
        self.error: BaseException | None = None
        self.outcome: Any = None

    def not_started(self) -> tuple[Any, bytes]:
        """Answer for an attempt whose upstream has no value."""
        record = write_record(self.running, {"status": "upstream"}, time.time(), 0.0)
        return Failed(record), record

    def __enter__(self) -> Any:
        # What is no task has no run that the user's code could ask for, or submit into.
        self._token = RUNNING.set(None if "plain" in self.running.order else self.running)
        self._started, self._clock = time.time(), time.perf_counter()
        try:  # last: a request to stop that strikes before the block would pass `__exit__` by
            enter(self.running)
        except Cancelled:
            self.running.cancelled = True
        return self

    def pause(self) -> None:
        """Let other code run for a while that is no part of the attempt."""
        with contextlib.suppress(ValueError):
            RUNNING.reset(self._token)

    def resume(self) -> None:
        """Go on with the attempt."""
        self._token = RUNNING.set(self.running)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        running = self.running
        while not running.over:
            try:
                leave(running)
            except BaseException as raised:  # a request to stop that came in the last moment
                error = error or raised
        self.value, error, details = finished(running, self.value, error)
        seconds = time.perf_counter() - self._clock
        with contextlib.suppress(ValueError):  # a coroutine may end in another context
            RUNNING.reset(self._token)
        self.error = error
        record = write_record(running, details, self._started, seconds, self.value)
        self.outcome = (self.value if error is None else Failed(record, error), record)
        return True


def finished(
    running: Running, value: Any, error: BaseException | None
) -> tuple[Any, BaseException | None, dict[str, Any]]:
    """Do what is due when user code has ended: wait for its children, look at what it returned.

    Returns
    -------
    tuple
        The value, the error, and what the record says besides times and sizes.
    """
    children = noted = None
    if running.nested is not None:
        try:
            value = running.nested.finish(value, error)
        except BaseException as raised:
            error = error or raised
        noted = running.nested.values()
        children = running.nested.events()
    details: dict[str, Any] = {"status": "completed" if error is None else status_of(error, running)}
    if error is None:
        value, state = made_by_hand(value)
        if state is not None:
            details["state"] = state
        if state is None or state["type"] == "COMPLETED":
            value, error = _kept(running, value, details)
    if running.unlock is not None:
        running.unlock()
    if error is not None:
        value = None
        if details["status"] == "failed":
            note_inputs(error, running)
        details["error"] = describe_error(error)
    if "naming" in running.order:
        details["named"] = running.order["name"]
    if running.logs:
        details["logs"] = running.logs
    if running.dropped:
        details["dropped"] = running.dropped
    if children:
        details["children"] = children
    if noted:
        details["values"] = noted
    if running.yielded >= 0:
        details["yielded"] = running.yielded
    return value, error, details


def _kept(running: Running, value: Any, details: dict[str, Any]) -> tuple[Any, BaseException | None]:
    """Store the value, if it is to be: before the record is made, so that what completed is stored."""
    stored = running.stored
    if stored is None:
        try:
            value, stored = commit(value, *commit_of(running.order))
        except BaseException as raised:
            details.pop("state", None)
            details["status"] = status_of(raised, running)
            return None, raised
    if stored is not None:
        details["stored"] = stored
    return value, None
