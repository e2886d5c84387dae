"""The server itself: health, figures, version, a page that describes the API, the door for browsers."""

from __future__ import annotations

import html
import platform
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse

from penstock.api import counts
from penstock.api.auth import SESSION_SECONDS, Scope, cookie_name, needs
from penstock.api.db import REVISIONS
from penstock.api.routes import PREFIX, PROBLEMS, ask, service_of
from penstock.api.schemas import Health, Problem, Version
from penstock.version import own_version

public = APIRouter(prefix=PREFIX, dependencies=[needs(Scope.PUBLIC)], responses=PROBLEMS, tags=["server"])
router = APIRouter(prefix=PREFIX, dependencies=[needs(Scope.VIEW)], responses=PROBLEMS, tags=["server"])
door = APIRouter(dependencies=[needs(Scope.PUBLIC)], include_in_schema=False)
pages = APIRouter(dependencies=[needs(Scope.VIEW)], include_in_schema=False)

QUIET = 30.0


@public.get("/health", response_model=Health)
async def get_health(request: Request) -> Any:
    """Return whether the process is up; no token is needed."""
    return {"status": "ok", "detail": "The server is up."}


@public.get("/ready", response_model=Health, responses={503: {"model": Health, "description": "It is not."}})
def get_ready(request: Request) -> Any:
    """Return whether events would be taken now; no token is needed."""
    service = service_of(request)
    failing = not service.writer.alive or bool(service.writer.figures.last_error)
    if not failing:
        return {"status": "ok", "detail": "Events are taken."}
    return JSONResponse({"status": "failing", "detail": "The database takes nothing now."}, 503)


@router.get("/version", response_model=Version)
def get_version(request: Request) -> Any:
    """Return what answers."""
    service = service_of(request)
    dialect = service.database.engine.dialect.name
    versions = {"penstock": own_version(), "python": platform.python_version()}
    about = {"api": 1, "schema": REVISIONS[-1], "database": dialect}
    return {**versions, **about, "local_runs": service.local_runs is not None}


@router.get("/metrics", response_class=PlainTextResponse)
def get_metrics(request: Request) -> Any:
    """Return figures in the text format of Prometheus."""
    states = ask(request, counts.count_states)
    return PlainTextResponse(
        "".join(_metrics(request, states)), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


def _metrics(request: Request, states: dict[str, dict[str, int]]) -> Iterator[str]:
    service = service_of(request)
    figures = service.writer.figures
    yield from _metric(
        "events_total", "counter", "Events that were sent and committed.", {"": figures.events}
    )
    yield from _metric("batches_total", "counter", "Batches that were committed.", {"": figures.batches})
    yield from _metric("commits_total", "counter", "Transactions of batches.", {"": figures.commits})
    yield from _metric("commit_seconds_total", "counter", "Time in these.", {"": figures.seconds})
    yield from _metric("failures_total", "counter", "What the database did not take.", {"": figures.failures})
    yield from _metric(
        "refused_total", "counter", "Batches refused since too many waited.", {"": figures.refused}
    )
    yield from _metric("waiting", "gauge", "Batches that wait.", {"": service.writer.waiting})
    yield from _metric("streams", "gauge", "Streams that are open.", {"": service.streams})
    for of, found in states.items():
        labels = {f'{{state="{state.lower()}"}}': number for state, number in sorted(found.items())}
        yield from _metric(f"{of}_runs", "gauge", f"{of.title()} runs by type of state.", labels)


def _metric(name: str, kind: str, about: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP penstock_{name} {about}\n# TYPE penstock_{name} {kind}\n"
    for labels, value in values.items():
        yield f"penstock_{name}{labels} {value}\n"


# -- browsers -------------------------------------------------------------------------------


@router.post(
    "/login-link", status_code=201, responses={403: {"model": Problem}}, dependencies=[needs(Scope.ADMIN)]
)
async def make_login_link(request: Request) -> dict[str, str]:
    """Return the path of a link that logs a browser in, once, within ten minutes."""
    return {"path": f"/login?key={request.app.state.keyring.link()}"}


@door.get("/login")
async def show_login(key: Annotated[str, Query(max_length=100)] = "") -> HTMLResponse:
    """Show a button: a link alone, which programs follow to have a look, uses no key up."""
    field = f'<input type="hidden" name="key" value="{html.escape(key, quote=True)}">'
    form = f'<form method="post" action="login">{field}<button>Log in to penstock</button></form>'
    return HTMLResponse(_page("Log in", form))


@door.post("/login")
async def log_in(request: Request) -> RedirectResponse:
    """Trade the key for a session."""
    fields = parse_qs((await request.body())[:1000].decode("ascii", "replace"))
    session = request.app.state.keyring.enter(fields.get("key", [""])[0])
    if session is None:
        raise HTTPException(
            401, "This link was used already or is too old; `penstock server login` prints a new one."
        )
    answer = RedirectResponse("docs", 303)
    # As the browser sees it: a proxy with TLS before us may speak plain HTTP to us.
    secure = "https" in {request.url.scheme, request.headers.get("origin", "").partition(":")[0]}
    answer.set_cookie(
        cookie_name(request),
        session,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=secure,
    )
    return answer


# -- the API, described ---------------------------------------------------------------------


@pages.get("/openapi.json")
async def get_openapi(request: Request) -> JSONResponse:
    """Return the description of the API."""
    return JSONResponse(request.app.openapi())


@pages.get("/docs")
async def get_docs(request: Request) -> HTMLResponse:
    """Show the API as a page that needs no script and nothing from elsewhere."""
    return HTMLResponse(_page("The API of penstock", "".join(_described(request.app.openapi()))))


def _described(api: dict[str, Any]) -> Iterator[str]:
    yield '<p>Send <code>Authorization: Bearer TOKEN</code>. The same as <a href="openapi.json">OpenAPI</a>.</p>'
    for path, methods in api["paths"].items():
        for method, one in methods.items():
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
            yield f"<p>{html.escape(one.get('description', one.get('summary', '')))}</p>"
            rows = "".join(_parameter(parameter) for parameter in one.get("parameters", ()))
            if rows:
                yield f"<table><tr><th>parameter</th><th>where</th><th>what</th></tr>{rows}</table>"


def _parameter(parameter: dict[str, Any]) -> str:
    schema = parameter.get("schema", {})
    kind = schema.get("type") or " or ".join(
        str(one.get("type") or one.get("$ref", "").rpartition("/")[2]) for one in schema.get("anyOf", ())
    )
    about = html.escape(f"{kind} {parameter.get('description', '')}".strip())
    return f"<tr><td><code>{html.escape(parameter['name'])}</code></td><td>{parameter['in']}</td><td>{about}</td></tr>"


def _page(title: str, body: str) -> str:
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>{body}</html>'
