"""`@flow`: a function whose run is recorded, and in which tasks are submitted to a runner."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

from penstock import errors
from penstock.engine import context
from penstock.engine.flow_run import FlowRunScope
from penstock.engine.options import (
    NOT_GIVEN,
    FlowOptions,
    RunName,
    changed,
    changed_results,
    check_choices,
    check_signature,
)
from penstock.engine.results import Persistence, Storage, read_options
from penstock.engine.states import State
from penstock.engine.steps import Invoke, Steps, Wait, drive, drive_awaiting
from penstock.engine.task import _hidden
from penstock.runners import runner_of
from penstock.runners.base import TaskRunner
from penstock.settings import settings

if TYPE_CHECKING:
    from penstock.engine.plan import Plan

P = ParamSpec("P")
R = TypeVar("R")
_FORBIDDEN = set("/%&<>")


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
    timeout_seconds : float, optional
        Then the run is FAILED with the name "TimedOut".
    validate_parameters : bool
        Check and coerce arguments by their annotations.
    log_prints : bool, optional
        Whether `print` writes to the log, in the flow and in its tasks.
    task_runner : str, type or TaskRunner, optional
        Where tasks run; threads by default. A nested flow uses its parent's.
    persist_result : bool or "large", optional
        Whether the worker stores the results of its tasks where it outlives the run's memory, before the run
        counts as completed; "large" only from ``PENSTOCK_LARGE_ARGUMENT`` bytes. Of a flow it is the default for its tasks,
        and for those of nested flows.
    result_storage : str, path or ResultStorage, optional
        Where: a directory or any URL of fsspec; ``storage`` in ``PENSTOCK_HOME`` by default.
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
        flow_run_name: RunName = None,
        timeout_seconds: float | None = None,
        validate_parameters: bool = True,
        log_prints: bool | None = None,
        task_runner: str | type[TaskRunner] | TaskRunner | None = None,
        persist_result: Persistence = None,
        result_storage: Storage = None,
        result_serializer: str | None = None,
    ) -> None:
        if not callable(fn):
            message = f"@flow needs a function, got {type(fn).__name__}."
            raise TypeError(message)
        if isinstance(fn, (staticmethod, classmethod)):
            fn = cast("Callable[P, R]", fn.__func__)
        check_choices("readonly", "auto", timeout_seconds)
        own = getattr(fn, "__name__", None) or type(fn).__name__
        label = name or ("unknown-lambda" if own == "<lambda>" else own.replace("_", "-"))
        if _FORBIDDEN & set(label):
            message = f"Name {label!r} contains an invalid character: / % & < > are not allowed."
            raise errors.InvalidNameError(message)
        self.fn = fn
        self.isasync = inspect.iscoroutinefunction(fn)
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
            results=read_options(persist_result, result_storage, None, result_serializer),
        )
        self._runner_override: Any = None

    @property
    def name(self) -> str:
        """Name of the flow."""
        return self.options.name

    def __repr__(self) -> str:
        """Show the name."""
        return f"<Flow {self.name}>"

    def __get__(self, instance: object, owner: type) -> Flow[..., R]:
        """Bind to an instance: a method can be a flow, and ``self`` is its first parameter."""
        if instance is None:
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
        outer = context.current()
        run = FlowRunScope(self, outer, args, kwargs)
        state: State | None = None
        try:
            run.make()
            if outer is not None and outer.session.plans:
                return (yield from run.planned_steps(wait_for, return_state))
            try:
                yield from run.arguments_steps(wait_for)
                run.start()
                with run.inside():
                    returned = yield Invoke(
                        self.fn, run.args, run.kwargs, self.options.timeout_seconds, name=run.flow_run.name
                    )
                    yield Wait(run.live(returned))
                state = run.returned(returned)
            except errors.UnfinishedRun as error:
                state = run.not_ready(error)
            except BaseException as error:
                state = yield from run.raised(error)
                if (
                    run.asked is None
                ):  # else the caller gets to know who asked, and not how the code was stopped
                    if not isinstance(error, Exception):
                        raise
                    run.raise_if_interrupted()
            if return_state:
                return run.give_state(state)
            return run.give_value(state)
        finally:
            run.close()

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Plan:
        """Show what penstock would do with a call of the flow; the function runs, its tasks do not.

        Parameters
        ----------
        *args, **kwargs
            Of the function.

        Returns
        -------
        Plan
            Print it. It ends where the flow asks for a value, and says where that is.
        """
        from penstock.engine import plan

        given: tuple[Any, ...] = args
        if "_instance" in self.__dict__:
            given = (self.__dict__["_instance"], *args)
        return plan.explain(self, given, kwargs)

    # -- options ----------------------------------------------------------------------------------
    def with_options(
        self,
        *,
        name: str = NOT_GIVEN,
        description: str | None = NOT_GIVEN,
        version: str | None = NOT_GIVEN,
        tags: Iterable[str] = NOT_GIVEN,
        flow_run_name: RunName = NOT_GIVEN,
        timeout_seconds: float | None = NOT_GIVEN,
        validate_parameters: bool = NOT_GIVEN,
        log_prints: bool | None = NOT_GIVEN,
        task_runner: str | type[TaskRunner] | TaskRunner | None = NOT_GIVEN,
        persist_result: Persistence = NOT_GIVEN,
        result_storage: Storage = NOT_GIVEN,
        result_serializer: str | None = NOT_GIVEN,
    ) -> Flow[P, R]:
        """Make a flow with other options; what is not given stays as it is. Tags are replaced."""
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
                "results": changed_results(
                    self.options.results, persist_result, result_storage, NOT_GIVEN, result_serializer
                ),
            },
        )
        new: Flow[P, R] = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.options = options
        if task_runner is not NOT_GIVEN:
            new._runner_override = task_runner
        return new

    def runner(self) -> TaskRunner:
        """Return the runner for a run of this flow.

        The strongest wish wins: `with_options`, then ``penstock run --runner`` and
        ``PENSTOCK_RUNNER``, then the decorator, then threads.
        """
        if self._runner_override is not None:
            return runner_of(self._runner_override)
        return runner_of(settings().runner or self.options.task_runner)


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
    timeout_seconds: float | None = None,
    validate_parameters: bool = True,
    log_prints: bool | None = None,
    task_runner: str | type[TaskRunner] | TaskRunner | None = None,
    persist_result: Persistence = None,
    result_storage: Storage = None,
    result_serializer: str | None = None,
) -> FlowDecorator: ...
def flow(fn: Any = None, /, **options: Any) -> Any:
    """Turn a function into a flow: ``@flow`` or ``@flow(task_runner="dask", …)``.

    The options are those of `Flow`.

    >>> @flow(log_prints=True)
    ... def reduce(observation: str) -> float: ...
    """
    return FlowDecorator(options) if fn is None else Flow(fn, **options)
