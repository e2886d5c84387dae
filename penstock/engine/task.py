"""`@task`: a function whose calls are recorded, and that can be submitted and mapped."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

from penstock import errors
from penstock.engine import ambient, direct, mapping
from penstock.engine.caller import Caller, wait_sources
from penstock.engine.calls import Bound, Call, TaskRun
from penstock.engine.context import Scope, current_tags
from penstock.engine.futures import PenstockFuture, PenstockFutureList
from penstock.engine.options import (
    NOT_GIVEN,
    RunName,
    TaskOptions,
    backend_options,
    changed,
    changed_results,
    check_choices,
    check_signature,
    retry_policy,
    run_name,
)
from penstock.engine.refs import replace
from penstock.engine.results import Persistence, Storage, read_options
from penstock.engine.retry import CRASH_RETRIES, DelayOption
from penstock.engine.steps import drive, drive_awaiting

if TYPE_CHECKING:
    from penstock.engine.states import State

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


class Task(Generic[P, R]):
    """A function that flows call, submit and map; make one with `@task`.

    Parameters
    ----------
    fn : callable
        Plain or coroutine function, method, or callable object.
    name : str, optional
        The function's name by default.
    description : str, optional
        The first line of the docstring by default.
    version : str, optional
        For the record.
    tags : iterable of str
        United with those of the surrounding `tags` block.
    task_run_name : str or callable, optional
        Format string over the parameters, or a callable of nothing or of ``parameters``.
    retries : int
        Further attempts after a failure.
    retry_delay_seconds : float, list or callable, optional
        Seconds before each further attempt; of a list the last value repeats.
    retry_jitter_factor : float, optional
        The real delay lies between d and d · (1 + factor).
    retry_condition_fn : callable, optional
        ``(task, task_run, state) -> bool``: whether to try again.
    crash_retries : int
        Further attempts after the loss of a worker: one if not given, and none where the worker
        ran out of memory, since the same size would not fit again.
    idempotent : bool
        False: never started twice by penstock; a loss is the end.
    timeout_seconds : float, optional
        From the start of user code; then the run is FAILED with the name "TimedOut".
    log_prints : bool, optional
        Whether `print` writes to the log of the run; the flow's choice by default.
    inputs : {"readonly", "copy", "shared"}
        What arrays from other tasks are to the function.
    chunk_size : int or "auto"
        Elements of a map in one unit of work.
    resources : mapping, optional
        What a worker must offer, such as ``{"GPU": 1}``.
    threads : int
        Cores that one call uses.
    workers : str or iterable of str, optional
        Where to run (Dask).
    priority : int
        Higher runs first.
    persist_result : bool or "large", optional
        Whether the worker stores the result where it outlives the run's memory, before the run
        counts as completed; "large" only from ``PENSTOCK_LARGE_ARGUMENT`` bytes. The flow's choice by default.
    result_storage : str, path or ResultStorage, optional
        Where: a directory or any URL of fsspec; ``storage`` in ``PENSTOCK_HOME`` by default.
    result_storage_key : str, optional
        Template for the place there, of ``{task_run.id}``, ``{task_run.name}``, ``{flow_run.id}``,
        ``{flow_run.name}``, ``{task.name}`` and ``{index}``. A later run replaces an earlier one.
    result_serializer : str, optional
        "pickle", "json", "npy", "npz", "arrow", "parquet", "zarr", "compressed/pickle",
        "compressed/json"; by the value if not given.
    """

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        version: str | None = None,
        tags: Iterable[str] = (),
        task_run_name: RunName = None,
        retries: int | None = None,
        retry_delay_seconds: DelayOption = None,
        retry_jitter_factor: float | None = None,
        retry_condition_fn: Callable[..., Any] | None = None,
        crash_retries: int = CRASH_RETRIES,
        idempotent: bool = True,
        timeout_seconds: float | None = None,
        log_prints: bool | None = None,
        inputs: Literal["readonly", "copy", "shared"] = "readonly",
        chunk_size: int | Literal["auto"] = "auto",
        resources: Mapping[str, float] | None = None,
        threads: int = 1,
        workers: Iterable[str] | str | None = None,
        priority: int = 0,
        persist_result: Persistence = None,
        result_storage: Storage = None,
        result_storage_key: str | None = None,
        result_serializer: str | None = None,
    ) -> None:
        if not callable(fn):
            message = f"@task needs a function, got {type(fn).__name__}."
            raise TypeError(message)
        if isinstance(fn, (staticmethod, classmethod)):
            fn = cast("Callable[P, R]", fn.__func__)
        if retry_condition_fn is not None and not callable(retry_condition_fn):
            message = f"Expected `retry_condition_fn` to be callable, got {type(retry_condition_fn).__name__} instead."
            raise TypeError(message)
        if task_run_name is not None and not isinstance(task_run_name, str) and not callable(task_run_name):
            kind = type(task_run_name).__name__
            message = f"Expected string or callable for 'task_run_name'; got {kind} instead."
            raise TypeError(message)
        check_choices(inputs, chunk_size, timeout_seconds)
        self.fn = fn
        self.isasync = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)
        self.yields = inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)
        functools.update_wrapper(self, fn, updated=())
        self.signature = check_signature(fn)
        own = getattr(fn, "__name__", None) or type(fn).__name__
        self.options = TaskOptions(
            name=name or ("unknown-lambda" if own == "<lambda>" else own),
            description=description or inspect.getdoc(fn),
            version=version,
            tags=frozenset(tags),
            task_run_name=task_run_name,
            retry=retry_policy(
                retries,
                retry_delay_seconds,
                retry_jitter_factor,
                crash_retries if idempotent else 0,
                ambient.default_retries() if retries is None else 0,
            ),
            retry_delay_seconds=retry_delay_seconds,
            retry_condition_fn=retry_condition_fn,
            timeout_seconds=timeout_seconds,
            log_prints=log_prints,
            inputs=inputs,
            chunk_size=chunk_size,
            idempotent=idempotent,
            backend=backend_options(resources, threads, workers, once=not idempotent),
            priority=priority,
            results=read_options(persist_result, result_storage, result_storage_key, result_serializer),
        )

    # -- what it is -----------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """Name of the task."""
        return self.options.name

    @property
    def tags(self) -> frozenset[str]:
        """Tags of the task."""
        return self.options.tags

    @property
    def retries(self) -> int:
        """Further attempts after a failure."""
        return self.options.retry.retries

    def __repr__(self) -> str:
        """Show the name."""
        return f"<Task {self.name}>"

    @overload
    def __get__(self, instance: None, owner: type) -> Task[P, R]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Task[..., R]: ...
    def __get__(self, instance: object, owner: type) -> Task[..., R]:
        """Bind to an instance: a method can be a task, and ``self`` is its first parameter."""
        if instance is None:
            return self
        bound: Task[..., R] = object.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound.__dict__["_instance"] = instance
        return bound

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        if "_instance" in self.__dict__:
            args = (self.__dict__["_instance"], *args)
        try:
            return self.signature.bind(*args, **kwargs)
        except TypeError as error:
            message = f"{self.name}: {error}"
            raise errors.ParameterBindError(message) from None

    # -- call -----------------------------------------------------------------------------------
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(
        self, *args: Any, return_state: Literal[True], wait_for: Any = None, **kwargs: Any
    ) -> State: ...
    @overload
    def __call__(
        self, *args: Any, wait_for: Any, return_state: Literal[False] = False, **kwargs: Any
    ) -> R: ...
    def __call__(  # type: ignore[misc] # the user's signature stands in the overloads
        self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any
    ) -> Any:
        """Run here and now, in the caller's thread (an async task: in the caller's loop).

        Parameters
        ----------
        *args, **kwargs
            Of the function; futures among them are waited for and fetched.
        return_state : bool
            Answer the state instead of the value.
        wait_for : iterable, optional
            Futures that have to end first.

        Raises
        ------
        Exception
            What the function raises.
        """
        try:
            scope = ambient.scope_for_call()
            bound = self._bound(args, kwargs)
            run, call = self._local_call(bound, scope, wait_for)
            steps = direct.steps(run, scope, call, return_state)
            if self.isasync:
                return _hidden(drive_awaiting(steps))
            return drive(steps)
        except BaseException as error:
            errors.hide_frames(error)
            raise

    def _local_call(self, bound: inspect.BoundArguments, scope: Scope, wait_for: Any) -> tuple[TaskRun, Call]:
        sources: list[Any] = []
        args, kwargs = bound.args, bound.kwargs
        caller = Caller(scope.session, self, scope, local=True)
        call = caller.call(args, kwargs, wait_sources(wait_for))
        sources.extend(call.sources)
        assert isinstance(call.arguments, Bound)
        run = self._run(bound, scope)
        scope.session.journal.task_made(run, bound.arguments, parents_of(bound, call))
        return run, call

    # -- submit ---------------------------------------------------------------------------------
    @overload
    def submit(  # type: ignore[overload-overlap] # return_state= changes the answer
        self: Task[P, Coroutine[Any, Any, S]], *args: P.args, **kwargs: P.kwargs
    ) -> PenstockFuture[S]: ...
    @overload
    def submit(self: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> PenstockFuture[R]: ...
    @overload
    def submit(
        self: Task[P, Coroutine[Any, Any, S]], *args: Any, wait_for: Any, **kwargs: Any
    ) -> PenstockFuture[S]: ...
    @overload
    def submit(
        self, *args: Any, return_state: Literal[True], wait_for: Any = None, **kwargs: Any
    ) -> State: ...
    @overload
    def submit(self: Task[P, Coroutine[Any, Any, S]], *args: Any, **kwargs: Any) -> PenstockFuture[S]: ...
    @overload
    def submit(self: Task[P, R], *args: Any, **kwargs: Any) -> PenstockFuture[R]: ...
    def submit(  # type: ignore[misc] # the user's signature stands in the overloads
        self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any
    ) -> Any:
        """Hand a call to the task runner; returns a future at once.

        Parameters
        ----------
        *args, **kwargs
            Of the function, captured now; futures among them become dependencies, and their
            values travel from worker to worker.
        return_state : bool
            Wait for the end and answer the state.
        wait_for : iterable, optional
            Futures that have to end first; their values do not move.

        Raises
        ------
        RuntimeError
            Outside of a flow, if no runner is open.
        ParameterBindError, UnserializableArgument
            If the arguments do not fit, or cannot be sent.
        """
        try:
            scope = ambient.scope_for_submit(self.name)
            bound = self._bound(args, kwargs)
            call = Caller(scope.session, self, scope).call(bound.args, bound.kwargs, wait_sources(wait_for))
            run = self._run(bound, scope)
            run.call = call
            scope.session.journal.task_made(run, bound.arguments, parents_of(bound, call))
            scope.session.submit([run], scope)
        except BaseException as error:
            errors.hide_frames(error)
            raise
        future: PenstockFuture[Any] = PenstockFuture(run)
        if return_state:
            future.wait()
            return future.state
        return future

    def _run(self, bound: inspect.BoundArguments, scope: Scope) -> TaskRun:
        """Make the run of a call."""
        template = self.options.task_run_name
        name = self.name
        if template is not None:
            name = run_name(template, self.name, mapping.with_defaults(bound))
        return TaskRun(
            self,
            name,
            root=scope.flow_run.root if scope.flow_run else "",
            flow_run=scope.flow_run,
            surrounding=scope.task_run,
            tags=self.options.tags
            | current_tags()
            | (scope.flow_run.tags if scope.flow_run else frozenset()),
        )

    # -- map ------------------------------------------------------------------------------------
    @overload
    def map(self: Task[P, Coroutine[Any, Any, S]], *args: Any, **kwargs: Any) -> PenstockFutureList[S]: ...
    @overload
    def map(self: Task[P, R], *args: Any, **kwargs: Any) -> PenstockFutureList[R]: ...
    def map(self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any) -> Any:
        """Submit one call for each element of the iterable arguments.

        Parameters
        ----------
        *args, **kwargs
            Of the function. Iterables (and futures of iterables) are taken apart and must be
            equally long; strings, bytes and what is marked `unmapped` go to every element. A
            generator is drawn in batches as the back end has room: `map` then returns when the
            last item is drawn, and never holds all of them.
        return_state : bool
            Wait for all and answer their states.
        wait_for : iterable, optional
            Futures that have to end first.

        Returns
        -------
        PenstockFutureList
            A future for each element, in order.

        Raises
        ------
        MappingMissingIterable, MappingLengthMismatch
            If there is nothing to map over, or the lengths differ.
        """
        try:
            scope = ambient.scope_for_submit(self.name)
            runs = mapping.submit(self, scope, self._bound(args, kwargs), wait_sources(wait_for))
        except BaseException as error:
            errors.hide_frames(error)
            raise
        futures: PenstockFutureList[Any] = PenstockFutureList(PenstockFuture(run) for run in runs)
        if return_state:
            futures.wait()
            return [future.state for future in futures]
        return futures

    # -- options --------------------------------------------------------------------------------
    def with_options(
        self,
        *,
        name: str = NOT_GIVEN,
        description: str | None = NOT_GIVEN,
        version: str | None = NOT_GIVEN,
        tags: Iterable[str] = NOT_GIVEN,
        task_run_name: RunName = NOT_GIVEN,
        retries: int = NOT_GIVEN,
        retry_delay_seconds: DelayOption = NOT_GIVEN,
        retry_jitter_factor: float | None = NOT_GIVEN,
        retry_condition_fn: Callable[..., Any] | None = NOT_GIVEN,
        crash_retries: int = NOT_GIVEN,
        idempotent: bool = NOT_GIVEN,
        timeout_seconds: float | None = NOT_GIVEN,
        log_prints: bool | None = NOT_GIVEN,
        inputs: Literal["readonly", "copy", "shared"] = NOT_GIVEN,
        chunk_size: int | Literal["auto"] = NOT_GIVEN,
        resources: Mapping[str, float] | None = NOT_GIVEN,
        threads: int = NOT_GIVEN,
        workers: Iterable[str] | str | None = NOT_GIVEN,
        priority: int = NOT_GIVEN,
        persist_result: Persistence = NOT_GIVEN,
        result_storage: Storage = NOT_GIVEN,
        result_storage_key: str | None = NOT_GIVEN,
        result_serializer: str | None = NOT_GIVEN,
    ) -> Task[P, R]:
        """Make a task with other options; what is not given stays as it is. Tags are replaced."""
        old = self.options

        def given(value: Any, present: Any) -> Any:
            return present if value is NOT_GIVEN else value

        safe = given(idempotent, old.idempotent)
        delay = given(retry_delay_seconds, old.retry_delay_seconds)
        policy = retry_policy(
            given(retries, old.retry.retries),
            delay,
            given(retry_jitter_factor, old.retry.jitter),
            given(crash_retries, old.retry.crash_retries) if safe else 0,
        )
        resource_map = given(resources, dict(old.backend.resources))
        placed = backend_options(
            resource_map,
            given(threads, old.backend.threads),
            given(workers, old.backend.workers),
            once=not safe,
        )
        options: TaskOptions = changed(
            old,
            {
                "name": name,
                "description": description,
                "version": version,
                "tags": NOT_GIVEN if tags is NOT_GIVEN else frozenset(tags),
                "task_run_name": task_run_name,
                "retry": policy,
                "retry_delay_seconds": delay,
                "retry_condition_fn": retry_condition_fn,
                "timeout_seconds": timeout_seconds,
                "log_prints": log_prints,
                "inputs": inputs,
                "chunk_size": chunk_size,
                "idempotent": safe,
                "backend": placed,
                "priority": priority,
                "results": changed_results(
                    old.results, persist_result, result_storage, result_storage_key, result_serializer
                ),
            },
        )
        check_choices(options.inputs, options.chunk_size, options.timeout_seconds)
        new: Task[P, R] = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.options = options
        return new


async def _hidden(awaitable: Coroutine[Any, Any, Any]) -> Any:
    """Await without leaving penstock's frames in the user's traceback."""
    try:
        return await awaitable
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        errors.hide_frames(error)
        raise


def parents_of(bound: inspect.BoundArguments, call: Call) -> list[tuple[str, str]]:
    """Name the upstream runs of a call and the parameters through which they come."""
    wanted = {source.run: "" for source in call.sources if source.run is not None}
    if wanted:
        for name, value in bound.arguments.items():
            replace(value, functools.partial(_note, wanted, name))
    return [
        *((name, run.id) for run, name in wanted.items() if run.tracked),
        *(("wait_for", source.run.id) for source in call.after if source.run is not None),
    ]


def _note(wanted: dict[Any, str], name: str, value: Any, tolerant: bool) -> Any:
    del tolerant
    if isinstance(value, PenstockFuture) and value._run in wanted:
        wanted[value._run] = name
    return value


class TaskDecorator:
    """`@task` with options, before it meets its function."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, fn: Callable[P, R]) -> Task[P, R]:
        """Make the task."""
        return Task(fn, **self._options)


