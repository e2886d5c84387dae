"""The note that a server leaves in its home, so that commands and drivers beside it find it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from penstock.engine.spool import FileLock

__all__ = ["is_alive", "read_note", "remove_note", "running", "take_lock", "write_note"]

POLL = 0.01


def _note(home: Path) -> Path:
    return home / "server.json"


def write_note(home: Path, url: str) -> None:
    """Tell this account where the server is."""
    fresh = home / f".server.json.{os.getpid()}"
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"pid": os.getpid(), "url": url, "started": time.time()}, file)
    fresh.replace(_note(home))


def remove_note(home: Path) -> None:
    """Take the note away, if it is ours."""
    note = read_note(home)
    if note is not None and note["pid"] == os.getpid():
        _note(home).unlink(missing_ok=True)


def read_note(home: Path) -> dict[str, Any] | None:
    """Return ``{pid, url, started}`` of the server that last held a home; None if there is none."""
    try:
        found = json.loads(_note(home).read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "url": str(found["url"]), "started": float(found["started"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def running(home: Path, lock: Path) -> dict[str, Any] | None:
    """Return the note of the server that holds the lock of a home now; None if no server does."""
    note = read_note(home)
    if note is None or not is_alive(note["pid"]):
        return None
    try:
        taken = take_lock(lock, 0.0)
    except OSError:
        return None
    if taken is not None:  # nobody holds the home: the number is somebody else's by now
        taken.release()
        return None
    return note


def take_lock(path: Path, patience: float) -> FileLock | None:
    """Take the lock of a store; None if another process held it all the time."""
    deadline = time.monotonic() + patience
    while (lock := FileLock.take(path, os.O_RDWR | os.O_CREAT)) is None:
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL)
    return lock
