"""The spool: an append-only file of events per writer, kept until the store has committed them.

A file ``<writer>.log`` starts with `MAGIC`; then follow frames ``length | crc32 | payload``. The
first frame is event 1 of its writer, the second event 2: sequence numbers have no gaps, and the
checksum covers them. A writer holds a lock on its file as long as it lives; a lock that can be
taken is the proof that the writer is dead. ``<writer>.ack`` says up to where a store has
committed, ``<writer>.to`` which store that is (`penstock.engine.destination`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from penstock.engine import destination as destinations

MAGIC = b"penspool\x01\r\n\x1a\n\x00\x00\x00"
HEADER = struct.Struct("<II")
LONGEST = 1 << 30  # a frame that claims to be longer is damage
LIVING = ".live"  # ends the name of what is left of a spool whose writer has gone on to another one
BATCH_BYTES = 1 << 20
BATCH_EVENTS = 5000

_pack_header = HEADER.pack
_crc = zlib.crc32


class FileLock:
    """An exclusive lock on an open file that ends with this process, and is not inherited by a fork."""

    _held: ClassVar[weakref.WeakSet[FileLock]] = weakref.WeakSet()

    def __init__(self, handle: int) -> None:
        self.handle = handle
        FileLock._held.add(self)

    @classmethod
    def take(cls, path: Path, flags: int = os.O_RDWR) -> Self | None:
        """Open a file and lock it; None if somebody else holds the lock."""
        handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                return None
            raise
        return cls(handle)

    def release(self) -> None:
        """Give the lock back and close the file. Releasing twice is harmless."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    @classmethod
    def _forget_all(cls) -> None:
        # The child shares the parent's lock: it would keep a dead parent alive. Closing the
        # child's handle leaves the lock with the parent.
        for lock in list(cls._held):
            with contextlib.suppress(OSError):
                lock.release()
        cls._held = weakref.WeakSet()


os.register_at_fork(after_in_child=FileLock._forget_all)


# -- writing --------------------------------------------------------------------------------


class Spool:
    """The file of one writer, open for appending.

    Attributes
    ----------
    writer : str
        128 random bits as hexadecimal digits, new for each process and each file.
    path : Path
        The file.
    last : int
        Sequence number of the latest event.
    size : int
        Length of the file in bytes.
    """

    def __init__(self, directory: Path, destination: str | None = None) -> None:
        self.writer = secrets.token_hex(16)
        self.path = directory / f"{self.writer}.log"
        self.last = 0
        self.size = len(MAGIC)
        self._gate = threading.Lock()
        self._torn = False
        self._synced = 0
        # Locked before it gets its name: nobody may take a newborn file for an orphan.
        unborn = self.path.with_suffix(".new")
        lock = FileLock.take(unborn, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        if lock is None:
            raise OSError(errno.ENOLCK, "file locks do not work here", str(directory))
        self._lock = lock
        try:
            if os.write(lock.handle, MAGIC) != len(MAGIC):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(unborn))
            # Before it gets its name, too: nobody may take it to a wrong place.
            destinations.write(self.path, destinations.present() if destination is None else destination)
            unborn.rename(self.path)
        except OSError:
            lock.release()
            unborn.unlink(missing_ok=True)
            destinations.remove(self.path)
            raise

    def append(self, payload: bytes) -> int:
        """Write one event at the end.

        Returns
        -------
        int
            Its sequence number.

        Raises
        ------
        OSError
            If the disk does not take it; the file is then as it was before.
        """
        with self._gate:
            number = self.last + 1
            frame = _pack_header(len(payload), _crc(payload, number)) + payload
            if self._torn:
                self._mend()
            written = -1
            try:
                written = os.write(self._lock.handle, frame)
            finally:
                if written != len(frame):  # a short write, or an error half-way
                    self._torn = True
            if self._torn:
                self._mend()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self.last = number
            self.size += written
            return number

    def _mend(self) -> None:
        os.ftruncate(self._lock.handle, self.size)
        self._torn = False

    def sync(self) -> None:
        """Make what was appended survive a power failure."""
        size = self.size
        if size > self._synced:
            os.fdatasync(self._lock.handle)
            self._synced = size

    def retire(self) -> None:
        """Drop the file, whose events are all in a store; its name and lock stay as a sign of life."""
        with self._gate, contextlib.suppress(OSError):
            self.path.with_suffix(".ack").unlink(missing_ok=True)
            living = self.path.with_suffix(LIVING)
            self.path.rename(living)
            destinations.remove(living)
            os.ftruncate(self._lock.handle, 0)
            self.path = living

    def close(self, acknowledged: int = 0) -> None:
        """End the life of the writer; the file goes once everything in it is in a store."""
        with self._gate:
            if self._lock.handle < 0:
                return
            if acknowledged >= self.last:
                remove(self.path)
            elif acknowledged:
                with contextlib.suppress(OSError):
                    write_ack(self.path, acknowledged)
            self._lock.release()


# -- reading --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive events of one writer, as they are in its spool."""

    writer: str
    first: int
    payloads: list[bytes]

    @property
    def last(self) -> int:
        """Sequence number of the last event; one before the first if there is none."""
        return self.first + len(self.payloads) - 1


