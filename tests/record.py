"""What a test reads of the record: the events of this process, folded into rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from penstock.engine.events import Event, element_id

Order = tuple[int, int, int, int]


@dataclass
class Row:
    """One run as the record tells it."""

    id: str
    kind: str
    body: dict[str, Any]
    history: list[tuple[Order, dict[str, Any]]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.body["name"])

    @property
    def task(self) -> str:
        return str(self.body.get("task") or self.body.get("flow"))

    @property
    def parent(self) -> str | None:
        found: str | None = self.body.get("parent")
        return found

    @property
    def state(self) -> dict[str, Any]:
        """The present state: the greatest order wins, as in the store."""
        if not self.history:
            return {"type": "PENDING", "name": "Pending", "message": ""}
        return max(self.history, key=lambda entry: entry[0])[1]

    @property
    def type(self) -> str:
        return str(self.state["type"])

    @property
    def attempt(self) -> int:
        return max((order[1] for order, _ in self.history), default=0)

    @property
    def names(self) -> list[str]:
        """Names of the states in their order, repetitions left out."""
        names = ["Pending"]
        for _, body in sorted(self.history, key=lambda entry: entry[0]):
            if body.get("started") and "Running" not in names and "Retrying" not in names:
                names.append("Running")
            if names[-1] != body["name"]:
                names.append(body["name"])
        return names

    @property
    def error(self) -> dict[str, str]:
        found: dict[str, str] = self.state["error"]
        return found


class Record:
    """Collects events; `rows` folds them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def rows(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for event in self.events:
            if event.body.get("map"):  # an element whose name a worker has made
                rows[event.run].body = {**rows[event.run].body, "name": event.body["name"]}
            elif event.kind in {"flow_run", "task_run"}:
                rows[event.run] = Row(event.run, event.kind, event.body)
            elif event.kind == "map_run":
                for row in _elements(event):
                    rows[row.id] = row
        for event in self.events:
            order = (event.epoch, event.attempt, event.rank, event.rseq)
            if event.kind == "state":
                rows[event.run].history.append((order, event.body))
            elif event.kind == "states":
                for position, index in enumerate(event.body["index"]):
                    body = {
                        **event.body,
                        "message": "",
                        "started": event.body["started"][position],
                        "nbytes": event.body["nbytes"][position],
                        "stored": (event.body.get("stored") or [None] * (position + 1))[position],
                        "worker": event.body["workers"][event.body["worker"][position]],
                    }
                    attempt = event.body["attempt"][position]
                    rows[element_id(event.run, index)].history.append(((1, attempt, *order[2:]), body))
            elif event.kind == "log":
                rows[event.run].logs.extend(text for _, _, text in event.body["lines"])
        return rows

    def tasks(self, task: str | None = None) -> list[Row]:
        """Task runs in the order in which they were made, of one task or of all."""
        rows = [row for row in self.rows().values() if row.kind == "task_run"]
        return [row for row in rows if task is None or row.task == task]

    def task(self, task: str) -> Row:
        """The one run of a task."""
        (row,) = self.tasks(task)
        return row

    def flows(self) -> list[Row]:
        return [row for row in self.rows().values() if row.kind == "flow_run"]

    def flow(self) -> Row:
        """The one flow run at the top."""
        (row,) = [row for row in self.flows() if row.body["parent_flow_run"] is None]
        return row

    def types(self, task: str | None = None) -> list[str]:
        return [row.type for row in self.tasks(task)]


def _elements(event: Event) -> Iterator[Row]:
    body = event.body
    for index in range(body["start"], body["start"] + body["count"]):
        edges = [tuple(edge) for edge in body["upstream"]]
        for parameter, map_id, offset in body["upstream_maps"]:
            edges.append((parameter, element_id(map_id, index + offset)))
        for parameter, runs in body.get("upstream_elements", ()):
            if runs[index - body["start"]] is not None:
                edges.append((parameter, runs[index - body["start"]]))
        name = body["names"][index - body["start"]] if body.get("names") else f"{body['name']}-{index}"
        yield Row(element_id(event.run, index), "task_run", {**body, "name": name, "upstream": edges})
