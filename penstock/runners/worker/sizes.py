"""How large a value is, believing nobody and copying nothing."""

from __future__ import annotations

import os
import sys
from typing import Any


def too_large(value: Any, limit: float, where: str) -> MemoryError | None:
    """Return the error of a value that does not fit where it was made, None if it does.

    Only arrays, frames, bytes and containers of them are believed.

    Parameters
    ----------
    value : object
        What a task has returned.
    limit : float
        Bytes that a single value may have; 0 for no limit.
    where : str
        What has the limit, for the message.
    """
    nbytes = _occupied(value, 0) if limit else 0
    if nbytes <= limit:
        return None
    return MemoryError(f"{nbytes:,} bytes, and {where} allows {int(limit):,}")


def _occupied(value: Any, depth: int) -> int:
    kind = type(value)
    if kind in {list, tuple, set, dict} and depth < len(_SAMPLES):
        items = list({id(item): item for item in (value.values() if kind is dict else value)}.values())
        sample = items[:: -(-len(items) // 1000)] if items else []
        return sum(_occupied(item, depth + 1) for item in sample) * len(items) // max(len(sample), 1)
    if kind in {str, bytes, bytearray}:
        return len(value)
    if kind.__module__.partition(".")[0] in BELIEVED:
        return size_of(value)
    return 0


BELIEVED = {"numpy", "pandas", "pyarrow", "polars", "xarray", "scipy"}


SIZE_LIMIT = 1 << 50  # a claim above a pebibyte is no size, and sums have to fit into a database
_SAMPLES = (100, 10, 5)  # items that stand for all, by depth


def size_of(value: Any, depth: int = 0) -> int:
    """Estimate the size of a value in bytes, without a copy and without trust in the value.

    Parameters
    ----------
    value : object
        Of any class; one whose `nbytes` or `__sizeof__` lies or raises has the size of its shell.
    depth : int
        How many containers surround it.

    Returns
    -------
    int
        Not negative, at most `SIZE_LIMIT`.
    """
    kind = type(value)
    if kind in _SHELLS:
        return sys.getsizeof(value)
    try:
        if kind.__name__ == "ndarray" and kind.__module__ == "numpy" and 0 not in value.strides:
            found: int = value.nbytes
            return found
        return min(max(int(_size(value, kind, depth)), 0), SIZE_LIMIT)
    except Exception:
        return 0


def _size(value: Any, kind: type, depth: int) -> int:
    if is_lazy(value):
        return sys.getsizeof(value, 0)
    found = _told(value, kind, depth)
    library = kind.__module__.partition(".")[0]
    if found > _memory_of_host() and library != "builtins" and library not in BELIEVED:
        return object.__sizeof__(value)  # there is no such object
    return found


def _told(value: Any, kind: type, depth: int) -> int:
    if kind in {list, tuple, set, frozenset}:
        return sys.getsizeof(value) + _sampled(value, depth)
    if kind is dict:
        return sys.getsizeof(value) + _sampled(value.values(), depth) + _sampled(value, depth)
    claimed = _claimed(value)
    if claimed is not None:
        return claimed
    fields = getattr(kind, "__dataclass_fields__", None) or getattr(kind, "__pydantic_fields__", None)
    if fields and depth < len(_SAMPLES):
        return sum(size_of(getattr(value, name, None), depth + 1) for name in fields)
    if isinstance(value, (list, tuple, set, frozenset)):
        return sys.getsizeof(value, 0) + _sampled(value, depth)
    return sys.getsizeof(value, 0)


def _memory_of_host() -> int:
    global _host_memory
    if not _host_memory:
        try:
            _host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (OSError, ValueError):
            _host_memory = SIZE_LIMIT
    return _host_memory


_host_memory = 0
_SHELLS = {type(None), bool, int, float, complex, str, bytes, bytearray, type}


def _sampled(items: Any, depth: int) -> int:
    """Estimate the size of what is in a container by a few of its items."""
    count = len(items)
    if not count or depth >= len(_SAMPLES):
        return 0
    few = _SAMPLES[depth]
    if count <= few:
        return _together(items, depth)
    if isinstance(items, (list, tuple)):
        sample = items[:: -(-count // few)]
    else:
        sample = [item for item, _ in zip(items, range(few), strict=False)]
    return _together(sample, depth) * count // len(sample)


def _together(items: Any, depth: int) -> int:
    if _SHELLS.issuperset(map(type, items)):
        return sum(map(sys.getsizeof, items))
    return sum(size_of(item, depth + 1) for item in items)


def _claimed(value: Any) -> int | None:
    """Return what an array or a frame says of its size, None if that cannot be one."""
    nbytes = getattr(value, "nbytes", None)
    if nbytes is None:
        usage = getattr(value, "memory_usage", None)
        if usage is not None and hasattr(value, "columns"):
            nbytes = usage(deep=False).sum()
        elif hasattr(value, "estimated_size"):
            nbytes = value.estimated_size()
    if nbytes is None or isinstance(nbytes, str) or callable(nbytes):
        return None
    strides = getattr(value, "strides", None)
    if isinstance(strides, tuple) and 0 in strides and hasattr(value, "itemsize"):  # broadcast: one for many
        nbytes = value.itemsize
        for length, stride in zip(value.shape, strides, strict=True):
            nbytes *= length if stride else 1
    found = int(nbytes)
    return found if found >= 0 else None


def is_lazy(value: Any) -> bool:
    """Whether a value is a Dask collection: it says what it would be, and holds nothing yet."""
    kind = type(value)
    if kind is type or not hasattr(kind, "__dask_graph__"):
        return False
    if kind.__module__.partition(".")[0] == "dask":  # its graph would be made for the question
        return True
    try:
        return value.__dask_graph__() is not None
    except Exception:
        return False
