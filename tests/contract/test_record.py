"""The store tells afterwards what ran: every run on every runner has its row."""

from pathlib import Path
from typing import Any

import pytest

from penstock import flow, task
from penstock.api import queries
from penstock.api.embedded import reading
from penstock.engine.tracking import stop_tracking
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow


@task(log_prints=True)
def add(x: Any, y: int = 1) -> Any:
    print("adding", x)
    return x + y


@task
def fail(x: Any = None) -> None:
    raise ValueError("no data")


@task
def outer(x: int) -> int:
    return add.submit(x).result()


def test_a_flow_run_can_be_read_back(runner: TaskRunner, in_flow: InFlow, clean_environment: Path) -> None:
    @flow
    def child(x: int) -> Any:
        return add.submit(x)

    def body() -> Any:
        mapped = add.map([1, 2, 3])
        return [outer.submit(mapped[0]), child(5), add(2)]

    in_flow(body)
    stop_tracking()
    with reading(clean_environment) as connection:
        (run,) = queries.list_runs(connection)
        assert run["state"]["type"] == "COMPLETED"
        tree = queries.get_tree(connection, run["id"])
        assert tree is not None
        nodes = {(node["kind"], node["task"]): node for node in tree["nodes"]}
        assert nodes["map", "add"]["states"] == {"COMPLETED": 3}
        (inner,) = nodes["task", "outer"]["nodes"]
        assert (inner["task"], inner["state"]["type"]) == ("add", "COMPLETED")
        assert nodes["task", "child"]["flow"]["state"]["type"] == "COMPLETED"
        lines = [line["text"] for line in queries.get_logs(connection, inner["id"])["lines"]]
        assert lines == ["adding 2"]


def test_failures_can_be_read_back(in_flow: InFlow, clean_environment: Path) -> None:
    with pytest.raises(ValueError, match="no data"):
        in_flow(lambda: [fail.submit(), add.submit(fail.submit())])
    stop_tracking()
    with reading(clean_environment) as connection:
        (run,) = queries.list_runs(connection)
        assert run["state"]["type"] == "FAILED"
        assert run["error"]["type"] == "ValueError"
        rows = queries.list_task_runs(connection, run["id"])
        names = sorted((row["task"], row["state"]["name"]) for row in rows)
        assert names == [("add", "NotReady"), ("fail", "Failed"), ("fail", "Failed")]
        assert "in fail" in next(row for row in rows if row["task"] == "fail")["error"]["text"]
