"""Locks on cache keys: of several runs that need the same value at the same time, one makes it.

Both managers survive pickling: on workers they are the same lock again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PAUSE = 0.02
"""Seconds between two looks at a lock that another process holds."""


class LockManager:
    """What a lock manager does; make your own by giving it these methods.

    Attributes
    ----------
    shared : bool
        Whether the locks hold between processes.
    """

    shared = True

    def acquire_lock(self, key: str, holder: str, acquire_timeout: float | None = None) -> bool:
        """Take the lock of a key.

        Parameters
        ----------
        key, holder : str
            What is locked, and for whom; a holder gets its own lock again.
        acquire_timeout : float, optional
            Seconds to wait at most; None waits for ever, 0 does not wait.

        Returns
        -------
        bool
            Whether the holder has it now.
        """
        raise NotImplementedError

    def release_lock(self, key: str, holder: str) -> None:
        """Give the lock back.

        Raises
        ------
        ValueError
            If the holder does not have it.
        """
        raise NotImplementedError

    def is_locked(self, key: str) -> bool:
        """Whether anybody has the lock."""
        raise NotImplementedError

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether this holder has the lock."""
        raise NotImplementedError

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until nobody has the lock; answer whether it came to that within the seconds given."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.is_locked(key):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(PAUSE)
        return True

    @contextlib.contextmanager
    def lock(self, key: str, holder: str, acquire_timeout: float | None = None) -> Iterator[None]:
        """Hold the lock in a block.

        Raises
        ------
        TimeoutError
            If it cannot be had in time.
        """
        if not self.acquire_lock(key, holder, acquire_timeout):
            raise TimeoutError(f"the lock of {key!r} was not free within {acquire_timeout} s.")
        try:
            yield
        finally:
            self.release_lock(key, holder)


_held: dict[str, str] = {}  # of this process: key and holder
_freed = threading.Condition()


class MemoryLockManager(LockManager):
    """Locks of this process, for runs in threads: all managers of a process are one."""

    shared = False

    def __reduce__(self) -> Any:
        """Pickle as what it is: the locks of the process it comes to."""
        return (MemoryLockManager, ())

    def __eq__(self, other: object) -> bool:
        """All are one."""
        return isinstance(other, MemoryLockManager)

    def __hash__(self) -> int:
        """All are one."""
        return hash(MemoryLockManager)

    def acquire_lock(self, key: str, holder: str, acquire_timeout: float | None = None) -> bool:
        """Take the lock of a key; see `LockManager`."""
        with _freed:
            free = _freed.wait_for(lambda: _held.get(key, holder) == holder, acquire_timeout)
            if free:
                _held[key] = holder
            return free

    def release_lock(self, key: str, holder: str) -> None:
        """Give the lock back; see `LockManager`."""
        with _freed:
            if _held.get(key) != holder:
                raise ValueError(f"no lock held by {holder!r} for {key!r}.")
            del _held[key]
            _freed.notify_all()

    def is_locked(self, key: str) -> bool:
        """Whether anybody has the lock."""
        return key in _held

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether this holder has the lock."""
        return _held.get(key) == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until nobody has the lock; see `LockManager`."""
        with _freed:
            return _freed.wait_for(lambda: key not in _held, timeout)


_files: dict[str, tuple[str, IO[bytes]]] = {}  # path of a lock of this process: holder, open file
_files_guard = threading.Lock()


class FileSystemLockManager(LockManager):
    """Locks in a directory that all workers share.

    The kernel holds them (``flock``), so that the locks of a process that dies are free at once.

    Parameters
    ----------
    lock_files_directory : str or path
        Made if it does not exist.
    """

    def __init__(self, lock_files_directory: str | os.PathLike[str]) -> None:
        self.lock_files_directory = Path(lock_files_directory).expanduser().absolute()

    def __eq__(self, other: object) -> bool:
        """Compare directories."""
        return (
            isinstance(other, FileSystemLockManager)
            and other.lock_files_directory == self.lock_files_directory
        )

    def __hash__(self) -> int:
        """Hash the directory."""
        return hash(self.lock_files_directory)

    def _path(self, key: str) -> str:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return str(self.lock_files_directory / f"{name}.lock")

    def acquire_lock(self, key: str, holder: str, acquire_timeout: float | None = None) -> bool:
        """Take the lock of a key; see `LockManager`."""
        deadline = None if acquire_timeout is None else time.monotonic() + acquire_timeout
        while not self._take(key, holder):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(PAUSE)
        return True

    def _take(self, key: str, holder: str) -> bool:
        path = self._path(key)
        with _files_guard:
            if path in _files:
                return _files[path][0] == holder
            file = _opened(path)
            if not _try(file):
                file.close()
                return False
            _files[path] = (holder, file)
            return True

    def release_lock(self, key: str, holder: str) -> None:
        """Give the lock back; see `LockManager`."""
        path = self._path(key)
        with _files_guard:
            if path not in _files or _files[path][0] != holder:
                raise ValueError(f"no lock held by {holder!r} for {key!r}.")
            _files.pop(path)[1].close()

    def is_locked(self, key: str) -> bool:
        """Whether anybody has the lock."""
        path = self._path(key)
        with _files_guard:
            if path in _files:
                return True
            if not os.path.exists(path):
                return False
            with _opened(path) as file:
                return not _try(file)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether this holder has the lock, in this process."""
        with _files_guard:
            return _files.get(self._path(key), ("",))[0] == holder


def _opened(path: str) -> IO[bytes]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return open(path, "ab")


def _try(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
