"""Store the value of an attempt, or take the one that is stored: results that outlive their process."""

from __future__ import annotations

import functools
import importlib
import pickle
from typing import Any

from .sizes import size_of


def commit(value: Any, order: dict[str, Any] | None, run: str, attempt: int) -> tuple[Any, Any]:
    """Store the value of one attempt, if its work order says so.

    Parameters
    ----------
    value : object
        What the function returned.
    order : dict or None
        ``commit`` of the work order.
    run, attempt : str, int
        Whose value it is; the runs of a chunk share an order.

    Returns
    -------
    tuple
        The value of the run (the stored one, if another attempt was faster), and what the record
        says about the storage: None if nothing was stored.
    """
    if order is None or (order["over"] and size_of(value) < order["over"]):
        return value, None
    committed: tuple[Any, Any] = _store().commit(value, order, run, attempt)
    return committed


def stored_before(running: Any) -> bool:
    """Take the stored value of an earlier attempt, whose worker may have died after `commit`, or of a cache key."""
    order, run, attempt = commit_of(running.order)
    if order is None:
        return False
    if "cache" in order:
        return _recalled(running, order, run)
    found = _store().find(order, run) if attempt > 1 else None
    if found is None:
        return False
    running.found, running.stored = found
    return True


def stored_under(running: Any, call: Any, args: Any, kwargs: Any) -> bool:
    """Make the cache key of a run from its values, if nobody could before; take what is stored under it."""
    order = running.order.get("commit")
    if order is None or "work" not in order:
        return False
    try:
        lookups = importlib.import_module("penstock.engine.lookups")
    except ImportError:
        running.log(
            "WARNING", "caching is off for this run: its worker cannot import penstock to make the key"
        )
        return False
    key = lookups.keyed(order, running, call, args, kwargs)
    if key is None:
        return False
    named = {} if order["named"] else {"key": _store().cache_place(key, order["folder"])}
    order = running.order["commit"] = {**order, **named, "cache": key}
    return _recalled(running, order, running.order["run"])


def _recalled(running: Any, order: Any, run: str) -> bool:
    """Take the value that is stored under a cache key; with a lock, wait for whoever makes it."""
    lock = order.get("lock")
    if lock is not None:
        manager = pickle.loads(lock) if isinstance(lock, bytes) else lock
        holder = f"{run}-{running.order.get('attempt', 1)}"
        manager.acquire_lock(order["cache"], holder)
        running.unlock = functools.partial(manager.release_lock, order["cache"], holder)
    return recall(running)


def recall(running: Any) -> bool:
    """Take the value that is stored under the cache key of a run; a damaged one is made again."""
    store = _store()
    try:
        found = store.recall(running.order["commit"], running.order["run"])
    except store.Damaged as error:
        running.log("WARNING", f"CacheCorrupt: {error}; the value is made again")
        return False
    if found is None:
        return False
    running.found, running.stored = found
    return True


class Kept:
    """Stands among upstream values for one that lies in a storage."""

    penstock_kept = True

    def __init__(self, where: Any) -> None:
        self._where = where

    @property
    def value(self) -> Any:
        """Read the value."""
        where = self._where
        return where() if callable(where) else _store().load(where, where["run"])


def with_stored(values: Any, loads: dict[int, Any]) -> list[Any]:
    """Put stored values in their places among the others."""
    others = iter(values)
    count = len(loads) + len(values)
    return [Kept(loads[place]) if place in loads else next(others) for place in range(count)]


def commit_of(order: dict[str, Any]) -> tuple[Any, str, int]:
    """Return the commit order in a work order, or None, and whose value it is for: run and attempt."""
    target = order.get("commit")
    return target, order["run"] if target is not None else "", order.get("attempt", 1)


def _store() -> Any:
    """Import what few tasks need when the first one does."""
    from . import result_store

    return result_store
