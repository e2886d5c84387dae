"""Runners, under Prefect's name for the module: ``from penstock.task_runners import ConcurrentTaskRunner``.

Those of Dask and Ray are in `penstock.dask` and `penstock.ray`, so that this import costs nothing of theirs.
"""

from __future__ import annotations

from penstock.runners.base import TaskRunner
from penstock.runners.processes import ProcessPoolTaskRunner
from penstock.runners.sequential import SequentialTaskRunner
from penstock.runners.threads import ThreadPoolTaskRunner

ConcurrentTaskRunner = ThreadPoolTaskRunner

__all__ = [
    "ConcurrentTaskRunner",
    "ProcessPoolTaskRunner",
    "SequentialTaskRunner",
    "TaskRunner",
    "ThreadPoolTaskRunner",
]
