"""Prefect with prefect-dask and prefect-ray, in an environment and a process of its own.

Its dependencies conflict with ours, so nothing of it is imported here: `prefect_child` runs in its
environment, is told by a JSON file what to do, and answers into another one after each sample. A
Prefect server with SQLite runs beside it. Both are stopped when time or memory is exceeded; what
was measured until then is reported, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import versions
from benchmarks.workloads.import_and_hello import GREETING, run_process

ROOT = Path(__file__).parent.parent.parent
PINS = (
    "prefect==3.8.8",
    "prefect-dask==0.3.7",
    "prefect-ray==0.6.0",
    "fastapi==0.141.1",  # later ones do not start its server
    "starlette==1.3.1",
)
SHARED = ("dask", "distributed", "ray", "numpy", "cloudpickle", "psutil")
TIMEOUT = 300.0  # seconds for one sample; starting its server and the cluster is not in it
START_TIMEOUT = 300.0  # for either: a busy machine takes its time
START_ATTEMPTS = 3
MEMORY = 0.5  # of what is available, then it is stopped

GIVEN: dict[str, Any] = {}
"""What a flow of the child takes without holding it: Prefect pickles a flow, with all it holds, into each of its tasks."""

HELLO = """
from prefect import flow, task

@task
def hello(name):
    return f"hello {name}"

@flow(name="greet-benchmark")
def greet():
    return hello.submit("world").result()

if __name__ == "__main__":
    print(greet())
"""


def cache() -> Path:
    """Return the directory for environments of rivals, outside of the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PENSTOCK_BENCHMARK_CACHE") or Path(base) / "penstock-benchmarks")


