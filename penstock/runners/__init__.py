"""Where work runs: from a name, a URL, a class or an object to a runner."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from penstock import errors
from penstock.runners.base import TaskRunner

CLASSES = {
    "SequentialTaskRunner": "sequential",
    "ThreadPoolTaskRunner": "threads",
    "ConcurrentTaskRunner": "threads",
    "ProcessPoolTaskRunner": "processes",
    "DaskTaskRunner": "dask",
    "RayTaskRunner": "ray",
}
"""Public classes and the module that holds each; loaded when first asked for."""

_NAMES = {
    "sequential": "SequentialTaskRunner",
    "threads": "ThreadPoolTaskRunner",
    "processes": "ProcessPoolTaskRunner",
    "dask": "DaskTaskRunner",
    "ray": "RayTaskRunner",
}
_LIBRARIES = {"dask": "distributed", "ray": "ray"}


def runner_class(name: str) -> type[TaskRunner]:
    """Load the class of a runner.

    Returns
    -------
    type
        If the library behind it is not installed, a class that cannot be made: the attempt raises
        `MissingExtra` with the pip line.
    """
    name = "ThreadPoolTaskRunner" if name == "ConcurrentTaskRunner" else name
    module = CLASSES[name]
    library = _LIBRARIES.get(module)
    if library is not None and importlib.util.find_spec(library) is None:
        return _absent(name, module)
    found: type[TaskRunner] = getattr(importlib.import_module(f"penstock.runners.{module}"), name)
    return found


def _absent(name: str, extra: str) -> type[TaskRunner]:
    def refuse(*_: Any, **__: Any) -> Any:
        message = f'{name} needs {extra}, which is not installed: pip install "penstock[{extra}]"'
        raise errors.MissingExtra(message)

    return type(
        name, (TaskRunner,), {"__new__": refuse, "__doc__": f"Needs {extra}, which is not installed."}
    )


def runner_of(wish: Any) -> TaskRunner:
    """Return the runner that a user means.

    Parameters
    ----------
    wish : str, type, TaskRunner or None
        ``"sequential"``, ``"threads"``, ``"processes"``, ``"dask"``, ``"ray"`` (a local one of
        each), ``"dask://host:port"``, ``"tcp://host:port"``, ``"ray://host:port"``,
        ``"ray://auto"`` (attach), ``"auto"`` (see `auto_runner`), a class, an instance, or None
        for threads.

    Raises
    ------
    ConfigurationError
        If there is no such runner; the message lists the names.
    """
    if wish is None:
        return runner_class("ThreadPoolTaskRunner")()
    if isinstance(wish, TaskRunner):
        return wish
    if isinstance(wish, type) and issubclass(wish, TaskRunner):
        return wish()
    if isinstance(wish, str):
        return _named(wish.strip())
    message = f"a task runner must be a name, a class or an instance, got {type(wish).__name__}."
    raise errors.ConfigurationError(message)


def _named(wish: str) -> TaskRunner:
    name, _, rest = wish.partition("://")
    if wish == "auto":
        return auto_runner()[0]
    if wish in _NAMES:
        return runner_class(_NAMES[wish])()
    arguments: dict[str, Any] = {}
    if rest and name in {"dask", "tcp", "tls", "ucx"}:
        arguments["address"] = f"tcp://{rest}" if name == "dask" else wish
        return runner_class("DaskTaskRunner")(**arguments)
    if rest and name == "ray":
        arguments["address"] = "auto" if rest == "auto" else wish
        return runner_class("RayTaskRunner")(**arguments)
    message = (
        f"unknown task runner {wish!r}: choose sequential, threads, processes, dask, ray, auto, "
        "dask://host:port or ray://host:port."
    )
    raise errors.ConfigurationError(message)


def auto_runner() -> tuple[TaskRunner, str]:
    """Choose a runner from what the environment offers.

    Returns
    -------
    tuple of (TaskRunner, str)
        The scheduler that ``DASK_SCHEDULER_ADDRESS`` or ``DASK_SCHEDULER_FILE`` names, else the
        Ray that ``RAY_ADDRESS`` names, else a local Dask cluster if Dask is installed, else
        threads; and a sentence that says why.
    """
    address = os.environ.get("DASK_SCHEDULER_ADDRESS") or os.environ.get("DASK_SCHEDULER__ADDRESS")
    scheduler_file = os.environ.get("DASK_SCHEDULER_FILE")
    arguments: dict[str, Any]
    if address:
        arguments = {"address": address}
        return runner_class("DaskTaskRunner")(**arguments), f"the Dask scheduler at {address} (environment)"
    if scheduler_file:
        arguments = {"scheduler_file": scheduler_file}
        return runner_class("DaskTaskRunner")(
            **arguments
        ), f"the Dask scheduler of {scheduler_file} (environment)"
    ray_address = os.environ.get("RAY_ADDRESS")
    if ray_address:
        arguments = {"address": ray_address}
        return runner_class("RayTaskRunner")(**arguments), f"Ray at {ray_address} (environment)"
    if importlib.util.find_spec("distributed") is not None:
        return runner_class("DaskTaskRunner")(), "a local Dask cluster"
    return runner_class("ThreadPoolTaskRunner")(), "threads (dask is not installed)"


def inside_worker(name: str) -> TaskRunner:
    """Return the runner for tasks that a task submits, from within a worker process.

    Parameters
    ----------
    name : str
        What `TaskRunner.inside` answered in the driver.
    """
    if name == "processes":
        worker = importlib.import_module("penstock.runners.process_worker")
        found: TaskRunner = worker.current_worker_runner()
        return found
    found = runner_class(_NAMES[name])._from_worker()  # type: ignore[attr-defined]
    return found
