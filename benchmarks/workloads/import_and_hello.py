"""`import_and_hello`: from the start of a process to its end, and whether the next command sees the run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "import_and_hello"
DONE = (
    "one task that returns a string, in a script of its own: from the start of the process to its exit. "
    "The run must be visible to the next command, whose time is given beside it and not included."
)
FLOW = "greet-benchmark"
TIMEOUT = 120.0
GREETING = "hello world"

NOTHING = "pass"
_PENSTOCK = """
from penstock import flow, task

@task
def hello(name):
    return f"hello {{name}}"

@flow(name="greet-benchmark"{runner})
def greet():
    return hello.submit("world").result()

if __name__ == "__main__":
    print(greet())
"""
PENSTOCK = {
    "threads": _PENSTOCK.format(runner=""),
    "dask": _PENSTOCK.format(runner=', task_runner="dask"'),
    "ray": _PENSTOCK.format(runner=', task_runner="ray"'),
}
BARE = {
    "threads": """
from concurrent.futures import ThreadPoolExecutor

def hello(name):
    return f"hello {name}"

if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:
        print(pool.submit(hello, "world").result())
""",
    "dask": """
from distributed import Client

def hello(name):
    return f"hello {name}"

if __name__ == "__main__":
    with Client() as client:
        print(client.submit(hello, "world").result())
""",
    "ray": """
import ray

@ray.remote
def hello(name):
    return f"hello {name}"

if __name__ == "__main__":
    ray.init()
    print(ray.get(hello.remote("world")))
    ray.shutdown()
""",
}
SHOW = """
import json
from penstock.api import queries
from penstock.api.embedded import reading

with reading() as connection:
    print(json.dumps(queries.list_runs(connection)))
"""


@dataclass(slots=True)
class Hello:
    """One process.

    Attributes
    ----------
    seconds : float
        From its start to its exit.
    visible : bool or None
        Whether the next command saw the run; None without a record.
    seen_by : str
        The next command.
    next_command_seconds : float
        How long that took.
    """

    seconds: float
    visible: bool | None = None
    seen_by: str = ""
    next_command_seconds: float = 0.0


def compare(backend: str, *, repeats: int) -> dict[str, Any]:
    """Compare penstock, the bare back end and an interpreter that does nothing.

    Parameters
    ----------
    backend : str
        "threads", "dask" or "ray".
    repeats : int
        Of each.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as folder:
        scripts = {}
        for name, text in (("engine", PENSTOCK[backend]), ("bare", BARE[backend]), ("nothing", NOTHING)):
            scripts[name] = Path(folder, f"{name}.py")
            scripts[name].write_text(text)
        found: dict[str, list[Hello]] = {name: [] for name in scripts}
        for repeat in range(-1, repeats):  # the first round writes bytecode and warms the cache of the disk
            order = list(scripts) if repeat % 2 == 0 else list(reversed(scripts))
            for name in order:
                sample = _greet(scripts[name], name, Path(folder, f"home-{repeat}"))
                if repeat >= 0:
                    found[name].append(sample)
    pairs = zip(found["bare"], found["engine"], strict=True)
    ratios = [bare.seconds / ours.seconds for bare, ours in pairs]
    return {
        "configuration": f"{backend}, each with its defaults; python -c pass beside them",
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "visible_to_next_command": all(one.visible for one in found["engine"]),
        "engine": _side("penstock", found["engine"]),
        "bare": _side(f"bare {backend}", found["bare"]),
        "nothing": _side("python -c pass", found["nothing"]),
    }


def _side(name: str, samples: list[Hello]) -> dict[str, Any]:
    median = {"seconds": statistics.median(one.seconds for one in samples)}
    if samples[0].seen_by:
        median["next_command_seconds"] = statistics.median(one.next_command_seconds for one in samples)
    return {"name": name, "median": median, "samples": [asdict(one) for one in samples]}


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a user with a given home and no settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return {**kept, "PENSTOCK_HOME": str(home)}


def run_process(command: list[str], surroundings: dict[str, str], folder: Path) -> tuple[float, str]:
    """Run a command; return its seconds and what it printed.

    Raises
    ------
    RuntimeError
        With the end of its error output, if it failed.
    """
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env=surroundings, cwd=folder
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        message = f"{Path(command[0]).name} {' '.join(command[1:])[:60]} failed:\n{done.stderr[-2000:]}"
        raise RuntimeError(message)
    return seconds, done.stdout


def _greet(script: Path, name: str, home: Path) -> Hello:
    surroundings = environment(home)
    command = [sys.executable, "-c", NOTHING] if name == "nothing" else [sys.executable, str(script)]
    seconds, printed = run_process(command, surroundings, script.parent)
    if name != "nothing" and GREETING not in printed:
        message = f"the script of {name} printed {printed!r}"
        raise RuntimeError(message)
    if name != "engine":
        return Hello(seconds)
    return _look(Hello(seconds), surroundings, script.parent)


def _look(hello: Hello, surroundings: dict[str, str], folder: Path) -> Hello:
    """Run the next command; while the command line has none, what it would call."""
    cli = Path(sys.executable).parent / "penstock"
    for seen_by, command in (
        ("penstock runs", [str(cli), "runs"]),
        ("penstock.api.queries.list_runs", [sys.executable, "-c", SHOW]),
    ):
        try:
            hello.next_command_seconds, printed = run_process(command, surroundings, folder)
        except (OSError, RuntimeError):
            continue
        hello.seen_by, hello.visible = seen_by, FLOW in printed and "completed" in printed.lower()
        return hello
    hello.visible = False
    return hello
