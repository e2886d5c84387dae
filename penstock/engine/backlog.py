"""What waits in the spools of this machine: whose it is, how much, since when."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from penstock.engine import destination as destinations
from penstock.engine.events import unpack
from penstock.engine.spool import SpoolReader, holder, read_ack, spools, take_orphan


@dataclass(frozen=True, slots=True)
class Backlog:
    """One spool.

    Attributes
    ----------
    writer : str
        Whose it is.
    alive : bool
        Whether the process that writes it lives.
    pid : int or None
        Its process id, if it lives and the kernel tells.
    events, unsent : int
        In the file; of these not known to be committed. A store may have committed more than the
        note beside the spool says, which is written once a second.
    size : int
        Bytes of the file.
    oldest : float or None
        When the oldest unsent event was made, in seconds since 1970.
    rejected : int
        Bytes that were set aside because they could not be read.
    destination : str
        Where its events are to go, see `penstock.engine.destination`.
    """

    writer: str
    alive: bool
    pid: int | None
    events: int
    unsent: int
    size: int
    oldest: float | None
    rejected: int
    destination: str = destinations.LOCAL

    def as_dict(self) -> dict[str, object]:
        """Return it as it is written as JSON."""
        return dataclasses.asdict(self)


def survey(directory: Path) -> list[Backlog]:
    """Return what is in the spools of a directory, without changing any; unfinished frames do not count."""
    paths = {path.stem: path for path in spools(directory)}
    with contextlib.suppress(OSError):
        paths |= {path.stem: path.with_suffix(".log") for path in directory.glob("*.rejected")}
    return [one for name in sorted(paths) if (one := _look(paths[name])) is not None]


def _look(path: Path) -> Backlog | None:
    rejected = 0
    with contextlib.suppress(OSError):
        rejected = path.with_suffix(".rejected").stat().st_size
    try:
        reader = SpoolReader(path)
    except OSError:  # finished, or only what was set aside is left
        return Backlog(path.stem, False, None, 0, 0, 0, None, rejected) if rejected else None
    with contextlib.closing(reader):
        acknowledged, oldest = read_ack(path), None
        while (batch := reader.read()).payloads:
            if oldest is None and batch.last > acknowledged:
                oldest = _time_of(batch.payloads[max(0, acknowledged + 1 - batch.first)])
        orphan = take_orphan(path)
        if orphan is not None:
            orphan.release()
        alive = orphan is None and path.exists()
        with contextlib.suppress(OSError):
            return Backlog(
                path.stem,
                alive,
                holder(path) if alive else None,
                reader.read_to,
                max(0, reader.read_to - acknowledged),
                path.stat().st_size,
                oldest,
                rejected,
                destinations.read(path),
            )
    return None


def _time_of(payload: bytes) -> float | None:
    try:
        return float(unpack(payload).time)
    except Exception:
        return None
