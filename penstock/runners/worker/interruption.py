"""How code that runs is stopped: cancelled from another thread, out of time, or by a signal."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from .failure import Failed
from .running import Running

HEARING_SECONDS = 0.5  # that a coroutine has to hear of a request to stop at an await
AGAIN_SECONDS = 0.005  # until a request to stop that was swallowed is made again


class Cancelled(BaseException):
    """Raised in the thread of a task that was asked to stop."""


class TimedOut(Exception):
    """Raised in code that exceeded its time, where it can be interrupted."""


@contextlib.contextmanager
def interrupted_after(seconds: float | None, name: Any) -> Iterator[None]:
    """Interrupt the block after a time; only the main thread of a process can be interrupted."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: Any) -> None:
        raise TimedOut(f"Run {name!r} exceeded timeout of {seconds} second(s)")

    ring.rings = True  # type: ignore[attr-defined] # marks it for `_ring_again`
    hear_swallowed()
    if 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= seconds:  # the time around this one is over first
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    begun = time.monotonic()
    due, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if due:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(due - (time.monotonic() - begun), 1e-3), interval)


def is_signal(error: BaseException) -> bool:
    """Whether an exception came from a signal to the driver, in whose main thread a task ran.

    The engine's handler has an attribute ``received`` that notes a signal; where none was
    noted, a KeyboardInterrupt is the task's own.
    """
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    handlers = (signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
    return any(getattr(handler, "received", None) is not None for handler in handlers)


def signal_of(value: Any) -> BaseException | None:
    """Return the exception in a value that came from a signal to the driver, see `is_signal`."""
    errors = [one.error for one in (value if isinstance(value, list) else [value]) if isinstance(one, Failed)]
    return next((error for error in errors if error is not None and is_signal(error)), None)


_active: dict[Any, Running] = {}
_unwanted: OrderedDict[Any, bool] = OrderedDict()  # keys cancelled before they started
_active_lock = threading.Lock()


def enter(running: Running) -> None:
    """User code is about to begin: from here on `cancel` finds it."""
    if running.key is None:
        return
    with _active_lock:
        running.cancelled = _unwanted.pop(running.key, False)
        _active[running.key] = running


def leave(running: Running) -> None:
    """The user's code has ended: from here on no request to stop may reach this thread."""
    with _active_lock:
        if running.key is not None:
            _active.pop(running.key, None)
        if running.cancelled:  # take back a request that has not been delivered yet
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(running.thread), None)
        running.over = True  # last: whoever is struck in here has to come again


class Stoppable:
    """A block of this thread that `cancel` can stop, and that is no attempt of a task.

    Parameters
    ----------
    key : tuple
        Its name for `cancel`.
    """

    def __init__(self, key: Any) -> None:
        self.running = Running({}, key)

    def __enter__(self) -> None:
        enter(self.running)
        if self.running.cancelled:
            self.__exit__()
            raise Cancelled

    def __exit__(self, *_: object) -> None:
        raised: BaseException | None = None
        while not self.running.over:
            try:
                leave(self.running)
            except Cancelled as error:  # a request to stop that came in the last moment
                raised = error
        if raised is not None:
            raise raised


def cancel(keys: Any) -> list[Any]:
    """Ask attempts in this process to stop.

    Parameters
    ----------
    keys : list of tuple
        Attempts; those that have not started yet will not run their function.

    Returns
    -------
    list of tuple
        The keys that are running in this process now.
    """
    found = []
    hear_swallowed()
    with _active_lock:
        for key in map(tuple, keys):
            running = _active.get(key)
            if running is None:
                _unwanted[key] = True
                while len(_unwanted) > 100_000:
                    _unwanted.popitem(last=False)
                continue
            found.append(key)
            running.cancelled = True
            if running.interrupt is not None:  # it may await, which is a C call
                with contextlib.suppress(RuntimeError):  # its loop has ended
                    running.interrupt()
                later = (running.thread, HEARING_SECONDS)
                threading.Thread(target=_stop_again, args=later, daemon=True).start()
                continue
            # Acts between two bytecodes: code in a C call ends only when that call returns.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(running.thread), ctypes.py_object(Cancelled)
            )
    return found


_swallowed = False  # whether `hear_swallowed` has been called


def hear_swallowed() -> None:
    """Send requests to stop again that struck where Python drops every exception.

    Such places are callbacks of the garbage collector and `__del__`: they end there, and the code
    around them goes on as if nobody had asked.
    """
    global _swallowed
    if _swallowed:
        return
    _swallowed = True
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, (Cancelled, TimedOut)):
            before(dropped)
            return
        # Another thread has to do it: here it would strike in the same place.
        again = _stop_again if issubclass(dropped.exc_type, Cancelled) else _ring_again
        threading.Thread(target=again, args=(threading.get_ident(),), daemon=True).start()

    sys.unraisablehook = hook


def _stop_again(thread: int, after: float = AGAIN_SECONDS) -> None:
    time.sleep(after)
    with _active_lock:
        if any(one.thread == thread and one.cancelled for one in _active.values()):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Cancelled))


def _ring_again(_thread: int) -> None:
    if getattr(signal.getsignal(signal.SIGALRM), "rings", False):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
