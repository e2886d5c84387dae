"""Runs as a client returns them: flat, typed, and ready for a DataFrame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

__all__ = ["FlowRecord", "FlowRunRecord", "LineRecord", "MapRunRecord", "TaskRunRecord"]


@dataclass(frozen=True, slots=True)
class _Record:
    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self:
        """Make one of what the server sent; what a newer server added is passed over."""
        flat = dict(found)
        state, error = flat.get("state"), flat.get("error")
        if isinstance(state, Mapping):
            flat |= {"state": state.get("type"), "state_name": state.get("name")}
            flat |= {"message": state.get("message"), "cause": state.get("cause")}
        if isinstance(error, Mapping):
            flat |= {
                "error": error.get("type"),
                "error_message": error.get("message"),
                "traceback": error.get("text"),
            }
        return cls(**{one.name: flat[one.name] for one in dataclasses.fields(cls) if one.name in flat})

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dictionary."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True)
class FlowRecord(_Record):
    """A flow: how often it ran, when last (seconds since 1970), and in which states its runs are."""

    name: str
    runs: int = 0
    latest: float | None = None
    states: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _RunRecord(_Record):
    id: str
    name: str | None = None
    state: str = "PENDING"
    state_name: str = "Pending"
    message: str | None = None
    cause: str | None = None
    attempt: int = 0
    created: float | None = None
    started: float | None = None
    ended: float | None = None
    seconds: float | None = None
    error: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    root: str = ""
    tags: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FlowRunRecord(_RunRecord):
    """One run of a flow. Times are seconds since 1970; ``tasks`` counts its task runs by state."""

    flow: str | None = None
    version: str | None = None
    parent_flow_run: str | None = None
    parent_task_run: str | None = None
    runner: str | None = None
    host: str | None = None
    pid: int | None = None
    python: str | None = None
    penstock: str | None = None
    backend: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    flows: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TaskRunRecord(_RunRecord):
    """One run of a task. Times are seconds since 1970, sizes are bytes."""

    task: str | None = None
    flow_run: str | None = None
    parent: str | None = None
    map: str | None = None
    element: int | None = None
    child_flow_run: str | None = None
    nbytes: int | None = None
    peak: int | None = None
    worker: str | None = None
    stored: str | None = None
    upstream: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class MapRunRecord(_Record):
    """All runs of one map: ``states`` counts them, ``ranges`` has first and last elements by state."""

    id: str
    name: str | None = None
    task: str | None = None
    count: int = 0
    states: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, list[list[int]]] = field(default_factory=dict)
    created: float | None = None
    started: float | None = None
    ended: float | None = None
    seconds: float = 0.0
    nbytes: int = 0
    peak: int | None = None
    root: str = ""
    flow_run: str | None = None
    parent: str | None = None
    tags: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    upstream: list[dict[str, Any]] = field(default_factory=list)
    upstream_maps: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LineRecord(_Record):
    """A line of a log, and the run that wrote it."""

    time: float
    level: str
    text: str
    run: str
    name: str | None = None
