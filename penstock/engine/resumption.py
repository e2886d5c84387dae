"""A root flow run that goes on: whoever resumes it hands its past to the flow that is called next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from penstock.engine.events import Event, bus
from penstock.engine.journal import Journal
from penstock.engine.past import Past
from penstock.engine.tracking import start_tracking

_resumed: ContextVar[Resumption | None] = ContextVar("penstock_resumption", default=None)


class Resumption:
    """One resume of one root flow run.

    Parameters
    ----------
    told : mapping
        What `penstock.api.past.get_past` tells.
    epoch : int
        That of the new owner.
    rerun : sequence of str
        Names of tasks that may be executed again although they must not run twice.

    Attributes
    ----------
    id, name, past, journal
        Of the run.
    attempt : int
        The last one before.
    """

    def __init__(self, told: Mapping[str, Any], epoch: int, rerun: tuple[str, ...] = ()) -> None:
        start_tracking()
        self.id, self.name, self.created = told["id"], told["run_name"], told["created"]
        self.attempt = told["attempt"]
        self.past = Past(told, rerun)
        self.journal = Journal(bus.publish)
        self.journal.epoch = epoch
        self._taken = False

    def settle(self) -> None:
        """Write down that the attempts are over which nobody has asked for again."""
        for run in self.past.unsettled:
            self.journal.attempt_lost(self.past, run, self.id)
        for one in self.past.unsettled_flows:
            self.journal.flow_lost(one["id"], one["row"], self.id, one["attempt"])

    def row(self, body: dict[str, Any]) -> None:
        """Write the run's row with its new driver, and its old date."""
        self.journal.publish(Event("flow_run", self.id, self.id, self.created, body))

    @contextlib.contextmanager
    def handed_on(self) -> Iterator[None]:
        """Let the first root flow run in the block be this one."""
        token = _resumed.set(self)
        try:
            yield
        finally:
            _resumed.reset(token)

    def take(self) -> bool:
        """Whether the caller is the first who asks, and so becomes this run."""
        first, self._taken = not self._taken, True
        return first


def resumed() -> Resumption | None:
    """Return the resumption that a root flow run has to take, once."""
    found = _resumed.get()
    return found if found is not None and found.take() else None
