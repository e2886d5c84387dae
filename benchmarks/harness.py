"""Take samples: wall time, CPU, memory and network traffic of the driver, side by side.

Nothing here imports penstock: Prefect is measured by the same code, in an environment without it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import stat
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import psutil

INTERVAL = 0.02  # seconds between two looks at the memory of the driver
SOCKETS_EVERY = 10  # looks at the memory for one at the sockets
MEBIBYTE = 1 << 20


class Side(Protocol):
    """One way to run the cases on an open cluster: a bare back end, penstock, Prefect."""

    name: str

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Run `count` no-ops and return their values."""

    def chain_large(self, items: int, clock: Clock) -> float:
        """Make an array, add one to it and return its sum, in three tasks."""

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Sum `count` parts of one array that every task is given entirely."""

    def completed(self, expected: int, timeout: float) -> int | None:
        """Return how many task runs of the last sample the record shows as completed; None if there is no record."""


class Clock:
    """Marks moments since it was made; the last mark is the end of the sample."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self._start = time.perf_counter()

    def mark(self, name: str) -> None:
        """Note that something has happened now."""
        self.marks[name] = time.perf_counter() - self._start

    @property
    def seconds(self) -> float:
        """Time of the last mark."""
        return max(self.marks.values())


@dataclass(slots=True)
class Sample:
    """One run of one case by one side.

    Attributes
    ----------
    seconds : float
        Until the case was done, as the case defines it.
    marks : dict
        Seconds until "connected", "values", "returned", "recorded", as far as they apply.
    cpu_seconds : float
        User and system time of the driver process, the Dask scheduler in it included.
    rss_growth, private_growth : int
        Bytes by which the resident memory of the driver exceeded its value at the start; without
        pages that are shared with other processes.
    received, sent : int or None
        Bytes through all TCP sockets of the driver; None where the system does not tell.
    completed : int or None
        Task runs that the record shows as completed; None without a record.
    left_behind : int
        Tasks that the cluster still held ten seconds later.
    """

    seconds: float
    marks: dict[str, float]
    cpu_seconds: float
    rss_growth: int
    private_growth: int
    received: int | None = None
    sent: int | None = None
    completed: int | None = None
    left_behind: int = 0


class Driver:
    """Watches this process in a thread of its own, as a context manager."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="benchmark-watch", daemon=True)
        self._sockets = Sockets()
        self.rss_growth = self.private_growth = 0
        self.cpu_seconds = 0.0

    def __enter__(self) -> Self:
        """Give free memory back, so that growth is not hidden in it, and start to watch."""
        gc.collect()
        trim()
        self._rss, self._private = self._memory()
        self._sockets.look()
        self._sockets.begin()
        self._thread.start()
        self._cpu = time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        """Look once more, and stop."""
        self.cpu_seconds = time.process_time() - self._cpu
        self._done.set()
        self._thread.join()
        self._look()
        self._sockets.look()

    @property
    def traffic(self) -> tuple[int | None, int | None]:
        """Bytes received and sent since the start."""
        return self._sockets.traffic()

    def _watch(self) -> None:
        looks = 0
        while not self._done.wait(INTERVAL):
            self._look()
            looks += 1
            if looks % SOCKETS_EVERY == 0:
                self._sockets.look()

    def _look(self) -> None:
        rss, private = self._memory()
        self.rss_growth = max(self.rss_growth, rss - self._rss)
        self.private_growth = max(self.private_growth, private - self._private)

    def _memory(self) -> tuple[int, int]:
        info = self._process.memory_info()
        return info.rss, info.rss - getattr(info, "shared", 0)


class Sockets:
    """Counts the bytes of the TCP sockets of this process, as the Linux kernel reports them.

    Traffic between a Dask client and a scheduler in the same process is counted at both ends.
    What a socket moved between the last look and its end is missed.
    """

    LENGTH = 136  # of struct tcp_info up to tcpi_bytes_received
    ACKED, RECEIVED = slice(120, 128), slice(128, 136)

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}
        self._begun: dict[int, tuple[int, int]] = {}

    def begin(self) -> None:
        """Count from here."""
        self._begun = dict(self._seen)

    def look(self) -> None:
        """Read the counters of all sockets."""
        try:
            descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
        except OSError:
            return
        for descriptor in descriptors:
            try:
                copy = os.dup(descriptor)
            except OSError:
                continue  # closed meanwhile
            try:
                self._read(copy)
            finally:
                os.close(copy)

    def _read(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if not stat.S_ISSOCK(found.st_mode):
            return
        try:
            handle = socket.socket(fileno=descriptor)
        except OSError:
            return
        try:
            raw = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, self.LENGTH)
        except OSError:
            return  # not TCP
        finally:
            handle.detach()
        if len(raw) == self.LENGTH:
            received, sent = (int.from_bytes(raw[part], "little") for part in (self.RECEIVED, self.ACKED))
            self._seen[found.st_ino] = (received, sent)

    def traffic(self) -> tuple[int | None, int | None]:
        """Return bytes received and sent since `begin`; None, None if nothing could be read."""
        if not self._seen:
            return None, None
        before = self._begun
        grown = [(now, before.get(inode, (0, 0))) for inode, now in self._seen.items()]
        return sum(now[0] - old[0] for now, old in grown), sum(now[1] - old[1] for now, old in grown)


def trim() -> None:
    """Give free memory of the C library back to the system, where it can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


