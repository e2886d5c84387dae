"""When two calls of a task have one result: the policies for ``@task(cache_policy=…)``.

>>> from penstock.cache_policies import INPUTS, TASK_SOURCE
>>> INPUTS + TASK_SOURCE - "verbose"
INPUTS - 'verbose' + TaskSource
"""

from penstock.engine.cache import (
    DEFAULT,
    FLOW_PARAMETERS,
    INPUTS,
    NO_CACHE,
    NONE,
    RUN_ID,
    TASK_SOURCE,
    CacheKeyFnPolicy,
    CachePolicy,
    CompoundCachePolicy,
    FlowParameters,
    Inputs,
    IsolationLevel,
    RunId,
    TaskContext,
    TaskSource,
    task_input_hash,
)

__all__ = [
    "DEFAULT",
    "FLOW_PARAMETERS",
    "INPUTS",
    "NONE",
    "NO_CACHE",
    "RUN_ID",
    "TASK_SOURCE",
    "CacheKeyFnPolicy",
    "CachePolicy",
    "CompoundCachePolicy",
    "FlowParameters",
    "Inputs",
    "IsolationLevel",
    "RunId",
    "TaskContext",
    "TaskSource",
    "task_input_hash",
]
