"""The endpoints: parse, call one function, return.

Each router declares the scope that its routes need; a route without one fails the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import sqlalchemy as sa
from fastapi import HTTPException, Path, Query, Request

from penstock.api.schemas import Problem, RunId
from penstock.api.service import Service

__all__ = ["PROBLEMS", "Cursor", "Limit", "Run", "ask", "found", "service_of"]

PREFIX = "/api/v1"
PAGE = 200
LARGEST_PAGE = 1000

_Found = TypeVar("_Found")

_WHY = {
    400: "the request cannot be read",
    401: "no valid token",
    403: "the token is of too small a scope, or the request comes from another site",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is of another type",
    421: "the server is not addressed by this name",
    429: "too many requests",
    503: "the database takes or gives nothing now",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": f"Refused: {why}."} for status, why in _WHY.items()
}
MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such run."}}

Run = Annotated[RunId, Path(description="Id: 32 hexadecimal digits.")]
Cursor = Annotated[
    str | None,
    Query(max_length=8192, pattern="^[A-Za-z0-9_.-]+$", description="`following` of the page before."),
]
Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="At most so many.")]
Moment = Annotated[float | None, Query(ge=0, le=1e11, allow_inf_nan=False, description="Seconds since 1970.")]


def service_of(request: Request) -> Service:
    """Return what the application stands on."""
    service: Service = request.app.state.service
    return service


def ask(request: Request, question: Callable[..., _Found], *args: Any, **details: Any) -> _Found:
    """Answer with a function that takes a connection."""
    with service_of(request).read() as connection:
        return question(connection, *args, **details)


def found(one: _Found | None, run: str) -> _Found:
    """Return what was found, or answer 404."""
    if one is None:
        raise HTTPException(404, f"There is no run {run}.")
    return one


Connection = sa.Connection
