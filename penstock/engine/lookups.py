"""Whether a call has a stored result already: its key, and the look into the storage.

A key is made in the driver if everything that counts for it is known there: plain arguments by their
content, futures by the key of their producer. Then a hit takes no slot: the run is COMPLETED, "Cached",
and its value stays in the storage until somebody needs it, who reads it where he is. Otherwise the worker
makes the key (`keyed`), where the values are. Either way the worker looks before it calls the function:
another run may have stored the result in the meantime.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.engine import cache, hashing, payload, refs, results
from penstock.engine.cache import CachePolicy, NoCache, TaskContext, TaskInfo, TaskRunInfo
from penstock.engine.calls import FlowRun, TaskRun
from penstock.runners.worker import result_store
from penstock.runners.worker.sizes import size_of

if TYPE_CHECKING:
    from penstock.engine.session import Session
    from penstock.engine.task import Task

SLOW = 2.0
"""Seconds of hashing from which a task is told of it."""
READ_THROUGH = 64 << 20
"""Bytes of a stored file up to which its checksum is compared before a run is called a hit."""
LOOKS_AT_ONCE = 16
"""Requests to an object storage that are under way together."""
SMALL = 1 << 20
"""Bytes of flow parameters that are hashed for nested tasks though no task is known that asks for it."""

_warned: set[str] = set()


@dataclass(slots=True, eq=False)
class Sharing:
    """What all calls of a submit or a map have in common.

    Attributes
    ----------
    policy : CachePolicy
        In force.
    explicit : bool
        It was asked for: a key that cannot be made is an error, not just no key.
    task : TaskInfo
        For the policy.
    looks : bool
        The policy looks at values themselves.
    expires : float or None
        Seconds.
    refresh : bool
        Take no stored result.
    parameters : dict, Digest or UnknownParameters
        Of the flow, if they count.
    storage : ResultStorage or None
        If the policy brings one.
    lock : LockManager or None
        For one run at a time.
    in_process : bool
        Tasks run in this process.
    """

    policy: CachePolicy
    explicit: bool
    task: TaskInfo
    looks: bool
    expires: float | None
    refresh: bool
    parameters: Any
    storage: results.ResultStorage | None
    lock: Any
    in_process: bool
    _packed: dict[str, Any] | None = None

    @property
    def lasts(self) -> bool:
        """Whether keys are the same in another flow run."""
        return cache.lasts(self.policy)

    def wants(self, name: str) -> bool:
        """Whether an argument counts."""
        return self.looks or cache.needs(self.policy, name)

    def work(self) -> dict[str, Any]:
        """Return what a worker needs in order to make keys."""
        if self._packed is None:
            pack: Callable[[Any], Any] = (lambda one: one) if self.in_process else payload.dumps
            info = self.task
            plain = (info.name, info.task_key, info.code, info.version, info.description, info.tags)
            self._packed = {"policy": pack(self.policy), "task": plain, "parameters": pack(self.parameters)}
            if self.in_process:
                self._packed["function"] = info.fn
        return self._packed


@dataclass(slots=True, eq=False)
class Caching:
    """What caching means for one run.

    Attributes
    ----------
    sharing : Sharing or None
        None where only the place of the result is of interest.
    key : str or None
        The cache key, if it is known here.
    is_open : bool
        The worker has to make the key.
    place : str or None
        ``result_storage_key`` of the run, where it is made of parameters.
    """

    sharing: Sharing | None
    key: str | None = None
    is_open: bool = False
    place: str | None = None

    def extend(self, order: dict[str, Any], run: TaskRun) -> None:
        """Write into a commit order what the worker has to do about the cache."""
        if self.place is not None:
            order["key"] = results.inside(self.place)
        sharing = self.sharing
        if sharing is None or (self.key is None and not self.is_open):
            return
        if sharing.storage is not None:
            order["storage"], order["options"] = sharing.storage.url, dict(sharing.storage.options)
        order["expires"], order["refresh"] = sharing.expires, sharing.refresh
        if sharing.lock is not None:
            order["lock"] = sharing.lock if sharing.in_process else payload.dumps(sharing.lock)
        order["named"] = self.place is not None or run.task.options.results.key is not None
        order["folder"] = None if sharing.lasts else order["key"].rpartition("/")[0]
        if self.key is None:
            order["work"] = {**sharing.work(), "run": _described(run)}
        else:
            order["cache"] = self.key
            if not order["named"]:
                order["key"] = result_store.cache_place(self.key, order["folder"])


# -- what is in force -----------------------------------------------------------------------------


def sharing_of(task: Task[..., Any], flow_run: FlowRun | None, *, in_process: bool) -> Sharing | None:
    """Return what is in force for calls of a task; None, at once, if nothing is found or stored.

    Raises
    ------
    ConfigurationError
        If the locks of the policy would not hold on this runner.
    """
    own = task.options.results
    said = own.caching
    policy = said.policy
    if isinstance(policy, NoCache):
        return None
    outer = flow_run.results if flow_run is not None else results.NOTHING
    if not results.wish_of(own, outer):
        return None
    refreshes, disabled, no_default, _ = outer.switches or results.switches()
    if disabled:
        return None
    if policy is None:
        if no_default or own.key is not None:
            return None
        policy = cache.DEFAULT
    cache.check_locks(policy, in_process=in_process)
    serial = policy.isolation_level is cache.IsolationLevel.SERIALIZABLE
    return Sharing(
        policy,
        said.policy is not None,
        _task_info(task),
        cache.looks_at_values(policy),
        said.expiration,
        refreshes if said.refresh is None else said.refresh,
        _parameters(flow_run, policy),
        results.read_storage(policy.key_storage),
        policy.lock_manager if serial else None,
        in_process,
    )


def _task_info(task: Task[..., Any]) -> TaskInfo:
    known = task.__dict__
    code = known.get("_code")
    if code is None:
        code = known["_code"] = hashing.code_of(task.fn)
    kind: Any = task.fn if hasattr(task.fn, "__qualname__") else type(task.fn)
    place = f"{task.module}.{kind.__qualname__}"
    options = task.options
    return TaskInfo(
        options.name,
        f"{place}-{code[:8]}",
        task.fn,
        code,
        options.version,
        options.description,
        options.tags,
    )


def _parameters(flow_run: FlowRun | None, policy: CachePolicy) -> Any:
    """Return the parameters of a flow as a policy needs them: not at all, their hash, or themselves."""
    if flow_run is None or not cache.heeds_parameters(policy):
        return {}
    if flow_run.digest is not None:
        return flow_run.digest
    if cache.looks_at_values(policy) or not flow_run.parameters:
        return flow_run.parameters
    try:
        return _digest(flow_run)
    except ValueError:  # what has none is named where the key is made
        return flow_run.parameters


_digests: weakref.WeakKeyDictionary[FlowRun, hashing.Digest] = weakref.WeakKeyDictionary()


def _digest(flow_run: FlowRun) -> hashing.Digest:
    """Hash the parameters of a flow run, once."""
    found = _digests.get(flow_run)
    if found is None:
        begun = time.perf_counter()
        found = _digests[flow_run] = hashing.digest(flow_run.parameters)
        took = time.perf_counter() - begun
        if took > SLOW:
            _once(
                f"hashing the parameters of flow {flow_run.flow.name!r} for cache keys took {took:.1f} s; pass "
                "a large one as a path or URL, or use a policy that leaves FLOW_PARAMETERS out."
            )
    return found


def parameters_digest(flow_run: FlowRun) -> str | None:
    """Return what nested tasks in other processes need to know of a flow's parameters, for their cache keys.

    Returns
    -------
    str or None
        None if the flow has none. Their hash; or ``!`` and why it is not known: they have no content to
        hash, or they are large while no task is known that needs it.
    """
    known = flow_run.digest
    if known is not None:
        return _told(known)
    parameters: Any = flow_run.parameters
    if not parameters:
        return None
    if not cache.parameters_matter() and size_of(parameters) > SMALL:
        return _told(cache.UnknownParameters(_NOT_HASHED))
    try:
        return _told(_digest(flow_run))
    except ValueError as error:
        reason = f"Unable to create hash - a parameter of the flow cannot be part of a cache key: {error}."
        return _told(cache.UnknownParameters(reason[:300]))


_NOT_HASHED = (
    "Unable to create hash - the parameters of the flow are large, and were not hashed, since no task with "
    "FLOW_PARAMETERS is known where the flow runs. Define the task there, too: at the top of a module that "
    "the flow imports."
)


def _told(known: hashing.Digest | cache.UnknownParameters) -> str:
    """Write what is known of the parameters, in the few bytes that go along with every task."""
    if isinstance(known, hashing.Digest):
        return known.text
    reason = known.unknown_because
    return "!" if reason == _NOT_HASHED else f"!{reason}"


def read_digest(told: str | None) -> hashing.Digest | cache.UnknownParameters | None:
    """Read what `parameters_digest` wrote."""
    if told is None:
        return None
    return cache.UnknownParameters(told[1:] or _NOT_HASHED) if told.startswith("!") else hashing.Digest(told)


# -- keys in the driver ---------------------------------------------------------------------------


def plan(run: TaskRun, bound: inspect.BoundArguments, *, in_process: bool) -> None:
    """Make the key of a call, as far as it can be made here.

    Parameters
    ----------
    run : TaskRun
        New; gets `TaskRun.caching` if there is anything to be found or stored.
    bound : BoundArguments
        What it is called with.
    in_process : bool
        It runs in this process.

    Raises
    ------
    ValueError
        If a policy was asked for, and an argument cannot be part of a key.
    """
    sharing = sharing_of(run.task, run.flow_run, in_process=in_process)
    named = _is_named(run)
    if sharing is None and not named:
        return
    arguments = _with_defaults(bound)
    place = _place(run, arguments) if named else None
    run.caching = Caching(sharing, place=place)
    if sharing is not None:
        inputs, known = _inputs(arguments, sharing)
        _make_key(run, run.caching, inputs, known=known)


class MapPlan:
    """Makes the keys of the elements of a map; what all of them get is hashed once.

    Parameters
    ----------
    task : Task
        What is mapped.
    flow_run : FlowRun or None
        Around it.
    in_process : bool
        Elements run in this process.
    """

    def __init__(self, task: Task[..., Any], flow_run: FlowRun | None, *, in_process: bool) -> None:
        self._task = task
        self._sharing = sharing_of(task, flow_run, in_process=in_process)
        self._hashed: dict[Any, tuple[Any, bool]] = {}

    def needed(self, run: TaskRun) -> bool:
        """Whether there is anything to do for the elements."""
        return self._sharing is not None or _is_named(run)

    def element(self, run: TaskRun, given: dict[int | str, Any], same: dict[int | str, Any]) -> None:
        """Make the key of one element.

        Parameters
        ----------
        run : TaskRun
            The element.
        given : dict
            Its arguments by position or keyword, in the order of the call.
        same : dict
            Those of them that every element gets.
        """
        args = [given[place] for place in given if isinstance(place, int)]
        kwargs = {place: given[place] for place in given if isinstance(place, str)}
        bound = self._task.signature.bind(*args, **kwargs)
        place = _place(run, _with_defaults(bound)) if _is_named(run) else None
        run.caching = Caching(self._sharing, place=place)
        if self._sharing is None:
            return
        if self._hashed.keys() != same.keys():
            self._hashed = {name: self._once(value) for name, value in same.items()}
        hashed = {name: self._hashed[name][0] if name in same else value for name, value in given.items()}
        known = all(known for _, known in self._hashed.values())
        args = [hashed[one] for one in given if isinstance(one, int)]
        kwargs = {one: hashed[one] for one in given if isinstance(one, str)}
        arguments = _with_defaults(self._task.signature.bind(*args, **kwargs))
        inputs, all_known = _inputs(arguments, self._sharing)
        _make_key(run, run.caching, inputs, known=known and all_known)

    def _once(self, value: Any) -> tuple[Any, bool]:
        sharing = self._sharing
        assert sharing is not None
        found, known = _known(value, sharing)
        if sharing.looks or not known:
            return (found, known)
        try:
            return hashing.digest(found), True
        except ValueError:  # it is named where each key is made, if it counts at all
            return value, True


class Item:
    """An item of the value of a run, among the inputs of an element."""

    def __init__(self, run: TaskRun, index: int) -> None:
        self.run = run
        self.index = index


def _with_defaults(bound: inspect.BoundArguments) -> dict[str, Any]:
    full = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    full.apply_defaults()
    return dict(full.arguments)


def _inputs(arguments: dict[str, Any], sharing: Sharing) -> tuple[dict[str, Any], bool]:
    """Put keys in the place of futures; answer whether all that counts is known."""
    known = True
    inputs: dict[str, Any] = {}
    for name, value in arguments.items():
        inputs[name], is_known = _known(value, sharing)
        known = known and (is_known or not sharing.wants(name))
    return inputs, known


def _known(value: Any, sharing: Sharing) -> tuple[Any, bool]:
    known = True

    def leaf(item: Any, tolerant: int) -> Any:
        nonlocal known
        part = isinstance(item, Item)
        upstream = item.run if part else _run_of(item)
        if upstream is None:
            return item
        key = None if tolerant or sharing.looks else lineage(upstream, sharing)
        if key is None:
            known = False
            return item
        parts = ("lineage", key, item.index) if part else ("lineage", key)
        return hashing.Digest(hashing.stable_hash(*parts))

    return refs.replace(value, leaf), known


def _run_of(value: Any) -> TaskRun | None:
    """Return the run behind a future, or a state, without knowing these classes."""
    run = getattr(value, "_run", None)
    if run is None and hasattr(value, "state_details"):
        run = getattr(getattr(value, "data", None), "run", None)
    return run if isinstance(run, TaskRun) else None


def lineage(run: TaskRun, sharing: Sharing) -> str | None:
    """Return the key that stands for the value of a run among the inputs of another.

    None if it has none, if another value may come to stand under it, or if it is only good for one flow
    run while the other's is to last.
    """
    made = run.caching
    if made is None or made.key is None or made.sharing is None:
        return None
    if made.sharing.refresh or made.sharing.expires is not None:
        return None
    if sharing.lasts and not made.sharing.lasts:
        return None
    key: str = made.key
    return key


def _described(run: TaskRun) -> tuple[Any, ...]:
    flow = run.flow_run
    return (flow.id, flow.name, run.tags) if flow is not None else (None, "", run.tags)


def _make_key(run: TaskRun, made: Caching, inputs: dict[str, Any], *, known: bool) -> None:
    sharing = made.sharing
    assert sharing is not None
    if not known:
        made.is_open = True
        return
    flow = run.flow_run
    about = TaskRunInfo(run.id, run.name, flow.id if flow else None, flow.name if flow else "", run.tags)
    begun = time.perf_counter()
    try:
        made.key = cache.full_key(
            sharing.policy, TaskContext(sharing.task, about), inputs, sharing.parameters
        )
    except ValueError as error:
        if sharing.explicit:
            raise ValueError(f"{run.task.name}: {error}") from error
        _once(f"{run.task.name}: its results are stored, but not found again: {error}")
    took = time.perf_counter() - begun
    if took > SLOW:
        _once(slow(run.task.name, took))


def slow(name: str, seconds: float) -> str:
    """Return what is said where hashing takes long."""
    return (
        f"hashing the arguments of task {name!r} for its cache key took {seconds:.1f} s; leave a large one "
        "out with cache_policy=INPUTS - 'argument', or say what counts with cache_key_fn."
    )


def _once(message: str) -> None:
    about = message.partition("took")[0]
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, UserWarning, stacklevel=6)


# -- places that are made of parameters -----------------------------------------------------------------


def _is_named(run: TaskRun) -> bool:
    template = run.task.options.results.key
    return template is not None and "{parameters" in template


def _place(run: TaskRun, arguments: dict[str, Any]) -> str:
    """Fill parameters into ``result_storage_key``; the rest is filled in by `results`.

    Raises
    ------
    ConfigurationError
        If a parameter of the template does not exist, or is a future.
    """
    return results.fill_place(run, {name: _plain(name, value, run) for name, value in arguments.items()})


def _plain(name: str, value: Any, run: TaskRun) -> Any:
    return f"{{{name}}}" if _run_of(value) is not None else value


# -- looking ----------------------------------------------------------------------------------------


def find(session: Session, runs: Sequence[TaskRun]) -> None:
    """Look for the stored results of runs whose keys are known; a hit is noted in `TaskRun.hit`.

    Parameters
    ----------
    session : Session
        Who is going to carry them.
    runs : sequence of TaskRun
        Of one submit or map.
    """
    if runs[0].caching is None or session.plans:
        return
    wanted = [run for run in runs if _is_worth_a_look(run)]
    if not wanted:
        return
    orders = [results.commit_order(run) for run in wanted]
    remote = [order for order in orders if order is not None and "://" in order["storage"]]
    if len(remote) > 1:
        with ThreadPoolExecutor(LOOKS_AT_ONCE, "penstock-lookup") as pool:
            found = list(pool.map(_peek, [session] * len(wanted), wanted, orders))
    else:
        found = [_peek(session, run, order) for run, order in zip(wanted, orders, strict=True)]
    for run, (hit, problem) in zip(wanted, found, strict=True):
        run.hit = hit
        if problem:
            session.journal.lines(run, [[time.time(), "WARNING", problem]], 0)


def _is_worth_a_look(run: TaskRun) -> bool:
    made = run.caching
    if made is None or made.key is None or run.done:  # the last: before its flow run was resumed
        return False
    return made.sharing is not None and not made.sharing.refresh


def _peek(session: Session, run: TaskRun, order: Any) -> tuple[dict[str, Any] | None, str]:
    if order is None or "cache" not in order:
        return None, ""
    limit = float("inf") if session.in_process else READ_THROUGH
    try:
        return result_store.peek(order, run.id, limit), ""
    except result_store.Damaged as error:
        return None, f"CacheCorrupt: {error}; the value is made again"
    except Exception:  # the driver cannot reach it: perhaps workers can
        return None, ""


def is_stored(run: TaskRun | None) -> bool:
    """Whether the value of a run lies in a storage, and nowhere else."""
    return run is not None and run.hit is not None and run.ref is None and run.completed


def where(run: TaskRun) -> dict[str, Any]:
    """Return what `result_store.load` takes for the value of a run."""
    return results.whereabouts(run)


# -- keys on the worker -------------------------------------------------------------------------------


def keyed(order: dict[str, Any], running: Any, function: Any, args: Any, kwargs: Any) -> str | None:
    """Make the key of a run where its values are; called by `worker.commit`.

    Parameters
    ----------
    order : dict
        The commit order, with ``work``.
    running : Running
        The attempt; gets a line in its log if this takes long.
    function : callable
        The task's.
    args, kwargs
        What it is about to be called with.

    Raises
    ------
    ValueError
        If an argument cannot be part of a key.
    """
    work = order["work"]
    policy: CachePolicy = _unpacked(work["policy"])
    name, task_key, code, version, description, tags = work["task"]
    task = TaskInfo(name, task_key, function, code, version, description, tags)
    flow_run, flow_run_name, run_tags = work["run"]
    run = TaskRunInfo(running.order["run"], running.order["name"], flow_run, flow_run_name, run_tags)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
        inputs = _with_defaults(bound)
    except (TypeError, ValueError):  # some functions of C tell nothing
        inputs = {"args": list(args), **kwargs}
    begun = time.perf_counter()
    key = cache.full_key(policy, TaskContext(task, run), inputs, _unpacked(work["parameters"]))
    took = time.perf_counter() - begun
    if took > SLOW:
        running.log("WARNING", slow(name, took))
    return key


def _unpacked(value: Any) -> Any:
    return pickle.loads(value) if isinstance(value, bytes) else value


def with_key(order: dict[str, Any], running: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return the commit order of a direct call with its cache key; None if it has none."""
    if "work" not in order:
        return None
    key = keyed(order, running, order["work"]["function"], args, kwargs)
    if key is None:
        return None
    named = {} if order["named"] else {"key": result_store.cache_place(key, order["folder"])}
    return {**order, **named, "cache": key}


def locked(order: dict[str, Any], running: Any) -> bool:
    """Take the lock of a key, if there is one, without waiting; answer whether that went well."""
    manager = order.get("lock")
    if manager is None:
        return True
    holder = f"{running.order['run']}-{running.order['attempt']}"
    if not manager.acquire_lock(order["cache"], holder, 0):
        return False
    running.unlock = functools.partial(manager.release_lock, order["cache"], holder)
    return True
