"""What happened to a run, read from the events themselves: its states in order, its log lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api.models import FINAL, STALE, UNREADABLE, events, flow_runs, task_runs
from penstock.api.rows import names_of
from penstock.engine.events import Event, unpack

Step = dict[str, Any]

_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
_USAGE = ("started", "seconds", "nbytes", "peak", "worker")


def get_history(connection: sa.Connection, run: str) -> list[Step]:
    """Return the states of a flow or task run in their order.

    Parameters
    ----------
    connection : Connection
        Of the store.
    run : str
        Id of the run.

    Returns
    -------
    list of dict
        ``time, type, name, message, cause, attempt, epoch, started, seconds, nbytes, peak, worker,
        error``. ``stale`` marks a state that came from somebody who no longer owned the run and
        changed nothing; ``derived`` one that no event of its own told: that the run was made, or
        that it was running, which its end tells.
    """
    found: list[tuple[tuple[int, ...], Step]] = []
    row = connection.execute(sa.select(task_runs).where(task_runs.c.id == run)).first()
    element = row is not None and row.map is not None
    for event, stale in _events_of(connection, [run, row.map] if row is not None and element else [run]):
        if event.kind == "state" and event.run == run:
            found.append(
                (_key(event, event.attempt), _step(event, event.body, event.attempt, event.time, stale))
            )
        elif event.kind == "states" and row is not None and element:
            found += _element_steps(event, row.element, stale)
    found.sort(key=lambda one: one[0])
    steps = _with_running([step for _, step in found])
    created = row.created if row is not None else _created(connection, run)
    if created is not None and not any(step["attempt"] == 0 and step["type"] == "PENDING" for step in steps):
        steps.insert(0, _derived("PENDING", "Pending", created, 0, steps[0]["epoch"] if steps else 1))
    return steps


def _events_of(connection: sa.Connection, runs: Sequence[str]) -> Iterator[tuple[Event, bool]]:
    query = sa.select(events.c.data, events.c.verdict)
    query = query.where(events.c.run.in_(runs), events.c.kind.in_(["state", "states"]))
    for data, verdict in connection.execute(query.where(events.c.verdict != UNREADABLE)):
        yield unpack(data), verdict == STALE


def _key(event: Event, attempt: int) -> tuple[int, ...]:
    return (event.epoch, attempt, event.rank, event.rseq)


def _step(event: Event, body: dict[str, Any], attempt: int, time: float, stale: bool) -> Step:
    said = {name: body.get(name) for name in ("message", "cause")}
    usage = {name: body.get(name) for name in _USAGE}
    order = {"attempt": attempt, "epoch": event.epoch}
    state = {"time": time, "type": body["type"], "name": body["name"], **said, **order, **usage}
    return {**state, "error": body.get("error"), "stale": stale, "derived": False}


def _element_steps(event: Event, element: int, stale: bool) -> Iterator[tuple[tuple[int, ...], Step]]:
    body, workers = event.body, event.body.get("workers") or []
    for place, index in enumerate(body["index"]):
        if index != element:
            continue
        own = {name: body[name][place] if body.get(name) else None for name in (*_USAGE, "attempt", "time")}
        if own["worker"] is not None:
            own["worker"] = workers[own["worker"]] if own["worker"] >= 0 else None
        attempt = event.attempt if own["attempt"] is None else own["attempt"]
        time = event.time if own["time"] is None else own["time"]
        shared = {name: body.get(name) for name in ("type", "name", "message", "cause")}
        yield _key(event, attempt), _step(event, {**shared, **own}, attempt, time, stale)


def _with_running(steps: list[Step]) -> list[Step]:
    """Show that a run was running where only the end of the attempt tells it."""
    complete: list[Step] = []
    told: set[tuple[int, int]] = set()
    for step in steps:
        turn = (step["epoch"], step["attempt"])
        ended = step["type"] in FINAL or step["seconds"] is not None  # a retry, too, is the end of an attempt
        if ended and step["started"] is not None and turn not in told:
            complete.append(_derived("RUNNING", "Running", step["started"], step["attempt"], step["epoch"]))
        if ended or step["type"] == "RUNNING":
            told.add(turn)
        complete.append(step)
    return complete


def _derived(kind: str, name: str, time: float, attempt: int, epoch: int) -> Step:
    step = _step(
        Event("state", "", "", time, epoch=epoch), {"type": kind, "name": name}, attempt, time, False
    )
    return {**step, "derived": True}


def _created(connection: sa.Connection, run: str) -> float | None:
    return connection.execute(sa.select(flow_runs.c.created).where(flow_runs.c.id == run)).scalar()


# -- logs -----------------------------------------------------------------------------------


def get_logs(
    connection: sa.Connection, run: str, *, level: str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Return the log of a run: of a flow run with that of all tasks and flows in it.

    Parameters
    ----------
    connection : Connection
        Of the store.
    run : str
        Id of a flow or task run.
    level : str, optional
        The lowest level to show, such as "WARNING".
    limit : int, optional
        At most so many lines, the latest ones.

    Returns
    -------
    dict
        ``lines``: a list of ``{time, level, text, run, name}`` by time; ``dropped``: how many lines
        were not kept when they were written.
    """
    root = _root_of(connection, run)
    if root is None:
        return {"lines": [], "dropped": 0}
    wanted = None if root == run else _within(connection, root, run)
    query = sa.select(events.c.data).where(
        events.c.root == root, events.c.kind == "log", events.c.verdict != UNREADABLE
    )
    lines: list[dict[str, Any]] = []
    dropped = 0
    least = _LEVELS.get((level or "").upper(), 0)
    for data in connection.execute(query.order_by(events.c.writer, events.c.seq)).scalars():
        event = unpack(data)
        if wanted is not None and event.run not in wanted:
            continue
        dropped += int(event.body.get("dropped") or 0)
        for time, name, text in event.body.get("lines") or ():
            if _LEVELS.get(str(name).upper(), 20) >= least:
                lines.append({"time": time, "level": name, "text": text, "run": event.run})
    lines.sort(key=lambda line: line["time"])
    lines = lines if limit is None else lines[len(lines) - min(limit, len(lines)) :]
    names = names_of(connection, sorted({line["run"] for line in lines}))
    return {"lines": [{**line, "name": names.get(line["run"])} for line in lines], "dropped": dropped}


def _root_of(connection: sa.Connection, run: str) -> str | None:
    for table in (flow_runs, task_runs):
        root: str | None = connection.execute(sa.select(table.c.root).where(table.c.id == run)).scalar()
        if root is not None:
            return root
    return None


def _within(connection: sa.Connection, root: str, run: str) -> set[str]:
    """Return the runs below one that is not the root, itself included."""
    above: dict[str, list[str]] = {}
    for child, flow_run, parent in connection.execute(
        sa.select(task_runs.c.id, task_runs.c.flow_run, task_runs.c.parent).where(task_runs.c.root == root)
    ):
        above.setdefault(parent or flow_run, []).append(child)
    nested = sa.select(flow_runs.c.id, flow_runs.c.parent_task_run, flow_runs.c.parent_flow_run)
    for child, parent_task, parent_flow in connection.execute(nested.where(flow_runs.c.root == root)):
        above.setdefault(parent_task or parent_flow, []).append(child)
    found, waiting = {run}, [run]
    while waiting:
        for child in above.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found
