"""Marks that a user puts around an argument: `unmapped`, `allow_failure`, `quote`."""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


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
