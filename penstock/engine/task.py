"""`@task`: a function whose calls are recorded, and that can be submitted and mapped."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace as with_fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

from penstock import errors
from penstock.engine import (
    ambient,
    direct,
    lookups,
    mapping,
    payload,
    placement,
    revision,
    run_transactions,
    sample,
    skipping,
)
from penstock.engine.annotations import TOLERANCE_OF
from penstock.engine.cache import CachePolicy, read_cache_options
from penstock.engine.caller import Caller, wait_sources
from penstock.engine.calls import Bound, Call, Source, TaskRun
from penstock.engine.context import Scope, current_tags
from penstock.engine.futures import PenstockFuture, PenstockFutureList
from penstock.engine.hooks import H, Hook, read_hooks
from penstock.engine.options import (
    NOT_GIVEN,
    RunName,
    TaskOptions,
    backend_options,
    changed,
    changed_hooks,
    changed_results,
    check_callables,
    check_choices,
    check_signature,
    needs_values,
    retry_policy,
    run_name,
    view,
    warn_unused,
)
from penstock.engine.payload import serializer_of
from penstock.engine.refs import replace
from penstock.engine.results import Persistence, Storage, read_options
from penstock.engine.retry import CRASH_RETRIES, DelayOption
from penstock.engine.seeds import next_ordinal
from penstock.engine.steps import Steps, drive, drive_awaiting, drive_giving, drive_giving_awaiting
from penstock.engine.venues import check_wish

if TYPE_CHECKING:
    from penstock.engine.states import State
    from penstock.runners.base import TaskRunner

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
TimeoutAction = Literal["abandon", "kill_worker"]


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
        From the start of user code; then the run is FAILED with the name "TimedOut", on every runner.
    timeout_action : {"abandon", "kill_worker"}
        What becomes of the code: it is asked to stop, and what cannot be interrupted, such as a call
        into C, is left to end by itself; or the process that runs it is ended, on Dask with
        everything else that runs there. A process of the process pool is ended in any case, a thread never.
    log_prints : bool, optional
        Whether `print` writes to the log of the run; the flow's choice by default.
    inputs : {"readonly", "copy", "shared"}
        What arrays from other tasks are to the function.
    chunk_size : int or "auto"
        Elements of a map in one unit of work.
    resources : mapping, optional
        What one worker must offer: ``{"GPU": 1, "memory": "20GB"}``. GPUs and memory are Ray's own words;
        on Dask they are resources that workers declare, or the memory limit of a worker. What no worker
        offers waits for one that does, and says so.
    threads : int
        Cores that one call uses.
    workers : str or iterable of str, optional
        Where to run (Dask).
    priority : int
        Higher runs first.
    on_skip : {"skip", "none", "run"}
        What a skipped upstream means: this run is skipped, too; it runs with None in the place of the
        value; it runs with the SKIPPED state there.
    skip_if : callable, optional
        Asked before a run starts, with those of its parameters that it names (or ``parameters``, the dict
        of all): a true answer skips the run, a string is the reason.
    task_runner : str, type or TaskRunner, optional
        Where it runs if submitted, instead of the flow's runner: a name in the mapping that the flow has
        for its `task_runner`, or a runner. Values from other runners come through the driver.
    persist_result : bool or "large", optional
        Whether the worker stores the result where it outlives the run's memory, before the run
        counts as completed; "large" only from ``PENSTOCK_LARGE_ARGUMENT`` bytes. The flow's choice by default.
    result_storage : str, path or ResultStorage, optional
        Where: a directory or any URL of fsspec; ``storage`` in ``PENSTOCK_HOME`` by default.
    result_storage_key : str, optional
        Template for the place there, of ``{task_run.id}``, ``{task_run.name}``, ``{flow_run.id}``,
        ``{flow_run.name}``, ``{task.name}``, ``{index}`` and ``{parameters[x]}``. A later run replaces
        an earlier one.
    result_serializer : str or object, optional
        "pickle", "json", "npy", "npz", "arrow", "parquet", "zarr", "compressed/pickle",
        "compressed/json", or an object with ``dumps`` and ``loads``; by the value if not given.
    on_completion, on_failure, on_running, on_skipped : list of callable, optional
        Called in the driver as ``hook(task, task_run, state)``, coroutine functions too: before the
        future counts as done, while dependants go on. `on_failure` when no attempt is left, also after a
        crash; `on_running` at each attempt.
    on_commit, on_rollback : list of callable, optional
        Called in the process that submitted or called the task, as ``hook(transaction)``, coroutine functions
        too: when the transaction around the run commits, or takes the completed run back. Without a
        `transaction` around it, a run commits when it has completed.
    viz_return_value, asset_deps : object, optional
        Taken for the sake of existing scripts, and ignored with a warning.
    cache_policy : CachePolicy, optional
        When two calls have one result: `INPUTS`, `TASK_SOURCE`, `RUN_ID`, `FLOW_PARAMETERS`, sums of
        them, or one of your own. If not given: `DEFAULT`, where results are stored; None is `NO_CACHE`.
    cache_key_fn : callable, optional
        ``(context, arguments) -> key``, in the place of a policy.
    cache_expiration : timedelta or float, optional
        How long after it was stored a result is taken; a number is seconds.
    refresh_cache : bool, optional
        Run, and store the result in the place of the old one.
    cache_result_in_memory : bool
        False: a stored result is read from its storage whenever it is needed.
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
        timeout_action: TimeoutAction = "abandon",
        log_prints: bool | None = None,
        inputs: Literal["readonly", "copy", "shared"] = "readonly",
        chunk_size: int | Literal["auto"] = "auto",
        resources: Mapping[str, float | str] | None = None,
        threads: int = 1,
        workers: Iterable[str] | str | None = None,
        priority: int = 0,
        on_skip: Literal["skip", "none", "run"] = "skip",
        skip_if: Callable[..., Any] | None = None,
        task_runner: str | type[TaskRunner] | TaskRunner | None = None,
        persist_result: Persistence = None,
        result_storage: Storage = None,
        result_storage_key: str | None = None,
        result_serializer: Any = None,
        on_completion: Iterable[Hook] | None = None,
        on_failure: Iterable[Hook] | None = None,
        on_running: Iterable[Hook] | None = None,
        on_skipped: Iterable[Hook] | None = None,
        on_commit: Iterable[Hook] | None = None,
        on_rollback: Iterable[Hook] | None = None,
        viz_return_value: Any = None,
        asset_deps: Any = None,
        cache_policy: CachePolicy | None = NOT_GIVEN,
        cache_key_fn: Callable[..., str | None] | None = None,
        cache_expiration: timedelta | float | None = None,
        refresh_cache: bool | None = None,
        cache_result_in_memory: bool = True,
    ) -> None:
        self._kind: Any = type(fn)  # of a method: whether it gets the instance, the class, or nothing
        if isinstance(fn, (staticmethod, classmethod)):
            fn = cast("Callable[P, R]", fn.__func__)
        if not callable(fn):
            message = f"@task needs a function, got {type(fn).__name__}."
            raise TypeError(message)
        check_callables(retry_condition_fn, task_run_name, "task_run_name")
        warn_unused(viz_return_value=viz_return_value, asset_deps=asset_deps)
        check_wish(task_runner)
        check_choices(inputs, chunk_size, timeout_seconds, timeout_action)
        skipping.check(on_skip)
        self.fn = fn
        self.module = revision.module_of(fn)  # here: a worker has another main script
        inner = _called(fn)
        self.isasync = inspect.iscoroutinefunction(inner)
        self.yields = inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner)
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
            timeout_action=timeout_action,
            log_prints=log_prints,
            inputs=inputs,
            chunk_size=chunk_size,
            idempotent=idempotent,
            backend=backend_options(resources, threads, workers, once=not idempotent),
            priority=priority,
            on_skip=on_skip,
            skip_if=skipping.asker(self.signature, skip_if),
            task_runner=task_runner,
            hooks=read_hooks(
                "task",
                on_completion=on_completion,
                on_failure=on_failure,
                on_running=on_running,
                on_skipped=on_skipped,
                on_commit=on_commit,
                on_rollback=on_rollback,
            ),
            results=read_options(
                persist_result,
                result_storage,
                result_storage_key,
                serializer_of(result_serializer),
                read_cache_options(
                    cache_policy,
                    cache_key_fn,
                    cache_expiration,
                    refresh_cache,
                    cache_result_in_memory,
                    persist_result,
                ),
            ),
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

    @property
    def version(self) -> str:
        """What tells this code from that of yesterday: as given, else the git revision, else a hash."""
        return self.options.version or revision.version_of(self.fn)

    @functools.cached_property
    def task_key(self) -> str:
        """Name of the code: ``qualname-<8 digits of its hash>``."""
        return revision.task_key(self.fn)

    def __getattr__(self, name: str) -> Any:
        """Show an option under its name."""
        return view(self, name)

    def __repr__(self) -> str:
        """Show the name."""
        return f"<Task {self.name}>"

    @overload
    def __get__(self, instance: None, owner: type) -> Task[P, R]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Task[..., R]: ...
    def __get__(self, instance: object, owner: type) -> Task[..., R]:
        """Bind to an instance or class: a method can be a task, and ``self`` is its first parameter."""
        if self._kind is classmethod:
            instance = owner
        if instance is None or self._kind is staticmethod:
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
            if self.yields and return_state:
                message = "The return_type for a generator task must be 'result'"
                raise ValueError(message)
            scope = ambient.scope_for_call()
            bound = self._bound(args, kwargs)
            run, call = self._local_call(bound, scope, wait_for)
            if self.yields:
                return self._lazily(direct.steps(run, scope, call, False, lazily=True))
            steps = direct.steps(run, scope, call, return_state)
            if self.isasync:
                return _hidden(drive_awaiting(steps))
            return drive(steps)
        except BaseException as error:
            errors.hide_frames(error)
            raise

    def _lazily(self, steps: Steps) -> Any:
        inner = _called(self.fn)
        return drive_giving_awaiting(steps) if inspect.isasyncgenfunction(inner) else drive_giving(steps)

    def _local_call(self, bound: inspect.BoundArguments, scope: Scope, wait_for: Any) -> tuple[TaskRun, Call]:
        sources: list[Any] = []
        args, kwargs = bound.args, bound.kwargs
        caller = Caller(scope.session, self, scope, local=True)
        call = caller.call(args, kwargs, self._after(wait_for))
        sources.extend(call.sources)
        assert isinstance(call.arguments, Bound)
        run = self._run(bound, scope, call, local=True)
        lookups.plan(run, bound, in_process=True)
        scope.session.journal.task_made(
            run, bound.arguments, parents_of(bound, call), call.naming is not None
        )
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
            scope = ambient.sent_elsewhere(ambient.scope_for_submit(self.name), self.options.task_runner)
            bound = self._bound(args, kwargs)
            placed = placement.placed(self)
            call = Caller(scope.session, placed, scope).call(bound.args, bound.kwargs, self._after(wait_for))
            run = placed._run(bound, scope, call)
            lookups.plan(run, bound, in_process=scope.session.in_process)
            run.call = call
            named_later = call.naming is not None
            scope.session.journal.task_made(run, bound.arguments, parents_of(bound, call), named_later)
            reason = None
            if self.options.skip_if is not None and not any(source.run for source in call.sources):
                reason = skipping.reason_here(self.options.skip_if, bound.args, bound.kwargs)
            if reason is not None:
                scope.session.skip(run, scope, reason)
            else:
                scope.session.submit([run], scope)
            if run.transaction is not None:
                run_transactions.enter([run])
        except BaseException as error:
            errors.hide_frames(error)
            raise
        future: PenstockFuture[Any] = PenstockFuture(run)
        if return_state:
            future.wait()
            return future.state
        return future

    def skip_if(self, predicate: Callable[..., Any]) -> Callable[..., Any]:
        """Ask this before each run starts; a decorator, see the option of that name.

        >>> @load.skip_if  # doctest: +SKIP
        ... def is_cloudy(night):
        ...     return night in clouds and "clouds"
        """
        self.options = changed(self.options, {"skip_if": skipping.asker(self.signature, predicate)})
        return predicate

    def _after(self, wait_for: Any) -> tuple[Source, ...]:
        return wait_sources(wait_for, TOLERANCE_OF[self.options.on_skip])

    def _run(
        self, bound: inspect.BoundArguments, scope: Scope, call: Call, *, local: bool = False
    ) -> TaskRun:
        """Make the run of a call."""
        template = self.options.task_run_name
        name = self.name
        if call.sources and needs_values(template, bound.arguments, mapping.is_there):
            stays = isinstance(template, str) or local or scope.session.in_process
            call.naming = template if stays else payload.pack_function(cast("Callable[..., str]", template))
        elif template is not None:
            name = run_name(template, self.name, mapping.with_defaults(bound))
        run = TaskRun(
            self,
            name,
            root=scope.flow_run.root if scope.flow_run else "",
            flow_run=scope.flow_run,
            surrounding=scope.task_run,
            tags=self.options.tags
            | current_tags()
            | (scope.flow_run.tags if scope.flow_run else frozenset()),
        )
        run.ordinal = next_ordinal(scope, self.name)
        joining = run_transactions.joining(scope, self.options.hooks)
        if joining is not None:
            run.transaction = joining.of(run)
            call.context = joining.context(call.context)
        return run

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
            scope = ambient.sent_elsewhere(ambient.scope_for_submit(self.name), self.options.task_runner)
            placed = placement.placed(self)
            runs = mapping.submit(placed, scope, self._bound(args, kwargs), self._after(wait_for))
        except BaseException as error:
            errors.hide_frames(error)
            raise
        futures: PenstockFutureList[Any] = PenstockFutureList(PenstockFuture(run) for run in runs)
        if scope.session.plans:
            futures = sample.of_map(futures, scope.session)
        if return_state:
            futures.wait()
            return [future.state for future in futures]
        return futures

    # -- hooks ----------------------------------------------------------------------------------
    def on_completion(self, fn: H) -> H:
        """Decorate a function that is called when a run has completed."""
        return self._also("on_completion", fn)

    def on_failure(self, fn: H) -> H:
        """Decorate a function that is called when a run has failed and no attempt is left."""
        return self._also("on_failure", fn)

    def on_running(self, fn: H) -> H:
        """Decorate a function that is called when an attempt begins."""
        return self._also("on_running", fn)

    def on_skipped(self, fn: H) -> H:
        """Decorate a function that is called when a run was skipped."""
        return self._also("on_skipped", fn)

    def on_commit(self, fn: H) -> H:
        """Decorate a function that is called, with the transaction, when that commits."""
        return self._also("on_commit", fn)

    def on_rollback(self, fn: H) -> H:
        """Decorate a function that is called, with the transaction, when that takes a completed run back."""
        return self._also("on_rollback", fn)

    def _also(self, kind: str, fn: H) -> H:
        self.options = with_fields(self.options, hooks=self.options.hooks.and_also(kind, fn, "task"))
        return fn

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
        timeout_action: TimeoutAction = NOT_GIVEN,
        log_prints: bool | None = NOT_GIVEN,
        inputs: Literal["readonly", "copy", "shared"] = NOT_GIVEN,
        chunk_size: int | Literal["auto"] = NOT_GIVEN,
        resources: Mapping[str, float | str] | None = NOT_GIVEN,
        threads: int = NOT_GIVEN,
        workers: Iterable[str] | str | None = NOT_GIVEN,
        priority: int = NOT_GIVEN,
        on_skip: Literal["skip", "none", "run"] = NOT_GIVEN,
        skip_if: Callable[..., Any] | None = NOT_GIVEN,
        task_runner: str | type[TaskRunner] | TaskRunner | None = NOT_GIVEN,
        persist_result: Persistence = NOT_GIVEN,
        result_storage: Storage = NOT_GIVEN,
        result_storage_key: str | None = NOT_GIVEN,
        result_serializer: Any = NOT_GIVEN,
        on_completion: Iterable[Hook] | None = NOT_GIVEN,
        on_failure: Iterable[Hook] | None = NOT_GIVEN,
        on_running: Iterable[Hook] | None = NOT_GIVEN,
        on_skipped: Iterable[Hook] | None = NOT_GIVEN,
        on_commit: Iterable[Hook] | None = NOT_GIVEN,
        on_rollback: Iterable[Hook] | None = NOT_GIVEN,
        viz_return_value: Any = NOT_GIVEN,
        asset_deps: Any = NOT_GIVEN,
        cache_policy: CachePolicy | None = NOT_GIVEN,
        cache_key_fn: Callable[..., str | None] | None = NOT_GIVEN,
        cache_expiration: timedelta | float | None = NOT_GIVEN,
        refresh_cache: bool | None = NOT_GIVEN,
        cache_result_in_memory: bool = NOT_GIVEN,
    ) -> Task[P, R]:
        """Make a task with other options; what is not given stays as it is. Tags are replaced."""
        old = self.options
        warn_unused(viz_return_value=viz_return_value, asset_deps=asset_deps)
        check_wish(None if task_runner is NOT_GIVEN else task_runner)

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
                "timeout_action": timeout_action,
                "log_prints": log_prints,
                "inputs": inputs,
                "chunk_size": chunk_size,
                "idempotent": safe,
                "backend": placed,
                "priority": priority,
                "on_skip": on_skip,
                "skip_if": NOT_GIVEN if skip_if is NOT_GIVEN else skipping.asker(self.signature, skip_if),
                "task_runner": task_runner,
                "results": changed_results(
                    old.results,
                    persist_result,
                    result_storage,
                    result_storage_key,
                    serializer_of(result_serializer),
                    (cache_policy, cache_key_fn, cache_expiration, refresh_cache, cache_result_in_memory),
                ),
                "hooks": changed_hooks(
                    old.hooks,
                    "task",
                    on_completion=on_completion,
                    on_failure=on_failure,
                    on_running=on_running,
                    on_skipped=on_skipped,
                    on_commit=on_commit,
                    on_rollback=on_rollback,
                ),
            },
        )
        check_choices(options.inputs, options.chunk_size, options.timeout_seconds, options.timeout_action)
        check_callables(options.retry_condition_fn, options.task_run_name, "task_run_name")
        skipping.check(options.on_skip)
        return self.with_fields(options)

    def with_fields(self, options: TaskOptions) -> Task[P, R]:
        """Return a task of the same code with other options."""
        new: Task[P, R] = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.options = options
        return new


def _called(fn: Any) -> Any:
    """Return the function that a call ends up in, which tells whether it is a coroutine or a generator."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn if inspect.isroutine(fn) or inspect.isclass(fn) else type(fn).__call__


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


