"""What a figure depends on: the machine, the versions, the load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = ("penstock", "dask", "distributed", "ray", "numpy", "cloudpickle", "msgpack", "sqlalchemy")


def machine() -> dict[str, Any]:
    """Describe the machine, without names of hosts or people."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load() -> float:
    """Return the number of processes that wanted to run in the last minute: ours and those of others."""
    return round(os.getloadavg()[0], 2)
