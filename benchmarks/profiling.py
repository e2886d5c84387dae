"""Where the time of a case goes: py-spy on the driver and on the workers while one more sample runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.clusters import Cluster

RATE = 100  # looks per second
START = 1.0  # seconds for py-spy to attach
END = 60.0  # … and to write
SHOWN = 12
WAITS = re.compile(
    r"^(Condition\.wait|Event\.wait|Thread\.join|_worker|Connection\._recv|Popen\.poll|wait|sleep"
    r"|EpollSelector\.select|select|poll|.*Watch\._wait|SimpleQueue\.get|Queue\.get|get) \("
)
"""Functions that wait: py-spy takes some threads for busy that only do this."""


@dataclass(slots=True)
class Profiler:
    """Records one sample of an engine.

    Attributes
    ----------
    folder : Path
        For the files, one for each process.
    stem : str
        How their names begin.
    cluster : Cluster or None
        Whose workers are recorded, too.
    found : dict
        Process → file, its busiest functions, or why there is none.
    """

    folder: Path
    stem: str
    cluster: Cluster | None = None
    found: dict[str, Any] | None = None

    def __call__(self, run: Callable[[], object]) -> None:
        """Run under py-spy."""
        program = shutil.which(
            "py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        )
        if program is None:
            self.found = {"driver": {"problem": "py-spy is not installed"}}
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        targets = {"driver": os.getpid(), **workers(self.cluster)}
        with contextlib.ExitStack() as stack:
            spies = {
                name: stack.enter_context(_spy(program, pid, self._path(name)))
                for name, pid in targets.items()
            }
            time.sleep(START)
            run()
            for spy in spies.values():
                spy.stop()
        self.found = {name: _told(spy) for name, spy in spies.items()}

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.stem}-{name}.speedscope.json"


@dataclass(slots=True)
class Spy:
    """One py-spy."""

    process: subprocess.Popen[bytes]
    path: Path
    log: Path

    def stop(self) -> None:
        """Let it write its file."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END)


@contextlib.contextmanager
def _spy(program: str, pid: int, path: Path) -> Iterator[Spy]:
    command = [program, "record", "--pid", str(pid), "--format", "speedscope", "--rate", str(RATE)]
    path.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(
            [*command, "--output", str(path)], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            yield Spy(process, path, Path(log.name))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if not path.exists():
                path.with_suffix(".problem").write_text(Path(log.name).read_text(errors="replace")[-500:])


def workers(cluster: Cluster | None) -> dict[str, int]:
    """Return the ids of the worker processes of a cluster on this machine."""
    if cluster is None or cluster.backend == "threads":
        return {}
    if cluster.backend == "dask":
        nannies = cluster.handle.workers.values()
        return {f"worker{n}": nanny.process.pid for n, nanny in enumerate(nannies) if nanny.process}
    found: dict[str, int] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::"):
                found[f"worker{len(found)}"] = process.pid
    return found


def _told(spy: Spy) -> dict[str, Any]:
    problem = spy.path.with_suffix(".problem")
    if not spy.path.exists():
        text = problem.read_text().strip() if problem.exists() else ""
        problem.unlink(missing_ok=True)
        return {"problem": text.splitlines()[-1] if text else "py-spy wrote nothing"}
    profile = json.loads(spy.path.read_text())
    for frame in profile["shared"]["frames"]:
        frame["file"] = _place(frame.get("file") or "")
    profile["name"] = spy.path.name.partition(".")[0]  # py-spy writes its whole command line there
    spy.path.write_text(json.dumps(profile, separators=(",", ":")))
    return {"file": spy.path.name, **busiest(profile)}


def busiest(speedscope: dict[str, Any], shown: int = SHOWN) -> dict[str, Any]:
    """Say where the time went.

    Parameters
    ----------
    speedscope : dict
        A file of py-spy.
    shown : int
        Functions.

    Returns
    -------
    dict
        "seconds" of all threads that were seen busy, "waiting" what of it was spent in functions
        that wait; "own" and "inclusive", lists of ``[function, share of the rest]``.
    """
    frames = speedscope["shared"]["frames"]
    own: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    total = waiting = 0.0
    for profile in speedscope["profiles"]:
        for stack, weight in zip(profile["samples"], profile["weights"], strict=True):
            names = [_frame(frames[one]) for one in stack]
            if not names:
                continue
            if WAITS.match(names[-1]):
                waiting += weight
                continue
            total += weight
            own[names[-1]] += weight
            for name in set(names):
                inclusive[name] += weight
    return {
        "seconds": round(total + waiting, 2),
        "waiting": round(waiting, 2),
        "own": [[name, round(value / total, 3)] for name, value in own.most_common(shown)],
        "inclusive": [[name, round(value / total, 3)] for name, value in inclusive.most_common(2 * shown)],
    }


def _frame(frame: dict[str, Any]) -> str:
    return f"{frame['name']} ({_place(frame.get('file') or '')})"


def _place(file: str) -> str:
    """Name a file without the place of its library on this machine."""
    parts = Path(file).parts
    if "site-packages" in parts:
        parts = parts[len(parts) - parts[::-1].index("site-packages") :]
    return "/".join(parts[-3:])
