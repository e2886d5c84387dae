"""``python -m benchmarks.tracking``: what the record costs a driver, and what an absent server does.

Cost: the CPU time of a process that publishes the events of task runs, by the event, with everything
that tracking does in that process: packing, the spool, and the thread that sends to a real server; the
same without tracking is taken off. Absence: pairs of runs of one flow, with its server and with the
server down, in turns; the ratio of their times and its 95 % confidence bounds (Student, on logarithms).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.ingest_http import Server
from benchmarks.machine import load, machine, versions

NAME = "tracking"
DEAD = "http://127.0.0.1:9"  # nobody listens at the port for discarding

COST = """
import sys, time
from benchmarks.ingest_http import events
from penstock.engine.events import bus
from penstock.engine.tracking import start_tracking, stop_tracking
made = list(events(int(sys.argv[1])))
tracker = start_tracking()
bus.publish(made[0]); tracker.flush(30)
publish = bus.publish
before, begun = time.process_time(), time.perf_counter()
for event in made[1:]:
    publish(event)
published = time.perf_counter() - begun
tracker.flush(300)
print((time.process_time() - before) / (len(made) - 1) * 1e6, published / (len(made) - 1) * 1e6)
"""

FLOW = """
import sys, time
from penstock import flow, task
@task
def step(x):
    end = time.perf_counter() + 0.0005
    while time.perf_counter() < end:
        pass
    return x
@flow
def work(count):
    steps = [step.submit(x) for x in range(count)]
    return sum(one.result() for one in steps) + sum(step.map(range(count)).result())
work(10)
begun = time.perf_counter()
work(int(sys.argv[1]))
print(time.perf_counter() - begun)
"""

T95 = {9: 2.262, 11: 2.201, 14: 2.145, 19: 2.093, 24: 2.064, 29: 2.045}
"""Two-sided 95 % points of Student's distribution by degrees of freedom."""


def run(code: str, *arguments: object, **environment: str) -> list[float]:
    """Run code in a process of its own; return the numbers that it prints."""
    with tempfile.TemporaryDirectory() as home:
        variables = {**os.environ, "PENSTOCK_HOME": home, **environment}
        command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]


def cost(count: int, repeats: int) -> dict[str, Any]:
    """Return microseconds of CPU by the event in a driver that sends to a server."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory))
        there = {"PENSTOCK_API_URL": server.url, "PENSTOCK_API_TOKEN": server.token}
        try:
            for _ in range(repeats):
                tracked, published = run(COST, count, **there)
                [bare, _] = run(COST, count, PENSTOCK_TRACKING="off")
                found.append({"cpu": tracked - bare, "publish": published, "bare": bare})
        finally:
            server.stop()
    return {"events": count, "samples": found, "microseconds": statistics.median(one["cpu"] for one in found)}


def absence(tasks: int, pairs: int) -> dict[str, Any]:
    """Return the ratio of times without and with the server, from pairs in alternating order."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory))
        there = {"PENSTOCK_API_URL": server.url, "PENSTOCK_API_TOKEN": server.token}
        away = {"PENSTOCK_API_URL": DEAD}
        try:
            for number in range(pairs):
                first, second = (there, away) if number % 2 else (away, there)
                times = [run(FLOW, tasks, **one)[0] for one in (first, second)]
                present, absent = times if number % 2 else reversed(times)
                found.append({"present": present, "absent": absent})
        finally:
            server.stop()
    logarithms = [math.log(one["absent"] / one["present"]) for one in found]
    middle = statistics.mean(logarithms)
    half = T95[pairs - 1] * statistics.stdev(logarithms) / math.sqrt(pairs)
    bounds = [math.exp(middle - half), math.exp(middle + half)]
    return {"tasks": 2 * tasks, "pairs": found, "ratio": math.exp(middle), "confidence_95": bounds}


def main() -> None:
    """Measure, print, and write a file."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.tracking", description=__doc__)
    options.add_argument("--n", type=int, default=100_000, help="events")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--tasks", type=int, default=1000)
    options.add_argument("--pairs", type=int, default=12, choices=sorted(one + 1 for one in T95))
    options.add_argument("--output", type=Path, default=report.RESULTS / "record")
    given = options.parse_args()
    price = cost(given.n, given.repeats)
    print(f"{price['microseconds']:.1f} µs of CPU by the event in the driver", flush=True)
    ratio = absence(given.tasks, given.pairs)
    low, high = ratio["confidence_95"]
    print(f"without its server a run takes {ratio['ratio']:.3f} of the time ({low:.3f} … {high:.3f})")
    result = {
        "case": NAME,
        "command": " ".join(["python -m benchmarks.tracking", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "load": load(),
        "driver_cost": price,
        "server_absent": ratio,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"{time.strftime('%Y-%m-%d')}-{NAME}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
