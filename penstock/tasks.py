"""Tasks, under Prefect's name for the module: ``from penstock.tasks import task_input_hash``."""

from __future__ import annotations

from penstock.engine.cache import task_input_hash
from penstock.engine.retry import exponential_backoff
from penstock.engine.task import Task, task

__all__ = ["Task", "exponential_backoff", "task", "task_input_hash"]
