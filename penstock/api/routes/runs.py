"""What ran: flows, flow runs, task runs, maps, graphs, histories, logs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from penstock.api import lists, queries
from penstock.api.auth import Scope, needs
from penstock.api.edges import get_graph
from penstock.api.lines import read_lines
from penstock.api.lists import FlowOrder, FlowRunOrder, MapOrder, TaskRunOrder
from penstock.api.routes import MISSING, PREFIX, PROBLEMS, Cursor, Limit, Moment, Run, ask, found
from penstock.api.schemas import (
    FlowRun,
    FlowRuns,
    Flows,
    Graph,
    Level,
    Lines,
    MapRun,
    MapRuns,
    RunId,
    StateType,
    Step,
    TaskRun,
    TaskRuns,
    Text,
)

router = APIRouter(prefix=PREFIX, dependencies=[needs(Scope.VIEW)], responses=PROBLEMS, tags=["runs"])

States = Annotated[list[StateType], Query(max_length=10, description="Only in one of these states.")]
Part = Annotated[Text | None, Query(description="Part of the name.")]
Exact = Annotated[Text | None, Query()]
Of = Annotated[RunId | None, Query()]


def _page(listed: tuple[list[dict[str, Any]], str | None]) -> dict[str, Any]:
    items, following = listed
    return {"items": items, "following": following}


@router.get("/flows", response_model=Flows)
def list_flows(
    request: Request,
    name: Part = None,
    sort: FlowOrder = FlowOrder.LATEST,
    cursor: Cursor = None,
    limit: Limit = 200,
) -> Any:
    """List flows with how many runs each has, and in which states they are."""
    return _page(ask(request, lists.list_flows, name=name, order=sort, cursor=cursor, limit=limit))


@router.get("/flow-runs", response_model=FlowRuns)
def list_flow_runs(
    request: Request,
    flow: Exact = None,
    name: Part = None,
    state: States = [],  # noqa: B006 - FastAPI reads it, nobody writes it
    tag: Exact = None,
    root: Of = None,
    parent: Of = None,
    nested: Annotated[bool, Query(description="Those within flow runs, too.")] = False,
    created_after: Moment = None,
    created_before: Moment = None,
    sort: FlowRunOrder = FlowRunOrder.NEWEST,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Any:
    """List flow runs."""
    details = {"flow": flow, "name": name, "tag": tag, "root": root, "parent": parent, "nested": nested}
    times = {"created_after": created_after, "created_before": created_before}
    states = [one.value for one in state]
    page = {"order": sort, "cursor": cursor, "limit": limit}
    return _page(ask(request, lists.page_flow_runs, states=states, **details, **times, **page))


@router.get("/flow-runs/{run}", response_model=FlowRun, responses=MISSING)
def get_flow_run(request: Request, run: Run) -> Any:
    """Return one flow run."""
    return found(_of_kind("flow", ask(request, queries.get_run, run)), run)


@router.get("/flow-runs/{run}/graph", response_model=Graph, responses=MISSING)
def get_flow_run_graph(request: Request, run: Run, limit: Annotated[int, Query(ge=1, le=5000)] = 5000) -> Any:
    """Return what a flow run consists of, maps as one node each, and what depends on what."""
    return found(ask(request, get_graph, run, limit=limit), run)


@router.get("/flow-runs/{run}/tree", responses=MISSING)
def get_flow_run_tree(
    request: Request, run: Run, elements: Annotated[int, Query(ge=0, le=100)] = 10
) -> dict[str, Any]:
    """Return a flow run with everything in it, arranged by who submitted what."""
    return found(ask(request, queries.get_tree, run, elements=elements), run)


@router.get("/task-runs", response_model=TaskRuns)
def list_task_runs(
    request: Request,
    flow_run: Of = None,
    root: Of = None,
    parent: Of = None,
    map_run: Of = None,
    task: Exact = None,
    name: Part = None,
    state: States = [],  # noqa: B006 - FastAPI reads it, nobody writes it
    tag: Exact = None,
    worker: Exact = None,
    created_after: Moment = None,
    created_before: Moment = None,
    sort: TaskRunOrder = TaskRunOrder.OLDEST,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Any:
    """List task runs."""
    ids = {"flow_run": flow_run, "root": root, "parent": parent, "map_run": map_run}
    details = {"task": task, "name": name, "tag": tag, "worker": worker}
    times = {"created_after": created_after, "created_before": created_before}
    states = [one.value for one in state]
    page = {"order": sort, "cursor": cursor, "limit": limit}
    return _page(ask(request, lists.page_task_runs, states=states, **ids, **details, **times, **page))


@router.get("/task-runs/{run}", response_model=TaskRun, responses=MISSING)
def get_task_run(request: Request, run: Run) -> Any:
    """Return one task run."""
    return found(_of_kind("task", ask(request, queries.get_run, run)), run)


@router.get("/map-runs", response_model=MapRuns)
def list_map_runs(
    request: Request,
    flow_run: Of = None,
    task: Exact = None,
    sort: MapOrder = MapOrder.OLDEST,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Any:
    """List maps: how many elements are in which state, and which, as ranges."""
    page = {"order": sort, "cursor": cursor, "limit": limit}
    return _page(ask(request, lists.list_maps, flow_run=flow_run, task=task, **page))


@router.get("/map-runs/{run}", response_model=MapRun, responses=MISSING)
def get_map_run(request: Request, run: Run) -> Any:
    """Return one map."""
    items, _ = ask(request, lists.list_maps, ids=[run], limit=1)
    return found(items[0] if items else None, run)


@router.get("/runs/{run}/history", response_model=list[Step], responses=MISSING)
def get_history(request: Request, run: Run) -> Any:
    """Return the states of a flow or task run in their order."""
    found(ask(request, queries.get_run, run), run)
    return ask(request, queries.get_history, run)


@router.get("/runs/{run}/logs", response_model=Lines, responses=MISSING)
def get_logs(
    request: Request,
    run: Run,
    level: Annotated[Level | None, Query(description="The lowest level.")] = None,
    search: Annotated[Text | None, Query(description="Only lines that hold this text.")] = None,
    cursor: Cursor = None,
    limit: Limit = 1000,
) -> Any:
    """Return log lines, of a flow run with those of everything in it: the latest, or those after a cursor."""
    details = {"search": search, "cursor": cursor, "limit": limit}
    return found(ask(request, read_lines, run, level=level.value if level else None, **details), run)


@router.get("/find", response_model=list[FlowRun | TaskRun])
def find_runs(
    request: Request, text: Annotated[Text, Query()], limit: Annotated[int, Query(ge=1, le=50)] = 20
) -> Any:
    """Find runs by what a person remembers: an id, its first or last digits, a name."""
    rows = ask(request, queries.find_runs, text, limit=limit)
    return [row if row["kind"] == "task" else {"tasks": {}, **row} for row in map(_without_upstream, rows)]


def _without_upstream(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "upstream": []} if row["kind"] == "task" else row


def _of_kind(kind: str, run: dict[str, Any] | None) -> dict[str, Any] | None:
    return run if run is not None and run["kind"] == kind else None
