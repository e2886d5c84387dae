"""Results that outlive the memory of their worker: who wants them, where they go, how they come back.

The worker writes them (`penstock.runners.worker.result_store`), before it says that it has completed; no
byte passes through the driver. Here a work order gets its commit target, and a stored copy takes
the place of a value that is gone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from penstock import errors
from penstock.engine.cache import NOTHING_SAID, CacheOptions
from penstock.engine.states import Stored
from penstock.runners.worker import result_formats, result_store
from penstock.runners.worker.commit import commit
from penstock.settings import settings

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun, TaskRun

Persistence: TypeAlias = bool | Literal["large"] | None
Switches: TypeAlias = tuple[bool, bool, bool, Persistence]


@dataclass(frozen=True, slots=True)
class ResultStorage:
    """A storage for results whose file system needs options.

    >>> ResultStorage("s3://bucket/results", {"endpoint_url": "…"})  # doctest: +SKIP

    Parameters
    ----------
    url : str
        Any URL of fsspec, or a directory.
    options : mapping
        Options of the fsspec file system. They travel to the workers; the record does not get them.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)


Storage: TypeAlias = str | os.PathLike[str] | ResultStorage | None


@dataclass(frozen=True, slots=True)
class ResultOptions:
    """What a task, or a flow for its tasks, says about results; None where it says nothing.

    Attributes
    ----------
    persist : bool or "large", optional
        Whether to store them; "large": from ``PENSTOCK_LARGE_ARGUMENT`` bytes.
    storage : ResultStorage, optional
        Where.
    key : str, optional
        Template for the place in the storage.
    serializer : str or tuple, optional
        Name of the format; ``("custom", pickle, name)`` of an object of the user.
    caching : CacheOptions
        Of a task: whether results are found again.
    switches : tuple, optional
        Of a flow run on a worker: what the driver's settings say, see `switches`.
    """

    persist: Persistence = None
    storage: ResultStorage | None = None
    key: str | None = None
    serializer: Any = None
    caching: CacheOptions = NOTHING_SAID
    switches: Switches | None = None

    @property
    def wish(self) -> Persistence:
        """Whether results are stored: who says where, or how, wants it."""
        if self.persist is not None:
            return self.persist
        return True if self.storage or self.key or self.serializer or self.caching.asks else None

    def over(self, outer: ResultOptions) -> ResultOptions:
        """Fill what is not said here from what surrounds it."""
        return ResultOptions(
            outer.wish if self.wish is None else self.wish,
            self.storage or outer.storage,
            self.key,
            self.serializer or outer.serializer,
            self.caching,
            self.switches or outer.switches,
        )

    def pack(self) -> tuple[Any, ...]:
        """Return primitives for nested code on workers, whose settings may be others."""
        full = self.over(defaults())
        storage = full.storage
        assert storage is not None
        said = full.switches or switches()
        return full.wish, storage.url, dict(storage.options), full.serializer, said


def unpack(packed: tuple[Any, ...] | None) -> ResultOptions:
    """Read what `ResultOptions.pack` wrote."""
    if packed is None:
        return ResultOptions()
    persist, url, options, serializer, said = packed
    return ResultOptions(persist, ResultStorage(url, options), None, serializer, switches=said)


def switches() -> Switches:
    """Return what the settings say of all tasks.

    Returns
    -------
    tuple
        Whether they refresh every cached result, switch caching off, and take the default policy away; and
        whether results are stored where a task does not say it itself (None: as its flow says).
    """
    known = settings()
    persist = _WORDS[known.tasks_default_persist_result]
    return known.tasks_refresh_cache, known.tasks_disable_caching, known.tasks_default_no_cache, persist


_WORDS: dict[str, Persistence] = {"": None, "true": True, "false": False, "large": "large"}


