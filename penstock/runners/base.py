"""The contract between the engine and every place where work can run.

The engine turns calls into `Submission` objects; a runner turns these into tasks of its
backend, tells the engine by `Report` how each ended, and keeps the values where they were
made. A runner knows nothing of flows, states, caching or retries.

A new backend implements the eight hooks of `TaskRunner` that raise `NotImplementedError` here,
and passes the contract suite.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import threading
import uuid
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from penstock import errors

if TYPE_CHECKING:
    from concurrent.futures import Executor

Key = tuple[str, int]
"""Name of one attempt in its backend: ``("<task name>-<tag>", counter)``.

The tag belongs to the session that sent it, so that a runner can route reports, and a
dashboard that groups by prefix shows task names.
"""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Ref:
    """A value in the backend's hands.

    Attributes
    ----------
    key : Key
        The attempt that makes or made the value, or the name of a value that was put.
    handle : object
        The backend's own object: a Dask future, a Ray ObjectRef, a file in shared memory, or
        the value itself. The value is freed when the last `Ref` to it is dropped.
    nbytes : int
        Size in bytes, 0 while it is not known.
    worker : str
        Where the value lies, empty while it is not known.
    """

    key: Key
    handle: Any
    nbytes: int = 0
    worker: str = ""


@dataclass(slots=True, eq=False)
class Submission:
    """One unit of work for a backend.

    Attributes
    ----------
    key : Key
        Unique per attempt.
    order : bytes
        Work order for `worker.execution`: see there.
    function : bytes, callable or list
        The pickled function; on runners inside this process the function itself. Of a chunk one
        for each stage.
    arguments : bytes, callable or list
        Pickled ``(args, kwargs)`` in which upstream values are left out; on runners inside
        this process a callable that takes the upstream values and returns ``(args, kwargs)``. Of
        elements of a map what `worker.arguments.maker_of` makes them of.
    refs : tuple of Ref
        The upstream values, in the order in which `arguments` counts them. The backend hands
        them to the worker as positional arguments, never through the driver. A backend without
        dependencies of its own gets only references whose work is done. A reference to work of
        the same batch has no handle yet (None): the backend finds it by its key.
    after : tuple of Ref
        Work that has to end first; no bytes of it are moved.
    priority : int
        Higher runs first; the depth of the call in the flow's graph.
    options : Options
        What the backend is asked for beyond running the function.
    announce : bool
        The engine wants a report of kind "started" when user code begins (it has a deadline).
    streams : bool
        It is a generator whose items are wanted one by one, by reports of kind "item".
    """

    key: Key
    order: bytes
    function: bytes | Callable[..., Any] | list[Any]
    arguments: bytes | Callable[..., Any] | list[Any]
    refs: tuple[Ref, ...] = ()
    after: tuple[Ref, ...] = ()
    priority: int = 0
    options: Options = field(default_factory=lambda: NO_OPTIONS)
    announce: bool = False
    streams: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What a task asks of its backend; submissions with equal options travel together."""

    resources: tuple[tuple[str, float], ...] = ()
    threads: int = 1
    workers: tuple[str, ...] = ()
    crash_retries: int = 0
    once: bool = False
    """The work must not be executed twice, not even to make a lost value again."""
    native: tuple[tuple[str, Any], ...] = ()
    """Further options by the names of one back end; the others pass them over."""


NO_OPTIONS: Options = Options()

UNSENT: Any = object()
"""Handle of a reference whose work is not in the backend's hands yet."""


