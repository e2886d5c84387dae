"""A run's row from before its flow is known: `penstock run` writes it, then imports the user's module.

A module that cannot be imported leaves a FAILED run with the traceback. One that can hands the
row on to the run of the flow, so that there is one run and not two.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from penstock.engine.calls import FlowRun
from penstock.engine.events import HOST, bus
from penstock.engine.journal import Journal
from penstock.engine.living import living
from penstock.engine.names import new_name
from penstock.engine.states import StateType, advance
from penstock.engine.tracking import start_tracking
from penstock.runners.worker.errors import describe_error
from penstock.version import own_version

_reserved: ContextVar[Reservation | None] = ContextVar("penstock_reservation", default=None)


class Reservation:
    """A flow run that is PENDING while its module is imported.

    Parameters
    ----------
    flow : str
        What the flow is probably called.
    parameters : mapping
        Descriptions, for the record.

    Attributes
    ----------
    id, name : str
        Of the run.
    journal : Journal
        Its events; the run of the flow goes on with it.
    """

    def __init__(self, flow: str, parameters: Mapping[str, str]) -> None:
        start_tracking()
        self.journal = Journal(bus.publish)
        self.run = FlowRun(SimpleNamespace(name=flow), new_name())
        self.id, self.name = self.run.id, self.run.name
        self._taken = False
        living.own(self.run, self.journal)
        self.journal.flow_made(
            self.run,
            {
                "name": self.name,
                "flow": flow,
                "version": None,
                "parent_flow_run": None,
                "parent_task_run": None,
                "tags": [],
                "parameters": dict(parameters),
                "runner": "",
                **whereabouts(),
            },
        )
        self.journal.flow_state(self.run)

    def fail(self, error: BaseException) -> None:
        """The flow cannot be started, and this is why."""
        described = describe_error(error)
        kept = {name: described[name] for name in ("type", "message", "text")}
        self._end(StateType.FAILED, "StartError", f"{kept['type']}: {kept['message']}", error=kept)

    def cancel(self, message: str) -> None:
        """Somebody asked for an end before the flow was known."""
        self._end(StateType.CANCELLED, None, message)

    def _end(self, to: StateType, name: str | None, message: str, **details: Any) -> None:
        if not self._taken:
            self._taken = True
            self.run.position = advance(self.run.position, to, name)
            self.journal.flow_state(self.run, message, **details)
            living.disown(self.id)

    @contextlib.contextmanager
    def handed_on(self) -> Iterator[None]:
        """Let the first root flow run in the block be this one."""
        token = _reserved.set(self)
        try:
            yield
        finally:
            _reserved.reset(token)

    def take(self) -> bool:
        """Whether the caller is the first who asks, and so becomes this run."""
        first, self._taken = not self._taken, True
        return first


def reserved() -> Reservation | None:
    """Return the reservation that a root flow run has to take, once."""
    found = _reserved.get()
    return found if found is not None and found.take() else None


def whereabouts() -> dict[str, Any]:
    """Return where a run takes place and with which versions, for its row."""
    return {
        "host": HOST,
        "pid": os.getpid(),
        "python": platform.python_version(),
        "penstock": own_version(),
    }
