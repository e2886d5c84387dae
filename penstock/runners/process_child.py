"""One worker process, seen from the driver: how it is started, what it has, how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.runners.base import Key
from penstock.runners.process_channel import Channel, FunctionsReceived, FunctionsSent
from penstock.runners.process_work import Handle, Work
from penstock.runners.worker.starts import read_starts

_ROOT = str(Path(__file__).parent.parent.parent)
# The user's __main__ is not imported: a script needs no guard, and a notebook has no file. The
# module search path comes in the command, since penstock itself may have to be found by it.
_START = (
    "import sys; descriptor, driver, *sys.path[:] = sys.argv[1:]; "
    "from penstock.runners.process_worker import main; main(int(descriptor), int(driver))"
)
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

_AHEAD = 16  # tasks that a worker has at most …
_AHEAD_SECONDS = 0.002  # … as long as they are expected to take no longer than this


def environment(threads: int) -> dict[str, str]:
    """Return the environment for workers; libraries use `threads` threads unless the user says else."""
    return {**dict.fromkeys(_THREADS, str(threads)), **os.environ}


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory, since this host has started."""
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb") as file:
        for line in file:
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0


class Child:
    """A worker process.

    Attributes
    ----------
    number : int
        Its name in the pool; begins the names of the files it writes.
    is_alive, is_ready, is_leaving, is_blocked : bool
        It has said something; it can take work; it was told to end; its task waits for other work.
    is_presumed_blocked : bool
        We think that it is blocked, although it has not said so.
    was_asked : bool
        To hand work back, and has not answered.
    running : dict
        The work it has, in the order in which it runs it; the first one runs.
    sent : dict
        Work that its tasks have submitted and that has not ended.
    owned : dict
        Values that its tasks hold a reference to.
    outbox : list of tuple
        Reports for its tasks.
    victim : Work or None
        The work that was cancelled by killing the process.
    begun : dict or None
        What had begun in it, once it is buried; see `read_starts`.
    """

    def __init__(self, number: int, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.number = number
        self.process = process
        self.pid = process.pid
        self.name = f"process-{process.pid}"
        self.channel = channel
        self.born = time.monotonic()
        self.idle_since = self.born
        self.is_presumed_blocked = False
        self.is_alive = self.is_ready = self.is_leaving = self.is_blocked = self.was_asked = False
        self.running: dict[Key, Work] = {}
        self.seconds = 0.0  # what is running is expected to take
        self.sent: dict[Key, Work] = {}
        self.owned: dict[int, Handle] = {}
        self.outbox: list[tuple[Any, ...]] = []
        self.functions = FunctionsSent()
        self.nested_functions = FunctionsReceived()
        self.victim: Work | None = None
        self.begun: dict[str, tuple[int, bool, bool]] | None = None
        self.death: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            # Readable when the process has ended. The end of the stream is not enough: a process
            # that a task has forked may hold the socket open.
            self.death = os.pidfd_open(process.pid)

    @classmethod
    def start(cls, number: int, settings: Mapping[str, Any], environment: Mapping[str, str]) -> Child:
        """Start a process; it says "ready" when it can take work.

        Parameters
        ----------
        number : int
            Its number.
        settings : dict
            ``directories`` for large values, ``initializer`` (pickled with its arguments, or
            None), ``info`` (fields of the `RunnerInfo`).
        environment : dict
            Its environment.

        Raises
        ------
        OSError
            If the system starts no more processes.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [
                        sys.executable,
                        *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
                        *("-P", "-c", _START, str(theirs.fileno()), str(os.getpid())),
                        *(os.path.abspath(path) for path in sys.path),
                        _ROOT,
                    ],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                    process_group=0,  # Ctrl-C in the terminal reaches the driver alone
                )
            except BaseException:
                ours.close()
                raise
        child = cls(number, process, Channel(ours, blocking=False))
        child.channel.post(
            ("settings", {**settings, "number": number, "name": child.name, "argv": list(sys.argv)})
        )
        child.channel.flush()
        return child

    @property
    def current(self) -> Work | None:
        """The work that runs now."""
        return next(iter(self.running.values()), None)

    @property
    def awaits(self) -> bool:
        """Whether work that the running task has submitted has not ended."""
        current = self.current
        return current is not None and any(nested.parent is current for nested in self.sent.values())

    @property
    def has_room(self) -> bool:
        """Whether more work may be sent ahead: that hides the way there, but only of short tasks."""
        return self.seconds < _AHEAD_SECONDS and len(self.running) < _AHEAD

    def give(self, work: Work) -> None:
        """Queue a task for the worker."""
        work.child = self
        self.running[work.key] = work
        self.seconds += work.seconds
        self.channel.post(
            (
                "run",
                work.key,
                work.order,
                *self.functions.pack(work.function),
                work.arguments,
                tuple([value.packed for value in work.values]),
                work.announce,
            )
        )

    def take(self, key: Key) -> Work | None:
        """Strike a task off the list, because it has ended or was handed back."""
        work = self.running.pop(key, None)
        if work is not None:
            work.child = None
            self.seconds = self.seconds - work.seconds if self.running else 0.0
        return work

    def kill(self) -> None:
        """End the process and what its tasks have started, at once."""
        # Not reaped yet, so the number cannot belong to anybody else.
        if self.process.returncode is None:
            for end in (os.killpg, os.kill):
                with contextlib.suppress(OSError):
                    end(self.pid, signal.SIGKILL)

    def bury(self) -> str:
        """Reap the process and close what belongs to it; return how it ended, in words."""
        self.kill()
        self.channel.close()
        self.begun = read_starts(self.pid)
        death, self.death = self.death, None  # first: two threads that close it would close a stranger's
        if death is not None:
            os.close(death)
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:  # it hangs in the kernel, on a file system that is away
            return "was killed"
        if code >= 0:
            return f"exited with code {code}"
        try:
            return f"died by {signal.Signals(-code).name}"
        except ValueError:
            return f"died by signal {-code}"