def measure(run: Callable[[Clock], Any]) -> tuple[Sample, Any]:
    """Run once and return the sample and what `run` returned."""
    with Driver() as driver:
        clock = Clock()
        value = run(clock)
    received, sent = driver.traffic
    sample = Sample(
        seconds=clock.seconds,
        marks=clock.marks,
        cpu_seconds=driver.cpu_seconds,
        rss_growth=driver.rss_growth,
        private_growth=driver.private_growth,
        received=received,
        sent=sent,
    )
    return sample, value


# -- two sides of one comparison ------------------------------------------------------------------


@dataclass(slots=True)
class Comparison:
    """Samples of a bare back end and of one engine on it, taken in turn.

    Attributes
    ----------
    configuration : str
        Of the back end, the same for both.
    bare, engine : str
        Names of the two sides.
    tasks : int
        Task runs that one sample consists of.
    untouched : Sample or None
        Bare, before the engine was on the cluster; shows whether the engine leaves something behind.
    bare_samples, samples : list of Sample
        In pairs; of each pair the order alternates.
    unfinished : str
        Why there are fewer samples than asked for; empty if there are not.
    """

    configuration: str
    bare: str
    engine: str
    tasks: int
    untouched: Sample | None = None
    bare_samples: list[Sample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    unfinished: str = ""

    @property
    def ratios(self) -> list[float]:
        """Speed of the engine over that of the bare back end, pair by pair: 1 is as fast, 0.5 half as fast."""
        pairs = zip(self.bare_samples, self.samples, strict=False)
        return [bare.seconds / ours.seconds for bare, ours in pairs]

    @property
    def ratio(self) -> float | None:
        """Median of the ratios; None without a pair."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def all_recorded(self) -> bool:
        """Whether the record shows every task run of every sample as completed."""
        return bool(self.samples) and all(one.completed == self.tasks for one in self.samples)

    def as_json(self) -> dict[str, Any]:
        """Return what goes to the result file."""
        return {
            "configuration": self.configuration,
            "tasks": self.tasks,
            "ratio": self.ratio,
            "ratios": self.ratios,
            "all_states_recorded": self.all_recorded,
            "unfinished": self.unfinished,
            "bare": {
                "name": self.bare,
                "median": medians(self.bare_samples),
                "samples": _plain(self.bare_samples),
            },
            "engine": {"name": self.engine, "median": medians(self.samples), "samples": _plain(self.samples)},
            "bare_untouched": asdict(self.untouched) if self.untouched else None,
        }


def _plain(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [asdict(one) for one in samples]


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the median of every number of some samples."""
    found = {}
    for name in ("seconds", "cpu_seconds", "rss_growth", "private_growth", "received", "sent"):
        values = [value for one in samples if (value := getattr(one, name)) is not None]
        if values:
            found[name] = statistics.median(values)
    for mark in {name for one in samples for name in one.marks}:
        found[f"{mark}_seconds"] = statistics.median(one.marks[mark] for one in samples if mark in one.marks)
    return found


def interleave(
    comparison: Comparison,
    sides: tuple[Side, Side],
    repeats: int,
    warm: Callable[[Side], object],
    take: Callable[[Side], Sample],
    tell: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Take samples of the bare back end and of an engine in turn, on one cluster.

    Parameters
    ----------
    comparison : Comparison
        Filled in.
    sides : tuple of Side
        Bare, engine.
    repeats : int
        Pairs of samples.
    warm : callable
        Runs something small, so that connections are made and modules loaded.
    take : callable
        Takes one sample.
    tell : callable, optional
        Called after each sample.
    """
    bare, engine = sides
    tell = tell or (lambda _: None)
    warm(bare)
    comparison.untouched = take(bare)
    tell(comparison)
    warm(engine)
    for repeat in range(repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            sample = take(side)
            (comparison.bare_samples if side is bare else comparison.samples).append(sample)
            tell(comparison)
    return comparison
