"""What a flow that is tried again remembers of its last attempt: child flows that completed and whose results persist.

Tasks need no memory of their own: what they have stored is found again by its cache key.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from penstock.engine.hashing import Unhashable, stable_hash
from penstock.engine.states import State

Key = tuple[str, int]


class Recollection:
    """The child flows of the attempts of one flow run, by name, arguments and number.

    A call of the new attempt is that of the old one if flow and content of the arguments are the
    same, and as many such calls came before it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._flows: dict[Key, State] = {}

    def begin(self) -> None:
        """Another attempt starts."""
        with self._lock:
            self._counts.clear()

    def key(self, name: str, arguments: Mapping[str, Any]) -> Key | None:
        """Return the key of the next call of a child flow; None if its arguments have no content to compare."""
        try:
            text = stable_hash(name, dict(arguments))
        except Unhashable:
            return None
        with self._lock:
            self._counts[text] += 1
            return text, self._counts[text]

    def keep(self, key: Key, state: State) -> None:
        """A child flow whose result is to persist has completed."""
        with self._lock:
            self._flows[key] = state

    def find(self, key: Key | None) -> State | None:
        """Return how a child flow completed in an earlier attempt."""
        with self._lock:
            return self._flows.get(key) if key is not None else None
