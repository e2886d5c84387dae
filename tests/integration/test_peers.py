"""What failed elsewhere, small enough for a test of its own; `tests/peers.toml` says which failure is tested where."""

import asyncio
import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from penstock import flow, task
from penstock.api import embedded, queries, writer
from penstock.api.db import Database
from penstock.api.writer import Unavailable, Writer
from penstock.engine.tracking import stop_tracking
from tests.story import batch, count_events, story

FAST = """
from penstock import flow, get_run_logger

@flow
def fast():
    logger = get_run_logger()
    for number in range(1000):
        logger.info("line %d", number)

fast()
"""


def test_every_line_of_a_flow_of_milliseconds_is_kept(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "fast.py"
    script.write_text(FAST)
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True, timeout=60)
    with embedded.reading(home) as connection:
        [run] = queries.list_runs(connection)
        told = queries.get_logs(connection, run["id"])
    assert told["dropped"] == 0
    lines = [line["text"] for line in told["lines"]]
    assert [line for line in lines if line.startswith("line ")] == [
        f"line {number}" for number in range(1000)
    ]


def test_two_hundred_flows_in_one_process_leave_no_loop_behind(home: Path) -> None:
    @task
    def add(x: int) -> int:
        return x + 1

    @task
    async def add_later(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    @flow
    def plain(x: int) -> int:
        return add.submit(x).result() + add(x)

    @flow
    async def later(x: int) -> int:
        return await add_later.submit(x) + await add_later(x)

    async def notebook() -> list[int]:
        return [await later(x) if x % 2 else plain(x) for x in range(50)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        warnings.simplefilter("ignore", UserWarning)  # that a sync flow holds up the loop is told once
        for x in range(100):
            found: Any = plain(x) if x % 2 else asyncio.run(later(x))
            assert found == 2 * x + 2
        for _ in range(2):
            assert asyncio.run(notebook()) == [2 * x + 2 for x in range(50)]
        gc.collect()
    assert [str(one.message) for one in caught if "loop" in str(one.message)] == []
    stop_tracking(30)
    with embedded.reading(home) as connection:
        states = [run["state"]["type"] for run in queries.list_runs(connection, limit=1000)]
    assert states == ["COMPLETED"] * 200


def test_a_writer_that_failed_once_writes_on(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[Exception] = [RuntimeError("a value that nobody thought of"), MemoryError(), KeyError("x")]
    turns: list[int] = []

    def failing(*arguments: Any) -> dict[str, int]:
        if failures:
            raise failures.pop()
        return ingest(*arguments)

    def turn() -> None:
        turns.append(1)
        raise RuntimeError("a chore that fails")

    ingest = writer.ingest  # type: ignore[attr-defined]
    monkeypatch.setattr(writer, "ingest", failing)
    monkeypatch.setattr(writer, "TURN", 0.0)
    found = Writer(sqlite_database, turn)
    found.start()
    try:
        whole = batch(story().events)
        while failures:
            with pytest.raises(Unavailable):
                found.commit(whole).result(20)
        with pytest.raises(ZeroDivisionError):
            found.call(lambda database: 1 // 0).result(20)
        assert found.commit(whole).result(20) == whole.last
        assert found.alive
    finally:
        found.close()
    assert count_events(sqlite_database) == whole.last
    assert len(turns) > 3


def test_a_store_that_is_away_for_long_costs_the_driver_no_memory(home: Path) -> None:
    """An outage leaves events on the disk, not in a queue: measured in a process of its own."""
    code = """
import os, resource, sys, time
from penstock.engine.events import Event, bus, new_id
from penstock.engine.tracking import start_tracking, stop_tracking
start_tracking()
root = new_id()
def some(count):
    for number in range(count):
        bus.publish(Event("state", root, root, time.time(), {"of": "task", "type": "RUNNING", "name": "Running"}, 1, 1, 0, number))
some(1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
some(100_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
begin = time.monotonic()
stop_tracking(1)
print(time.monotonic() - begin)
"""
    environment = {**os.environ, "PENSTOCK_API_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=100
    )
    grown, seconds = done.stdout.split()
    assert int(grown) < 20_000  # kilobytes, for 15 MB of events
    assert float(seconds) < 5
    spooled = sum(path.stat().st_size for path in (home / "spool").glob("*.log"))
    assert spooled > 100_000 * 100
