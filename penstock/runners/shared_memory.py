"""Large values shared by the processes of one host: written once into a file, mapped by whoever reads.

The files of one owner lie in a directory of its own, ``/dev/shm/penstock-<pid>-<start>-<random>``
(and a twin in the temporary directory, for what does not fit). The owner deletes it when it
stops; what an owner that was killed left behind is deleted by the next one that starts. A file
may be unlinked while processes have it mapped: the memory goes with the last mapping.

Standard library only (`cloudpickle` is used where it is at hand), since this file may be shipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import pickle
import shutil
import sys
import tempfile
import uuid
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from .worker.pickling import dumps  # relative: the package around has another name when shipped

Packed = tuple[Any, ...]
"""A value as it travels: ``("bytes", body, buffers)``, or ``("file", path, body, buffers)``.

In the second form `body` and `buffers` are spans ``(start, length)`` of the file.
"""

SMALL = 1 << 20
"""Up to here, in bytes, a value travels in messages; above, only the name of its file does."""

BODY, PARTS = 1 << 20, 64
"""What `SharedMemory.export_buffers` allows besides the buffers: bytes of pickle, and their number."""

_IN_BAND = 1 << 16  # a buffer this small is copied into the pickle: each reader gets its own
_ALIGN = 64  # of arrays in a file, as numpy aligns its own
_CHUNK = 1 << 30  # Linux writes no more than 2 GiB at once
_SPARE = 16 << 20  # what a file system keeps free when a file has been written
_PREFIX = "penstock-"
_PROOF = "proof"
_MEMORY = "/dev/shm"  # noqa: S108 - the directories in it are ours alone, and have random names


class Vanished(Exception):
    """The file of a value is no longer there."""


# -- values and bytes ---------------------------------------------------------------------


def dump(value: Any, *, by_value: bool = False) -> tuple[bytes, list[memoryview]]:
    """Pickle a value without copying its large buffers.

    Parameters
    ----------
    value : object
        What to pickle.
    by_value : bool
        Classes and functions of ``__main__`` are known in this process, but not to the reader.

    Returns
    -------
    tuple
        The pickle, and the buffers that it leaves out.
    """
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # strided: the pickle holds a copy
            return True
        if raw.nbytes <= _IN_BAND:
            return True
        buffers.append(raw)
        return False

    if not by_value:
        try:
            return pickle.dumps(value, 5, buffer_callback=keep), buffers
        except Exception:  # a lambda, or a class that came by value: cloudpickle can do more
            buffers.clear()
    return dumps(value, keep), buffers


class _Body:
    """A file in memory that refuses to grow beyond `BODY`."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._length = 0

    def write(self, data: Any) -> int:
        data = bytes(data) if memoryview(data).nbytes <= BODY else None
        self._length += BODY + 1 if data is None else len(data)
        if data is None or self._length > BODY:
            raise _NotBuffersError
        self.parts.append(data)
        return len(data)


class _NotBuffersError(Exception):
    """The value is more than a few buffers."""


def dump_buffers(value: Any, least: int, *, by_value: bool = False) -> tuple[bytes, list[memoryview]] | None:
    """Pickle a value that is little more than a few large buffers; give up early on any other.

    Parameters
    ----------
    value : object
        What to pickle.
    least : int
        Bytes that the buffers must have together.
    by_value : bool
        As in `dump`.

    Returns
    -------
    tuple or None
        The pickle, of `BODY` bytes at most, and the buffers that it leaves out.
    """
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True
        if raw.nbytes <= _IN_BAND:
            return True
        buffers.append(raw)
        return False

    def dumped(pickler: Any) -> bytes:
        buffers.clear()
        body = _Body()
        pickler(body, 5, buffer_callback=keep).dump(value)
        return b"".join(body.parts)

    try:
        try:
            if by_value:
                raise pickle.PicklingError
            body = dumped(pickle.Pickler)
        except _NotBuffersError:
            raise
        except Exception:
            import cloudpickle

            body = dumped(cloudpickle.Pickler)
    except Exception:
        return None
    if len(buffers) > PARTS or sum(buffer.nbytes for buffer in buffers) < least:
        return None
    return body, buffers