@overload
def task(fn: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(
    *,
    name: str | None = None,
    description: str | None = None,
    version: str | None = None,
    tags: Iterable[str] = (),
    task_run_name: RunName = None,
    retries: int | None = None,
    retry_delay_seconds: DelayOption = None,
    retry_jitter_factor: float | None = None,
    retry_condition_fn: Callable[..., Any] | None = None,
    crash_retries: int = CRASH_RETRIES,
    idempotent: bool = True,
    timeout_seconds: float | None = None,
    log_prints: bool | None = None,
    inputs: Literal["readonly", "copy", "shared"] = "readonly",
    chunk_size: int | Literal["auto"] = "auto",
    resources: Mapping[str, float] | None = None,
    threads: int = 1,
    workers: Iterable[str] | str | None = None,
    priority: int = 0,
    persist_result: Persistence = None,
    result_storage: Storage = None,
    result_storage_key: str | None = None,
    result_serializer: str | None = None,
) -> TaskDecorator: ...
def task(fn: Any = None, /, **options: Any) -> Any:
    """Turn a function into a task: ``@task`` or ``@task(retries=3, …)``.

    The options are those of `Task`.

    >>> @task(retries=2, retry_delay_seconds=0.1)
    ... def load(path: str) -> bytes: ...
    """
    return TaskDecorator(options) if fn is None else Task(fn, **options)
