"""Whether to run again, and when: pure decisions, no clock, no thread."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DelayOption = float | int | list[float] | list[int] | Callable[[int], list[float]] | None


class Unasked(int):
    """A default: nobody has asked for this number."""


CRASH_RETRIES = Unasked(1)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The budget of a task or flow.

    Attributes
    ----------
    retries : int
        Further attempts after a failure of user code.
    delays : tuple of float
        Seconds before each further attempt; the last one repeats.
    jitter : float or None
        The real delay lies between d and d · (1 + jitter).
    crash_retries : int
        Further attempts after a loss of the infrastructure.
    """

    retries: int = 0
    delays: tuple[float, ...] = ()
    jitter: float | None = None
    crash_retries: int = 0

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after the given number of failures (1 for the first)."""
        if not self.delays:
            return 0.0
        base = self.delays[min(failures, len(self.delays)) - 1]
        if not self.jitter:
            return base
        return base * (1 + random.random() * self.jitter)  # noqa: S311 - spreads load, hides nothing

    def after_failure(self, failures: int) -> float | None:
        """Return the delay before the next attempt, or None if the budget is spent."""
        return self.delay(failures) if failures <= self.retries else None

    @property
    def memory_retries(self) -> int:
        """Further attempts after memory ran out: at the same size only if somebody has asked for it."""
        return 0 if isinstance(self.crash_retries, Unasked) else self.crash_retries

    def after_crash(self, crashes: int) -> float | None:
        """Return the delay before the next attempt after a loss, or None if it is spent."""
        return 0.0 if crashes <= self.crash_retries else None


def read_delays(option: DelayOption, retries: int) -> tuple[float, ...]:
    """Check the option ``retry_delay_seconds`` and turn it into a tuple.

    Raises
    ------
    TypeError
        If it is neither a number, nor a list, nor a callable of `retries`.
    ValueError
        If it holds more than 50 delays, or a negative one.
    """
    if option is None:
        return ()
    values: Any = option(retries) if callable(option) else option
    if isinstance(values, (int, float)):
        values = [values]
    if not isinstance(values, (list, tuple)):
        message = (
            f"'retry_delay_seconds' must be a number, a list or a callable, got {type(option).__name__}."
        )
        raise TypeError(message)
    if len(values) > 50:
        message = "Can not configure more than 50 retry delays per task."
        raise ValueError(message)
    if any(value < 0 for value in values):
        message = "'retry_delay_seconds' must not be negative."
        raise ValueError(message)
    return tuple(float(value) for value in values)


def read_jitter(option: float | None) -> float | None:
    """Check the option ``retry_jitter_factor``."""
    if option is not None and option < 0:
        message = "`retry_jitter_factor` must be >= 0."
        raise ValueError(message)
    return option


def exponential_backoff(backoff_factor: float) -> Callable[[int], list[float]]:
    """Make delays that double: ``retry_delay_seconds=exponential_backoff(10)``.

    Parameters
    ----------
    backoff_factor : float
        Seconds before the first retry.

    Returns
    -------
    callable
        Takes the number of retries, gives that many delays.
    """

    def delays(retries: int) -> list[float]:
        return [backoff_factor * 2.0**retry for retry in range(min(retries, 50))]

    return delays
