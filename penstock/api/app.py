"""The application: routes, what guards them, and what an error becomes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from penstock.api.auth import Keyring
from penstock.api.guard import Guard
from penstock.api.paging import BadCursor
from penstock.api.routes import about, asking, ingest, live, plots, runs
from penstock.api.service import Service
from penstock.api.stream import Hub
from penstock.version import own_version

__all__ = ["create_app"]

logger = logging.getLogger("penstock.server")

ROUTERS = (
    runs.router,
    plots.router,
    live.router,
    asking.views,
    asking.router,
    ingest.router,
    about.public,
    about.router,
    about.door,
    about.pages,
)


def create_app(
    service: Service, *, keyring: Keyring | None = None, hosts: Iterable[str] = (), rate: float = 100.0
) -> FastAPI:
    """Make the ASGI application of a server.

    Parameters
    ----------
    service : Service
        The store that it serves; it is started and closed with the application.
    keyring : Keyring, optional
        The tokens that are accepted; by default those of the home of the service.
    hosts : iterable of str
        Names, without port, by which the server may be addressed besides those of this machine.
    rate : float
        Requests per second from one token.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        app.state.hub.start()
        try:
            yield
        finally:
            service.stopping.set()
            await app.state.hub.stop()
            service.close()

    app = FastAPI(
        title="penstock",
        version=own_version(),
        description="The record of flow runs.",
        openapi_url=None,  # the pages below need a token, those of FastAPI would not
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.keyring = keyring if keyring is not None else Keyring(service.home)
    app.state.hub = Hub(service)
    for router in ROUTERS:
        app.router.routes += router.routes  # as they are, so that `app.routes` shows each with its scope
    app.add_exception_handler(BadCursor, _bad_cursor)
    app.add_exception_handler(sa.exc.OperationalError, _unavailable)
    app.add_exception_handler(RequestValidationError, _unsound)
    app.add_exception_handler(sa.exc.DataError, _unfit)
    app.add_exception_handler(UnicodeEncodeError, _unfit)
    app.add_middleware(Guard, hosts=hosts, rate=rate)
    return app


async def _bad_cursor(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 400)


async def _unsound(request: Request, error: Exception) -> JSONResponse:
    """Say what is wrong, and do not send back all that came."""
    assert isinstance(error, RequestValidationError)
    found = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()[:20]]
    return JSONResponse({"detail": found}, 422)


async def _unfit(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "A value in the request is not one that a database takes."}, 400)


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.warning("A question was not answered: %s", getattr(error, "orig", error))
    headers: dict[str, Any] = {"Retry-After": "1"}
    return JSONResponse({"detail": "The database gives no answer now, or not in time."}, 503, headers)
