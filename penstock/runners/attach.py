"""Every way to a Dask cluster: connect or create it, check it, remember what is ours to close."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock import errors
from penstock.runners import versions

log = logging.getLogger("penstock.runners.dask")

CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Wish:
    """How a cluster is found or made; the arguments of `DaskTaskRunner`, checked."""

    cluster: Any = None
    address: str | None = None
    cluster_class: Any = None
    cluster_kwargs: Mapping[str, Any] | None = None
    adapt_kwargs: Mapping[str, Any] | None = None
    client_kwargs: Mapping[str, Any] | None = None
    client: Any = None
    scheduler_file: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("cluster", "address", "client", "scheduler_file")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            message = f"'{given[0]}' and '{given[1]}' cannot be used together: each names a cluster."
            raise ValueError(message)
        made = [name for name in ("cluster_class", "cluster_kwargs") if getattr(self, name)]
        if given and made:
            message = f"'{given[0]}' names a cluster that exists; '{made[0]}' is for one that is made."
            raise ValueError(message)
        if given and given[0] != "cluster" and self.adapt_kwargs:
            message = f"'adapt_kwargs' needs a cluster that can grow; '{given[0]}' gives only a connection."
            raise ValueError(message)
        if self.client is not None and self.client_kwargs:
            message = "'client' is used as it is; 'client_kwargs' are for a client that is made."
            raise ValueError(message)
        for name in ("client_kwargs", "cluster_kwargs"):
            if "asynchronous" in (getattr(self, name) or ()):
                message = f"'asynchronous' in '{name}' cannot be used: the runner has a thread of its own."
                raise ValueError(message)
        if getattr(self.client, "asynchronous", False):
            message = "'client' must be a synchronous client: Client(..., asynchronous=False)."
            raise ValueError(message)

    @property
    def exists(self) -> bool:
        """Whether the cluster is there already, so that nothing has to be started."""
        made = callable(self.cluster) and not hasattr(self.cluster, "scheduler_address")
        named = (None if made else self.cluster, self.address, self.client, self.scheduler_file)
        return any(one is not None for one in named)


@dataclass
class Attachment:
    """An open connection.

    Attributes
    ----------
    client : distributed.Client
        Connected.
    cluster : object
        Set if we started it, and so have to close it.
    own_client : bool
        Whether the client is ours to close.
    local : bool
        Scheduler in this process, workers of the same environment: nothing needs to be shipped.
    """

    client: Any
    cluster: Any = None
    own_client: bool = True
    local: bool = False

    def planned(self) -> tuple[int, int]:
        """Return workers and threads that our cluster has, or will have again after a death."""
        if not self.local or self.cluster is None:
            return 0, 0
        wanted = [one["options"].get("nthreads") or 1 for one in list(self.cluster.worker_spec.values())]
        return len(wanted), sum(wanted)

    def hasten(self) -> None:
        """End the work on a cluster of ours that is about to be closed."""
        if self.local and self.cluster is not None:
            from penstock.runners import dask_local

            dask_local.end_workers(self.cluster)

    def close(self) -> None:
        """Close what is ours; never raises."""
        if self.own_client:
            with contextlib.suppress(Exception):
                self.client.close(timeout=5)
        if self.cluster is not None:
            from penstock.runners import dask_local

            dask_local.close(self.cluster)


def attach(wish: Wish) -> Attachment:
    """Connect to the cluster that is wished for, or start it.

    Raises
    ------
    RunnerUnavailable
        If it does not answer, or its versions do not fit.
    """
    if wish.client is not None:
        attachment = Attachment(wish.client, own_client=False)
    elif wish.address is not None or wish.scheduler_file is not None:
        attachment = _connect(wish)
    elif wish.cluster is None:
        attachment = _create(wish, _class_of(wish.cluster_class))
    elif not wish.exists:
        attachment = _create(wish, wish.cluster)
    else:
        attachment = Attachment(_client(wish, wish.cluster))
    try:
        if not attachment.local:
            check_versions(attachment.client, strict=wish.strict)
        grown = attachment.cluster if attachment.cluster is not None else wish.cluster
        if wish.adapt_kwargs and grown is not None:
            adapted = grown.adapt(**wish.adapt_kwargs)
            if inspect.isawaitable(adapted):
                attachment.client.sync(_awaited, adapted)
    except BaseException:
        attachment.close()
        raise
    return attachment


async def _awaited(something: Any) -> Any:
    return await something


def _client(wish: Wish, target: Any, **defaults: Any) -> Any:
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    wanted = {"set_as_default": False, "timeout": CONNECT_SECONDS, **defaults, **(wish.client_kwargs or {})}
    with warnings.catch_warnings():  # the table of `check_versions` says it better
        warnings.simplefilter("ignore", VersionMismatchWarning)
        return Client(target, **wanted)


def _connect(wish: Wish) -> Attachment:
    address = wish.address
    if address is None:
        address = _address_in(str(wish.scheduler_file))
    try:
        return Attachment(_client(wish, address))
    except (OSError, ValueError, ImportError) as error:
        seconds = (wish.client_kwargs or {}).get("timeout", CONNECT_SECONDS)
        message = (
            f"no Dask scheduler answers at {address} (tried for {seconds} s): "
            f"start one with `dask scheduler`, or correct the address. ({type(error).__name__})"
        )
        raise errors.RunnerUnavailable(message) from error


def _address_in(path: str) -> str:
    import json

    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return str(json.loads(Path(path).read_text())["address"])
        except (OSError, ValueError, KeyError) as error:  # a scheduler that starts writes it any moment
            if time.monotonic() > deadline:
                message = (
                    f"the scheduler file {path!r} cannot be read ({type(error).__name__}): "
                    "start the scheduler with `dask scheduler --scheduler-file <path>` first."
                )
                raise errors.RunnerUnavailable(message) from error
            time.sleep(0.1)


# -- clusters that we start -----------------------------------------------------------------


def _create(wish: Wish, factory: Callable[..., Any] | None) -> Attachment:
    from distributed import LocalCluster

    from penstock.runners import dask_local

    kwargs = dict(wish.cluster_kwargs or {})
    if factory is LocalCluster:
        factory = None
    try:
        cluster = dask_local.start(kwargs) if factory is None else factory(**kwargs)
    except Exception as error:
        name = "a local Dask cluster" if factory is None else getattr(factory, "__name__", repr(factory))
        message = f"{name} could not be started: {type(error).__name__}: {error}"
        raise errors.RunnerUnavailable(message) from error
    try:
        return Attachment(_client(wish, cluster), cluster, local=factory is None)
    except BaseException:
        dask_local.close(cluster)
        raise


def _class_of(named: Any) -> Callable[..., Any] | None:
    if named is None or callable(named):
        return named  # type: ignore[no-any-return]
    module, _, name = str(named).rpartition(".")
    if module == "dask.distributed":
        module = "distributed"
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"'cluster_class' {named!r} cannot be imported: {error}"
        raise errors.ConfigurationError(message) from error
    return found


# -- checks -----------------------------------------------------------------------------------


def check_versions(client: Any, *, strict: bool) -> None:
    """Compare versions before any code leaves this process.

    Raises
    ------
    RunnerUnavailable
        With one table, if they do not fit. With ``strict=False`` only if code sent by value would
        crash the workers.
    """
    found = client.get_versions()
    own, scheduler = found["client"]["packages"], (found["scheduler"] or {}).get("packages", {})
    rows = versions.compare(own, scheduler, [one["packages"] for one in found["workers"].values() if one])
    if not rows:
        return
    table = versions.table(rows)
    if strict or versions.is_fatal(rows):
        hint = "" if versions.is_fatal(rows) else " (strict=False tries it nevertheless)"
        message = f"the Dask cluster has versions that do not fit{hint}:\n{table}"
        raise errors.RunnerUnavailable(message)
    log.warning("the Dask cluster has versions that do not fit:\n%s", table)


def reaches(addresses: list[str]) -> bool:
    """Whether this process can talk to a worker directly; clusters behind a gateway refuse."""
    import socket

    for address in addresses[:1]:
        protocol, _, rest = address.partition("://")
        if protocol == "inproc":
            return True
        host, _, port = rest.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except (OSError, ValueError):
            return False
        return True
    return False


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the arguments of a runner from a file.

    Raises
    ------
    ConfigurationError
        If there is no mapping in it.
    """
    import yaml

    found = yaml.safe_load(Path(path).read_text())
    if not isinstance(found, dict):
        message = f"{str(path)!r} must hold a mapping of the arguments of DaskTaskRunner."
        raise errors.ConfigurationError(message)
    return found


def check_report() -> None:
    """See to it that a report can be written.

    Raises
    ------
    MissingExtra
        If bokeh is not installed.
    """
    if importlib.util.find_spec("bokeh") is None:
        message = "'performance_report_path' needs bokeh, which is not installed: pip install bokeh"
        raise errors.MissingExtra(message)


def begin_report(client: Any, path: str) -> Any:
    """Begin Dask's own report; leave it like a context manager, with the client as the current one."""
    from distributed import performance_report

    report = performance_report(filename=path)
    with client.as_current():
        report.__enter__()
    return report


def named_by_environment() -> dict[str, str]:
    """Return the arguments for the scheduler that the environment names, empty if there is none."""
    address = os.environ.get("DASK_SCHEDULER_ADDRESS") or os.environ.get("DASK_SCHEDULER__ADDRESS")
    if address:
        return {"address": address}
    path = os.environ.get("DASK_SCHEDULER_FILE")
    return {"scheduler_file": path} if path else {}


__all__ = [
    "Attachment",
    "Wish",
    "attach",
    "begin_report",
    "check_report",
    "check_versions",
    "named_by_environment",
    "reaches",
    "read_yaml",
]
