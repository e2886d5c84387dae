"""Flows, under Prefect's name for the module: ``from penstock.flows import Flow``."""

from __future__ import annotations

from penstock.engine.flow import Flow, flow

__all__ = ["Flow", "flow"]
