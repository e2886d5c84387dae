"""Cache policies: sums, differences, keys; pure."""

import datetime as dt
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from penstock import ConfigurationError, task
from penstock.cache_policies import (
    DEFAULT,
    FLOW_PARAMETERS,
    INPUTS,
    NO_CACHE,
    NONE,
    RUN_ID,
    TASK_SOURCE,
    CachePolicy,
    IsolationLevel,
    TaskContext,
    task_input_hash,
)
from penstock.engine.cache import TaskRunInfo, lasts, looks_at_values, needs, read_cache_options
from penstock.engine.locking import FileSystemLockManager, LockManager, MemoryLockManager


@task
def one(x: int) -> int:
    return x


@task
def other(x: int) -> int:
    return x + 1


def context(which: Any = one, run: str = "r", flow: str | None = "f") -> TaskContext:
    return TaskContext(which, TaskRunInfo(run, flow_run_id=flow))


def key(policy: CachePolicy, inputs: Any = None, parameters: Any = None, about: Any = None) -> str | None:
    return policy.compute_key(about or context(), inputs or {}, parameters or {})


def test_inputs_count_and_their_order_does_not() -> None:
    assert key(INPUTS, {"a": 1, "b": 2}) == key(INPUTS, {"b": 2, "a": 1}) != key(INPUTS, {"a": 2, "b": 2})
    assert key(INPUTS) is None
    assert key(INPUTS - "b", {"a": 1, "b": 2}) == key(INPUTS - "b", {"a": 1, "b": 3})
    assert key(INPUTS - "b" - "a", {"a": 1, "b": 2}) == key(INPUTS - "a" - "b", {"a": 3, "b": 4})


def test_code_run_and_parameters_count() -> None:
    assert key(TASK_SOURCE) == key(TASK_SOURCE, {"a": 1}) != key(TASK_SOURCE, about=context(other))
    assert key(RUN_ID) == "f"
    assert key(RUN_ID, about=context(flow=None)) == "r"
    assert key(FLOW_PARAMETERS) is None
    assert key(FLOW_PARAMETERS, None, {"a": 1}) != key(FLOW_PARAMETERS, None, {"a": 2})


def test_sums() -> None:
    both = INPUTS + TASK_SOURCE
    assert key(both, {"a": 1}) != key(both, {"a": 1}, about=context(other))
    assert key(both) is not None  # one of them has a key
    assert key(INPUTS + FLOW_PARAMETERS) is None
    assert key(both - "a", {"a": 1, "b": 1}) == key(both - "a", {"a": 2, "b": 1})
    assert key(TASK_SOURCE - "a", {"a": 1, "b": 1}) == key(TASK_SOURCE - "a", {"a": 2, "b": 1})
    assert key(DEFAULT, {"a": 1}) != key(DEFAULT, {"a": 1}, about=context(flow="g"))
    assert repr(INPUTS - "a" + TASK_SOURCE) == "INPUTS - 'a' + TaskSource"


def test_no_cache_is_neutral() -> None:
    assert NONE is NO_CACHE
    assert key(NO_CACHE, {"a": 1}) is None
    for policy in (NO_CACHE + INPUTS, INPUTS + NO_CACHE, NO_CACHE + INPUTS + NO_CACHE):
        assert (key(policy, {"a": 1}) is None) is False
    assert key(NO_CACHE + INPUTS, {"a": 1}) == key(INPUTS, {"a": 1})


@pytest.mark.parametrize(
    ("name", "one", "other", "what"),
    [
        ("key_storage", "/a", "/b", "storage locations"),
        ("isolation_level", "SERIALIZABLE", IsolationLevel.READ_COMMITTED, "isolation levels"),
        ("lock_manager", FileSystemLockManager("/a"), FileSystemLockManager("/b"), "lock implementations"),
    ],
)
def test_what_contradicts_itself_is_not_added(name: str, one: Any, other: Any, what: str) -> None:
    left, right = INPUTS.configure(**{name: one}), TASK_SOURCE.configure(**{name: other})
    with pytest.raises(ValueError, match=f"Cannot add CachePolicies with different {what}."):
        left + right
    assert getattr(left + TASK_SOURCE, name) == getattr(left, name) == getattr(TASK_SOURCE + left, name)
    assert getattr(left - "x", name) == getattr(left, name)
    assert getattr(INPUTS, name) is None


def test_functions_and_subclasses() -> None:
    made = CachePolicy.from_cache_key_fn(lambda about, inputs: f"{about.task.name}:{inputs['a']}")
    assert key(made, {"a": 3}) == "one:3"
    assert key(CachePolicy.from_cache_key_fn(task_input_hash), {"a": 1}) == task_input_hash(
        context(), {"a": 1}
    )
    assert looks_at_values(made + INPUTS)
    assert not looks_at_values(DEFAULT)
    assert not looks_at_values(CachePolicy.from_cache_key_fn(task_input_hash))
    assert needs(INPUTS - "a", "b")
    assert not needs(INPUTS - "a", "a")
    assert not needs(TASK_SOURCE + RUN_ID, "a")
    assert lasts(INPUTS)
    assert not lasts(DEFAULT)
    with pytest.raises(NotImplementedError):
        key(CachePolicy())


