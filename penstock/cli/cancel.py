"""`penstock cancel`: ask a run to stop, wherever its driver is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.layout import clean

if TYPE_CHECKING:
    from penstock.engine.tracking import Store

POLL = 0.1


def cancel(
    run: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="A flow run, a flow run within another, a task run or a map: an id, its first or last digits, a name.",
        ),
    ],
    wait: Annotated[
        float, typer.Option("--wait", min=0, metavar="SECONDS", help="How long to wait for its end.")
    ] = 10.0,
) -> None:
    """Ask a run to stop.

    What has not begun is dropped; code that runs is interrupted where it can be, and is shown as
    Cancelling until it has really ended. The exit code is 0 if the run was asked.
    """
    from penstock.cli.store import connected, find, person
    from penstock.engine.states import StateType

    final = {str(kind) for kind in StateType if kind.is_final}
    with connected() as store:
        found = find(store, run)
        name = f"{found['kind']} run {clean(found['name'])}"
        if found["state"]["type"] in final:
            print(f"{name} has ended: {found['state']['name']}")
            raise typer.Exit(1)
        asked = {"what": "ask", "run": found["id"], "kind": "cancel", "by": person()}
        request = store.ask(asked)
        heard, state = _end(store, request, found, final, wait)
    if state["type"] in final:
        print(f"{name} has ended: {state['name']}")
    elif heard is not None:
        print(f"{name}: {heard}; it is {state['name'] or 'going on'}")
    else:
        print(f"{name}: its driver has not answered yet; the request stays, and it is {state['name']}")
    raise typer.Exit(0 if heard in {None, "asked to stop"} or state["type"] in final else 1)


def _end(
    store: Store, request: str, run: dict[str, Any], final: set[str], wait: float
) -> tuple[str | None, dict[str, Any]]:
    """Wait for the run's end; return what the driver said and the state."""
    deadline = time.monotonic() + wait
    state: dict[str, Any] = run["state"]
    while True:
        answer = store.ask({"what": "request", "request": request}) or {}
        if run["kind"] != "map":
            state = (store.ask({"what": "run", "run": run["id"]}) or run)["state"]
        heard: str | None = answer.get("outcome")
        over = state["type"] in final or (
            heard is not None and (run["kind"] == "map" or heard != "asked to stop")
        )
        if over or time.monotonic() >= deadline:
            return heard, state
        time.sleep(POLL)
