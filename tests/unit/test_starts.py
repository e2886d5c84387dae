"""What has begun in a worker, written where it survives a SIGKILL."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.runners.worker import starts as tables
from penstock.runners.worker.starts import (
    START_PLACES,
    LastStarts,
    Starts,
    find_start,
    read_starts,
    start_of,
    sweep_starts,
)

KEY = ("load-0123abcd", 7)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    for label in [label for label in tables._starts if label.startswith("test")]:
        del tables._starts[label]


def test_what_runs_and_what_has_ended() -> None:
    starts = Starts("one")
    first, second = starts.begin(KEY), starts.begin(("load-0123abcd", 8))
    second.element(41)
    assert start_of(KEY) is first
    assert read_starts(os.getpid(), "one", remove=False) == {
        "0123abcd:7": (0, False, False),
        "0123abcd:8": (41, False, False),
    }
    first.called()
    second.called(41)
    second.end()
    second.end()
    second.element(99)
    second.called(99)
    assert read_starts(os.getpid(), "one", remove=False) == {
        "0123abcd:7": (0, True, False),
        "0123abcd:8": (41, True, True),
    }
    assert find_start(("other-0123abcd", 8)) == (os.getpid(), 41, True, True)
    assert find_start(("load-0123abcd", 9)) is None
    first.end()


def test_all_are_noted_that_begin_while_the_table_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of a fresh worker begin at the same moment."""
    starts, making, made = Starts("race"), threading.Event(), threading.Event()
    mapped = starts._mapped

    def slowly() -> Any:
        making.set()
        made.wait(0.5)  # until another thread has come through, which it must not
        return mapped()

    def begin_second() -> None:
        making.wait(10)
        starts.begin(("second-0123abcd", 2))
        made.set()

    monkeypatch.setattr(starts, "_mapped", slowly)
    other = threading.Thread(target=begin_second)
    other.start()
    starts.begin(("first-0123abcd", 1))
    other.join(10)
    found = read_starts(os.getpid(), "race") or {}
    assert set(found) == {"0123abcd:1", "0123abcd:2"}


def test_a_table_without_attempts_says_that_nothing_began() -> None:
    assert read_starts(os.getpid(), "none") is None
    Starts("none").open()
    assert read_starts(os.getpid(), "none") == {}
    assert read_starts(os.getpid(), "none") is None, "the file of a dead process is read once"


def test_the_oldest_that_has_ended_makes_room() -> None:
    starts = Starts("room")
    stays = starts.begin(("stays-0123abcd", 0))
    for number in range(1, START_PLACES + 10):
        starts.begin(("ends-0123abcd", number)).end()
    found = read_starts(os.getpid(), "room") or {}
    assert found["0123abcd:0"] == (0, False, False)
    assert len(found) == START_PLACES
    assert f"0123abcd:{START_PLACES + 9}" in found
    assert "0123abcd:5" not in found
    stays.end()


def test_without_room_or_disk_tasks_run_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = Starts("full")
    open_ones = [full.begin(("many-0123abcd", number)) for number in range(START_PLACES + 3)]
    open_ones[-1].element(5)
    for one in open_ones:
        one.end()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(tables, "_starts_folder", lambda: str(tmp_path / "file"))
    start = Starts("nowhere").begin(KEY)
    start.element(1)
    start.end()
    assert read_starts(os.getpid(), "nowhere") is None


def test_the_note_survives_a_kill_and_is_swept_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from penstock.runners.worker.starts import starts\n"
        "import os, signal\n"
        f"starts('dead').begin({KEY!r}).element(3)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert process.wait(30) == -signal.SIGKILL
    assert find_start(KEY) == (process.pid, 3, False, False)
    sweep_starts()
    assert read_starts(process.pid, "dead", remove=False) == {"0123abcd:7": (3, False, False)}, (
        "swept too early"
    )
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    sweep_starts()
    assert read_starts(process.pid, "dead") is None


def test_a_fork_writes_a_file_of_its_own() -> None:
    starts = Starts("fork")
    mine = starts.begin(KEY)
    child = os.fork()
    if child == 0:
        starts.begin(("child-0123abcd", 1))
        os._exit(0)
    os.waitpid(child, 0)
    assert read_starts(os.getpid(), "fork", remove=False) == {"0123abcd:7": (0, False, False)}
    assert read_starts(child, "fork") == {"0123abcd:1": (0, False, False)}
    mine.end()


def test_an_element_costs_less_than_a_microsecond() -> None:
    start = Starts("fast").begin(KEY)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for index in range(10_000):
            start.element(index)
            start.called(index)
        best = min(best, (time.perf_counter() - begun) / 10_000)
    start.end()
    assert best < 1e-6


def test_the_table_of_a_process_that_ends_can_be_read_to_its_end() -> None:
    code = (
        "import sys; from penstock.runners.worker import starts\n"
        "starts.starts('leaving').open(); one = starts.starts('leaving').begin(('works-0123abcd', 7)); one.element(1)\n"
        "print('ready', flush=True); sys.stdin.readline(); one.element(4)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    last = LastStarts(process.pid, "leaving")
    assert last.read() == {"0123abcd:7": (1, False, False)}
    assert last.is_growing()
    process.communicate("\n", timeout=20)
    assert not last.is_growing()
    assert last.read() == {"0123abcd:7": (4, False, False)}, "although the process has removed the file"
    last.close()
    assert LastStarts(process.pid, "leaving").read() is None
