"""Brings our worker code to a Dask cluster that need not have penstock installed.

Dask's own upload plugins carry a zip of source files; everything of ours is then pickled by
reference to it, which also works across releases of Python. On clusters that we start, penstock
is there already.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path
from typing import Any

from penstock import errors
from penstock.runners import dask_graph, shipment
from penstock.runners.base import Key

log = logging.getLogger("penstock.runners.dask")

_FILES = ("shared_memory.py", "dask_memory.py", "dask_plugin.py", "dask_tracker.py")
_PREFIX = "_penstock_rt_"

SHARED_FROM = 32 << 20
"""Bytes from which the workers of a host share a result instead of sending it."""

# Where penstock of the same version is installed, its own modules take the place of the copies, so
# that code which knows both sees one set of classes.
_INIT = """\
import importlib
import importlib.util
import os
import pkgutil
import sys

try:
    for _folder in importlib.util.find_spec("penstock").submodule_search_locations:
        for _path in {paths}:
            with open(os.path.join(_folder, "runners", _path), "rb") as _file:
                if _file.read() != pkgutil.get_data(__name__, _path):
                    raise ImportError(_path)
    _found = {{f"{{__name__}}.{{_name}}": importlib.import_module(f"penstock.runners.{{_name}}") for _name in {modules}}}
    sys.modules.update(_found)
except Exception:
    pass
