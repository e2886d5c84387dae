"""`penstock.get_dask_client`: the client of the cluster that runs the flow, for Dask's own calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from penstock import errors
from penstock.engine import context
from penstock.runners.worker.running import current


@contextlib.contextmanager
def get_dask_client(timeout: float | None = None) -> Iterator[Any]:
    """Lend the client of the cluster that runs this flow or task.

    In the block it is Dask's current client, so that collections are computed there. A task gives its
    slot back meanwhile, so one worker is enough. What is handed to the client runs as plain functions,
    which penstock does not follow.

    >>> with get_dask_client() as client:  # doctest: +SKIP
    ...     total = client.compute(array.sum()).result()

    Parameters
    ----------
    timeout : float, optional
        Seconds to wait for the connection of a worker.

    Yields
    ------
    distributed.Client
        Of the driver, or of the worker that runs the task. Do not close it.

    Raises
    ------
    MissingContextError
        Outside of flows and tasks, or if they do not run on Dask.
    """
    running = current()
    client = None
    if running is not None and running.scope is None:  # in a worker of another process
        found = running.order["context"].get("runner", "")
    else:
        scope = context.current()
        runner = scope.session.runner if scope is not None else None
        found = getattr(runner, "name", "")
        if not getattr(runner, "is_inside", False):
            client = getattr(runner, "client", None)
    if found != "dask":
        where = f"this run uses the runner {found!r}" if found else "there is no flow or task around it"
        message = f"get_dask_client() lends the client of a DaskTaskRunner, but {where}."
        raise errors.MissingContextError(message)
    from penstock.runners import dask_collections

    with dask_collections.lent(client, timeout) as lent:
        yield lent
