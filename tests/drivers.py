"""Drivers for tests of what happens when they die: real processes, and a store that they share.

`SharedStore` is what a server does for drivers that have nothing in common but a connection: it
commits what they send and answers what they ask, on a database that lies in nobody's home.
"""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.api.commands import COMMANDS
from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.api.queries import ANSWERS
from penstock.engine.spool import Batch

ROOT = Path(__file__).parents[1]


class SharedStore:
    """A store on a database that several processes write to."""

    def __init__(self, path: Path) -> None:
        self.database = Database(f"sqlite:///{path}")

    def send(self, batch: Batch) -> int:
        return ingest(self.database, [batch])[batch.writer]

    def ask(self, question: Mapping[str, Any]) -> Any:
        details = dict(question)
        what = details.pop("what")
        if what in COMMANDS:
            return COMMANDS[what](self.database, **details)
        with self.database.read() as connection:
            return ANSWERS[what](connection, **details)

    def close(self) -> None:
        self.database.close()


PREFACE = """
import os, sys, time
from penstock import flow, task
from penstock.engine import heartbeat, sender, tracking

if os.environ.get("SHARED"):
    from pathlib import Path
    from tests.drivers import SharedStore
    tracking.open_store.__globals__["open_store"] = lambda home: SharedStore(Path(os.environ["SHARED"]))
    tracking.Tracker.open_store = lambda self: SharedStore(Path(os.environ["SHARED"]))
    heartbeat.BEAT = heartbeat.LISTEN = 0.2
    sender.START_DELAY = 0.05
"""


@contextmanager
def driver(
    home: Path, code: str, *, shared: Path | None = None, **more: str
) -> Iterator[subprocess.Popen[str]]:
    """Run code as a driver in a process of its own; it is killed at the end of the block."""
    script = home.parent / f"{home.name}-driver.py"
    script.write_text(PREFACE + textwrap.dedent(code))
    environment = {**os.environ, "PENSTOCK_HOME": str(home), "PYTHONPATH": str(ROOT), **more}
    if shared is not None:
        environment["SHARED"] = str(shared)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGCONT, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def command(home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of penstock to its end."""
    line = [sys.executable, "-c", "from penstock.cli import main; main()", *words]
    environment = {**os.environ, "PENSTOCK_HOME": str(home), "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        line, env=environment, cwd=home.parent, capture_output=True, text=True, check=False, timeout=120
    )


Wait = Callable[..., None]