def environment() -> Path:
    """Return Python of Prefect's environment, which is made when it is missing.

    The libraries of both environments that the figures depend on have the same versions.
    """
    requirements = [*PINS, *(f"{name}=={version}" for name, version in versions(SHARED).items())]
    folder = cache() / PINS[0].replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join([sys.version.split()[0], *requirements]) + "\n"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.which("uv"):
        subprocess.run(
            ["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True
        )
        subprocess.run(
            ["uv", "pip", "install", "--quiet", "--python", str(python), *requirements], check=True
        )
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
    stamp.write_text(wanted)
    return python


def measure_prefect(
    case: str, backend: str, *, sizes: dict[str, Any], repeats: int, shape: tuple[int, int]
) -> dict[str, Any]:
    """Compare Prefect with the bare back end in its own environment.

    Parameters
    ----------
    case : str
        Name of a workload.
    backend : str
        "threads", "dask" or "ray".
    sizes : dict
        What the workload is given.
    repeats : int
        Pairs of samples.
    shape : tuple of int
        Worker processes, and threads of each.

    Returns
    -------
    dict
        As `harness.Comparison.as_json`, with "parameters" and "versions".
    """
    python = environment()
    order: dict[str, Any] = {
        "case": case,
        "backend": backend,
        "sizes": sizes,
        "repeats": repeats,
        "shape": shape,
    }
    with tempfile.TemporaryDirectory(prefix="prefect-benchmark-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        try:
            with _server(python, home) as surroundings:
                if case == "import_and_hello":
                    found = _hello(python, home, surroundings, repeats)
                else:
                    found = _child(python, home, surroundings, order)
        except (TimeoutError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            found = {"engine": {"name": "prefect"}, "ratio": None, "unfinished": f"did not finish: {error}"}
    script = "import importlib.metadata as m, sys; print([(n, m.version(n)) for n in sys.argv[1:]])"
    names = [pin.partition("==")[0] for pin in PINS] + ["dask", "ray"]
    _, printed = run_process(
        [str(python), "-c", script, *names], dict(os.environ), Path(tempfile.gettempdir())
    )
    return {**found, "parameters": {**sizes, "repeats": repeats}, "versions": dict(_pairs(printed))}


def _pairs(printed: str) -> list[tuple[str, str]]:
    import ast

    found: list[tuple[str, str]] = ast.literal_eval(printed)
    return found


# -- the server -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(python: Path, home: Path) -> Iterator[dict[str, str]]:
    """Run a Prefect server with SQLite; give the environment of its clients.

    A server that does not come up is ended and started anew, on another port.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PENSTOCK_"))
    }
    surroundings = {
        **kept,
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": str(ROOT),
    }
    for attempt in range(1, START_ATTEMPTS + 1):
        port = _free_port()
        server = _start_server(python, home, surroundings, port)
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/api/health", home / "server.log")
        except TimeoutError:
            _stop(server)
            if attempt == START_ATTEMPTS:
                raise
            continue
        try:
            yield {**surroundings, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        finally:
            _stop(server)
        return


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _start_server(
    python: Path, home: Path, surroundings: dict[str, str], port: int
) -> subprocess.Popen[bytes]:
    place = ["--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    command = [str(python), "-m", "prefect", "server", "start", *place]
    with (home / "server.log").open("w") as log:
        return subprocess.Popen(
            command, env=surroundings, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2.0):
                return
        except OSError:
            time.sleep(0.2)
    message = f"the Prefect server does not answer; its log ends with: {_last_line(log)}"
    raise TimeoutError(message)


def _last_line(log: Path) -> str:
    """Return what a process said last: of an exception its message, without the paths of this machine."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours and what it started: they are in a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
            if number is signal.SIGKILL or not _alive(process.pid):
                return


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# -- the cases --------------------------------------------------------------------------------------


def _child(python: Path, home: Path, surroundings: dict[str, str], order: dict[str, Any]) -> dict[str, Any]:
    ask, answer = home / "order.json", home / "answer.json"
    ask.write_text(json.dumps(order))
    command = [str(python), "-m", "benchmarks.rivals.prefect_child", str(ask), str(answer)]
    with (home / "child.log").open("w") as log:
        child = subprocess.Popen(
            command, env=surroundings, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            problem = _watch(child, ready_file(answer), answer)
            if problem:
                problem += _progress(surroundings["PREFECT_API_URL"])
        finally:
            _stop(child)
    found: dict[str, Any] = {"engine": {"name": "prefect"}, "ratio": None}
    if answer.exists():
        found = json.loads(answer.read_text())
    if not problem and child.returncode != 0:
        problem = f"failed: {_last_line(home / 'child.log')}"
    return {**found, "unfinished": problem}


def ready_file(answer: Path) -> Path:
    """Return what the child writes when its cluster is open and both sides have run something small."""
    return answer.with_suffix(".ready")


def _watch(child: subprocess.Popen[bytes], ready: Path, answer: Path) -> str:
    """Wait for the child; return why it has to be stopped, or nothing.

    The time allowed begins when the cluster is up, and anew with each sample.
    """
    limit = int(psutil.virtual_memory().available * MEMORY)
    since, seen = time.monotonic(), 0.0
    while child.poll() is None:
        moment = max((path.stat().st_mtime for path in (ready, answer) if path.exists()), default=0.0)
        if moment > seen:
            since, seen = time.monotonic(), moment
        allowed = TIMEOUT if ready.exists() else START_TIMEOUT
        if time.monotonic() - since > allowed:
            return f"did not finish: {allowed:.0f} s for {'one sample' if ready.exists() else 'the start'}"
        used = _memory(child.pid)
        if used > limit:
            return f"did not finish: stopped when it used {used / 1e9:.1f} GB"
        time.sleep(0.2)
    return ""


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _progress(api: str) -> str:
    """Say how many task runs of all samples were completed."""
    query = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    try:
        return f"; its database shows {post(f'{api}/task_runs/count', query)} completed task runs, warm-up included"
    except OSError:
        return ""  # the server is too busy to say


def post(url: str, body: dict[str, Any]) -> Any:
    """Ask a Prefect server."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        return json.loads(answer.read())


def _hello(python: Path, home: Path, surroundings: dict[str, str], repeats: int) -> dict[str, Any]:
    """Measure hello world with threads; the server runs already, which is in its favour."""
    script = home / "hello.py"
    script.write_text(HELLO)
    samples = []
    for repeat in range(-1, repeats):
        seconds, printed = run_process([str(python), str(script)], surroundings, home)
        if GREETING not in printed:
            message = f"hello world printed {printed!r}"
            raise RuntimeError(message)
        if repeat >= 0:
            samples.append({"seconds": seconds})
    median = sorted(one["seconds"] for one in samples)[len(samples) // 2]
    engine = {"name": "prefect", "median": {"seconds": median}, "samples": samples}
    return {
        "configuration": "threads, server already running",
        "engine": engine,
        "ratio": None,
        "unfinished": "",
    }
