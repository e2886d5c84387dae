"""The spool: frames, locks, torn ends, full disks."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.engine.spool import (
    HEADER,
    MAGIC,
    Spool,
    SpoolReader,
    mend,
    read_ack,
    remove,
    take_orphan,
    write_ack,
)


def contents(path: Path) -> list[bytes]:
    reader = SpoolReader(path)
    try:
        return reader.read().payloads
    finally:
        reader.close()


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert [spool.append(b"event %d" % number) for number in (1, 2, 3)] == [1, 2, 3]
    reader = SpoolReader(spool.path)
    batch = reader.read(limit=2)
    assert (batch.writer, batch.first, batch.last) == (spool.writer, 1, 2)
    spool.append(b"event 4")
    batch = reader.read()
    assert (batch.first, batch.payloads) == (3, [b"event 3", b"event 4"])
    assert reader.read().payloads == []
    assert spool.size == spool.path.stat().st_size == reader.offset
    reader.close()
    spool.close()


def test_an_event_larger_than_a_batch_travels_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for payload in (b"small", b"x" * 5000, b"small"):
        spool.append(payload)
    reader = SpoolReader(spool.path)
    assert [len(reader.read(size=1000).payloads[0]) for _ in range(3)] == [5, 5000, 5]
    reader.close()
    spool.close()


def test_a_reader_goes_where_it_is_told(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in range(1, 101):
        spool.append(b"%d" % number)
    reader = SpoolReader(spool.path)
    for number in (50, 10, 99, 0, 100, 60):
        reader.seek(number)
        reader.read(limit=1)
        reader.seek(number)
        assert reader.read(limit=1).payloads == ([b"%d" % (number + 1)] if number < 100 else [])
    reader.seek(1000)
    assert reader.read_to == 100
    reader.close()
    spool.close()


def test_threads_append_without_gaps(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    numbers: list[list[int]] = [[] for _ in range(4)]

    def work(mine: list[int]) -> None:
        mine.extend(spool.append(b"x" * 50) for _ in range(500))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for mine in numbers for number in mine) == list(range(1, 2001))
    assert len(contents(spool.path)) == 2000
    spool.close()


def test_only_the_owner_may_look(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert stat.S_IMODE(spool.path.stat().st_mode) == 0o600
    assert len(spool.writer) == 32
    assert Spool(tmp_path).writer != spool.writer
    assert not list(tmp_path.glob("*.new"))
    spool.close()


# -- the end of a file ----------------------------------------------------------------------


def dead(directory: Path, *payloads: bytes) -> Path:
    """Leave a spool behind as a killed process does."""
    spool = Spool(directory)
    for payload in payloads:
        spool.append(payload)
    spool._lock.release()
    return spool.path


def test_a_torn_end_is_cut_at_every_offset(tmp_path: Path) -> None:
    whole = dead(tmp_path, b"first", b"second", b"third").read_bytes()
    ends = [len(MAGIC)]
    for length in (5, 6, 5):
        ends.append(ends[-1] + HEADER.size + length)
    for length in range(len(MAGIC), len(whole)):
        path = tmp_path / f"{length:032x}.log"
        path.write_bytes(whole[:length])
        kept = sum(end <= length for end in ends[1:])
        reader = SpoolReader(path)
        assert len(reader.read().payloads) == kept
        assert mend(path, reader) == length - ends[kept]
        assert path.stat().st_size == ends[kept]
        assert not path.with_suffix(".rejected").exists()
        reader.close()


def test_zeros_after_a_power_failure_are_no_events(tmp_path: Path) -> None:
    path = dead(tmp_path, b"first")
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes(4096))
    reader = SpoolReader(path)
    assert reader.read().payloads == [b"first"]
    assert reader.read().payloads == []
    assert mend(path, reader) == 4096
    assert path.stat().st_size == size
    reader.close()


def test_damage_is_never_read_and_kept_aside(tmp_path: Path) -> None:
    path = dead(tmp_path, b"first", b"second", b"third")
    whole = path.read_bytes()
    for place in range(len(MAGIC) + HEADER.size + 5, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = contents(path)
        assert found == [b"first", b"second", b"third"][: len(found)]
        assert len(found) < 3
    path.write_bytes(whole.replace(b"second", b"sec0nd"))
    reader = SpoolReader(path)
    reader.read()
    assert not reader.read().payloads
    assert reader.damaged
    mend(path, reader)
    assert b"sec0nd" in path.with_suffix(".rejected").read_bytes()
    reader.close()


def test_a_frame_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    path = dead(tmp_path, b"first", b"other", b"third")
    data = path.read_bytes()
    frame = HEADER.size + 5
    start = len(MAGIC)
    path.write_bytes(data[:start] + data[start + frame :])  # a block is missing in the middle
    assert contents(path) == []


def test_a_file_of_another_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ("0" * 32 + ".log")
    path.write_bytes(b"penspool\x02 something of a newer penstock")
    reader = SpoolReader(path)
    assert reader.foreign
    assert reader.read().payloads == []
    reader.close()


def test_a_short_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    spool.append(b"first")
    write = os.write
    for failure in ("short", "error", "error after a part"):

        def full(handle: int, data: bytes, failure: str = failure) -> int:
            if failure != "error":
                write(handle, data[:7])
            if failure != "short":
                raise OSError(errno.ENOSPC, "No space left on device")
            return 7

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            spool.append(b"lost")
        monkeypatch.setattr(os, "write", write)
        spool.append(failure.encode())
    assert contents(spool.path) == [b"first", b"short", b"error", b"error after a part"]
    assert spool.last == 4
    spool.close()


def test_a_disk_that_cannot_even_take_back_is_mended_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    write, truncate = os.write, os.ftruncate

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def half(handle: int, data: bytes) -> int:
        return write(handle, data[:7])

    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "ftruncate", broken)
    with pytest.raises(OSError, match="Input/output"):
        spool.append(b"first")
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="Input/output"):
        spool.append(b"second")
    monkeypatch.setattr(os, "ftruncate", truncate)
    assert spool.append(b"third") == 1
    assert contents(spool.path) == [b"third"]
    spool.close()


# -- who lives ------------------------------------------------------------------------------


def test_a_lock_that_can_be_taken_is_proof_of_death(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(b"x")
    assert take_orphan(spool.path) is None
    spool._lock.release()
    orphan = take_orphan(spool.path)
    assert orphan is not None
    assert take_orphan(spool.path) is None
    remove(spool.path)
    orphan.release()
    assert take_orphan(spool.path) is None


FORK = """
import os, sys
from pathlib import Path
from penstock.engine.spool import Spool
spool = Spool(Path(sys.argv[1]))
spool.append(b"x")
gone, go = os.pipe()
if os.fork() == 0:
    print(spool.path, flush=True)
    sys.stdin.read()  # lives on after its parent
    os._exit(0)
