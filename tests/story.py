"""The events of runs as drivers make them, for tests of the record."""

from typing import Any

from penstock.api.db import Database
from penstock.api.models import events, metadata
from penstock.engine.events import Event, element_id, pack
from penstock.engine.spool import Batch

ROOT, LOAD, MAP, CHILD, STAND_IN = (f"{number:032x}" for number in range(1, 6))


class Flow:
    """Makes the events of a flow run, numbered as its driver would."""

    def __init__(self, root: str = ROOT) -> None:
        self.root = root
        self.events: list[Event] = []

    def add(self, kind: str, run: str, attempt: int = 0, rank: int = 0, **body: Any) -> None:
        number = len(self.events) + 1
        self.events.append(Event(kind, run, self.root, 1000.0 + number, body, 1, attempt, rank, number))

    def state(self, run: str, kind: str, attempt: int = 1, of: str = "task", **body: Any) -> None:
        rank = 2 if kind in {"COMPLETED", "FAILED", "CRASHED"} else 0
        self.add("state", run, attempt, rank, **{"of": of, "type": kind, "name": kind.title(), **body})

    def states(self, run: str, kind: str, index: list[int], attempt: int = 1, **body: Any) -> None:
        rank = 2 if kind == "COMPLETED" else 0
        self.add("states", run, attempt, rank, type=kind, name=kind.title(), index=index, **body)


def story(count: int = 5) -> Flow:
    """A flow that loads, maps over what it loaded with one retry, and calls another flow."""
    flow = Flow()
    about: dict[str, Any] = {"flow_run": ROOT, "parent": None, "tags": ["blue"], "upstream": []}
    flow.add("flow_run", ROOT, flow="hello", name="brave-otter", tags=["a"], parameters={"n": "5"}, pid=7)
    flow.state(ROOT, "RUNNING", of="flow")
    flow.add("runner", ROOT, name="threads", workers=1)
    flow.add("task_run", LOAD, **about, task="load", name="load", parameters={"path": "'a'"})
    flow.state(LOAD, "COMPLETED", started=1003.0, seconds=1.5, worker="w1", nbytes=80, peak=4096)
    edges: dict[str, Any] = {
        "upstream": [["y", LOAD]],
        "upstream_maps": [["z", MAP, 1]],
        "upstream_elements": [],
    }
    flow.add(
        "map_run", MAP, **about | edges, task="inc", name="inc", parameters={"y": "3"}, start=0, count=count
    )
    flow.states(MAP, "RUNNING", list(range(count)), time=[1007.0] * count)
    done = [index for index in range(count) if index != 2]
    columns: dict[str, Any] = {
        "started": [1007.5] * len(done),
        "seconds": [0.5] * len(done),
        "nbytes": [8] * len(done),
    }
    places = [index % 2 for index in done]
    flow.states(MAP, "COMPLETED", done, attempt=1, worker=places, workers=["w1", "w2"], **columns)
    odd = element_id(MAP, 2)
    flow.state(odd, "FAILED", 1, error={"type": "ValueError", "message": "boom", "text": "Traceback"})
    flow.state(odd, "RUNNING", 2, name="Retrying")
    flow.state(odd, "COMPLETED", 2, started=1012.0, seconds=0.25)
    flow.add("log", LOAD, lines=[[1004.0, "INFO", "loading"], [1003.0, "DEBUG", "before"]], dropped=2)
    flow.add("log", ROOT, lines=[[1013.0, "ERROR", "from the flow"]], dropped=0)
    flow.add("task_run", STAND_IN, **about, task="child", name="child", child_flow_run=CHILD)
    flow.add(
        "flow_run", CHILD, flow="child", name="small-otter", parent_flow_run=ROOT, parent_task_run=STAND_IN
    )
    flow.state(CHILD, "COMPLETED", of="flow", seconds=1.0)
    flow.add("novelty", ROOT, something="that this version does not know")
    flow.state(ROOT, "COMPLETED", of="flow", started=1002.0, seconds=16.0)
    return flow


def batch(found: list[Event], writer: str = "a" * 32, first: int = 1) -> Batch:
    return Batch(writer, first, [pack(event) for event in found])


FOLDED = [metadata.tables[name] for name in ("flow_runs", "task_runs", "maps", "dropped_lines")]


def current(database: Database) -> dict[str, list[Any]]:
    with database.read() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(table.select())), key=repr) for table in FOLDED
        }


def empty(database: Database) -> None:
    with database.write() as connection:
        for table in metadata.tables.values():
            connection.execute(table.delete())


def hurry(database: Database) -> None:
    """Do without the disk where a test commits thousands of times."""
    database.prepare()
    raw = database._writing().connection.driver_connection
    assert raw is not None
    raw.execute("PRAGMA synchronous = OFF" if database.is_sqlite else "SET synchronous_commit = off")
    raw.commit()


def count_events(database: Database, kind: str = "") -> int:
    query = events.select().where(events.c.kind == kind) if kind else events.select()
    with database.read() as connection:
        return len(connection.execute(query).all())
