"""Ctrl-C and SIGTERM while a flow runs: told apart from what user code raises itself."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from penstock import errors
from penstock.engine import kernel
from penstock.engine.clock import clock
from penstock.runners.worker.interruption import Cancelled

AGAIN = 0.5  # seconds after which a signal that nobody heard is raised once more


class Interrupts:
    """What signals the driver has received during a root flow run.

    Attributes
    ----------
    received : int or None
        The signal.
    heard : bool
        The flow run is stopping because of it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.heard = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread; a signal while the flow is stopping ends the process at once."""
        del frame
        if _wanted:
            if _wanted.pop()():  # nobody sent a signal: code in this thread is to end
                raise Cancelled
            return
        if self.heard and kernel.is_here():
            return  # the flow ends soon, the kernel does not
        if self.heard:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        # An exception that strikes in a destructor or an import lock is swallowed by Python.
        clock.call_later(AGAIN, self._insist)
        raise self.exception()

    def _insist(self) -> None:
        if self.heard or self.received is None:
            return
        handler: Any = signal.getsignal(self.received)
        if handler is self:
            signal.pthread_kill(threading.main_thread().ident or 0, self.received)

    def exception(self) -> BaseException:
        """Return what the signal raises in the user's code."""
        return errors.TerminationSignal() if self.received == signal.SIGTERM else KeyboardInterrupt()

    def noting(self, handler: Any) -> Any:
        """Return a handler that takes note of a signal and leaves the rest to another one."""

        def note(number: int, frame: FrameType | None) -> None:
            self.received = number
            handler(number, frame)
            # The handler of a notebook's cell puts a call into the loop, but the loop sleeps on.
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_soon_threadsafe(lambda: None)

        return note


_wanted: list[Callable[[], bool]] = []


def interrupt_main(still: Callable[[], bool]) -> bool:
    """Raise `Cancelled` in the main thread, also in a system call that blocks.

    Parameters
    ----------
    still : callable
        Called in the main thread: whether it is still in the code that is to end.

    Returns
    -------
    bool
        False if the handlers are not ours, so that nothing was done.
    """
    if not isinstance(signal.getsignal(signal.SIGINT), Interrupts):
        return False
    _wanted[:] = [still]
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    return True


def _is_asyncios(handler: Any) -> bool:
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return type(owner).__module__ == "asyncio.runners"


@contextmanager
def watched(*, blocks: bool = True) -> Iterator[Interrupts]:
    """Watch for signals in a block; does nothing outside of the main thread.

    Parameters
    ----------
    blocks : bool
        The block runs sync code: while it does, no event loop can react to a signal.
    """
    interrupts = Interrupts()
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            present = signal.getsignal(number)
            # A handler that the user installed stays; an ignored signal stays ignored.
            of_cell = kernel.is_its_handler(present)
            if present in (signal.default_int_handler, signal.SIG_DFL) or (of_cell and blocks):
                before[number] = signal.signal(number, interrupts)
            elif of_cell or _is_asyncios(present):
                # It cancels the task of the loop; we only take note.
                before[number] = signal.signal(number, interrupts.noting(present))
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@atexit.register
def _end_by_signal() -> None:
    """End the process by the signal that ended its main code, as a shell expects (130, 143).

    Python does so itself, but forgets the signal if code is compiled during the exit, which
    closing a cluster may do. Registered early, hence called late.
    """
    kind = getattr(sys, "last_type", None)  # what the main code ended with, if nobody caught it
    numbers: dict[Any, signal.Signals] = {
        KeyboardInterrupt: signal.SIGINT,
        errors.TerminationSignal: signal.SIGTERM,
    }
    number = numbers.get(kind)
    if number is None or threading.current_thread() is not threading.main_thread():
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
