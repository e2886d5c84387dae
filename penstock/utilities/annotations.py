"""Annotations of arguments, under Prefect's name: ``from penstock.utilities.annotations import quote``."""

from __future__ import annotations

from penstock.engine.annotations import allow_failure, allow_skipped, freeze, opaque, quote, unmapped

__all__ = ["allow_failure", "allow_skipped", "freeze", "opaque", "quote", "unmapped"]
