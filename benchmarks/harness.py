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
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import psutil

from benchmarks.memory import Host

INTERVAL = 0.02  # seconds between two looks at the memory of the driver
HOST_EVERY = 2  # looks at the memory of the driver for one at that of the host
SOCKETS_EVERY = 10  # … for one at the sockets
LONG = 30.0  # seconds of a sample from which on fewer are taken
LONG_REPEATS = 3
RECORD_TIMEOUT = 600.0  # seconds until the record must show every task run


class Side(Protocol):
    """One way to run the cases on an open cluster: a bare back end, penstock, Prefect.

    Each case returns the values that its workload checks. What runs is told in `workloads`.
    """

    name: str

    def map_noop(self, count: int, clock: Clock) -> list[int]:
        """Run `count` no-ops and return their values."""

    def pipeline(self, count: int, stages: int, clock: Clock) -> list[int]:
        """Map a step over `count` elements, `stages` times in a row, and return the last values."""

    def latency(self, count: int, clock: Clock) -> tuple[list[int], list[float]]:
        """Submit no-ops, each after the value of the one before; return values and the seconds of each."""

    def chain_large(self, items: int, clock: Clock) -> float:
        """Make an array, add one to it and return its sum, in three tasks."""

    def fan_out_large(self, items: int, readers: int, clock: Clock) -> list[tuple[int, int, float]]:
        """Make an array in one process, sum it in others; return what each `read` returned."""

    def map_large(self, array: np.ndarray[Any, Any], count: int, clock: Clock) -> list[float]:
        """Sum `count` parts of one array that every task is given entirely."""

    def results_dropped(self, count: int, items: int, clock: Clock) -> list[float]:
        """Make `count` arrays, each of which one task sums and nobody else keeps; return the sums."""

    def tree_sum(self, sleeps: list[float], items: int, clock: Clock) -> np.ndarray[Any, Any]:
        """Make an array after each sleep and add them all in a binary tree; return the sum."""

    def completed(self, expected: int, timeout: float) -> int | None:
        """Return how many task runs of the last sample the record shows as completed; None if there is no record."""


class Clock:
    """Marks moments since it was made; the last mark is the end of the sample."""

    def __init__(self, on_mark: Callable[[str], None] = lambda _: None) -> None:
        self.marks: dict[str, float] = {}
        self._on_mark = on_mark
        self._start = time.perf_counter()

    def mark(self, name: str) -> None:
        """Note that something has happened now."""
        self.marks[name] = time.perf_counter() - self._start
        self._on_mark(name)

    def __reduce__(self) -> tuple[type[Clock], tuple[()]]:
        """Travel as another clock: Prefect pickles a flow, with all it holds, into each of its tasks."""
        return Clock, ()

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
    figures : dict
        What the case measures besides: "host_growth" and its parts in bytes, latencies in seconds, …
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
    figures: dict[str, float] = field(default_factory=dict)


class Driver:
    """Watches this process in a thread of its own, as a context manager.

    Parameters
    ----------
    host : bool
        Watch the processes below it and shared memory, too.
    spill : Path, optional
        Folder of a Ray session: watch what it spills, too.
    """

    def __init__(self, *, host: bool = False, spill: Path | None = None) -> None:
        self._watch_host, self._spill = host, spill
        self._host: Host | None = None
        self.held: dict[str, int] = {}
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
        self._host = Host(self._spill) if self._watch_host else None
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

    @property
    def figures(self) -> dict[str, float]:
        """Growth of the host in bytes, if it was watched: peaks, and at each mark."""
        if self._host is None:
            return {}
        peaks = {f"{name}_growth": float(value) for name, value in self._host.peaks.items()}
        return {**peaks, **{f"host_at_{name}": float(value) for name, value in self.held.items()}}

    def note(self, mark: str) -> None:
        """Keep how much the host has grown until a mark of the clock."""
        if self._host is not None:
            self.held[mark] = self._host.look()

    def _watch(self) -> None:
        looks = 0
        while not self._done.wait(INTERVAL):
            self._look()
            looks += 1
            if self._host is not None and looks % HOST_EVERY == 0:
                self._host.look()
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


