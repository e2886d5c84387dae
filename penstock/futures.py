"""Futures, under Prefect's name for the module: ``from penstock.futures import wait, as_completed``."""

from __future__ import annotations

from penstock.engine.futures import (
    Future,
    PenstockFuture,
    PenstockFutureList,
    as_completed,
    first_completed,
    resolve_futures_to_results,
    resolve_futures_to_states,
    wait,
)

__all__ = [
    "Future",
    "PenstockFuture",
    "PenstockFutureList",
    "as_completed",
    "first_completed",
    "resolve_futures_to_results",
    "resolve_futures_to_states",
    "wait",
]
