"""Ctrl-C and SIGTERM while a flow runs: told apart from what user code raises itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from penstock import errors


class Interrupts:
    """What signals the driver has received during a root flow run."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread; a second signal ends the process at once."""
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if number == signal.SIGTERM:
            raise errors.TerminationSignal
        raise KeyboardInterrupt

    def noting(self, handler: Any) -> Any:
        """Return a handler that takes note of a signal and leaves the rest to another one."""

        def note(number: int, frame: FrameType | None) -> None:
            self.received = number
            handler(number, frame)

        return note


def _is_asyncios(handler: Any) -> bool:
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return type(owner).__module__ == "asyncio.runners"


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Watch for signals in a block; does nothing outside of the main thread."""
    interrupts = Interrupts()
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            present = signal.getsignal(number)
            # A handler that the user installed stays; an ignored signal stays ignored.
            if present in (signal.default_int_handler, signal.SIG_DFL):
                before[number] = signal.signal(number, interrupts)
            elif _is_asyncios(present):  # it cancels the main task; we only take note
                before[number] = signal.signal(number, interrupts.noting(present))
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
