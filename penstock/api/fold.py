"""From events to rows: what a batch of events says about the runs in it.

Folding takes the greatest order key, so neither the order in which events arrive nor their
repetition matters. Rows are plain tuples in the order of the column lists below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from penstock.api.db import Upsert
from penstock.api.models import dropped_lines, flow_runs, maps, requests, task_runs
from penstock.engine.events import Event, element_id

PARAMETERS = 4096  # characters of a description that are kept

# Column lists are in the order of the tables, since that is the order in which SQLAlchemy binds values.
_KEY = ["epoch", "attempt", "rank", "rseq", "state_name"]
_STATE = [
    *_KEY,
    "state_type",
    "message",
    "cause",
    "state_time",
    "started",
    "seconds",
    "error_type",
    "error_message",
    "error_text",
]
_FLOW = ["parent_flow_run", "parent_task_run", "flow", "name", "version", "tags", "parameters", "runner"]
_FLOW += ["host", "pid", "python", "penstock", "created", "made"]
_TASK = [
    "flow_run",
    "parent",
    "map",
    "element",
    "task",
    "name",
    "tags",
    "parameters",
    "upstream",
    "child_flow_run",
]
_TASK += ["created", "made"]
_MAP = [
    "count",
    "root",
    "flow_run",
    "parent",
    "task",
    "name",
    "tags",
    "parameters",
    "upstream",
    "upstream_maps",
]
_MAP += ["created", "made"]
_USAGE = ["nbytes", "peak", "worker", "stored"]
_NEW = [*_KEY, "state_type"]
_LARGEST = (1 << 63) - 1
_MOST_LINES = 1 << 48  # in one batch: the sum must fit its column
_NO_ERROR = (None, None, None)
_PENDING = (0, 0, 0, 0, "Pending", "PENDING")
_PENDING_KEY = _PENDING[:5]
_FLOW_KEY, _TASK_KEY = slice(2, 7), slice(4, 9)  # where the key is in a row of a state

UPSERTS = {
    "flow_runs": Upsert(flow_runs, ["id", "root", *_FLOW, *_NEW], _FLOW, ["made"]),
    "task_runs": Upsert(task_runs, ["id", "root", *_TASK, *_NEW], _TASK, ["made"]),
    "maps": Upsert(maps, ["id", "start", *_MAP], _MAP, ["made"]),
    "backends": Upsert(
        flow_runs,
        ["id", "root", "backend", "backend_order", *_NEW],
        ["backend", "backend_order"],
        ["backend_order"],
    ),
    "flow_states": Upsert(flow_runs, ["id", "root", *_STATE], _STATE, _KEY),
    "dropped_lines": Upsert(dropped_lines, ["root", "lines"], add="lines"),
    "task_states": Upsert(
        task_runs, ["id", "root", "map", "element", *_STATE, *_USAGE], [*_STATE, *_USAGE], _KEY
    ),
    "requests": Upsert(
        requests, ["id", "root", "run", "kind", "settled", "outcome"], ["settled", "outcome"], ["settled"]
    ),
}
"""How each kind of row gets into its table."""

_WHOLE = Upsert(
    task_runs,
    ["id", "root", *_TASK, *_STATE, *_USAGE],
    UPSERTS["task_runs"].update,
    UPSERTS["task_runs"].order,
    also=[UPSERTS["task_states"]],
)

_MADE = {
    name: upsert.columns.index(upsert.order[0]) for name, upsert in UPSERTS.items() if len(upsert.order) == 1
}


class Fold:
    """The rows that a batch of events amounts to.

    Attributes
    ----------
    rows : dict of str to dict
        For each name in `UPSERTS` the rows by their key; of several for one key the latest.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[Any, tuple[Any, ...]]] = {name: {} for name in UPSERTS}

    def add(self, event: Event) -> None:
        """Fold one event in; kinds of a newer penstock are passed over.

        Raises
        ------
        Exception
            If the body is not what its kind promises; nothing of it has been folded then.
        """
        handler = _HANDLERS.get(event.kind)
        if handler is not None:
            handler(self, event)

    def _make(self, name: str, key: Any, row: tuple[Any, ...]) -> None:
        present, made = self.rows[name].get(key), _MADE[name]
        if present is None or row[made] > present[made]:
            self.rows[name][key] = row

    def writes(self) -> Iterator[tuple[str, Upsert, list[tuple[Any, ...]]]]:
        """Yield what is to be written: a name, how, and the rows.

        A task run that is made and has reached a state is one row: to insert it and to change it
        at once would cost the time of both, and twice the room in PostgreSQL.
        """
        made, states = self.rows["task_runs"], self.rows["task_states"]
        both = {
            run: states[run] for run in made.keys() & states.keys() if states[run][_TASK_KEY] > _PENDING_KEY
        }
        whole = [made[run][: -len(_PENDING)] + state[4:] for run, state in both.items()]
        for name, upsert in UPSERTS.items():
            rows = self.rows[name]
            if both and (rows is made or rows is states):
                yield name, upsert, [row for run, row in rows.items() if run not in both]
            else:
                yield name, upsert, list(rows.values())
        yield "whole_tasks", _WHOLE, whole

    # -- a run exists -----------------------------------------------------------------------
    def _flow_run(self, event: Event) -> None:
        body = event.body
        row = (
            event.run,
            event.root,
            _text(body.get("parent_flow_run")),
            _text(body.get("parent_task_run")),
            _text(body.get("flow")),
            _text(body.get("name")),
            _text(body.get("version")),
            _tags(body.get("tags")),
            _limited(body.get("parameters")),
            _text(body.get("runner")),
            _text(body.get("host")),
            _whole(body.get("pid")),
            _text(body.get("python")),
            _text(body.get("penstock")),
            event.time,
            _order(event),
            *_PENDING,
        )
        self._make("flow_runs", event.run, row)

    def _task_run(self, event: Event) -> None:
        body = event.body
        row = (
            event.run,
            event.root,
            _text(body.get("flow_run")),
            _text(body.get("parent")),
            _text(body.get("map")),  # an element whose name a worker has made
            _whole(body.get("element")),
            _text(body.get("task")),
            _text(body.get("name")),
            _tags(body.get("tags")),
            _limited(body.get("parameters")),
            _json(body.get("upstream")),
            _text(body.get("child_flow_run")),
            event.time,
            _order(event),
            *_PENDING,
        )
        self._make("task_runs", event.run, row)

    def _map_run(self, event: Event) -> None:
        body, run, root = event.body, event.run, event.root
        flow_run, parent, task = (
            _text(body.get("flow_run")),
            _text(body.get("parent")),
            _text(body.get("task")),
        )
        name, tags = _text(body.get("name")) or "", _tags(body.get("tags"))
        start, count, names = int(body.get("start") or 0), int(body["count"]), body.get("names")
        edges = (
            _limited(body.get("parameters")),
            _json(body.get("upstream")),
            _json(body.get("upstream_maps")),
        )
        made = (event.time, _order(event))
        indices = range(start, start + count)
        labels = (
            [f"{name}-{index}" for index in indices] if not names else [_text(label) or "" for label in names]
        )
        own = _element_edges(body.get("upstream_elements"), count)
        before, after = (root, flow_run, parent, run), (None, *made, *_PENDING)
        rows = [
            (element_id(run, index), *before, index, task, label, tags, None, upstream, *after)
            for index, label, upstream in zip(indices, labels, own, strict=True)
        ]
        shared = (root, flow_run, parent, task, name, tags)
        self._make("maps", (run, start), (run, start, count, *shared, *edges, *made))
        for row in rows:
            self._make("task_runs", row[0], row)

    # -- a run reached a state --------------------------------------------------------------
    def _state(self, event: Event) -> None:
        get = event.body.get
        kind, name, started, error = event.body["type"], event.body["name"], get("started"), get("error")
        started = event.time if started is None and kind == "RUNNING" else _number(started)
        row = (
            event.epoch,
            event.attempt,
            event.rank,
            event.rseq,
            _text(name),
            _text(kind),
            _text(get("message")),
            _text(get("cause")),
            event.time,
            started,
            get("seconds"),
            *(
                (_text(error.get("type")), _text(error.get("message")), _text(error.get("text")))
                if error
                else _NO_ERROR
            ),
        )
        if get("of") == "flow":
            _reach(self.rows["flow_states"], (event.run, event.root, *row), _FLOW_KEY)
        else:
            usage = (
                _whole(get("nbytes")),
                _whole(get("peak")),
                _text(get("worker")),
                _text(get("stored")),
            )
            _reach(self.rows["task_states"], (event.run, event.root, None, None, *row, *usage), _TASK_KEY)

    def _states(self, event: Event) -> None:
        body, map_id, root = event.body, event.run, event.root
        kind, name, message, cause = (
            str(body["type"]),
            str(body["name"]),
            body.get("message"),
            body.get("cause"),
        )
        epoch, rank, rseq = event.epoch, event.rank, event.rseq
        workers = [_text(worker) for worker in body.get("workers") or ()]
        indices = body["index"]
        running = kind == "RUNNING"
        said = (kind, _text(message), _text(cause))
        found = []
        stored = iter(body.get("stored") or [None] * len(indices))
        for index, attempt, when, started, seconds, nbytes, peak, place in zip(
            indices, *(_column(body.get(column), len(indices)) for column in _COLUMNS), strict=True
        ):
            moment = event.time if when is None else when
            began = moment if started is None and running else started
            key = (epoch, event.attempt if attempt is None else attempt, rank, rseq, name)
            worker = None if place is None or place < 0 else workers[place]
            element = (element_id(map_id, index), root, map_id, index)
            usage = (nbytes, peak, worker, _text(next(stored)))
            found.append((*element, *key, *said, moment, began, seconds, *_NO_ERROR, *usage))
        for row in found:
            _reach(self.rows["task_states"], row, _TASK_KEY)

    def _log(self, event: Event) -> None:
        dropped = int(event.body.get("dropped") or 0)
        if dropped > 0:  # a sum, and no maximum: `ingest` folds every event exactly once
            rows = self.rows["dropped_lines"]
            before = rows[event.root][1] if event.root in rows else 0
            rows[event.root] = (event.root, min(before + dropped, _MOST_LINES))

    def _runner(self, event: Event) -> None:
        self._make(
            "backends", event.run, (event.run, event.root, _json(event.body), _order(event), *_PENDING)
        )

    def _request(self, event: Event) -> None:
        body = event.body
        request, outcome = str(body["id"])[:32], _text(body.get("outcome"))
        row = (request, event.root, event.run, str(body.get("what"))[:16], event.time, outcome)
        self._make("requests", request, row)


