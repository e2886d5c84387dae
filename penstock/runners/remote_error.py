"""The error of a run as it came from a worker, and the exception that it becomes."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from types import CodeType, FrameType, TracebackType
from typing import Any

from penstock import errors


class Failure:
    """The error of a run as it came from a worker; becomes an exception when somebody asks."""

    __slots__ = ("_error", "record", "where")

    def __init__(self, record: dict[str, Any], where: str, error: BaseException | None = None) -> None:
        self.record = record
        self.where = where
        self._error = error

    @property
    def text(self) -> str:
        """The message of the exception."""
        return str(self.record.get("message", ""))

    def exception(self, run_id: str) -> BaseException:
        """Return the user's own exception, or a `FailedRun` with its text if it cannot be made."""
        if self._error is None:
            self._error = self._load(run_id)
        return self._error

    def _load(self, run_id: str) -> BaseException:
        data = self.record.get("pickle")
        error: BaseException | None = None
        if data is not None:
            try:
                loaded = pickle.loads(data)
                error = loaded if isinstance(loaded, BaseException) else None
            except Exception:  # its class cannot be made here: the text has to do
                error = None
        if error is None:
            kind, text = self.record.get("type", "Exception"), self.record.get("text", "")
            error = errors.FailedRun(f"{kind}: {self.text}\n{text}".rstrip()).of_run(run_id)
        if isinstance(error, errors.RunError) and error.run_id is None:
            error.of_run(run_id)
        error.__traceback__ = rebuild_traceback(self.record.get("frames", ()))
        if self.where:
            error.add_note(self.where)
        return error


def rebuild_traceback(frames: Iterable[tuple[str, int, str]]) -> TracebackType | None:
    """Make a traceback that shows the lines of the user's code on the worker.

    Parameters
    ----------
    frames : iterable of (str, int, str)
        File, line and function, outermost first.
    """
    head: TracebackType | None = None
    for filename, line, name in reversed(list(frames)):
        frame = _frame(_CODE.replace(co_filename=filename, co_name=name, co_firstlineno=line))
        head = TracebackType(head, frame, 0, line)
    return head


_CODE: CodeType = compile("raise _Mark", "<worker>", "exec")


class _Mark(Exception):
    pass


def _frame(code: CodeType) -> FrameType:
    try:
        exec(code, {"_Mark": _Mark, "__name__": "worker"})  # noqa: S102 - our own constant code
    except _Mark as mark:
        trace = mark.__traceback__
        assert trace is not None and trace.tb_next is not None  # noqa: PT018 - just raised
        return trace.tb_next.tb_frame
    raise AssertionError  # pragma: no cover
