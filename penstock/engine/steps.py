"""One engine for sync and async code: a run is a generator of steps, and two short drivers.

The generator decides; what it yields is carried out by `drive`, which blocks, or by
`drive_awaiting`, which awaits. There is no second copy of anything.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import waiting
from penstock.engine.futures import PenstockFuture
from penstock.engine.interruption import Interruption
from penstock.runners.worker.coroutines import in_thread, run_coroutine
from penstock.runners.worker.interruption import TimedOut, interrupted_after

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun


@dataclass(slots=True)
class Invoke:
    """Call the user's function.

    Attributes
    ----------
    function : callable
        Plain or coroutine function.
    args, kwargs
        Its arguments.
    timeout : float or None
        Seconds.
    fresh_stack : bool
        Call it in another thread, because this one's stack is deep.
    name : str
        Of the run, for the message of a time-out.
    interruption : Interruption or None
        By which the code is made to stop.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    fresh_stack: bool = False
    name: str = ""
    interruption: Interruption | None = None


@dataclass(slots=True)
class Wait:
    """Wait until runs have ended, or, with `heed`, until the flow around is to stop."""

    runs: Sequence[TaskRun]
    heed: bool = False


@dataclass(slots=True)
class Sleep:
    """Let time pass, or less if somebody asks the flow to stop."""

    seconds: float
    interruption: Interruption | None = None


class Enough(BaseException):
    """Whoever iterates wants no more; GeneratorExit itself cannot be answered by further steps."""


@dataclass(slots=True)
class Give:
    """Give an item to whoever iterates, and go on when the next one is asked for."""

    item: Any


Steps = Generator[Any, Any, Any]


class _Course:
    """What a generator of steps is told next: how the last step went.

    Parameters
    ----------
    steps : generator
        Not begun.
    """

    __slots__ = ("_steps", "answer", "error")

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.answer: Any = None
        self.error: BaseException | None = None

    def step(self) -> Any:
        """Go on to the next step; StopIteration has what the generator returns."""
        answer, error = self.answer, self.error
        self.answer = self.error = None
        return self._steps.send(answer) if error is None else self._steps.throw(error)


def drive(steps: Steps) -> Any:
    """Carry steps out, blocking, and return what the generator returns."""
    course = _Course(steps)
    while True:
        try:
            step = course.step()
        except StopIteration as stop:
            return stop.value
        try:
            course.answer = _carry_out(step)
        except BaseException as raised:  # handed to the generator, which decides
            course.error = raised


def drive_giving(steps: Steps) -> Iterator[Any]:
    """Carry steps out, blocking, while the caller draws what they give."""
    course = _Course(steps)
    while True:
        try:
            step = course.step()
        except StopIteration:
            return
        try:
            if isinstance(step, Give):
                yield step.item
            else:
                course.answer = _carry_out(step)
        except GeneratorExit:
            course.error = Enough()
        except BaseException as raised:
            course.error = raised


async def drive_giving_awaiting(steps: Steps) -> AsyncIterator[Any]:
    """Carry steps out without blocking the event loop, while the caller draws what they give."""
    course = _Course(steps)
    while True:
        try:
            step = course.step()
        except StopIteration:
            return
        try:
            if isinstance(step, Give):
                yield step.item
            else:
                course.answer = await _carry_out_awaiting(step)
        except GeneratorExit:
            course.error = Enough()
        except BaseException as raised:
            course.error = raised


def _carry_out(step: Any) -> Any:
    if isinstance(step, Wait):
        waiting.wait(step.runs, heed=step.heed)
        return None
    if isinstance(step, Sleep):
        if step.interruption is not None:
            step.interruption.sleep(step.seconds)
        else:
            time.sleep(step.seconds)
        return None
    call = step.function
    if step.fresh_stack:
        value = in_thread(_called(call), step.args, step.kwargs)
    else:
        begun = time.monotonic()
        try:
            with interrupted_after(step.timeout, step.name):
                if step.interruption is not None:
                    value = step.interruption.call(call, step.args, step.kwargs)
                else:
                    value = call(*step.args, **step.kwargs)
        except TimedOut as error:
            if step.timeout is None or time.monotonic() - begun < step.timeout:
                raise  # the time of what surrounds this call
            raise _timed_out(step.name, step.timeout) from error
        if step.timeout is not None and time.monotonic() - begun > step.timeout:  # not interruptible here
            raise _timed_out(step.name, step.timeout)
    if inspect.iscoroutine(value):  # a sync function that returns an awaitable has it run to the end
        value = run_coroutine(value)
    return value


def _called(call: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda args, kwargs: call(*args, **kwargs)


async def drive_awaiting(steps: Steps) -> Any:
    """Carry steps out without blocking the event loop."""
    course = _Course(steps)
    while True:
        try:
            step = course.step()
        except StopIteration as stop:
            return stop.value
        try:
            course.answer = await _carry_out_awaiting(step)
        except BaseException as raised:
            course.error = raised


async def _carry_out_awaiting(step: Any) -> Any:
    if isinstance(step, Wait):
        for run in step.runs:
            await PenstockFuture(run).settled()
        return None
    if isinstance(step, Sleep):
        if step.interruption is not None:
            return await step.interruption.await_sleep(step.seconds)
        return await asyncio.sleep(step.seconds)
    return await _await_call(step)


async def _await_call(step: Invoke) -> Any:
    try:
        async with asyncio.timeout(step.timeout) as limit:
            if step.interruption is not None:
                return await step.interruption.await_call(step.function, step.args, step.kwargs)
            value = step.function(*step.args, **step.kwargs)
            return await value if inspect.isawaitable(value) else value
    except TimeoutError as error:
        if limit.expired():
            raise _timed_out(step.name, step.timeout) from error
        raise


def _timed_out(name: str, seconds: float | None) -> errors.TaskTimeout:
    return errors.TaskTimeout(f"Run {name!r} exceeded timeout of {seconds} second(s)")
