"""What the loss of an attempt means for the number of executions: was the user's function called or not.

An attempt that had begun may have killed its worker, say while its function was loaded; executed is only
what was called. Back ends tell both (`worker.starts`), and of a chunk which place was at its turn.
"""

from __future__ import annotations

from penstock import errors


def was_executed(cause: BaseException, place: int = -1, count: int = 0) -> bool | None:
    """Answer whether a lost attempt of a run was an execution.

    Parameters
    ----------
    cause : Exception
        Why it was lost; what is neither a `CrashedRun` nor a `CancelledRun` tells nothing.
    place : int
        Of the run in the value of the chunk that was lost; -1 if it was alone.
    count : int
        Elements of that chunk; 0 if it has one stage, or nobody knows.

    Returns
    -------
    bool or None
        None if nobody knows.
    """
    if not isinstance(cause, (errors.CrashedRun, errors.CancelledRun)):
        return None
    if not cause.began:
        return cause.began
    if place >= 0:
        if cause.element is None:
            return None
        if cause.element != place:
            return is_before(place, cause.element, count)
    return True if cause.called is None else cause.called


def is_before(place: int, other: int, count: int) -> bool:
    """Whether a place of a chunk has its turn before another: element by element, each through all stages."""
    if not count:
        return place < other
    return (place % count, place // count) < (other % count, other // count)


def spelled(executed: bool | None) -> str:
    """Return the answer of `was_executed` as the record spells it."""
    return {True: "yes", False: "no", None: "unknown"}[executed]
