"""Numbers for plots: how many runs started and ended in each stretch of time, and how long they took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api.models import FINAL, PRESUMED, flow_runs, task_runs
from penstock.api.rows import ABANDONED, select

__all__ = ["count_states", "get_activity", "get_durations"]

EDGES = tuple(mantissa * 10.0**power for power in range(-4, 6) for mantissa in (1.0, 2.0, 5.0))
"""Limits of the bins of durations, in seconds."""

_DEAD = flow_runs.alias("dead")  # root flow runs whose driver is presumed dead, and that nobody has taken
_RUNS = task_runs.outerjoin(_DEAD, sa.and_(_DEAD.c.id == task_runs.c.root, _DEAD.c.rank == PRESUMED))
_FINAL = task_runs.c.state_type.in_(sorted(FINAL))
_LEFT = sa.and_(sa.not_(_FINAL), _DEAD.c.id.is_not(None))
_OVER = sa.or_(_FINAL, _LEFT)
_ENDED = sa.case((_FINAL, task_runs.c.state_time), else_=_DEAD.c.state_time)


def get_activity(
    connection: sa.Connection,
    *,
    flow_run: str | None = None,
    root: str | None = None,
    task: str | None = None,
    after: float | None = None,
    before: float | None = None,
    bins: int = 60,
) -> dict[str, Any]:
    """Return how many task runs started and ended in each of some equal stretches of time.

    Parameters
    ----------
    connection : Connection
        Of the store.
    flow_run, root : str, optional
        Only of this flow run, or of everything in it.
    task : str, optional
        Only of this task.
    after, before : float, optional
        The time to look at; by default from the first start to the last end. Without a flow run the
        last hour before the last end.
    bins : int
        How many stretches.

    Returns
    -------
    dict
        ``begin, width`` (seconds), and a list each of ``started``, ``ended``, ``failed`` (these
        crashed ones included) and ``running`` (at the end of the stretch). What a dead driver left has
        ended when that was noticed.
    """
    column = task_runs.c
    chosen = _chosen(flow_run, root, task)
    begin, end = _span(connection, chosen, after, before, bounded=flow_run is None and root is None)
    width = max((end - begin) / bins, 1e-6)
    at_start = _binned(connection, chosen, column.started, begin, width, bins)
    at_end = _binned(connection, [*chosen, _OVER], _ENDED, begin, width, bins)
    bad = [*chosen, sa.or_(column.state_type.in_(["FAILED", "CRASHED"]), _LEFT)]
    failed = _binned(connection, bad, _ENDED, begin, width, bins)
    running = _running_before(connection, chosen, begin)
    level = []
    begun = _binned(connection, [*chosen, _OVER, column.started.is_not(None)], _ENDED, begin, width, bins)
    for started, ended in zip(at_start, begun, strict=True):
        running += started - ended
        level.append(max(0, running))
    return {
        "begin": begin,
        "width": width,
        "started": at_start,
        "ended": at_end,
        "failed": failed,
        "running": level,
    }


def _chosen(flow_run: str | None, root: str | None, task: str | None) -> list[sa.ColumnElement[bool]]:
    wanted = {"flow_run": flow_run, "root": root, "task": task}
    return [task_runs.c[name] == value for name, value in wanted.items() if value is not None]


def _span(
    connection: sa.Connection,
    chosen: Sequence[sa.ColumnElement[bool]],
    after: float | None,
    before: float | None,
    *,
    bounded: bool,
) -> tuple[float, float]:
    column = task_runs.c
    ends = sa.func.max(sa.func.coalesce(column.state_time, column.started))
    first, last = connection.execute(sa.select(sa.func.min(column.started), ends).where(*chosen)).one()
    end = before if before is not None else float(last or 0.0)
    begin = after if after is not None else float(first if first is not None else end)
    if bounded and after is None:
        begin = max(begin, end - 3600.0)
    return min(begin, end), end


def _binned(
    connection: sa.Connection,
    chosen: Sequence[sa.ColumnElement[bool]],
    moment: sa.ColumnElement[Any],
    begin: float,
    width: float,
    bins: int,
) -> list[int]:
    place = sa.cast(sa.func.floor((moment - begin) / width), sa.Integer).label("place")
    query = sa.select(place, sa.func.count()).select_from(_RUNS)
    query = query.where(*chosen, moment >= begin, moment <= begin + width * bins)
    counts = [0] * bins
    for index, count in connection.execute(query.group_by(place)):
        counts[max(0, min(bins - 1, int(index)))] += count
    return counts


def _running_before(connection: sa.Connection, chosen: Sequence[sa.ColumnElement[bool]], begin: float) -> int:
    column = task_runs.c
    open_still = sa.or_(sa.not_(_OVER), begin <= _ENDED)
    query = sa.select(sa.func.count()).select_from(_RUNS).where(*chosen, column.started < begin, open_still)
    return int(connection.execute(query).scalar() or 0)


def get_durations(
    connection: sa.Connection,
    *,
    flow_run: str | None = None,
    root: str | None = None,
    task: str | None = None,
    after: float | None = None,
    before: float | None = None,
) -> list[dict[str, Any]]:
    """Return for each task how long its completed runs took: a histogram in steps of 1, 2, 5.

    Parameters
    ----------
    connection : Connection
        Of the store.
    flow_run, root, task : str, optional
        Only of this flow run, of everything in it, of this task.
    after, before : float, optional
        Only runs that ended then.

    Returns
    -------
    list of dict
        ``{task, count, total, shortest, longest, edges, counts}``; times are seconds, ``counts[i]``
        is how many took at least ``edges[i]`` and less than ``edges[i + 1]``, the last one without an
        end. At most 200 tasks, those with the longest time in total.
    """
    column = task_runs.c
    chosen = [*_chosen(flow_run, root, task), column.state_type == "COMPLETED", column.seconds.is_not(None)]
    if after is not None:
        chosen.append(column.state_time >= after)
    if before is not None:
        chosen.append(column.state_time < before)
    func, total = sa.func, sa.func.sum(column.seconds).label("total")
    summary = sa.select(
        column.task,
        func.count().label("count"),
        total,
        func.min(column.seconds).label("shortest"),
        func.max(column.seconds).label("longest"),
    )
    found = select(connection, summary.where(*chosen).group_by(column.task).order_by(total.desc()).limit(200))
    place = sa.case(
        *((column.seconds < limit, index) for index, limit in enumerate(EDGES)), else_=len(EDGES)
    ).label("place")
    binned = sa.select(column.task, place, func.count().label("count")).where(*chosen)
    places: dict[str | None, dict[int, int]] = {}
    for row in select(connection, binned.group_by(column.task, place)):
        places.setdefault(row["task"], {})[int(row["place"])] = row["count"]
    return [{**row, **_histogram(places.get(row["task"], {}))} for row in found]


def _histogram(places: dict[int, int]) -> dict[str, Any]:
    if not places:
        return {"edges": [], "counts": []}
    limits = (0.0, *EDGES)
    first, last = min(places), max(places)
    return {
        "edges": list(limits[first : last + 1]),
        "counts": [places.get(index, 0) for index in range(first, last + 1)],
    }


def count_states(connection: sa.Connection) -> dict[str, dict[str, int]]:
    """Return how many flow runs and task runs there are in each type of state.

    Two questions for each, which indexes answer: a condition for each row would read a store of millions whole.
    """
    abandoned_flows = sa.select(flow_runs.c.id).where(flow_runs.c.root.in_(ABANDONED))
    found: dict[str, dict[str, int]] = {}
    for name, table, flow_run in (
        ("flow", flow_runs, flow_runs.c.id),
        ("task", task_runs, task_runs.c.flow_run),
    ):
        kind = table.c.state_type
        query = sa.select(kind, sa.func.count()).group_by(kind)
        counts = Counter({str(state): int(count) for state, count in connection.execute(query)})
        left = query.where(kind.not_in(FINAL), flow_run.in_(abandoned_flows))
        for state, count in connection.execute(left):  # shown as what they are, since nobody runs them
            counts[str(state)] -= int(count)
            counts["CRASHED"] += int(count)
        found[name] = {state: count for state, count in counts.items() if count}
    return found
