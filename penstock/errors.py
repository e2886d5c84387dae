"""Every error that penstock raises, in one tree.

::

    PenstockError
    ├── ConfigurationError            a setting, an option or a runner's name cannot be used
    │   ├── MissingExtra              a library is not installed; the message holds the pip line
    │   └── RunnerUnavailable         a cluster does not answer, or its versions do not fit
    ├── StoreUnavailable              the record cannot be read or written now
    │   └── StoreDamaged              … nor later: its file is broken
    ├── ParameterBindError            (TypeError)   arguments do not fit the signature
    ├── ParameterTypeError            (TypeError)   a flow parameter failed validation
    ├── ReservedArgumentError         (TypeError)   a parameter has a name that penstock uses
    ├── InvalidNameError              (ValueError)  a name holds a forbidden character
    ├── MappingMissingIterable        (TypeError)   `.map` got nothing to iterate over
    ├── MappingLengthMismatch         (ValueError)  `.map` got iterables of unequal length
    ├── MissingContextError           (RuntimeError) something needs a running flow or task
    ├── UnserializableArgument        (TypeError)   an argument cannot be sent to another process
    ├── UnserializableResult          (TypeError)   a result cannot be sent, or does not fit the format to store it in
    ├── NestingTooDeep                (RecursionError) tasks submit tasks without an end
    └── RunError                      a run did not end well; carries the run
        ├── FailedRun                 user code failed and left no exception that can be raised here
        ├── CrashedRun                the infrastructure failed
        │   ├── WorkerLost            the process that ran the task died
        │   ├── OutOfMemory           … because it used more memory than it may
        │   ├── ResultLost            a finished result is gone, with the worker that held it
        │   ├── SchedulerLost         the scheduler or head of the cluster died
        │   └── BackendStalled        the cluster no longer answers
        ├── ResultTooLarge            a result does not fit where it was made
        ├── TaskTimeout               (TimeoutError) a run exceeded its `timeout_seconds`
        ├── CancelledRun              somebody asked for the run to stop
        ├── RunOwnedElsewhere         another driver has taken the run
        ├── ResumeDiverged            a run that is resumed asks for other things than before
        ├── PausedRun                 the run waits for somebody
        ├── UnfinishedRun             the run has no result yet, or will never start
        ├── UpstreamTaskError         `.map` over a future whose task did not complete
        ├── StorageRefused            the storage of results cannot be written to or read from
        ├── MissingResult             the run completed, but its value is not stored anywhere
        └── ResultCorrupt             a stored result is damaged; it was set aside, and is never loaded

    Skip                              control flow: ``raise Skip("why")`` ends a run as SKIPPED
    TerminationSignal                 (BaseException) SIGTERM reached the driver

Errors cross machines, so each one survives pickling with its message and its attributes.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from types import TracebackType

__all__ = [
    "BackendStalled",
    "CancelledRun",
    "ConfigurationError",
    "CrashedRun",
    "FailedRun",
    "InvalidNameError",
    "MappingLengthMismatch",
    "MappingMissingIterable",
    "MissingContextError",
    "MissingExtra",
    "MissingResult",
    "NestingTooDeep",
    "OutOfMemory",
    "ParameterBindError",
    "ParameterTypeError",
    "PausedRun",
    "PenstockError",
    "ReservedArgumentError",
    "ResultCorrupt",
    "ResultLost",
    "ResultTooLarge",
    "ResumeDiverged",
    "RunError",
    "RunOwnedElsewhere",
    "RunnerUnavailable",
    "SchedulerLost",
    "Skip",
    "StorageRefused",
    "StoreDamaged",
    "StoreUnavailable",
    "TaskTimeout",
    "TerminationSignal",
    "UnfinishedRun",
    "UnserializableArgument",
    "UnserializableResult",
    "UpstreamTaskError",
    "WorkerLost",
]


class PenstockError(Exception):
    """Base of all errors of penstock."""


class ConfigurationError(PenstockError):
    """A setting, an option or the name of a runner cannot be used."""


class MissingExtra(ConfigurationError):
    """A library that a feature needs is not installed; the message holds the pip line."""


class RunnerUnavailable(ConfigurationError):
    """A cluster does not answer, or its versions do not fit the driver's."""


class StoreUnavailable(PenstockError):
    """The record cannot be read or written now; what runs tell waits in their spools."""


class StoreDamaged(StoreUnavailable):
    """The file of the record is broken; the message says how to go on."""


class ParameterBindError(PenstockError, TypeError):
    """The arguments of a call do not fit the signature of the function."""


class ParameterTypeError(PenstockError, TypeError):
    """A parameter of a flow failed validation."""


class ReservedArgumentError(PenstockError, TypeError):
    """A function has a parameter whose name penstock uses itself."""


class InvalidNameError(PenstockError, ValueError):
    """A name of a flow or task holds a character that is not allowed."""


class MappingMissingIterable(PenstockError, TypeError):
    """`.map` was called without anything to iterate over."""


class MappingLengthMismatch(PenstockError, ValueError):
    """`.map` was called with iterables of unequal length."""


