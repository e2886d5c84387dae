"""Numbers for plots."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from penstock.api import counts
from penstock.api.auth import Scope, needs
from penstock.api.routes import PREFIX, PROBLEMS, Moment, ask
from penstock.api.schemas import Activity, Counts, Durations, RunId, Text

router = APIRouter(
    prefix=f"{PREFIX}/plots", dependencies=[needs(Scope.VIEW)], responses=PROBLEMS, tags=["plots"]
)

Of = Annotated[RunId | None, Query()]
Task = Annotated[Text | None, Query(description="Name of a task.")]


@router.get("/activity", response_model=Activity)
def get_activity(
    request: Request,
    flow_run: Of = None,
    root: Of = None,
    task: Task = None,
    after: Moment = None,
    before: Moment = None,
    bins: Annotated[int, Query(ge=1, le=1000)] = 60,
) -> Any:
    """Return how many task runs started, ended and were running in equal stretches of time."""
    details = {"flow_run": flow_run, "root": root, "task": task}
    return ask(request, counts.get_activity, after=after, before=before, bins=bins, **details)


@router.get("/durations", response_model=list[Durations])
def get_durations(
    request: Request,
    flow_run: Of = None,
    root: Of = None,
    task: Task = None,
    after: Moment = None,
    before: Moment = None,
) -> Any:
    """Return for each task how long its completed runs took, as a histogram."""
    details = {"flow_run": flow_run, "root": root, "task": task}
    return ask(request, counts.get_durations, after=after, before=before, **details)


@router.get("/states")
def get_states(request: Request) -> dict[str, Counts]:
    """Return how many flow runs and task runs there are in each state."""
    return ask(request, counts.count_states)
