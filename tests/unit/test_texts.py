"""What errors and states say: texts that scripts and people know, kept word for word."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

import penstock
from penstock import (
    Cancelled,
    Completed,
    DaskTaskRunner,
    Failed,
    IsolationLevel,
    MemoryLockManager,
    Pending,
    ProcessPoolTaskRunner,
    RayTaskRunner,
    Running,
    State,
    TerminationSignal,
    ThreadPoolTaskRunner,
    as_completed,
    flow,
    task,
    wait,
)
from penstock.cache_policies import INPUTS, RUN_ID, TASK_SOURCE, CachePolicy


def work(x: Any = 1, y: Any = 2) -> Any:
    return x


@task
def hold(seconds: float = 0.6) -> None:
    import time

    time.sleep(seconds)


@task
def fail() -> None:
    raise ValueError("no data")


@task
def numbers() -> Any:
    yield 1


def anything(**options: Any) -> Any:
    """Options of wrong types, which is the point."""
    return task(**options)(work)


def in_flow(body: Callable[[], Any]) -> Any:
    return flow(task_runner=ThreadPoolTaskRunner(max_workers=4))(body)()


def called(function: Any, *args: Any, **kwargs: Any) -> Any:
    return flow(function)(*args, **kwargs)


def reserved() -> Any:
    def takes(wait_for: Any) -> None: ...

    return task(takes)


def two(x: Any, y: Any) -> None: ...


any_task: Any = task
any_flow: Any = flow
any_hold: Any = hold


def waits_for_itself() -> Any:
    futures: list[Any] = []

    @task
    def looks_back() -> None:
        futures[0].wait()

    def body() -> None:
        import threading

        ready = threading.Event()

        @task
        def starts() -> None:
            ready.wait(5)
            futures[0].result()

        futures.append(starts.submit())
        ready.set()
        futures[0].result()

    return in_flow(body)


def late(take: Callable[[list[Any]], Any]) -> Any:
    def body() -> Any:
        futures = [hold.submit(0.0), hold.submit(), hold.submit()]
        futures[0].wait()
        return take(futures)

    return in_flow(body)


def with_storage(place: str) -> CachePolicy:
    return INPUTS.configure(key_storage=place)


TEXTS: list[tuple[str, type[BaseException], Callable[[], Any], str]] = [
    (
        "hooks that are no list",
        TypeError,
        lambda: anything(on_completion=work),
        "Expected iterable for 'on_completion'; got function instead. Please provide a list of hooks to 'on_completion':",
    ),
    (
        "hooks of a flow that are no list",
        TypeError,
        lambda: any_flow(on_failure=work)(work),
        "to 'on_failure':\n\n@flow(on_failure=[hook1, hook2])\ndef my_flow():\n\tpass",
    ),
    (
        "hooks that cannot be called",
        TypeError,
        lambda: anything(on_failure=["mail"]),
        "Expected callables in 'on_failure'; got str instead. Please provide a list of hooks to 'on_failure':",
    ),
    (
        "a reserved name",
        penstock.ReservedArgumentError,
        reserved,
        "'wait_for' is a reserved argument name",
    ),
    (
        "too many delays",
        ValueError,
        lambda: anything(retries=60, retry_delay_seconds=[1.0] * 51),
        "Can not configure more than 50 retry delays per task.",
    ),
    (
        "too many delays from a callable",
        ValueError,
        lambda: anything(retries=51, retry_delay_seconds=lambda retries: [1.0] * retries),
        "Can not configure more than 50 retry delays per task.",
    ),
    (
        "a negative jitter",
        ValueError,
        lambda: anything(retry_jitter_factor=-1),
        "`retry_jitter_factor` must be >= 0.",
    ),
    (
        "a condition that cannot be called",
        TypeError,
        lambda: anything(retry_condition_fn="always"),
        "Expected `retry_condition_fn` to be callable, got str instead.",
    ),
    (
        "an argument that is missing",
        penstock.ParameterBindError,
        lambda: in_flow(lambda: any_task(two).submit(1)),
        "missing a required argument: 'y'",
    ),
    (
        "an argument that is missing in a direct call",
        penstock.ParameterBindError,
        lambda: any_task(two)(1),
        "missing a required argument: 'y'",
    ),
    (
        "an argument that a flow misses",
        penstock.ParameterBindError,
        lambda: called(two, 1),
        "missing a required argument: 'y'",
    ),
    (
        "an argument given twice",
        penstock.ParameterBindError,
        lambda: in_flow(lambda: any_task(two).submit(1, x=2)),
        "multiple values for argument 'x'",
    ),
    ("a task that waits for itself", ValueError, waits_for_itself, "deadlock"),
    (
        "a name that is no text",
        TypeError,
        lambda: anything(task_run_name=3),
        "Expected string or callable for 'task_run_name'; got int instead.",
    ),
    (
        "a name of a flow that is no text",
        TypeError,
        lambda: any_flow(flow_run_name=3)(work),
        "Expected string or callable for 'flow_run_name'; got int instead.",
    ),
    (
        "a callable that gives no text",
        TypeError,
        lambda: any_task(task_run_name=lambda: 3)(work)(),
        "for 'task_run_name' returned type int but a string is required.",
    ),
    (
        "a forbidden character",
        penstock.InvalidNameError,
        lambda: flow(name="a/b")(work),
        "contains an invalid character",
    ),
    (
        "a parameter of the wrong type",
        penstock.ParameterTypeError,
        lambda: called(typed, "many"),
        "Validation of flow parameters failed with error: invalid parameters: ",
    ),
    (
        "a negative time-out",
        ValueError,
        lambda: in_flow(lambda: wait([hold.submit(0.0)], timeout=-1)),
        "'timeout' must be a non-negative number, got -1",
    ),
    (
        "a negative time-out of as_completed",
        ValueError,
        lambda: in_flow(lambda: list(as_completed([hold.submit(0.0)], timeout=-0.5))),
        "'timeout' must be a non-negative number, got -0.5",
    ),
    (
        "a list that is late",
        TimeoutError,
        lambda: late(lambda futures: penstock.PenstockFutureList(futures).result(timeout=0.05)),
        "Timed out waiting for all futures to complete within 0.05 seconds",
    ),
    (
        "futures that are late",
        TimeoutError,
        lambda: late(lambda futures: list(as_completed(futures, timeout=0.05))),
        "2 (of 3) futures unfinished",
    ),
    (
        "one future that is late",
        TimeoutError,
        lambda: late(lambda futures: futures[1].result(timeout=0.05)),
        "did not complete within 0.05 seconds",
    ),
    (
        "the state of a generator",
        ValueError,
        lambda: numbers(return_state=True),
        "The return_type for a generator task must be 'result'",
    ),
    (
        "an upstream that failed",
        penstock.UnfinishedRun,
        lambda: in_flow(lambda: any_hold.submit(fail.submit()).result()),
        "did not reach a 'COMPLETED' state.",
    ),
    (
        "a run without a result yet",
        penstock.UnfinishedRun,
        lambda: Running().result(),
        "Run is in Running state, its result is not available.",
    ),
    (
        "a run that waits",
        penstock.UnfinishedRun,
        lambda: Pending().result(),
        "Run is in Pending state, its result is not available.",
    ),
    (
        "policies with two storages",
        ValueError,
        lambda: with_storage("/a") + TASK_SOURCE.configure(key_storage="/b"),
        "Cannot add CachePolicies with different storage locations.",
    ),
    (
        "policies with two levels",
        ValueError,
        lambda: (
            INPUTS.configure(isolation_level=IsolationLevel.SERIALIZABLE)
            + RUN_ID.configure(isolation_level=IsolationLevel.READ_COMMITTED)
        ),
        "Cannot add CachePolicies with different isolation levels.",
    ),
    (
        "policies with two locks",
        ValueError,
        lambda: (
            INPUTS.configure(lock_manager=MemoryLockManager())
            + RUN_ID.configure(lock_manager=penstock.FileSystemLockManager("/nowhere"))
        ),
        "Cannot add CachePolicies with different lock implementations.",
    ),
    (
        "serial without a lock",
        penstock.ConfigurationError,
        lambda: task(cache_policy=INPUTS.configure(isolation_level=IsolationLevel.SERIALIZABLE))(work)(),
        "Isolation level SERIALIZABLE is not supported by provided configuration",
    ),
    (
        "a submit without a runner",
        RuntimeError,
        lambda: hold.submit(),
        "Unable to determine task runner to use for submission",
    ),
    (
        "a map without a runner",
        RuntimeError,
        lambda: hold.map([1.0]),
        "Unable to determine task runner to use for submission",
    ),
    (
        "a runner that is entered twice",
        RuntimeError,
        lambda: entered_twice(),
        "This task runner is already started",
    ),
    (
        "no context",
        penstock.MissingContextError,
        penstock.get_run_logger,
        "There is no active flow or task run",
    ),
]


def typed(count: int) -> None: ...


def entered_twice() -> None:
    runner = ThreadPoolTaskRunner(max_workers=1)
    with runner, runner:
        pass


@pytest.mark.parametrize(
    ("error", "call", "text"), [row[1:] for row in TEXTS], ids=[row[0].replace(" ", "-") for row in TEXTS]
)
def test_an_error_says(error: type[BaseException], call: Callable[[], Any], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_the_upstream_is_named() -> None:
    def body() -> tuple[str, str]:
        failed = fail.submit()
        never = any_hold.submit(failed)
        never.wait()
        return never.state.message, failed.task_run_id

    message, run = in_flow(body)
    assert message == f"Upstream task run '{run}' did not reach a 'COMPLETED' state."


# ------------------------------------------------------------------------------------------- states of flows


def ended(*returned: Any) -> State:
    found: Any = any_flow(lambda: list(returned))(return_state=True)
    return found


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([Completed(), Completed()], "All states completed."),
        ([Failed(message="x"), Completed(), Failed(message="y")], "2/3 states failed."),
        ([Cancelled(), Completed(), Completed()], "1/3 states cancelled."),
        ([Pending()], "1/1 states are not final."),
    ],
)
def test_a_flow_counts_the_states_that_it_returns(states: list[State], text: str) -> None:
    assert ended(*states).message == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyboardInterrupt(), "Execution was aborted by an interrupt signal."),
        (TerminationSignal(), "Execution was aborted by a termination signal."),
        (SystemExit(3), "Execution was aborted by Python system exit call."),
        (asyncio.CancelledError(), "Execution was cancelled by the runtime environment."),
    ],
)
def test_what_aborts_a_flow(error: BaseException, text: str) -> None:
    seen: list[str] = []

    def note(flow: Any, run: Any, state: State) -> None:
        seen.append(state.message or "")

    @flow(on_crashed=[note])
    def aborted() -> None:
        raise error

    with pytest.raises(type(error)):
        aborted()
    assert seen == [text]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyboardInterrupt, "Execution was aborted by an interrupt signal."),
        (SystemExit, "Execution was aborted by Python system exit call."),
    ],
)
def test_what_aborts_a_task(error: type[BaseException], text: str) -> None:
    @task
    def aborted() -> None:
        raise error

    def body() -> str | None:
        future = aborted.submit()
        future.wait()
        return future.state.message

    assert in_flow(body) == text


def test_a_time_out_names_its_seconds() -> None:
    @flow(timeout_seconds=0.1)
    def slow() -> None:
        hold(5.0)

    state: Any = slow(return_state=True)
    assert state.name == "TimedOut"
    assert "exceeded timeout of 0.1 second(s)" in state.message


# --------------------------------------------------------------------------------- runners that are not open


@pytest.mark.parametrize(
    ("runner", "text"),
    [
        (ThreadPoolTaskRunner(), "Task runner is not started"),
        (ProcessPoolTaskRunner(), "Task runner is not started"),
        (penstock.SequentialTaskRunner(), "Task runner is not started"),
        (DaskTaskRunner(), "The task runner must be started before submitting work."),
        (RayTaskRunner(), "The task runner must be started before submitting work."),
    ],
    ids=lambda one: type(one).__name__ if not isinstance(one, str) else "",
)
def test_a_runner_that_is_not_started(runner: Any, text: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(text)):
        runner.submit(hold, {"seconds": 0.0})
    with pytest.raises(
        RuntimeError, match=re.escape("The task runner must be started before submitting work.")
    ):
        runner.map(hold, {"seconds": [0.0]})