@dataclass(slots=True)
class Report:
    """What a backend says about one key.

    Attributes
    ----------
    key : Key
        The attempt.
    kind : {"started", "item", "ended", "lost", "upstream", "losing", "again", "gone"}
        "item": the generator has yielded, and `ref` says where the item lies.
        "ended": user code came to an end, well or not, and `record` says how. "lost": it did
        not, and `cause` says why. "upstream": it was never started, because a value it depends
        on failed or was lost; the engine hears of that value by its own report. About a value that
        was reported before: "again", it was lost with its worker and the backend has made it anew,
        as `record` says; "gone", it was lost and the backend will not make it; "losing", it was lost,
        and one of these two will follow.
    record : bytes
        Packed by `worker.record`, opaque to the runner; empty unless "ended".
    cause : Exception or None
        One of the neutral classes of `penstock.errors`: `WorkerLost`, `OutOfMemory`,
        `ResultLost`, `SchedulerLost`, `BackendStalled`, or `CancelledRun` after a cancel of ours.
        Never an exception of the backend.
    nbytes : int
        Size of the value in bytes.
    worker : str
        Who ran it.
    number : int
        Of an item, from 0.
    ref : Ref or None
        Of an item.
    """

    key: Key
    kind: Literal["started", "item", "ended", "lost", "upstream", "losing", "again", "gone"]
    record: bytes = b""
    cause: Exception | None = None
    nbytes: int = 0
    worker: str = ""
    number: int = 0
    ref: Ref | None = None


ambient_runner: ContextVar[TaskRunner | None] = ContextVar("penstock_runner", default=None)
"""The runner of the innermost ``with runner:`` block."""

