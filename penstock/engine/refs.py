"""Find futures in arguments and put placeholders in their place.

Containers, dataclasses and annotations are walked; arrays, frames, strings and other objects
never are, and a long list is walked only if a future shows up among its first items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from penstock.engine.annotations import (
    FAILURE,
    SKIPPED_AS_NONE,
    Annotation,
    allow_failure,
    allow_skipped,
    freeze,
    opaque,
    quote,
    unmapped,
)

WALKED = 10_000  # items of a container that are looked at in search of a first future

_WALKED_INTO = (list, tuple, dict, set, frozenset)
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), range)


class Slot:
    """Stands in an argument where an upstream value will be."""

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position


Replace = Callable[[Any, int], Any]
"""Takes a leaf and what the annotations around it tolerate; answers its replacement or itself."""


def replace(value: Any, leaf: Replace, tolerant: int = 0) -> Any:
    """Rebuild a structure with replaced leaves; an untouched structure is returned as it is.

    Parameters
    ----------
    value : object
        An argument of a call.
    leaf : callable
        See `Replace`.
    tolerant : int
        What the annotations around the value tolerate, see `annotations`.

    Returns
    -------
    object
        The value itself if no leaf changed, else a copy of its containers.
    """
    if isinstance(value, _LEAVES):
        return leaf(value, tolerant)
    kind = type(value)
    if kind is list or (isinstance(value, list) and hasattr(kind, "futures_inside")):
        return _items(value, list, leaf, tolerant)
    if isinstance(value, Annotation):
        return _annotated(value, leaf, tolerant)
    if isinstance(value, tuple):
        build = (lambda items: kind(*items)) if hasattr(value, "_fields") else kind
        return _items(value, build, leaf, tolerant)
    if kind in (set, frozenset):
        return _items(value, kind, leaf, tolerant)
    if kind is dict:
        return _dict(value, leaf, tolerant)
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and not hasattr(value, "state_details")
    ):
        return _dataclass(value, leaf, tolerant)
    if hasattr(kind, "__pydantic_fields__"):
        fields = {name: getattr(value, name) for name in kind.__pydantic_fields__}
        new = {name: replace(item, leaf, tolerant) for name, item in fields.items()}
        changed = {name: item for name, item in new.items() if item is not fields[name]}
        return value.model_copy(update=changed) if changed else value
    return leaf(value, tolerant)


def _annotated(value: Annotation[Any], leaf: Replace, tolerant: int) -> Any:
    inner = value.unwrap()
    if isinstance(value, (quote, freeze)):
        return inner
    if isinstance(value, opaque):  # a future itself, but nothing inside of it
        return inner if isinstance(inner, _WALKED_INTO) else replace(inner, leaf, tolerant)
    if isinstance(value, allow_failure):
        tolerant |= FAILURE
    elif isinstance(value, allow_skipped):
        tolerant |= SKIPPED_AS_NONE
    return replace(inner, leaf, tolerant)


def _items(value: Any, build: Callable[[list[Any]], Any], leaf: Replace, tolerant: int) -> Any:
    changed = False
    items = []
    for position, item in enumerate(value):
        if position == WALKED and not changed:
            return value
        new = replace(item, leaf, tolerant)
        changed = changed or new is not item
        items.append(new)
    return build(items) if changed else value


def _dict(value: dict[Any, Any], leaf: Replace, tolerant: int) -> Any:
    changed = False
    items = {}
    for position, (key, item) in enumerate(value.items()):
        if position == WALKED and not changed:
            return value
        new_key, new = replace(key, leaf, tolerant), replace(item, leaf, tolerant)
        changed = changed or new is not item or new_key is not key
        items[new_key] = new
    return items if changed else value


def _dataclass(value: Any, leaf: Replace, tolerant: int) -> Any:
    fields = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if hasattr(value, field.name)
    }
    new = {name: replace(item, leaf, tolerant) for name, item in fields.items()}
    if all(new[name] is fields[name] for name in fields):
        return value
    copied = object.__new__(type(value))
    for name, item in {**getattr(value, "__dict__", {}), **new}.items():
        object.__setattr__(copied, name, item)
    return copied


def fill(value: Any, values: Iterable[Any]) -> Any:
    """Put the upstream values in the place of the slots."""
    found = list(values)
    return replace(value, lambda item, _: found[item.position] if isinstance(item, Slot) else item)


def unwrap_static(value: Any) -> Any:
    """Take `unmapped` off an argument."""
    return value.unwrap() if isinstance(value, unmapped) else value
