"""Results that outlive the memory they were made in: written by the worker, read by whoever asks.

It needs the standard library only, and fsspec where a storage is no directory.

A result is committed by one small file, ``<key>.result``, that appears whole or not at all: the
first attempt that commits wins. It begins with a line of JSON, protected by a checksum of its
own, that tells format, length and checksum of the value; the value follows in the same file if it
is small, else it lies beside it under a name that only this line knows. So a writer that is
killed leaves nothing that could be taken for a result.

Commit order (primitives, in the work order)
--------------------------------------------
``storage``
    A directory or any URL of fsspec.
``options``
    Options of the fsspec file system; they are not written down anywhere.
``key``
    Where in the storage; ``{run}`` stands for the id of the run.
``format``
    One of `result_formats.NAMES`.
``over``
    Only values of at least so many bytes are stored.
``cache`` (optional)
    The cache key, text: the first result that was stored for it is that of every run with this key,
    until it expires. It stands in the header, and must be equal there.
``expires`` (optional)
    Seconds after which such a result is stored anew, counted from when it was written.
``refresh`` (optional)
    Take no result of another run.
``staged`` (optional)
    The run is part of a transaction: its result lies beside its key, where nobody looks, until `publish`
    puts it in its place or `withdraw` removes it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from . import result_formats as formats

INLINE = 65_536  # bytes up to which a value lies in the commit file itself
MAGIC, VERSION = b"penstock-result", b"1"
EXTENSION = ".result"
STAGED = ".staged-"
CHUNK = 1 << 20


class Absent(Exception):
    """There is no result under a key."""

    _penstock_error = "MissingResult"


class Damaged(Exception):
    """A file does not hold what was written; it has been set aside."""

    _penstock_error = "ResultCorrupt"


def commit(value: Any, order: dict[str, Any], run: str, attempt: int) -> tuple[Any, dict[str, Any]]:
    """Store the value of one attempt.

    Parameters
    ----------
    value : object
        What the task returned.
    order : dict
        See the module's docstring.
    run, attempt : str, int
        Whose value it is.

    Returns
    -------
    tuple
        The value of the run, which is the stored one if another attempt was faster, and what the
        record says: ``storage, key, format, nbytes, checksum``, ``duplicate`` if another attempt
        was faster.

    Raises
    ------
    CommitError
        If the value does not fit the format, or the storage refuses.
    """
    prepared = formats.prepare(value, order["format"])
    place = _place(order)
    key = _target(order, run)
    with _refusals(order, place):
        for _ in range(3):
            header = _write(place, key, prepared, run, attempt, order)
            if place.commit(key, header, replace=False):
                break
            try:
                present = _header(place, key)
                if header.is_that_of(present):  # a request was repeated whose answer had got lost
                    break
                if present["run"] == run or _answers(present, order):
                    stored = _read_value(place, key, present)
                    place.drop(_beside(key, header.data))
                    return stored, _said(order, key, present, duplicate=present["run"] == run)
            except (Absent, Damaged):
                place.drop(_beside(key, header.data))
                continue
            place.commit(key, header, replace=True)
            place.drop(_beside(key, present["data"]))
            break
        else:
            raise formats.CommitError(f"the result storage {place.name} keeps a damaged file under {key!r}")
        if attempt > 1:
            place.tidy(key, header.data)
        return value, _said(order, key, header.fields)


def find(order: dict[str, Any], run: str) -> tuple[Any, dict[str, Any]] | None:
    """Return what `commit` of an earlier attempt of the run has returned; None if there was none."""
    place = _place(order)
    key = _target(order, run)
    try:
        with _refusals(order, place):
            header = _header(place, key)
            if header["run"] != run:
                return None
            return _read_value(place, key, header), _said(order, key, header)
    except (Absent, Damaged):
        return None


def recall(order: dict[str, Any], run: str) -> tuple[Any, dict[str, Any]] | None:
    """Return the result that is stored under a cache key, with what the record says of it; None if there is none.

    The record says ``cached`` if another run has made it.

    Raises
    ------
    Damaged
        If a file is not what was written.
    CommitError
        If the storage refuses.
    """
    place = _place(order)
    key = order["key"].replace("{run}", run)
    try:
        with _refusals(order, place):
            header = _header(place, key)
            if header["run"] == run:
                return _read_value(place, key, header), _said(order, key, header)
            if _answers(header, order):
                return _read_value(place, key, header), {**_said(order, key, header), "cached": True}
    except Absent:
        pass
    return find(order, run) if order.get("staged") else None


def peek(order: dict[str, Any], run: str, limit: float) -> dict[str, Any] | None:
    """Return what `recall` would say of a result of another run, without its value; None if there is none.

    Parameters
    ----------
    order, run
        As for `recall`.
    limit : float
        Bytes up to which a file in a directory is read in order to compare its checksum; of a longer one
        only the length is.

    Raises
    ------
    Damaged, CommitError
        As `recall` does.
    """
    place = _place(order)
    key = order["key"].replace("{run}", run)
    try:
        with _refusals(order, place):
            header = _header(place, key)
            if not _answers(header, order):
                return None
            _verify(place, key, header, limit)
            return {**_said(order, key, header), "cached": True}
    except Absent:
        return None


def cache_place(key: str, folder: str | None) -> str:
    """Return where the result for a cache key lies, if nobody has chosen a place.

    Parameters
    ----------
    key : str
        The cache key.
    folder : str or None
        That of the flow run, for keys that are no good in another.
    """
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return f"cache/{name[:2]}/{name}" if folder is None else f"{folder}/{name}"


def _answers(header: dict[str, Any], order: dict[str, Any]) -> bool:
    """Whether a stored result is the one that an order looks for, whoever made it."""
    if "cache" not in order or order.get("refresh") or header.get("cache") != order["cache"]:
        return False
    limits = [limit for limit in (header.get("expires"), order.get("expires")) if limit is not None]
    return not limits or time.time() < float(header["time"]) + min(limits)


def _target(order: dict[str, Any], run: str) -> str:
    """Return the key under which the result of a run is written."""
    key: str = order["key"].replace("{run}", run)
    return f"{key}{STAGED}{run}" if order.get("staged") else key


def publish(where: dict[str, Any], *, refresh: bool = False, expires: float | None = None) -> dict[str, Any]:
    """Put a staged result in its place, where others find it; its bytes stay where they are.

    Parameters
    ----------
    where : dict
        What the record says of it, with ``staged``, and ``options`` if the storage needs some.
    refresh : bool
        Also if a valid result lies there already: else that one counts, and ours is dropped.
    expires : float, optional
        Seconds after which what lies there is no longer valid.

    Returns
    -------
    dict
        What the record says from now on.

    Raises
    ------
    Absent, Damaged
        If the staged result is gone, or is not what was written.
    CommitError
        If the storage refuses.
    """
    place, key, run = _place(where), where["staged"], where["run"]
    with _refusals(where, place):
        fields = _header(place, where["key"])
        header = _Header({name: one for name, one in fields.items() if name != "inline"}, fields["inline"])
        order = {"cache": fields.get("cache"), "expires": expires, "refresh": refresh, **where}
        if not place.commit(key, header, replace=False):
            present: dict[str, Any] | None = None
            with contextlib.suppress(Absent, Damaged):
                present = _header(place, key)
            if present is not None and header.is_that_of(present):  # it was published before
                fields = present
            elif present is not None and order["cache"] is not None and _answers(present, order):
                place.drop(_beside(key, header.data))
                fields = present
            else:
                place.commit(key, header, replace=True)
                if present is not None:
                    place.drop(_beside(key, present["data"]))
        place.drop(where["key"] + EXTENSION)
        said = _said(where, key, fields)
        return said if fields["run"] == run else {**said, "cached": True}


def withdraw(where: dict[str, Any]) -> None:
    """Remove the result of a run, if it is its own: others find it no more.

    Parameters
    ----------
    where : dict
        What the record says of it, with ``options`` if the storage needs some.

    Raises
    ------
    CommitError
        If the storage refuses.
    """
    place, key = _place(where), where["key"]
    with contextlib.suppress(Absent, Damaged), _refusals(where, place):
        header = _header(place, key)
        if header["run"] == where["run"]:
            place.drop(key + EXTENSION)
            place.drop(_beside(key, header["data"]))


def load(where: dict[str, Any], run: str | None = None) -> Any:
    """Read a result.

    Parameters
    ----------
    where : dict
        ``storage``, ``key``, and ``options`` if the storage needs some.
    run : str, optional
        Whose result it has to be.

    Raises
    ------
    Absent
        If there is none, or none of this run.
    Damaged
        If a file is not what was written.
    CommitError
        If the storage refuses, or a library is missing here.
    """
    place = _place(where)
    with _refusals(where, place):
        header = _header(place, where["key"])
        if run is not None and header["run"] != run:
            message = (
                f"{place.name}/{where['key']}{EXTENSION} holds the result of a later run, {header['run']}"
            )
            raise Absent(message)
        return _read_value(place, where["key"], header)


@contextlib.contextmanager
def _refusals(order: dict[str, Any], place: Any) -> Iterator[None]:
    """Whatever a storage raises becomes one sentence."""
    try:
        yield
    except (formats.CommitError, Absent, Damaged):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if isinstance(error, ImportError):
            raise formats.Missing(_needs(order["storage"], error)) from error
        message = f"the result storage {place.name} refuses: {reason}"
        raise formats.CommitError(message) from error


def _said(
    order: dict[str, Any], key: str, header: dict[str, Any], *, duplicate: bool = False
) -> dict[str, Any]:
    said = {name: header[name] for name in ("format", "nbytes", "checksum", "run")}
    said |= {"storage": order["storage"], "key": key}
    final, mark, _ = key.rpartition(f"{STAGED}{header['run']}")
    if mark:  # where it will lie, once it is published
        said["staged"] = final
    return {**said, "duplicate": True} if duplicate else said


# -- the commit file ------------------------------------------------------------------------


def present(order: dict[str, Any], run: str, *, anybodys: bool = False) -> dict[str, Any] | None:
    """Return what `commit` said of the result of a run, without reading it; None if there is none.

    `anybodys`: also if another run has stored it.
    """
    place = _place(order)
    keys = [order["key"].replace("{run}", run)]
    if order.get("staged"):
        keys.append(_target(order, run))
    for key in keys:
        with contextlib.suppress(Absent, Damaged), _refusals(order, place):
            header = _header(place, key)
            if anybodys or header["run"] == run:
                return _said(order, key, header)
    return None


class _Header:
    """What the commit file says.

    Attributes
    ----------
    fields : dict
        ``run, attempt, format, details, nbytes, checksum, host, pid, time`` and ``data``: the
        name of the file beside it, None if the value is in the commit file.
    packed : bytes
        The commit file.
    """

    def __init__(self, fields: dict[str, Any], inline: bytes) -> None:
        self.fields = fields
        self.data = fields["data"]
        text = json.dumps(fields).encode()
        digest = _digest(VERSION + text).encode()
        self.packed = b" ".join((MAGIC, VERSION, digest, text)) + b"\n" + inline

    def is_that_of(self, present: dict[str, Any]) -> bool:
        """Whether a commit file that was found is this one."""
        return all(present.get(name) == self.fields[name] for name in ("data", "pid", "time", "host"))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write(place: Any, key: str, prepared: Any, run: str, attempt: int, order: dict[str, Any]) -> _Header:
    """Write a value, and return the header that makes it a result."""
    extension = formats.EXTENSIONS[prepared.format]
    name = f"{key}-{attempt}-{os.urandom(4).hex()}{extension}"
    # A format that was asked for by name is there for other programs: the file holds nothing else.
    sink = _Sink(place, name, INLINE if order["format"] == "auto" else 0)
    try:
        prepared.write(sink)
        sink.finish()
    except BaseException:
        sink.discard()
        raise
    fields = {
        "run": run,
        "attempt": attempt,
        "format": prepared.format,
        "details": prepared.details,
        "nbytes": sink.nbytes,
        "checksum": sink.hash.hexdigest(),
        "data": name.rpartition("/")[2] if sink.file is not None else None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        **{name: order[name] for name in ("cache", "expires") if order.get(name) is not None},
    }
    return _Header(fields, bytes(sink.kept))


class _Sink(io.RawIOBase):
    """A file that counts and hashes; what is short stays in memory."""

    def __init__(self, place: Any, name: str, limit: int) -> None:
        self.hash = hashlib.blake2b(digest_size=16)
        self.nbytes = 0
        self.kept = bytearray()
        self.file: Any = None
        self._place = place
        self._name = name
        self._limit = limit

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.nbytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):  # hashed and written while it is in the CPU's cache
            self._write(view[start : start + CHUNK])
        return len(view)

    def _write(self, view: memoryview) -> None:
        self.hash.update(view)
        self.nbytes += len(view)
        if self.file is None and self.nbytes <= self._limit:
            self.kept += view
            return
        if self.file is None:
            self.file = self._place.create(self._name)
            kept, self.kept = self.kept, bytearray()
            self.file.write(kept)
        self.file.write(view)

    def finish(self) -> None:
        """Make the file visible under its name."""
        if self.file is not None:
            self._place.keep(self.file, self._name)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self.file is not None:
            with contextlib.suppress(Exception):
                self._place.discard(self.file, self._name)


def _beside(key: str, data: str | None) -> str | None:
    """Return the name in the storage of a file beside the commit file: the two may move together."""
    folder, slash, _ = key.rpartition("/")
    return None if data is None else f"{folder}{slash}{data}"


def _header(place: Any, key: str) -> dict[str, Any]:
    """Read a commit file; the result has ``inline``, the bytes that follow."""
    data = place.read(key + EXTENSION)
    line, newline, inline = data.partition(b"\n")
    head, _, text = line.partition(b" {")
    words = head.split(b" ")
    text = b"{" + text
    whole = newline and len(words) == 3 and words[0] == MAGIC
    if whole and words[2] == _digest(words[1] + text).encode():
        header: dict[str, Any] = json.loads(text)
        if words[1] != VERSION:
            raise formats.CommitError(f"{place.name}/{key}{EXTENSION} was written by a newer penstock")
        header["inline"] = inline
        return header
    raise _damaged(place, key, None, "its first line is damaged")


def _damaged(place: Any, key: str, data: str | None, reason: str) -> Damaged:
    """Set the files aside, so that nobody takes them for a result again."""
    try:
        for name in (key + EXTENSION, data):
            if name is not None:
                place.set_aside(name)
        aside = "; it was set aside as *.corrupt"
    except Exception as error:  # a storage that cannot be written to: every reader finds it again
        aside = f"; it cannot be set aside ({type(error).__name__})"
    return Damaged(f"the stored result {place.name}/{key}{EXTENSION} is damaged: {reason}{aside}")


def _read_value(place: Any, key: str, header: dict[str, Any]) -> Any:
    """Read the value behind a header, after its checksum was found right."""
    data = _beside(key, header["data"])
    if data is None:
        with io.BytesIO(header["inline"]) as file:
            return _checked(place, key, header, file)
    try:
        with place.local(data) as file:
            return _checked(place, key, header, file)
    except FileNotFoundError:
        return _read_value(place, key, _newer(place, key, header))


def _newer(place: Any, key: str, header: dict[str, Any]) -> dict[str, Any]:
    """Return the header that has taken the place of one whose file is gone."""
    present = _header(place, key)
    if present["data"] == header["data"]:
        raise _damaged(place, key, None, f"{_beside(key, header['data'])} is missing") from None
    return present


def _verify(place: Any, key: str, header: dict[str, Any], limit: float) -> None:
    """Compare length and checksum of a stored value without reading it as one."""
    data = _beside(key, header["data"])
    if data is None:
        with io.BytesIO(header["inline"]) as file:
            _compare(place, key, header, file)
        return
    try:
        length = place.length(data)
        if length != header["nbytes"]:
            raise _damaged(place, key, data, f"{length} bytes instead of {header['nbytes']}")
        if length <= limit and isinstance(place, Folder):
            with place.local(data) as file:
                _compare(place, key, header, file)
    except FileNotFoundError:
        _verify(place, key, _newer(place, key, header), limit)


def _compare(place: Any, key: str, header: dict[str, Any], file: Any) -> None:
    """Raise unless a file is as long as its header says, and has its checksum."""
    data = _beside(key, header["data"])
    length = file.seek(0, os.SEEK_END)
    if length != header["nbytes"]:
        raise _damaged(place, key, data, f"{length} bytes instead of {header['nbytes']}")
    file.seek(0)
    found, buffer = hashlib.blake2b(digest_size=16), bytearray(CHUNK)
    while read := file.readinto(buffer):
        found.update(memoryview(buffer)[:read])
    if found.hexdigest() != header["checksum"]:
        raise _damaged(place, key, data, "its checksum is wrong")


def _checked(place: Any, key: str, header: dict[str, Any], file: Any) -> Any:
    _compare(place, key, header, file)
    file.seek(0)
    try:
        return formats.read(header["format"], header["details"], file)
    except formats.CommitError:
        raise
    except Exception as error:  # its bytes are right: a class or a library is another one here
        reason = f"{type(error).__name__}: {error}"
        message = f"the stored result {place.name}/{key}{EXTENSION} cannot be read here: {reason}"
        raise formats.Unserializable(message) from error


# -- places ---------------------------------------------------------------------------------

_buckets: dict[str, Any] = {}
_lock = threading.Lock()


def _place(order: dict[str, Any]) -> Any:
    """Return the place that a storage is."""
    storage, options = order["storage"], order.get("options") or {}
    if "://" not in storage:
        return Folder(storage)
    name = json.dumps([storage, options], sort_keys=True, default=repr)
    with _lock:
        if name not in _buckets:
            _buckets[name] = Bucket(storage, options)
        return _buckets[name]


def _needs(storage: str, error: ImportError) -> str:
    protocol = storage.partition("://")[0]
    cure = "pip install 'penstock[s3]'" if protocol in {"s3", "s3a"} else f"pip install fsspec ({error})"
    return f"the result storage {storage} needs libraries that are not installed here: {cure}"


@functools.cache
def _writer() -> str:
    """Name this process: a file of a process that is gone can be removed by others of the host."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    host = "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())
    return f"{host}+{space}"


