"""Large arguments: each is placed near the workers once, and travels as a reference.

Within one `.map` the identity of the object decides; across calls only a read-only array is
known to be the same, since anything else may have changed in between. What the user has put
(`penstock.put`) is a reference already and does not come here.
"""

from __future__ import annotations

import weakref
import zlib
from typing import Any

from penstock.engine import payload
from penstock.engine.calls import Source
from penstock.runners.base import Ref, TaskRunner
from penstock.runners.worker.sizes import size_of

_NEVER_LARGE = (bool, int, float, complex, type(None))


class Objects:
    """The large arguments of a session.

    Parameters
    ----------
    runner : TaskRunner
        Where to put them.
    threshold : int
        Bytes from which an argument is large.
    """

    def __init__(self, runner: TaskRunner, threshold: int) -> None:
        self._runner = runner
        self._threshold = threshold
        self._frozen: dict[int, tuple[weakref.ref[Any], weakref.ref[Ref]]] = {}
        self._origins: weakref.WeakKeyDictionary[Ref, tuple[Any, int]] = weakref.WeakKeyDictionary()
        self.bytes_put = 0

    def is_large(self, value: Any) -> bool:
        """Whether a leaf of the arguments is worth a reference; arrays are sized without a copy."""
        if isinstance(value, _NEVER_LARGE):
            return False
        return bool(size_of(value) >= self._threshold)

    def place(self, value: Any, known: dict[int, Source]) -> Source:
        """Put a value, unless it was.

        Parameters
        ----------
        value : object
            A large argument.
        known : dict
            What was put for this call or map, by identity.

        Returns
        -------
        Source
            Where the value for the slot comes from.
        """
        found = known.get(id(value))
        if found is not None:
            return found
        ref = self._earlier(value)
        if ref is None:
            ref = self.put(value)
            self.bytes_put += size_of(value)
            self._remember(value, ref)
            can_be_lost = not (self._runner.in_process or self._runner.info.holds_puts)
            if can_be_lost and (known_sum := fingerprint(value)) is not None:
                self._origins[ref] = (value, known_sum)
        source = known[id(value)] = Source(ref=ref)
        return source

    def put_again(self, ref: Ref) -> Ref | None:
        """Put a value whose copies on the workers are lost; None if it may have changed since."""
        value, known = self._origins.get(ref, (None, None))
        if known is None or fingerprint(value) != known:
            return None
        renewed = self.put(value)
        self._origins[renewed] = (value, known)
        return renewed

    def put(self, value: Any) -> Ref:
        """Put a value near the workers.

        Raises
        ------
        UnserializableArgument
            If it cannot be sent there.
        """
        carried = value if self._runner.in_process else payload.portable(value)
        return self._runner.put([carried])[0]

    def _earlier(self, value: Any) -> Ref | None:
        entry = self._frozen.get(id(value))
        if entry is None or entry[0]() is not value:
            return None
        return entry[1]()

    def _remember(self, value: Any, ref: Ref) -> None:
        if not is_frozen(value):
            return
        identity = id(value)

        def forget(_: Any) -> None:
            self._frozen.pop(identity, None)

        self._frozen[identity] = (weakref.ref(value, forget), weakref.ref(ref))


def fingerprint(value: Any) -> int | None:
    """Return a checksum by which a change of a value is noticed, None for what has no plain bytes."""
    dtype = getattr(value, "dtype", None)
    if not isinstance(value, (bytes, bytearray)) and (dtype is None or getattr(dtype, "hasobject", True)):
        return None
    try:
        return zlib.crc32(memoryview(value).cast("B"))
    except (TypeError, ValueError):
        return None


def is_frozen(value: Any) -> bool:
    """Whether a value is an array that refuses writes, down to the object that owns its memory.

    A read-only view of an array that can be written to is none: it may change from one call to the
    next. Nor is an array that somebody has thawed since, which nobody can see; who freezes an array
    promises to leave it.
    """
    depth = 0
    while hasattr(value, "setflags") and depth < 10:
        if getattr(getattr(value, "flags", None), "writeable", True):
            return False
        base = getattr(value, "base", None)
        if base is None:
            return True
        value, depth = base, depth + 1
    if not depth:
        return False
    try:
        return memoryview(value).readonly  # bytes, or a map that was opened for reading
    except TypeError:
        return False
