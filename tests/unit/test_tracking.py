"""The tracker and its sender, against a store that the test controls."""

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.engine import home as homes
from penstock.engine import sender, tracking
from penstock.engine.events import Event, bus, unpack
from penstock.engine.home import Home, network_type, usable_home
from penstock.engine.sender import StoreUnusable
from penstock.engine.spool import Batch, Spool, SpoolReader
from penstock.engine.tracking import Tracker, start_tracking, stop_tracking
from penstock.settings import refresh

Wait = Callable[..., None]


class MemoryStore:
    """Keeps events in memory, and answers as the test wants."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], str] = {}
        self.bodies: dict[tuple[str, int], dict[str, Any]] = {}
        self.failures: list[Exception] = []
        self.closed = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.takes = True

    def send(self, batch: Batch) -> int:
        assert self.free.wait(20)
        if self.failures:
            raise self.failures.pop(0)
        if self.takes:
            for seq, payload in enumerate(batch.payloads, batch.first):
                self.kept[batch.writer, seq] = unpack(payload).kind
                self.bodies[batch.writer, seq] = unpack(payload).body
        mine = {seq for writer, seq in self.kept if writer == batch.writer}
        return next(number for number in range(len(mine) + 1) if number + 1 not in mine)

    def ask(self, question: Mapping[str, Any]) -> Any:
        return None

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    monkeypatch.setattr(sender, "START_DELAY", 0.0)
    return MemoryStore()


@pytest.fixture
def tracker(tmp_path: Path, store: MemoryStore) -> Iterator[Tracker]:
    made = Tracker(usable_home(tmp_path / "home"), lambda home: store)
    yield made
    store.free.set()
    made.close()


def note(tracker: Tracker, *kinds: str) -> None:
    for kind in kinds:
        tracker.record(Event(kind, "r", "r", 0.0))


def spooled(tracker: Tracker) -> list[Path]:
    return sorted(tracker.home.spool.glob("*.log"))


def test_what_is_recorded_arrives_in_order(tracker: Tracker, store: MemoryStore) -> None:
    note(tracker, *"abc")
    assert tracker.flush(10)
    assert list(store.kept.values()) == list("abc")
    note(tracker, "d")
    assert tracker.close()
    assert list(store.kept.values()) == list("abcd")
    assert store.closed.is_set()
    assert spooled(tracker) == []


def test_nothing_recorded_costs_no_file_and_no_thread(tracker: Tracker) -> None:
    assert tracker.flush(0)
    assert tracker.close()
    assert spooled(tracker) == []


def test_recording_does_not_wait_for_the_store(tracker: Tracker, store: MemoryStore) -> None:
    store.free.clear()
    note(tracker, *["x"] * 1000)
    assert not tracker.flush(0.05)
    assert store.kept == {}
    store.free.set()
    assert tracker.flush(10)
    assert len(store.kept) == 1000


def test_a_store_that_fails_gets_everything_later(
    tracker: Tracker, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.failures = [RuntimeError("away"), OSError("away"), ValueError("away")]
    note(tracker, *"abc")
    assert tracker.flush(10)
    assert list(store.kept.values()) == list("abc")
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once per outage


def test_events_that_another_process_commits_are_waited_for(
    tracker: Tracker, store: MemoryStore, wait_until: Wait
) -> None:
    store.takes = False
    note(tracker, *"abc")
    assert not tracker.flush(0.1)
    (path,) = spooled(tracker)
    store.kept.update({(path.stem, seq): "theirs" for seq in (1, 2, 3)})
    assert tracker.flush(10)


def test_a_store_that_refuses_is_asked_once(
    tracker: Tracker, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.failures = [StoreUnusable("The store is from the future.")]
    note(tracker, *"abc")
    assert not tracker.flush(10)
    note(tracker, "d")
    assert not tracker.close()
    assert "from the future" in caplog.text
    assert len(caplog.records) == 1
    assert len(spooled(tracker)) == 1


def test_a_short_process_never_loads_the_store(
    tmp_path: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "START_DELAY", 60.0)
    opened: list[Home] = []

    def opener(home: Home) -> MemoryStore:
        opened.append(home)
        return store

    tracker = Tracker(usable_home(tmp_path / "home"), opener)
    note(tracker, *"abc")
    assert not tracker.close()
    assert opened == []
    assert len(spooled(tracker)) == 1


def test_a_flush_loads_it(tmp_path: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "START_DELAY", 60.0)
    tracker = Tracker(usable_home(tmp_path / "home"), lambda home: store)
    note(tracker, *"abc")
    assert tracker.flush(10)
    assert tracker.close()


def test_an_event_after_the_end_is_kept_for_the_next_process(tracker: Tracker, store: MemoryStore) -> None:
    note(tracker, "a")
    assert tracker.flush(10)
    assert tracker.close()
    store.free.clear()
    note(tracker, "late")
    assert len(spooled(tracker)) == 1


def test_a_long_spool_is_followed_by_a_new_one(
    tracker: Tracker, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    monkeypatch.setattr(tracking, "ROTATE", 200)
    note(tracker, *["x"] * 20)
    (first,) = spooled(tracker)
    assert tracker.flush(10)
    note(tracker, "y")  # wakes the sender once more
    wait_until(lambda: not first.exists())
    note(tracker, *"yz")
    assert tracker.flush(10)
    assert len(store.kept) == 23
    assert len({writer for writer, _ in store.kept}) >= 2


def test_what_cannot_be_packed_is_recorded_as_text(tracker: Tracker) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

    loop: list[Any] = []
    loop.append(loop)
    body = {"a": "\ud800", "b": 1 << 80, "c": Odd(), "d": {Odd: {1, 2}}, "e": loop, "f": 1.5}
    tracker.record(Event("state", "r", "r", 0.0, body))
    (path,) = spooled(tracker)
    reader = SpoolReader(path)
    (payload,) = reader.read().payloads
    reader.close()
    found = unpack(payload).body
    assert (found["a"], found["c"], found["f"]) == ("\\ud800", "<Odd>", 1.5)


# -- disks ----------------------------------------------------------------------------------


def fill(monkeypatch: pytest.MonkeyPatch, full: dict[str, bool]) -> None:
    append = Spool.append

    def maybe(self: Spool, payload: bytes) -> int:
        if full["disk"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(self, payload)

    monkeypatch.setattr(Spool, "append", maybe)
    monkeypatch.setattr(tracking, "DISK_RETRY", 0.0)


def test_a_full_disk_is_bridged_in_memory_and_in_order(
    tracker: Tracker, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = {"disk": False}
    fill(monkeypatch, full)
    note(tracker, "a")
    full["disk"] = True
    note(tracker, *"bcd")
    assert not tracker.flush(10)
    full["disk"] = False
    note(tracker, "e")
    assert tracker.flush(10)
    assert list(store.kept.values()) == list("abcde")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def said(count: int) -> Event:
    return Event("log", "r", "root", 0.0, {"lines": [[0.0, "INFO", "x"]] * count, "dropped": 0})


def test_logs_are_given_up_first_and_counted_in_the_record(
    tracker: Tracker, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = {"disk": True}
    fill(monkeypatch, full)
    monkeypatch.setattr(tracking, "RING", 4)
    for event in ("s1", "log", "s2", "s3", "log", "s4", "log"):
        tracker.record(said(5)) if event == "log" else note(tracker, event)
    full["disk"] = False
    assert tracker.flush(10)
    assert list(store.kept.values()) == ["s1", "s2", "s3", "s4", "log"]
    (told,) = [body for body in store.bodies.values() if body]
    assert told == {"lines": [], "dropped": 15}
    assert (tracker.dropped_logs, tracker.lost) == (3, 0)
    caplog.clear()
    tracker.close()
    assert "log lines of 3 events" in caplog.text


def test_a_run_pauses_before_a_transition_is_dropped(
    tracker: Tracker,
    store: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Wait,
) -> None:
    full = {"disk": True}
    fill(monkeypatch, full)
    monkeypatch.setattr(tracking, "RING", 4)
    run = threading.Thread(target=note, args=(tracker, *"abcdefgh"))
    run.start()
    wait_until(lambda: "pause until there is room" in caplog.text)
    assert run.is_alive()
    full["disk"] = False
    run.join(10)
    assert tracker.flush(10)
    assert list(store.kept.values()) == list("abcdefgh")
    assert tracker.lost == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_the_end_of_the_process_waits_for_no_disk(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wait_until: Wait
) -> None:
    fill(monkeypatch, {"disk": True})
    monkeypatch.setattr(tracking, "RING", 4)
    run = threading.Thread(target=note, args=(tracker, *"abcde"))
    run.start()
    wait_until(lambda: "pause until there is room" in caplog.text)
    assert not tracker.close()
    run.join(10)
    assert not run.is_alive()
    tracker.close()  # the fifth may have taken the place of the first before the end, or begun anew after it
    assert sum(map(int, re.findall(r"(\d+) events were lost", caplog.text))) == 5


def test_a_store_that_is_away_for_long_costs_logs(
    tracker: Tracker, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LOG_BACKLOG", 100)
    store.free.clear()
    note(tracker, *["state"] * 10)
    tracker.record(said(3))
    note(tracker, "state")
    store.free.set()
    assert tracker.flush(10)
    tracker.record(said(1))  # what is sent already does not count
    assert tracker.flush(10)
    assert list(store.kept.values()) == ["state"] * 11 + ["log"] * 2
    assert [body["dropped"] for body in store.bodies.values() if body] == [3, 0]
    assert tracker.dropped_logs == 1


def test_power_mode_syncs_in_the_background(
    tmp_path: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    synced = threading.Event()
    monkeypatch.setattr(Spool, "sync", lambda self: synced.set())
    tracker = Tracker(usable_home(tmp_path / "home"), lambda home: store, durable=True)
    note(tracker, "a")
    assert synced.wait(10)
    tracker.close()
    wait_until(lambda: all(thread.name != "penstock-sync" for thread in threading.enumerate()))


# -- where ----------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(homes, "LOCAL", tmp_path / "var")
    (tmp_path / "var").mkdir()
    return tmp_path / "var"


def test_a_home_that_cannot_be_made_has_a_stand_in(tmp_path: Path, local: Path) -> None:
    (tmp_path / "file").write_text("")
    first = usable_home(tmp_path / "file" / "home")
    assert local in first.path.parents
    assert first.spool.is_dir()
    assert "PENSTOCK_HOME" in first.warning
    assert usable_home(tmp_path / "file" / "home").path == first.path  # the next command finds it
    assert usable_home(tmp_path / "file" / "other").path != first.path
    assert first.path.parent.stat().st_mode & 0o077 == 0


def test_a_stand_in_that_others_can_write_to_is_not_used(tmp_path: Path, local: Path) -> None:
    (tmp_path / "file").write_text("")
    trap = local / f"penstock-{os.getuid()}"
    trap.mkdir()
    trap.chmod(0o777)
    assert trap not in usable_home(tmp_path / "file" / "home").path.parents


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:50 / /home rw shared:1 - nfs4 server:/home rw
24 23 0:51 / /home/scratch\\040disk rw - xfs /dev/vdb rw
25 22 0:52 / /lustre rw - lustre mds:/fs rw
"""


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/home/ada/.penstock", "nfs4"),
        ("/home", "nfs4"),
        ("/homework", ""),
        ("/home/scratch disk/x", ""),
        ("/lustre/x", "lustre"),
        ("/data", ""),
    ],
)
def test_network_file_systems_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, found: str
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(homes, "MOUNTS", tmp_path / "mounts")
    assert network_type(Path(path)) == found


