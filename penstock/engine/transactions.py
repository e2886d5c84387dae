"""Transactions: groups of task runs that succeed together, or are taken back together.

A block waits at its end for the runs that were submitted in it, no bytes move, and then decides: it
commits, children first, or rolls back, the last first. What code the user attaches runs where the
block ends. Task runs as parts of a transaction are `run_transactions`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import time
from collections.abc import Iterable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from penstock import errors
from penstock.engine import cancelling, context, deciding, events, locking, nested, payload, waiting
from penstock.engine.cache import NOT_GIVEN, IsolationLevel
from penstock.engine.hooks import Hook
from penstock.engine.result_records import ResultRecord, ResultStore, read_store
from penstock.engine.results import ResultOptions
from penstock.engine.steps import Sleep, Steps, drive, drive_awaiting
from penstock.engine.transaction_states import OVER, CommitMode, TransactionState, read_word
from penstock.runners.worker.running import current as running_attempt

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.context import Scope

log = logging.getLogger("penstock.transactions")


class Transaction:
    """A group of task runs and nested transactions; make one with `transaction`.

    Parameters
    ----------
    key, store, commit_mode, isolation_level, overwrite, write_on_commit, logger
        See `transaction`.

    Attributes
    ----------
    state : TransactionState
        Where it stands.
    children : list of Transaction
        Nested ones and task runs, in order.
    on_commit_hooks, on_rollback_hooks : list of callable
        Called with the transaction.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_holder",
        "_logger",
        "_noted",
        "_parent",
        "_running",
        "_scope",
        "_token",
        "_value",
        "_values",
        "children",
        "commit_mode",
        "isolation_level",
        "key",
        "on_commit_hooks",
        "on_rollback_hooks",
        "overwrite",
        "state",
        "store",
        "write_on_commit",
    )

    def __init__(
        self,
        key: str | None = None,
        store: Any = None,
        commit_mode: CommitMode | str | None = None,
        isolation_level: IsolationLevel | str | None = None,
        overwrite: bool = False,
        write_on_commit: bool = True,
        logger: logging.Logger | logging.LoggerAdapter[Any] | None = None,
    ) -> None:
        self.key = key
        self.store: ResultStore | None = None if store is None else read_store(store)
        self.commit_mode = read_word(CommitMode, commit_mode, "commit_mode")
        self.isolation_level = read_word(IsolationLevel, isolation_level, "isolation_level")
        self.overwrite = overwrite
        self.write_on_commit = write_on_commit
        self.state = TransactionState.PENDING
        self.children: list[Transaction] = []
        self.on_commit_hooks: list[Hook] = []
        self.on_rollback_hooks: list[Hook] = []
        self._logger = logger
        self._parent: Transaction | None = None
        self._running: Any = None  # the attempt whose code has opened it, None in the driver's own
        self._scope: Scope | None = None
        self._token: Token[Transaction | None] | None = None
        self._closed = False  # decided: runs can join it no more
        self._holder = ""  # of its lock
        self._value: Any = None
        self._values: dict[str, Any] = {}  # never changed in place: children share it
        self._noted: tuple[str, ...] = ()  # which of them were set here

    def __repr__(self) -> str:
        """Show key and state."""
        about = "" if self.key is None else f" {self.key!r}"
        return f"<Transaction{about} {self.state}>"

    # -- what users ask ---------------------------------------------------------------------------
    def set(self, name: str, value: Any) -> None:
        """Keep a value for hooks, nested transactions and tasks that are called from now on."""
        self._values = {**self._values, name: value}
        self._noted = (*self._noted, name)

    def get(self, name: str, default: Any = NOT_GIVEN) -> Any:
        """Return a value that was set here, or in an outer transaction before this one began.

        Raises
        ------
        ValueError
            If there is none, and no default.
        """
        if name in self._values:
            return self._values[name]
        if default is not NOT_GIVEN:
            return default
        raise ValueError(f"Could not retrieve value for unknown key: {name}")

    def is_pending(self) -> bool:
        """Whether it has not begun."""
        return self.state is TransactionState.PENDING

    def is_active(self) -> bool:
        """Whether its code runs."""
        return self.state is TransactionState.ACTIVE

    def is_staged(self) -> bool:
        """Whether it waits for the end of the outer one."""
        return self.state is TransactionState.STAGED

    def is_committed(self) -> bool:
        """Whether it is final; in the block: whether there is a record under its key already."""
        return self.state is TransactionState.COMMITTED

    def is_rolled_back(self) -> bool:
        """Whether it was taken back."""
        return self.state is TransactionState.ROLLED_BACK

    def read(self) -> ResultRecord | None:
        """Return the record under the key, with the value as ``result``; None if there is none.

        Raises
        ------
        ResultCorrupt, StorageRefused
            If it is damaged, or cannot be read from here.
        """
        if self.key is None or self.store is None or not self.store.exists(self.key):
            return None
        return self.store.read(self.key)

    def stage(
        self,
        value: Any,
        on_rollback_hooks: Iterable[Hook] | None = None,
        on_commit_hooks: Iterable[Hook] | None = None,
    ) -> None:
        """Give the transaction the value that is stored under its key when it commits, and hooks.

        Parameters
        ----------
        value : object
            What is stored.
        on_rollback_hooks, on_commit_hooks : list of callable, optional
            Called with the transaction; may be coroutine functions.
        """
        if not self.is_committed():
            self._value = value
            self.on_rollback_hooks += on_rollback_hooks or ()
            self.on_commit_hooks += on_commit_hooks or ()
            self.state = TransactionState.STAGED

    def commit(self) -> bool:
        """Wait for the runs that were submitted in the block, and make everything final.

        Returns
        -------
        bool
            Whether that went well; an error of a hook or of the storage rolls back.
        """
        done = bool(drive(deciding.commit(self)))
        self._tell()
        return done

    def rollback(self) -> bool:
        """Wait for the runs that were submitted in the block, and take everything back.

        Returns
        -------
        bool
            False if it was final already.
        """
        done = bool(drive(deciding.roll_back(self)))
        self._tell()
        return done

    @classmethod
    def get_active(cls) -> Transaction | None:
        """Return the innermost transaction of the calling code."""
        return get_transaction()

    def get_parent(self) -> Transaction | None:
        """Return the transaction around this one."""
        return self._parent

    # -- the block --------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        """Begin."""
        try:
            drive(self._opening())
        except BaseException as error:
            errors.hide_frames(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what was submitted, and decide."""
        drive(self._closing(error))

    async def __aenter__(self) -> Self:
        """Begin, without blocking the event loop."""
        try:
            await drive_awaiting(self._opening())
        except BaseException as error:
            errors.hide_frames(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what was submitted without blocking the event loop, and decide."""
        await drive_awaiting(self._closing(error))

    def _opening(self) -> Steps:
        if self._token is not None:
            message = "Context already entered. Context enter calls cannot be nested."
            raise RuntimeError(message)
        self._scope, self._running = context.current(), running_attempt()
        self._inherit(get_transaction())
        yield from self._beginning()
        self._token = _open.set(self)

    def _inherit(self, parent: Transaction | None) -> None:
        self._parent = parent
        if parent is not None:
            self._values = parent._copied()
        if self.commit_mode is None:
            self.commit_mode = parent.commit_mode if parent is not None else CommitMode.LAZY
        if self.isolation_level is None:
            level = parent.isolation_level if parent is not None else None
            self.isolation_level = level or IsolationLevel.READ_COMMITTED

    def _copied(self) -> dict[str, Any]:
        """Return copies of the values, for what begins inside; what cannot be copied is shared."""
        found = {}
        for name, value in self._values.items():
            try:
                found[name] = copy.deepcopy(value)
            except Exception:
                found[name] = value
        return found

    def _beginning(self) -> Steps:
        """Take the lock, and look whether there is a record already."""
        self.state, self._closed = TransactionState.ACTIVE, False
        if self.key is None:
            return
        if self.store is None:
            flow_run = self._scope.flow_run if self._scope is not None else None
            self.store = ResultStore.around(flow_run.results if flow_run is not None else ResultOptions())
        assert self.isolation_level is not None
        if not self.store.supports_isolation_level(self.isolation_level):
            message = (
                f"Isolation level {self.isolation_level} is not supported by provided configuration: transaction "
                f"{self.key!r} needs locks, store=ResultStore(…, lock_manager=FileSystemLockManager(directory))."
            )
            raise errors.ConfigurationError(message)
        try:
            if self.isolation_level is IsolationLevel.SERIALIZABLE:
                yield from self._locking()
            if not self.overwrite and self.store.exists(self.key):
                self.state = TransactionState.COMMITTED
        except BaseException:
            self._unlock()
            raise

    def _locking(self) -> Steps:
        assert self.store is not None and self.key is not None  # noqa: PT018 - who asks has looked
        manager, holder = self.store.lock_manager, events.new_id()
        assert manager is not None
        while not manager.acquire_lock(self.key, holder, 0):  # nobody may block an event loop
            waiting.heed_flow(self._scope.flow_run if self._scope is not None else None)
            yield Sleep(locking.PAUSE)
        self._holder = holder

    def _unlock(self) -> None:
        if self._holder and self.store is not None and self.store.lock_manager is not None:
            holder, self._holder = self._holder, ""
            self.store.lock_manager.release_lock(str(self.key), holder)

    def _closing(self, error: BaseException | None) -> Steps:
        if self._token is None:
            message = "Asymmetric use of context. Context exit called without an enter."
            raise RuntimeError(message)
        try:
            if self._scope is not None and self._scope.session.plans:
                return
            if error is not None and not isinstance(error, Exception):  # Ctrl-C, a request to stop
                cancelling.cancel(self._pending())
            yield from deciding.arrive(self, heed=error is None)
            self._closed = True  # what hooks call is no part of it
            yield from deciding.decide(self, failed=error is not None)
        except BaseException as raised:  # the flow is to stop, or Ctrl-C: nothing is waited for any more
            cancelling.stop(self._pending())
            self._look()
            yield from deciding.roll_back(self)
            if error is None:
                raise
            error.add_note(f"its transaction was interrupted while it ended: {raised!r}")
        finally:
            self._leave()

    def _leave(self) -> None:
        token, self._token = self._token, None
        if token is not None:
            with contextlib.suppress(ValueError):  # a generator may end in another context than it began in
                _open.reset(token)
        self._closed = True
        self._tell()
        self._unlock_if_over()

    def _unlock_if_over(self) -> None:
        if self.state in OVER:
            self._unlock()

    # -- runs that were submitted ---------------------------------------------------------------
    def _live(self) -> list[TaskRun]:
        """Return the submitted runs that have not ended: none, for a block whose end has waited for them."""
        return []

    def _see(self) -> None:
        """Learn how the run behind it has ended, if there is one."""

    def _pending(self) -> list[TaskRun]:
        return [run for child in self.children for run in child._live()]

    def _look(self) -> None:
        for child in self.children:
            child._see()

    def _is_far(self) -> bool:
        """Whether there is a result to see to in an object storage."""
        return False

    def _write(self) -> None:
        """Make the result visible to others."""
        if self.key is not None and self.store is not None and self.write_on_commit:
            self.store.write(self.key, self._value, overwrite=self.overwrite)

    def _remove(self) -> None:
        """Remove what is stored: nothing, where a value is stored with the commit only."""

    def _undo(self) -> None:
        """Take back what was visible before the decision."""

    def _tell(self) -> None:
        """Have the record learn of the new states."""
        for session in {session for child in self.children for session in child._sessions()}:
            with session.changing():
                pass

    def _sessions(self) -> Iterable[Any]:
        """Return the sessions whose journals have something to write down."""
        return [session for child in self.children for session in child._sessions()]

    def _about(self) -> str:
        """Name it in a sentence."""
        return "the transaction" if self.key is None else f"transaction {self.key!r}"

    def _say(self, level: str, text: str) -> None:
        """Write a line into the log of the run around it."""
        scope = self._scope
        if self._logger is not None:
            self._logger.log(logging.getLevelName(level), "%s", text)
        elif scope is not None and scope.task_run is not None:
            scope.session.journal.lines(scope.task_run, [[time.time(), level, text]], 0)
        elif scope is not None and scope.flow_run is not None:
            scope.session.journal.flow_lines(scope.flow_run, [[time.time(), level, text]])
        else:
            log.log(logging.getLevelName(level), "%s", text)

    # -- of the attempt of a task run ---------------------------------------------------------------
    def attempt_ended(self, error: BaseException | None) -> None:
        """The code of a submitted task has ended, and what it opened with it."""
        try:
            drive(deciding.commit(self) if error is None else deciding.roll_back(self))
        finally:
            self._closed = True
            self._tell()

    def pack_set(self) -> bytes:
        """Pack the values that were set here, for the hooks of the run, which are elsewhere."""
        return _packed({name: self._values[name] for name in self._noted})


_open: ContextVar[Transaction | None] = ContextVar("penstock_transaction", default=None)


def open_in(scope: Scope) -> Transaction | None:
    """Return the block around a call, None if there is none within the code of the same run."""
    found = _open.get()
    if found is None or found._running is not scope.running or found._closed:
        return None
    return found


def get_transaction() -> Transaction | None:
    """Return the innermost transaction of the calling code; inside a task that of the task run.

    Returns
    -------
    Transaction or None
        None outside of blocks and tasks.
    """
    found = _open.get()
    running = running_attempt()
    if found is not None and found._running is running:
        return found
    return None if running is None else _of_attempt(running)


def _of_attempt(running: Any) -> Transaction:
    """Return the transaction of the attempt whose code asks: it is decided when the code ends."""
    scope = context.current()
    assert scope is not None
    inner = running.scope.task_run
    if inner is not None and inner.direct and inner.transaction is not None:
        own: Transaction = inner.transaction
        return own
    children = nested.children_of(running, running.scope.session)
    if children.transaction is None:
        new = children.transaction = Transaction()
        new._scope, new._running, new.state = running.scope, running, TransactionState.ACTIVE
        new._inherit(None)
        new._values = told(running.order.get("context"))
    return children.transaction


def told(about: dict[str, Any] | None) -> dict[str, Any]:
    """Return the values of outer transactions that have come with a work order."""
    packed = (about or {}).get("transaction")
    found: dict[str, Any] = pickle.loads(packed) if packed else {}
    return found


def to_tell(values: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Return the context of a work order with the values of the transactions around it."""
    return {**about, "transaction": _packed(values)} if values else about


def _packed(values: dict[str, Any]) -> bytes:
    """Pickle values one by one; what cannot travel stays where it is."""
    kept = {}
    for name, value in values.items():
        with contextlib.suppress(Exception):
            payload.dumps(value)
            kept[name] = value
    return payload.dumps(kept) if kept else b""


def transaction(
    key: str | None = None,
    store: Any = None,
    commit_mode: CommitMode | str | None = None,
    isolation_level: IsolationLevel | str | None = None,
    overwrite: bool = False,
    write_on_commit: bool = True,
    logger: logging.Logger | logging.LoggerAdapter[Any] | None = None,
) -> Transaction:
    """Open a transaction: ``with transaction() as txn:``, or ``async with``.

    >>> with transaction() as txn:  # doctest: +SKIP
    ...     txn.set("path", path)
    ...     write.submit(path)
    ...     check(path)  # if it raises, the on_rollback hooks of `write` are called

    Tasks called or submitted in the block belong to it, on any runner. Its end waits for them, without
    moving their values, and commits if all have completed and the block has not raised; else it rolls back.

    Parameters
    ----------
    key : str, optional
        Under which the value given to `Transaction.stage` is stored when it commits; if there is a record
        already, `Transaction.is_committed` says so in the block.
    store : ResultStore, str, path or ResultStorage, optional
        Where; that of the flow run by default.
    commit_mode : CommitMode, optional
        EAGER, LAZY or OFF; that of the outer transaction, at the top LAZY.
    isolation_level : IsolationLevel, optional
        READ_COMMITTED or SERIALIZABLE: one at a time under a key; that of the outer transaction, at the
        top READ_COMMITTED.
    overwrite : bool
        Whether a record that exists is replaced.
    write_on_commit : bool
        False: nothing is stored.
    logger : Logger, optional
        Takes the lines about hooks; the log of the run by default.

    Raises
    ------
    ConfigurationError
        When the block begins: if it is SERIALIZABLE with a key, and the store has no lock manager.
    """
    return Transaction(key, store, commit_mode, isolation_level, overwrite, write_on_commit, logger)