class SpoolReader:
    """Reads the complete frames of a spool, also while its writer appends.

    Attributes
    ----------
    read_to : int
        Sequence number of the last event that `read` returned.
    damaged : bool
        The next frame is there in full but its checksum is wrong.
    foreign : bool
        The file has another format; nothing is read from it.
    """

    def __init__(self, path: Path) -> None:
        self.writer = path.stem
        self.read_to = 0
        self.damaged = False
        self._offset = len(MAGIC)
        self._mark = (0, self._offset)  # where the latest batch began
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        magic = os.pread(self._handle, len(MAGIC), 0)
        self.foreign = magic != MAGIC and len(magic) == len(MAGIC) and any(magic)

    def read(self, limit: int = BATCH_EVENTS, size: int = BATCH_BYTES) -> Batch:
        """Return what follows, at most `limit` events and about `size` bytes; may be empty."""
        payloads: list[bytes] = []
        first = self.read_to + 1
        if self.foreign:
            return Batch(self.writer, first, payloads)
        self._mark = (self.read_to, self._offset)
        data = os.pread(self._handle, size, self._offset)
        missing = _first_frame(data) - len(data)
        if missing > 0:  # one event larger than a batch travels alone
            data += os.pread(self._handle, missing, self._offset + len(data))
        for payload in _frames(data, first):
            payloads.append(payload)
            self._offset += HEADER.size + len(payload)
            self.read_to += 1
            if len(payloads) == limit:
                break
        self.damaged = not payloads and HEADER.size < _first_frame(data) <= len(data)
        return Batch(self.writer, first, payloads)

    def seek(self, number: int) -> None:
        """Go on with the event after `number`, or as near to it as the file reaches."""
        if number < self.read_to:
            self.read_to, self._offset = self._mark if number >= self._mark[0] else (0, len(MAGIC))
        while self.read_to < number and self.read(limit=number - self.read_to).payloads:
            pass

    @property
    def offset(self) -> int:
        """How many bytes of the file were read."""
        return self._offset

    def close(self) -> None:
        """Close the file."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def _first_frame(data: bytes) -> int:
    """Return the length of the first frame with its header, 0 if that is not even begun."""
    if len(data) < HEADER.size:
        return 0
    length = HEADER.unpack_from(data)[0]
    return HEADER.size + length if 0 < length <= LONGEST else 0


def _frames(data: bytes, number: int) -> Iterator[bytes]:
    position, end = 0, len(data)
    while position + HEADER.size <= end:
        length, checksum = HEADER.unpack_from(data, position)
        begin = position + HEADER.size
        position = begin + length
        payload = data[begin:position]
        # Blocks of zeros after a power failure would pass for empty frames.
        if length == 0 or len(payload) != length or _crc(payload, number) != checksum:
            return
        yield payload
        number += 1


# -- files of other writers -----------------------------------------------------------------


def spools(directory: Path, *destination: str) -> list[Path]:
    """Return the spools in a directory, of living and dead writers: those with a destination, or all."""
    try:
        found = sorted(directory.glob("*.log"))
    except OSError:
        return []
    return [path for path in found if not destination or destinations.read(path) in destination]


def take_orphan(path: Path) -> FileLock | None:
    """Take the lock of a dead writer's spool; None if the writer lives or the file is gone."""
    try:
        lock = FileLock.take(path)
    except OSError:
        return None
    if lock is not None and not path.exists():  # somebody else finished it a moment ago
        lock.release()
        return None
    return lock


def writer_lives(directory: Path, writer: str) -> bool | None:
    """Whether the process of a writer lives; None if nothing here tells."""
    known: bool | None = None
    for path in (directory / f"{writer}.log", directory / f"{writer}{LIVING}"):
        try:
            lock = FileLock.take(path)
        except OSError:
            continue
        if lock is None:
            return True
        lock.release()
        known = False
    return known


def remove_signs(directory: Path) -> None:
    """Remove what says of processes that are dead that they live."""
    with contextlib.suppress(OSError):
        for path in directory.glob(f"*{LIVING}"):
            lock = take_orphan(path)
            if lock is not None:
                path.unlink(missing_ok=True)
                lock.release()


def holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock of a spool; None where the kernel does not tell."""
    try:
        inode = path.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
                return int(words[4]) if int(words[4]) > 0 else None
    except (OSError, ValueError):
        pass
    return None


def mend(path: Path, reader: SpoolReader) -> int:
    """Cut what follows the last complete frame of a dead writer's spool.

    Parameters
    ----------
    path : Path
        The spool, whose lock the caller holds.
    reader : SpoolReader
        Has read it to the end.

    Returns
    -------
    int
        Bytes that were cut. A frame that is merely unfinished was never promised to anybody;
        damage to finished ones is kept beside the spool as ``<writer>.rejected``.
    """
    length = path.stat().st_size
    cut = length - reader.offset
    if cut <= 0:
        return 0
    if reader.damaged:
        with path.open("rb") as source:
            source.seek(reader.offset)
            path.with_suffix(".rejected").write_bytes(source.read())
    os.truncate(path, reader.offset)
    return cut


def read_ack(path: Path) -> int:
    """Return up to which event a store has committed a spool, as far as the file beside it knows."""
    try:
        return int(path.with_suffix(".ack").read_text())
    except (OSError, ValueError):
        return 0


def write_ack(path: Path, acknowledged: int) -> None:
    """Note up to which event a store has committed a spool."""
    fresh = path.with_suffix(".ack.new")
    fresh.write_text(str(acknowledged))
    fresh.chmod(0o600)
    fresh.replace(path.with_suffix(".ack"))


def remove(path: Path) -> None:
    """Remove a spool whose events are all in a store."""
    for name in (path, path.with_suffix(".ack")):
        with contextlib.suppress(OSError):
            name.unlink()
    with contextlib.suppress(OSError):
        destinations.remove(path)
