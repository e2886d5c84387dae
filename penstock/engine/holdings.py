"""What a flow run keeps open while its tasks need it: its runner, and the sessions on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.clock import clock
from penstock.engine.context import Scope
from penstock.engine.journal import Journal
from penstock.engine.session import Session
from penstock.engine.venues import Venues
from penstock.runners.base import kept

if TYPE_CHECKING:
    from penstock.engine.flow import Flow


class Holdings:
    """Opens the runner of one flow run, and closes it when nothing needs it.

    Parameters
    ----------
    outer : Scope or None
        What surrounds the flow; None at the top.
    """

    def __init__(self, outer: Scope | None) -> None:
        self._outer = outer
        self._own = False  # a nested flow with a runner of its own
        self._stack = contextlib.ExitStack()

    def open(self, flow: Flow[..., Any], journal: Journal) -> Session:
        """Open the runner of a flow that does not use the one around it; return the session on it."""
        self._own = True
        runner = kept(flow.runner())
        users_own = runner.is_open  # who has opened it closes it
        runner.open()
        self._at_end(runner.close)
        if runner.keeps and not users_own:
            runner.keep()
        return Session(runner, journal)

    def furnish(self, session: Session, flow: Flow[..., Any], run: FlowRun) -> None:
        """Give the session the further runners of the flow, and tell the record where it runs."""
        named, first = flow.venues()
        session.venues = Venues(named)
        if first is not None:
            session.venues.is_home(session, first)
        self._at_end(session.close)
        self._at_end(session.venues.close)
        info = session.runner.info
        body = {
            name: getattr(info, name)
            for name in ("name", "address", "dashboard", "workers", "threads", "memory")
        }
        session.journal.write("runner", run.id, run.root, {**body, "versions": dict(info.versions)})

    @property
    def _at_end(self) -> Callable[..., Any]:
        # What a nested flow gives back may be used as long as the flow around it runs.
        return self._stack.callback if self._outer is None else self._outer.session.venues.at_end

    def close(self, left: list[TaskRun]) -> None:
        """Close at once, or when the runs that were left to themselves have ended."""
        if left:
            self._leave_behind(left)
        else:
            self._stack.close()

    def _leave_behind(self, left: list[TaskRun]) -> None:
        """Keep the runner until the last of the runs has ended; in a nested flow they become the parent's."""
        holds = self._stack.pop_all()
        parent = self._outer.flow_run if self._outer is not None else None
        pending = set(left)
        guard = threading.Lock()
        if parent is not None and not self._own:
            parent.live.update(dict.fromkeys(left))

        def ended(run: TaskRun) -> None:
            if parent is not None:
                parent.live.pop(run, None)
            with guard:
                pending.discard(run)
                last = not pending
            if last:
                clock.call_later(0, holds.close)

        for run in left:
            run.carrier.endings.add_callback(run, ended)
