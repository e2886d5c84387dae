"""The version of penstock that runs."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version


@lru_cache
def own_version() -> str:
    """Return the version of penstock that runs."""
    try:
        return version("penstock")
    except PackageNotFoundError:
        return "unknown"
