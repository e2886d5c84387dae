"""Cache policies: from a call to the key under which its result is stored, and found again.

A key is text. Two calls with one key have one result; a key of None means that there is nothing
to be found or stored. Policies are added, ``INPUTS + TASK_SOURCE``, and arguments are taken out of
them, ``INPUTS - "verbose"``. Everything here is pure: who looks keys up is `penstock.engine.lookups`.
"""

from __future__ import annotations

import copy
import datetime as dt
import enum
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Self

from penstock import errors
from penstock.engine import hashing
from penstock.engine.locking import LockManager


class NotGiven:
    """Stands for an option that was not given, where None is a value."""

    def __repr__(self) -> str:
        """Show in signatures."""
        return "NOT_GIVEN"


NOT_GIVEN: Final[Any] = NotGiven()


class IsolationLevel(str, enum.Enum):
    """What runs of the same key, at the same time, know of each other."""

    READ_COMMITTED = "READ_COMMITTED"
    """Each may make the value; the first to store it wins."""
    SERIALIZABLE = "SERIALIZABLE"
    """One makes it while the others wait; needs a lock manager."""

    def __str__(self) -> str:
        """Show the bare name."""
        return self.value


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task, as a policy sees it.

    Attributes
    ----------
    name : str
        Of the task.
    task_key : str
        Its place in the code and a hash of its code.
    fn : callable
        Its function.
    version, description : str, optional
        Its options.
    tags : frozenset of str
        Its tags.
    """

    name: str
    task_key: str
    fn: Callable[..., Any]
    code: str = ""
    version: str | None = None
    description: str | None = None
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TaskRunInfo:
    """A task run, as a policy sees it."""

    id: str
    name: str = ""
    flow_run_id: str | None = None
    flow_run_name: str = ""
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a policy, or a ``cache_key_fn``, is given: ``.task`` and ``.task_run``."""

    task: Any
    task_run: Any


