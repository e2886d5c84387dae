"""Streams: events and log lines as they come, as server-sent events that go on where they were cut."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from penstock.api import queries
from penstock.api.auth import Scope, needs
from penstock.api.lines import read_lines
from penstock.api.routes import MISSING, PREFIX, PROBLEMS, Run, ask, found, service_of
from penstock.api.schemas import Level, RunId, Text
from penstock.api.service import Service
from penstock.api.stream import Hub, Position, shown
from penstock.engine.events import Event

STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A stream without an end.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
router = APIRouter(
    prefix=PREFIX,
    dependencies=[needs(Scope.VIEW)],
    responses=PROBLEMS,
    tags=["streams"],
    default_response_class=StreamingResponse,
)

STREAMS = 64
IDLE = 1.0  # seconds between two looks whether the server stops
BEATS = 15  # of these between two signs of life
LINES = 1000
_HEADERS = {"X-Accel-Buffering": "no"}

LastId = Annotated[str | None, Header(max_length=16384, description="Of the last event that was seen.")]


def _refuse_more(service: Service) -> None:
    if service.streams >= STREAMS:
        raise HTTPException(503, f"There are {STREAMS} streams already.", {"Retry-After": "10"})


@router.get("/events", response_class=StreamingResponse, responses=STREAM)
async def stream_events(
    request: Request,
    root: Annotated[RunId | None, Query(description="Only of this root flow run.")] = None,
    logs: Annotated[bool, Query(description="Log lines, too.")] = False,
    last_event_id: LastId = None,
) -> StreamingResponse:
    """Stream events from now on, or from where a stream with this `Last-Event-ID` ended.

    Each has `writer` and `seq`, which together name it: after a reconnect some may come twice.
    """
    service, hub = service_of(request), request.app.state.hub
    start = Position.read(last_event_id) if last_event_id is not None else None
    _refuse_more(service)

    def wanted(event: Event) -> bool:
        return (root is None or event.root == root) and (logs or event.kind != "log")

    return StreamingResponse(_events(service, hub, start, wanted), 200, _HEADERS, "text/event-stream")


async def _events(service: Service, hub: Hub, start: Position | None, wanted: Any) -> AsyncIterator[str]:
    quiet = 0
    service.streams += 1  # here, since a stream that nobody begins to read is never ended
    try:
        yield "retry: 1000\n\n"
        first = True
        async for items, position in hub.watch(start, wanted, IDLE):
            data = "".join(f"event: {one['kind']}\ndata: {_json(one)}\n\n" for one in map(shown, items))
            quiet = 0 if data else quiet + 1
            if data or first or quiet >= BEATS:
                yield f"{data}id: {position}\nevent: position\ndata: {{}}\n\n"
                quiet, first = 0, False
    finally:
        service.streams -= 1


@router.get("/runs/{run}/logs/stream", response_class=StreamingResponse, responses=STREAM | MISSING)
async def stream_logs(
    request: Request,
    run: Run,
    level: Annotated[Level | None, Query(description="The lowest level.")] = None,
    search: Annotated[Text | None, Query(description="Only lines that hold this text.")] = None,
    last_event_id: LastId = None,
) -> StreamingResponse:
    """Stream the log of a run: the latest lines, or those after `Last-Event-ID`, then what comes."""
    service, hub = service_of(request), request.app.state.hub
    known = found(await run_in_threadpool(ask, request, queries.get_run, run), run)
    details: dict[str, Any] = {"level": level.value if level else None, "search": search, "limit": LINES}

    def read(cursor: str | None) -> dict[str, Any]:
        return ask(request, read_lines, run, cursor=cursor, **details) or {"lines": [], "following": cursor}

    await run_in_threadpool(read, last_event_id)  # refuses a bad id now
    _refuse_more(service)
    return StreamingResponse(
        _lines(service, hub, known["root"], last_event_id, read), 200, _HEADERS, "text/event-stream"
    )


async def _lines(service: Service, hub: Hub, root: str, cursor: str | None, read: Any) -> AsyncIterator[str]:
    quiet = 0
    service.streams += 1  # here, since a stream that nobody begins to read is never ended
    try:
        yield "retry: 1000\n\n"
        first = True
        async for items, _ in hub.watch(None, lambda event: event.root == root and event.kind == "log", IDLE):
            lines: list[Any] = []
            more = first or bool(items)
            while more:
                answer = await run_in_threadpool(read, cursor)
                lines += answer["lines"]
                more, first, cursor = bool(answer["lines"]), False, answer["following"]
            data = "".join(f"event: line\ndata: {_json(line)}\n\n" for line in lines)
            quiet = 0 if data else quiet + 1
            if data or quiet >= BEATS:
                yield f"{data}id: {cursor}\nevent: position\ndata: {{}}\n\n"
                quiet = 0
    finally:
        service.streams -= 1


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, allow_nan=True, default=str, separators=(",", ":"))
    return text.replace("NaN", "null") if "NaN" in text else text
