"""Tasks on Ray: references stay with Ray, small records come back to one thread of the driver.

Every task has two results, the value and a note of a few hundred bytes (its record), so that its
end can be read without its value. One thread waits for notes and hands them on in batches. Tasks
depend on the values of others by Ray's own references, and on their mere end by the notes.

A note is a second object of Ray and costs 8 % more CPU in all processes (1,370 tasks a second
against 1,410 with one result; medians of 6 runs of 4,000, 2 shared CPUs). In return nothing has to
be known about the size of a value, and ``wait_for`` moves no bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Self

import ray
from ray.experimental import internal_kv

from penstock import errors
from penstock.runners import ray_cluster, ray_nodes, ray_tasks, shipment, worker
from penstock.runners.base import Key, Options, Ref, Report, RunnerInfo, Submission, TaskRunner
from penstock.runners.ray_errors import first_words
from penstock.runners.ray_pump import Flight, Handle, Pump, arrived, missing
from penstock.runners.ray_queue import Held, Queue
from penstock.runners.worker.sizes import size_of

FUNCTION_BYTES = 8_192  # larger functions are stored once, not sent with each task
CANCEL_SECONDS = 0.2
DEAF_SECONDS, DEAF_LOOKS = 0.5, 10

_numbers = itertools.count()


class RayTaskRunner(TaskRunner):
    """Runs tasks on Ray: a local one that it starts, or one that is running.

    A Ray that is initialised in this process is used as it is and left open. The driver owns all
    references. Ray itself never runs a task twice (its ``max_retries`` is 0): the engine counts
    attempts and resubmits, the producer of a lost result included, so lineage is not needed.

    Parameters
    ----------
    address : str, optional
        ``"auto"`` attaches to a Ray that runs on this machine, ``"host:port"`` and
        ``"ray://host:port"`` to another one; None uses ``RAY_ADDRESS``, or starts a local Ray.
    init_kwargs : dict, optional
        Further arguments of ``ray.init``, such as ``{"num_cpus": 4}``.
    strict : bool
        Refuse a cluster whose libraries do not fit the driver's, instead of a warning.
    max_in_flight : int
        How many tasks the engine should hand to Ray at a time.

    Examples
    --------
    >>> @flow(task_runner=RayTaskRunner(init_kwargs={"num_cpus": 4}))
    ... def pipeline(): ...
    """

    name = "ray"
    keeps = True

    def __init__(
        self,
        address: str | None = None,
        init_kwargs: dict[str, Any] | None = None,
        *,
        strict: bool = True,
        max_in_flight: int = 50_000,
    ) -> None:
        super().__init__()
        self.address = address
        self.init_kwargs = dict(init_kwargs or {})
        self.strict = strict
        self.max_in_flight = max_in_flight
        self._inner = False  # lives in a task
        self._joined = False
        self._prefix = b""
        self._info = RunnerInfo("ray", dependencies=True, interrupts=True)
        self._pump: Pump | None = None
        self._queue = Queue(1, 0)
        self._end_lending: Callable[[], None] = _nothing
        self._remotes: dict[tuple[Options, str, bool], Any] = {}
        self._functions: dict[bytes, str] = {}

    @classmethod
    def _from_worker(cls) -> Self:
        """Make the runner of a task that submits tasks: it uses the worker's own connection."""
        runner = cls()
        runner._inner = True
        return runner

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RayTaskRunner):
            return NotImplemented
        return self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash((type(self), self.address))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._info.address or self.address,))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(address={self.address!r})"

    def _settings(self) -> tuple[Any, ...]:
        return (type(self), self.address, self.init_kwargs, self.strict, self.max_in_flight)

    starting_text = "The task runner must be started before submitting work."

    def duplicate(self) -> Self:
        """Return an equal runner; all runners of a process share its one connection to Ray."""
        return type(self)(
            self.address, self.init_kwargs, strict=self.strict, max_in_flight=self.max_in_flight
        )

    # -- life -----------------------------------------------------------------------------
    def start(self) -> None:
        """Connect to Ray or start it."""
        if self._inner:
            if not ray.is_initialized():
                message = "this process is no worker of Ray."
                raise errors.RunnerUnavailable(message)
        else:
            ray_cluster.join(self.address, self.init_kwargs)
            self._joined = True
        try:
            if not self._inner:
                ray_nodes.check_versions(strict=self.strict)
            self._info = _described_once() if self._inner else ray_nodes.describe()
            self._prefix = uuid.uuid4().hex.encode() + b":"
            self._queue = Queue(1, 0) if self._inner else Queue(*ray_nodes.cluster_size())
            self._pump = Pump(self.deliver, self._prefix + b"started:", self._queue, self._go_on)
            self._pump.start()
            if self._inner:  # hence `blocked` has nothing to do
                self._end_lending = ray_tasks.lend_slot(self._pump.unfinished)
        except BaseException:
            self.stop()
            raise
        atexit.register(self._leave)  # after Ray's own, hence called before it

    def stop(self) -> None:
        """Leave Ray; tasks that still run are asked to stop."""
        atexit.unregister(self._leave)
        self._leave()

    def _leave(self) -> None:
        self._end_lending()
        self._end_lending = _nothing
        pump, self._pump = self._pump, None
        if pump is not None:
            left = pump.close()
            with contextlib.suppress(Exception):  # Ray may be gone
                pump.cancel(left)
                if self._functions or pump.has_announced:
                    internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=ray_tasks.STORE)
        self._remotes.clear()
        self._functions.clear()
        if self._joined:
            self._joined = False
            with contextlib.suppress(Exception):
                ray_cluster.leave()

    @property
    def info(self) -> RunnerInfo:
        """What the Ray that is used can do."""
        return self._info

    def inside(self) -> str:
        """Tasks find Ray in their own process."""
        return "ray"

    # -- work -----------------------------------------------------------------------------
    def _running(self) -> Pump:
        if self._pump is None:
            message = "The task runner must be started before submitting work."
            raise RuntimeError(message)
        if not ray.is_initialized():  # a call would start another one
            message = "The Ray of this runner was shut down."
            raise RuntimeError(message)
        return self._pump

    def put(self, values: Sequence[Any]) -> list[Ref]:
        """Place each value once in Ray's object store; the driver owns it."""
        self._running()
        found = []
        for value in values:
            key = ("put", next(_numbers))
            try:
                reference = ray.put(value)
            except TypeError as error:
                message = f"a value of type {type(value).__qualname__} cannot be sent to Ray: {error}"
                raise errors.UnserializableArgument(message) from error
            found.append(Ref(key, Handle(key, reference, None), size_of(value)))
        return found

    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        """Queue the work and start what there is room for; Ray resolves the references."""
        self._running()
        found: list[Ref] = []
        queued: list[Held] = []
        batch: dict[Key, Handle] = {}
        for submission in submissions:
            handle = batch[submission.key] = Handle(submission.key, None, None)
            upstream = tuple(batch[ref.key] if ref.handle is None else ref.handle for ref in submission.refs)
            before = tuple(batch[ref.key] if ref.handle is None else ref.handle for ref in submission.after)
            queued.append(Held(submission, handle, upstream, before))
            found.append(Ref(submission.key, handle))
        self._queue.add(queued)
        try:
            self._go_on()
        except BaseException:
            self.cancel(found)
            raise
        return found

    def _go_on(self, most: int = sys.maxsize) -> None:
        """Tell Ray of what there is room for; called whenever something was added or has ended."""
        pump, flights = self._running(), list[Flight]()
        try:
            for _ in range(most):
                with self._queue.lock:
                    held = self._queue.take()
                    if held is None:
                        break
                    flights.append(self._start(held))
                    self._queue.sent(held)
                if len(flights) == 64:  # reports of the first ones need not wait for the last
                    pump.add(flights)
                    flights = []
        finally:
            pump.add(flights)

    def _start(self, held: Held) -> Flight:
        submission, handle = held.submission, held.handle
        key = submission.key
        after = [note for one in held.before if (note := held.given[one][1]) is not None]
        values = [held.given[one][0] for one in held.upstream]
        assert isinstance(submission.function, bytes)
        assert isinstance(submission.arguments, bytes)
        head = ray_tasks.pack_head(
            key,
            submission.order,
            self._function(submission.function),
            submission.arguments,
            self._prefix + b"started:" if submission.announce else None,
            len(after),
        )
        remote = self._remote(submission.options, key[0].rpartition("-")[0], submission.streams)
        answer = remote.remote(head, *after, *values)
        handle.value, handle.note = (answer.completed(), answer) if submission.streams else answer
        return Flight(handle, handle.value, handle.note, held.upstream, submission.announce, held.kind)

    def _function(self, function: bytes) -> bytes | str:
        """Return a small function itself, the key of a large one in Ray's key-value store."""
        if len(function) <= FUNCTION_BYTES:
            return function
        found = self._functions.get(function)
        if found is None:
            found = f"{self._prefix.decode()}{hashlib.sha256(function).hexdigest()}"
            internal_kv._internal_kv_put(found.encode(), function, overwrite=True, namespace=ray_tasks.STORE)
            self._functions[function] = found
        return found

    def _remote(self, options: Options, task: str, streams: bool) -> Any:
        """Return an exported function with options; making either is too slow for each call."""
        try:
            found = self._remotes.get((options, task, streams))
        except TypeError:  # an option that has no hash, such as runtime_env: made anew for each call
            return _exported(streams).options(name=task or "penstock", **_ray_options(options))
        if found is None:
            if len(self._remotes) > 1_000:
                self._remotes.clear()
            found = _exported(streams).options(name=task or "penstock", **_ray_options(options))
            self._remotes[options, task, streams] = found
        return found

    def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """Bring values to this process; arrays are views of shared memory that refuse writes."""
        self._running()
        handles: list[Handle] = [ref.handle for ref in refs]
        try:
            values = ray.get([handle.value for handle in handles])
        except (ray.exceptions.RayError, TypeError) as error:
            if any(handle.value is None for handle in handles):
                message = "the result was released before it was fetched."
                raise errors.ResultLost(message) from None
            if not isinstance(error, ray.exceptions.RayError):
                raise
            message = f"the result is gone: {first_words(error)}"
            raise errors.ResultLost(message) from None
        return [arrived(value) for value in values]

    def missing(self, refs: Sequence[Ref]) -> list[Ref]:
        """Return those whose values Ray has lost, with the node that held them."""
        self._running()
        return [ref for ref in refs if isinstance(ref.handle, Handle) and missing(ref.handle)]

    def unmet(self, options: Options) -> str:
        """Say why no node of the cluster can run a task."""
        return ray_nodes.unmet(_ray_options(dataclasses.replace(options, workers=(), native=())))

    def release(self, refs: Sequence[Ref]) -> None:
        """Drop our references; Ray frees what nobody else refers to."""
        for ref in refs:
            if isinstance(ref.handle, Handle):
                ref.handle.value = ref.handle.note = None

    def cancel(self, refs: Sequence[Ref], *, force: bool = False) -> list[Key]:
        """Stop work. Pending tasks are dropped, and their keys returned.

        With `force` the processes are ended; Ray does not say which tasks had begun, so every
        key of a task that Ray knew of is then reported as lost, by `CancelledRun`.
        """
        pump = self._running()
        dropped, orphans = self._queue.drop(ref.handle for ref in refs if isinstance(ref.handle, Handle))
        pump.tell([Report(held.handle.key, "upstream") for held in orphans])
        keys = [held.handle.key for held in dropped]
        notes = [ref.handle.note for ref in refs if isinstance(ref.handle, Handle)]
        flights = pump.find(notes, claim=not force)
        deaf = [flight for flight in flights if force and flight.asked]
        pump.cancel(flights, force=force)
        if deaf:
            threading.Thread(
                target=_end_deaf, args=(pump, deaf), name="penstock-ray-kill", daemon=True
            ).start()
        if force or not flights:
            return keys
        ends = [flight.end for flight in flights]
        patience = CANCEL_SECONDS + len(ends) / 5_000
        ended, _ = ray.wait(ends, num_returns=len(ends), timeout=patience, fetch_local=False)
        keys.extend(pump.settle(flights, ended))
        self._go_on()
        return keys


