"""What an exception means for a flow run: the state in which it ends, and what the record says of it."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from penstock import errors
from penstock.engine.calls import FlowRun
from penstock.engine.states import State, StateType
from penstock.runners.worker.errors import describe_error
from penstock.runners.worker.interruption import Cancelled


def state_of_error(
    error: BaseException,
    run: FlowRun,
    *,
    received: int | None,
    late: bool,
    reason: errors.RunError | None,
) -> State:
    """Conclude from what a flow function, or the start of its run, has raised.

    Parameters
    ----------
    error : BaseException
        What was raised.
    run : FlowRun
        Whose.
    received : int or None
        Number of the signal that the driver has got.
    late : bool
        Its time was over.
    reason : RunError or None
        Who asked from outside for an end.
    """
    if isinstance(error, errors.Skip):
        return State(StateType.SKIPPED, message=str(error))
    if received is not None:
        name = signal.Signals(received).name
        return State(StateType.CANCELLED, message=f"Cancelled by {name}.", data=None)
    if late:
        assert run.deadline is not None
        message = f"Flow run exceeded timeout of {run.deadline.seconds} second(s)"
        timed_out = error if isinstance(error, errors.TaskTimeout) else errors.TaskTimeout(message)
        if timed_out.run_id is None:
            timed_out.of_run(run.id)
        return State(StateType.FAILED, "TimedOut", message, timed_out)
    if (
        reason is not None
        or isinstance(error, Cancelled)
        or (run.cancelled and isinstance(error, (errors.CancelledRun, asyncio.CancelledError)))
    ):
        return stopped(f"Flow run {run.name!r} was cancelled.", reason)
    if isinstance(error, errors.TerminationSignal):
        return State(StateType.CRASHED, message="Execution was aborted by a termination signal.")
    if isinstance(error, KeyboardInterrupt):
        return State(StateType.CRASHED, message="Execution was aborted by an interrupt signal.")
    if isinstance(error, SystemExit):
        return State(StateType.CRASHED, message="Execution was aborted by Python system exit call.")
    if isinstance(error, errors.CrashedRun) and error.final:
        return State(StateType.CRASHED, message=str(error), data=error)
    if type(error).__name__ == "CancelledError" and not isinstance(error, Exception):
        return State(StateType.CRASHED, message="Execution was cancelled by the runtime environment.")
    started = run.type is StateType.RUNNING
    unfit = isinstance(error, (errors.ParameterBindError, errors.ParameterTypeError))
    if not started and not unfit:
        return State(StateType.FAILED, "StartError", f"{type(error).__name__}: {error}", error)
    if not started:
        return State(StateType.FAILED, message=str(error), data=error)
    message = f"Flow run encountered an exception: {type(error).__name__}: {error}"
    return State(StateType.FAILED, message=message, data=error)


def stopped(message: str, reason: errors.RunError | None) -> State:
    """Return the state of a run that was asked to stop: who asked, or else a message."""
    return State(StateType.CANCELLED, message=str(reason or message), data=reason)


def error_of(state: State) -> dict[str, Any]:
    """Describe the exception in a state for the record."""
    if not isinstance(state.data, BaseException):
        return {}
    errors.hide_frames(state.data)
    described = describe_error(state.data)
    return {"error": {name: described[name] for name in ("type", "message", "text")}}
