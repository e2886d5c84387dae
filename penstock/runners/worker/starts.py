"""What has begun in a process, in a file that outlives it, where it survives a SIGKILL."""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import threading
import time
from collections import deque
from typing import Any

START_PLACES = 512  # attempts that run or have ended last; 28 kB per worker process
_NAME_BYTES = 48
_CELLS_END = START_PLACES * 8
_GRACE_SECONDS = 60.0  # for whoever reads the file of a dead process, until a sweep takes it


class Starts:
    """The attempts that have begun in this process, in a file that outlives it.

    A worker that dies takes along which of its tasks had begun. It is written down here, in a
    small mapped file for each process; the driver or scheduler on the same host reads the file of
    a dead worker by `read_starts`, or looks for one attempt by `find_start`. An attempt that has
    ended stays in the file until its place is needed, the oldest first: the message that says so
    may not have left the process when it died.

    How a back end uses it::

        start = starts().begin(key)          # before anything of the user is unpickled
        try:
            ...                              # in a chunk, before each element: start.element(place)
            start.called(place)              # right before the user's function is called
        finally:
            start.end()                      # when the result is out of the task's hands

    Code further down finds the object by `start_of`. `begin` and `end` take 3 µs, `element` and
    `called` 0.2 µs. Whoever has begun may have killed the process, say as it was loaded; only what was
    called has been executed.

    Parameters
    ----------
    label : str
        Tells workers of one process apart, and versions of this file; part of the file's name.
    """

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._lock = threading.Lock()
        self._process = 0
        self._map: Any = None
        self._cells: Any = None
        self._free: deque[int] = deque()

    def open(self) -> None:
        """Make the file before the first attempt begins: a worker without one is known for nothing."""
        with self._lock:
            if self._process != os.getpid():  # the first time, or in a fork
                self._map, self._cells, self._free = None, None, deque()
                with contextlib.suppress(OSError, ValueError):  # no disk: nobody will know
                    self._map = self._mapped()
                    self._cells = memoryview(self._map)[:_CELLS_END].cast("q")
                    self._free = deque(range(START_PLACES))
                self._process = os.getpid()  # last: other threads begin as soon as they see it

    def begin(self, key: Any) -> Start:
        """Note that an attempt begins."""
        if self._process != os.getpid():
            self.open()
        cells = self._cells
        try:
            place = self._free.popleft()
        except IndexError:  # nothing could be mapped, or more at once than there are places
            cells, place = None, 0
        start = Start(key, cells, place, self._free)
        if cells is not None:
            cells[place] = 0
            name = start_name(key).encode("ascii", "replace")[: _NAME_BYTES - 1]
            at = _CELLS_END + place * _NAME_BYTES
            self._map[at : at + 1 + len(name)] = bytes((len(name),)) + name
            cells[place] = 1
        _starts_open[key] = start
        return start

    def _mapped(self) -> Any:
        folder = _starts_folder()
        os.makedirs(folder, 0o700, exist_ok=True)
        if os.stat(folder).st_uid != os.getuid():
            raise OSError(folder)
        sweep_starts()
        path = _starts_file(os.getpid(), self._label)
        with contextlib.suppress(OSError):  # of an earlier process with this number
            os.unlink(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            size = _CELLS_END + START_PLACES * _NAME_BYTES
            os.truncate(descriptor, size)
            atexit.register(_unlink_own, path, os.getpid())
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)


class Start:
    """The note that one attempt has begun."""

    __slots__ = ("_cells", "_free", "_key", "_place")

    def __init__(self, key: Any, cells: Any, place: int, free: deque[int]) -> None:
        self._key = key
        self._cells = cells
        self._place = place
        self._free = free

    def element(self, place: int) -> None:
        """Note which place of a chunk begins now; an element goes through all stages before the next one."""
        if self._cells is not None:
            self._cells[self._place] = 2 * place + 1

    def called(self, place: int = 0) -> None:
        """Note that the user's function is called now, in a chunk for one of its places."""
        if self._cells is not None:
            self._cells[self._place] = 2 * place + 2

    def end(self) -> None:
        """Note that the attempt has ended; calling it twice is harmless."""
        cells, self._cells = self._cells, None
        _starts_open.pop(self._key, None)
        if cells is not None:
            cells[self._place] = -cells[self._place]
            self._free.append(self._place)


_starts: dict[str, Starts] = {}
_starts_open: dict[Any, Start] = {}
_NO_START = Start(None, None, 0, deque())


def starts(label: str = "") -> Starts:
    """Return the table of this process with a label, made once."""
    found = _starts.get(label)
    return _starts.setdefault(label, Starts(label)) if found is None else found