def test_a_home_on_a_network_has_a_stand_in(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homes, "network_type", lambda path: "nfs4")
    home = usable_home(tmp_path / "home")
    assert local in home.path.parents
    assert "nfs4" in home.warning
    assert not (tmp_path / "home").exists()


# -- the tracker of the process -------------------------------------------------------------


def test_tracking_starts_once(store: MemoryStore) -> None:
    tracker = start_tracking()
    assert start_tracking() is tracker
    bus.publish(Event("x", "r", "r", 0.0))
    assert len(spooled(tracker)) == 1
    stop_tracking()
    assert start_tracking() is not tracker


def test_tracking_can_be_off(monkeypatch: pytest.MonkeyPatch, clean_environment: Path) -> None:
    monkeypatch.setenv("PENSTOCK_TRACKING", "off")
    monkeypatch.setenv("PENSTOCK_HOME", str(clean_environment / "never"))
    refresh()
    tracker = start_tracking()
    bus.publish(Event("x", "r", "r", 0.0))
    assert tracker.flush(0)
    assert not (clean_environment / "never").exists()


def test_one_warning_tells_of_another_place(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "file" / "home"))
    refresh()
    with caplog.at_level(logging.WARNING):
        start_tracking()
        start_tracking()
    assert len(caplog.records) == 1
    assert "PENSTOCK_HOME" in caplog.text
