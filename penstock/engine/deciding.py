"""How a transaction is decided: everything in it is committed, in order, or taken back, the last first.

Steps for the drivers of `steps`, so that blocks of sync and async code are decided by the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from penstock.engine.hooks import Hook, name_of
from penstock.engine.lookups import LOOKS_AT_ONCE
from penstock.engine.steps import Invoke, Steps, Wait
from penstock.engine.transaction_states import OVER, CommitMode, TransactionState

if TYPE_CHECKING:
    from penstock.engine.transactions import Transaction


class _Undone(Exception):
    """A child could not be committed."""


def arrive(txn: Transaction, *, heed: bool) -> Steps:
    """Wait until the runs that were submitted in a block have ended; their values stay where they are.

    Parameters
    ----------
    txn : Transaction
        Of the block.
    heed : bool
        End the waiting if the flow around it is to stop.
    """
    while pending := txn._pending():
        yield Wait(pending, heed=heed)
    txn._look()


def decide(txn: Transaction, *, failed: bool) -> Steps:
    """Decide at the end of a block, whose runs have ended; a lazy one waits for the one around it."""
    if failed or any(child.is_rolled_back() for child in txn.children):
        yield from roll_back(txn)
    elif txn._parent is None or txn.commit_mode is CommitMode.EAGER:
        by_hand = txn.commit_mode is CommitMode.OFF and txn.state not in OVER
        yield from roll_back(txn) if by_hand else commit(txn)
    if txn._parent is not None:
        yield from adopt(txn._parent, txn)


def adopt(txn: Transaction, child: Transaction) -> Steps:
    """Take over a child that has ended; after the decision it shares its fate."""
    txn.children.append(child)
    if txn._closed:
        yield from share(txn)


def share(txn: Transaction) -> Steps:
    """Let children that came after the decision share it."""
    if txn.state is TransactionState.COMMITTED:
        for child in list(txn.children):
            yield from commit(child)
    elif txn.state is TransactionState.ROLLED_BACK:
        for child in reversed(txn.children):
            yield from roll_back(child)


def commit(txn: Transaction) -> Steps:
    """Commit: the children, then the hooks, then the value; an error rolls back.

    Returns
    -------
    bool
        Whether that went well, now.
    """
    if txn.state in OVER:
        yield from share(txn)
        return False
    try:
        yield from arrive(txn, heed=True)
        if not any(child.on_commit_hooks for child in txn.children):
            _together(txn, lambda child: child._write())
        for child in list(txn.children):
            yield from commit(child)
            if child.is_rolled_back():
                raise _Undone(child._about())
        for hook in txn.on_commit_hooks:
            yield from _call(txn, hook, "commit")
        txn._write()
        txn.state = TransactionState.COMMITTED
    except Exception as error:
        reason = str(error) if isinstance(error, _Undone) else f"{type(error).__name__}: {error}"
        txn._say("ERROR", f"{txn._about()} is rolled back instead of committed: {reason}")
        yield from roll_back(txn)
        return False
    except BaseException:
        yield from roll_back(txn)
        raise
    txn._unlock()
    return True


def roll_back(txn: Transaction) -> Steps:
    """Take back: the hooks, the last first, then the value, then the children, the last first.

    Returns
    -------
    bool
        False if it was over.
    """
    if txn.state in OVER:  # what is final stays so; what has come since does not
        for child in reversed(txn.children):
            yield from roll_back(child)
        return False
    txn.state = TransactionState.ROLLED_BACK
    try:
        yield from arrive(txn, heed=False)
        for hook in reversed(txn.on_rollback_hooks):
            try:
                yield from _call(txn, hook, "rollback")
            except Exception as error:  # the others run, whatever this one does
                txn._say("ERROR", f"hook {name_of(hook)!r} raised {type(error).__name__}: {error}")
        txn._undo()
        if not any(child.on_rollback_hooks for child in txn.children):
            _together(txn, lambda child: child._remove())
        for child in reversed(txn.children):
            yield from roll_back(child)
    finally:
        txn._unlock()
    return True


def _call(txn: Transaction, hook: Hook, kind: str) -> Steps:
    txn._say("INFO", f"Running {kind} hook {name_of(hook)!r}")
    yield Invoke(hook, (txn,), name=name_of(hook))


def _together(txn: Transaction, what: Callable[[Transaction], None]) -> None:
    """Ask an object storage for many children at a time; what fails here is tried again in its turn."""
    far = [child for child in txn.children if child._is_far()]
    if len(far) < 2 or any(child.children for child in txn.children):
        return

    def ask(child: Transaction) -> None:
        with contextlib.suppress(Exception):
            what(child)

    with ThreadPoolExecutor(LOOKS_AT_ONCE, "penstock-commit") as pool:
        list(pool.map(ask, far))
