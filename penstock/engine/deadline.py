"""The deadline of a flow run: kept by every run in it, and looked at where code of the flow can be stopped.

On the main thread a signal interrupts a flow function, and a coroutine is interrupted where it
awaits. Anywhere else the function stops where it next calls, submits or waits for something.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock import errors

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a flow run has to be over.

    Attributes
    ----------
    due : float
        By the monotonic clock.
    seconds : float
        What the user wrote.
    """

    due: float
    seconds: float

    @property
    def is_over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self.due


def of_run(seconds: float | None, outer: Deadline | None) -> Deadline | None:
    """Return the deadline of a run that begins now, inside another one or not: the earlier one counts."""
    own = None if seconds is None else Deadline(time.monotonic() + seconds, seconds)
    if own is None or outer is None:
        return own or outer
    return own if own.due < outer.due else outer


def check(flow_run: FlowRun | None) -> None:
    """Stop code of a flow run that is over its time.

    Raises
    ------
    TaskTimeout
        Naming the run.
    """
    if flow_run is not None and flow_run.deadline is not None and flow_run.deadline.is_over:
        seconds = flow_run.deadline.seconds
        raise errors.TaskTimeout(f"Run {flow_run.name!r} exceeded timeout of {seconds} second(s)")
