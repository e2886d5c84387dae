"""What a task asks of its worker: one vocabulary, and a reason where nobody can give it."""

import os
from typing import Any

import dask
import pytest

from penstock import ConfigurationError, flow, remote_options, task
from penstock.engine import lookout, placement
from penstock.engine.options import amounts
from penstock.runners.base import Options, TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@task
def where(x: Any = 0) -> int:
    return os.getpid()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "PATIENCE", 0.2)


ABSURD = {"GPU": 10_000}


def asks_in_vain(how: str) -> Any:
    """Submit something that no worker can run."""
    if how == "option":
        return where.with_options(resources=ABSURD).submit(1)
    if how == "map":
        return where.with_options(resources=ABSURD).map([1])[0]
    if how == "remote_options":
        with remote_options(num_gpus=10_000):
            return where.submit(1)
    with dask.annotate(resources=ABSURD):
        return where.submit(1)


@pytest.mark.parametrize("how", ["option", "map", "remote_options", "annotate"])
def test_what_nobody_offers_waits_and_says_why(
    runner: TaskRunner, record: Record, wait_until: Any, how: str
) -> None:
    offered = not runner.unmet(Options(resources=tuple(ABSURD.items())))

    def body() -> None:
        future = asks_in_vain(how)
        if offered:  # runners of this machine know no resources
            future.wait()
            assert future.state.is_completed()
            return
        wait_until(lambda: bool(future.state.message))
        assert future.state.type == "PENDING"
        assert future.state.message.startswith("no worker can run task 'where': it asks for ")
        assert "GPU=10000" in future.state.message
        assert where.submit(2).result() > 0  # others go on
        future.cancel()

    flow(task_runner=runner)(lambda: body())()


def test_a_flow_that_fails_does_not_wait_for_what_nobody_offers(runner: TaskRunner, wait_until: Any) -> None:
    offered = not runner.unmet(Options(resources=tuple(ABSURD.items())))

    def body() -> None:
        future = asks_in_vain("option")
        wait_until(lambda: future.done() if offered else bool(future.state.message))
        raise ValueError("as asked")

    with pytest.raises(ValueError, match="as asked"):
        flow(task_runner=runner)(lambda: body())()


def test_what_somebody_offers_runs(in_flow: InFlow) -> None:
    def body() -> list[int]:
        with remote_options(num_cpus=1):
            first = where.submit(1)
        with dask.annotate(priority=5):
            second = where.map([1, 2])
        third = where.with_options(resources={"memory": "1MB"}, priority=3).submit(1)
        return [first.result(), *second.result(), third.result()]

    assert len(in_flow(body)) == 4


def test_a_block_wins_over_the_task_and_the_inner_block_over_the_outer() -> None:
    asking = where.with_options(resources={"GPU": 1, "memory": "2 GiB"}, threads=2)
    with remote_options(num_gpus=2, num_cpus=4, max_calls=1), remote_options(num_cpus=3):
        made = placement.placed(asking)
    assert dict(made.options.backend.resources) == {"GPU": 2, "memory": 2 << 30}
    assert (made.options.backend.threads, made.options.backend.native) == (3, (("max_calls", 1),))
    assert placement.placed(asking) is asking
    with dask.annotate(resources={"FPGA": 1}, workers=["one"], retries=2, priority=4):
        made = placement.placed(asking)
    assert dict(made.options.backend.resources) == {"FPGA": 1, "GPU": 1, "memory": 2 << 30}
    assert (made.options.backend.workers, made.retries, made.options.priority) == (("one",), 2, 4)


def test_amounts() -> None:
    assert amounts({"memory": "20GB", "a": "1.5", "b": 2, "c": "1 KiB"}) == {
        "memory": 20 * 10**9,
        "a": 1.5,
        "b": 2,
        "c": 1024,
    }
    for wrong in ("much", -1, None, True):
        with pytest.raises(ConfigurationError, match="resources\\['GPU'\\] must be a number"):
            task(resources={"GPU": wrong})(lambda: None)  # type: ignore[dict-item]
    with (
        pytest.raises(ConfigurationError, match=r"remote_options\(max_retries=...\) is up to penstock"),
        remote_options(max_retries=3),
    ):
        pass
    with dask.annotate(priority=lambda key: 3), pytest.raises(ConfigurationError, match="takes a value"):
        placement.placed(where)
