"""penstock: flows over large data on threads, processes, Dask and Ray, with a record of every run.

>>> from penstock import flow, task
>>> @task
... def square(x: int) -> int:
...     return x * x
>>> @flow
... def squares(n: int = 3) -> list[int]:
...     return square.map(range(n)).result()

Names are loaded when first used, so that importing penstock is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.api.client import Client, get_client
    from penstock.engine.annotations import allow_failure, allow_skipped, freeze, opaque, quote, unmapped
    from penstock.engine.branching import branch
    from penstock.engine.cache import (
        DEFAULT,
        FLOW_PARAMETERS,
        INPUTS,
        NO_CACHE,
        NONE,
        RUN_ID,
        TASK_SOURCE,
        CachePolicy,
        IsolationLevel,
        task_input_hash,
    )
    from penstock.engine.context import tags
    from penstock.engine.dask_client import get_dask_client
    from penstock.engine.flow import Flow, flow
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
    from penstock.engine.locking import FileSystemLockManager, LockManager, MemoryLockManager
    from penstock.engine.logs import get_run_logger
    from penstock.engine.placement import remote_options
    from penstock.engine.reference import Reference, put
    from penstock.engine.result_records import ResultRecord, ResultStore
    from penstock.engine.results import ResultStorage, load_result
    from penstock.engine.retry import exponential_backoff
    from penstock.engine.run_context import FlowRunContext, TaskRunContext, get_run_context
    from penstock.engine.states import (
        AwaitingConcurrencySlot,
        AwaitingRetry,
        Cached,
        Cancelled,
        Cancelling,
        Completed,
        Crashed,
        Failed,
        InfrastructurePending,
        Late,
        Paused,
        Pending,
        Resuming,
        Retrying,
        RolledBack,
        Running,
        Scheduled,
        Skipped,
        State,
        StateGroup,
        StateType,
        Submitting,
        Suspended,
        TimedOut,
    )
    from penstock.engine.task import Task, task
    from penstock.engine.transaction_states import CommitMode, TransactionState
    from penstock.engine.transactions import Transaction, get_transaction, transaction
    from penstock.errors import (
        CancelledRun,
        ConfigurationError,
        CrashedRun,
        FailedRun,
        InvalidNameError,
        MappingLengthMismatch,
        MappingMissingIterable,
        MissingContextError,
        MissingResult,
        ParameterBindError,
        ParameterTypeError,
        PausedRun,
        PenstockError,
        ReservedArgumentError,
        ResultCorrupt,
        ResultTooLarge,
        ResumeDiverged,
        RunOwnedElsewhere,
        Skip,
        StorageRefused,
        TerminationSignal,
        UnfinishedRun,
        UnserializableResult,
        UpstreamTaskError,
    )
    from penstock.runners.base import TaskRunner
    from penstock.runners.dask import DaskTaskRunner
    from penstock.runners.processes import ProcessPoolTaskRunner
    from penstock.runners.ray import RayTaskRunner
    from penstock.runners.sequential import SequentialTaskRunner
    from penstock.runners.threads import ThreadPoolTaskRunner

    ConcurrentTaskRunner = ThreadPoolTaskRunner

__all__ = [
    # writing flows and tasks
    "flow",
    "task",
    "Flow",
    "Task",
    "tags",
    "branch",
    "exponential_backoff",
    "get_run_logger",
    "get_run_context",
    "FlowRunContext",
    "TaskRunContext",
    "remote_options",
    # arguments
    "unmapped",
    "allow_failure",
    "allow_skipped",
    "quote",
    "opaque",
    "freeze",
    # results that are found again
    "CachePolicy",
    "INPUTS",
    "TASK_SOURCE",
    "RUN_ID",
    "FLOW_PARAMETERS",
    "DEFAULT",
    "NO_CACHE",
    "NONE",
    "task_input_hash",
    "IsolationLevel",
    "LockManager",
    "MemoryLockManager",
    "FileSystemLockManager",
    # results that are stored
    "ResultStorage",
    "load_result",
    "put",
    "Reference",
    "get_dask_client",
    "ResultStore",
    "ResultRecord",
    # groups of task runs
    "transaction",
    "get_transaction",
    "Transaction",
    "TransactionState",
    "CommitMode",
    # the record
    "get_client",
    "Client",
    # futures and states
    "PenstockFuture",
    "Future",
    "PenstockFutureList",
    "wait",
    "as_completed",
    "first_completed",
    "resolve_futures_to_results",
    "resolve_futures_to_states",
    "State",
    "StateType",
    "StateGroup",
    "Scheduled",
    "AwaitingRetry",
    "TimedOut",
    "Suspended",
    "Submitting",
    "RolledBack",
    "Resuming",
    "Late",
    "InfrastructurePending",
    "Cached",
    "AwaitingConcurrencySlot",
    "Pending",
    "Running",
    "Retrying",
    "Paused",
    "Cancelling",
    "Completed",
    "Failed",
    "Crashed",
    "Cancelled",
    "Skipped",
    # runners
    "TaskRunner",
    "SequentialTaskRunner",
    "ThreadPoolTaskRunner",
    "ConcurrentTaskRunner",
    "ProcessPoolTaskRunner",
    "DaskTaskRunner",
    "RayTaskRunner",
    # errors
    "PenstockError",
    "ConfigurationError",
    "ParameterBindError",
    "ParameterTypeError",
    "ReservedArgumentError",
    "InvalidNameError",
    "MappingMissingIterable",
    "MappingLengthMismatch",
    "MissingContextError",
    "UpstreamTaskError",
    "UnfinishedRun",
    "FailedRun",
    "CrashedRun",
    "CancelledRun",
    "PausedRun",
    "MissingResult",
    "ResultCorrupt",
    "RunOwnedElsewhere",
    "ResumeDiverged",
    "StorageRefused",
    "UnserializableResult",
    "ResultTooLarge",
    "TerminationSignal",
    "Skip",
]

_ENGINE = {
    "annotations": ("unmapped", "allow_failure", "allow_skipped", "quote", "opaque", "freeze"),
    "branching": ("branch",),
    "cache": (
        "CachePolicy",
        "INPUTS",
        "TASK_SOURCE",
        "RUN_ID",
        "FLOW_PARAMETERS",
        "DEFAULT",
        "NO_CACHE",
        "NONE",
        "task_input_hash",
        "IsolationLevel",
    ),
    "context": ("tags",),
    "dask_client": ("get_dask_client",),
    "flow": ("flow", "Flow"),
    "futures": (
        "PenstockFuture",
        "Future",
        "PenstockFutureList",
        "wait",
        "as_completed",
        "first_completed",
        "resolve_futures_to_results",
        "resolve_futures_to_states",
    ),
    "locking": ("LockManager", "MemoryLockManager", "FileSystemLockManager"),
    "logs": ("get_run_logger",),
    "placement": ("remote_options",),
    "reference": ("put", "Reference"),
    "result_records": ("ResultStore", "ResultRecord"),
    "results": ("ResultStorage", "load_result"),
    "retry": ("exponential_backoff",),
    "run_context": ("get_run_context", "FlowRunContext", "TaskRunContext"),
    "states": (
        "State",
        "StateType",
        "StateGroup",
        "Scheduled",
        "AwaitingRetry",
        "TimedOut",
        "Suspended",
        "Submitting",
        "RolledBack",
        "Resuming",
        "Late",
        "InfrastructurePending",
        "Cached",
        "AwaitingConcurrencySlot",
        "Pending",
        "Running",
        "Retrying",
        "Paused",
        "Cancelling",
        "Completed",
        "Failed",
        "Crashed",
        "Cancelled",
        "Skipped",
    ),
    "task": ("task", "Task"),
    "transaction_states": ("TransactionState", "CommitMode"),
    "transactions": ("transaction", "get_transaction", "Transaction"),
}
_HOMES = {name: f"penstock.engine.{module}" for module, names in _ENGINE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name == "__version__":
        from penstock.version import own_version

        return own_version()
    if name not in __all__:
        message = f"module 'penstock' has no attribute {name!r}"
        raise AttributeError(message)
    if name.endswith("TaskRunner") and name != "TaskRunner":
        from penstock.runners import runner_class

        return runner_class(name)
    if name in {"Client", "get_client"}:
        return getattr(importlib.import_module("penstock.api.client"), name)
    home = "penstock.runners.base" if name == "TaskRunner" else _HOMES.get(name, "penstock.errors")
    found = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
