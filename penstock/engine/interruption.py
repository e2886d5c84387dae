"""The code of a flow while it runs, and how it is made to stop.

It hears of a request at its next call to penstock, or while it waits there. Code that does neither is
interrupted after a moment, and again until it has ended: a coroutine at its next await, a thread between
two bytecodes, the main thread also where it sleeps. Elsewhere a call into C ends when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from penstock.engine import signals
from penstock.engine.clock import clock
from penstock.runners.worker.interruption import Cancelled, Stoppable, cancel
from penstock.runners.worker.running import Running

MOMENT = 0.2  # seconds that code has to hear of the request by itself
AGAIN = 2.0  # seconds after which code that goes on regardless is interrupted once more

_numbers = itertools.count()


class _Stacks(threading.local):
    """The flows whose code runs in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Interruption] = []


_here = _Stacks()


class Interruption:
    """One call of a flow's function."""

    def __init__(self) -> None:
        self._key = ("flow", next(_numbers))
        self._stack: list[Interruption] | None = None  # that of the thread in which sync code runs
        self._code: Running | None = None  # sync code
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancels = 0
        self.asked = False
        self._woken = threading.Event()
        self._waiter: asyncio.Future[None] | None = None

    def ask(self) -> None:
        """Make the code stop, from any thread."""
        self.asked = True
        self._woken.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the code
                self._loop.call_soon_threadsafe(self._cancel)
        else:
            clock.call_later(MOMENT, self._strike)

    def reset(self) -> None:
        """Forget a request: the code is tried again."""
        self.asked = False
        self._woken.clear()

    def sleep(self, seconds: float) -> None:
        """Let time pass between two attempts."""
        self._woken.wait(seconds)

    async def await_sleep(self, seconds: float) -> None:
        """Let time pass between two attempts, without blocking the loop."""
        self._loop = asyncio.get_running_loop()
        self._waiter = self._loop.create_future()
        try:
            if not self.asked:
                await asyncio.wait_for(self._waiter, seconds)
        except TimeoutError:
            return
        finally:
            self._waiter = None

    def _cancel(self) -> None:
        if self._task is not None and self._loop is not None and self.asked:
            self._task.cancel()
            self._cancels += 1
            self._loop.call_later(AGAIN, self._cancel)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _strike(self) -> None:
        stack = self._stack
        if stack is None or self not in stack or not self.asked:
            return
        inner = stack[-1] is self  # else a nested flow has to end first
        code = self._code
        if inner and code is not None and not code.over:
            main = code.thread == threading.main_thread().ident
            if not (main and signals.interrupt_main(lambda: not code.over and stack[-1] is self)):
                cancel([self._key])
        clock.call_later(AGAIN if inner else MOMENT, self._strike)

    @contextlib.contextmanager
    def nested(self) -> Iterator[None]:
        """From here on nothing around this flow is interrupted in this thread, until the block ends."""
        stack = _here.stack
        self._stack = stack
        stack.append(self)
        try:
            yield
        finally:
            stack.remove(self)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call sync code."""
        if self.asked:
            raise Cancelled
        block = Stoppable(self._key)
        with block:
            self._code = block.running
            return function(*args, **kwargs)

    async def await_call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call async code in this loop."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            if self.asked:
                raise Cancelled
            return await function(*args, **kwargs)
        except asyncio.CancelledError:
            if not self.asked or self._task is None:
                raise
            raise Cancelled from None
        finally:
            task, self._task = self._task, None
            while self._cancels and task is not None:
                self._cancels -= 1
                task.uncancel()  # it was meant for this flow, not for the code that awaits it
