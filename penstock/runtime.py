"""What surrounds the calling code, by name: ``runtime.flow_run.id``, ``runtime.task_run.name``, …

>>> from penstock import runtime
>>> runtime.flow_run.parameters
{}

Right in flows and tasks, on every runner. Without a run the values are empty. An environment variable
such as ``PENSTOCK__RUNTIME__FLOW_RUN__NAME`` takes the place of a value, cast to its type: for tests.
"""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Callable
from typing import Any

from penstock.engine import run_context
from penstock.settings import settings

__all__ = ["deployment", "flow_run", "task_run"]

_PREFIX = "PENSTOCK__RUNTIME__"
_Field = tuple[type, Callable[[], Any]]


class Namespace:
    """Attributes that are looked up when they are asked for.

    Parameters
    ----------
    name : str
        Of the namespace.
    fields : dict
        For each attribute its type and what finds it.
    """

    def __init__(self, name: str, fields: dict[str, _Field]) -> None:
        self.__name = name
        self.__fields = fields

    def __getattr__(self, name: str) -> Any:
        """Return the present value of an attribute."""
        if name.startswith("__") or name not in self.__fields:
            message = f"penstock.runtime.{self.__name} has no attribute {name!r}"
            raise AttributeError(message)
        kind, find = self.__fields[name]
        override = os.environ.get(f"{_PREFIX}{self.__name}__{name}".upper())
        return find() if override is None else _cast(override, kind)

    def __reduce__(self) -> str:
        """Travel as a name: code that uses one as a global is sent to workers by value."""
        return self.__name

    def __dir__(self) -> list[str]:
        """List the attributes."""
        return sorted(self.__fields)

    def __repr__(self) -> str:
        """Show the name."""
        return f"<penstock.runtime.{self.__name}>"


def _cast(text: str, kind: type) -> Any:
    if kind is bool:
        return text.lower() in {"1", "true", "yes", "on"}
    if kind is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind is dict:
        return json.loads(text)
    if kind is dt.datetime:
        found = dt.datetime.fromisoformat(text)
        return found if found.tzinfo is not None else found.replace(tzinfo=dt.UTC)
    return kind(text)


def _flow(name: str, empty: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
    def find() -> Any:
        here = run_context.flow_run_here()
        return empty() if here is None else getattr(here, name)

    return find


def _task(name: str, empty: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
    def find() -> Any:
        here = run_context.task_run_here()
        return empty() if here is None else getattr(here, name)

    return find


def _api_url() -> str | None:
    return settings().api_url or None


def _page(kind: str, find: Callable[[], Any]) -> Callable[[], str | None]:
    """Make what finds the page of a run in the user interface of the server."""

    def page() -> str | None:
        known, run_id = settings(), find()
        base = known.ui_url.rstrip("/") or known.api_url.rstrip("/").removesuffix("/api")
        return f"{base}/{kind}/{run_id}" if base and run_id else None

    return page


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


flow_run: Any = Namespace(
    "flow_run",
    {
        "id": (str, _flow("id")),
        "name": (str, _flow("name")),
        "tags": (list, _flow("tags", list)),
        "run_count": (int, _flow("run_count", int)),
        "scheduled_start_time": (dt.datetime, _flow("scheduled_start_time", _now)),
        "flow_name": (str, _flow("flow_name")),
        "flow_version": (str, _flow("flow_version")),
        "parameters": (dict, _flow("parameters", dict)),
        "parent_flow_run_id": (str, _flow("parent_flow_run_id")),
        "root_flow_run_id": (str, _flow("root_flow_run_id")),
        "parent_deployment_id": (str, lambda: None),
        "api_url": (str, _api_url),
        "ui_url": (str, _page("runs", _flow("id"))),
        "job_variables": (dict, dict),
    },
)
"""The innermost flow run around the calling code, also inside of its tasks."""

task_run: Any = Namespace(
    "task_run",
    {
        "id": (str, _task("id")),
        "name": (str, _task("name")),
        "tags": (list, _task("tags", list)),
        "task_name": (str, _task("task_name")),
        "run_count": (int, _task("run_count", int)),
        "parameters": (dict, _task("parameters", dict)),
        "seed": (int, _task("seed")),
        "api_url": (str, _api_url),
        "ui_url": (str, _page("tasks", _task("id"))),
    },
)
"""The task run around the calling code."""

deployment: Any = Namespace(
    "deployment",
    {
        "id": (str, lambda: None),
        "name": (str, lambda: None),
        "version": (str, lambda: None),
        "flow_run_id": (str, lambda: None),
        "parameters": (dict, dict),
    },
)
"""The deployment that the run comes from; empty for a run that somebody has called."""
