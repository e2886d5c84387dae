"""Groups of task runs that succeed together, or are taken back together.

>>> from penstock.transactions import transaction
>>> with transaction() as txn:  # doctest: +SKIP
...     txn.set("path", path)
...     write(path)
...     check(path)
"""

from penstock.engine.cache import IsolationLevel
from penstock.engine.transaction_states import CommitMode, TransactionState
from penstock.engine.transactions import Transaction, get_transaction, transaction

__all__ = [
    "CommitMode",
    "IsolationLevel",
    "Transaction",
    "TransactionState",
    "get_transaction",
    "transaction",
]
