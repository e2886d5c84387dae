"""Short descriptions of values for the record: type, shape, dtype, bytes; never the data."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from penstock.runners.worker.sizes import size_of

TEXT = 120  # characters of one description
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 4


def describe(value: Any) -> str:
    """Describe one value in at most 120 characters without touching its data.

    Parameters
    ----------
    value : object
        Anything. ``repr`` is asked of plain values and of small containers of them only, since a
        user's class may need seconds for it.

    Returns
    -------
    str
        Such as ``"ndarray(4096, 4096) float64 128.0 MiB"`` or ``"'abc'"``.
    """
    if isinstance(value, _PLAIN):
        return _short.repr(value)[:TEXT]
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple):
        kind = f"{type(value).__name__}{shape}" + (f" {dtype}" if dtype is not None else "")
        return f"{kind} {human_bytes(size_of(value))}"[:TEXT]
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        if len(value) <= 4 and all(isinstance(item, _PLAIN) for item in _items(value)):
            return _short.repr(value)[:TEXT]
        return f"{type(value).__name__} of {len(value)} items"
    run_id = getattr(value, "task_run_id", None)
    if isinstance(run_id, str):
        return f"future {run_id[:8]}"
    return type(value).__qualname__[:TEXT]


def tells_all(parameters: Mapping[str, Any]) -> bool:
    """Whether the descriptions of parameters tell them from all others: short plain values and futures."""
    return all(hasattr(type(one), "task_run_id") or _is_told(one) for one in parameters.values())


def _is_told(value: Any) -> bool:
    kind = type(value)
    if kind in {list, tuple, dict}:
        plain = len(value) <= 4 and all(type(item) in _PLAIN for item in _items(value))
    else:
        plain = kind in _PLAIN
    return plain and describe(value) == repr(value)


def _items(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


def describe_all(parameters: Mapping[str, Any], limit: int = 4096) -> dict[str, str]:
    """Describe the parameters of a call; what exceeds `limit` characters is left out."""
    described: dict[str, str] = {}
    used = 0
    for name, value in parameters.items():
        text = describe(value)
        used += len(name) + len(text)
        if used > limit:
            described["…"] = f"{len(parameters) - len(described)} more"
            break
        described[name] = text
    return described


def human_bytes(nbytes: float) -> str:
    """Write a number of bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