def load(packed: Packed, *, private: bool = False, ended: Callable[[], object] | None = None) -> Any:
    """Make a value from what travelled.

    Parameters
    ----------
    packed : tuple
        From `SharedMemory.export`.
    private : bool
        Arrays can be written to; the pages that are written to become copies of this process.
        Otherwise arrays in a file are read-only, and shared by all readers.
    ended : callable, optional
        Called without arguments, in whatever thread, when nothing of the value uses the file any
        more.

    Raises
    ------
    Vanished
        If its owner has deleted the file.
    """
    kind, body, buffers = packed[0], packed[-2], packed[-1]
    if kind == "bytes":
        return pickle.loads(body, buffers=map(bytearray, buffers) if private else buffers)
    view = _mapped(packed[1], private=private, ended=ended)
    parts = [view[start : start + length] for start, length in (body, *buffers)]
    return pickle.loads(parts[0], buffers=parts[1:])


# `mmap.mmap` holds a file descriptor for as long as the mapping lives, and a process may often
# have no more than 1024 of them; the call behind it needs none.
_library = ctypes.CDLL(None)
_mmap, _munmap = _library.mmap, _library.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def _mapped(path: str, *, private: bool, ended: Callable[[], object] | None = None) -> memoryview:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Vanished(path) from error
    try:
        size = os.fstat(descriptor).st_size
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if private else 0)
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        address = _mmap(None, size, protection, flags, descriptor, 0)
        if address == _FAILED:  # too many mappings: copy it
            with open(descriptor, "rb", closefd=False) as file:
                content = bytearray(file.read()) if private else file.read()
            if ended is not None:
                ended()
            return memoryview(content)
    finally:
        os.close(descriptor)
    # ctypes keeps each array type for ever, so there is one per power of two.
    array = (ctypes.c_ubyte * (1 << size.bit_length())).from_address(address)
    weakref.finalize(array, _munmap, address, size).atexit = False
    if ended is not None:
        weakref.finalize(array, ended).atexit = False
    view = memoryview(array).cast("B")[:size]
    return view if private else view.toreadonly()


# -- files --------------------------------------------------------------------------------


