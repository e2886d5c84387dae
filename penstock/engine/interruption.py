"""End the code of a flow from another thread: wherever it computes, sleeps, waits or awaits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from penstock.engine import signals
from penstock.runners import worker_runtime


class Interruption:
    """Where the code of one flow run is, and a way to reach it.

    Attributes
    ----------
    over : Event
        The code has ended.
    """

    def __init__(self) -> None:
        self.over = threading.Event()
        self._gate = threading.Lock()
        self._thread = 0
        self._task: asyncio.Task[object] | None = None
        self._cancels = 0
        self._struck = False

    @contextlib.contextmanager
    def possible(self, awaits: bool) -> Iterator[None]:
        """Allow interruptions in a block, and only in it.

        Parameters
        ----------
        awaits : bool
            The block is run by an event loop.
        """
        self._thread = threading.get_ident()
        self._task = asyncio.current_task() if awaits else None
        try:
            yield
        finally:
            while not self.over.is_set():
                with contextlib.suppress(worker_runtime.Cancelled), self._gate:
                    self._leave()

    def _leave(self) -> None:
        self.over.set()
        if self._struck:
            _raise_in(self._thread, None)  # what was meant for the code must not strike behind it
        if self._task is not None:
            for _ in range(self._cancels):
                self._task.uncancel()

    def interrupt(self) -> None:
        """Raise `worker_runtime.Cancelled` in the code, in a coroutine `asyncio.CancelledError`."""
        with self._gate:
            if self.over.is_set() or not self._thread:
                return
            if self._task is not None:
                self._cancels += 1
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)
                return
            main = self._thread == threading.main_thread().ident
            if not (main and signals.interrupt_main(lambda: not self.over.is_set())):
                self._struck = True
                _raise_in(self._thread, worker_runtime.Cancelled)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    import ctypes  # takes milliseconds, and few runs are cancelled

    wanted = ctypes.py_object(kind) if kind is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), wanted)