class CachePolicy:
    """Says when two calls have one result; make your own with `compute_key`.

    >>> class ByDay(CachePolicy):
    ...     def compute_key(self, task_ctx, inputs, flow_parameters, **_):
    ...         return inputs["day"].isoformat()

    Attributes
    ----------
    key_storage : str, path or ResultStorage, optional
        Where results lie, if not in the task's ``result_storage``.
    isolation_level : IsolationLevel, optional
        READ_COMMITTED if not given.
    lock_manager : LockManager, optional
        For SERIALIZABLE.
    """

    key_storage: Any = None
    isolation_level: IsolationLevel | None = None
    lock_manager: LockManager | None = None

    def compute_key(
        self,
        task_ctx: TaskContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """Return the key of a call, None for no caching.

        Parameters
        ----------
        task_ctx : TaskContext
            The task and its run.
        inputs : dict
            The arguments by name, with defaults.
        flow_parameters : dict
            Those of the surrounding flow run.
        **kwargs
            Room for more.
        """
        raise NotImplementedError

    @classmethod
    def from_cache_key_fn(cls, cache_key_fn: Callable[..., str | None]) -> CachePolicy:
        """Make a policy of a function of `TaskContext` and arguments."""
        return CacheKeyFnPolicy(cache_key_fn)

    def configure(
        self,
        key_storage: Any = None,
        lock_manager: LockManager | None = None,
        isolation_level: IsolationLevel | str | None = None,
    ) -> Self:
        """Return the policy with another storage, lock manager or isolation level."""
        new = copy.copy(self)
        if key_storage is not None:
            new.key_storage = key_storage
        if lock_manager is not None:
            new.lock_manager = lock_manager
        if isolation_level is not None:
            new.isolation_level = IsolationLevel(str(isolation_level).rpartition(".")[2].upper())
        return new

    def __add__(self, other: CachePolicy) -> CachePolicy:
        """Combine: a result is found if both policies find it.

        Raises
        ------
        ValueError
            If storage, isolation level or lock manager contradict each other.
        """
        if not isinstance(other, CachePolicy):
            return NotImplemented
        return _configured(CompoundCachePolicy([*_parts(self), *_parts(other)]), self, other)

    def __sub__(self, name: str) -> CachePolicy:
        """Leave an argument out of the key."""
        if not isinstance(name, str):
            message = "Can only subtract strings from key policies."
            raise TypeError(message)
        return _configured(CompoundCachePolicy([*_parts(self), Inputs(frozenset([name]))]), self)

    def __repr__(self) -> str:
        """Show the name."""
        return type(self).__name__


_CONFLICTS = {
    "key_storage": "storage locations",
    "isolation_level": "isolation levels",
    "lock_manager": "lock implementations",
}


def _configured(made: CachePolicy, *origins: CachePolicy) -> CachePolicy:
    for name, what in _CONFLICTS.items():
        wishes = [wish for one in origins if (wish := getattr(one, name)) is not None]
        if any(wish != wishes[0] for wish in wishes):
            message = f"Cannot add CachePolicies with different {what}."
            raise ValueError(message)
        if wishes:
            setattr(made, name, wishes[0])
    return made


def _parts(policy: CachePolicy) -> list[CachePolicy]:
    """Return what a policy is made of; nothing for `NO_CACHE`, which is neutral."""
    if isinstance(policy, NoCache):
        return []
    return list(policy.policies) if isinstance(policy, CompoundCachePolicy) else [policy]


class CompoundCachePolicy(CachePolicy):
    """Several policies at once: the key is made of their keys."""

    def __init__(self, policies: list[CachePolicy]) -> None:
        self.policies = tuple(policies)

    def compute_key(
        self,
        task_ctx: TaskContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """Return the hash of the keys of all parts that have one."""
        keys = [one.compute_key(task_ctx, inputs, flow_parameters, **kwargs) for one in self.policies]
        known = [key for key in keys if key is not None]
        return hashing.stable_hash(known) if known else None

    def __sub__(self, name: str) -> CachePolicy:
        """Leave an argument out of the key."""
        if not any(isinstance(one, Inputs) for one in self.policies):
            return super().__sub__(name)
        parts = [one - name if isinstance(one, Inputs) else one for one in self.policies]
        return _configured(CompoundCachePolicy(parts), self)

    def __repr__(self) -> str:
        """Show the sum."""
        return " + ".join(map(repr, self.policies)) or "NO_CACHE"


class NoCache(CachePolicy):
    """Nothing is found or stored for later; neutral in sums."""

    def compute_key(self, task_ctx: Any, inputs: Any, flow_parameters: Any, **kwargs: Any) -> str | None:
        """Return None."""
        return None

    def __add__(self, other: CachePolicy) -> CachePolicy:
        """Return the other one."""
        return (
            _configured(copy.copy(other), self, other) if isinstance(other, CachePolicy) else NotImplemented
        )


class Inputs(CachePolicy):
    """By the arguments, as they are and not where they come from.

    Parameters
    ----------
    exclude : collection of str
        Arguments that make no difference.
    """

    def __init__(self, exclude: Any = ()) -> None:
        self.exclude = frozenset(exclude)

    def compute_key(
        self,
        task_ctx: TaskContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """Return the hash of the arguments; None if there are none.

        Raises
        ------
        ValueError
            Naming an argument that has no content to hash, and how to leave it out.
        """
        if not inputs:
            return None
        found = {}
        for name, value in inputs.items():
            if name in self.exclude:
                continue
            try:
                found[name] = hashing.digest(value)
            except ValueError as error:
                raise ValueError(_cure(name, error)) from error
        return hashing.stable_hash(found)

    def __sub__(self, name: str) -> CachePolicy:
        """Leave an argument out of the key."""
        if not isinstance(name, str):
            message = "Can only subtract strings from key policies."
            raise TypeError(message)
        return _configured(Inputs(self.exclude | {name}), self)

    def __repr__(self) -> str:
        """Show what is left out."""
        return "INPUTS" + "".join(f" - {name!r}" for name in sorted(self.exclude))


def _cure(name: str, error: Exception) -> str:
    return (
        f"Unable to create hash - argument {name!r} cannot be part of a cache key: {error}. Leave it out with "
        f'cache_policy=INPUTS - "{name}", say what counts with cache_key_fn=…, or pass cache_policy=NO_CACHE.'
    )


class TaskSource(CachePolicy):
    """By the code of the function, with its defaults and closure."""

    def compute_key(
        self, task_ctx: TaskContext, inputs: Any, flow_parameters: Any, **kwargs: Any
    ) -> str | None:
        """Return the hash of the code."""
        if task_ctx is None:
            return None
        return getattr(task_ctx.task, "code", "") or hashing.code_of(task_ctx.task.fn)


class RunId(CachePolicy):
    """By the flow run, outside of flows by the task run."""

    def compute_key(
        self, task_ctx: TaskContext, inputs: Any, flow_parameters: Any, **kwargs: Any
    ) -> str | None:
        """Return the id."""
        if task_ctx is None:
            return None
        run = task_ctx.task_run
        return str(getattr(run, "flow_run_id", None) or run.id)


class FlowParameters(CachePolicy):
    """By the parameters of the flow run."""

    def compute_key(
        self, task_ctx: Any, inputs: Any, flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        """Return their hash; None if there are none.

        Raises
        ------
        ValueError
            If they have none, or if it is not known where the key is made.
        """
        reason = getattr(flow_parameters, "unknown_because", None)
        if reason is not None:
            raise ValueError(reason)
        if not flow_parameters:
            return None
        try:
            return hashing.stable_hash(flow_parameters)
        except ValueError as error:
            message = (
                f"Unable to create hash - a parameter of the flow cannot be part of a cache key: {error}."
            )
            raise ValueError(message) from error


class UnknownParameters:
    """Stands for the parameters of a flow of which a nested task knows nothing, not even their hash.

    Parameters
    ----------
    reason : str
        Why, and what to do.
    """

    def __init__(self, reason: str) -> None:
        self.unknown_because = reason


class CacheKeyFnPolicy(CachePolicy):
    """By what a function of `TaskContext` and arguments answers."""

    def __init__(self, cache_key_fn: Callable[..., str | None]) -> None:
        self.cache_key_fn = cache_key_fn

    def compute_key(
        self, task_ctx: TaskContext, inputs: dict[str, Any], flow_parameters: Any, **kwargs: Any
    ) -> str | None:
        """Return what the function answers."""
        return self.cache_key_fn(task_ctx, inputs)


def task_input_hash(context: TaskContext, arguments: dict[str, Any]) -> str | None:
    """Return a key made of the task's code and its arguments: for ``cache_key_fn``.

    >>> @task(cache_key_fn=task_input_hash)  # doctest: +SKIP
    ... def load(path): ...
    """
    return (INPUTS + TASK_SOURCE).compute_key(context, arguments, {}) or None


INPUTS = Inputs()
TASK_SOURCE = TaskSource()
RUN_ID = RunId()
FLOW_PARAMETERS = FlowParameters()
NO_CACHE = NONE = NoCache()
DEFAULT = INPUTS + TASK_SOURCE + RUN_ID


# -- what the engine asks of a policy -----------------------------------------------------------------

_BUILT_IN = (Inputs, TaskSource, RunId, FlowParameters)


def looks_at_values(policy: CachePolicy) -> bool:
    """Whether a policy is the user's own, and may do with arguments what it likes."""
    return any(
        type(one) not in _BUILT_IN
        and not (isinstance(one, CacheKeyFnPolicy) and one.cache_key_fn is task_input_hash)
        for one in _parts(policy)
    )


def needs(policy: CachePolicy, name: str) -> bool:
    """Whether an argument makes a difference to the key."""
    return any(
        (isinstance(one, Inputs) and name not in one.exclude)
        or isinstance(one, CacheKeyFnPolicy)
        or type(one) not in _BUILT_IN
        for one in _parts(policy)
    )


def heeds_parameters(policy: CachePolicy) -> bool:
    """Whether the parameters of the flow make a difference to the key."""
    return any(
        isinstance(one, FlowParameters) or type(one) not in (*_BUILT_IN, CacheKeyFnPolicy, NoCache)
        for one in _parts(policy)
    )


_heeding: list[str] = []  # policies of tasks of this process that heed parameters: it is enough to know one


def parameters_matter() -> bool:
    """Whether a task of this process was given a policy that heeds the parameters of the flow."""
    return bool(_heeding)


def lasts(policy: CachePolicy) -> bool:
    """Whether keys are the same in another flow run."""
    return not any(isinstance(one, RunId) for one in _parts(policy))


def full_key(
    policy: CachePolicy, context: TaskContext, inputs: dict[str, Any], flow_parameters: dict[str, Any]
) -> str | None:
    """Return the key of a call, for the storage.

    Two tasks never share what the built-in policies make: only a key of the user's own does that.
    """
    key = policy.compute_key(context, inputs, flow_parameters)
    if key is None:
        return None
    if looks_at_values(policy):
        return str(key)
    return f"{context.task.task_key.rpartition('-')[0]}:{key}"


# -- options --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What a task says about finding results again.

    Attributes
    ----------
    policy : CachePolicy, optional
        None where it says nothing: `DEFAULT`, if results are stored.
    key_fn : callable, optional
        Given instead of a policy.
    expiration : float, optional
        Seconds from the moment a result is stored.
    refresh : bool, optional
        Make the value again and store it in the place of the old one.
    in_memory : bool
        Whether a stored value is kept in memory, too.
    """

    policy: CachePolicy | None = None
    key_fn: Callable[..., str | None] | None = field(default=None, repr=False)
    expiration: float | None = None
    refresh: bool | None = None
    in_memory: bool = True

    @property
    def asks(self) -> bool:
        """Whether it says that results shall be found again, which needs them stored."""
        return self.policy is not None and not isinstance(self.policy, NoCache)


NOTHING_SAID = CacheOptions()


def read_cache_options(
    given: Any,
    key_fn: Any,
    expiration: Any,
    refresh: Any,
    in_memory: Any,
    persist: Any,
) -> CacheOptions:
    """Check what a user writes about caching.

    Parameters
    ----------
    given : CachePolicy, None or NOT_GIVEN
        The policy; None is `NO_CACHE`.
    key_fn, expiration, refresh, in_memory, persist
        The other options, as `Task` takes them.

    Raises
    ------
    ConfigurationError
        Naming the option and what it can be.
    """
    if given is not None and given is not NOT_GIVEN and not isinstance(given, CachePolicy):
        message = f"'cache_policy' must be a CachePolicy or None, got {given!r}."
        raise errors.ConfigurationError(message)
    if key_fn is not None and not callable(key_fn):
        message = f"'cache_key_fn' must be a function of context and arguments, got {key_fn!r}."
        raise errors.ConfigurationError(message)
    seconds = expiration.total_seconds() if isinstance(expiration, dt.timedelta) else expiration
    if seconds is not None and (
        isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds < 0
    ):
        message = f"'cache_expiration' must be a timedelta or a number of seconds, got {expiration!r}."
        raise errors.ConfigurationError(message)
    policy = NO_CACHE if given is None else None if given is NOT_GIVEN else given
    if key_fn is not None:
        if policy is not None and policy is not NO_CACHE:
            _warn("Both 'cache_policy' and 'cache_key_fn' are set: 'cache_key_fn' will be used.")
        policy = CachePolicy.from_cache_key_fn(key_fn)
    if persist is False:
        if policy is not None and policy is not NO_CACHE:
            _warn("Ignoring 'cache_policy' because 'persist_result' is False.")
        policy = NO_CACHE
    if policy is not None:
        _check_isolation(policy)
        if not _heeding and heeds_parameters(policy):
            _heeding.append(repr(policy))
    wished = None if refresh is None else bool(refresh)
    return CacheOptions(policy, key_fn, seconds, wished, bool(in_memory))


def _check_isolation(policy: CachePolicy) -> None:
    if policy.isolation_level is IsolationLevel.SERIALIZABLE and policy.lock_manager is None:
        message = (
            "Isolation level SERIALIZABLE is not supported by provided configuration. Give the policy a lock "
            "manager: .configure(lock_manager=FileSystemLockManager(directory))."
        )
        raise errors.ConfigurationError(message)


def check_locks(policy: CachePolicy, *, in_process: bool) -> None:
    """Refuse locks that would not hold.

    Raises
    ------
    ConfigurationError
        If tasks run in other processes, and the locks hold in one.
    """
    manager = policy.lock_manager
    serial = policy.isolation_level is IsolationLevel.SERIALIZABLE
    if serial and not in_process and not getattr(manager, "shared", True):
        message = (
            "Isolation level SERIALIZABLE is not supported by provided configuration: a MemoryLockManager "
            "cannot hold runs of other processes back; use FileSystemLockManager(directory)."
        )
        raise errors.ConfigurationError(message)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
