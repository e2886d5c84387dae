"""Run coroutines of a task: one long-lived loop per worker thread, and threads beside it."""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Iterator
from typing import Any

from .interruption import Cancelled
from .running import RUNNING, shared

CLEANING_SECONDS = 30.0  # that a coroutine which was interrupted may take for its own clean-up

_loops = threading.local()


def run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine on this thread's loop, or on a fresh thread if a loop runs here."""
    import asyncio  # half of what this file costs at the start of a worker

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return in_thread(run_coroutine, coroutine)
    if threading.current_thread() is threading.main_thread():
        # The main thread is the user's: nothing of ours stays open in it between two tasks.
        loop = asyncio.new_event_loop()
        try:
            return _run(loop, coroutine)
        finally:
            loop.close()
    holder = getattr(_loops, "holder", None)
    if holder is None:
        holder = _loops.holder = _Loop()
    return _run(holder.loop, coroutine)


def _run(loop: Any, coroutine: Any) -> Any:
    """Run a coroutine on a loop; while it awaits, a request to stop the attempt reaches it through the loop.

    One that is interrupted in another way cleans up, and leaves nothing on the loop.
    """
    import asyncio

    task = loop.create_task(coroutine)
    running = RUNNING.get()
    if running is not None:
        outer, running.interrupt = running.interrupt, lambda: loop.call_soon_threadsafe(task.cancel)
        if running.cancelled:  # a moment ago: nobody knew of the loop
            task.cancel()
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError:
        if running is not None and running.cancelled:
            raise Cancelled from None
        raise
    finally:
        if running is not None:
            running.interrupt = outer
        if not task.done():
            task.cancel()
            loop.run_until_complete(asyncio.wait([task], timeout=CLEANING_SECONDS))


def steps(generator: Any) -> Iterator[Any]:
    """Yield what a generator yields, also one that is asynchronous; on a loop of its own then."""
    if not hasattr(generator, "__anext__"):
        yield from generator
        return
    import asyncio

    async def step() -> Any:
        return await anext(generator, END)

    loop = asyncio.new_event_loop()
    try:
        while (item := _run(loop, step())) is not END:
            yield item
            del item
        _run(loop, generator.aclose())
    finally:
        loop.close()


END: Any = object()


class _Loop:
    """Closes the loop of a thread when the thread ends."""

    def __init__(self) -> None:
        import asyncio

        self.loop = asyncio.new_event_loop()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.loop.close()


def close_loop() -> None:
    """Close the loop of this thread, which is about to end."""
    holder = _loops.__dict__.pop("holder", None)
    if holder is not None:
        with contextlib.suppress(Exception):  # it runs still, if code in it was struck from outside
            holder.loop.close()


async def draw(generator: Any, take: Any) -> None:
    """Hand on what an asynchronous generator yields."""
    async for item in generator:
        take(item)


def in_thread(function: Any, *args: Any) -> Any:
    """Call a function in a fresh thread and wait; used where this thread's stack is not usable.

    The thread works in a copy of the caller's context. While it waits, the caller does what the
    thread asks it to do by `on_task_thread`.
    """
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    box: list[tuple[Any, BaseException | None]] = []

    def upstairs(ask: Any) -> Any:
        reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put((ask, reply))
        value, error = reply.get()
        if error is not None:
            raise error
        return value

    context = contextvars.copy_context()
    if shared.upstairs.get() is None:
        context.run(shared.upstairs.set, upstairs)

    def target() -> None:
        try:
            box.append((context.run(function, *args), None))
        except BaseException as error:  # handed to the waiting thread
            box.append((None, error))
        close_loop()
        requests.put(None)

    thread = threading.Thread(target=target, name="penstock-hop", daemon=True)
    thread.start()
    while (asked := requests.get()) is not None:
        ask, reply = asked
        try:
            reply.put((ask(), None))
        except BaseException as raised:
            reply.put((None, raised))
    value, error = box[0]
    if error is not None:
        raise error
    return value


def on_task_thread(function: Any) -> Any:
    """Call a function in the thread that the backend gave to the task, and return its value.

    Code of a task may run in another thread, because a stack was deep or an event loop had to stay
    free; some backends know their slots by the thread.
    """
    upstairs = shared.upstairs.get()
    return function() if upstairs is None else upstairs(function)


async def beside_loop(function: Any, *args: Any) -> Any:
    """Call a function in a thread beside the running event loop, and await its value."""
    import asyncio

    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def upstairs(ask: Any) -> Any:
        async def answer() -> Any:
            return ask()

        return asyncio.run_coroutine_threadsafe(answer(), loop).result()

    context = contextvars.copy_context()
    if shared.upstairs.get() is None:
        context.run(shared.upstairs.set, upstairs)

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def target() -> None:
        value, problem = None, None
        try:
            value = context.run(function, *args)
        except BaseException as error:  # handed to the coroutine
            problem = error
        close_loop()
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody waits any more
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=target, name="penstock-hop", daemon=True).start()
    return await done
