"""Memory of a host: of the driver, of every process below it, and of what they share.

A page that several processes map is counted once: pages of one process alone, summed over the
processes, and besides them the shared memory of the whole machine. That is what the sum of the
proportional set sizes says, without a walk over page tables, which would disturb what is timed.
Linux only; elsewhere nothing is known.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

FAMILY_EVERY = 1.0  # seconds between two looks for new processes
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
KNOWN = Path("/proc/meminfo").exists()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in use at one moment.

    Attributes
    ----------
    driver : int
        Pages of the driver that no other process maps.
    workers : int
        The same, of all processes below it together.
    shared : int
        Shared memory of the machine: `/dev/shm`, Ray's object store.
    """

    driver: int
    workers: int
    shared: int

    @property
    def total(self) -> int:
        """All three."""
        return self.driver + self.workers + self.shared


class Host:
    """Follows the memory of this process and of what it started, from now on.

    Parameters
    ----------
    spill : Path, optional
        Folder of a Ray session, whose spilled values are followed, too.

    Attributes
    ----------
    peaks : dict
        Largest growth of "driver", "workers", "shared" and "host", which is all together; with
        `spill` also most bytes "spilled" at a time.
    """

    def __init__(self, spill: Path | None = None) -> None:
        self._spill = spill
        self._process = psutil.Process()
        self._family: list[int] = []
        self._family_at = 0.0
        self._start = self.now()
        self.peaks = {"driver": 0, "workers": 0, "shared": 0, "host": 0}
        if spill is not None:
            self.peaks["spilled"] = 0

    def now(self) -> Memory:
        """Read it."""
        if not KNOWN:
            return Memory(0, 0, 0)
        moment = time.monotonic()
        if moment - self._family_at > FAMILY_EVERY:
            self._family_at = moment
            self._family = [one.pid for one in self._process.children(recursive=True)]
        return Memory(_private(self._process.pid), sum(map(_private, self._family)), _shared())

    def look(self) -> int:
        """Keep the peaks; return by how much the host has grown."""
        now, start = self.now(), self._start
        grown = {
            "driver": now.driver - start.driver,
            "workers": now.workers - start.workers,
            "shared": now.shared - start.shared,
            "host": now.total - start.total,
        }
        if self._spill is not None:
            grown["spilled"] = _size(self._spill)
        for name, value in grown.items():
            self.peaks[name] = max(self.peaks[name], value)
        return grown["host"]


def _size(session: Path) -> int:
    """Return the bytes of values that Ray has on disk now."""
    total = 0
    for path in session.glob("ray_spilled_objects*/*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _private(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        return (int(resident) - int(shared)) * PAGE
    return 0  # ended meanwhile


def _shared() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    return 0
