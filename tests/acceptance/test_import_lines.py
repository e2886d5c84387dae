"""A script moves by changing its import lines: every module of the other engine has its counterpart here."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import penstock

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
from penstock import allow_failure, flow, get_run_logger, runtime, State, tags, task, unmapped
from penstock.cache_policies import DEFAULT, INPUTS, NO_CACHE, RUN_ID, TASK_SOURCE
from penstock.context import FlowRunContext, TaskRunContext, get_run_context
from penstock.exceptions import CancelledRun, MissingContextError, ParameterTypeError, UnfinishedRun
from penstock.flows import Flow
from penstock.futures import as_completed, wait
from penstock.logging import get_run_logger as the_same_logger
from penstock.runtime import flow_run, task_run
from penstock.states import Cancelled, Completed, Failed
from penstock.task_runners import ConcurrentTaskRunner, SequentialTaskRunner, ThreadPoolTaskRunner
from penstock.tasks import Task, exponential_backoff, task_input_hash
from penstock.transactions import CommitMode, IsolationLevel, Transaction, get_transaction, transaction
from penstock.utilities.annotations import quote
from penstock.utilities.annotations import unmapped as the_same_unmapped
import penstock.runtime
import penstock.states

assert the_same_logger is get_run_logger
assert the_same_unmapped is unmapped


@task(
    retries=2,
    retry_delay_seconds=exponential_backoff(backoff_factor=0.001),
    retry_jitter_factor=0.5,
    cache_key_fn=task_input_hash,
    tags=["io"],
    log_prints=True,
    task_run_name="load-{part}",
)
def load(part, factor=1):
    print(f"{task_run.name} of {flow_run.name}")
    if task_run.run_count < 2:
        raise ValueError("not yet")
    return part * factor


@task(cache_policy=INPUTS + TASK_SOURCE - "verbose")
def total(values, verbose=False):
    get_run_logger().info("%s values, tags %s", len(values), sorted(get_run_context().task_run.tags))
    return sum(values)


@task(cache_policy=NO_CACHE)
def judge(value) -> State:
    return Completed(message="good") if value > 5 else Failed(message="bad")


@task
def fail():
    raise RuntimeError("broken")


@task
def report(value, error, query):
    return f"{value} {type(error).__name__} {query}"


@flow(name="moved", task_runner=ConcurrentTaskRunner(), log_prints=True, retries=1)
def moved(count: int = 3):
    with tags("night"):
        parts = load.map(range(count), factor=unmapped(2))
        done, not_done = wait(parts)
        assert (len(done), len(not_done)) == (count, 0)
        assert sorted(future.result() for future in as_completed(parts)) == [0, 2, 4]
        amount = total.submit(parts, verbose=True)
    good = judge.submit(amount, wait_for=[parts])
    assert good.state.is_completed() or good.wait() is None
    broken = fail.submit()
    text = report.submit(amount, allow_failure(broken), quote({"a": 1}))
    state = fail(return_state=True)
    assert state.is_failed() and state.type == penstock.states.StateType.FAILED
    with transaction(key="moved", commit_mode=CommitMode.EAGER, overwrite=True) as txn:
        assert isinstance(txn, Transaction) and get_transaction() is txn
        assert txn.isolation_level is IsolationLevel.READ_COMMITTED
        txn.stage(amount.result())
    assert txn.is_committed() and txn.read().result == 6
    assert isinstance(FlowRunContext.get().flow, Flow) and TaskRunContext.get() is None
    return text.result()


assert isinstance(load, Task) and isinstance(moved, Flow)
assert moved("3") == "6 RuntimeError {'a': 1}"
in_order = moved.with_options(task_runner=SequentialTaskRunner())
assert in_order(count=3) == "6 RuntimeError {'a': 1}"
assert moved.with_options(task_runner=ThreadPoolTaskRunner(max_workers=2), name="narrow")(3).startswith("6")
try:
    moved(count="many")
except ParameterTypeError as error:
    assert "count" in str(error)
else:
    raise AssertionError("the parameter was taken")
assert penstock.runtime.flow_run.id is None
try:
    get_run_logger()
except MissingContextError:
    print("moved")
"""


def test_a_script_with_many_names_runs(tmp_path: Path) -> None:
    script = tmp_path / "moved.py"
    script.write_text(SCRIPT)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")},
        "PENSTOCK_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "moved"


ELSEWHERE = {
    "cache_policies": "engine.cache",
    "context": "engine.run_context",
    "dask": "engine.dask_client",
    "exceptions": "errors",
    "flows": "engine.flow",
    "futures": "engine.futures",
    "logging": "engine.logs",
    "ray": "engine.placement",
    "states": "engine.states",
    "results": "engine.results",
    "task_runners": "runners.base",
    "tasks": "engine.task",
    "transactions": "engine.transactions",
    "utilities.annotations": "engine.annotations",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_module_defines_nothing_and_shows_the_same_objects(name: str) -> None:
    module = importlib.import_module(f"penstock.{name}")
    home = importlib.import_module(f"penstock.{ELSEWHERE[name]}")
    assert module.__all__
    for public in module.__all__:
        thing = getattr(module, public)
        if public in penstock.__all__:
            assert thing is getattr(penstock, public)
        else:
            assert thing is getattr(home, public)
        assert not str(getattr(thing, "__module__", "")).startswith(f"penstock.{name}.")
        assert getattr(thing, "__module__", "") != f"penstock.{name}"


HEAVY = {"dask", "distributed", "ray", "sqlalchemy", "numpy", "pandas"}


@pytest.mark.parametrize("name", sorted(set(ELSEWHERE) - {"dask", "ray"}))
def test_a_module_loads_nothing_heavy(name: str) -> None:
    code = f"import sys, penstock.{name}; print(*{HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
