"""Options of tasks and flows: every one a field with a type and a default, written once."""

from __future__ import annotations

import inspect
import re
import string
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from penstock import errors
from penstock.engine import cache
from penstock.engine.cache import read_cache_options
from penstock.engine.hooks import NO_HOOKS, Hook, Hooks
from penstock.engine.results import Persistence, ResultOptions, Storage, read_options
from penstock.engine.retry import DelayOption, RetryPolicy, read_delays, read_jitter
from penstock.runners.base import Options

RunName = str | Callable[..., str] | None


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
    timeout_action: str = "abandon"
    log_prints: bool | None = None
    inputs: str = "readonly"
    chunk_size: int | str = "auto"
    idempotent: bool = True
    backend: Options = field(default_factory=Options)
    priority: int = 0
    on_skip: str = "skip"
    skip_if: Callable[..., Any] | None = None
    task_runner: Any = None
    results: ResultOptions = field(default_factory=ResultOptions)
    hooks: Hooks = NO_HOOKS


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
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    retry_delay_seconds: DelayOption = None
    on_exit: str = "wait"
    results: ResultOptions = field(default_factory=ResultOptions)
    in_memory: bool = True
    hooks: Hooks = NO_HOOKS


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


def check_callables(condition: Any, name: Any, option: str) -> None:
    """Refuse a retry condition that cannot be called, and a name of runs that is neither text nor callable.

    Raises
    ------
    TypeError
        Naming the option and the type.
    """
    if condition is not None and not callable(condition):
        message = f"Expected `retry_condition_fn` to be callable, got {type(condition).__name__} instead."
        raise TypeError(message)
    if name is not None and not isinstance(name, str) and not callable(name):
        message = f"Expected string or callable for '{option}'; got {type(name).__name__} instead."
        raise TypeError(message)


def check_exit(on_exit: str) -> None:
    """Refuse what the option cannot be.

    Raises
    ------
    ConfigurationError
        Naming the choices.
    """
    if on_exit not in {"wait", "cancel", "detach"}:
        message = f"'on_exit' must be 'wait', 'cancel' or 'detach', got {on_exit!r}."
        raise errors.ConfigurationError(message)


def check_choices(inputs: str, chunk_size: int | str, timeout: float | None, action: str = "abandon") -> None:
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
    if action not in {"abandon", "kill_worker"}:
        message = f"'timeout_action' must be 'abandon' or 'kill_worker', got {action!r}."
        raise errors.ConfigurationError(message)
    if timeout is not None and timeout <= 0:
        message = f"'timeout_seconds' must be positive, got {timeout!r}."
        raise errors.ConfigurationError(message)


def backend_options(
    resources: Mapping[str, float | str] | None,
    threads: int,
    workers: Iterable[str] | str | None,
    *,
    once: bool = False,
) -> Options:
    """Turn what a user writes about placement into the runners' vocabulary."""
    names = (workers,) if isinstance(workers, str) else tuple(workers or ())
    return Options(tuple(sorted(amounts(resources or {}).items())), threads, names, once=once)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def amounts(resources: Mapping[str, Any]) -> dict[str, float]:
    """Read what a user writes about resources: ``{"GPU": 1, "memory": "20GB"}``.

    Returns
    -------
    dict
        A number for each, memory in bytes.

    Raises
    ------
    ConfigurationError
        Naming the resource.
    """
    found = {}
    for name, amount in resources.items():
        number = _amount(amount)
        if number is None or number < 0:
            message = (
                f"resources[{name!r}] must be a number that is not negative, or a size such as '20GB', "
                f"got {amount!r}."
            )
            raise errors.ConfigurationError(message)
        found[name] = number
    return found


def _amount(amount: Any) -> float | None:
    if isinstance(amount, (int, float)) and not isinstance(amount, bool):
        return amount
    found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if found is None:
        return None
    unit = (found[2] or "").lower()
    number = float(found[1]) * (_BINARY.get(unit) or _UNITS[unit])
    return int(number) if number.is_integer() else number


def run_name(
    template: RunName, default: str, parameters: Mapping[str, Any], option: str = "task_run_name"
) -> str:
    """Make the name of a run.

    Parameters
    ----------
    template : str, callable or None
        A format string over the parameters, or a callable of nothing or of the parameters.
    default : str
        The name if there is no template.
    parameters : mapping
        Bound arguments, with defaults.
    option : str
        What the template is called, for messages.

    Raises
    ------
    TypeError
        If a callable does not give a string.
    """
    if template is None:
        return default
    if isinstance(template, str):
        return template.format(**parameters)
    name = (
        template(dict(parameters)) if "parameters" in inspect.signature(template).parameters else template()
    )
    if not isinstance(name, str):
        message = f"Callable {template} for '{option}' returned type {type(name).__name__} but a string is required."
        raise TypeError(message)
    return name