def wish_of(own: ResultOptions, outer: ResultOptions) -> Persistence:
    """Whether the results of a task are stored: as it says, the setting for tasks, its flow, the setting for all.

    Parameters
    ----------
    own, outer : ResultOptions
        Of the task, and of the flow run around it.

    Returns
    -------
    bool or "large"
    """
    said = own.wish
    if said is None:  # on a worker the settings of the driver count
        known = settings().tasks_default_persist_result
        said = outer.switches[3] if outer.switches is not None else _WORDS[known]
    if said is None:
        said = outer.wish
    return _WORDS[settings().results_persist_by_default] if said is None else said


def defaults() -> ResultOptions:
    """Return what the settings say."""
    known = settings()
    persist = _WORDS[known.results_persist_by_default]
    storage = ResultStorage(known.default_result_storage or str(known.home / "storage"))
    return ResultOptions(persist, storage, None, known.results_default_serializer)


NOTHING = ResultOptions()


def read_options(
    persist: Persistence,
    storage: Storage,
    key: str | None = None,
    serializer: Any = None,
    caching: CacheOptions = NOTHING_SAID,
) -> ResultOptions:
    """Check what a user writes about results.

    Raises
    ------
    ConfigurationError
        Naming the option and what it can be.
    """
    if persist is not None and not isinstance(persist, bool) and persist != "large":
        message = f"'persist_result' must be True, False, None or 'large', got {persist!r}."
        raise errors.ConfigurationError(message)
    if (
        serializer is not None
        and not isinstance(serializer, tuple)
        and serializer not in result_formats.NAMES
    ):
        names = ", ".join(repr(name) for name in result_formats.NAMES)
        message = f"'result_serializer' must be one of {names}, or an object with 'dumps' and 'loads', got {serializer!r}."
        raise errors.ConfigurationError(message)
    if key is not None:
        _check_key(key)
    return ResultOptions(persist, read_storage(storage), key, serializer, caching)


def read_storage(storage: Any) -> ResultStorage | None:
    """Check what a user writes about a storage.

    Raises
    ------
    ConfigurationError
        If it is no directory, URL or `ResultStorage`.
    """
    if storage is None:
        return None
    if isinstance(storage, ResultStorage):
        plain = read_storage(storage.url)
        return replace(storage, url=plain.url) if plain is not None else None
    options = getattr(storage, "storage_options", None)  # a UPath knows those of its file system
    if isinstance(options, Mapping) and "://" in str(storage):
        return ResultStorage(str(storage), dict(options))
    if not isinstance(storage, (str, os.PathLike)) or not str(storage):
        message = f"'result_storage' must be a directory, a URL or a ResultStorage, got {storage!r}."
        raise errors.ConfigurationError(message)
    text = str(storage)
    if text.startswith(("file://", "local://")):
        text = text.partition("://")[2]
    return ResultStorage(text if "://" in text else str(Path(text).expanduser().absolute()))


def _check_key(template: Any) -> None:
    try:
        assert isinstance(template, str) and template  # noqa: PT018
        made = _format_key(_PARAMETERS.sub("p", template), "r", "n", "f", "m", "t", 0)
    except Exception as error:
        message = (
            "'result_storage_key' must be a template of {task_run.id}, {task_run.name}, {flow_run.id}, "
            f"{{flow_run.name}}, {{task.name}}, {{index}} and {{parameters[…]}}, got {template!r} ({type(error).__name__}: {error})."
        )
        raise errors.ConfigurationError(message) from None
    if made.startswith("/") or ".." in made.split("/"):
        raise errors.ConfigurationError(f"'result_storage_key' must stay in the storage, got {template!r}.")


_PARAMETERS = re.compile(r"\{parameters[^{}]*\}")


def _format_key(
    template: str, run: str, name: str, flow_run: str, flow_run_name: str, task: str, index: int
) -> str:
    return template.format(
        task_run=SimpleNamespace(id=run, name=name),
        flow_run=SimpleNamespace(id=flow_run, name=flow_run_name),
        task=SimpleNamespace(name=task),
        index=index,
    )


