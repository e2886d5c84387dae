"""Work on a Dask cluster: one that runs, or one of this machine that comes and goes with the flow."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Self

from penstock import errors
from penstock.runners import attach, dask_graph, dask_put, dask_runtime, dask_wishes
from penstock.runners.base import (
    Key,
    OnReports,
    Options,
    Ref,
    Report,
    RunnerInfo,
    Submission,
    TaskRunner,
    new_tag,
)
from penstock.runners.dask_watch import Watch
from penstock.runners.worker.arguments import opened
from penstock.runners.worker.coroutines import on_task_thread
from penstock.settings import settings

log = logging.getLogger("penstock.runners.dask")


class DaskTaskRunner(TaskRunner):
    """Runs tasks on a Dask cluster; values stay on the workers that made them.

    Without arguments a cluster of this machine is started, and closed after the flow. What the
    runner did not open it never closes.

    Parameters
    ----------
    cluster : distributed.deploy.Cluster or callable, optional
        A running cluster, which stays open; or something that makes one, which is closed.
    address : str, optional
        Of a running scheduler: ``tcp://host:8786``.
    cluster_class : str or callable, optional
        What makes the cluster, `distributed.LocalCluster` by default; a dotted name is imported.
    cluster_kwargs : dict, optional
        Arguments for it.
    adapt_kwargs : dict, optional
        Arguments for its ``adapt``: the cluster then grows and shrinks with the work.
    client_kwargs : dict, optional
        Arguments for `distributed.Client`: ``security``, ``timeout``.
    performance_report_path : str, optional
        Where to write Dask's own HTML report when the runner stops (needs bokeh).
    client : distributed.Client, optional
        A client of yours, used as it is.
    scheduler_file : str, optional
        File that a scheduler has written (``dask scheduler --scheduler-file``).
    strict : bool
        Refuse clusters whose versions do not fit.
    reconnect_timeout : float
        Seconds to wait for a scheduler that has died or cannot be reached. If one is back at its
        address by then, what had not ended is sent again at no cost; else it has crashed.
    max_in_flight : int
        Tasks that are with the cluster at a time.
    shared_memory : {"auto", "off"}, optional
        Whether worker processes of one host share large values instead of sending copies to each
        other; the setting ``PENSTOCK_SHARED_MEMORY`` if not given.

    Examples
    --------
    >>> @flow(task_runner=DaskTaskRunner(cluster_kwargs={"n_workers": 4}))
    ... def pipeline(): ...
    >>> DaskTaskRunner("tcp://10.0.0.1:8786")  # doctest: +SKIP
    """

    name = "dask"
    _worker = ""  # where the runner lives, if it is one of a task

    def __init__(
        self,
        cluster: Any = None,
        address: str | None = None,
        cluster_class: Any = None,
        cluster_kwargs: Mapping[str, Any] | None = None,
        adapt_kwargs: Mapping[str, Any] | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        performance_report_path: str | None = None,
        *,
        client: Any = None,
        scheduler_file: str | None = None,
        strict: bool = True,
        max_in_flight: int = 50_000,
        reconnect_timeout: float = 60.0,
        shared_memory: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(cluster, str):
            cluster, address = None, address or cluster
        self._wish = attach.Wish(
            cluster,
            address,
            cluster_class,
            cluster_kwargs,
            adapt_kwargs,
            client_kwargs,
            client,
            scheduler_file,
            strict,
        )
        if max_in_flight < 1:
            message = f"'max_in_flight' must be at least 1, got {max_in_flight}."
            raise ValueError(message)
        if shared_memory not in {None, "auto", "off"}:
            message = f"'shared_memory' must be 'auto' or 'off', got {shared_memory!r}."
            raise ValueError(message)
        self.performance_report_path = performance_report_path
        if reconnect_timeout < 0:
            message = f"'reconnect_timeout' must not be negative, got {reconnect_timeout}."
            raise ValueError(message)
        self.max_in_flight = max_in_flight
        self.reconnect_timeout = reconnect_timeout
        self.shared_memory = shared_memory
        self._attachment: attach.Attachment | None = None
        self._runtime: dask_runtime.Runtime | None = None
        self._watch: Watch | None = None
        self._placement: dask_put.Placement | None = None
        self._unshared = ""  # annotation of tasks whose results are not to be shared
        self._report: Any = None
        self._tag = new_tag()
        self._puts = itertools.count()
        self._direct: bool | None = None
        self._abandoned = False  # a session has left with work in progress
        # Flows leave a cluster open that took seconds to start; a report is due at the end of each.
        self.keeps = not self._wish.exists and performance_report_path is None
        self._summary: tuple[float, dict[str, Any]] = (0.0, {})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Make a runner from a YAML file that holds its arguments.

        Parameters
        ----------
        path : str
            A mapping: ``cluster_class: …``, ``cluster_kwargs: {…}``, ``address: …``.
        """
        found = attach.read_yaml(path)
        try:
            return cls(**found)
        except TypeError as error:
            message = f"{str(path)!r}: {error}"
            raise errors.ConfigurationError(message) from error

    # -- identity ---------------------------------------------------------------------------
    def __eq__(self, other: object) -> bool:
        """Compare settings; a cluster or client equals itself only."""
        return isinstance(other, DaskTaskRunner) and self._identity() == other._identity()

    def __hash__(self) -> int:
        """Hash by what names the cluster."""
        return hash((type(self), self._wish.address, self._wish.scheduler_file, id(self._wish.cluster)))

    def _identity(self) -> tuple[Any, ...]:
        wish = self._wish
        plain = dataclasses.replace(wish, cluster=None, client=None)
        return (
            id(wish.cluster),
            id(wish.client),
            plain,
            self.performance_report_path,
            self.max_in_flight,
            self.reconnect_timeout,
            self.shared_memory,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as an address, or as settings where there is none yet; never with a cluster inside."""
        address = self._address()
        if address:
            own: dict[str, Any] = {"max_in_flight": self.max_in_flight, "shared_memory": self.shared_memory}
            return functools.partial(type(self), address=address, **own), ()
        if self._wish.cluster is not None or self._wish.client is not None:
            message = "a DaskTaskRunner with a cluster or client inside cannot be pickled before it is open."
            raise TypeError(message)
        names = (
            "cluster_class",
            "cluster_kwargs",
            "adapt_kwargs",
            "client_kwargs",
            "scheduler_file",
            "strict",
        )
        kwargs = {name: getattr(self._wish, name) for name in names}
        kwargs.update(max_in_flight=self.max_in_flight, shared_memory=self.shared_memory)
        return functools.partial(type(self), **kwargs), ()

    def __repr__(self) -> str:
        """Show what names the cluster."""
        where = self._address() or self._wish.scheduler_file or self._wish.cluster_class or "local"
        return f"DaskTaskRunner({where})"

    def _address(self) -> str:
        if self._attachment is not None:
            return str(self._attachment.client.scheduler.address)
        named = self._wish.cluster if self._wish.cluster is not None else None
        return self._wish.address or str(getattr(named, "scheduler_address", "") or "")

    starting_text = "The task runner must be started before submitting work."

    def duplicate(self) -> Self:
        """Return the runner itself: it is counted, and one cluster serves all flows that use it."""
        return self

    # -- life -------------------------------------------------------------------------------
    def start(self) -> None:
        """Connect to the cluster or start it.

        Raises
        ------
        RunnerUnavailable
            If it does not answer, does not fit, or does not let its tasks be followed.
        """
        if self.performance_report_path is not None:
            attach.check_report()
        attachment = attach.attach(self._wish)
        try:
            self._runtime = dask_runtime.local() if attachment.local else dask_runtime.ship(attachment.client)
            self._follow(attachment)
            self._share(attachment)
            if self.performance_report_path is not None:
                self._report = attach.begin_report(attachment.client, self.performance_report_path)
        except BaseException:
            self._let_go(attachment)
            raise

    def _follow(self, attachment: attach.Attachment) -> None:
        assert self._runtime is not None
        self._summary = (time.monotonic(), self._runtime.join(attachment.client, self._worker))
        self._attachment = attachment
        self._watch = Watch(
            attachment.client, self._runtime.tracker, self.deliver, self._return, self.reconnect_timeout
        )
        if attachment.own_client:  # it gives up by itself, and never comes back
            attachment.client._timeout = max(attachment.client._timeout, self.reconnect_timeout + 5)
        for tag in list(self._listeners):
            self._subscribe(tag)

    def _share(self, attachment: attach.Attachment) -> None:
        """Have large values shared by the processes of a host, if nobody minds."""
        assert self._runtime is not None
        if (self.shared_memory or settings().shared_memory) == "off":
            self._unshared = self._runtime.memory.OFF
        elif self._runtime.share(attachment.client):
            self._placement = dask_put.Placement(attachment.client, self._runtime)

    def _return(self) -> None:
        """The client has found its scheduler again, or another one at the same address."""
        assert self._attachment is not None
        if not self._attachment.local:
            self._runtime = dask_runtime.ship(self._attachment.client)
        assert self._runtime is not None
        self._runtime.join(self._attachment.client)
        if not self._unshared:
            self._runtime.share(self._attachment.client)
        for tag in list(self._listeners):
            self._subscribe(tag)

    def stop(self) -> None:
        """Leave the cluster; close it if the runner started it."""
        attachment, report = self._attachment, self._report
        self._report = None
        if attachment is None:
            return
        if report is not None:
            with contextlib.suppress(Exception), attachment.client.as_current():
                report.__exit__(None, None, None)
        self._let_go(attachment)

    def _let_go(self, attachment: attach.Attachment) -> None:
        watch, runtime, placement = self._watch, self._runtime, self._placement
        self._watch = self._runtime = self._attachment = self._placement = None
        if watch is not None:
            left = [ref.handle for ref in watch.outstanding.values() if ref.handle is not None]
            watch.close()
            if left or self._abandoned:
                attachment.hasten()
            with contextlib.suppress(Exception):
                dask_graph.release(attachment.client, left)
        if runtime is not None and not attachment.local and attachment.client.status == "running":
            with contextlib.suppress(Exception):
                runtime.leave(attachment.client)
        attachment.close()
        if placement is not None:
            placement.close()
            dask_put.sweep()  # workers that were killed, now or before

    @classmethod
    def _from_worker(cls) -> DaskTaskRunner:
        """Return the runner for tasks that a task submits: it uses the worker's own connection."""
        from distributed import get_client

        client = get_client()
        with _inside_lock:
            runner: DaskTaskRunner | None = getattr(client, "_penstock_runner", None)
            if runner is None:
                runner = client._penstock_runner = _InsideRunner(client)
        return runner

    def inside(self) -> str:
        """Return the name by which a task finds this runner."""
        return "dask"

    @property
    def client(self) -> Any:
        """The `distributed.Client` of the open runner.

        Raises
        ------
        RuntimeError
            If the runner is not open.
        """
        if self._attachment is None:
            message = "The task runner must be started before submitting work."
            raise RuntimeError(message)
        return self._attachment.client

    @property
    def info(self) -> RunnerInfo:
        """What the cluster has to offer, at most two seconds old."""
        attachment = self._attachment
        if attachment is None or self._runtime is None:
            return RunnerInfo("dask", address=self._address(), dependencies=True, interrupts=True)
        taken, summary = self._summary
        if time.monotonic() - taken > 2:
            with contextlib.suppress(Exception):
                summary = dask_graph.ask(attachment.client, self._runtime.tracker.summary, timeout=2)
            self._summary = (time.monotonic(), summary)
        workers, threads = attachment.planned()
        return RunnerInfo(
            "dask",
            address=self._address(),
            dashboard=str(attachment.client.dashboard_link) if summary["dashboard"] else "",
            workers=max(summary["workers"], workers, 1),
            threads=max(summary["threads"], threads, 1),
            memory=summary["memory"],
            dependencies=True,
            interrupts=True,
            streams=True,
            versions=_library_versions(),
        )

    # -- reports ----------------------------------------------------------------------------
    def listen(self, tag: str, on_reports: OnReports) -> None:
        """Deliver the reports of a session, and hear its topic."""
        super().listen(tag, on_reports)
        if self._attachment is not None:
            self._subscribe(tag)

    def unlisten(self, tag: str) -> None:
        """Stop delivering the reports of a session; what it has left is withdrawn."""
        watch, attachment, runtime = self._watch, self._attachment, self._runtime
        ending = f"-{tag}"
        if watch is not None:
            watch.settle(ending)
        super().unlisten(tag)
        if watch is None or attachment is None or runtime is None:
            return
        left = [ref for key, ref in list(watch.outstanding.items()) if key[0].endswith(ending)]
        self._abandoned = self._abandoned or bool(left)
        self.release(left)
        with contextlib.suppress(Exception):  # the connection may be gone
            runtime.unsubscribe(attachment.client, f"penstock-{tag}")

    def _subscribe(self, tag: str) -> None:
        assert self._attachment is not None and self._watch is not None  # noqa: PT018 - it is open
        dask_graph.subscribe(self._attachment.client, f"penstock-{tag}", self._watch.hear)

    def deliver(self, reports: Sequence[Report]) -> None:
        """Hand reports to sessions; what a task that has ended was given may go."""
        placement = self._placement
        if placement is not None:
            placement.ended([report.key for report in reports if report.kind != "started"])
        super().deliver(reports)

    # -- values -----------------------------------------------------------------------------
    def put(self, values: Sequence[Any]) -> list[Ref]:
        """Place each value once: in shared memory if all workers see it, else on a worker.

        Raises
        ------
        UnserializableArgument
            If a value cannot be pickled.
        """
        if self._address().startswith("inproc://"):  # nothing is pickled on the way: capture it here
            values = [copy.deepcopy(opened(value)) for value in values]
        names: list[Key] = [(f"put-{self._tag}", next(self._puts)) for _ in values]
        placement = self._placement
        files = {
            name: None if placement is None else placement.put(value)
            for name, value in zip(names, values, strict=True)
        }
        others = {name: value for name, value in zip(names, values, strict=True) if files[name] is None}
        futures = self._scatter(others) if others else {}
        return [Ref(name, files[name] or futures[name]) for name in names]

    def _scatter(self, values: dict[Key, Any]) -> dict[Key, Any]:
        """Place values on workers, Dask's way; return its futures."""
        client = self.client
        try:
            futures: dict[Key, Any] = client.scatter(values, direct=self._is_near(), hash=False)
        except TypeError as error:
            message = f"an argument cannot be sent to another process: {str(error).splitlines()[0]}"
            raise errors.UnserializableArgument(message) from error
        except (OSError, TimeoutError, CancelledError) as error:
            message = f"no worker of the Dask cluster took the data: {type(error).__name__}: {error}"
            raise errors.BackendStalled(message) from error
        return futures

    def _scatter_again(self, key: Key, value: Any) -> Any:
        return self._scatter({(f"{key[0]}", next(self._puts)): value}).popitem()[1]

    def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """Bring values here, from the workers that hold them.

        Raises
        ------
        ResultLost
            If a value no longer exists.
        """
        client = self.client
        for ref in refs:
            if ref.handle is None or ref.handle.status in {"cancelled", "error"}:  # "lost" is made again
                raise errors.ResultLost(
                    f"the value of task {ref.key[0].rpartition('-')[0]!r} no longer exists"
                )
        try:
            if any(dask_put.is_file(ref.handle) for ref in refs):
                return [self._fetch_one(ref) for ref in refs]
            return list(client.gather([ref.handle for ref in refs], direct=self._is_near()))
        except (CancelledError, KeyError) as error:
            raise errors.ResultLost(
                f"a value was lost on its way: {type(error).__name__}: {error}"
            ) from error
        except Exception as error:
            if type(error).__name__ in {"TaskFailure", "KilledWorker", "ClosedClientError"}:
                raise errors.ResultLost(f"a value could not be made again: {error}") from error
            raise

    def missing(self, refs: Sequence[Ref]) -> list[Ref]:
        """Return those whose future was taken back; what is "lost" Dask makes again."""
        return [ref for ref in refs if not dask_put.is_file(ref.handle) and _is_gone(ref.handle)]

    def _fetch_one(self, ref: Ref) -> Any:
        return ref.handle.load() if dask_put.is_file(ref.handle) else self.fetch([ref])[0]

    def release(self, refs: Sequence[Ref]) -> None:
        """Free values; work that has not started is withdrawn."""
        watch, attachment = self._watch, self._attachment
        futures = []
        if self._placement is not None:
            self._placement.ended([ref.key for ref in refs])
        for ref in refs:
            if watch is not None:
                watch.outstanding.pop(ref.key, None)
            if dask_put.is_file(ref.handle):
                ref.handle = None
            if ref.handle is not None:
                futures.append(ref.handle)
                ref.handle = None
        if attachment is not None and futures:
            dask_graph.release(attachment.client, futures)

    def _is_near(self) -> bool | None:
        """Whether data go to workers directly; asked once, since a gateway lets nobody through."""
        if self._direct is None:
            assert self._attachment is not None
            near = self._attachment.local or attach.reaches(self._summary[1].get("addresses", []))
            if not near and not self._summary[1].get("addresses"):
                return None  # nobody there yet: Dask waits for a worker
            self._direct = near
        return self._direct

    # -- work -------------------------------------------------------------------------------
    def _in_dasks_words(self, submissions: Sequence[Submission]) -> Sequence[Submission]:
        """Say what tasks ask of their workers as Dask understands it."""
        asking = [one for one in submissions if not dask_wishes.is_plain(one.options)]
        if asking:
            workers = self._workers()
            for one in asking:
                one.options = dask_wishes.translated(one.options, workers)
        return submissions

    def unmet(self, options: Options) -> str:
        """Say why no worker of the cluster can run a task."""
        if self._attachment is None or not hasattr(self.client, "scheduler_info"):
            return ""
        return dask_wishes.unmet(options, self._workers())

    def _workers(self) -> dask_wishes.Workers:
        try:
            found: dask_wishes.Workers = self.client.scheduler_info()["workers"]
        except Exception as error:  # a scheduler that is away: the task goes as it is
            log.debug("the scheduler does not tell of its workers: %r", error)
            return {}
        return found

    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        """Send one message for each batch, and return references."""
        client, watch, runtime = self.client, self._watch, self._runtime
        assert watch is not None and runtime is not None  # noqa: PT018 - it is open
        refs = {one.key: Ref(one.key, None) for one in submissions}
        away = watch.is_away or client.status != "running"  # then all futures look cancelled
        dead = {} if away else dask_graph.without_input(client, submissions)
        if dead:
            watch.tell([Report(key, "lost", cause=cause) for key, cause in dead.items()])
            submissions = [one for one in submissions if one.key not in dead]
        submissions = self._in_dasks_words(submissions)
        if self._placement is not None:
            self._placement.scatter_unseen(submissions, self._scatter_again)
            self._placement.use(submissions)
        for batch in dask_graph.batches(submissions):
            keys = [one.key for one in batch]
            watch.expect({key: refs[key] for key in keys})
            if away:
                watch.expect_later(keys)
                continue
            try:
                futures = dask_graph.send(
                    client, runtime.plugin.Batch(*dask_graph.columns(batch, self._tag, self._unshared)), keys
                )
            except Exception as error:
                if client.status == "running":
                    raise
                log.debug("the Dask scheduler is gone: %r", error)
                watch.expect_later(keys)
                continue
            for key, future in futures.items():
                refs[key].handle = future
        return list(refs.values())

    def cancel(self, refs: Sequence[Ref], *, force: bool = False) -> list[Key]:
        """Withdraw what does not run, ask what runs to stop.

        With `force` the workers that run it are restarted; their other tasks start anew.
        """
        client, watch, runtime = self.client, self._watch, self._runtime
        assert watch is not None and runtime is not None  # noqa: PT018 - it is open
        keys = [ref.key for ref in refs if ref.key in watch.outstanding]
        stopped = runtime.stop(client, keys, force=force) if keys else []
        for key in stopped:
            watch.outstanding.pop(key, None)
        if self._placement is not None:
            self._placement.ended(stopped)
        return stopped

    @contextlib.contextmanager
    def blocked(self, refs: Sequence[Ref]) -> Iterator[None]:
        """Give the slot of the current task back while the body waits."""
        from distributed import secede

        del refs
        if not on_task_thread(dask_graph.holds_slot):
            yield
            return
        on_task_thread(secede)
        try:
            yield
        finally:
            on_task_thread(dask_graph.retake_slot)


def _is_gone(future: Any) -> bool:
    return future is None or future.status in {"cancelled", "error"}


_inside_lock = threading.Lock()


class _InsideRunner(DaskTaskRunner):
    """Of a worker's own client: opens nothing, closes nothing, lives as long as the worker."""

    is_inside = True

    def __init__(self, client: Any) -> None:
        super().__init__(client=client)

    def start(self) -> None:
        if self._attachment is None:
            from distributed import get_worker

            self._runtime = dask_runtime.of_worker()
            self._worker = on_task_thread(get_worker).address
            self._direct = True
            self._follow(attach.Attachment(self._wish.client, own_client=False, local=True))

    def stop(self) -> None:
        """Stay: the next task on this worker that submits tasks needs it again."""


@functools.cache
def _library_versions() -> tuple[tuple[str, str], ...]:
    import dask
    import distributed

    return ("dask", dask.__version__), ("distributed", distributed.__version__)


__all__ = ["DaskTaskRunner"]
