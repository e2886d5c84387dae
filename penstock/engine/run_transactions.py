"""Task runs as parts of transactions: staged when they have completed, committed or taken back with the rest.

A run without a transaction around it, but with hooks for one, is a transaction of its own: it commits
when it has completed. A run keeps its value in memory only as long as somebody wants it, also
within a transaction: what is kept of one that has ended is what the record says of it.
"""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from penstock.engine import deciding, results, transactions
from penstock.engine.calls import TaskRun
from penstock.engine.hooks import Hooks
from penstock.engine.states import StateType, rolled_back
from penstock.engine.steps import Steps, drive
from penstock.engine.transaction_states import OVER, CommitMode, TransactionState
from penstock.engine.transactions import Transaction
from penstock.runners.worker import result_store
from penstock.runners.worker.result_formats import CommitError

if TYPE_CHECKING:
    from penstock.engine.context import Scope

_looking = threading.Lock()


class RunTransaction(Transaction):
    """The part of one task run; hooks of tasks get it.

    Parameters
    ----------
    run : TaskRun
        New.
    parent : Transaction or None
        Around it.
    values : dict
        Copies of what was set there.
    """

    __slots__ = ("_details", "_kept", "_removed", "_run")

    def __init__(self, run: TaskRun, parent: Transaction | None, values: dict[str, Any]) -> None:
        super().__init__()
        self._inherit(None)
        if parent is not None:
            self.commit_mode, self.isolation_level = parent.commit_mode, parent.isolation_level
        self._parent, self._values = parent, values
        self.state = TransactionState.ACTIVE
        self._run: TaskRun | None = run  # until it has ended
        self._kept: tuple[weakref.ref[TaskRun], TaskRun] | None = None
        self._details: dict[str, Any] = {}
        self._removed = False

    # -- what the session and the worker tell -------------------------------------------------------
    def note(self, details: dict[str, Any]) -> None:
        """Keep what the record says of the end of the run."""
        self._details = {name: details[name] for name in ("started", "seconds", "peak") if name in details}

    def learn(self, packed: bytes) -> None:
        """Take the values that the code of the run has set."""
        self._values = {**self._values, **pickle.loads(packed)}

    def holds_back(self, order: dict[str, Any]) -> bool:
        """Whether a result is to lie aside until the commit: one that others could find before.

        Under a lock it is not: the lock is given back when the run ends, and whoever gets it next has to
        find the value.
        """
        waits = self._later or (self._run is not None and bool(self._run.task.options.hooks.on_commit))
        findable = "cache" in order or "work" in order or "{run}" not in order["key"]
        return waits and findable and "lock" not in order

    @property
    def _later(self) -> bool:
        return self._parent is not None and self.commit_mode is not CommitMode.EAGER

    def decides(self, run: TaskRun) -> bool:
        """Whether a submitted run that has ended commits by itself, and there is something to do."""
        return run.completed and not self._later and not _is_cached(run)

    def conclude(self) -> None:
        """Commit by itself."""
        self._see()
        drive(deciding.commit(self))
        self._closed = True
        self._tell()

    # -- a direct call ------------------------------------------------------------------------------
    def attempt_failed(self) -> Steps:
        """An attempt has failed: what its code opened is taken back."""
        for child in reversed(self.children):
            yield from deciding.roll_back(child)
        self.children.clear()

    def call_ended(self) -> Steps:
        """The run of a call has ended: it commits, or waits for the end of the block."""
        self._see()
        if not self._later and self.state is TransactionState.STAGED:
            yield from deciding.commit(self)
        self._closed = True
        if self._parent is not None:
            yield from deciding.adopt(self._parent, self)
        else:
            self._tell()

    # -- what the transaction asks --------------------------------------------------------------------
    def _live(self) -> list[TaskRun]:
        """Return the run, if it was submitted and has not ended."""
        run = self._run
        return [run] if run is not None and not run.settled else []

    def ended(self, run: TaskRun) -> None:
        """Let the run go, which has ended."""
        del run
        self._see()

    def _see(self) -> None:
        """Learn how the run has ended."""
        if self._run is None:
            return
        with _looking:
            run = self._run
            if run is None or not run.done:
                return
            self._kept, self._run = (weakref.ref(run), _remains(run)), None
            if run.caching is not None and run.caching.key is not None:
                self.key = run.caching.key
            if self.state is not TransactionState.ACTIVE:
                return
            if not run.completed and run.type is not StateType.SKIPPED:
                self.state = TransactionState.ROLLED_BACK
                return
            hooks = run.task.options.hooks
            if not run.completed or _is_cached(run) or not (self._later or hooks.of_transactions):
                self.state = TransactionState.COMMITTED
            else:
                self.stage(None, hooks.on_rollback, hooks.on_commit)

    def _write(self) -> None:
        """Put the stored result in its place."""
        if self._kept is None:
            return
        alive, run = self._kept[0](), self._kept[1]
        if run.stored is None or "staged" not in run.stored:
            return
        sharing = run.caching.sharing if run.caching is not None else None
        refresh, expires = (sharing.refresh, sharing.expires) if sharing is not None else (False, None)
        try:
            said = result_store.publish(results.whereabouts(run), refresh=refresh, expires=expires)
        except (result_store.Absent, result_store.Damaged, CommitError) as error:
            raise results.public_error(error, run.id) from error
        for one in (run, alive):
            if one is not None:
                one.hit = said if one.hit is not None else None
                one.stored = said
        self._record(run, stored=results.location(said))

    def _is_far(self) -> bool:
        """Whether there is a result to see to in an object storage."""
        if self._kept is None or self.state in OVER or not self._owns:
            return False
        stored = self._kept[1].stored
        return stored is not None and "://" in stored["storage"]

    @property
    def _owns(self) -> bool:
        stored = self._kept[1].stored if self._kept is not None else None
        return stored is not None and self._kept is not None and stored["run"] == self._kept[1].id

    def _remove(self) -> None:
        """Remove the stored result, if it is its own."""
        if self._kept is not None and self._owns and not self._removed:
            result_store.withdraw(results.whereabouts(self._kept[1]))
            self._removed = True

    def _undo(self) -> None:
        """Remove the stored result, and give the run its new name."""
        if self._kept is None or self._kept[1].type is not StateType.COMPLETED:
            return
        alive, run = self._kept[0](), self._kept[1]
        try:
            self._remove()
        except CommitError as error:
            self._say("ERROR", f"its stored result is still there: {error}")
        for one in (run, alive):
            if one is not None and one.completed:
                one.position = rolled_back(one.position)
                one.message = "Task rolled back as part of transaction"
                if one.hit is None:  # else its value was nowhere else, and reading it says so
                    one.stored = None
        self._record(run)

    def _record(self, run: TaskRun, **details: Any) -> None:
        session = run.carrier
        with session.lock:
            session.journal.add(run, {**self._details, **details, "again": True})

    def _sessions(self) -> Iterable[Any]:
        """Return the session of the run, and of what its code has called."""
        own = [self._kept[1].carrier] if self._kept is not None else []
        return [*own, *super()._sessions()]

    def _tell(self) -> None:
        for session in set(self._sessions()):
            with session.changing():
                pass

    def _about(self) -> str:
        """Name it in a sentence."""
        run = self._run or (self._kept[1] if self._kept is not None else None)
        return f"task run {run.name!r}" if run is not None else "a task run"

    def _say(self, level: str, text: str) -> None:
        """Write a line into the log of the run."""
        run = self._run or (self._kept[1] if self._kept is not None else None)
        if run is not None:
            run.carrier.journal.lines(run, [[time.time(), level, text]], 0)


