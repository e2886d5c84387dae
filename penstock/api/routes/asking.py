"""Questions by name, as the `Store` of a driver asks them, and wishes: cancel, resume, retry a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from penstock.api import questions
from penstock.api.auth import Scope, needs
from penstock.api.commands import COMMANDS
from penstock.api.db import Database
from penstock.api.guard import is_local
from penstock.api.routes import MISSING, PREFIX, PROBLEMS, Run, service_of
from penstock.api.schemas import Action, Answer, Granted, Problem, Question, Wish
from penstock.api.writer import Unavailable
from penstock.errors import PenstockError

views = APIRouter(prefix=PREFIX, dependencies=[needs(Scope.VIEW)], responses=PROBLEMS, tags=["questions"])
router = APIRouter(prefix=PREFIX, dependencies=[needs(Scope.RUN)], responses=PROBLEMS, tags=["drivers"])

PATIENCE = 10.0
_LATER: dict[int | str, dict[str, Any]] = {
    403: {
        "model": Problem,
        "description": "The token is of too small a scope, or this server starts no runs.",
    },
    409: {"model": Problem, "description": "The state of the record does not allow it."},
    501: {"model": Problem, "description": "Not possible in this version."},
}


@views.post("/ask", response_model=Answer, responses={409: _LATER[409]})
async def ask(request: Request, question: Question) -> Any:
    """Answer a question that only reads, such as `{"what": "runs", "limit": 5}`."""
    if question.what not in questions.READ:
        raise HTTPException(400, f"There is no question {question.what!r} that only reads.")
    return {"answer": await _read(request, question)}


def _details(question: Question) -> dict[str, Any]:
    details = dict(question.model_extra or {})
    if not questions.fits(details):
        raise HTTPException(400, "The question has too many arguments, or they are nested too deeply.")
    return details


async def _read(request: Request, question: Question) -> Any:
    details = _details(question)
    questions.bound(details)
    service = service_of(request)

    def answer() -> Any:
        with service.read() as connection:
            return questions.READ[question.what](connection, **details)

    return await _answered(run_in_threadpool(answer))


@router.post("/tell", response_model=Answer, responses={409: _LATER[409]})
async def tell(request: Request, question: Question) -> Any:
    """Answer a question of a driver, which may also change something, such as its sign of life."""
    if question.what in questions.READ:
        return {"answer": await _read(request, question)}
    details = _details(question)
    service = service_of(request)
    if question.what == "sweep":  # commit what drivers beside us have written down
        return {"answer": await _answered(_called(request, lambda database: service.sweep()))}
    command = COMMANDS.get(question.what)
    if command is None:
        raise HTTPException(400, f"There is no command {question.what!r}.")
    return {"answer": await _answered(_called(request, lambda database: command(database, **details)))}


@router.post("/runs/{run}/state", response_model=Granted, status_code=202, responses=MISSING | _LATER)
async def set_state(request: Request, run: Run, wish: Wish) -> Any:
    """Ask for a run to be cancelled, which its driver does within seconds, or for one that has ended to go on.

    `resume` and `retry` do the same to a root flow run that crashed, failed or was cancelled: the flow is
    called again in the same run, as its next attempt, and stored results are not computed again. Only a
    server that was started with `--allow-local-runs` does it, as a process of its own (`penstock resume`),
    and only for who is on its machine.
    """
    if wish.action is Action.PAUSE:
        raise HTTPException(501, "Runs cannot be paused yet.")
    with service_of(request).read() as connection:
        if not questions.exists(connection, run):
            raise HTTPException(404, f"There is no run {run}.")
    if wish.action is not Action.CANCEL:
        return await _resume(request, run, wish)
    asked = {"run": run, "kind": wish.action.value, "by": wish.by}
    made = await _answered(_called(request, lambda database: COMMANDS["ask"](database, **asked)))
    return {"request": made, "run": run, "action": wish.action}


async def _resume(request: Request, run: str, wish: Wish) -> Any:
    local_runs = service_of(request).local_runs
    if local_runs is None or not is_local(request.headers.get("host", "")):
        # A name besides those of this machine means a proxy, and that others can ask.
        raise HTTPException(
            403,
            "This server starts no runs for whoever asks here (`penstock server start --allow-local-runs`, for "
            f"this machine alone); type `penstock resume {run}` where the run was started.",
        )
    started = await _answered(run_in_threadpool(local_runs.start, run, wish.action.value, wish.by))
    return {
        "request": started.request,
        "run": run,
        "action": wish.action,
        "pid": started.pid,
        "log": started.log,
    }


async def _called(request: Request, work: Callable[[Database], Any]) -> Any:
    done = service_of(request).writer.call(work)
    return await asyncio.wait_for(asyncio.wrap_future(done), PATIENCE)


async def _answered(work: Any) -> Any:
    try:
        return await work
    except (TimeoutError, Unavailable) as error:
        raise HTTPException(503, f"Nothing can be written now: {error}", {"Retry-After": "1"}) from None
    except PenstockError as error:
        raise HTTPException(409, str(error), {"X-Penstock-Error": type(error).__name__}) from None
    except sa.exc.OperationalError:
        raise
    except (
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
        sa.exc.StatementError,
    ):
        raise HTTPException(400, "The arguments do not fit the question.") from None
