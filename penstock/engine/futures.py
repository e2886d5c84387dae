"""Futures: handles of runs. Only `result` and ``await`` move a value; nothing else does."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, SupportsIndex, TypeVar, overload

from penstock import errors
from penstock.engine import cancelling, items, markup, refs, values, waiting
from penstock.engine.states import State, StateType
from penstock.engine.summary import human_bytes
from penstock.runners.worker.coroutines import beside_loop
from penstock.runners.worker.running import current

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun

R = TypeVar("R")


class PenstockFuture(Generic[R]):
    """The future of a task run (or of a flow run in the background), on every runner.

    `wait`, `state`, `done` and the end of a flow never move a value. Dropping the last future of
    a run frees its value where it lies, unless another run still needs it.
    """

    __slots__ = ("__weakref__", "_run")

    def __init__(self, run: TaskRun) -> None:
        self._run = run

    # -- looking ----------------------------------------------------------------------------
    @property
    def task_run_id(self) -> str:
        """Id of the run, 32 hexadecimal digits."""
        return self._run.id

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._run.name

    @property
    def state(self) -> State:
        """The present state; read here, without a request and without bytes."""
        session = self._run.carrier
        session.flush()
        return values.state_of(self._run)

    @property
    def nbytes(self) -> int:
        """Size of the value in bytes, from the record; 0 before the end."""
        return self._run.nbytes

    @property
    def where(self) -> str:
        """The worker that made the value."""
        return self._run.worker

    @property
    def key(self) -> str:
        """Name of the present attempt on the backend, as its dashboard shows it."""
        return "" if self._run.key is None else f"{self._run.key[0]}-{self._run.key[1]}"

    def done(self) -> bool:
        """Whether the run has ended, or can never start."""
        if not self._run.done:
            self._run.carrier.flush()
        return self._run.settled

    def running(self) -> bool:
        """Whether user code is known to be running."""
        return self._run.type is StateType.RUNNING

    def cancelled(self) -> bool:
        """Whether the run was cancelled."""
        return self._run.settled and self._run.type is StateType.CANCELLED

    # -- waiting ----------------------------------------------------------------------------
    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the run, or for `timeout` seconds; no bytes move.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits for ever.
        """
        waiting.wait([self._run], timeout, heed=True)

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Wait for the value and bring it here.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits for ever.
        raise_on_failure : bool
            False returns the exception instead of raising it.

        Returns
        -------
        object
            What the task returned; None if it was skipped.

        Raises
        ------
        TimeoutError
            If the run has not ended in time.
        Exception
            What the task raised; `UnfinishedRun` if an upstream failed and it never started.
        """
        try:
            return self._result(timeout, raise_on_failure)
        except BaseException as error:
            errors.hide_frames(error)
            raise

    def _result(self, timeout: float | None, raise_on_failure: bool) -> R:
        run = self._run
        if not run.settled:
            _warn_in_loop()
            waiting.wait([run], timeout, heed=True)
        if not run.settled:
            message = f"Task run {run.id} did not complete within {timeout} seconds"
            raise TimeoutError(message)
        value: R = values.results([run], raise_on_failure=raise_on_failure)[0]
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return the exception of the run, None if it went well."""
        self.wait(timeout)
        run = self._run
        if not run.settled:
            message = f"Task run {run.id} did not complete within {timeout} seconds"
            raise TimeoutError(message)
        return values.exception_of(run)

    def __await__(self) -> Generator[Any, None, R]:
        """Like `result`, without blocking the event loop."""
        return self._await().__await__()

    async def _await(self) -> R:
        try:
            await self.settled()
            if values.is_at_hand(self._run):
                value: R = values.results([self._run])[0]
            else:
                value = (await beside_loop(values.results, [self._run]))[0]
        except BaseException as error:
            errors.hide_frames(error)
            raise
        return value

    async def settled(self) -> None:
        """Wait for the end of the run without blocking the event loop; no bytes move."""
        run = self._run
        if run.settled:
            return
        loop = asyncio.get_running_loop()
        await self._done_here()
        waiter: asyncio.Future[None] = loop.create_future()

        def release() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def wake(_: Any) -> None:
            try:
                loop.call_soon_threadsafe(release)
            except RuntimeError:  # the loop has ended; nobody waits any more
                return

        session = run.carrier
        session.endings.add_callback(run, wake)
        session.flush()
        with waiting.slot_given_back(run):
            await waiter

    async def _done_here(self) -> None:
        """Inside a task: do a child that was not sent beside the event loop, one at a time."""
        run = self._run
        while current() is not None and waiting.is_unsent(run):
            if waiting.kept_back(run):
                try:
                    await beside_loop(waiting.do_one_here, [run])
                finally:
                    waiting.let_go()
                continue
            run.carrier.flush()  # another child is done here: this one may go to another worker
            if waiting.is_unsent(run):  # there is no other worker
                await asyncio.sleep(0.002)

    def items(self) -> Iterator[PenstockFuture[Any]]:
        """Iterate over what a generator task yields, as it arrives; each item is a finished future.

        >>> images = [image.submit(plane) for plane in planes.submit(night).items()]  # doctest: +SKIP

        Ask at once, as above: then the worker places each item by itself, and consumers run while
        the generator goes on. Later, and on runners whose ``info.streams`` is False, the items come
        when the task has ended. A retry gives items again only from where the attempt before it came to.

        Yields
        ------
        PenstockFuture
            Of an item; its value does not come here.

        Raises
        ------
        Exception
            What the task raised, after the items that were yielded before.
        """
        from penstock.engine import mapping

        if items.ask(self._run):
            return map(PenstockFuture, items.drawn(self._run))
        return mapping.elements_of(self)

    # -- acting -----------------------------------------------------------------------------
    def cancel(self, force: bool = False) -> bool:
        """Ask the run to stop.

        Parameters
        ----------
        force : bool
            End the process that runs it, if it has started.

        Returns
        -------
        bool
            Whether the run will end CANCELLED; False if it has ended already.
        """
        return cancelling.cancel([self._run], force=force)

    def to_dask(self, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Any:
        """Wait for the end of the run and make a Dask collection of its value, which stays where it is.

        On Dask the collection refers to the value on its worker; compute it on the same cluster, under
        `penstock.get_dask_client`. On other runners the value comes here when it is computed. The
        collection keeps the value alive.

        Parameters
        ----------
        shape : tuple of int, optional
            Of the array; then the answer is a `dask.array.Array` of one block.
        dtype : numpy.dtype, optional
            Its type, needed with `shape`.

        Returns
        -------
        dask.delayed.Delayed or dask.array.Array
            Lazy.

        Raises
        ------
        Exception
            What the task raised.
        """
        if (shape is None) is not (dtype is None):
            message = "to_dask() makes an array of a shape and a dtype: give both, or none for a Delayed."
            raise errors.ConfigurationError(message)
        self.wait()
        error = values.exception_of(self._run)
        if error is not None:
            raise error
        from penstock.runners import dask_collections

        load = functools.partial(_value_of, self)
        return dask_collections.delayed(self._run.ref, load, f"{self.name}-{self.task_run_id}", shape, dtype)

    def add_done_callback(self, fn: Callable[[PenstockFuture[R]], Any]) -> None:
        """Call ``fn(future)`` once when the run has ended, at once if it has."""
        self._run.carrier.endings.add_callback(self._run, lambda run: fn(PenstockFuture(run)))

    def __eq__(self, other: object) -> bool:
        """Two futures of one run are equal."""
        return isinstance(other, PenstockFuture) and other._run is self._run

    def __hash__(self) -> int:
        """Hash by the run."""
        return hash(id(self._run))

    def __repr__(self) -> str:
        """Show name and state."""
        size = f" {self.nbytes} bytes" if self.nbytes else ""
        return f"<PenstockFuture {self._run.name} {self._run.state_name}{size}>"

    def _repr_html_(self) -> str:
        """Show in a notebook."""
        run = self._run
        rows = [("State", markup.badge(run.type, run.state_name)), ("Task run", run.id)]
        if run.worker:
            rows.append(("Worker", run.worker))
        if run.nbytes:
            rows.append(("Size", human_bytes(run.nbytes)))
        if run.message:
            rows.append(("Message", run.message))
        return markup.card("Future", run.name, rows)

    def __reduce__(self) -> Any:
        """Refuse to be pickled in a place where penstock does not look for futures."""
        message = (
            f"the future of {self._run.name!r} cannot be pickled: pass it to a task directly, "
            "or in a list, tuple, set, dict or dataclass."
        )
        raise errors.UnserializableArgument(message)


Future = PenstockFuture


class PenstockFutureList(list[PenstockFuture[R]], Generic[R]):
    """What `.map` returns: the futures of its elements, in order."""

    futures_inside = True  # `refs.replace` walks it like a list

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of all runs; no bytes move."""
        wait(self, timeout)

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """Return the values in order, as soon as all are there or one has failed.

        Parameters
        ----------
        timeout : float, optional
            Seconds for all of them together.
        raise_on_failure : bool
            False puts exceptions in the place of values.

        Raises
        ------
        TimeoutError
            If not all have ended in time.
        Exception
            Of the first run that failed.
        """
        try:
            return self._results(timeout, raise_on_failure)
        except BaseException as error:
            errors.hide_frames(error)
            raise

    def _results(self, timeout: float | None, raise_on_failure: bool) -> list[R]:
        if not self:
            return []
        runs = [future._run for future in self]
        if not all(run.done for run in runs):
            _warn_in_loop()
        waiting.wait(runs, timeout, until_failure=raise_on_failure, heed=True)
        if raise_on_failure:
            failed = next((run for run in runs if values.has_failed(run)), None)
            if failed is not None:
                values.results([failed])
        if not all(run.settled for run in runs):
            message = f"Timed out waiting for all futures to complete within {timeout} seconds"
            raise TimeoutError(message)
        return values.results(runs, raise_on_failure=raise_on_failure)

    def _repr_html_(self) -> str:
        """Show in a notebook: how many there are in each state, and the first of them."""
        counts = Counter((str(future._run.type), future._run.state_name) for future in self)
        rows: list[tuple[str, str]] = [
            (markup.badge(kind, name), str(number)) for (kind, name), number in counts.most_common()
        ]
        size = sum(future.nbytes for future in self)
        if size:
            rows.append(("Size", human_bytes(size)))
        listed = [(one.name, markup.badge(one._run.type, one._run.state_name)) for one in self[:10]]
        more = [("…", f"{len(self) - 10} more")] if len(self) > 10 else []
        return markup.card("Futures", f"{len(self)} in all", [*rows, *listed, *more])

    def cancel(self, force: bool = False) -> bool:
        """Ask all runs to stop; answer whether any of them will."""
        return cancelling.cancel([future._run for future in self], force=force)

    def reduce(
        self, op: Callable[[list[Any]], Any], fanin: int = 8, order: str = "index"
    ) -> PenstockFuture[Any]:
        """Combine the values by a tree of tasks on the cluster, without moving them here.

        Parameters
        ----------
        op : task or callable
            Takes a list of at most `fanin` values and returns their combination; must be
            associative.
        fanin : int
            Operands of one task.
        order : {"index", "completion"}
            "index" combines neighbours, so that the association is the same in every run;
            "completion" combines what is there first, so that fewer values wait for others. Sums
            of floating-point numbers then differ in their last digits from run to run.

        Returns
        -------
        PenstockFuture
            Of the one value that is left.
        """
        from penstock.engine import ambient, reducing
        from penstock.engine.task import Task

        reducing.check(len(self), fanin, order)
        combine = op if isinstance(op, Task) else Task(op)
        if order == "index" or len(self) <= fanin:
            return reducing.by_index(combine, self, fanin)
        return reducing.by_completion(combine, self, fanin, ambient.scope_for_submit(combine.name))

    @overload
    def __getitem__(self, index: SupportsIndex) -> PenstockFuture[R]: ...
    @overload
    def __getitem__(self, index: slice) -> PenstockFutureList[R]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        """Answer one future, or a list of futures for a slice."""
        found = super().__getitem__(index)
        return PenstockFutureList(found) if isinstance(found, list) else found


class DoneAndNotDoneFutures(NamedTuple):
    """What `wait` returns."""

    done: set[PenstockFuture[Any]]
    not_done: set[PenstockFuture[Any]]


def wait(futures: Iterable[PenstockFuture[Any]], timeout: float | None = None) -> DoneAndNotDoneFutures:
    """Wait for futures; no bytes move.

    Parameters
    ----------
    futures : iterable of PenstockFuture
        From any runs.
    timeout : float, optional
        Seconds for all of them together; None waits for ever.

    Returns
    -------
    DoneAndNotDoneFutures
        ``(done, not_done)``, two sets.
    """
    unique = list(futures)
    seconds = None if timeout is None else check_timeout(timeout)
    waiting.wait([future._run for future in unique], seconds, heed=True)
    done = {future for future in unique if future._run.settled}
    return DoneAndNotDoneFutures(done, {future for future in unique if future not in done})


def first_completed(
    futures: Iterable[PenstockFuture[R]], timeout: float | None = None, *, cancel_rest: bool = False
) -> PenstockFuture[R]:
    """Wait for the first future that ends with a value; no bytes move.

    Parameters
    ----------
    futures : iterable of PenstockFuture
        From any runs.
    timeout : float, optional
        Seconds.
    cancel_rest : bool
        Ask all others to stop.

    Returns
    -------
    PenstockFuture
        The first that completed; if none does, the one that ended last.

    Raises
    ------
    ValueError
        If there is no future.
    TimeoutError
        If none has ended with a value in time.
    """
    every = list(dict.fromkeys(futures))
    if not every:
        message = "first_completed() needs at least one future."
        raise ValueError(message)
    found = every[0]
    for found in as_completed(every, timeout):
        if found._run.completed:
            break
    if cancel_rest:
        cancelling.cancel([future._run for future in every if future is not found])
    return found


def resolve_futures_to_results(expr: Any) -> Any:
    """Wait for the futures anywhere in a structure, and put their values in their places.

    Parameters
    ----------
    expr : object
        Lists, tuples, sets, dicts, dataclasses and pydantic models are walked, as for arguments of tasks.

    Raises
    ------
    Exception
        Of the first run that failed; under `allow_failure` the exception takes the place of the value.
    """
    runs = _runs_in(expr)
    waiting.wait(runs, heed=True)
    completed = [run for run in runs if run.completed]
    found = dict(zip(completed, values.results(completed), strict=True))

    def leaf(item: Any, tolerant: int) -> Any:
        if not isinstance(item, PenstockFuture):
            return item
        run = item._run
        return found[run] if run in found else values.results([run], raise_on_failure=not tolerant)[0]

    return refs.replace(expr, leaf)


def resolve_futures_to_states(expr: Any) -> Any:
    """Wait for the futures anywhere in a structure, and put their states in their places; no bytes move.

    Parameters
    ----------
    expr : object
        Walked as by `resolve_futures_to_results`.
    """
    waiting.wait(_runs_in(expr), heed=True)

    def leaf(item: Any, _: int) -> Any:
        return item.state if isinstance(item, PenstockFuture) else item

    return refs.replace(expr, leaf)


def _runs_in(expr: Any) -> list[TaskRun]:
    found: dict[TaskRun, None] = {}

    def leaf(item: Any, _: int) -> Any:
        if isinstance(item, PenstockFuture):
            found[item._run] = None
        return item

    refs.replace(expr, leaf)
    return list(found)


class as_completed:  # noqa: N801 - the standard library's name; an iterator, plain and async
    """Yield futures as they end, each once: ``for f in as_completed(fs)``, or ``async for``.

    Parameters
    ----------
    futures : iterable of PenstockFuture
        From any runs.
    timeout : float, optional
        Seconds for all of them together.

    Raises
    ------
    TimeoutError
        From the iteration: "2 (of 3) futures unfinished".
    """

    def __init__(self, futures: Iterable[PenstockFuture[Any]], timeout: float | None = None) -> None:
        self._futures = list(dict.fromkeys(futures))
        self._deadline = None if timeout is None else time.monotonic() + check_timeout(timeout)
        self._ended: list[PenstockFuture[Any]] = []
        self._changed = threading.Condition()
        self._taken = 0
        self._wakers: list[Callable[[], Any]] = []
        for future in self._futures:
            future._run.carrier.endings.add_callback(future._run, self._arrive(future))
        for session in {future._run.carrier for future in self._futures}:
            session.flush()

    def _arrive(self, future: PenstockFuture[Any]) -> Callable[[Any], None]:
        def arrived(_: Any) -> None:
            with self._changed:
                self._ended.append(future)
                self._changed.notify_all()
                wakers, self._wakers = self._wakers, []
            for wake in wakers:
                wake()

        return arrived

    def __iter__(self) -> Iterator[PenstockFuture[Any]]:
        """Iterate, blocking between ends."""
        return self

    def __next__(self) -> PenstockFuture[Any]:
        """Return the next future that has ended."""
        if self._taken == len(self._futures):
            raise StopIteration
        self._help()
        with self._changed:
            while len(self._ended) == self._taken:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._time_out()
                self._changed.wait(left)
            return self._take()

    def _help(self) -> None:
        """Inside a task that waits, do one of the runs here, or give the slot back: it may be the only one."""
        if current() is None or len(self._ended) > self._taken:
            return
        pending = [future._run for future in self._futures if not future._run.settled]
        if pending:
            waiting.wait_any(pending, self._deadline)

    def _take(self) -> PenstockFuture[Any]:
        future = self._ended[self._taken]
        self._taken += 1
        return future

    def _time_out(self) -> None:
        message = f"{len(self._futures) - self._taken} (of {len(self._futures)}) futures unfinished"
        raise TimeoutError(message)

    def __aiter__(self) -> AsyncIterator[PenstockFuture[Any]]:
        """Iterate without blocking the event loop."""
        return self

    async def __anext__(self) -> PenstockFuture[Any]:
        """Return the next future that has ended."""
        if self._taken == len(self._futures):
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        while len(self._ended) == self._taken:
            woken = asyncio.Event()
            with self._changed:
                if len(self._ended) > self._taken:
                    break
                self._wakers.append(functools.partial(loop.call_soon_threadsafe, woken.set))
            left = None if self._deadline is None else self._deadline - time.monotonic()
            try:
                await asyncio.wait_for(woken.wait(), left)
            except TimeoutError:
                self._time_out()
        return self._take()


def check_timeout(timeout: float) -> float:
    """Refuse a negative time-out.

    Raises
    ------
    ValueError
        Naming the value.
    """
    if timeout < 0:
        message = f"'timeout' must be a non-negative number, got {timeout}"
        raise ValueError(message)
    return timeout


def _value_of(future: PenstockFuture[Any]) -> Any:
    return values.results([future._run])[0]


def run_of(value: Any) -> TaskRun | None:
    """Return the run behind a future, or behind the state of a run whose value is elsewhere."""
    if isinstance(value, PenstockFuture):
        return value._run
    if isinstance(value, State):
        run: TaskRun | None = getattr(value.data, "run", None)
        return run
    return None


_warned: set[int] = set()


def _warn_in_loop() -> None:
    """Say once per loop that `.result()` blocks it; it works, as in Prefect."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if id(loop) not in _warned:
        _warned.add(id(loop))
        warnings.warn(
            "future.result() blocks the running event loop until the run ends; use 'await future'.",
            stacklevel=4,
        )