class SharedMemory:
    """The files of one owner, as seen by one of its processes.

    Parameters
    ----------
    directories : sequence of str
        Where files may lie, the preferred one first.
    writer : str
        Begins the names of the files of this process, so that they are known if it dies.
    """

    def __init__(self, directories: Sequence[str], writer: str) -> None:
        self.directories = tuple(directories)
        self._writer = writer
        self._counter = itertools.count()
        self._locks: list[int] = []
        self._process = os.getpid()

    @classmethod
    def create(cls, roots: Iterable[str] | None = None) -> SharedMemory:
        """Become an owner; first delete what dead owners left behind.

        Raises
        ------
        OSError
            If no directory can be made anywhere.
        """
        roots = tuple(default_roots() if roots is None else roots)
        sweep_dead_owners(roots)
        name = f"{_PREFIX}{os.getpid()}-{_started(os.getpid())}-{uuid.uuid4().hex[:8]}"
        memory = cls([], "0")
        problem: OSError | None = None
        for root in roots:
            try:
                memory._own(os.path.join(root, name))
            except OSError as error:
                problem = error
        if not memory.directories:
            memory.close()
            raise problem or FileNotFoundError("no directory for shared memory")
        return memory

    def _own(self, directory: str) -> None:
        os.mkdir(directory, 0o700)
        self.directories += (directory,)
        # The kernel drops this lock when the owner dies, however it dies, and in every container.
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        self._locks.append(descriptor)
        with contextlib.suppress(OSError):  # a file system without locks: the name has to do
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def export(self, value: Any, *, by_value: bool = False) -> tuple[Packed, int]:
        """Pack a value; a large one is written to a file.

        Returns
        -------
        tuple
            The packed value and its size in bytes. The caller answers for the file.

        Raises
        ------
        OSError
            If no file system has room for it.
        """
        body, buffers = dump(value, by_value=by_value)
        total = len(body) + sum(buffer.nbytes for buffer in buffers)
        if total <= SMALL:
            return ("bytes", body, tuple(map(bytes, buffers))), total
        return self._write([memoryview(body), *buffers], total), total

    def export_buffers(self, value: Any, least: int, *, by_value: bool = False) -> Packed | None:
        """Write a value to a file if it is little more than a few large buffers.

        Parameters
        ----------
        value : object
            What to write.
        least : int
            Bytes that the buffers must have together.
        by_value : bool
            As in `dump`.

        Returns
        -------
        tuple or None
            The packed value; None if it is not of this kind, or cannot be pickled. The caller
            answers for the file.

        Raises
        ------
        OSError
            If no file system has room for it.
        """
        dumped = dump_buffers(value, least, by_value=by_value)
        if dumped is None:
            return None
        body, buffers = dumped
        return self._write([memoryview(body), *buffers], len(body) + sum(one.nbytes for one in buffers))

    def adopt(self, packed: Packed) -> Packed:
        """Give a file of another owner a second name, among the files of this one.

        It then lasts until both names are gone, whichever owner dies first. The caller answers for
        the new name.

        Raises
        ------
        Vanished
            If the file is no longer there.
        OSError
            If it is out of reach: another host, file system or user.
        """
        problem: OSError | None = None
        for directory in self.directories:
            path = os.path.join(directory, f"{self._writer}-{next(self._counter)}")
            try:
                os.link(packed[1], path)
            except FileNotFoundError as error:
                if os.path.isdir(directory):
                    raise Vanished(packed[1]) from error
                problem = error
            except OSError as error:
                problem = error
            else:
                return (packed[0], path, *packed[2:])
        raise problem or FileNotFoundError("no directory for shared memory")

    def proof(self) -> tuple[str, str]:
        """Return the path of a small file and what is in it: who reads that, sees the other files.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        path = os.path.join(self.directories[0], _PROOF)
        text = os.path.basename(self.directories[0])
        if not os.path.exists(path):
            with open(path, "w") as file:
                file.write(text)
        return path, text

    def _write(self, parts: list[memoryview], total: int) -> Packed:
        problem: OSError | None = None
        for directory in self.directories:
            if _room(directory) < total + _SPARE:
                continue
            path = os.path.join(directory, f"{self._writer}-{next(self._counter)}")
            try:
                spans = _write_file(path, parts)
            except BaseException as error:
                remove(path)
                if not isinstance(error, OSError):
                    raise
                problem = error  # filled up meanwhile
            else:
                return ("file", path, spans[0], tuple(spans[1:]))
        places = " and ".join(f"{os.path.dirname(one)} ({_room(one):,} free)" for one in self.directories)
        raise OSError(errno.ENOSPC, f"no room for {total:,} bytes in {places}") from problem

    def sweep(self, writer: str, keep: Container[str]) -> None:
        """Delete what a dead writer left behind, half-written files above all.

        Parameters
        ----------
        writer : str
            Name of a process that no longer lives.
        keep : container of str
            Files that somebody holds.
        """
        for directory in self.directories:
            with contextlib.suppress(OSError):
                for name in os.listdir(directory):
                    path = os.path.join(directory, name)
                    if name.startswith(f"{writer}-") and path not in keep:
                        remove(path)

    def close(self) -> None:
        """Delete everything; called by the owner. Doing it twice is harmless."""
        if os.getpid() != self._process:  # a fork of the owner ends: nothing of this is its own
            return
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)
        while self._locks:
            os.close(self._locks.pop())


def read_proof(path: str) -> str:
    """Return what is in the file of `SharedMemory.proof`, nothing if it cannot be read here."""
    if os.path.basename(path) != _PROOF:
        return ""
    try:
        with open(path) as file:
            return file.read(200)
    except (OSError, ValueError):
        return ""


def remove(path: str, by: int = 0) -> None:
    """Delete a file, if it is there; with `by` only in that process, not in a fork of it."""
    if by and by != os.getpid():
        return
    with contextlib.suppress(OSError):
        os.unlink(path)


def _write_file(path: str, parts: Sequence[memoryview]) -> list[tuple[int, int]]:
    """Write buffers one after the other, aligned; return where each lies."""
    spans = []
    position = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # `write` answers with an error when the memory is used up; a store into a mapping would
        # end the process with SIGBUS.
        for part in parts:
            position += -position % _ALIGN
            spans.append((position, part.nbytes))
            while part.nbytes:
                written = os.pwrite(descriptor, part[:_CHUNK], position)
                part, position = part[written:], position + written
    finally:
        os.close(descriptor)
    return spans


def _room(directory: str) -> int:
    """Bytes that can be written to a directory."""
    try:
        status = os.statvfs(directory)
        room = status.f_bavail * status.f_frsize
        if not directory.startswith(_MEMORY):
            return room
        with open("/proc/meminfo", "rb") as file:  # a file there is memory, whatever its limit says
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    room = min(room, int(line.split()[1]) * 1024)
                    break
        return min(room, cgroup_room(room))
    except OSError:
        return 0


def cgroup_room(most: int, root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Bytes that this process may still use by the limits of its container and of those around it.

    Parameters
    ----------
    most : int
        The answer where nothing is limited, or nobody can tell.
    root, own : str
        Where the system says so; a unified hierarchy (version 2), or the memory controller of version 1.
    """
    try:
        with open(own, encoding="ascii") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except (OSError, ValueError):
        return most
    room = most
    for number, controllers, path in (line for line in lines if len(line) == 3):
        if number == "0" and not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = os.path.join(root, "memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        steps = [step for step in path.split("/") if step and step != ".."]
        for depth in range(len(steps) + 1):  # in a container its own group may be the root
            room = min(room, _left_in(os.path.join(base, *steps[:depth]), *names, most=most))
    return max(room, 0)


def _left_in(group: str, limit_name: str, used_name: str, cache_name: str, *, most: int) -> int:
    """Bytes left in one control group; file pages that nobody has used lately do not count as used."""
    try:
        with open(os.path.join(group, limit_name), encoding="ascii") as file:
            limit = file.read().strip()
        if limit == "max":
            return most
        with open(os.path.join(group, used_name), encoding="ascii") as file:
            used = int(file.read())
        with open(os.path.join(group, "memory.stat"), encoding="ascii") as file:
            stat = dict(line.split() for line in file)
        return int(limit) - used + int(stat.get(cache_name, 0))
    except (OSError, ValueError):
        return most


# -- the janitor --------------------------------------------------------------------------


def memory_roots() -> list[str]:
    """Return the places for the directories of owners that are memory: one, or none."""
    usable = sys.platform == "linux" and os.access(_MEMORY, os.W_OK | os.X_OK)
    return [_MEMORY] if usable else []


def default_roots() -> list[str]:
    """Return the places for the directories of owners: memory first, then the temporary directory."""
    return [*memory_roots(), tempfile.gettempdir()]


def sweep_dead_owners(roots: Iterable[str] | None = None) -> None:
    """Delete the directories of this user whose owner no longer lives."""
    for root in default_roots() if roots is None else roots:
        with contextlib.suppress(OSError), os.scandir(root) as entries:
            for entry in entries:
                if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(OSError):
                        _sweep_if_dead(entry.path)


def _sweep_if_dead(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            return
        fields = os.path.basename(directory).removeprefix(_PREFIX).split("-")
        if len(fields) != 3 or not fields[0].isdecimal():
            return
        # A live owner holds the lock; its name counts too, until it has taken the lock.
        if _started(int(fields[0])) == fields[1]:
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def _started(pid: int) -> str:
    """When a process started, in a unit of the system's; empty if there is no such process."""
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except OSError:
            return ""
        return "0"
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return "" if fields[0] in {b"Z", b"X"} else fields[19].decode()  # dead, but not waited for
    except OSError:
        return ""
