"""`runner.get_executor()`: an executor of the standard library over a runner, for plain functions.

What it runs is no task: it has no run, no state and no row in the record.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from penstock import errors
from penstock.runners import packing
from penstock.runners.base import Key, Ref, Report, Submission, TaskRunner, new_tag
from penstock.runners.remote_error import Failure
from penstock.runners.worker.failure import Failed

P = ParamSpec("P")
R = TypeVar("R")

BATCH = 256  # calls of one `map` that leave in one message: packing the next ones overlaps their work


@dataclass(slots=True, eq=False)
class _Flight:
    """One call on its way, and what has become known of it."""

    future: RunnerFuture
    submission: Submission
    name: str
    ref: Ref | None = None
    report: Report | None = None
    asked: bool = False  # somebody wanted it to stop, perhaps too late


class RunnerFuture(Future[Any]):
    """The future of one call: `concurrent.futures.Future`, cancelled where the call waits for its turn."""

    def __init__(self, executor: RunnerExecutor) -> None:
        super().__init__()
        self._executor = executor

    def cancel(self) -> bool:
        """Withdraw the call if it has not begun.

        Returns
        -------
        bool
            Whether it will not run. A call that runs goes on, and answers False.
        """
        self._executor.withdraw([self])
        return self.cancelled()


class RunnerExecutor(Executor):
    """Runs plain functions on a runner, behind the interface of `concurrent.futures.Executor`.

    Values come to this process as soon as they are made, which is what an executor is for; to leave
    them where they are, submit tasks instead.

    Parameters
    ----------
    runner : TaskRunner
        Started; it stays so until the executor is shut down.

    Raises
    ------
    RuntimeError
        If the runner is not started.
    """

    def __init__(self, runner: TaskRunner) -> None:
        if not runner.is_open:
            raise RuntimeError(runner.starting_text)
        self._runner = runner.open()
        self._tag = new_tag()
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._flights: dict[Key, _Flight] = {}
        self._keys: weakref.WeakKeyDictionary[RunnerFuture, Key] = weakref.WeakKeyDictionary()
        self._arrived: deque[_Flight] = deque()
        self._courier: concurrent.futures.ThreadPoolExecutor | None = None
        self._is_closing = False
        runner.listen(self._tag, functools.partial(_hear, weakref.ref(self)))
        self._leave = weakref.finalize(self, _leave, runner, self._tag)
        self._leave.atexit = False  # what a runner has to close at exit it knows itself

    # -- what users call --------------------------------------------------------------------
    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a function on the runner.

        Parameters
        ----------
        fn : callable
            A plain function, or one that gives a coroutine or a generator, which is run to its end.
        *args, **kwargs
            Its arguments, captured now where they leave this process.

        Returns
        -------
        concurrent.futures.Future
            Raises what the function raised, with the user's lines in its traceback.

        Raises
        ------
        RuntimeError
            After `shutdown`.
        TypeError
            If `fn` is a task, or if something cannot be sent to another process.
        """
        return self._send(fn, [(args, kwargs)])[0]

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[R]:
        """Call a function on each element, side by side.

        Parameters
        ----------
        fn : callable
            See `submit`.
        *iterables
            Drawn at once; the shortest one ends the map.
        timeout : float, optional
            Seconds from now until the last value has to be there.
        chunksize : int
            For the sake of callers of process pools; calls leave in large messages anyhow.

        Returns
        -------
        iterator
            The values in the order of the elements.

        Raises
        ------
        TimeoutError
            From the iterator; what has not begun by then is withdrawn.
        """
        if chunksize < 1:
            message = "chunksize must be >= 1."
            raise ValueError(message)
        end = None if timeout is None else time.monotonic() + timeout
        elements = zip(*iterables, strict=False)
        futures: list[RunnerFuture] = []
        try:
            while batch := list(itertools.islice(elements, BATCH)):
                futures += self._send(fn, [(args, {}) for args in batch])
        except BaseException:
            self.withdraw(futures)
            raise
        return self._values(deque(futures), end)

    def _values(self, futures: deque[RunnerFuture], end: float | None) -> Iterator[Any]:
        try:
            while futures:
                left = None if end is None else end - time.monotonic()
                value = futures[0].result(left)
                futures.popleft()  # nobody here holds the value while the caller uses it
                yield value
                del value
        finally:
            self.withdraw(futures)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and let go of the runner when the last one has ended.

        Parameters
        ----------
        wait : bool
            Return only then.
        cancel_futures : bool
            Withdraw what has not begun.
        """
        with self._lock:
            self._is_closing = True
            left = [flight.future for flight in self._flights.values()]
        if cancel_futures:
            self.withdraw(left)
        if wait:
            concurrent.futures.wait(left)
        self._leave_if_done()
        courier = self._courier
        if courier is not None:
            courier.shutdown(wait=wait)

    def withdraw(self, futures: Iterable[RunnerFuture]) -> None:
        """Cancel those futures whose calls have not begun."""
        with self._lock:
            waiting = [
                flight
                for future in futures
                if not future.done() and not future.running()
                if (flight := self._flights.get(self._keys.get(future, ("", -1)))) is not None
                and flight.ref is not None
                and flight.report is None
            ]
            for flight in waiting:
                flight.asked = True
        stopped = _stopped(self._runner, [flight.ref for flight in waiting if flight.ref is not None])
        for flight in waiting:
            if flight.submission.key in stopped and self._take(flight):
                Future.cancel(flight.future)
                flight.future.set_running_or_notify_cancel()  # who waits for it hears of it here
        self._leave_if_done()

    # -- on the way -------------------------------------------------------------------------
    def _send(
        self, fn: Callable[..., Any], calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> list[RunnerFuture]:
        if hasattr(type(fn), "submit") and hasattr(fn, "fn"):
            message = (
                f"an executor runs plain functions, and {fn!r} is a task: use its own 'submit' or 'map', "
                "or hand its function over, 'task.fn'."
            )
            raise TypeError(message)
        name = str(getattr(fn, "__name__", type(fn).__name__)).strip("<>")
        function = fn if self._runner.in_process else packing.pack_function(fn)
        flights = [
            _Flight(RunnerFuture(self), self._submission(name, function, args, kwargs), name)
            for args, kwargs in calls
        ]
        with self._lock:
            if self._is_closing:
                message = "cannot schedule new futures after shutdown"
                raise RuntimeError(message)
            if flights:
                _busy.add(self)
            for flight in flights:
                self._flights[flight.submission.key] = flight
                self._keys[flight.future] = flight.submission.key
        self._depart(flights)
        return [flight.future for flight in flights]

    def _submission(
        self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Submission:
        key = (f"{name}-{self._tag}", next(self._numbers))
        order = {"plain": True, "run": "", "attempt": 1, "task": "", "name": name, "inputs": "shared"}
        if self._runner.in_process:
            return Submission(key, order, function, lambda _: (args, kwargs), announce=True)  # type: ignore[arg-type]
        try:
            arguments = packing.dumps((args, kwargs))
        except Exception as error:
            message = f"the arguments of {name!r} cannot be sent to another process: {error}"
            raise errors.UnserializableArgument(message) from error
        return Submission(key, pickle.dumps(order, 4), function, arguments, announce=True)

    def _depart(self, flights: Sequence[_Flight]) -> None:
        try:
            refs = self._runner.send([flight.submission for flight in flights])
        except BaseException:
            for flight in flights:  # their futures are in nobody's hands
                self._take(flight)
            raise
        arrived = []
        with self._lock:
            for flight, ref in zip(flights, refs, strict=True):
                flight.ref = ref
                if flight.report is not None:
                    arrived.append(flight)
        self._settle_soon(arrived)

    def hear(self, reports: Sequence[Report]) -> None:
        """Take what the runner says of calls."""
        arrived, again = [], []
        with self._lock:
            for report in reports:
                flight = self._flights.get(report.key)
                if flight is None or flight.report is not None:
                    continue
                if report.kind == "started":
                    if not flight.future.running():
                        flight.future.set_running_or_notify_cancel()
                elif report.kind == "lost" and getattr(report.cause, "excused", False):
                    again.append(self._take_again(flight))
                elif report.kind in {"ended", "lost"}:
                    flight.report = report
                    if flight.ref is not None:
                        arrived.append(flight)
        self._settle_soon(arrived)
        if again:
            self._depart(again)

    def _take_again(self, flight: _Flight) -> _Flight:
        """A worker was ended in good order: its calls begin anew, under names of their own."""
        old = flight.submission
        del self._flights[old.key]
        key = (old.key[0], next(self._numbers))
        new = Submission(key, old.order, old.function, old.arguments, announce=not flight.future.running())
        found = _Flight(flight.future, new, flight.name)
        self._flights[key] = found
        self._keys[flight.future] = key
        return found

    # -- at the end -------------------------------------------------------------------------
    def _settle_soon(self, flights: Sequence[_Flight]) -> None:
        """Settle here what lies in this process; bytes are fetched by a thread that may wait for them."""
        if not flights:
            return
        if self._runner.in_process:
            self._settle(flights)
            return
        self._arrived.extend(flights)
        with self._lock:
            if self._courier is None:
                self._courier = concurrent.futures.ThreadPoolExecutor(1, "penstock-executor")
            courier = self._courier
        courier.submit(self._bring)

    def _bring(self) -> None:
        flights = []
        while self._arrived:
            flights.append(self._arrived.popleft())
        self._settle(flights)

    def _settle(self, flights: Sequence[_Flight]) -> None:
        good = [flight for flight in flights if flight.report is not None and flight.report.kind == "ended"]
        records = [pickle.loads(flight.report.record) for flight in good if flight.report is not None]
        completed = [
            flight for flight, record in zip(good, records, strict=True) if record["status"] == "completed"
        ]
        values = dict(zip(map(id, completed), self._fetched(completed), strict=True))
        problems = {
            id(flight): _problem(flight, record)
            for flight, record in zip(good, records, strict=True)
            if record["status"] != "completed"
        }
        for flight in flights:
            value: Any = values.get(id(flight))
            error = problems.get(id(flight)) or _loss(flight)
            if isinstance(value, _Gone):
                error, value = value.error, None
            if self._take(flight):
                if error is None:
                    flight.future.set_result(value)
                else:
                    flight.future.set_exception(error)
        self._leave_if_done()

    def _fetched(self, flights: Sequence[_Flight]) -> list[Any]:
        refs = [flight.ref for flight in flights if flight.ref is not None]
        try:
            return self._runner.fetch(refs) if refs else []
        except Exception as error:
            if len(flights) > 1:  # some may be there
                return [value for flight in flights for value in self._fetched([flight])]
            return [_Gone(error)]

    def _take(self, flight: _Flight) -> bool:
        """Strike a call off the list; whoever does it ends its future."""
        with self._lock:
            taken = self._flights.pop(flight.submission.key, None) is not None
            if not self._flights:
                _busy.discard(self)
        if taken and flight.ref is not None:
            self._runner.release([flight.ref])
        return taken

    def _leave_if_done(self) -> None:
        if self._is_closing and not self._flights:
            self._leave()  # once; without the lock, since a thread of the runner may be on its way into `hear`


_busy: set[RunnerExecutor] = set()
"""Executors with calls under way, which nobody else need hold."""


@dataclass(slots=True)
class _Gone:
    """Stands for a value that could not be fetched."""

    error: Exception


def _hear(executor: weakref.ref[RunnerExecutor], reports: list[Report]) -> None:
    found = executor()
    if found is not None:
        found.hear(reports)


def _leave(runner: TaskRunner, tag: str) -> None:
    runner.unlisten(tag)
    runner.close()


def _stopped(runner: TaskRunner, refs: list[Ref]) -> set[Key]:
    """Withdraw what has not begun, and leave alone what has, as far as the back end can tell the two apart."""
    if type(runner).take_back is not TaskRunner.take_back:
        return {ref.key for ref in refs if runner.take_back(ref)}
    return set(runner.cancel(refs)) if refs else set()


def _problem(flight: _Flight, record: dict[str, Any]) -> BaseException:
    """Return what a call has raised."""
    assert flight.report is not None
    if record["status"] == "cancelled" or (flight.asked and record["status"] == "crashed"):
        return CancelledError()  # the request came while it began
    worker = flight.report.worker or record["worker"] or f"{record['host']}:{record['pid']}"
    where = f"({flight.name!r}, on {worker})"
    value = flight.ref.handle if flight.ref is not None else None
    own = value.error if isinstance(value, Failed) else None
    if own is None:
        return Failure(record["error"], where).exception("")
    own.add_note(where)
    return own


def _loss(flight: _Flight) -> BaseException | None:
    """Return what became of a call that did not come to its end."""
    assert flight.report is not None
    if flight.report.kind != "lost":
        return None
    if flight.asked and isinstance(flight.report.cause, errors.CancelledRun):
        return CancelledError()
    return flight.report.cause or errors.WorkerLost(f"the worker that ran {flight.name!r} is gone.")


__all__ = ["RunnerExecutor", "RunnerFuture"]