_NUMBERS = frozenset({int, float, type(None)})
_COLUMNS = ("attempt", "time", "started", "seconds", "nbytes", "peak", "worker")

_HANDLERS: dict[str, Callable[[Fold, Event], None]] = {
    "flow_run": Fold._flow_run,
    "task_run": Fold._task_run,
    "map_run": Fold._map_run,
    "state": Fold._state,
    "states": Fold._states,
    "log": Fold._log,
    "runner": Fold._runner,
    "request": Fold._request,
}


def _reach(rows: dict[Any, tuple[Any, ...]], row: tuple[Any, ...], key: slice) -> None:
    present = rows.get(row[0])
    if present is None or row[key] > present[key]:
        rows[row[0]] = row


def _order(event: Event) -> int:
    return event.epoch << 40 | event.rseq


_write_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # `dumps` would make one each time


# -- values ---------------------------------------------------------------------------------


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text: str = value if type(value) is str else str(value)
    return text if "\0" not in text else text.replace("\0", "\N{SYMBOL FOR NULL}")  # PostgreSQL takes none


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _whole(value: Any) -> int | None:
    if value is None:
        return None
    number = int(value)
    return number if -_LARGEST <= number <= _LARGEST else _LARGEST


def _column(values: list[Any] | None, length: int) -> list[Any]:
    if values is None:
        return [None] * length
    if not _NUMBERS.issuperset(map(type, values)):
        raise TypeError("a column holds something that is not a number")
    return values


def _json(value: Any) -> str | None:
    return _write_json(value) if value else None


def _tags(value: Any) -> str | None:
    return _json(sorted(str(tag) for tag in value)) if value else None


def _element_edges(parts: Any, count: int) -> list[str | None]:
    """Return for each element the edges that only it has."""
    if not parts:
        return [None] * count
    edges: list[list[Any]] = [[] for _ in range(count)]
    for parameter, runs in parts:
        for own, run in zip(edges, runs, strict=True):
            if run is not None:
                own.append([parameter, run])
    return [_json(own) for own in edges]


def _limited(parameters: Any) -> str | None:
    text = _json(parameters)
    if text is None or len(text) <= PARAMETERS:
        return text
    kept: dict[str, Any] = {}
    used = 0
    for name, value in dict(parameters).items():
        short = str(value)[:120]
        used += len(name) + len(short) + 8
        if used > PARAMETERS - 40:
            kept["…"] = f"{len(parameters) - len(kept)} more"
            break
        kept[name] = short
    return _json(kept)