os._exit(0)
"""


def test_a_forked_child_does_not_keep_its_parent_alive(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", FORK, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        path = Path(child.stdout.readline().strip())
        child.wait()
        orphan = take_orphan(path)
        assert orphan is not None
        orphan.release()


# -- acknowledgement ------------------------------------------------------------------------


def test_a_spool_goes_once_everything_is_committed(tmp_path: Path) -> None:
    for acknowledged, remains in ((0, True), (1, True), (2, False)):
        spool = Spool(tmp_path)
        spool.append(b"first")
        spool.append(b"second")
        spool.close(acknowledged)
        assert spool.path.exists() is remains
        assert read_ack(spool.path) == (acknowledged if remains else 0)
    empty = Spool(tmp_path)
    empty.close()
    empty.close()
    assert not empty.path.exists()


def test_the_ack_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    assert read_ack(path) == 0
    for number in (5, 70):
        write_ack(path, number)
        assert read_ack(path) == number
    path.with_suffix(".ack").write_text("not a number")
    assert read_ack(path) == 0
    assert [one.name for one in tmp_path.iterdir()] == ["w.ack"]


def test_power_failures_cost_at_most_what_was_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    spool = Spool(tmp_path)
    spool.append(b"x")
    spool.sync()
    spool.sync()
    assert len(synced) == 1
    spool.append(b"y")
    spool.sync()
    assert len(synced) == 2
    spool.close()
