"""Row 8 with all others at once: servers and drivers are killed and stopped, answers fail; nothing is lost."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.api.client import Client
from penstock.api.connection import ServerError
from penstock.api.db import Database
from penstock.engine.spool import spools
from tests.chaos.figures import keep
from tests.chaos.proof import Proof
from tests.chaos.storm import DRIVER, SERVER
from tests.chaos.victims import Start, Victims
from tests.conftest import wait_until
from tests.postgres import free_port
from tests.serving import COMMAND, start

SECONDS = float(os.environ.get("PENSTOCK_TEST_KILLS", "60"))
ROOT = Path(__file__).parents[2]
RUNNERS = ("threads", "threads", "processes")


class Storm:
    """A server, drivers beside it, drivers elsewhere, and a ledger."""

    def __init__(self, home: Path, folder: Path, tasks: int) -> None:
        self.home, self.elsewhere = home, folder / "elsewhere"
        self.ledger, self.script = folder / "ledger", folder / "driver.py"
        self.script.write_text(DRIVER)
        self.ledger.touch()
        self.elsewhere.mkdir()
        self.url = f"http://127.0.0.1:{free_port()}"
        self.tasks = tasks
        self.errors = (folder / "errors").open("ab")

    def server(self, number: int) -> "subprocess.Popen[str]":
        port = self.url.rpartition(":")[2]
        return self._start(["-c", SERVER, "server", "start", "--port", port], PENSTOCK_HOME=str(self.home))

    def beside(self, number: int) -> "subprocess.Popen[str]":
        return self._start(self._work(number), PENSTOCK_HOME=str(self.home))

    def away(self, number: int) -> "subprocess.Popen[str]":
        with contextlib.suppress(OSError):  # before the first server there is no token
            (self.elsewhere / "token").write_text((self.home / "token").read_text())
        variables = {"PENSTOCK_API_URL": self.url, "PENSTOCK_DATABASE_URL": ""}
        return self._start(self._work(number), PENSTOCK_HOME=str(self.elsewhere), **variables)

    def _work(self, number: int) -> list[str]:
        return [str(self.script), RUNNERS[number % len(RUNNERS)], str(self.tasks)]

    def _start(self, words: Sequence[str], **variables: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "LEDGER": str(self.ledger), "PYTHONPATH": str(ROOT), **variables}
        return subprocess.Popen(
            [sys.executable, *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            text=True,
        )


def drain(home: Path, url: str) -> None:
    command = [sys.executable, "-c", COMMAND, "spool", "drain"]
    environment = {**os.environ, "PENSTOCK_HOME": str(home), "PENSTOCK_API_URL": url}
    deadline = time.monotonic() + 600  # what waits may be more than one command has time for
    while spools(home / "spool") and time.monotonic() < deadline:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 or "not all is sent" in done.stderr, done.stderr
    assert spools(home / "spool") == []


def _states(client: Client) -> dict[str, dict[str, int]]:
    """What the server shows; a busy one may have to be asked again."""
    try:
        return client.states()
    except ServerError as error:
        if error.status != 503:
            raise
        return {"flow": {"PENDING": 1}}


def _present(counts: dict[str, int]) -> set[str]:
    return {kind for kind, count in counts.items() if count}


def rage(
    home: Path, url: str, folder: Path, name: str, seconds: float, pause: float, tasks: int
) -> dict[str, Any]:
    begun = time.monotonic()
    storm = Storm(home, folder, tasks)
    kinds: dict[str, tuple[int, Start]] = {
        "server": (1, storm.server),
        "beside": (1, storm.beside),
        "away": (2, storm.away),
    }
    victims = Victims(kinds, random.Random(11))
    try:
        victims.rage(seconds, pause)
    finally:
        victims.end()
        storm.errors.close()
    server = start(home, port=int(storm.url.rpartition(":")[2]))
    try:
        drain(storm.elsewhere, server.url)
        drain(home, "")
        with Client(server.url, server.token) as client:
            wait_until(lambda: not {"RUNNING", "PENDING"} & _present(_states(client)["flow"]), 90)
            shown = client.states()
        server.stop()
    finally:
        server.kill()
    database = Database(url)
    with contextlib.closing(database):
        proof = Proof(database, storm.ledger)
        proof.compare(shown)
    figures = {**proof.figures, "kills": victims.kills, "stops": victims.stops, "raged_seconds": seconds}
    keep(name, {**figures, "seconds": round(time.monotonic() - begun, 1), "faults": proof.faults})
    assert proof.faults == []
    assert proof.figures["executions"] > 100
    assert proof.states["flow"].get("COMPLETED", 0) > 0
    return figures


@pytest.mark.timeout(240)
def test_row_8_servers_and_drivers_die_and_stop_at_random(
    home: Path, database_url: str, tmp_path: Path
) -> None:
    kind = database_url.partition(":")[0]
    figures = rage(home, database_url, tmp_path, f"kills-{kind}-short", SECONDS, 0.9, 40)
    assert figures["kills"] >= SECONDS / 3


@pytest.mark.soak
def test_row_8_through_a_million_events(home: Path, database_url: str, tmp_path: Path) -> None:
    kind = database_url.partition(":")[0]
    figures = rage(home, database_url, tmp_path, f"kills-{kind}-long", 900, 2.0, 400)
    assert figures["kills"] >= 200
    assert figures["events"] >= 1_000_000