# -- to the worker --------------------------------------------------------------------------


def commit_order(run: TaskRun) -> dict[str, Any] | None:
    """Return what the worker has to know in order to store the result of a run; None if it has not to.

    Without a ``result_storage_key`` it is the same for all elements of a map.
    """
    own: ResultOptions | None = getattr(run.task.options, "results", None)
    if own is None or not run.tracked:
        return None
    outer = run.flow_run.results if run.flow_run is not None else ResultOptions()
    wish = wish_of(own, outer)
    if not wish:
        return None
    full = own.over(outer).over(defaults())
    order = _order(full, _key(run, own.key), wish)
    if run.caching is not None:
        run.caching.extend(order, run)
    if run.transaction is not None and run.transaction.holds_back(order):
        order["staged"] = True
    return order


def _order(full: ResultOptions, key: str, wish: Persistence) -> dict[str, Any]:
    assert full.storage is not None
    return {
        "storage": full.storage.url,
        "options": dict(full.storage.options),
        "key": key,
        "format": full.serializer or "auto",
        "over": settings().large_argument if wish == "large" else 0,
    }


def fill_place(run: TaskRun, parameters: Mapping[str, Any]) -> str:
    """Return the place that a template with parameters makes for a run.

    Raises
    ------
    ConfigurationError
        If the template asks for a parameter that there is not.
    """
    template = run.task.options.results.key
    assert template is not None
    try:
        filled = _PARAMETERS.sub(lambda match: _text_of(match[0], parameters), template)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        message = (
            f"'result_storage_key' {template!r} of {run.task.name!r} does not fit its parameters ({reason})."
        )
        raise errors.ConfigurationError(message) from error
    flow = run.flow_run
    folder, name = (flow.id, flow.name) if flow is not None else (run.root, "")
    return _format_key(filled, "{run}", run.name, folder, name, run.task.name, run.index)


def _text_of(field: str, parameters: Mapping[str, Any]) -> str:
    """Format a parameter; braces in it are text, and it is one folder or file."""
    text = field.format(parameters=parameters)
    return text.replace("/", "_").replace("{", "{{").replace("}", "}}")


def inside(place: str) -> str:
    """Return a place that stays in its storage, whatever the names in it."""
    return "/".join("_" if part in {"", ".", ".."} else part for part in place.split("/"))


def _key(run: TaskRun, template: str | None) -> str:
    flow = run.flow_run
    folder = flow.id if flow is not None else run.root
    if template is None:
        return f"{folder}/{{run}}"
    name = flow.name if flow is not None else ""
    if "{parameters" in template:  # filled in when the call was made (`lookups`)
        return ""
    made = _format_key(template, "{run}", run.name, folder, name, run.task.name, run.index)
    return inside(made)  # names of runs are free text: none may leave the storage


# -- back -----------------------------------------------------------------------------------


def location(stored: Mapping[str, Any]) -> str:
    """Return where a result lies, as the record shows it and `load_result` takes it."""
    return f"{str(stored['storage']).rstrip('/')}/{stored['key']}{result_store.EXTENSION}"


def order_at(where: str, order: Mapping[str, Any]) -> dict[str, Any]:
    """Return a commit order for the place that `location` told of a run."""
    storage, whole = str(order["storage"]).rstrip("/"), where.removesuffix(result_store.EXTENSION)
    if whole.startswith(f"{storage}/"):
        return {**order, "key": whole[len(storage) + 1 :]}
    other, _, key = whole.rpartition("/")  # the settings are others today
    return {**order, "storage": other, "options": {}, "key": key}


def load(run: TaskRun) -> Any:
    """Return the stored copy of a run's value.

    Parameters
    ----------
    run : TaskRun
        Completed.

    Raises
    ------
    MissingResult
        If it was not stored, or the copy is gone.
    ResultCorrupt
        If the copy is damaged.
    StorageRefused, MissingExtra
        If the storage cannot be read from here.
    """
    if run.stored is None:
        message = (
            f"the value of task run {run.name!r} ({run.id}) was kept in memory only, and is gone; "
            "ask for it while its runner is open, or store it: @task(persist_result=True)."
        )
        raise errors.MissingResult(message).of_run(run.id)
    return _load(whereabouts(run), run.stored["run"])


