"""Marks that a user puts around an argument: `unmapped`, `allow_failure`, `allow_skipped`, `quote` …"""

from __future__ import annotations

import json
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

# What a run accepts of an upstream besides a value; the sum of these is its tolerance.
FAILURE = 1
"""`allow_failure`: the exception takes the place of the value."""
SKIPPED_AS_NONE = 2
"""`allow_skipped` or ``on_skip="none"``: None takes the place of the value."""
SKIPPED_AS_STATE = 4
"""``on_skip="run"``: the state takes the place of the value."""
TOLERANCE_OF = {"skip": 0, "none": SKIPPED_AS_NONE, "run": SKIPPED_AS_STATE}
"""By the option ``on_skip`` of a task."""


class Annotation(tuple[T], Generic[T]):
    """A tuple of one that says how penstock treats the value in it."""

    __slots__ = ()

    def __new__(cls, value: T) -> Self:
        """Wrap a value."""
        return super().__new__(cls, (value,))

    def unwrap(self) -> T:
        """Return the value inside."""
        return self[0]

    def rewrap(self, value: Any) -> Self:
        """Put the same mark around another value."""
        return type(self)(value)

    def __eq__(self, other: object) -> bool:
        """Compare kind and value."""
        return type(other) is type(self) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        """Compare kind and value; a tuple would compare the value only."""
        return not self == other

    def __getnewargs__(self) -> tuple[T]:
        """Pickle the value, not the tuple around it."""
        return (self[0],)

    def __hash__(self) -> int:
        """Hash kind and value."""
        return hash((type(self).__name__, self[0]))

    def __repr__(self) -> str:
        """Show as the call that makes it."""
        return f"{type(self).__name__}({self[0]!r})"


class unmapped(Annotation[T]):  # noqa: N801 - Prefect's name; it reads like a function
    """In `.map`, pass the same value to every element.

    >>> scale.map(planes, unmapped(factor))  # doctest: +SKIP
    """

    __slots__ = ()

    def __getitem__(self, _: Any) -> T:  # type: ignore[override]
        """Answer the same value for every position."""
        return tuple.__getitem__(self, 0)


class allow_failure(Annotation[T]):  # noqa: N801 - Prefect's name
    """Run although the upstream failed; the function then gets the exception in its place.

    >>> report.submit(allow_failure(future))  # doctest: +SKIP
    """

    __slots__ = ()


class quote(Annotation[T]):  # noqa: N801 - Prefect's name
    """Pass a value as it is: nothing in it is searched for futures.

    >>> store.submit(quote(huge_nested_list))  # doctest: +SKIP
    """

    __slots__ = ()


class allow_skipped(Annotation[T]):  # noqa: N801 - stands beside `allow_failure`
    """Run although the upstream was skipped; the function then gets None in its place.

    >>> report.submit(allow_skipped(future))  # doctest: +SKIP
    """

    __slots__ = ()


class opaque(Annotation[T]):  # noqa: N801 - Prefect's name
    """Resolve a future, but do not search what is not one for futures inside.

    >>> store.submit(opaque(huge_nested_list))  # doctest: +SKIP
    """

    __slots__ = ()


class freeze(Annotation[T]):  # noqa: N801 - Prefect's name
    """Mark a constant that can be written as JSON, for parameters that are stored.

    >>> night.serve(parameters={"bands": freeze(["L", "S"])})  # doctest: +SKIP

    Raises
    ------
    TypeError
        If the value cannot be written as JSON.
    """

    __slots__ = ()

    def __new__(cls, value: T) -> Self:
        """Wrap a value; refuse what JSON does not know."""
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            message = f"freeze() takes only what can be written as JSON: {error}."
            raise TypeError(message) from None
        return super().__new__(cls, value)

    def unfreeze(self) -> T:
        """Return the value inside."""
        return self.unwrap()
