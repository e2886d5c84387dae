"""When a transaction commits, and where it stands."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

from penstock import errors

E = TypeVar("E", bound=Enum)


class CommitMode(str, Enum):
    """When a transaction commits."""

    EAGER = "EAGER"
    """At its own end."""
    LAZY = "LAZY"
    """With the outermost one."""
    OFF = "OFF"
    """When somebody calls `Transaction.commit`; else the outermost one is rolled back at its end."""

    def __str__(self) -> str:
        """Show the bare name."""
        return self.value


class TransactionState(str, Enum):
    """Where a transaction stands."""

    PENDING = "PENDING"
    """It has not begun."""
    ACTIVE = "ACTIVE"
    """Its code runs."""
    STAGED = "STAGED"
    """It has its value, and waits for the end of the outer one."""
    COMMITTED = "COMMITTED"
    """It is final: its result is stored, or was before."""
    ROLLED_BACK = "ROLLED_BACK"
    """It was taken back."""

    def __str__(self) -> str:
        """Show the bare name."""
        return self.value


OVER = frozenset({TransactionState.COMMITTED, TransactionState.ROLLED_BACK})
"""States in which nothing is to be decided any more."""


def read_word(kind: type[E], given: Any, name: str) -> E | None:
    """Check what a user writes for an option that is one of a few words.

    Raises
    ------
    ConfigurationError
        Naming the option and the words.
    """
    if given is None or isinstance(given, kind):
        return given
    try:
        return kind(str(getattr(given, "value", given)).upper())
    except ValueError:
        words = ", ".join(str(one) for one in kind)
        message = f"'{name}' must be one of {words}, got {given!r}."
        raise errors.ConfigurationError(message) from None
