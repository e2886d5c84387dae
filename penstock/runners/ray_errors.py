"""What the errors of Ray mean in our words; none of them reaches the engine."""

from __future__ import annotations

from typing import Any

from ray import exceptions

from penstock import errors


def never_ran(answer: Any) -> bool:
    """Whether Ray dropped a task by itself; one that ran writes down that it was cancelled."""
    return isinstance(answer, exceptions.TaskCancelledError) and not is_propagated(answer)


def is_propagated(error: Any) -> bool:
    """Whether Ray passes on what happened to an argument (our own function raises nothing)."""
    return isinstance(error, exceptions.RayTaskError)


def neutral(error: Any) -> errors.RunError:
    """Turn an error of Ray into one of ours."""
    if isinstance(error, exceptions.TaskCancelledError):
        return errors.CancelledRun("the task was cancelled.")
    if isinstance(error, exceptions.OutOfMemoryError):
        return errors.OutOfMemory(f"the worker was ended, since memory ran out: {first_words(error, 2)}")
    if isinstance(error, exceptions.NodeDiedError):
        return errors.WorkerLost(f"the node that ran the task died: {first_words(error)}")
    if isinstance(error, exceptions.WorkerCrashedError):
        return errors.WorkerLost(
            "the worker process that ran the task died (killed, out of memory, or it crashed); "
            "the logs of Ray name the signal or exit code."
        )
    if isinstance(error, exceptions.ObjectLostError):
        gone = errors.ResultLost(f"a value is gone: {first_words(error)}")
        gone.began = False
        return gone
    if isinstance(error, exceptions.LocalRayletDiedError):
        lost = errors.SchedulerLost("Ray's own process on this machine died.")
        lost.final = True  # this process is a part of that Ray: there is no way back
        return lost
    return errors.WorkerLost(f"Ray could not run the task: {first_words(error)}")


def first_words(error: Any, sentences: int = 1) -> str:
    """Return the beginning of a message: those of Ray go on for a page."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if line), type(error).__name__)
    return ". ".join(line.split(". ")[:sentences])[:500]
