"""Submissions become messages to a Dask scheduler; with `dask_plugin`, `dask_tracker` and
`dask_memory` the only user of its private surface.

One message carries a batch, whatever its tasks ask for: options travel as annotations per key.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from penstock import errors
from penstock.runners.base import NO_OPTIONS, Key, Ref, Submission

TASKS = 5_000  # in one message: a cancel waits behind the graph that is before it
BYTES = 8_000_000  # Dask warns at 10 MB

_names = itertools.count()


def batches(submissions: Sequence[Submission]) -> Iterator[Sequence[Submission]]:
    """Split what is to be sent into messages of a bearable size, in order."""
    start = size = 0
    for number, one in enumerate(submissions):
        added = len(one.arguments) + len(one.order)  # type: ignore[arg-type]
        if number > start and (size + added > BYTES or number - start >= TASKS):
            yield submissions[start:number]
            start, size = number, 0
        size += added
    if start < len(submissions):
        yield submissions[start:] if start else submissions


def columns(submissions: Sequence[Submission], tag: str, unshared: str = "") -> tuple[Any, ...]:
    """Arrange a batch as `dask_plugin.Batch` wants it.

    Parameters
    ----------
    submissions : sequence of Submission
        In topological order.
    tag : str
        Makes the name of the batch unique in the cluster.
    unshared : str
        Annotation for tasks whose results are not to be shared (`dask_memory.OFF`).

    Returns
    -------
    tuple
        The columns.
    """
    uses = waits = None
    if any(one.refs for one in submissions):
        uses = [tuple([_key(ref) for ref in one.refs]) for one in submissions]
    if any(one.after for one in submissions):
        waits = [tuple(dict.fromkeys(map(_key, filter(_is_work, one.after)))) for one in submissions]
        flags = [len(wait) * 2 + one.announce for one, wait in zip(submissions, waits, strict=True)]
    else:
        flags = [int(one.announce) for one in submissions]
    return (
        f"{tag}-{next(_names)}",
        [one.key for one in submissions],
        flags,
        [one.order for one in submissions],
        [one.function for one in submissions],
        [one.arguments for one in submissions],
        uses,
        waits,
        _annotations(submissions, unshared),
    )


def _key(ref: Ref) -> Key:
    """Return the key of a value; for one in shared memory what stands in its place."""
    return ref.key if ref.handle is None else ref.handle.key


def _is_work(ref: Ref) -> bool:
    return ref.handle is None or isinstance(ref.handle.key, tuple)


def _annotations(submissions: Sequence[Submission], unshared: str) -> dict[str, dict[Key, Any]]:
    found: dict[str, dict[Key, Any]] = {}
    if unshared:
        found[unshared] = dict.fromkeys([one.key for one in submissions], True)
    for one in submissions:
        if one.priority:
            found.setdefault("priority", {})[one.key] = one.priority
        options = one.options
        if options is NO_OPTIONS:
            continue
        if options.resources:
            found.setdefault("resources", {})[one.key] = dict(options.resources)
        if options.once:
            found.setdefault("penstock_once", {})[one.key] = True
        if options.workers:
            found.setdefault("workers", {})[one.key] = list(options.workers)
            loose = dict(options.native).get("allow_other_workers", False)
            found.setdefault("allow_other_workers", {})[one.key] = bool(loose)
    return found


def without_input(client: Any, submissions: Sequence[Submission]) -> dict[Key, Exception]:
    """Find what depends on a value that is gone: Dask would cancel the whole batch for it.

    Returns
    -------
    dict
        What was lost, by key.
    """
    dead: dict[Key, Exception] = {}
    dependent = [one for one in submissions if one.refs or one.after]
    keys = {one.key for one in submissions} if dependent else set()
    for one in dependent:
        for ref in (*one.refs, *one.after):
            if ref.handle is not None:
                gone = ref.handle.status == "cancelled"
            else:
                gone = ref.key in dead or (ref.key not in keys and ref.key not in client.futures)
            if gone:
                name = ref.key[0].rpartition("-")[0]
                dead[one.key] = errors.ResultLost(
                    f"the value of {name!r} is gone, with the worker that held it"
                )
                break
    return dead


def send(client: Any, batch: Any, keys: Sequence[Key], *, public: bool = False) -> dict[Key, Any]:
    """Send a batch and return a future for each key.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    batch : dask_plugin.Batch
        The tasks.
    keys : sequence of tuple
        Those whose values are wanted; all of them.
    public : bool
        Use `Client.get` even if the shorter way exists. It lets the scheduler order the graph,
        which takes longer than anything else there.
    """
    # Annotations that the user's code has set around some call are not for this batch.
    context = contextvars.Context()
    if not public and _takes_priorities(client):
        futures: dict[Key, Any] = context.run(
            client._graph_to_futures, batch, keys, None, internal_priority=batch.places(), fifo_timeout=0
        )
        return futures
    listed = context.run(client.get, batch, list(keys), sync=False, fifo_timeout=0)
    return dict(zip(keys, listed, strict=True))


_ways: dict[type, bool] = {}


def _takes_priorities(client: Any) -> bool:
    """Whether this release of distributed has the function that skips ordering, as we know it."""
    kind = type(client)
    if kind not in _ways:
        try:
            parameters = list(inspect.signature(kind._graph_to_futures).parameters)
        except (AttributeError, ValueError, TypeError):
            parameters = []
        wanted = ["expr", "keys", "span_metadata"]
        _ways[kind] = parameters[1:4] == wanted and {"internal_priority", "fifo_timeout"} <= set(parameters)
    return _ways[kind]


def release(client: Any, futures: Iterable[Any]) -> None:
    """Give futures back with one message for all; Dask itself sends one for each."""
    keys = []
    for future in futures:
        if not hasattr(future, "_cleared"):
            future.release()
        elif not future._cleared and future._generation == client.generation:
            future._cleared = True
            keys.append(future.key)
    if keys:
        client.loop.add_callback(_release, client, keys)


def _release(client: Any, keys: list[Key]) -> None:
    gone = []
    with client._refcount_lock:
        for key in keys:
            client.refcount[key] -= 1
            if client.refcount[key] <= 0:
                del client.refcount[key]
                gone.append(key)
    for key in gone:
        state = client.futures.pop(key, None)
        if state is not None:
            state.cancel()
    if gone and client.status == "running":
        client._send_to_scheduler_safe({"op": "client-releases-keys", "keys": gone, "client": client.id})


def subscribe(client: Any, topic: str, receive: Callable[[Any], None]) -> None:
    """Hear the messages of a topic; `receive` runs on the client's own thread."""

    def handler(event: tuple[float, Any]) -> None:
        receive(event[1])

    client.subscribe_topic(topic, handler)


