"""The deadline of a flow run, inherited by the flows within it: whose time was over tells what a stop means."""

from __future__ import annotations

import time
from dataclasses import dataclass


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
