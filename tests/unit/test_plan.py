"""What the compiler makes of a flow, and why it does not make more of it."""

from typing import Any

import numpy as np

from penstock import allow_failure, flow, task, unmapped
from penstock.engine.plan import Node, Plan


@task
def load(x: Any) -> Any: ...


@task
def clean(x: Any, cube: Any = None) -> Any: ...


def nodes(body: Any, *args: Any) -> dict[str, Node]:
    return {node.task: node for node in plan(body, *args).nodes}


def plan(body: Any, *args: Any) -> Plan:
    found: Plan = flow(task_runner="processes")(body).explain(*args)
    return found


def test_maps_one_to_one_are_fused_and_large_arguments_lifted() -> None:
    def body(count: int) -> None:
        clean.map(load.map(range(count)), unmapped(np.zeros(200_000)))

    found = nodes(body, 500)
    assert found["load"].count == found["clean"].count == 500
    assert found["clean"].fused_with == "load"
    assert found["clean"].upstream == ("load",)
    assert found["clean"].lifted == ("ndarray(200000,) float64 1.5 MiB (1.5 MiB)",)
    assert "automatic" in found["load"].together


def test_reasons_are_given() -> None:
    def body() -> None:
        loaded = load.map(range(100))
        load.with_options(name="single", chunk_size=1).map(loaded)
        load.with_options(name="gpu", resources={"GPU": 1}).map(loaded)
        load.with_options(name="timed", timeout_seconds=3).map(loaded)
        load.with_options(name="tolerant").map(allow_failure(loaded))
        load.with_options(name="after").map(loaded, wait_for=[clean.submit(1)])

    found = nodes(body)
    assert found["single"].not_fused == "chunk_size is 1"
    assert "resources" in found["gpu"].not_fused
    assert found["gpu"].options == "asks for GPU=1"
    assert "timeout_seconds" in found["timed"].together
    assert "allow_failure" in found["tolerant"].not_fused
    assert "not there yet" in found["after"].not_fused
    assert {node.fused_with for node in found.values()} == {""}


def test_the_plan_ends_where_a_value_is_needed() -> None:
    ran: list[int] = []

    @task
    def work(x: int) -> int:
        ran.append(x)
        return x

    def body() -> Any:
        future = work.submit(1)
        work.submit(future.result())

    found = plan(body)
    assert [node.task for node in found.nodes] == ["work"]
    assert "test_plan.py" in found.end
    assert "future.result()" in found.end
    assert "the plan ends here" in str(found)
    assert found.to_dict()["nodes"][0]["task"] == "work"
    assert ran == []


def test_explicit_chunks_are_counted() -> None:
    found = plan(lambda: load.with_options(chunk_size=10).map(range(95)))
    assert found.nodes[0].together == "in 10 chunks of up to 10"
    assert found.messages == 10
