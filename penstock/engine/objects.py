"""Large arguments: each is placed near the workers once, and travels as a reference.

Within one `.map` the identity of the object decides; across calls only a read-only array is
known to be the same, since anything else may have changed in between.
"""

from __future__ import annotations

import weakref
import zlib
from typing import Any

from penstock.engine.calls import Source
from penstock.runners import worker_runtime
from penstock.runners.base import Ref, TaskRunner

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
        return bool(worker_runtime.size(value) >= self._threshold)

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
            ref = self._runner.put([value])[0]
            self.bytes_put += worker_runtime.size(value)
            self._remember(value, ref)
            if not self._runner.in_process and (sum_ := fingerprint(value)) is not None:
                self._origins[ref] = (value, sum_)
        source = known[id(value)] = Source(ref=ref)
        return source

    def put_again(self, ref: Ref) -> Ref | None:
        """Put a value whose copies on the workers are lost; None if it may have changed since."""
        value, known = self._origins.get(ref, (None, None))
        if known is None or fingerprint(value) != known:
            return None
        renewed = self._runner.put([value])[0]
        self._origins[renewed] = (value, known)
        return renewed

    def _earlier(self, value: Any) -> Ref | None:
        entry = self._frozen.get(id(value))
        if entry is None or entry[0]() is not value:
            return None
        return entry[1]()

    def _remember(self, value: Any, ref: Ref) -> None:
        flags = getattr(value, "flags", None)
        if flags is None or getattr(flags, "writeable", True) or getattr(value, "base", None) is not None:
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
