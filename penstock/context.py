"""Where the calling code is, under Prefect's name for the module."""

from __future__ import annotations

from penstock.engine.context import tags
from penstock.engine.run_context import FlowRunContext, TaskRunContext, get_run_context

__all__ = ["FlowRunContext", "TaskRunContext", "get_run_context", "tags"]
