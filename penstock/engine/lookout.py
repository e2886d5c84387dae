"""Looks after runs that ask for special workers: a run that no worker can take must say so."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.engine import placement
from penstock.engine.calls import TaskRun
from penstock.engine.chunks import Chunk
from penstock.engine.clock import clock
from penstock.engine.states import StateType
from penstock.runners.base import Key, Options, Submission

if TYPE_CHECKING:
    from penstock.engine.session import Session

log = logging.getLogger("penstock.flow_runs")
PATIENCE = 10.0
"""Seconds after which is looked whether a task that asks for special workers can run at all."""


class Lookout:
    """Watches what a session has sent, where its options ask for special workers.

    Parameters
    ----------
    session : Session
        Who sends.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        # No worker can run them, when last looked at.
        self.unplaced: weakref.WeakSet[TaskRun] = weakref.WeakSet()

    def watch(self, submissions: Sequence[Submission]) -> None:
        """Look after a while whether what asks for special workers can run at all."""
        asking = {  # nothing else of a submission: its references keep values
            one.key: one.options
            for one in submissions
            if one.options.resources or one.options.workers or one.options.threads > 1
        }
        if asking:
            clock.call_later(PATIENCE, lambda: self._look(asking))

    def _look(self, asking: dict[Key, Options]) -> None:
        session = self._session
        waiting = {key: options for key, options in asking.items() if key in session.dispatch.sent}
        reasons: list[tuple[Options, str]] = []
        for options in waiting.values():
            if all(known != options for known, _ in reasons):
                with contextlib.suppress(Exception):  # the backend may be gone by now
                    reasons.append((options, session.runner.unmet(options)))
        if not any(reason for _, reason in reasons):
            return
        with session.changing():
            for key, options in waiting.items():
                reason = next((text for known, text in reasons if known == options), "")
                unit = session.dispatch.sent.get(key)
                if reason and unit is not None:
                    self._say_unplaced(list(unit.runs) if isinstance(unit, Chunk) else [unit], reason)

    def _say_unplaced(self, runs: Sequence[TaskRun], reason: str) -> None:
        message = str(placement.Unplaced(runs[0].task.name, reason))
        log.warning("%s", message)
        for run in runs:
            if not run.done and run.type is StateType.PENDING:
                run.message = message
                self.unplaced.add(run)
                self._session.journal.task_state(run)
