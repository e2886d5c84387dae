"""What a task asks of its worker, in Dask's words; pure.

Dask knows resources that workers declare (``--resources "GPU=1"``) and nothing else. Threads and memory
are part of that where workers declare them; else memory is compared with the limit of each worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from penstock.runners.base import Options

Workers = Mapping[str, Mapping[str, Any]]
"""By address: ``name, resources, memory_limit``, as a Dask scheduler tells it."""


def is_plain(options: Options) -> bool:
    """Whether any worker will do, as far as is known here."""
    return not options.resources and not options.workers and options.threads == 1


def translated(options: Options, workers: Workers) -> Options:
    """Return the wishes of a task as annotations can tell them."""
    wanted = dict(options.resources)
    if options.threads != 1 and _declared("threads", workers):
        wanted["threads"] = options.threads
    memory = wanted.get("memory")
    chosen = options.workers
    if memory is not None and not _declared("memory", workers):
        able = [address for address, worker in workers.items() if _has_memory(worker, memory)]
        if able:  # else it stays: no worker declares it, and the task waits
            del wanted["memory"]
            if len(able) < len(workers):
                chosen = tuple(one for one in able if not chosen or _is_named(one, workers[one], chosen))
                chosen = chosen or options.workers
    resources = tuple(sorted(wanted.items()))
    return dataclasses.replace(options, resources=resources, workers=chosen)


def unmet(options: Options, workers: Workers) -> str:
    """Say why no worker of today can run a task; empty if one can."""
    named = {
        address: worker
        for address, worker in workers.items()
        if not options.workers or _is_named(address, worker, options.workers)
    }
    if not workers:
        return "the cluster has no workers"
    if not named:
        return f"no worker is called {' or '.join(options.workers)}"
    wanted = dict(options.resources)
    if options.threads != 1 and _declared("threads", workers):
        wanted["threads"] = options.threads
    if any(_offers(worker, wanted, workers) for worker in named.values()):
        return ""
    wish = ", ".join(f"{name}={amount:g}" for name, amount in wanted.items())
    offers = {
        name: max((_offer(worker, name, workers) for worker in named.values()), default=0.0)
        for name in wanted
    }
    most = ", ".join(f"{name}={amount:g}" for name, amount in offers.items())
    return f"it asks for {wish} on one worker, and the most that workers offer is {most}"


def _declared(name: str, workers: Workers) -> bool:
    return any(name in (worker.get("resources") or {}) for worker in workers.values())


def _offer(worker: Mapping[str, Any], name: str, workers: Workers) -> float:
    if name == "memory" and not _declared("memory", workers):
        return float(worker.get("memory_limit") or float("inf"))
    return float((worker.get("resources") or {}).get(name, 0.0))


def _offers(worker: Mapping[str, Any], wanted: Mapping[str, float], workers: Workers) -> bool:
    return all(_offer(worker, name, workers) >= amount for name, amount in wanted.items())


def _has_memory(worker: Mapping[str, Any], nbytes: float) -> bool:
    limit = worker.get("memory_limit")
    return not limit or limit >= nbytes


def _is_named(address: str, worker: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    host = address.rpartition("://")[2].rpartition(":")[0]
    return bool({address, host, str(worker.get("name"))} & set(names))
