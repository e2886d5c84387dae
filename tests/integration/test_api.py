"""The API over a real SQLite file, asked in this process: what it takes, and what it tells."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from penstock.api.auth import Scope
from penstock.engine.events import element_id
from penstock.engine.spool import Batch
from tests.serving import Api, packed
from tests.story import CHILD, LOAD, MAP, ROOT, STAND_IN, Flow, batch, count_events, story

ABSENT = "f" * 32


@pytest.fixture
def api(clean_environment: Path) -> Iterator[Api]:
    found = Api(clean_environment)
    yield found
    found.close()


@pytest.fixture
def told(api: Api) -> Api:
    """With a story in it."""
    assert api.send(batch(story().events)).status_code == 200
    return api


def many(count: int) -> list[Any]:
    flow = Flow()
    flow.add("flow_run", ROOT, flow="many", name="x")
    for number in range(count):
        run = f"{0x1000 + number:032x}"
        flow.add("task_run", run, flow_run=ROOT, task=f"t{number % 3}", name=f"n{number % 5}", tags=["it's"])
        if number % 2:
            flow.state(run, "COMPLETED", started=1.0, seconds=float(number % 7), nbytes=number, worker="w'1")
    return flow.events


# ------------------------------------------------------------------------------------------------ ingest


def test_a_batch_is_acknowledged_after_its_commit_and_once(api: Api) -> None:
    found = batch(story().events)
    for _ in range(2):
        answer = api.send(found)
        assert answer.json() == {"writer": found.writer, "last": found.last, "acked_seq": found.last}
        assert count_events(api.service.database) == found.last


def test_a_gap_is_not_acknowledged_over(api: Api) -> None:
    found = batch(story().events)
    assert api.send(Batch(found.writer, 3, found.payloads[2:])).json()["acked_seq"] == 0
    assert api.send(Batch(found.writer, 1, found.payloads[:2])).json()["acked_seq"] == found.last


def test_batches_may_be_compressed(api: Api) -> None:
    found = batch(story().events)
    headers = {"content-type": "application/msgpack", "content-encoding": "deflate"}
    answer = api.request("POST", "/api/v1/ingest", content=zlib.compress(packed(found)), headers=headers)
    assert answer.json()["acked_seq"] == found.last


@pytest.mark.parametrize(
    "body, encoding, status",
    [
        (b"", "identity", 400),
        (b"\xc1", "identity", 400),
        (msgpack.packb({"writer": "x" * 32, "first": 1, "payloads": [b"x"]}), "identity", 400),
        (msgpack.packb({"writer": "a" * 32, "first": 0, "payloads": [b"x"]}), "identity", 400),
        (msgpack.packb({"writer": "a" * 32, "first": True, "payloads": [b"x"]}), "identity", 400),
        (msgpack.packb({"writer": "a" * 32, "first": 1 << 60, "payloads": [b"x"]}), "identity", 400),
        (msgpack.packb({"writer": "a" * 32, "first": 1, "payloads": []}), "identity", 400),
        (msgpack.packb({"writer": "a" * 32, "first": 1, "payloads": ["text"]}), "identity", 400),
        (msgpack.packb({"writer": "a" * 32, "first": 1, "payloads": [b""] * 20_001}), "identity", 400),
        (b"\x91" * 200_000, "identity", 400),
        (b"\xdd\xff\xff\xff\xff", "identity", 400),
        (b"no deflate", "deflate", 400),
        (zlib.compress(b"x" * 100)[:-6], "deflate", 400),
        (b"x", "gzip", 415),
        (zlib.compress(b"\0" * (17 << 20)), "deflate", 413),
        (b"x" * ((1 << 20) + 1), "identity", 413),
    ],
)
def test_what_is_no_batch_is_refused_and_changes_nothing(
    api: Api, body: bytes, encoding: str, status: int
) -> None:
    headers = {"content-type": "application/msgpack", "content-encoding": encoding}
    answer = api.request("POST", "/api/v1/ingest", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert count_events(api.service.database) == 0


def test_events_that_nobody_can_read_are_kept_and_acknowledged(api: Api) -> None:
    found = batch(story().events)
    payloads = [*found.payloads[:5], b"\xc1 junk", b"", *found.payloads[5:]]
    assert api.send(Batch(found.writer, 1, payloads)).json()["acked_seq"] == len(payloads)
    assert api.get(f"/flow-runs/{ROOT}")["state"]["type"] == "COMPLETED"


def test_a_database_that_takes_nothing_acknowledges_nothing(api: Api, clean_environment: Path) -> None:
    import sqlite3

    found = batch(story().events)
    assert api.send(Batch(found.writer, 1, found.payloads[:2])).status_code == 200
    other = sqlite3.connect(clean_environment / "penstock.db", isolation_level=None)
    other.execute(
        "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
    )
    other.close()
    answer = api.send(Batch(found.writer, 3, found.payloads[2:]))
    ready = api.request("GET", "/api/v1/ready", None).status_code
    with sqlite3.connect(clean_environment / "penstock.db") as other:
        other.execute("DROP TRIGGER full")
    other.close()
    assert (answer.status_code, ready) == (503, 503)
    assert count_events(api.service.database) == 2
    assert api.send(Batch(found.writer, 3, found.payloads[2:])).json()["acked_seq"] == found.last
    assert api.request("GET", "/api/v1/ready", None).status_code == 200


# ------------------------------------------------------------------------------------------------ lists


def test_flows_and_their_runs(told: Api) -> None:
    flows = told.get("/flows", sort="name")["items"]
    assert [(one["name"], one["runs"]) for one in flows] == [("child", 1), ("hello", 1)]
    [run] = told.get("/flow-runs")["items"]
    assert (run["id"], run["flow"], run["state"]["type"]) == (ROOT, "hello", "COMPLETED")
    assert run["tasks"] == {"COMPLETED": 6, "PENDING": 1}
    assert [one["id"] for one in told.get("/flow-runs", nested=True, sort="oldest")["items"]] == [ROOT, CHILD]
    assert [one["id"] for one in told.get("/flow-runs", parent=ROOT)["items"]] == [CHILD]
    assert told.get(f"/flow-runs/{ROOT}")["flows"] == [CHILD]


@pytest.mark.parametrize(
    "query, count",
    [
        ({}, 1),
        ({"flow": "hello"}, 1),
        ({"flow": "hell"}, 0),
        ({"name": "otter"}, 1),
        ({"name": "%"}, 0),
        ({"name": "'; DROP TABLE flow_runs; --"}, 0),
        ({"state": ["COMPLETED", "FAILED"]}, 1),
        ({"state": "FAILED"}, 0),
        ({"tag": "a"}, 1),
        ({"tag": 'a", "b'}, 0),
        ({"root": CHILD}, 0),
        ({"root": ROOT}, 2),
        ({"created_after": 1001.0}, 1),
        ({"created_before": 1001.0}, 0),
    ],
)
def test_filters_of_flow_runs(told: Api, query: dict[str, Any], count: int) -> None:
    assert len(told.get("/flow-runs", **query)["items"]) == count


def test_task_runs_with_what_elements_share(told: Api) -> None:
    found = told.get("/task-runs", flow_run=ROOT)["items"]
    by_id = {run["id"]: run for run in found}
    assert by_id[LOAD]["nbytes"] == 80
    element = by_id[element_id(MAP, 1)]
    assert element["parameters"] == {"y": "3"}
    assert {edge["run"] for edge in element["upstream"]} >= {LOAD}
    assert told.get(f"/task-runs/{LOAD}")["worker"] == "w1"
    assert len(told.get("/task-runs", map_run=MAP)["items"]) == 5
    assert len(told.get("/task-runs", worker="w2", root=ROOT)["items"]) == 2


@pytest.mark.parametrize("sort", ["newest", "oldest", "name", "longest", "largest", "latest_end"])
@pytest.mark.parametrize("limit", [1, 7, 100])
def test_pages_show_each_run_once_in_every_order(api: Api, sort: str, limit: int) -> None:
    api.send(batch(many(30)))
    found: list[Any] = []
    cursor = None
    while True:
        query: dict[str, Any] = {"cursor": cursor} if cursor else {}
        page = api.get("/task-runs", sort=sort, limit=limit, **query)
        found += page["items"]
        assert len(page["items"]) <= limit
        cursor = page["following"]
        if cursor is None:
            break
    assert len({run["id"] for run in found}) == len(found) == 30
    key = {
        "newest": lambda run: run["id"],
        "oldest": lambda run: run["id"],
        "name": lambda run: run["name"],
        "longest": lambda run: -1 if run["seconds"] is None else run["seconds"],
        "largest": lambda run: -1 if run["nbytes"] is None else run["nbytes"],
        "latest_end": lambda run: run["state"]["time"] or 0,
    }[sort]
    falling = sort not in {"oldest", "name"}
    assert [key(run) for run in found] == sorted(map(key, found), reverse=falling)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("cursor", ["x", "W10", "WzEsMl0", "WyJhIiwgImIiLCAiYyJd", "bnVsbA", "." * 100, "-"])
def test_a_foreign_cursor_is_refused(told: Api, cursor: str) -> None:
    for path in ("/flow-runs", "/task-runs", "/map-runs", "/flows", f"/runs/{ROOT}/logs"):
        answer = told.request(
            "GET",
            f"/api/v1{path}",
            params={"cursor": cursor, "sort": "name"}
            if "logs" not in path and "map" not in path
            else {"cursor": cursor},
        )
        assert answer.status_code in {400, 422}, (path, answer.text)


def test_maps_are_counts_and_ranges(api: Api) -> None:
    flow = Flow()
    flow.add("flow_run", ROOT, flow="f", name="x")
    flow.add("map_run", MAP, flow_run=ROOT, task="inc", name="inc", start=0, count=60)
    flow.add("map_run", MAP, flow_run=ROOT, task="inc", name="inc", start=60, count=40)
    flow.states(MAP, "COMPLETED", [*range(10, 30), 50], seconds=[0.5] * 21)
    flow.states(MAP, "RUNNING", [*range(30, 50)])
    flow.state(element_id(MAP, 99), "FAILED")
    api.send(batch(flow.events))
    [one] = api.get("/map-runs", flow_run=ROOT)["items"]
    assert one["count"] == 100
    assert one["states"] == {"COMPLETED": 21, "RUNNING": 20, "FAILED": 1, "PENDING": 58}
    assert one["ranges"]["COMPLETED"] == [[10, 29], [50, 50]]
    assert one["ranges"]["RUNNING"] == [[30, 49]]
    assert one["ranges"]["PENDING"] == [[0, 9], [51, 98]]
    assert one["seconds"] == 10.5
    assert api.get(f"/map-runs/{MAP}") == one


def test_the_graph_has_one_node_for_a_map(told: Api) -> None:
    graph = told.get(f"/flow-runs/{ROOT}/graph")
    kinds = {node["id"]: node["kind"] for node in graph["nodes"]}
    assert kinds == {LOAD: "task", MAP: "map", STAND_IN: "task"}
    assert {"source": LOAD, "target": MAP, "parameter": "y"} in graph["edges"]
    assert graph["complete"]
    assert not told.get(f"/flow-runs/{ROOT}/graph", limit=1)["complete"]
    assert told.get(f"/flow-runs/{ROOT}/tree")["nodes"]


@pytest.mark.parametrize(
    "path",
    [
        "flow-runs/{}",
        "flow-runs/{}/graph",
        "flow-runs/{}/tree",
        "task-runs/{}",
        "map-runs/{}",
        "runs/{}/history",
        "runs/{}/logs",
        "runs/{}/logs/stream",
    ],
)
def test_what_is_not_there_is_not_found(told: Api, path: str) -> None:
    assert told.request("GET", f"/api/v1/{path.format(ABSENT)}").status_code == 404
    assert told.request("GET", f"/api/v1/{path.format('..%2f..')}").status_code in {404, 422}
    assert told.request("GET", f"/api/v1/{path.format('x')}").status_code == 422


def test_history_and_logs(told: Api) -> None:
    steps = told.get(f"/runs/{LOAD}/history")
    assert [step["type"] for step in steps] == ["PENDING", "RUNNING", "COMPLETED"]
    logs = told.get(f"/runs/{ROOT}/logs")
    assert [line["text"] for line in logs["lines"]] == ["before", "loading", "from the flow"]
    assert logs["dropped"] == 2
    assert [line["text"] for line in told.get(f"/runs/{ROOT}/logs", level="ERROR")["lines"]] == [
        "from the flow"
    ]
    assert [line["text"] for line in told.get(f"/runs/{ROOT}/logs", search="LOAD")["lines"]] == ["loading"]
    assert [line["text"] for line in told.get(f"/runs/{ROOT}/logs", limit=1)["lines"]] == ["from the flow"]
    assert told.get(f"/runs/{LOAD}/logs", cursor=logs["following"])["lines"] == []


def test_lines_after_a_cursor_are_new_ones(told: Api) -> None:
    following = told.get(f"/runs/{ROOT}/logs")["following"]
    flow = Flow()
    flow.add("log", LOAD, lines=[[5000.0, "INFO", "later"]])
    told.send(batch(flow.events, "e" * 32))
    more = told.get(f"/runs/{ROOT}/logs", cursor=following)
    assert [line["text"] for line in more["lines"]] == ["later"]
    assert told.get(f"/runs/{ROOT}/logs", cursor=more["following"])["lines"] == []


def test_plots(told: Api) -> None:
    activity = told.get("/plots/activity", root=ROOT, bins=10)
    assert sum(activity["started"]) == 5
    assert sum(activity["ended"]) == 6
    assert activity["running"][-1] == 0
    [inc, load] = sorted(told.get("/plots/durations", flow_run=ROOT), key=lambda one: one["task"])
    assert (inc["task"], inc["count"], sum(inc["counts"])) == ("inc", 5, 5)
    assert (load["shortest"], load["longest"]) == (1.5, 1.5)
    assert told.get("/plots/states")["task"]["COMPLETED"] == 6
    assert told.get("/plots/activity", task="nobody")["started"] == [0] * 60


def test_find(told: Api) -> None:
    assert [one["id"] for one in told.get("/find", text="brave-otter")] == [ROOT]
    assert told.get("/find", text="load")[0]["kind"] == "task"


# ------------------------------------------------------------------------------------------------ questions


def test_questions_by_name(told: Api) -> None:
    assert told.post("/ask", {"what": "runs"}, Scope.VIEW).json()["answer"][0]["id"] == ROOT
    assert told.post("/ask", {"what": "run", "run": LOAD}).json()["answer"]["name"] == "load"
    assert told.post("/tell", {"what": "run", "run": LOAD}, Scope.RUN).json()["answer"]["name"] == "load"


@pytest.mark.parametrize(
    "question",
    [
        {"what": "__class__"},
        {"what": "beat"},
        {"what": "runs", "connection": 1},
        {"what": "runs", "limit": "many"},
        {"what": "runs", "states": 5},
        {"what": "run", "run": {"a": 1}},
        {"what": "run", "run": "\ud800"},
        {"what": "run", "run": [1]},
        {"what": "find", "text": 5},
        {"what": "runs", "nonsense": 1},
        {},
        [],
    ],
)
def test_nonsense_is_refused_with_words(told: Api, question: Any) -> None:
    answer = told.post("/ask", question)
    assert answer.status_code in {400, 422}, answer.text


def test_pause_is_not_there_yet_and_unknown_runs_are_not_found(told: Api) -> None:
    assert told.post(f"/runs/{ROOT}/state", {"action": "pause"}).status_code == 501
    assert told.post(f"/runs/{ROOT}/state", {"action": "explode"}).status_code == 422
    assert told.post(f"/runs/{ABSENT}/state", {"action": "cancel"}).status_code in {404, 501}


# ------------------------------------------------------------------------------------------------ the server


def test_figures_and_version(told: Api) -> None:
    text = told.request("GET", "/api/v1/metrics", Scope.VIEW).text
    assert "\npenstock_events_total 18\n" in text
    assert '\npenstock_flow_runs{state="completed"} 2\n' in text
    version = told.get("/version")
    assert (version["api"], version["database"]) == (1, "sqlite")
    assert told.request("GET", "/api/v1/health", None).json()["status"] == "ok"


def test_the_page_that_describes_the_api_needs_nothing_from_elsewhere(told: Api) -> None:
    page = told.request("GET", "/docs")
    assert page.status_code == 200
    assert "/api/v1/flow-runs" in page.text
    assert "<script" not in page.text
    assert "http" not in page.text.replace("http-equiv", "")
    paths = told.request("GET", "/openapi.json").json()["paths"]
    assert "/api/v1/ingest" in paths