def test_what_has_no_content_is_named() -> None:
    with pytest.raises(ValueError, match="argument 'lock' cannot be part of a cache key") as caught:
        key(INPUTS, {"x": 1, "lock": threading.Lock()})
    assert 'INPUTS - "lock"' in str(caught.value)


def test_policies_travel() -> None:
    for policy in (DEFAULT, INPUTS - "a", NO_CACHE):
        assert key(pickle.loads(pickle.dumps(policy)), {"a": 1, "b": 2}) == key(policy, {"a": 1, "b": 2})


def test_options_are_checked() -> None:
    def read(**changes: Any) -> Any:
        given = {"given": INPUTS, "key_fn": None, "expiration": None, "refresh": None, "in_memory": True}
        return read_cache_options(**{**given, "persist": None, **changes})

    assert read().policy is INPUTS
    assert read(given=None).policy is NO_CACHE
    assert read(expiration=dt.timedelta(minutes=1)).expiration == 60
    with pytest.raises(
        ConfigurationError, match="'cache_policy' must be a CachePolicy or None, got 'INPUTS'"
    ):
        read(given="INPUTS")
    with pytest.raises(ConfigurationError, match="'cache_key_fn' must be a function"):
        read(key_fn="x")
    for wrong in (-1, "1", True):
        with pytest.raises(ConfigurationError, match="'cache_expiration' must be a timedelta or a number of"):
            read(expiration=wrong)
    with pytest.warns(UserWarning, match="Both 'cache_policy' and 'cache_key_fn' are set"):
        assert read(key_fn=task_input_hash).key_fn is task_input_hash
    with pytest.warns(UserWarning, match="Ignoring 'cache_policy' because 'persist_result' is False"):
        assert read(persist=False).policy is NO_CACHE
    with pytest.raises(
        ConfigurationError, match="Isolation level SERIALIZABLE is not supported by provided conf"
    ):
        read(given=INPUTS.configure(isolation_level="SERIALIZABLE"))


def test_options_are_changed_one_by_one() -> None:
    made = task(cache_policy=INPUTS, cache_expiration=60)(one.fn)
    caching = made.options.results.caching
    assert (caching.policy, caching.expiration, made.options.results.wish) == (INPUTS, 60.0, True)
    assert made.with_options(retries=1).options.results.caching == caching
    assert made.with_options(refresh_cache=True).options.results.caching.policy is INPUTS
    assert made.with_options(cache_expiration=None).options.results.caching.expiration is None
    off = made.with_options(cache_policy=NO_CACHE).options.results
    assert (off.caching.policy, off.wish) == (NO_CACHE, None)
    by_function = made.with_options(cache_key_fn=task_input_hash)
    assert by_function.options.results.caching.key_fn is task_input_hash
    assert by_function.with_options(retries=1).options.results.caching.key_fn is task_input_hash
    assert by_function.with_options(cache_policy=INPUTS).options.results.caching.policy is INPUTS


# -- locks ----------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "files"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> LockManager:
    return MemoryLockManager() if request.param == "memory" else FileSystemLockManager(tmp_path / "locks")


def test_a_lock_has_one_holder(manager: LockManager) -> None:
    assert manager.acquire_lock("k", "a")
    assert manager.acquire_lock("k", "a")  # its own
    assert not manager.acquire_lock("k", "b", acquire_timeout=0.05)
    assert not manager.acquire_lock("k", "b", acquire_timeout=0)
    assert manager.acquire_lock("other", "b", acquire_timeout=0)
    assert manager.is_locked("k")
    assert manager.is_lock_holder("k", "a")
    assert not manager.is_lock_holder("k", "b")
    assert not manager.wait_for_lock("k", timeout=0.05)
    with pytest.raises(ValueError, match="no lock held by 'b' for 'k'"):
        manager.release_lock("k", "b")
    with pytest.raises(TimeoutError), manager.lock("k", "b", acquire_timeout=0.01):
        pass
    manager.release_lock("k", "a")
    manager.release_lock("other", "b")
    assert not manager.is_locked("k")
    assert manager.wait_for_lock("k", timeout=0)
    with manager.lock("k", "b"):
        assert manager.is_lock_holder("k", "b")
    assert not manager.is_locked("k")


def test_one_after_the_other(manager: LockManager) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for turn in range(20):
            with manager.lock("k", f"{number}-{turn}"):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) == 80


def test_locks_travel(manager: LockManager) -> None:
    assert manager.acquire_lock("k", "a")
    back = pickle.loads(pickle.dumps(manager))
    assert back == manager
    assert hash(back) == hash(manager)
    assert not back.acquire_lock("k", "b", 0)
    back.release_lock("k", "a")
    assert not manager.is_locked("k")


def test_the_locks_of_a_dead_process_are_free(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    script = f"""
from penstock import FileSystemLockManager
import os
assert FileSystemLockManager({str(folder)!r}).acquire_lock("k", "child")
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    manager = FileSystemLockManager(folder)
    assert len(list(folder.iterdir())) == 1
    assert manager.acquire_lock("k", "parent", 0)
    manager.release_lock("k", "parent")