def whereabouts(run: TaskRun) -> dict[str, Any]:
    """Return where the stored value of a run lies, as `result_store.load` takes it."""
    stored = run.stored
    assert stored is not None
    own = run.task.options.results
    outer = run.flow_run.results if run.flow_run is not None else NOTHING
    storages = [own.over(outer).storage]
    if run.caching is not None and run.caching.sharing is not None:
        storages.append(run.caching.sharing.storage)
    options = next((dict(one.options) for one in storages if one and one.url == stored["storage"]), {})
    return {**stored, "options": options}


def load_result(where: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Any:
    """Return a stored result, also of a run of another day.

    It is unpickled where it was pickled: load only what you trust.

    >>> load_result("…/storage/0199…/0199….result")  # doctest: +SKIP

    Parameters
    ----------
    where : str or path
        The location that ``penstock runs show`` prints.
    options : mapping, optional
        Options of the fsspec file system, for a URL.

    Raises
    ------
    MissingResult, ResultCorrupt, StorageRefused
        If there is none, if it is damaged, if it cannot be read.
    """
    text = str(where).removesuffix(result_store.EXTENSION)
    storage, _, key = text.rpartition("/")
    return _load({"storage": storage or ".", "key": key, "options": dict(options or {})}, None)


def _load(where: dict[str, Any], run_id: str | None) -> Any:
    about = f"task run {run_id}: " if run_id else ""
    try:
        return result_store.load(where, run_id)
    except result_store.Absent as error:
        message = f"{about}{error}; a directory must be one that driver and workers share."
        raise errors.MissingResult(message).of_run(run_id) from None
    except result_store.Damaged as error:
        raise errors.ResultCorrupt(f"{about}{error}.").of_run(run_id) from None
    except result_formats.CommitError as error:
        raise public_error(error, run_id) from error.__cause__


def load_at(where: dict[str, Any]) -> Any:
    """Return what lies at a place, whoever wrote it; raises as `load_result` does."""
    return _load(where, None)


def public_error(error: Exception, run_id: str | None = None) -> errors.PenstockError:
    """Return what users see of an error of a result storage."""
    about = f"task run {run_id}: " if run_id else ""
    kind: type[errors.PenstockError] = getattr(errors, error._penstock_error)  # type: ignore[attr-defined]
    raised = kind(f"{about}{error}")
    if isinstance(raised, errors.RunError):
        raised.of_run(run_id)
    return raised


def put_away(flow_run: FlowRun, value: Any) -> Any:
    """Store what a flow has returned, if its results are stored.

    Returns
    -------
    object
        A `PutAway` that reads it again; the value itself if nothing was stored.

    Raises
    ------
    UnserializableResult, StorageRefused, MissingExtra
        If it cannot be stored.
    """
    wish = wish_of(flow_run.results, NOTHING)
    if not wish:
        return value
    order = _order(flow_run.results.over(defaults()), f"{flow_run.id}/{{run}}", wish)
    try:
        _, stored = commit(value, order, flow_run.id, flow_run.position.attempt)
    except result_formats.CommitError as error:
        raise public_error(error, flow_run.id) from error.__cause__
    return value if stored is None else PutAway({**stored, "options": order["options"]}, flow_run.id)


class PutAway(Stored):
    """What a flow has returned and nobody keeps in memory.

    Attributes
    ----------
    where : dict
        See `result_store.load`.
    """

    keeps = False

    def __init__(self, where: dict[str, Any], run_id: str) -> None:
        self.where = where
        self._run_id = run_id

    def load(self) -> Any:
        """Read it again."""
        return _load(self.where, self._run_id)
