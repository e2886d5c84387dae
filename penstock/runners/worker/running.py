"""One attempt while it runs, as the code inside it finds it."""

from __future__ import annotations

import builtins
import contextvars
import sys
import threading
import time
import types
from typing import Any

LOG_LINES = 10_000  # per attempt; further lines are counted, not kept
LOG_LINE_BYTES = 65_536

# One context variable for the whole process, whichever copy of this file was imported.
shared: Any = sys.modules.setdefault("_penstock_running", types.ModuleType("_penstock_running"))
if not hasattr(shared, "running"):
    shared.running = contextvars.ContextVar("penstock_running", default=None)
    shared.upstairs = contextvars.ContextVar("penstock_upstairs", default=None)
    shared.print = builtins.print
RUNNING = shared.running


class Running:
    """One attempt while it runs; `current` finds it from the user's code."""

    def __init__(self, order: dict[str, Any], key: Any = None) -> None:
        self.order = order
        self.key = key
        self.thread = threading.get_ident()
        self.cancelled = False
        self.over = False
        self.logs: list[tuple[float, str, str]] = []
        self.dropped = 0
        self.unlock: Any = None  # gives back the lock of a cache key
        self.stored: Any = None  # what the record says of a stored value that is taken: no function runs
        self.found: Any = None  # that value
        self.called: Any = None  # function, args and kwargs, once the call is about to be made
        self.nested: Any = None  # set by the engine when the task submits tasks of its own
        self.yielded = -1  # items that were handed on one by one
        self.helps = False  # a coroutine of the task does a child beside its event loop
        self.awaits = 0  # coroutines of the task that wait without its slot
        self.gap: Any = None  # what takes the slot again
        self.interrupt: Any = None  # reaches a coroutine that awaits
        self.scope: Any = None  # set by the engine where the driver's objects are at hand

    def log(self, level: str, message: object) -> None:
        """Keep one line for the run's log."""
        if len(self.logs) >= LOG_LINES:
            self.dropped += 1
            return
        text = str(message).replace("\0", "")
        if len(text) > LOG_LINE_BYTES:
            text = f"{text[:LOG_LINE_BYTES]} … ({len(text) - LOG_LINE_BYTES} more characters)"
        self.logs.append((time.time(), level, text.encode("utf-8", "replace").decode()))


def current() -> Any:
    """Return the `Running` of the calling code, or None outside a task."""
    return RUNNING.get()
