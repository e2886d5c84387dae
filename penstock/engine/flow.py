"""`@flow`: a function whose run is recorded, and in which tasks are submitted to a runner."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace as with_fields
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

from penstock import errors
from penstock.engine import context, markup, parameters, revision
from penstock.engine.flow_run import steps
from penstock.engine.flow_scope import FlowRunScope
from penstock.engine.futures import PenstockFuture, PenstockFutureList
from penstock.engine.hooks import H, Hook, read_hooks
from penstock.engine.options import (
    NOT_GIVEN,
    FlowOptions,
    RunName,
    changed,
    changed_hooks,
    changed_results,
    check_callables,
    check_choices,
    check_exit,
    check_signature,
    retry_policy,
    view,
)
from penstock.engine.payload import serializer_of
from penstock.engine.results import Persistence, Storage, read_options
from penstock.engine.retry import DelayOption
from penstock.engine.states import State
from penstock.engine.steps import Steps, drive, drive_awaiting
from penstock.engine.task import _hidden
from penstock.engine.venues import check_wish, default_of
from penstock.runners import runner_of
from penstock.runners.base import TaskRunner
from penstock.settings import settings

if TYPE_CHECKING:
    from penstock.engine.plan import Plan

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
_FORBIDDEN = set("/%&<>")
Runner = str | type[TaskRunner] | TaskRunner | Mapping[str, Any] | None


class Flow(Generic[P, R]):
    """A function that runs as a flow; make one with `@flow`.

    Parameters
    ----------
    fn : callable
        Plain or coroutine function, or method.
    name : str, optional
        The function's name with dashes by default.
    description, version : str, optional
        For the record.
    tags : iterable of str
        Of the run and of all runs in it.
    flow_run_name : str or callable, optional
        Format string over the parameters, or a callable.
    retries : int, optional
        Further attempts of the function after a failure, in the same run. Tasks and child flows that
        completed and whose results are persisted are not run again.
    retry_delay_seconds : float or list, optional
        Seconds before each further attempt; of a list the last value repeats.
    timeout_seconds : float, optional
        Then the run is FAILED with the name "TimedOut".
    on_exit : {"wait", "cancel", "detach"}
        What becomes of tasks that still run when the function has returned, and are not in what it
        returned: the flow waits for them, cancels them, or leaves them to themselves; then their states
        are recorded as long as this process lives.
    validate_parameters : bool
        Check and coerce arguments by their annotations.
    log_prints : bool, optional
        Whether `print` writes to the log, in the flow and in its tasks.
    task_runner : str, type, TaskRunner or mapping of names to these, optional
        Where tasks run; threads by default. A mapping gives names to several, for the option `task_runner`
        of tasks; its first is the default. A nested flow uses its parent's, unless `with_options` gives it
        one of its own.
    persist_result : bool or "large", optional
        Whether the worker stores the results of its tasks where it outlives the run's memory, before the run
        counts as completed; "large" only from ``PENSTOCK_LARGE_ARGUMENT`` bytes. Of a flow it is the default for its tasks,
        and for those of nested flows.
    result_storage : str, path or ResultStorage, optional
        Where: a directory or any URL of fsspec; ``storage`` in ``PENSTOCK_HOME`` by default.
    result_serializer : str, optional
        "pickle", "json", "npy", "npz", "arrow", "parquet", "zarr", "compressed/pickle",
        "compressed/json"; by the value if not given.
    cache_result_in_memory : bool
        False: where results are stored, what the flow itself returns is stored, too, and nothing of it is kept
        in memory; `State.result` and the future of the run read it again whenever they are asked.
    on_completion, on_failure, on_cancellation, on_crashed, on_running, on_skipped : list of callable, optional
        Called as ``hook(flow, flow_run, state)``, coroutine functions too; the run counts as ended when
        its hooks, and those of its tasks, have ended.
    """

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        version: str | None = None,
        tags: Iterable[str] = (),
        flow_run_name: RunName = None,
        retries: int | None = None,
        retry_delay_seconds: DelayOption = None,
        timeout_seconds: float | None = None,
        validate_parameters: bool = True,
        log_prints: bool | None = None,
        task_runner: Runner = None,
        on_exit: Literal["wait", "cancel", "detach"] = "wait",
        persist_result: Persistence = None,
        result_storage: Storage = None,
        result_serializer: str | None = None,
        cache_result_in_memory: bool = True,
        on_completion: Iterable[Hook] | None = None,
        on_failure: Iterable[Hook] | None = None,
        on_cancellation: Iterable[Hook] | None = None,
        on_crashed: Iterable[Hook] | None = None,
        on_running: Iterable[Hook] | None = None,
        on_skipped: Iterable[Hook] | None = None,
    ) -> None:
        self._kind: Any = type(fn)  # of a method: whether it gets the instance, the class, or nothing
        if isinstance(fn, (staticmethod, classmethod)):
            fn = cast("Callable[P, R]", fn.__func__)
        if not callable(fn):
            message = f"@flow needs a function, got {type(fn).__name__}."
            raise TypeError(message)
        check_choices("readonly", "auto", timeout_seconds)
        check_callables(None, flow_run_name, "flow_run_name")
        check_wish(task_runner)
        own = getattr(fn, "__name__", None) or type(fn).__name__
        label = name or ("unknown-lambda" if own == "<lambda>" else own.replace("_", "-"))
        if _FORBIDDEN & set(label):
            message = f"Name {label!r} contains an invalid character: / % & < > are not allowed."
            raise errors.InvalidNameError(message)
        check_exit(on_exit)
        self.fn = fn
        self.isasync = inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn)
        self.body = _drawn(fn)
        functools.update_wrapper(self, fn, updated=())
        self.signature = check_signature(fn)
        self.options = FlowOptions(
            name=label,
            description=description or inspect.getdoc(fn),
            version=version,
            tags=frozenset(tags),
            flow_run_name=flow_run_name,
            timeout_seconds=timeout_seconds,
            validate_parameters=validate_parameters,
            log_prints=log_prints,
            task_runner=task_runner,
            retry=retry_policy(retries, retry_delay_seconds, None, 0, settings().flow_default_retries),
            retry_delay_seconds=retry_delay_seconds,
            on_exit=on_exit,
            results=read_options(persist_result, result_storage, None, serializer_of(result_serializer)),
            in_memory=bool(cache_result_in_memory),
            hooks=read_hooks(
                "flow",
                on_completion=on_completion,
                on_failure=on_failure,
                on_cancellation=on_cancellation,
                on_crashed=on_crashed,
                on_running=on_running,
                on_skipped=on_skipped,
            ),
        )
        self._runner_override: Any = None

    @property
    def name(self) -> str:
        """Name of the flow."""
        return self.options.name

    @property
    def version(self) -> str:
        """What tells this code from that of yesterday: as given, else the git revision, else a hash."""
        return self.options.version or revision.version_of(self.fn)

    def __getattr__(self, name: str) -> Any:
        """Show an option under its name."""
        return view(self, name)

    def __repr__(self) -> str:
        """Show the name."""
        return f"<Flow {self.name}>"

    def _repr_html_(self) -> str:
        """Show in a notebook."""
        options = self.options
        rows = [("Parameters", str(self.signature))]
        if options.description:
            rows.append(("Description", options.description.splitlines()[0]))
        if options.version:
            rows.append(("Version", options.version))
        if options.tags:
            rows.append(("Tags", ", ".join(sorted(options.tags))))
        if options.retry.retries:
            rows.append(("Retries", str(options.retry.retries)))
        if options.timeout_seconds is not None:
            rows.append(("Time-out", f"{options.timeout_seconds} s"))
        return markup.card("Flow", self.name, rows)

    def __get__(self, instance: object, owner: type) -> Flow[..., R]:
        """Bind to an instance or class: a method can be a flow, and ``self`` is its first parameter."""
        if self._kind is classmethod:
            instance = owner
        if instance is None or self._kind is staticmethod:
            return self
        bound: Flow[..., R] = object.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound.__dict__["_instance"] = instance
        return bound

    # -- call -------------------------------------------------------------------------------------
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(
        self, *args: Any, return_state: Literal[True], wait_for: Any = None, **kwargs: Any
    ) -> State: ...
    def __call__(  # type: ignore[misc] # the user's signature stands in the overloads
        self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any
    ) -> Any:
        """Run the flow (an async flow: answer an awaitable of the run).

        Parameters
        ----------
        *args, **kwargs
            Of the function.
        return_state : bool
            Answer the final state instead of the value.
        wait_for : iterable, optional
            In a nested flow: futures that have to end first.

        Returns
        -------
        object
            What the function returns. At the top futures in it are replaced by their values;
            inside a flow they stay references.

        Raises
        ------
        Exception
            What the function raised, or the first of the returned futures that failed.
        """
        try:
            if "_instance" in self.__dict__:
                args = (self.__dict__["_instance"], *args)
            steps = self._steps(args, kwargs, return_state, wait_for)
            if self.isasync:
                return _hidden(drive_awaiting(steps))
            return drive(steps)
        except BaseException as error:
            errors.hide_frames(error)
            raise

    def _steps(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], return_state: bool, wait_for: Any
    ) -> Steps:
        run = FlowRunScope(self, context.current(), args, kwargs)
        return steps(run, wait_for, return_state)

    # -- beside the caller --------------------------------------------------------------------------
    @overload
    def submit(
        self, *args: Any, return_state: Literal[True], wait_for: Any = None, **kwargs: Any
    ) -> State: ...
    @overload
    def submit(
        self: Flow[P, Coroutine[Any, Any, S]], *args: Any, wait_for: Any = None, **kwargs: Any
    ) -> PenstockFuture[S]: ...
    @overload
    def submit(self, *args: Any, wait_for: Any = None, **kwargs: Any) -> PenstockFuture[R]: ...
    def submit(self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any) -> Any:
        """Run the flow beside the code that calls, on the same runner; returns a future at once.

        Parameters
        ----------
        *args, **kwargs
            Of the function, as in a call.
        return_state : bool
            Wait for the end and answer the state.
        wait_for : iterable, optional
            Futures that have to end first.

        Returns
        -------
        PenstockFuture
            Of the run; its value is what a call would return, with values in the place of futures.

        Raises
        ------
        RuntimeError
            Outside of a flow, if no runner is open.
        """
        from penstock.engine import background

        try:
            if "_instance" in self.__dict__:
                args = (self.__dict__["_instance"], *args)
            future = background.submit(self, args, kwargs, wait_for)
        except BaseException as error:
            errors.hide_frames(error)
            raise
        if return_state:
            future.wait()
            return future.state
        return future

    @overload
    def map(
        self, *args: Any, return_state: Literal[True], wait_for: Any = None, **kwargs: Any
    ) -> list[State]: ...
    @overload
    def map(self, *args: Any, **kwargs: Any) -> PenstockFutureList[Any]: ...
    def map(self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any) -> Any:
        """Submit one run of the flow for each element of the iterable arguments.

        The rules are those of `Task.map`. At most 32 runs of one map go on at the same time.

        Parameters
        ----------
        *args, **kwargs
            Of the function.
        return_state : bool
            Wait for all and answer their states.
        wait_for : iterable, optional
            Futures that have to end first.

        Raises
        ------
        MappingMissingIterable, MappingLengthMismatch
            If there is nothing to map over, or the lengths differ.
        """
        from penstock.engine import background

        try:
            if "_instance" in self.__dict__:
                args = (self.__dict__["_instance"], *args)
            futures = background.map_over(self, args, kwargs, wait_for)
        except BaseException as error:
            errors.hide_frames(error)
            raise
        if return_state:
            futures.wait()
            return [future.state for future in futures]
        return futures

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Plan:
        """Show what penstock would do with a call of the flow; the function runs, its tasks do not.

        Parameters
        ----------
        *args, **kwargs
            Of the function.

        Returns
        -------
        Plan
            Print it. It ends where the flow asks for a value, or takes the elements of a map one by one that
            is very long or whose length only a run can tell; and it says where that is.
        """
        from penstock.engine import plan

        given: tuple[Any, ...] = args
        if "_instance" in self.__dict__:
            given = (self.__dict__["_instance"], *args)
        return plan.explain(self, given, kwargs)

    # -- hooks ------------------------------------------------------------------------------------
    def on_completion(self, fn: H) -> H:
        """Decorate a function that is called when a run has completed."""
        return self._also("on_completion", fn)

    def on_failure(self, fn: H) -> H:
        """Decorate a function that is called when a run has failed."""
        return self._also("on_failure", fn)

    def on_cancellation(self, fn: H) -> H:
        """Decorate a function that is called when a run was cancelled."""
        return self._also("on_cancellation", fn)

    def on_crashed(self, fn: H) -> H:
        """Decorate a function that is called when a run has crashed."""
        return self._also("on_crashed", fn)

    def on_running(self, fn: H) -> H:
        """Decorate a function that is called when a run begins."""
        return self._also("on_running", fn)

    def on_skipped(self, fn: H) -> H:
        """Decorate a function that is called when a run was skipped."""
        return self._also("on_skipped", fn)

    def _also(self, kind: str, fn: H) -> H:
        self.options = with_fields(self.options, hooks=self.options.hooks.and_also(kind, fn, "flow"))
        return fn

    # -- options ----------------------------------------------------------------------------------
    def with_options(
        self,
        *,
        name: str = NOT_GIVEN,
        description: str | None = NOT_GIVEN,
        version: str | None = NOT_GIVEN,
        tags: Iterable[str] = NOT_GIVEN,
        flow_run_name: RunName = NOT_GIVEN,
        retries: int | None = NOT_GIVEN,
        retry_delay_seconds: DelayOption = NOT_GIVEN,
        timeout_seconds: float | None = NOT_GIVEN,
        validate_parameters: bool = NOT_GIVEN,
        log_prints: bool | None = NOT_GIVEN,
        task_runner: Runner = NOT_GIVEN,
        on_exit: Literal["wait", "cancel", "detach"] = NOT_GIVEN,
        persist_result: Persistence = NOT_GIVEN,
        result_storage: Storage = NOT_GIVEN,
        result_serializer: str | None = NOT_GIVEN,
        cache_result_in_memory: bool = NOT_GIVEN,
        on_completion: Iterable[Hook] | None = NOT_GIVEN,
        on_failure: Iterable[Hook] | None = NOT_GIVEN,
        on_cancellation: Iterable[Hook] | None = NOT_GIVEN,
        on_crashed: Iterable[Hook] | None = NOT_GIVEN,
        on_running: Iterable[Hook] | None = NOT_GIVEN,
        on_skipped: Iterable[Hook] | None = NOT_GIVEN,
    ) -> Flow[P, R]:
        """Make a flow with other options; what is not given stays as it is. Tags are replaced."""
        old = self.options
        delay = old.retry_delay_seconds if retry_delay_seconds is NOT_GIVEN else retry_delay_seconds
        count = old.retry.retries if retries is NOT_GIVEN else retries
        options: FlowOptions = changed(
            self.options,
            {
                "name": name,
                "description": description,
                "version": version,
                "tags": NOT_GIVEN if tags is NOT_GIVEN else frozenset(tags),
                "flow_run_name": flow_run_name,
                "timeout_seconds": timeout_seconds,
                "validate_parameters": validate_parameters,
                "log_prints": log_prints,
                "task_runner": task_runner,
                "retry": retry_policy(count, delay, None, 0, settings().flow_default_retries),
                "retry_delay_seconds": delay,
                "on_exit": on_exit,
                "results": changed_results(
                    self.options.results,
                    persist_result,
                    result_storage,
                    NOT_GIVEN,
                    serializer_of(result_serializer),
                ),
                "in_memory": cache_result_in_memory,
                "hooks": changed_hooks(
                    self.options.hooks,
                    "flow",
                    on_completion=on_completion,
                    on_failure=on_failure,
                    on_cancellation=on_cancellation,
                    on_crashed=on_crashed,
                    on_running=on_running,
                    on_skipped=on_skipped,
                ),
            },
        )
        check_choices("readonly", "auto", options.timeout_seconds)
        check_callables(None, options.flow_run_name, "flow_run_name")
        check_exit(options.on_exit)
        new: Flow[P, R] = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.options = options
        if task_runner is not NOT_GIVEN:
            check_wish(task_runner)
            new._runner_override = task_runner
        return new

    def validate_parameters(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check and coerce parameters by the annotations of the function, as a call does, without a run.

        Parameters
        ----------
        given : mapping
            Arguments by name; those with a default may be left out.

        Returns
        -------
        dict
            What the function would get, defaults included.

        Raises
        ------
        ParameterBindError
            If a parameter is missing, or unknown.
        ParameterTypeError
            Naming each one that does not fit.
        """
        bound = parameters.bind(self.signature, self.name, (), dict(given))
        return parameters.validate(self.fn, self.signature, bound)

    def runner(self) -> TaskRunner:
        """Return the runner for a run of this flow.

        The strongest wish wins: `with_options`, then ``penstock run --runner`` and
        ``PENSTOCK_RUNNER``, then the decorator, then threads.
        """
        return runner_of(default_of(self._wish()))

    def _wish(self) -> Any:
        if self._runner_override is not None:
            return self._runner_override
        return settings().runner or self.options.task_runner

    def venues(self) -> tuple[Mapping[str, Any], Any]:
        """Return the runners that the flow has names for, and the one among them that it begins with."""
        mapping, wish = self.options.task_runner, self._wish()
        named = mapping if isinstance(mapping, Mapping) else {}
        return named, default_of(wish) if isinstance(wish, Mapping) else None


