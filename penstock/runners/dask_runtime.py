"""Brings our worker code to a Dask cluster that need not have penstock installed.

Dask's own upload plugins carry a zip of source files; everything of ours is then pickled by
reference to it, which also works across releases of Python. On clusters that we start, penstock
is there already.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

from penstock import errors
from penstock.runners import dask_graph, worker_runtime

_FOLDER = Path(__file__).parent
_FILES = ("worker_runtime.py", "dask_plugin.py")
_PREFIX = "_penstock_rt_"

# Where penstock of the same version is installed, its own module takes the place of the copy, so
# that code which knows both sees one set of classes.
_INIT = '''\
import importlib
import importlib.util
import os
import pkgutil
import sys

try:
    for _folder in importlib.util.find_spec("penstock").submodule_search_locations:
        with open(os.path.join(_folder, "runners", "worker_runtime.py"), "rb") as _file:
            if _file.read() == pkgutil.get_data(__name__, "worker_runtime.py"):
                worker_runtime = importlib.import_module("penstock.runners.worker_runtime")
                sys.modules[__name__ + ".worker_runtime"] = worker_runtime
except Exception:
    pass
'''


@functools.cache
def digest() -> str:
    """Return the hash of what is shipped: two versions of penstock do not meet on a cluster."""
    found = hashlib.sha256(_INIT.encode())
    for name in _FILES:
        found.update((_FOLDER / name).read_bytes())
    return found.hexdigest()[:10]


class Runtime:
    """The worker code as a cluster knows it.

    Parameters
    ----------
    plugin : module
        `dask_plugin`, under the name that scheduler and workers can import.
    name : str
        Of the tracker on the scheduler.
    """

    def __init__(self, plugin: Any, name: str) -> None:
        self.plugin = plugin
        self.name = name

    def join(self, client: Any) -> dict[str, Any]:
        """Have the tracker on the scheduler know the client; return the cluster's summary."""
        found: dict[str, Any] = dask_graph.ask(client, self.plugin.join, self.name, client.id)
        return found

    def leave(self, client: Any) -> None:
        """Take the tracker away, if nobody else needs it."""
        dask_graph.ask(client, self.plugin.leave, self.name, client.id, timeout=2)


def local() -> Runtime:
    """Return the code by reference to penstock itself, for a cluster of this environment."""
    return Runtime(importlib.import_module("penstock.runners.dask_plugin"), f"penstock-{digest()}")


def of_worker() -> Runtime:
    """Return the code under the name that the task which runs here came with."""
    name = getattr(sys.modules["_penstock_running"], "dask_plugin", "penstock.runners.dask_plugin")
    package = name.partition(".")[0]
    known = package.removeprefix(_PREFIX) if package.startswith(_PREFIX) else digest()
    return Runtime(importlib.import_module(name), f"penstock-{known}")


def ship(client: Any) -> Runtime:
    """Upload the code to the scheduler, and to all workers of today and tomorrow.

    Raises
    ------
    RunnerUnavailable
        If the cluster refuses plugins.
    """
    runtime = Runtime(_loaded(), f"penstock-{digest()}")
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
        archive.writestr(f"{package}/__init__.py", _INIT)
        for name in _FILES:
            archive.writestr(f"{package}/{name}", (_FOLDER / name).read_bytes())
    return path


def _loaded() -> Any:
    """Make the shipped package known here, so that its classes pickle by reference and load again."""
    package = f"{_PREFIX}{digest()}"
    name = f"{package}.dask_plugin"
    if name in sys.modules:
        return sys.modules[name]
    parent = types.ModuleType(package)
    parent.__path__ = []
    sys.modules[package] = parent
    sys.modules[f"{package}.worker_runtime"] = worker_runtime
    parent.worker_runtime = worker_runtime  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(name, _FOLDER / "dask_plugin.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018 - the file is beside this one
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    parent.dask_plugin = module  # type: ignore[attr-defined]
    return module


__all__ = ["Runtime", "digest", "local", "of_worker", "ship"]
