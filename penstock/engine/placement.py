"""Where and with what a call runs: wishes in one vocabulary, from options and from blocks around the call."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine.options import TaskOptions, amounts
from penstock.runners.base import Options

if TYPE_CHECKING:
    from penstock.engine.task import Task

_remote: ContextVar[dict[str, Any] | None] = ContextVar("penstock_remote_options", default=None)
_OURS = {
    "max_retries": "crash_retries=",
    "retry_exceptions": "retries=",
    "num_returns": "a tuple as the result",
    "name": "task_run_name=",
}
"""Options of Ray's that mean something to the engine, and what to write in their place."""


@contextlib.contextmanager
def remote_options(**opts: Any) -> Iterator[None]:
    """Place what is submitted in a block: ``with remote_options(num_gpus=1): train.submit(x)``.

    The options are those of ``ray.remote``. `num_cpus`, `num_gpus`, `memory` and `resources` are understood
    by Dask, too; the others are for Ray alone. An inner block wins; a block wins over the task's options.

    Parameters
    ----------
    **opts : object
        By Ray's names.

    Raises
    ------
    ConfigurationError
        For options that are the engine's own.
    """
    for name in opts:
        if name in _OURS:
            message = f"remote_options({name}=...) is up to penstock: write {_OURS[name]} on the task."
            raise errors.ConfigurationError(message)
    token = _remote.set({**(_remote.get() or {}), **opts})
    try:
        yield
    finally:
        _remote.reset(token)


def placed(task: Task[..., Any]) -> Task[..., Any]:
    """Return a task with the wishes of the blocks around the call; mostly the task itself."""
    remote = _remote.get()
    dask = sys.modules.get("dask")  # where it was not imported nobody has annotated anything
    annotations = dask.get_annotations() if dask is not None and hasattr(dask, "get_annotations") else None
    if not remote and not annotations:
        return task
    options = task.options
    if annotations:
        options = _annotated(options, annotations)
    if remote:
        options = replace(options, backend=_with_remote(options.backend, remote))
    return task if options == task.options else task.with_fields(options)


def _annotated(options: TaskOptions, annotations: Mapping[str, Any]) -> TaskOptions:
    """Merge ``with dask.annotate(...)``; what penstock does not know is Dask's, on other objects than tasks."""
    for name in ("resources", "priority", "workers", "retries"):
        if callable(annotations.get(name)):
            message = (
                f"dask.annotate({name}=...) around penstock's tasks takes a value, not a function of keys."
            )
            raise errors.ConfigurationError(message)
    backend, retry = options.backend, options.retry
    if "resources" in annotations:
        merged = {**dict(backend.resources), **amounts(annotations["resources"])}
        backend = replace(backend, resources=tuple(sorted(merged.items())))
    if "workers" in annotations:
        backend = replace(backend, workers=tuple(annotations["workers"]))
    if annotations.get("allow_other_workers"):
        backend = replace(backend, native=(*backend.native, ("allow_other_workers", True)))
    if "retries" in annotations:
        retry = replace(retry, retries=annotations["retries"])
    return replace(
        options, backend=backend, retry=retry, priority=annotations.get("priority", options.priority)
    )


def _with_remote(backend: Options, remote: Mapping[str, Any]) -> Options:
    rest = dict(remote)
    resources = dict(backend.resources) | amounts(rest.pop("resources", None) or {})
    for name, ours in (("num_gpus", "GPU"), ("memory", "memory")):
        if (amount := rest.pop(name, None)) is not None:
            resources |= amounts({ours: amount})
    threads = rest.pop("num_cpus", None)
    return replace(
        backend,
        resources=tuple(sorted(resources.items())),
        threads=backend.threads if threads is None else threads,
        native=(*backend.native, *sorted(rest.items())),
    )


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Work that no worker can take.

    Attributes
    ----------
    name : str
        Of the task.
    reason : str
        What is missing.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        """Tell it in a sentence."""
        return f"no worker can run task {self.name!r}: {self.reason}; it waits until one can"