def unsubscribe(client: Any, topic: str, function: Callable[..., Any], *args: Any) -> None:
    """Hear no more of a topic; returns at once.

    Parameters
    ----------
    client : distributed.Client
        Which has subscribed.
    topic : str
        Of a session.
    function, *args
        What does it on the scheduler.
    """

    async def leave() -> None:
        with contextlib.suppress(Exception):  # the connection may be gone
            await client._run_on_scheduler(function, *args)
        await asyncio.sleep(1)  # a message on its way without a handler would make Dask log an error
        client._event_handlers.pop(topic, None)

    client._event_handlers[topic] = _ignore
    client.loop.add_callback(leave)


def _ignore(_: Any) -> None:
    pass


def connection(client: Any) -> Any:
    """Return an object that is another one after the client has lost its scheduler."""
    return client.scheduler_comm if client.status in {"running", "newly-created"} else None


def fate(future: Any) -> tuple[str, str, Any]:
    """Return what a client knows of a key: status, reason of a cancellation, exception."""
    state = future._state
    if state is None:
        return "cancelled", "", None
    return state.status, getattr(state.exception, "reason", None) or "", state.exception


def adopted(client: Any, key: Key) -> Any:
    """Make this client's own future of a value that a worker has placed.

    To make a future of a key tells nobody: without the message the value would go with the worker's
    own reference to it, and whoever asks for it later would wait for ever.
    """
    from distributed import Future

    future = Future(key, client)
    client._send_to_scheduler({"op": "client-desires-keys", "keys": [key]})
    return future


def holds_slot() -> bool:
    """Whether this is the thread of a task that has not given its slot back."""
    from distributed.threadpoolexecutor import thread_state as thread
    from distributed.worker import thread_state as task

    return getattr(task, "key", None) is not None and bool(getattr(thread, "proceed", False))


def retake_slot() -> None:
    """Take a slot again, in the thread of a task that gave its own back.

    This waits until one is free. On a thread with an event loop it would keep other coroutines of
    the task waiting, whose children may need that very slot: such a thread goes on without one.
    """
    from distributed import rejoin

    if asyncio._get_running_loop() is None:
        rejoin()


def ask(client: Any, function: Callable[..., Any], *args: Any, timeout: float = 20.0) -> Any:
    """Call a function on the scheduler; raise `TimeoutError` if it does not answer."""
    return client.sync(client._run_on_scheduler, function, *args, callback_timeout=timeout)


def ask_workers(
    client: Any, function: Callable[..., Any], *args: Any, workers: Sequence[str], timeout: float = 5.0
) -> dict[str, Any]:
    """Call a function on some workers; those that do not answer in time are left out."""

    async def ask_one(address: str) -> dict[str, Any]:
        call = client._run(function, *args, workers=[address], on_error="ignore")
        try:
            return dict(await asyncio.wait_for(call, timeout) or {})
        except (TimeoutError, OSError):
            return {}

    async def ask_all() -> dict[str, Any]:
        answers = await asyncio.gather(*map(ask_one, workers))
        return {address: answer for one in answers for address, answer in one.items()}

    found: dict[str, Any] = client.sync(ask_all)
    return found
