"""What stands where a value would be, and why a call was not made."""

from __future__ import annotations

from typing import Any


class Skipped(Exception):
    """Raised in the place of a call whose predicate says that there is nothing to do."""


class Failed:
    """Stands where a value would be when its task did not complete."""

    def __init__(self, record: bytes, error: BaseException | None = None) -> None:
        self.record = record
        # The exception itself, in the process that raised it only; of ours the record knows the real class.
        self.error = None if hasattr(error, "_penstock_error") else error

    def __reduce__(self) -> Any:
        return (Failed, (self.record,))
