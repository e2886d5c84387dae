"""What a type checker must know about the public API. Checked by `scripts/check`, never run."""

from collections.abc import Awaitable
from typing import Any, assert_type

from penstock import (
    ConcurrentTaskRunner,
    DaskTaskRunner,
    PenstockFuture,
    PenstockFutureList,
    ProcessPoolTaskRunner,
    RayTaskRunner,
    SequentialTaskRunner,
    State,
    StateType,
    ThreadPoolTaskRunner,
    Transaction,
    allow_failure,
    as_completed,
    flow,
    get_run_logger,
    put,
    quote,
    remote_options,
    tags,
    task,
    transaction,
    unmapped,
    wait,
)


@task
def bare(x: int, scale: float = 1.0) -> float:
    return x * scale


@task(name="with options", retries=3, retry_delay_seconds=[1, 2, 4], tags={"io"}, log_prints=True)
def configured(x: int) -> list[int]:
    return [x]


@task
async def asynchronous(x: int) -> str:
    return str(x)


# A direct call keeps the signature and the result of the function.
assert_type(bare(1), float)
assert_type(bare(1, scale=2.0), float)
assert_type(configured(1), list[int])
bare("one")  # type: ignore[call-overload]

# Submitting gives a future of the result, mapping a list of such futures.
future = bare.submit(1)
assert_type(future, PenstockFuture[float])
assert_type(future.result(), float)
assert_type(future.state, State)
future.wait(timeout=1)

many = configured.map([1, 2, 3])
assert_type(many, PenstockFutureList[list[int]])
assert_type(many[0], PenstockFuture[list[int]])
assert_type(many.result(), list[list[int]])
for element in many:
    assert_type(element.result(), list[int])

# Futures and annotations stand in for values.
bare.submit(bare.submit(1), wait_for=[future, many])
bare.map([1, 2], scale=unmapped(2.0))
bare.submit(allow_failure(future))
bare.submit(quote(3))

# What is put has the type of its value, wherever a future is welcome.
assert_type(put(3).result(), int)
bare.submit(put(3))
bare.map([1, 2], scale=unmapped(put(2.0)))
for item in future.items():
    assert_type(item, PenstockFuture[Any])

# The result of an async task is awaited when called, ready when submitted.
assert_type(asynchronous.submit(1).result(), str)


async def in_a_loop() -> None:
    assert_type(await asynchronous(1), str)
    assert_type(await future, float)
    awaitable: Awaitable[float] = future
    await awaitable


# The name of a copy may differ, its types do not.
assert_type(bare.with_options(retries=2).submit(1), PenstockFuture[float])


@flow
def plain(n: int) -> float:
    with tags("typed"):
        get_run_logger().info("typed")
        futures = bare.map(range(n))
        done, _ = wait(futures)
        for one in as_completed(done):
            one.result()
        return sum(futures.result())


@flow(name="with a runner", task_runner=ThreadPoolTaskRunner(max_workers=2), log_prints=True)
def with_runner(n: int = 3) -> list[float]:
    return [plain(n)]


assert_type(plain(3), float)
assert_type(with_runner(), list[float])
assert_type(plain.with_options(task_runner="dask")(3), float)
plain("three")  # type: ignore[call-overload]

runners: list[Any] = [
    SequentialTaskRunner(),
    ConcurrentTaskRunner(),
    ProcessPoolTaskRunner(max_workers=2),
    DaskTaskRunner,
    RayTaskRunner,
]
for runner in runners:
    plain.with_options(task_runner=runner)


@bare.on_completion
def noted(done: Any, run: Any, state: State) -> None: ...


@plain.on_failure
async def told(failed: Any, run: Any, state: State) -> int:
    return 1


assert_type(noted(bare, None, State(StateType.COMPLETED)), None)
plain.with_options(task_runner={"main": "threads", "big": "dask"}, on_completion=[noted])
bare.with_options(task_runner="big", resources={"GPU": 1, "memory": "20GB"}, timeout_action="kill_worker")
with remote_options(num_gpus=1):
    assert_type(bare.submit(1), PenstockFuture[float])


# A block gives its transaction, and a hook stays the function that it was.
with transaction("key", commit_mode="EAGER") as txn:
    assert_type(txn, Transaction)


@bare.on_rollback
def taken_back(transaction: Transaction) -> None: ...


taken_back(txn)