def start_of(key: Any) -> Start:
    """Return the note of an attempt that runs in this process; one that writes nothing if there is none."""
    return _starts_open.get(key, _NO_START)


def start_name(key: Any) -> str:
    """Return the name of an attempt in the file: tag and counter of its key."""
    return f"{key[0].rpartition('-')[2]}:{key[1]}"


def read_starts(
    pid: int, label: str = "", *, remove: bool = True
) -> dict[str, tuple[int, bool, bool]] | None:
    """Read what had begun in another process of this host, dead or alive.

    Parameters
    ----------
    pid : int
        Of the worker process.
    label : str
        Of its table.
    remove : bool
        Delete the file, since the process is dead.

    Returns
    -------
    dict or None
        `start_name` of each attempt → place that began last (0 for what is no chunk), whether the
        function had been called for it, and whether the attempt had ended. An attempt without an
        entry had not begun, or its end is long past. None if nobody knows: another host, no file.
    """
    path = _starts_file(pid, label)
    found = _read_starts(path)
    if remove and found is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return found


class LastStarts:
    """What has begun in a process of this host that is about to end, to be read until it has.

    Parameters
    ----------
    pid : int
        Of the process.
    label : str
        Of its table.
    """

    def __init__(self, pid: int, label: str = "") -> None:
        self.pid = pid
        self._path = _starts_file(pid, label)
        self._file: Any = None
        with contextlib.suppress(OSError):
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - the process may remove it before it ends

    def read(self) -> dict[str, tuple[int, bool, bool]] | None:
        """Return what `read_starts` does, None if nobody knows."""
        return None if self._file is None else _starts_in(self._file)

    def is_growing(self) -> bool:
        """Whether the process lives and may begin more."""
        try:
            os.kill(self.pid, 0)
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return self._file is not None and file.read().rpartition(b")")[2].split()[:1] != [b"Z"]
        except OSError:
            return False

    def close(self) -> None:
        """Delete the table."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def __del__(self) -> None:
        self.close()


def find_start(key: Any) -> tuple[int, int, bool, bool] | None:
    """Look for an attempt in the files of all processes of this host.

    Returns
    -------
    tuple of (int, int, bool, bool) or None
        Process id, and what `read_starts` tells. None if it has not begun on this host, or nobody knows.
    """
    wanted = start_name(key)
    try:
        names = os.listdir(_starts_folder())
    except OSError:
        return None
    for name in names:
        found = _read_starts(os.path.join(_starts_folder(), name)) or {}
        if wanted in found:
            return int(name.partition("-")[0]), *found[wanted]
    return None


def _read_starts(path: str) -> dict[str, tuple[int, bool, bool]] | None:
    try:
        with open(path, "rb") as file:
            return _starts_in(file)
    except OSError:
        return None


def _starts_in(file: Any) -> dict[str, tuple[int, bool, bool]] | None:
    try:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            return None
        file.seek(0)
        data = file.read()
        cells = memoryview(data)[:_CELLS_END].cast("q")
    except (OSError, TypeError):
        return None
    if len(data) < _CELLS_END + START_PLACES * _NAME_BYTES:
        return None
    found = {}
    for place, cell in enumerate(cells):
        if cell:
            at = _CELLS_END + place * _NAME_BYTES
            name = data[at + 1 : at + 1 + data[at]].decode("ascii", "replace")
            element, called = divmod(abs(cell) - 1, 2)
            found[name] = (element, bool(called), cell < 0)
    return found


def sweep_starts() -> None:
    """Remove the files of processes that have been dead for a minute; their readers come first."""
    folder = _starts_folder()
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            try:
                os.kill(int(name.partition("-")[0]), 0)
            except ProcessLookupError:
                with contextlib.suppress(OSError):
                    _bury_starts(path)
            except (ValueError, OSError):
                continue


def _bury_starts(path: str) -> None:
    """Delete a file at the second look; at the first one, write the time on it."""
    status = os.stat(path)
    if status.st_mode & 0o200:
        os.utime(path)
        os.chmod(path, 0o400)
    elif time.time() - status.st_mtime > _GRACE_SECONDS:
        os.unlink(path)


def _starts_folder() -> str:
    base = os.environ.get("TMPDIR", "")
    return os.path.join(base if os.path.isdir(base) else "/tmp", f"penstock-starts-{os.getuid()}")  # noqa: S108 - its owner is checked


def _starts_file(pid: int, label: str) -> str:
    plain = "".join(letter if letter.isalnum() else "_" for letter in label)
    return os.path.join(_starts_folder(), f"{pid}-{plain}")


def _unlink_own(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        with contextlib.suppress(OSError):
            os.unlink(path)
