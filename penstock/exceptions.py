"""The errors, under Prefect's name for the module: all of `penstock.errors`."""

from __future__ import annotations

from penstock.errors import *  # noqa: F403 - the list is kept in one place, and that one is tested
from penstock.errors import __all__  # noqa: F401