"""


@functools.cache
def digest() -> str:
    """Return the hash of what is shipped: two versions of penstock do not meet on a cluster."""
    found = hashlib.sha256()
    for path, text in _files().items():
        found.update(f"{path}\0{text}\0".encode())
    return found.hexdigest()[:10]


def _files() -> dict[str, str]:
    """Return path → text of the package that is shipped."""
    common = [*shipment.sources()]
    first = _INIT.format(paths=common, modules=[*map(shipment.module_of, common)])
    return {"__init__.py": first, **shipment.sources(*_FILES)}


class Runtime:
    """The worker code as a cluster knows it.

    Parameters
    ----------
    package : str
        Where scheduler and workers can import it from.
    known : str
        Hash of the code.
    """

    def __init__(self, package: str, known: str) -> None:
        # One tracker for each name under which task bodies exist; it leaves others' tasks alone.
        self.name = f"penstock-{known}" if package.startswith(_PREFIX) else f"penstock-{known}-installed"
        self.plugin: Any = importlib.import_module(f"{package}.dask_plugin")
        self.tracker: Any = importlib.import_module(f"{package}.dask_tracker")
        self.memory: Any = importlib.import_module(f"{package}.dask_memory")

    def join(self, client: Any, worker: str = "") -> dict[str, Any]:
        """Have the tracker on the scheduler know the client; return the cluster's summary.

        Parameters
        ----------
        client : distributed.Client
            Connected.
        worker : str
            Address of the worker that it is a part of.
        """
        found: dict[str, Any] = dask_graph.ask(client, self.tracker.join, self.name, client.id, worker)
        return found

    def share(self, client: Any) -> bool:
        """Have the workers of each host share large results; answer whether they do."""
        try:
            _register(client, self.memory.Plugin(SHARED_FROM), f"{self.name}-memory")
        except Exception as error:
            log.info("results are not shared by the workers of a host: %s: %s", type(error).__name__, error)
            return False
        return True

    def leave(self, client: Any) -> None:
        """Take the tracker away, if nobody else needs it."""
        dask_graph.ask(client, self.tracker.leave, self.name, client.id, timeout=2)

    def unsubscribe(self, client: Any, topic: str) -> None:
        """Hear no more of a topic; returns at once."""
        dask_graph.unsubscribe(client, topic, self.tracker.unsubscribe, self.name, client.id, topic)

    def stop(self, client: Any, keys: list[Key], *, force: bool) -> list[Key]:
        """Withdraw what does not run, ask what runs to stop; with `force` end the process it runs in.

        Returns
        -------
        list of tuple
            What will certainly not run.
        """
        tracker = self.tracker
        idle, placed = dask_graph.ask(client, tracker.stop, self.name, keys)
        if not placed:
            return list(idle)
        stopped: list[Key] = []
        answers = dask_graph.ask_workers(client, self.plugin.cancel_keys, placed, workers=list(placed))
        running: dict[str, list[Key]] = {}
        for address, some in placed.items():
            busy = set(answers.get(address, some))  # one that does not answer is taken to be at work
            running[address] = [key for key in some if key in busy]
            stopped += [key for key in some if key not in busy]
        condemned = (
            self._condemn(client, [address for address, some in running.items() if some]) if force else []
        )
        stopped += [key for address in condemned for key in running[address]]
        stopped = dask_graph.ask(
            client, tracker.withdraw, self.name, stopped
        )  # first, or it starts elsewhere
        self._end(client, condemned)
        return [*idle, *stopped]

    def _condemn(self, client: Any, workers: list[str]) -> list[str]:
        """Return the workers that may be ended, since others come in their place."""
        condemned: list[str] = dask_graph.ask(client, self.tracker.condemn, self.name, workers)
        for address in set(workers) - set(condemned):
            log.warning(
                "worker %s cannot be ended to stop a task: it has no nanny that would replace it", address
            )
        if condemned:
            log.warning(
                "ending %d worker(s) to stop a task; what else runs there starts anew", len(condemned)
            )
        return condemned

    def _end(self, client: Any, workers: list[str]) -> None:
        """End worker processes, and wait until the scheduler has noticed."""
        if not workers:
            return
        dask_graph.ask_workers(client, self.plugin.end_process, workers=workers, timeout=1.0)
        left = workers
        for _ in range(50):
            left = dask_graph.ask(client, self.tracker.alive, workers)
            if not left:
                return
            time.sleep(0.02)
        with contextlib.suppress(Exception):  # a worker whose loop is stuck: its nanny does it, patiently
            client.restart_workers(left, timeout=15, raise_for_error=False)


def local() -> Runtime:
    """Return the code by reference to penstock itself, for a cluster of this environment."""
    return Runtime("penstock.runners", digest())


def of_worker() -> Runtime:
    """Return the code under the name that the task which runs here came with."""
    name: str = getattr(sys.modules["_penstock_running"], "dask_plugin", "penstock.runners.dask_plugin")
    package = name.rpartition(".")[0]
    known = package.removeprefix(_PREFIX) if package.startswith(_PREFIX) else digest()
    return Runtime(package, known)


def ship(client: Any) -> Runtime:
    """Upload the code to the scheduler, and to all workers of today and tomorrow.

    Raises
    ------
    RunnerUnavailable
        If the cluster refuses plugins.
    """
    runtime = Runtime(_loaded(), digest())
    from distributed.diagnostics.plugin import SchedulerUploadFile, UploadFile

    with tempfile.TemporaryDirectory() as folder:
        path = _zip(folder)
        uploads = [SchedulerUploadFile(path), UploadFile(path)]
    try:
        _register(client, uploads[0], f"{runtime.name}-scheduler-files")
        runtime.join(client)  # from here on nobody else's leaving takes the files away
        _register(client, uploads[1], f"{runtime.name}-files")
    except Exception as error:
        message = (
            "the Dask cluster does not take penstock's plugins, without which results cannot be followed: "
            f"{type(error).__name__}: {error}"
        )
        raise errors.RunnerUnavailable(message) from error
    return runtime


def _register(client: Any, plugin: Any, name: str) -> None:
    # Under a fixed name the second upload changes nothing; `Client.upload_file` would reload the
    # module, and wipe what it remembers, under running flows.
    plugin.idempotent = True
    client.register_plugin(plugin, name=name)


def _zip(folder: str) -> str:
    package = f"{_PREFIX}{digest()}"
    path = os.path.join(folder, f"{package}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in _files().items():
            archive.writestr(f"{package}/{name}", text)
    return path


def _loaded() -> str:
    """Make the shipped package known here, so that its classes pickle by reference and load again."""
    package = f"{_PREFIX}{digest()}"
    if package not in sys.modules:
        parent = sys.modules[package] = types.ModuleType(package)
        parent.__path__ = []
        for name in map(shipment.module_of, shipment.sources()):
            sys.modules[f"{package}.{name}"] = importlib.import_module(f"penstock.runners.{name}")
        for file in _FILES:
            full = f"{package}.{shipment.module_of(file)}"
            spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(file))
            assert spec is not None and spec.loader is not None  # noqa: PT018 - the file is beside this one
            module = sys.modules[full] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return package


__all__ = ["Runtime", "digest", "local", "of_worker", "ship"]
