"""Results under a key of one's own: what a transaction with a key finds, and writes when it commits.

A record under a key is the same file that a task with this cache key would write and find.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penstock.engine import events, results
from penstock.engine.cache import IsolationLevel
from penstock.engine.locking import LockManager
from penstock.engine.results import ResultOptions, Storage
from penstock.runners.worker import result_store
from penstock.runners.worker.result_formats import CommitError


@dataclass(frozen=True, slots=True)
class ResultRecord:
    """What is stored under a key.

    Attributes
    ----------
    key : str
        Its key.
    result : object
        The value.
    """

    key: str
    result: Any


@dataclass(frozen=True, slots=True)
class ResultStore:
    """A storage of results, perhaps with locks.

    >>> ResultStore("…/results", lock_manager=FileSystemLockManager("…/locks"))  # doctest: +SKIP

    Parameters
    ----------
    result_storage : str, path or ResultStorage, optional
        A directory or any URL of fsspec; ``storage`` in ``PENSTOCK_HOME`` by default.
    lock_manager : LockManager, optional
        For transactions that are SERIALIZABLE.
    serializer : str, optional
        Name of a format; by the value if not given.

    Raises
    ------
    ConfigurationError
        If the storage or the serializer is none.
    """

    result_storage: Storage = None
    lock_manager: LockManager | None = None
    serializer: str | None = None
    _order: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what was given, and fill in what was not."""
        options = results.read_options(None, self.result_storage, None, self.serializer)
        object.__setattr__(self, "_order", _order(options))

    @classmethod
    def around(cls, outer: ResultOptions) -> ResultStore:
        """Return the store of a flow run: as it says, else as the settings say."""
        store = cls()
        object.__setattr__(store, "_order", _order(outer))
        return store

    def supports_isolation_level(self, level: IsolationLevel) -> bool:
        """Whether it has the locks that a level needs."""
        return level is not IsolationLevel.SERIALIZABLE or self.lock_manager is not None

    def exists(self, key: str) -> bool:
        """Whether there is a record under a key.

        Raises
        ------
        StorageRefused, MissingExtra
            If the storage cannot be read from here.
        """
        order = self._keyed(key)
        try:
            return result_store.peek(order, "", float("inf")) is not None
        except result_store.Damaged:  # it was set aside
            return False
        except CommitError as error:
            raise results.public_error(error) from error.__cause__

    def read(self, key: str) -> ResultRecord:
        """Return what is stored under a key.

        Raises
        ------
        MissingResult, ResultCorrupt, StorageRefused, MissingExtra
            If there is none, if it is damaged, if the storage cannot be read from here.
        """
        return ResultRecord(key, results.load_at(self._keyed(key)))

    def write(self, key: str, value: Any, *, overwrite: bool = False) -> None:
        """Store a value under a key; the first to come wins, unless it is to be overwritten.

        Raises
        ------
        UnserializableResult, StorageRefused, MissingExtra
            If the value does not fit the format, or the storage refuses.
        """
        order = {**self._keyed(key), "refresh": overwrite}
        try:
            result_store.commit(value, order, events.new_id(), 1)
        except CommitError as error:
            raise results.public_error(error) from error.__cause__

    def _keyed(self, key: str) -> dict[str, Any]:
        return {**self._order, "key": result_store.cache_place(key, None), "cache": key}


def read_store(given: Any) -> ResultStore:
    """Make a store of what a user writes.

    Raises
    ------
    ConfigurationError
        If it is no store, directory or URL.
    """
    return given if isinstance(given, ResultStore) else ResultStore(given)


def _order(options: ResultOptions) -> dict[str, Any]:
    full = options.over(results.defaults())
    assert full.storage is not None
    return {
        "storage": full.storage.url,
        "options": dict(full.storage.options),
        "format": full.serializer or "auto",
        "over": 0,
    }
