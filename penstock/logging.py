"""The logger of the run, under Prefect's name for the module: ``from penstock.logging import get_run_logger``."""

from __future__ import annotations

from penstock.engine.logs import get_run_logger

__all__ = ["get_run_logger"]