def _note(wanted: dict[Any, str], name: str, value: Any, tolerant: int) -> Any:
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
    timeout_action: TimeoutAction = "abandon",
    log_prints: bool | None = None,
    inputs: Literal["readonly", "copy", "shared"] = "readonly",
    chunk_size: int | Literal["auto"] = "auto",
    resources: Mapping[str, float | str] | None = None,
    threads: int = 1,
    workers: Iterable[str] | str | None = None,
    priority: int = 0,
    on_skip: Literal["skip", "none", "run"] = "skip",
    skip_if: Callable[..., Any] | None = None,
    task_runner: str | type[TaskRunner] | TaskRunner | None = None,
    persist_result: Persistence = None,
    result_storage: Storage = None,
    result_storage_key: str | None = None,
    result_serializer: Any = None,
    on_completion: Iterable[Hook] | None = None,
    on_failure: Iterable[Hook] | None = None,
    on_running: Iterable[Hook] | None = None,
    on_skipped: Iterable[Hook] | None = None,
    on_commit: Iterable[Hook] | None = None,
    on_rollback: Iterable[Hook] | None = None,
    viz_return_value: Any = None,
    asset_deps: Any = None,
    cache_policy: CachePolicy | None = NOT_GIVEN,
    cache_key_fn: Callable[..., str | None] | None = None,
    cache_expiration: timedelta | float | None = None,
    refresh_cache: bool | None = None,
    cache_result_in_memory: bool = True,
) -> TaskDecorator: ...
def task(fn: Any = None, /, **options: Any) -> Any:
    """Turn a function into a task: ``@task`` or ``@task(retries=3, …)``.

    The options are those of `Task`.

    >>> @task(retries=2, retry_delay_seconds=0.1)
    ... def load(path: str) -> bytes: ...
    """
    return TaskDecorator(options) if fn is None else Task(fn, **options)