class MissingContextError(PenstockError, RuntimeError):
    """Something was asked for that exists only inside a flow or task run."""


class UnserializableArgument(PenstockError, TypeError):
    """An argument cannot be sent to another process."""


class UnserializableResult(PenstockError, TypeError):
    """A result cannot be sent to another process, or does not fit the format in which to store it."""


class NestingTooDeep(PenstockError, RecursionError):
    """Tasks submit tasks deeper than ``PENSTOCK_TASKS_MAX_NESTING`` allows."""


class RunError(PenstockError):
    """A run did not end well.

    Attributes
    ----------
    run_id : str or None
        The run that the error is about.
    """

    run_id: str | None = None

    def of_run(self, run_id: str | None) -> RunError:
        """Name the run that the error is about and return the error itself."""
        self.run_id = run_id
        return self


class FailedRun(RunError):
    """User code failed, and its exception cannot be raised here."""


class CrashedRun(RunError):
    """The infrastructure failed while the run was in its hands.

    Attributes
    ----------
    began : bool or None
        Whether the attempt had begun, if only to load its function: it may be to blame. None if nobody knows.
    called : bool or None
        Whether the function of the attempt had been called; None if nobody knows.
    shared : int
        How many other tasks that had begun were lost with it, any of which may be to blame.
    element : int or None
        Of a chunk that was lost: which place of its value was at its turn; None if nobody knows.
    excused : bool
        The process was ended in good order: the run goes on elsewhere, at no cost.
    final : bool
        Trying again is pointless: the backend is gone.
    """

    began: bool | None = None
    called: bool | None = None
    excused: bool = False
    shared: int = 0
    element: int | None = None
    final: bool = False


class WorkerLost(CrashedRun):
    """The process that ran the task died."""


class OutOfMemory(CrashedRun):
    """The process that ran the task was ended because it used too much memory."""


class ResultLost(CrashedRun):
    """A finished result is gone, with the worker that held it."""


class SchedulerLost(CrashedRun):
    """The scheduler or head of the cluster died."""


class BackendStalled(CrashedRun):
    """The cluster no longer answers."""


class ResultTooLarge(RunError):
    """A result is larger than its worker, or the disk beside it, can keep."""


class TaskTimeout(RunError, TimeoutError):
    """A run exceeded its `timeout_seconds`."""


class CancelledRun(RunError):
    """Somebody asked for the run to stop.

    Attributes
    ----------
    began, called, element
        As those of a `CrashedRun`, where the process was ended to stop it.
    """

    began: bool | None = None
    called: bool | None = None
    element: int | None = None


class RunOwnedElsewhere(RunError):
    """Another driver owns the run: it is alive, or it took the run when this one was presumed dead."""


class ResumeDiverged(RunError):
    """A run that is resumed asks for other things than it did before; the message names the first one."""


class PausedRun(RunError):
    """The run waits for somebody."""


class UnfinishedRun(RunError):
    """The run has no result yet, or its upstream failed and it will never start."""


class UpstreamTaskError(RunError):
    """`.map` was given a future whose task did not complete."""


class StorageRefused(RunError):
    """The storage of results cannot be written to or read from."""


class MissingResult(RunError):
    """The run completed, but its value is not stored anywhere."""


class ResultCorrupt(RunError):
    """A stored result is damaged; it was set aside as ``*.corrupt``, and is never loaded."""


class Skip(PenstockError):
    """Raise it in a task or flow to end the run as SKIPPED; the text is the reason.

    Attributes
    ----------
    run_id : str or None
        The run that skipped itself, where the skip was passed on from another.
    """

    run_id: str | None = None


class TerminationSignal(BaseException):
    """The driver received SIGTERM."""


_PACKAGE = str(Path(__file__).parent) + "/"
_DEMO = str(Path(__file__).parent / "demo") + "/"
_LIBRARIES = tuple({path for name in ("stdlib", "purelib", "platlib") if (path := sysconfig.get_path(name))})


hides_frames = True
"""Whether `hide_frames` does anything; off in debug mode."""


def hide_frames(error: BaseException) -> None:
    """Drop penstock's own frames from the traceback of an error, and of its causes.

    A user reads a traceback to find a line of their own. Call it in an ``except`` block that
    ends with a bare ``raise``: Python then adds no frame for the raising function.

    Parameters
    ----------
    error : BaseException
        Changed in place. An error without a single frame of the user keeps all its frames,
        since then they are the only clue.
    """
    if not hides_frames:
        return
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        current.__traceback__ = _users_frames(current.__traceback__)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _users_frames(traceback: TracebackType | None) -> TracebackType | None:
    kept: list[TracebackType] = []
    ours = False  # libraries that penstock calls are as little the user's as penstock itself
    step = traceback
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        if filename.startswith(_PACKAGE) and not filename.startswith(_DEMO):
            ours = True
        elif not (ours and filename.startswith(_LIBRARIES)):
            ours = False
            kept.append(step)
        step = step.tb_next
    head: TracebackType | None = None
    for frame in reversed(kept):
        head = TracebackType(head, frame.tb_frame, frame.tb_lasti, frame.tb_lineno or 0)
    return head
