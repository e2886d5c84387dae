"""What Prefect has in a package of its own for Dask: ``from penstock.dask import DaskTaskRunner, get_dask_client``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.engine.dask_client import get_dask_client
from penstock.runners import runner_class

if TYPE_CHECKING:
    from penstock.runners.dask import DaskTaskRunner
else:  # without Dask a class that says which extra is missing, once somebody wants to make one
    DaskTaskRunner = runner_class("DaskTaskRunner")

__all__ = ["DaskTaskRunner", "get_dask_client"]
