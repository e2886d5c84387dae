"""Dask's collections and penstock's values: from one to the other, and the client between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from penstock.runners import dask_graph
from penstock.runners.base import Ref
from penstock.runners.worker.coroutines import on_task_thread


@contextlib.contextmanager
def lent(client: Any, timeout: float | None) -> Iterator[Any]:
    """Make a client Dask's current one for a block; in a task, give the slot back meanwhile.

    Parameters
    ----------
    client : distributed.Client or None
        None: that of the worker which runs the calling task.
    timeout : float or None
        Seconds to wait for the connection of a worker.
    """
    if client is not None:
        with client.as_current():
            yield client
        return
    from distributed import get_client, secede

    client = on_task_thread(lambda: get_client(timeout=timeout))
    gives_back = on_task_thread(dask_graph.holds_slot)
    if gives_back:
        on_task_thread(secede)
    try:
        with client.as_current():
            yield client
    finally:
        if gives_back:
            on_task_thread(dask_graph.retake_slot)


def delayed(
    ref: Ref | None, load: Callable[[], Any], name: str, shape: tuple[int, ...] | None, dtype: Any
) -> Any:
    """Make a Dask collection of a value that exists.

    Parameters
    ----------
    ref : Ref or None
        Where the value lies; if that is Dask, its bytes stay there.
    load : callable
        Brings the value here, for any other place.
    name : str
        Unique; a Dask key.
    shape, dtype
        Of an array; without them the answer is a `dask.delayed.Delayed`.

    Raises
    ------
    MissingExtra
        If Dask is not installed.
    """
    try:
        import dask
    except ImportError as error:
        from penstock.errors import MissingExtra

        message = "future.to_dask() needs Dask: pip install 'penstock[dask]'"
        raise MissingExtra(message) from error
    handle = None if ref is None else ref.handle
    if getattr(type(handle), "__module__", "").partition(".")[0] == "distributed":
        made = dask.delayed(handle)
    else:
        made = dask.delayed(load, name=f"load-{name}", traverse=False)(dask_key_name=name)
    if shape is None:
        return made
    import dask.array

    return dask.array.from_delayed(made, shape=shape, dtype=dtype)
