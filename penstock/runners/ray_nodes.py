"""What Ray knows of its nodes and processes, and what it is asked about them."""

from __future__ import annotations

import os
import platform
import re
import signal
import warnings
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import ray

from penstock import errors
from penstock.runners import versions
from penstock.runners.base import RunnerInfo

PROBE_SECONDS = 10.0


def check_versions(*, strict: bool) -> None:
    """Compare libraries on other machines; Python and Ray itself are checked by Ray.

    Raises
    ------
    RunnerUnavailable
        If they do not fit and `strict` is set; else there is a warning.
    """
    here = platform.node()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeManagerHostname"] != here]
    if not nodes:
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    probe = ray.remote(num_cpus=0, max_retries=0)(_probe())
    asked = [probe.options(scheduling_strategy=OnNode(node["NodeID"], soft=False)).remote() for node in nodes]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=PROBE_SECONDS)
    rows = versions.compare(_probe()(), {}, ray.get(answered))
    if not rows:
        return
    message = f"the libraries of the Ray cluster do not fit the driver's:\n{versions.table(rows)}"
    if strict:
        raise errors.RunnerUnavailable(message)
    warnings.warn(message, stacklevel=5)


def describe() -> RunnerInfo:
    """Ask Ray what there is; the answer stays as it was when the runner was opened."""
    resources = ray.cluster_resources()
    threads = max(1, int(resources.get("CPU", 1)))
    address = getattr(ray.get_runtime_context(), "gcs_address", "")  # Ray's client has none
    remote = ray.util.client.ray.is_connected()  # this process is no part of the cluster
    return RunnerInfo(
        "ray",
        address=str(address),
        dashboard=_dashboard(),
        workers=threads,
        threads=threads,
        memory=int(resources.get("memory", 0)),
        dependencies=True,
        interrupts=True,
        streams=not remote,
        holds_puts=not remote,
        versions=(("python", platform.python_version()), ("ray", ray.__version__)),
    )


def cluster_size() -> tuple[int, int]:
    """Return how many CPUs there are, and the size of all object stores in bytes, 0 if Ray does not tell it."""
    resources = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1))), int(resources.get("object_store_memory", 0))


def _dashboard() -> str:
    worker = getattr(getattr(ray, "_private", None), "worker", None)
    node = getattr(worker, "_global_node", None)
    url = getattr(node, "webui_url", None) or ""
    return f"http://{url}" if url and "://" not in url else str(url)


def _probe() -> Any:
    """Make the function that lists versions on a worker; a closure, so it travels by value."""
    libraries = ("cloudpickle", "numpy", "pandas")

    def versions_here() -> dict[str, str | None]:
        import importlib.metadata
        import platform

        found: dict[str, str | None] = {"python": platform.python_version()}
        for library in libraries:
            try:
                found[library] = importlib.metadata.version(library)
            except importlib.metadata.PackageNotFoundError:
                found[library] = None
        return found

    return versions_here


def unmet(wishes: Mapping[str, Any]) -> str:
    """Say why no node of today can run a task; empty if one can.

    Parameters
    ----------
    wishes : mapping
        ``num_cpus``, ``num_gpus``, ``memory``, ``resources``, as Ray takes them.
    """
    named = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    wanted = {ours: wishes[name] for name, ours in named.items() if wishes.get(name)}
    wanted |= wishes.get("resources", {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        return ""
    wish = ", ".join(f"{name}={amount:g}" for name, amount in wanted.items())
    most = ", ".join(f"{name}={max((node.get(name, 0) for node in nodes), default=0):g}" for name in wanted)
    return f"it asks for {wish} on one node, and the most that nodes offer is {most}"


def node_id(name: str) -> str:
    """Find a node by its id, the beginning of it, its address or its host name."""
    wanted = name.partition(":")[0]
    for node in ray.nodes():
        known = (node["NodeManagerAddress"], node["NodeManagerHostname"])
        if node["Alive"] and (wanted in known or node["NodeID"].startswith(wanted)):
            found: str = node["NodeID"]
            return found
    message = f"no node of the Ray cluster is called {name!r}."
    raise errors.ConfigurationError(message)


def how_died(pid: int) -> str:
    """Say how a worker process of this host ended, as far as its own log knows; Ray does not tell.

    Ray's handler of fatal signals writes there, and so does `ray_tasks.begin` of exits. Nothing is
    written by a SIGKILL.
    """
    try:
        folder = Path(ray._private.worker._global_node.get_logs_dir_path())
        (path,) = folder.glob(f"worker-*-{pid}.err")
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 16_384, 0))
            said = _LAST_WORDS.findall(file.read())
    except Exception:  # private ground of Ray; another host; a client of a far cluster
        return "died"
    if not said:
        return "died (killed by SIGKILL, or for want of memory)"
    signal_name, code = said[-1]
    return f"died by {signal_name.decode()}" if signal_name else f"exited with code {code.decode()}"


_LAST_WORDS = re.compile(rb"^\*\*\* (?:(SIG[A-Z]+) received|exit (\d+) )", re.MULTILINE)


def end_processes(tasks: AbstractSet[bytes]) -> None:
    """Kill the worker processes that run tasks, as far as Ray's head knows them.

    Parameters
    ----------
    tasks : set of bytes
        Ids of tasks, which have not ended.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    here = ray.get_runtime_context().get_node_id()
    kill = ray.remote(num_cpus=0, max_retries=0)(_killer())
    for event in ray._private.state.state._get_all_task_events():
        found = event.state_updates
        if event.task_id not in tasks or not found.worker_pid:
            continue
        node = found.node_id.hex()
        if node == here:
            os.kill(found.worker_pid, signal.SIGKILL)
        else:
            kill.options(scheduling_strategy=OnNode(node, soft=False)).remote(found.worker_pid)


def _killer() -> Any:
    def kill(pid: int) -> None:
        import os
        import signal

        os.kill(pid, signal.SIGKILL)

    return kill