def _drawn(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a generator function one that returns the list of what it yields."""
    if inspect.isasyncgenfunction(fn):

        async def gathered(*args: Any, **kwargs: Any) -> list[Any]:
            return [item async for item in fn(*args, **kwargs)]

        return gathered
    if inspect.isgeneratorfunction(fn):
        return lambda *args, **kwargs: list(fn(*args, **kwargs))
    return fn


class FlowDecorator:
    """`@flow` with options, before it meets its function."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, fn: Callable[P, R]) -> Flow[P, R]:
        """Make the flow."""
        return Flow(fn, **self._options)


@overload
def flow(fn: Callable[P, R], /) -> Flow[P, R]: ...
@overload
def flow(
    *,
    name: str | None = None,
    description: str | None = None,
    version: str | None = None,
    tags: Iterable[str] = (),
    flow_run_name: RunName = None,
    retries: int | None = None,
    retry_delay_seconds: DelayOption = None,
    timeout_seconds: float | None = None,
    validate_parameters: bool = True,
    log_prints: bool | None = None,
    task_runner: Runner = None,
    on_exit: Literal["wait", "cancel", "detach"] = "wait",
    persist_result: Persistence = None,
    result_storage: Storage = None,
    result_serializer: str | None = None,
    cache_result_in_memory: bool = True,
    on_completion: Iterable[Hook] | None = None,
    on_failure: Iterable[Hook] | None = None,
    on_cancellation: Iterable[Hook] | None = None,
    on_crashed: Iterable[Hook] | None = None,
    on_running: Iterable[Hook] | None = None,
    on_skipped: Iterable[Hook] | None = None,
) -> FlowDecorator: ...
def flow(fn: Any = None, /, **options: Any) -> Any:
    """Turn a function into a flow: ``@flow`` or ``@flow(task_runner="dask", …)``.

    The options are those of `Flow`.

    >>> @flow(log_prints=True)
    ... def reduce(observation: str) -> float: ...
    """
    return FlowDecorator(options) if fn is None else Flow(fn, **options)
