"""Ctrl-C at any moment: the right state in the record, and nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from penstock.api import queries
from penstock.api.embedded import reading

SCRIPT = """
import sys, time
from penstock import flow, task, unmapped

@task
def load(index):
    return bytes(2_000_000)

@task
def work(data, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)
    return len(data)

@flow
def long_flow():
    print("started", flush=True)
    parts = load.map(range(8))
    first = work.map(parts, unmapped(0.05))
    first.wait()
    work.map(parts, unmapped(30)).result()

long_flow.with_options(task_runner=sys.argv[1])()
"""
MOMENTS = 10
RUNNERS = ["sequential", "threads", "processes", "dask", "ray"]


def marked(mark: str) -> list[psutil.Process]:
    """Return the live processes that inherited a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("PENSTOCK_TEST_MARK") == mark
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def listening(processes: list[psutil.Process]) -> list[int]:
    """Return the ports on which processes listen."""
    ports = []
    for process in processes:
        try:
            ports += [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
    return ports


def shared_files() -> set[str]:
    """Return the files in shared memory."""
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def eventually(mark: str, seconds: float) -> list[psutil.Process]:
    """Wait until no process with the mark is left; answer those that are."""
    end = time.monotonic() + seconds
    left = marked(mark)
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = marked(mark)
    return left


@pytest.mark.parametrize("name", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in RUNNERS])
@pytest.mark.timeout(280)
def test_ctrl_c_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """SIGINT to the whole process group, at random moments between the start and deep in the work."""
    script = tmp_path / "interrupted.py"
    script.write_text(SCRIPT)
    source = random.Random(f"{name}{os.environ.get('PENSTOCK_TEST_SEED', uuid.uuid4().hex)}")
    before = shared_files()
    for attempt in range(MOMENTS):
        home = tmp_path / f"home-{attempt}"
        mark = uuid.uuid4().hex
        environment = {**os.environ, "PENSTOCK_HOME": str(home), "PENSTOCK_TEST_MARK": mark}
        process = subprocess.Popen(
            [sys.executable, str(script), name],
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Half of the moments fall into the start of the cluster, half into the work.
        if attempt % 2:
            assert process.stdout is not None
            process.stdout.readline()
        pause = source.uniform(0.3, 2.0)
        time.sleep(pause)  # work: the moment is the test
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, problems = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            pytest.fail(f"{name}: still running 20 s after Ctrl-C at {pause:.2f} s of attempt {attempt}")
        assert process.returncode in (130, -signal.SIGINT), problems
        left = eventually(mark, 10)
        ports = listening(left)
        commands = [" ".join(p.cmdline())[:200] for p in left if p.is_running()]
        for one in left:
            one.kill()
        assert not left, f"{name}: left after Ctrl-C at {pause:.2f} s: {commands}, listening on {ports}"
        if attempt % 2:  # in the flow: the traceback is the user's
            assert "/penstock/" not in problems, problems
        if not home.exists():
            continue  # stopped before the flow began
        with reading(home) as connection:
            for run in queries.list_runs(connection):
                assert run["state"]["type"] == "CANCELLED", (run, problems)
        assert not {entry for entry in shared_files() - before if f"-{process.pid}-" in entry}


def test_sockets_can_be_bound() -> None:
    """The check above looks at listening sockets: make sure that it sees one."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert server.getsockname()[1] in listening([psutil.Process()])
