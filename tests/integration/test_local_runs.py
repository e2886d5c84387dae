"""A server that goes on with runs: in processes of their own, where it is allowed, and with words for every end."""

import os
import signal
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock import settings
from penstock.api.auth import Scope
from penstock.api.client import Client
from penstock.api.connection import ServerError
from penstock.api.db import Database
from penstock.api.local_runs import DIRECTORY, LocalRuns, log_path
from penstock.api.models import requests
from penstock.engine.events import HOST
from penstock.errors import ConfigurationError, RunOwnedElsewhere
from tests.drivers import ROOT as SOURCE
from tests.drivers import Wait, command, driver
from tests.serving import Api, served
from tests.story import CHILD, LOAD, ROOT, batch, story

ALLOWED = ["--allow-local-runs"]

CODE = """
LEDGER = os.environ["LEDGER"]

def note(*words):
    with open(LEDGER, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

@task(persist_result=True)
def load(n):
    note("load", n)
    return n

@task
def hold(n):
    note("hold", os.getppid())
    while not os.path.exists(LEDGER + ".go"):
        time.sleep(0.05)  # work: until the test lets it go
    return n

@flow
def work(count: int):
    loaded = load.map(range(count)).result()
    return hold(sum(loaded))

if __name__ == "__main__":
    work(4)
"""