OnReports = Callable[[list[Report]], None]


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What the engine may expect of a started runner.

    Attributes
    ----------
    name : str
        In a user's words: "dask", "ray", "threads".
    address : str
        How another process would attach to it; empty if it cannot.
    dashboard : str
        URL of the backend's own page, empty if there is none.
    workers, threads : int
        Processes that run tasks, and tasks that can run at once in all of them.
    memory : int
        Bytes that all workers may use, 0 if nobody set a limit.
    in_process : bool
        Tasks run in this process and share its objects; nothing is pickled.
    dependencies : bool
        The backend resolves references to unfinished work by itself.
    interrupts : bool
        Running Python code can be stopped.
    streams : bool
        Items of a generator can be used while it goes on.
    holds_puts : bool
        What was put lies with the driver, so that no worker's death loses it.
    versions : tuple of (str, str)
        Libraries that matter, for the record.
    """

    name: str
    address: str = ""
    dashboard: str = ""
    workers: int = 1
    threads: int = 1
    memory: int = 0
    in_process: bool = False
    dependencies: bool = False
    interrupts: bool = False
    streams: bool = False
    holds_puts: bool = False
    versions: tuple[tuple[str, str], ...] = ()


class TaskRunner(ABC):
    """Base of all runners.

    A runner is opened by the first flow that uses it (or by ``with runner:``) and closed by the
    last; `open` and `close` count, `start` and `stop` do the work. One runner serves several
    sessions at a time, each with a tag of its own in its keys.
    """

    name: str = "runner"
    in_process: bool = False
    keeps: bool = False
    """Whether starting it is dear, so that flows leave it open for the next one."""
    kills_on_timeout: bool = False
    """Whether a worker is ended when its task exceeds `timeout_seconds` (nothing else is lost)."""

    def __init__(self) -> None:
        self._users = 0
        self._kept = False
        self._gate = threading.RLock()
        self._listeners: dict[str, OnReports] = {}
        self._at_exit: list[Callable[[], None]] = []
        self._tokens: list[Token[TaskRunner | None]] = []
        self._own: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # tasks, bound to us

    def __reduce__(self) -> Any:
        """Travel as a name: a runner is the driver's, and what needs it elsewhere makes its own."""
        return (_named, (self.name,))

    # -- life -----------------------------------------------------------------------------
    def open(self) -> Self:
        """Count one more user; the first one starts the runner.

        Returns
        -------
        TaskRunner
            The runner itself.
        """
        with self._gate:
            if self._users == 0:
                self.start()
            self._users += 1
        return self

    def close(self) -> None:
        """Count one user less; the last one stops the runner. Closing twice is harmless."""
        with self._gate:
            if self._users == 0:
                return
            self._users -= 1
            if self._users == 0:
                self.stop()

    def keep(self) -> None:
        """Stay open for later flows of this process, until it ends or `shutdown` is called.

        A flow that starts a cluster keeps it, so that the next run of the flow finds it warm.
        """
        with self._gate:
            if not self._kept and self._users:
                self._kept = True
                self._users += 1
                if not _kept_runners:
                    _shutdown_at_exit()
                _kept_runners.append(self)

    def shutdown(self) -> None:
        """Give up what `keep` held; stops the runner unless somebody else uses it."""
        with self._gate:
            if self._kept:
                self._kept = False
                _kept_runners[:] = [one for one in _kept_runners if one is not self]
                self.close()

    def __enter__(self) -> Self:
        """Open the runner, and make it the one for submits in the block."""
        if self._tokens:
            message = "This task runner is already started"
            raise RuntimeError(message)
        self.open()
        self._tokens.append(ambient_runner.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what was submitted in the block, then close the runner."""
        ambient_runner.reset(self._tokens.pop())
        try:
            for call in self._at_exit:
                call()
        finally:
            self._at_exit.clear()
            self.close()

    def on_exit(self, call: Callable[[], None]) -> None:
        """Call once when the ``with`` block of the runner ends."""
        self._at_exit.append(call)

    @property
    def is_open(self) -> bool:
        """Whether somebody uses the runner now."""
        return self._users > 0

    # -- tasks, by hand -------------------------------------------------------------------
    starting_text = "Task runner is not started"

    def submit(self, task: Any, parameters: Mapping[str, Any], wait_for: Any = None) -> Any:
        """Submit a task to this runner, in a ``with`` block of it or in any flow.

        Parameters
        ----------
        task : Task
            What to run.
        parameters : mapping
            Its arguments by name.
        wait_for : iterable, optional
            Futures that have to end first.

        Returns
        -------
        PenstockFuture

        Raises
        ------
        RuntimeError
            If the runner is not started.
        """
        if not self.is_open:
            raise RuntimeError(self.starting_text)
        return self._call(task, "submit", parameters, wait_for)

    def map(self, task: Any, parameters: Mapping[str, Any], wait_for: Any = None) -> Any:
        """Map a task over what is iterable among its arguments; see `submit`.

        Returns
        -------
        PenstockFutureList
        """
        if not self.is_open:
            message = "The task runner must be started before submitting work."
            raise RuntimeError(message)
        return self._call(task, "map", parameters, wait_for)

    def _call(self, task: Any, method: str, parameters: Mapping[str, Any], wait_for: Any) -> Any:
        unknown = sorted(set(parameters) - set(task.signature.parameters))
        if unknown:
            message = f"task {task.name!r}: got an unexpected argument {unknown[0]!r}"
            raise errors.ParameterBindError(message)
        bound = inspect.BoundArguments(task.signature, OrderedDict(parameters))
        own = self._own.get(task)
        if own is None:
            own = self._own[task] = task.with_options(task_runner=self)
        token = ambient_runner.set(self)
        try:
            return getattr(own, method)(*bound.args, wait_for=wait_for, **bound.kwargs)
        finally:
            ambient_runner.reset(token)

    def get_executor(self) -> Executor:
        """Return an executor of the standard library that runs plain functions here, untracked.

        >>> with DaskTaskRunner() as runner, runner.get_executor() as executor:  # doctest: +SKIP
        ...     print(list(executor.map(reduce, parts)))

        Returns
        -------
        concurrent.futures.Executor
            It keeps the runner open until its `shutdown`; made in a ``with`` block of the runner it is
            shut down at the end of the block.

        Raises
        ------
        RuntimeError
            If the runner is not started.
        """
        from penstock.runners.executor import RunnerExecutor

        executor = RunnerExecutor(self)
        if self._tokens:
            self.on_exit(executor.shutdown)
        return executor

    def duplicate(self) -> Self:
        """Return an equal runner that is not started; one that stands for a cluster shares it."""
        raise NotImplementedError

    # -- reports --------------------------------------------------------------------------
    def listen(self, tag: str, on_reports: OnReports) -> None:
        """Deliver the reports of all keys with this tag to `on_reports`, in batches.

        `on_reports` is called from threads of the runner, never while `send` is on the stack of
        the same thread unless the runner is sequential. It may call `send` and `release`.
        """
        self._listeners[tag] = on_reports

    def unlisten(self, tag: str) -> None:
        """Stop delivering the reports of a session."""
        self._listeners.pop(tag, None)

    def deliver(self, reports: Sequence[Report]) -> None:
        """Hand reports to the sessions that own their keys (called by the backends)."""
        by_tag: dict[str, list[Report]] = {}
        for report in reports:
            by_tag.setdefault(tag_of(report.key), []).append(report)
        for tag, batch in by_tag.items():
            listener = self._listeners.get(tag)
            if listener is not None:
                listener(batch)

    def deliver_item(self, key: Key, number: int, item: Any, nbytes: int) -> None:
        """Hand on what a generator in this process has yielded."""
        ref = Ref((f"{key[0]}-{key[1]}-items", number), item, nbytes)
        self.deliver([Report(key, "item", nbytes=nbytes, number=number, ref=ref)])

    # -- hooks of a backend ---------------------------------------------------------------
    @abstractmethod
    def start(self) -> None:
        """Connect to the backend or create it; check it before any code of the user leaves.

        Raises
        ------
        RunnerUnavailable
            With one sentence that says what was tried and what to do.
        """

    @abstractmethod
    def stop(self) -> None:
        """Leave the backend; close only what `start` created. Must not raise."""

    @property
    @abstractmethod
    def info(self) -> RunnerInfo:
        """What the started runner can do."""

    @abstractmethod
    def put(self, values: Sequence[Any]) -> list[Ref]:
        """Place each value once, near the workers, and return references usable in `send`."""

    @abstractmethod
    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        """Start the work and return a reference for each result at once.

        The submissions are in topological order; their references point to work sent before or
        earlier in the same list. One message per set of options and batch.
        """

    @abstractmethod
    def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """Bring values of finished work to this process; the only hook that moves results.

        Raises
        ------
        ResultLost
            If a value no longer exists.
        """

    @abstractmethod
    def release(self, refs: Sequence[Ref]) -> None:
        """Free values that nobody needs any more, in bulk."""

    @abstractmethod
    def cancel(self, refs: Sequence[Ref], *, force: bool = False) -> list[Key]:
        """Stop work; return the keys of what will certainly not run (any more).

        Running code gets a request that it sees at its next bytecode or check; it is not in the
        answer and still ends with a report. With `force` the process that runs it is ended.
        """

    # -- optional hooks -------------------------------------------------------------------
    def unmet(self, options: Options) -> str:
        """Say why no worker of the backend can run work with these options; empty if one can, or nobody knows."""
        del options
        return ""

    def missing(self, refs: Sequence[Ref]) -> list[Ref]:
        """Return those references of finished work and of put values whose values are lost.

        Asked only after something was lost; a value that the backend will make again by itself
        is not missing.
        """
        del refs
        return []

    def take_back(self, ref: Ref) -> bool:
        """Withdraw work that has not started, so that a waiting task can do it in place."""
        del ref
        return False

    @contextmanager
    def blocked(self, refs: Sequence[Ref]) -> Iterator[None]:
        """Give the slot of the current task back while the body waits for `refs`.

        Called only in code that runs in a slot of this runner.
        """
        del refs
        yield

    def inside(self) -> str:
        """Name under which `runners.inside_worker` finds this runner from within a task.

        Empty if tasks run in this process and can use the object itself.
        """
        return ""


def _named(name: str) -> TaskRunner:
    from penstock.runners import runner_of

    return runner_of(name)


_kept_runners: list[TaskRunner] = []


def kept(runner: TaskRunner) -> TaskRunner:
    """Return the runner with the same settings that an earlier flow left open, else the runner itself."""
    return next((one for one in _kept_runners if one == runner), runner)


def shutdown_all() -> None:
    """Stop every runner that was kept open for later flows."""
    while _kept_runners:  # each takes itself off the list
        _kept_runners[-1].shutdown()


@functools.cache
def _shutdown_at_exit() -> None:
    """Stop kept runners before Python ends its thread pools, which clusters need to close."""
    register = getattr(threading, "_register_atexit", atexit.register)
    register(shutdown_all)


def tag_of(key: Key) -> str:
    """Return the tag in a key."""
    return key[0].rpartition("-")[2]


def new_tag() -> str:
    """Make the tag of a new session: 8 hexadecimal digits."""
    return uuid.uuid4().hex[:8]
