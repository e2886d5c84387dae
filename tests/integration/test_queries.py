"""What the store answers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.api import queries
from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.engine.events import element_id
from tests.story import CHILD, LOAD, MAP, ROOT, Flow, batch, story


@pytest.fixture
def told(database: Database) -> Iterator[Any]:
    ingest(database, [batch(story().events)])
    with database.read() as connection:
        yield connection


def test_the_list_of_runs(told: Any) -> None:
    (run,) = queries.list_runs(told)
    assert (run["name"], run["flow"], run["state"]["type"]) == ("brave-otter", "hello", "COMPLETED")
    assert run["tasks"] == {"COMPLETED": 6, "PENDING": 1}
    assert (run["tags"], run["parameters"], run["backend"]) == (
        ["a"],
        {"n": "5"},
        {"name": "threads", "workers": 1},
    )
    assert (run["started"], run["seconds"], run["ended"]) == (1002.0, 16.0, 1018.0)
    assert [one["id"] for one in queries.list_runs(told, nested=True)] == [CHILD, ROOT]
    assert queries.list_runs(told, states=["failed"]) == []
    assert queries.list_runs(told, before=ROOT) == []
    assert queries.list_runs(told, flow="other") == []


def test_one_run_as_a_tree(told: Any) -> None:
    tree = queries.get_tree(told, ROOT, elements=1)
    assert tree is not None
    json.dumps(tree)
    load, inc, child = tree["nodes"]
    assert (load["kind"], load["name"], load["seconds"], load["worker"]) == ("task", "load", 1.5, "w1")
    assert (inc["kind"], inc["count"], inc["states"]) == ("map", 5, {"COMPLETED": 5})
    assert (inc["seconds"], inc["started"], inc["nbytes"]) == (2.25, 1007.5, 32)
    assert inc["upstream"] == [{"parameter": "y", "run": LOAD}]
    assert inc["upstream_maps"] == [{"parameter": "z", "map": MAP, "offset": 1}]
    (element,) = inc["nodes"]
    assert element["name"] == "inc-0"
    assert element["upstream"] == [
        {"parameter": "y", "run": LOAD},
        {"parameter": "z", "run": element_id(MAP, 1)},
    ]
    assert child["flow"]["name"] == "small-otter"
    whole = queries.get_tree(told, ROOT, elements=None)
    assert whole is not None
    assert [node["name"] for node in whole["nodes"][1]["nodes"]] == [f"inc-{index}" for index in range(5)]
    assert queries.get_tree(told, LOAD) is None
    assert tree["dropped_lines"] == 2
    assert child["flow"]["dropped_lines"] == 0


def test_the_history_of_an_element(told: Any) -> None:
    steps = queries.get_history(told, element_id(MAP, 2))
    assert [(step["name"], step["attempt"]) for step in steps] == [
        ("Pending", 0),
        ("Running", 1),
        ("Failed", 1),
        ("Retrying", 2),
        ("Completed", 2),
    ]
    assert steps[2]["error"]["message"] == "boom"
    assert [step["derived"] for step in steps] == [True, False, False, False, False]
    first = queries.get_history(told, element_id(MAP, 0))
    assert [(step["type"], step["time"], step["worker"]) for step in first] == [
        ("PENDING", 1006.0, None),
        ("RUNNING", 1007.0, None),
        ("COMPLETED", 1008.0, "w1"),
    ]


def test_a_start_that_only_the_end_tells_is_shown(told: Any) -> None:
    steps = queries.get_history(told, LOAD)
    assert [(step["type"], step["time"], step["derived"]) for step in steps] == [
        ("PENDING", 1004.0, True),
        ("RUNNING", 1003.0, True),
        ("COMPLETED", 1005.0, False),
    ]


def test_a_retry_tells_of_the_attempt_before_it(database: Database) -> None:
    flow = Flow()
    flow.add("task_run", LOAD, name="load")
    flow.state(LOAD, "RUNNING", 1, name="Retrying", started=1001.0, seconds=0.5)
    flow.state(LOAD, "COMPLETED", 2, started=1002.0, seconds=0.5)
    ingest(database, [batch(flow.events)])
    with database.read() as connection:
        steps = queries.get_history(connection, LOAD)
    assert [(step["name"], step["attempt"], step["derived"]) for step in steps] == [
        ("Pending", 0, True),
        ("Running", 1, True),
        ("Retrying", 1, False),
        ("Running", 2, True),
        ("Completed", 2, False),
    ]


def test_the_logs_of_a_run_and_of_its_tasks(told: Any) -> None:
    log = queries.get_logs(told, ROOT)
    assert [(line["text"], line["name"]) for line in log["lines"]] == [
        ("before", "load"),
        ("loading", "load"),
        ("from the flow", "brave-otter"),
    ]
    assert log["dropped"] == 2
    assert [line["text"] for line in queries.get_logs(told, LOAD, level="info")["lines"]] == ["loading"]
    assert [line["text"] for line in queries.get_logs(told, ROOT, limit=1)["lines"]] == ["from the flow"]
    assert queries.get_logs(told, CHILD)["lines"] == []
    assert queries.get_logs(told, "f" * 32) == {"lines": [], "dropped": 0}


def test_runs_are_found_by_what_people_remember(told: Any) -> None:
    odd = element_id(MAP, 2)
    for text in (odd, odd[:31], odd[-8:], "inc-2"):
        assert [run["id"] for run in queries.find_runs(told, text)] == [odd]
    assert [run["kind"] for run in queries.find_runs(told, "brave-otter")] == ["flow"]
    assert [run["name"] for run in queries.find_runs(told, "hello")] == ["brave-otter"]
    assert queries.find_runs(told, "nothing") == []
    assert queries.find_runs(told, "'; DROP TABLE events; --") == []


def test_one_task_run_with_everything(told: Any) -> None:
    run = queries.get_run(told, element_id(MAP, 3))
    assert run is not None
    assert (run["parameters"], run["element"], run["map"]) == ({"y": "3"}, 3, MAP)
    assert run["upstream"][0] == {"parameter": "y", "run": LOAD, "name": "load"}
    assert queries.get_run(told, "f" * 32) is None
    assert [one["name"] for one in queries.list_task_runs(told, ROOT, states=["PENDING"])] == ["child"]
    flow = queries.get_run(told, ROOT)
    assert flow is not None
    assert flow["flows"] == [CHILD]
    assert flow["dropped_lines"] == 2