class Joining:
    """What the runs of one submit or map have in common.

    Parameters
    ----------
    parent : Transaction or None
        That they are part of.
    """

    def __init__(self, parent: Transaction | None) -> None:
        self._parent = parent
        self._values = parent._copied() if parent is not None else {}

    def of(self, run: TaskRun) -> RunTransaction:
        """Make the part of one run."""
        return RunTransaction(run, self._parent, self._values)

    def context(self, about: dict[str, Any]) -> dict[str, Any]:
        """Return the context of a work order with what the code of the runs can ask for."""
        return transactions.to_tell(self._values, about)


def joining(scope: Scope, hooks: Hooks) -> Joining | None:
    """Return what the runs of a call are part of; None, at once, if nothing."""
    parent = transactions.open_in(scope)
    if parent is None and not hooks.of_transactions:
        return None
    if scope.session.plans:
        return None
    if parent is None and scope.running is not None:
        parent = transactions.get_transaction()
    return Joining(parent)


def enter(runs: Sequence[TaskRun]) -> None:
    """Runs were submitted: the transaction around them waits for them."""
    for run in runs:
        own = run.transaction
        assert own is not None
        if own._parent is not None:
            own._parent.children.append(own)
            run.carrier.endings.add_callback(run, own.ended)


def _is_cached(run: TaskRun) -> bool:
    """Whether the value is that of another run."""
    return run.stored is not None and bool(run.stored.get("cached"))


def _remains(run: TaskRun) -> TaskRun:
    """Return what the record says of a run that has ended, without its value."""
    new = TaskRun(
        run.task,
        run._name,
        root=run.root,
        flow_run=run.flow_run,
        surrounding=run.surrounding,
        map_id=run.map_id,
        index=run.index,
        tags=run.tags,
        tracked=run.tracked,
    )
    new._id, new.session = run._id, run.session
    new.position, new.done, new.message = run.position, True, run.message
    new.started, new.ended, new.nbytes, new.worker = run.started, run.ended, run.nbytes, run.worker
    new.stored, new.caching, new.hit = run.stored, run.caching, run.hit
    return new