def measure(
    run: Callable[[Clock], Any], *, host: bool = False, spill: Path | None = None
) -> tuple[Sample, Any]:
    """Run once and return the sample and what `run` returned.

    Parameters
    ----------
    run : callable
        Gets a clock.
    host : bool
        Watch the memory of the whole host.
    spill : Path, optional
        Folder of a Ray session: watch what it spills, too.
    """
    with Driver(host=host, spill=spill) as driver:
        clock = Clock(driver.note)
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
        figures=driver.figures,
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
    by : str
        What is compared: "seconds", or a name in `Sample.figures` of which less is better.
    what : str
        Which of several comparisons of one case this is; may be empty.
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
    by: str = "seconds"
    what: str = ""
    unfinished: str = ""

    @property
    def ratios(self) -> list[float]:
        """Speed of the engine over that of the bare back end, pair by pair: 1 is as fast, 0.5 half as fast."""
        pairs = zip(self.bare_samples, self.samples, strict=False)
        return [self._compared(bare) / self._compared(ours) for bare, ours in pairs]

    def _compared(self, sample: Sample) -> float:
        return sample.seconds if self.by == "seconds" else sample.figures[self.by]

    @property
    def ratio(self) -> float | None:
        """Median of the ratios; None without a pair."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def all_recorded(self) -> bool:
        """Whether the record shows every task run of every sample as completed."""
        return bool(self.samples) and all((one.completed or 0) >= self.tasks for one in self.samples)

    def as_json(self) -> dict[str, Any]:
        """Return what goes to the result file."""
        return {
            "configuration": self.configuration,
            "what": self.what,
            "by": self.by,
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
    for name in {name for one in samples for name in one.figures}:
        found[name] = statistics.median(one.figures[name] for one in samples if name in one.figures)
    return found


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many samples are taken, and of whom.

    Attributes
    ----------
    repeats : int
        Pairs of samples.
    bare : bool
        False takes samples of the engine alone.
    untouched : bool
        Whether a sample of the bare side comes first, before the engine was ever on the cluster.
    tell : callable
        Called after each sample.
    profile : callable or None
        Called at the end with a function that takes one more sample of the engine, which does not count.
    """

    repeats: int
    bare: bool = True
    untouched: bool = True
    tell: Callable[[Comparison], None] = field(default=lambda _: None)
    profile: Callable[[Callable[[], object]], None] | None = None

    def enough(self, taken: int, comparison: Comparison) -> bool:
        """Whether no more pairs are needed: three do where a sample takes long."""
        found = [*comparison.bare_samples, *comparison.samples]
        long = bool(found) and statistics.median(one.seconds for one in found) > LONG
        return taken >= (min(self.repeats, LONG_REPEATS) if long else self.repeats)


def interleave(
    comparison: Comparison,
    sides: tuple[Side, Side],
    sampling: Sampling,
    warm: Callable[[Side], object],
    take: Callable[[Side], Sample],
) -> Comparison:
    """Take samples of the bare back end and of an engine in turn, on one cluster.

    Parameters
    ----------
    comparison : Comparison
        Filled in.
    sides : tuple of Side
        Bare, engine.
    sampling : Sampling
        How many.
    warm : callable
        Runs something small, so that connections are made and modules loaded.
    take : callable
        Takes one sample.
    """
    bare, engine = sides
    if sampling.bare:
        warm(bare)
    if sampling.bare and sampling.untouched:
        comparison.untouched = take(bare)
        sampling.tell(comparison)
    warm(engine)
    repeat = 0
    while not sampling.enough(repeat, comparison):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            if side is bare and not sampling.bare:
                continue
            sample = take(side)
            (comparison.bare_samples if side is bare else comparison.samples).append(sample)
            sampling.tell(comparison)
        repeat += 1
    if sampling.profile is not None:
        sampling.profile(lambda: take(engine))
    return comparison


def check(right: bool, side: Side, what: str) -> None:
    """Stop at a wrong value: the time that it took means nothing.

    Raises
    ------
    RuntimeError
        Naming the side.
    """
    if not right:
        message = f"{side.name} returned wrong {what}"
        raise RuntimeError(message)


def finish(sample: Sample, side: Side, expected: int, settle: Callable[[], int]) -> Sample:
    """Note what the record shows of a sample, and wait until the cluster has forgotten it."""
    sample.completed = side.completed(expected, RECORD_TIMEOUT)
    sample.left_behind = settle()
    return sample


def items_of(megabytes: float) -> int:
    """Return how many numbers of eight bytes an array of this size has."""
    return int(megabytes * 10**6) // 8
