"""Options of tasks and flows: every one a field with a type and a default, written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from penstock import errors
from penstock.engine import cache
from penstock.engine.cache import read_cache_options
from penstock.engine.results import Persistence, ResultOptions, Storage, read_options
from penstock.engine.retry import DelayOption, RetryPolicy, read_delays, read_jitter
from penstock.runners.base import Options

RunName = str | Callable[..., str] | None
Hooks = tuple[Callable[..., Any], ...]


NOT_GIVEN: Final[Any] = cache.NOT_GIVEN
RESERVED = ("return_state", "wait_for")


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of one task; `Task.with_options` makes new ones."""

    name: str
    description: str | None = None
    version: str | None = None
    tags: frozenset[str] = frozenset()
    task_run_name: RunName = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    retry_delay_seconds: DelayOption = None
    retry_condition_fn: Callable[..., Any] | None = None
    timeout_seconds: float | None = None
    log_prints: bool | None = None
    inputs: str = "readonly"
    chunk_size: int | str = "auto"
    idempotent: bool = True
    backend: Options = field(default_factory=Options)
    priority: int = 0
    results: ResultOptions = field(default_factory=ResultOptions)


@dataclass(frozen=True, slots=True)
class FlowOptions:
    """Options of one flow; `Flow.with_options` makes new ones."""

    name: str
    description: str | None = None
    version: str | None = None
    tags: frozenset[str] = frozenset()
    flow_run_name: RunName = None
    timeout_seconds: float | None = None
    validate_parameters: bool = True
    log_prints: bool | None = None
    task_runner: Any = None
    results: ResultOptions = field(default_factory=ResultOptions)


def retry_policy(
    retries: int | None,
    delay: DelayOption,
    jitter: float | None,
    crash_retries: int,
    default_retries: int = 0,
) -> RetryPolicy:
    """Check the options that make a retry policy.

    Raises
    ------
    ConfigurationError
        If a count is negative.
    """
    count = default_retries if retries is None else retries
    if count < 0 or crash_retries < 0:
        message = "'retries' and 'crash_retries' must not be negative."
        raise errors.ConfigurationError(message)
    return RetryPolicy(count, read_delays(delay, count), read_jitter(jitter), crash_retries)


def check_choices(inputs: str, chunk_size: int | str, timeout: float | None) -> None:
    """Refuse values that an option cannot have.

    Raises
    ------
    ConfigurationError
        Naming the option and its choices.
    """
    if inputs not in {"readonly", "copy", "shared"}:
        message = f"'inputs' must be 'readonly', 'copy' or 'shared', got {inputs!r}."
        raise errors.ConfigurationError(message)
    if chunk_size != "auto" and not (isinstance(chunk_size, int) and chunk_size >= 1):
        message = f"'chunk_size' must be 'auto' or a positive integer, got {chunk_size!r}."
        raise errors.ConfigurationError(message)
    if timeout is not None and timeout <= 0:
        message = f"'timeout_seconds' must be positive, got {timeout!r}."
        raise errors.ConfigurationError(message)


def backend_options(
    resources: Mapping[str, float] | None,
    threads: int,
    workers: Iterable[str] | str | None,
    *,
    once: bool = False,
) -> Options:
    """Turn what a user writes about placement into the runners' vocabulary."""
    names = (workers,) if isinstance(workers, str) else tuple(workers or ())
    return Options(tuple(sorted((resources or {}).items())), threads, names, once=once)


def run_name(template: RunName, default: str, parameters: Mapping[str, Any]) -> str:
    """Make the name of a run.

    Parameters
    ----------
    template : str, callable or None
        A format string over the parameters, or a callable of nothing or of the parameters.
    default : str
        The name if there is no template.
    parameters : mapping
        Bound arguments, with defaults.

    Raises
    ------
    TypeError
        If a callable does not give a string.
    """
    if template is None:
        return default
    if isinstance(template, str):
        return template.format(**parameters)
    if not callable(template):
        message = f"Expected string or callable for 'task_run_name'; got {type(template).__name__} instead."
        raise TypeError(message)
    name = (
        template(dict(parameters)) if "parameters" in inspect.signature(template).parameters else template()
    )
    if not isinstance(name, str):
        message = f"Callable {template} for 'task_run_name' returned type {type(name).__name__} but a string is required."
        raise TypeError(message)
    return name


def check_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a task or flow; refuse parameters that penstock uses itself.

    Raises
    ------
    ReservedArgumentError
        Naming the parameter.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions of C tell nothing: max, dict.update
        signature = inspect.signature(lambda *args, **kwargs: None)
    for name in RESERVED:
        if name in signature.parameters:
            message = f"'{name}' is a reserved argument name and cannot be used in {function.__qualname__}."
            raise errors.ReservedArgumentError(message)
    return signature


def changed_results(
    old: ResultOptions,
    persist: Persistence,
    storage: Storage,
    key: str | None,
    serializer: Any,
    caching: tuple[Any, ...] = (),
) -> ResultOptions:
    """Merge what is said of results; None takes something back.

    Parameters
    ----------
    old : ResultOptions
        What was said before.
    persist, storage, key, serializer
        The options, or `NOT_GIVEN`.
    caching : tuple
        Policy, key function, expiration, refresh and whether in memory, likewise; the one of policy and
        key function that is given takes the other's place.
    """
    new = (persist, storage, key, serializer)
    before = (old.persist, old.storage, old.key, old.serializer)
    merged: list[Any] = [was if now is NOT_GIVEN else now for now, was in zip(new, before, strict=True)]
    said = old.caching
    if any(one is not NOT_GIVEN for one in caching):
        policy, key_fn, expiration, refresh, in_memory = caching
        before_ = (said.expiration, said.refresh, said.in_memory)
        rest = [
            w if n is NOT_GIVEN else n for n, w in zip((expiration, refresh, in_memory), before_, strict=True)
        ]
        if policy is NOT_GIVEN and key_fn is NOT_GIVEN:
            key_fn, policy = said.key_fn, NOT_GIVEN if said.policy is None or said.key_fn else said.policy
        elif key_fn is NOT_GIVEN:
            key_fn = None
        said = read_cache_options(policy, key_fn, rest[0], rest[1], rest[2], merged[0])
    elif persist is False and said.asks:
        said = read_cache_options(said.policy, None, said.expiration, said.refresh, said.in_memory, persist)
    return read_options(merged[0], merged[1], merged[2], merged[3], said)


def changed(options: Any, changes: Mapping[str, Any]) -> Any:
    """Merge: what was given wins over what was there."""
    known = {one.name for one in fields(options)}
    given = {name: value for name, value in changes.items() if value is not NOT_GIVEN and name in known}
    return replace(options, **given)