@pytest.fixture
def ledger(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = home.parent / f"{home.name}-ledger"
    monkeypatch.setenv("LEDGER", str(path))
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    return path


def said(ledger: Path) -> Counter[str]:
    return (
        Counter(line.split()[0] for line in ledger.read_text().splitlines()) if ledger.exists() else Counter()
    )


def crashed(home: Path, client: Client, ledger: Path, wait_until: Wait) -> str:
    """A run whose driver was killed while its last task ran."""
    with driver(home, CODE) as process:
        wait_until(lambda: said(ledger)["hold"] == 1 or process.poll() is not None, 60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    wait_until(lambda: [run.state for run in client.flow_runs()] == ["CRASHED"], 60)
    return str(client.flow_runs()[0].id)


def outcome(client: Client, request: str) -> str:
    return str(client.ask("request", request=request)["outcome"])


def test_a_crashed_run_goes_on_through_the_server(
    home: Path, database_url: str, ledger: Path, wait_until: Wait
) -> None:
    with served(home, ALLOWED) as server, Client(server.url, server.token) as client:
        assert client.version()["local_runs"] is True
        run = crashed(home, client, ledger, wait_until)
        request = client.resume(run, by="a test")
        wait_until(lambda: said(ledger)["hold"] == 2, 60)
        with pytest.raises(RunOwnedElsewhere, match="is being resumed already, by pid"):
            client.resume(run)
        with pytest.raises(RunOwnedElsewhere):
            client.set_state(run, "retry")
        ledger.with_name(f"{ledger.name}.go").touch()
        wait_until(lambda: client.flow_run(run).state == "COMPLETED", 60)
        assert said(ledger) == {"load": 4, "hold": 2}  # stored results were not made again
        assert client.flow_run(run).attempt == 2
        assert outcome(client, request) == f"started by the server on {HOST}"
        lines = [line.text for line in client.logs(run)]
        assert any(
            line.startswith(f"a test asked to resume it; the server on {HOST} starts") for line in lines
        )
        log = log_path(home, run)
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert "4 task runs reused" in log.read_text()
        with pytest.raises(ConfigurationError, match="has completed; there is nothing to resume"):
            client.resume(run)
    database = Database(database_url)
    with database.read() as connection:
        assert connection.execute(sa.select(requests.c.settled)).scalars().all().count(None) == 0
    database.close()


def test_of_many_who_ask_at_once_one_starts_it(home: Path, ledger: Path, wait_until: Wait) -> None:
    with served(home, ALLOWED) as server, Client(server.url, server.token) as client:
        run = crashed(home, client, ledger, wait_until)
        found: list[Any] = []

        def ask() -> None:
            with Client(server.url, server.token) as mine:
                try:
                    found.append(mine.resume(run))
                except RunOwnedElsewhere as error:
                    found.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 6
        assert len([one for one in found if isinstance(one, str)]) == 1
        ledger.with_name(f"{ledger.name}.go").touch()
        wait_until(lambda: client.flow_run(run).state == "COMPLETED", 60)
        assert said(ledger) == {"load": 4, "hold": 2}
        assert client.flow_run(run).attempt == 2


def test_a_process_that_dies_at_once_is_told(home: Path, ledger: Path, wait_until: Wait) -> None:
    with served(home, ALLOWED) as server, Client(server.url, server.token) as client:
        run = crashed(home, client, ledger, wait_until)
        script = home.parent / f"{home.name}-driver.py"
        script.write_text("raise RuntimeError('the telescope is gone')\n")
        for action in ("resume", "retry"):
            request = client.set_state(run, action)
            wait_until(lambda wanted=request: "before the run went on" in outcome(client, wanted), 60)
            assert "the telescope is gone" in outcome(client, request)
            assert client.flow_run(run).state == "CRASHED"
        lines = [(line.level, line.text) for line in client.logs(run)]
        assert [level for level, text in lines if text.startswith("Not resumed: its process (pid ")] == [
            "ERROR"
        ] * 2
        script.unlink()
        with pytest.raises(ConfigurationError, match=f"its code, {script}, is gone"):
            client.resume(run)


def test_a_run_that_lives_is_left_alone(home: Path, ledger: Path, wait_until: Wait) -> None:
    with (
        served(home, ALLOWED) as server,
        Client(server.url, server.token) as client,
        driver(home, CODE) as process,
    ):
        wait_until(lambda: said(ledger)["hold"] == 1 and bool(client.flow_runs(state="RUNNING")), 60)
        with pytest.raises(RunOwnedElsewhere, match=f"belongs to pid {process.pid}"):
            client.resume(client.flow_runs()[0].id)
        assert not (home / DIRECTORY).exists()


def test_a_run_outlives_the_server_that_started_it(home: Path, ledger: Path, wait_until: Wait) -> None:
    with served(home, ALLOWED) as server:
        with Client(server.url, server.token) as client:
            run = crashed(home, client, ledger, wait_until)
            client.resume(run)
            wait_until(lambda: said(ledger)["hold"] == 2, 60)
        port = int(server.url.rpartition(":")[2])
        assert server.stop() == 0
    ledger.with_name(f"{ledger.name}.go").touch()
    wait_until(lambda: "reused" in log_path(home, run).read_text(), 60)
    with served(home, port=port) as server, Client(server.url, server.token) as client:
        wait_until(lambda: client.flow_run(run).state == "COMPLETED", 60)
        with pytest.raises(ServerError, match="--allow-local-runs"):
            client.resume(run)


def test_the_command_leaves_it_to_the_server(home: Path, ledger: Path, wait_until: Wait) -> None:
    with served(home, ALLOWED) as server, Client(server.url, server.token) as client:
        run = crashed(home, client, ledger, wait_until)
        ledger.with_name(f"{ledger.name}.go").touch()
        done = command(home, "resume", run, "--on-server")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"the server at {server.url} goes on with ")
        wait_until(lambda: client.flow_run(run).state == "COMPLETED", 60)
        done = command(home, "resume", run, "--on-server", "--runner", "threads")
        assert done.returncode == 2


# ------------------------------------------------------------------------------------------------ refused


@pytest.fixture
def api(home: Path) -> Iterator[Api]:
    found = Api(home, hosts=["penstock.example.org"])
    events = story().events
    found.send(batch(events))
    yield found
    found.close()


def test_off_by_default(api: Api, home: Path) -> None:
    for action in ("resume", "retry"):
        for scope in (Scope.RUN, Scope.ADMIN):
            answer = api.post(f"/runs/{ROOT}/state", {"action": action}, scope)
            assert answer.status_code == 403
            assert "--allow-local-runs" in answer.json()["detail"]
            assert f"penstock resume {ROOT}" in answer.json()["detail"]
    assert api.get("/version")["local_runs"] is False
    assert not (home / DIRECTORY).exists()


def test_only_with_the_scope_and_only_for_this_machine(api: Api, home: Path) -> None:
    api.service.local_runs = LocalRuns(api.service, "http://127.0.0.1:1")
    assert api.post(f"/runs/{ROOT}/state", {"action": "resume"}, Scope.VIEW).status_code == 403
    kind = {"content-type": "application/json", "host": "penstock.example.org"}
    answer = api.request("POST", f"/api/v1/runs/{ROOT}/state", headers=kind, content=b'{"action": "resume"}')
    assert answer.status_code == 403
    assert "for this machine alone" in answer.json()["detail"]
    assert api.request("GET", f"/api/v1/runs/{ROOT}/state").status_code == 405
    assert not (home / DIRECTORY).exists()


def test_what_is_no_run_to_go_on_with_is_refused_with_a_sentence(api: Api, home: Path) -> None:
    api.service.local_runs = LocalRuns(api.service, "http://127.0.0.1:1")
    reasons = {ROOT: "nothing is known of how it was started|belongs to|completed", LOAD: "no root flow run"}
    for run, reason in (reasons | {CHILD: "no root flow run"}).items():
        answer = api.post(f"/runs/{run}/state", {"action": "resume"})
        assert answer.status_code == 409, answer.text
        assert any(one in answer.json()["detail"] for one in reason.split("|")), answer.text
    assert api.post(f"/runs/{'f' * 32}/state", {"action": "resume"}).status_code == 404
    assert not (home / DIRECTORY).exists()


def test_a_server_for_others_starts_no_runs(home: Path) -> None:
    done = command(home, "server", "start", "--host", "0.0.0.0", "--allowed-host", "x.example", *ALLOWED)
    assert done.returncode != 0
    assert "--allow-local-runs lets whoever asks start code on this machine" in done.stderr


def test_the_switch_is_a_setting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.refresh().server_allow_local_runs is False
    monkeypatch.setenv("PENSTOCK_SERVER_ALLOW_LOCAL_RUNS", "yes")
    assert settings.refresh().server_allow_local_runs is True