def _to_disk(file: Any) -> None:
    """Have the bytes on disk before they get a name: after a power cut no name leads to half a result.

    That the name itself outlives it is not waited for; a result without one is made again.
    """
    file.flush()
    getattr(os, "fdatasync", os.fsync)(file.fileno())


class Folder:
    """A directory, on this host or shared by many.

    Files under way are hidden and carry their writer's name; the kernel's `link` is what commits,
    since it fails where a `rename` would let the last writer win.
    """

    _swept: set[str] = set()  # noqa: RUF012 - directories looked through by this process

    def __init__(self, root: str) -> None:
        self.name = root

    def _path(self, name: str) -> str:
        return os.path.join(self.name, *name.split("/"))

    def _temporary(self, name: str) -> str:
        folder, base = os.path.split(self._path(name))
        return os.path.join(folder, f".{base}.{_writer()}.{os.getpid()}.{os.urandom(4).hex()}.part")

    def create(self, name: str) -> Any:
        """Open a new file, invisible until `keep`."""
        path = self._temporary(name)
        folder = os.path.dirname(path)
        self._sweep(folder)
        try:
            return open(path, "xb")
        except FileNotFoundError:
            os.makedirs(folder, exist_ok=True)
            return open(path, "xb")

    def keep(self, file: Any, name: str) -> None:
        """Give a file its name."""
        _to_disk(file)
        file.close()
        os.rename(file.name, self._path(name))

    def discard(self, file: Any, name: str) -> None:
        """Remove a file that was not finished, or not needed."""
        file.close()
        for path in (file.name, self._path(name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def commit(self, key: str, header: _Header, *, replace: bool) -> bool:
        """Make a commit file appear; False if there is one already."""
        try:
            return self._commit(key, header.packed, replace=replace)
        except BaseException:
            self.drop(_beside(key, header.data))
            raise

    def _commit(self, key: str, data: bytes, *, replace: bool) -> bool:
        path = self._path(key + EXTENSION)
        file = self.create(key + EXTENSION)
        try:
            file.write(data)
            _to_disk(file)
            file.close()
            if replace:
                os.replace(file.name, path)
                return True
            try:
                os.link(file.name, path)
            except FileExistsError:
                return False
            except OSError:
                # A file system without hard links: nearly as good, as attempts rarely overlap.
                if os.path.lexists(path):
                    return False
                os.rename(file.name, path)
            return True
        finally:
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)

    def read(self, name: str) -> bytes:
        """Return a commit file."""
        path = self._path(name)
        self._sweep(os.path.dirname(path))
        try:
            with open(path, "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise Absent(f"there is no {path} on host {socket.gethostname()}") from None

    def length(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return os.stat(self._path(name)).st_size

    def local(self, name: str) -> Any:
        """Open a file for reading."""
        return open(self._path(name), "rb")

    def drop(self, name: str | None) -> None:
        """Remove a file."""
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path(name))

    def set_aside(self, name: str) -> None:
        """Rename a damaged file."""
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, f"{path}.corrupt")

    def tidy(self, key: str, data: str | None) -> None:
        """Remove what earlier attempts left when they died: no other can commit any more."""
        folder, base = os.path.split(self._path(key))
        with contextlib.suppress(OSError):
            self._sweep(folder, again=True)
            for name in os.listdir(folder):
                if name.startswith(f"{base}-") and name != data:
                    os.unlink(os.path.join(folder, name))

    def _sweep(self, folder: str, *, again: bool = False) -> None:
        """Remove the files of writers of this host that were killed; once per directory and process."""
        mark = f"{folder}:{os.getpid()}"
        if mark in self._swept and not again:
            return
        self._swept.add(mark)
        ours = _writer()
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                parts = entry.name.rsplit(".", 4)
                if len(parts) != 5 or parts[4] != "part" or parts[1] != ours or not parts[2].isdigit():
                    continue
                try:
                    os.kill(int(parts[2]), 0)
                except ProcessLookupError:
                    os.unlink(entry.path)
                except OSError:
                    continue


class Bucket:
    """Anything that fsspec reaches: an object appears whole when it is complete.

    A new object is made only where there is none (`If-None-Match` on S3).
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.name = url.rstrip("/")
        self._url = url
        self._options = options
        self._root = ""
        self._fs: Any = None

    @property
    def fs(self) -> Any:
        """The file system, connected when it is first used."""
        if self._fs is None:
            from fsspec.core import url_to_fs

            self._fs, root = url_to_fs(self._url, **self._options)
            self._root = root.rstrip("/")
        return self._fs

    def _path(self, name: str) -> str:
        assert self.fs is not None
        return f"{self._root}/{name}"

    def create(self, name: str) -> Any:
        """Open a new object."""
        path = self._path(name)
        if self.fs.protocol in {"file", "local"}:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return self.fs.open(path, "wb")

    def keep(self, file: Any, name: str) -> None:
        """Complete an object."""
        file.close()

    def discard(self, file: Any, name: str) -> None:
        """Remove an object that was not finished."""
        with contextlib.suppress(Exception):
            file.discard()  # parts that have been sent cost money until they are given up
        file.closed = True
        with contextlib.suppress(Exception):
            self.fs.rm_file(self._path(name))

    def commit(self, key: str, header: _Header, *, replace: bool) -> bool:
        """Make a commit file appear; False if there is one already.

        If this raises, nobody knows whether it did: the data stay, and the next attempt tidies.
        """
        path = self._path(key + EXTENSION)
        if replace:
            self.fs.pipe_file(path, header.packed)
            return True
        try:
            self.fs.pipe_file(path, header.packed, mode="create")
        except FileExistsError:
            return False
        except Exception as error:  # each kind of storage says in its own way that there is one
            if self._holds(path):
                return False
            if not isinstance(error, (TypeError, ValueError, NotImplementedError)):
                raise
            self.fs.pipe_file(path, header.packed)  # it knows no exclusive writing
        return True

    def _holds(self, path: str) -> bool:
        with contextlib.suppress(Exception):
            self.fs.invalidate_cache()
            return bool(self.fs.exists(path))
        return False

    def read(self, name: str) -> bytes:
        """Return a commit file."""
        try:
            data: bytes = self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            raise Absent(f"there is no {self.name}/{name}") from None
        return data

    def length(self, name: str) -> int:
        """Return the size of an object in bytes."""
        self.fs.invalidate_cache()
        return int(self.fs.size(self._path(name)))

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Any]:
        """Bring an object to this host and open it."""
        with tempfile.NamedTemporaryFile(prefix="penstock-") as copy:
            self.fs.get_file(self._path(name), copy.name)
            with open(copy.name, "rb") as file:
                yield file

    def drop(self, name: str | None) -> None:
        """Remove an object."""
        if name is not None:
            with contextlib.suppress(Exception):
                self.fs.rm_file(self._path(name))

    def set_aside(self, name: str) -> None:
        """Rename a damaged object."""
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            self.fs.mv(path, f"{path}.corrupt")

    def tidy(self, key: str, data: str | None) -> None:
        """Remove what earlier attempts left when they died: no other can commit any more."""
        with contextlib.suppress(Exception):
            self.fs.invalidate_cache()
            for path in self.fs.glob(f"{self._path(key)}-*"):
                if data is None or not path.endswith(data):
                    self.fs.rm_file(path)
