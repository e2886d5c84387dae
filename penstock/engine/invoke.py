"""From a call to a work order, and from a worker's record to what it means here."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import payload, refs
from penstock.engine.calls import Call, Source, TaskRun
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.refs import Slot
from penstock.runners.base import Submission

if TYPE_CHECKING:
    from penstock.engine.context import Scope
    from penstock.engine.session import Session
    from penstock.engine.task import Task


class Bound:
    """Arguments for a runner in this process: shares objects, fills the slots in when it is time."""

    __slots__ = ("args", "kwargs", "slots")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], slots: int) -> None:
        self.args = args
        self.kwargs = kwargs
        self.slots = slots

    def __call__(self, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the upstream values in place."""
        if not self.slots:
            return self.args, self.kwargs
        return tuple(refs.fill(list(self.args), values)), refs.fill(self.kwargs, values)


class Caller:
    """Makes the calls of one submit or one map; large arguments are placed once for all of them.

    Parameters
    ----------
    session : Session
        Who will carry them.
    task : Task
        What is called.
    scope : Scope
        What surrounds the caller.
    local : bool
        The call will not leave this process.
    """

    def __init__(self, session: Session, task: Task[..., Any], scope: Scope, *, local: bool = False) -> None:
        self.session = session
        self.task = task
        self.local = local or session.in_process
        self.context = session.context_of(scope)
        self.function = task.fn if self.local else session.function(task)
        self._placed: dict[int, Source] = {}
        self._kept: list[Any] = []  # an id is only good while its object lives

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], after: tuple[Source, ...] = ()) -> Call:
        """Capture one invocation: small arguments are pickled now, large ones placed.

        Raises
        ------
        UnserializableArgument
            Naming the parameter.
        """
        sources: list[Source] = []
        positions: dict[int, Slot] = {}
        session = self.session

        def leaf(value: Any, tolerant: bool) -> Any:
            run = run_of(value)
            if run is not None:
                return self._slot(id(run) * 2 + tolerant, positions, sources, Source(run, None, tolerant))
            if not self.local and session.objects.is_large(value):
                self._kept.append(value)
                source = session.objects.place(value, self._placed)
                return self._slot(id(source), positions, sources, source)
            return value

        new_args = tuple(refs.replace(list(args), leaf))
        new_kwargs = refs.replace(kwargs, leaf)
        arguments: Any
        if self.local:
            arguments = Bound(new_args, new_kwargs, len(sources))
        else:
            arguments = payload.pack_arguments(new_args, new_kwargs, len(sources), self.task.name)
        return Call(self.task, self.function, arguments, tuple(sources), after, self.context)

    @staticmethod
    def _slot(key: int, positions: dict[int, Slot], sources: list[Source], source: Source) -> Slot:
        slot = positions.get(key)
        if slot is None:
            slot = positions[key] = Slot(len(sources))
            sources.append(source)
        return slot


def wait_sources(wait_for: Iterable[Any] | None) -> tuple[Source, ...]:
    """Turn ``wait_for`` into edges; plain values in it are ignored."""
    found: dict[TaskRun, Source] = {}

    def leaf(value: Any, tolerant: bool) -> Any:
        run = run_of(value)
        if run is not None:
            found[run] = Source(run, None, tolerant)
        return value

    if wait_for is not None:
        single = isinstance(wait_for, PenstockFuture)
        refs.replace([wait_for] if single else list(wait_for), leaf)
    return tuple(found.values())


def work_order(run: TaskRun, call: Call, prints: bool) -> dict[str, Any]:
    """Make the work order for the next attempt of a run."""
    return {
        "run": run.id,
        "attempt": run.attempt,
        "task": call.task.name,
        "name": run.name,
        "inputs": call.task.options.inputs,
        "prints": prints,
        "context": call.context,
    }


def read_record(data: bytes) -> dict[str, Any]:
    """Unpack what a worker wrote down."""
    record: dict[str, Any] = pickle.loads(data)
    return record


# -- errors -----------------------------------------------------------------------------------


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


def submission(run: TaskRun, session: Session) -> Submission:
    """Compile one run into a unit of work for the runner."""
    call = run.call
    assert call is not None and run.key is not None  # noqa: PT018 - a run that is ready
    order: Any = work_order(run, call, session.prints_of(run))
    if session.in_process:
        order["scope"] = session.scope_of(run)
        order["interrupt_after"] = call.task.options.timeout_seconds
    else:
        order = pickle.dumps(order, 4)
    options = call.task.options
    return Submission(
        key=run.key,
        order=order,
        function=call.function,
        arguments=call.arguments,
        refs=tuple(session.reference(source) for source in call.sources),
        after=tuple(session.reference(source) for source in call.after if session.orders(source)),
        priority=run.depth + options.priority,
        options=options.backend,
        announce=options.timeout_seconds is not None and run.tracked,
    )


__all__ = [
    "Bound",
    "Caller",
    "Failure",
    "read_record",
    "rebuild_traceback",
    "submission",
    "wait_sources",
    "work_order",
]

