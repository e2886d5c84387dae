"""What is told of the spools of a machine."""

import os
from pathlib import Path

from penstock.engine.backlog import survey
from penstock.engine.events import Event, pack
from penstock.engine.spool import Spool, write_ack


def made(directory: Path, count: int) -> Spool:
    spool = Spool(directory)
    for number in range(count):
        spool.append(pack(Event("state", "r", "r", 100.0 + number)))
    return spool


def test_each_spool_is_told_apart(tmp_path: Path) -> None:
    alive, dead = made(tmp_path, 3), made(tmp_path, 5)
    write_ack(dead.path, 2)
    dead._lock.release()
    with dead.path.open("ab") as torn:
        torn.write(b"\x10\x00")
    dead.path.with_suffix(".rejected").write_bytes(b"x" * 7)
    (tmp_path / "gone.rejected").write_bytes(b"x")
    found = {one.writer: one for one in survey(tmp_path)}
    assert len(found) == 3
    mine, theirs = found[alive.writer], found[dead.writer]
    assert (mine.alive, mine.pid, mine.events, mine.unsent, mine.oldest) == (True, os.getpid(), 3, 3, 100.0)
    assert (theirs.alive, theirs.pid, theirs.events, theirs.unsent) == (False, None, 5, 3)
    assert (theirs.oldest, theirs.rejected, theirs.size) == (102.0, 7, dead.size + 2)
    assert (found["gone"].events, found["gone"].rejected) == (0, 1)
    assert survey(tmp_path / "absent") == []
    alive.close(3)