def needs_values(template: RunName, arguments: Mapping[str, Any], is_there: Callable[[Any], bool]) -> bool:
    """Whether the name of a run can only be made where the values of its upstreams are.

    Parameters
    ----------
    template : str, callable or None
        See `run_name`.
    arguments : mapping
        Bound arguments.
    is_there : callable
        Answers whether an argument holds no future.
    """
    if template is None:
        return False
    if isinstance(template, str):
        fields = (field for _, field, _, _ in string.Formatter().parse(template) if field)
        names = {re.split(r"[.\[]", field, maxsplit=1)[0] for field in fields}
        return any(name in arguments and not is_there(arguments[name]) for name in names)
    takes = "parameters" in inspect.signature(template).parameters
    return takes and not all(map(is_there, arguments.values()))


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


def changed_hooks(old: Hooks, owner: str, **given: Iterable[Hook] | None) -> Hooks:
    """Merge what is said of hooks: a kind that was given replaces what was there."""
    return old.changed({kind: hooks for kind, hooks in given.items() if hooks is not NOT_GIVEN}, owner)


_warned: set[str] = set()


def warn_unused(**given: Any) -> None:
    """Say once per process that an option of other engines has no effect here."""
    for name, value in given.items():
        if value is not None and value is not NOT_GIVEN and name not in _warned:
            _warned.add(name)
            warnings.warn(f"'{name}' has no effect in penstock and is ignored.", stacklevel=4)


def _in_memory(options: TaskOptions | FlowOptions) -> bool:
    return options.in_memory if isinstance(options, FlowOptions) else options.results.caching.in_memory


_VIEWS: dict[str, Callable[[Any], Any]] = {
    "description": lambda options: options.description,
    "task_run_name": lambda options: options.task_run_name,
    "flow_run_name": lambda options: options.flow_run_name,
    "retry_delay_seconds": lambda options: options.retry_delay_seconds,
    "retry_jitter_factor": lambda options: options.retry.jitter,
    "retry_condition_fn": lambda options: options.retry_condition_fn,
    "crash_retries": lambda options: options.retry.crash_retries,
    "idempotent": lambda options: options.idempotent,
    "timeout_seconds": lambda options: options.timeout_seconds,
    "timeout_action": lambda options: options.timeout_action,
    "log_prints": lambda options: options.log_prints,
    "inputs": lambda options: options.inputs,
    "chunk_size": lambda options: options.chunk_size,
    "resources": lambda options: dict(options.backend.resources),
    "threads": lambda options: options.backend.threads,
    "workers": lambda options: options.backend.workers,
    "priority": lambda options: options.priority,
    "persist_result": lambda options: options.results.persist,
    "result_storage": lambda options: options.results.storage,
    "result_storage_key": lambda options: options.results.key,
    "result_serializer": lambda options: options.results.serializer,
    "tags": lambda options: options.tags,
    "retries": lambda options: options.retry.retries,
    "on_exit": lambda options: options.on_exit,
    "on_skip": lambda options: options.on_skip,
    "cache_policy": lambda options: options.results.caching.policy,
    "cache_key_fn": lambda options: options.results.caching.key_fn,
    "cache_expiration": lambda options: options.results.caching.expiration,
    "refresh_cache": lambda options: options.results.caching.refresh,
    "cache_result_in_memory": _in_memory,
    "should_validate_parameters": lambda options: options.validate_parameters,
    "task_runner": lambda options: options.task_runner,
    "on_completion_hooks": lambda options: list(options.hooks.on_completion),
    "on_failure_hooks": lambda options: list(options.hooks.on_failure),
    "on_running_hooks": lambda options: list(options.hooks.on_running),
    "on_skipped_hooks": lambda options: list(options.hooks.on_skipped),
    "on_commit_hooks": lambda options: list(options.hooks.on_commit),
    "on_rollback_hooks": lambda options: list(options.hooks.on_rollback),
    "on_cancellation_hooks": lambda options: list(options.hooks.on_cancellation),
    "on_crashed_hooks": lambda options: list(options.hooks.on_crashed),
}
"""Attributes of tasks and flows that show their options, under the names that the options have."""


def view(thing: Any, name: str) -> Any:
    """Return an option of a task or flow, for its ``__getattr__``.

    Raises
    ------
    AttributeError
        If it has no such option.
    """
    look = _VIEWS.get(name)
    if look is not None and "options" in thing.__dict__:
        try:
            return look(thing.__dict__["options"])
        except AttributeError:
            pass
    message = f"{type(thing).__name__!r} object has no attribute {name!r}"
    raise AttributeError(message)


def changed(options: Any, changes: Mapping[str, Any]) -> Any:
    """Merge: what was given wins over what was there."""
    known = {one.name for one in fields(options)}
    given = {name: value for name, value in changes.items() if value is not NOT_GIVEN and name in known}
    return replace(options, **given)