@functools.cache
def _described_once() -> RunnerInfo:
    """A worker serves many tasks with runners of their own, and its Ray stays the same."""
    return ray_nodes.describe()


def _nothing() -> None:
    pass


def _end_deaf(pump: Pump, flights: Sequence[Flight]) -> None:
    """See to it that tasks end which did not listen to the first request.

    A process whose code holds Python's lock for long is stuck in that request: it cannot read the
    second one, by which it would end itself.
    """
    for _ in range(DEAF_LOOKS):
        time.sleep(DEAF_SECONDS)  # Ray's head hears once a second which process runs what
        left = pump.find(flight.note for flight in flights)
        if not left:
            return
        with contextlib.suppress(Exception):  # private ground of Ray: nothing else depends on it
            ray_nodes.end_processes({flight.end.task_id().binary() for flight in left})


# -- what Ray is asked for ----------------------------------------------------------------


@functools.cache
def _exported(streams: bool) -> Any:
    """Return one of the two remote functions of this process; Ray exports it again where it has to."""
    here = getattr(worker, "_sources", None)  # where it was shipped as text itself
    function = ray_tasks.entry(here or shipment.sources("ray_tasks.py"), streams=streams)
    results = "streaming" if streams else 2
    return ray.remote(num_returns=results, max_retries=0, retry_exceptions=False)(function)


def _ray_options(options: Options) -> dict[str, Any]:
    wishes: dict[str, Any] = {"num_cpus": options.threads}
    others: dict[str, float] = {}
    for name, amount in options.resources:
        known = {"cpu": "num_cpus", "gpu": "num_gpus", "memory": "memory"}.get(name.lower())
        if known is None:
            others[name] = amount
        else:
            wishes[known] = int(amount) if known == "memory" else amount
    if others:
        wishes["resources"] = others
    wishes.update((name, value) for name, value in options.native if name != "allow_other_workers")
    if options.workers:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

        nodes = [ray_nodes.node_id(name) for name in options.workers]
        wishes["scheduling_strategy"] = OnNode(nodes[0], soft=len(nodes) > 1)
    return wishes
