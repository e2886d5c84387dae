"""Real servers and drivers: start, stop, die, come back; nothing acknowledged is lost, nothing comes twice."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from penstock import settings
from penstock.api import embedded, queries, remote
from penstock.api.client import Client, get_client
from penstock.api.connection import ServerError, Unreachable
from penstock.api.db import Database
from penstock.api.note import read_note, take_lock
from penstock.engine.events import Event, bus
from penstock.engine.sender import StoreUnusable
from penstock.engine.spool import Batch, spools
from penstock.engine.tracking import start_tracking, stop_tracking
from penstock.errors import ConfigurationError
from tests.serving import COMMAND, Served, lines_of, packed, served, start
from tests.story import LOAD, ROOT, Flow, batch, count_events, story

Wait = Callable[..., None]

DRIVER = """
import sys, time
from penstock import flow, task

@task
def inc(x, pause=0.0):
    time.sleep(pause)  # work: so long takes one
    return x + 1

@flow
def many(count: int, pause: float = 0.0):
    return sum(inc.map(range(count), pause=pause).result())

if __name__ == "__main__":
    assert many(int(sys.argv[1]), float(sys.argv[2])) == sum(range(1, int(sys.argv[1]) + 1))
"""


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The home of drivers on another machine."""
    path = tmp_path / "elsewhere"
    (path / "spool").mkdir(parents=True)
    return path


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


def command(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PENSTOCK_HOME": str(home), **environment}
    done = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(done, env=variables, capture_output=True, text=True, timeout=60, check=False)


def drive(
    script: Path, home: Path, url: str, token: str, count: int = 20, pause: float = 0.0
) -> subprocess.Popen[bytes]:
    variables = {
        **os.environ,
        "PENSTOCK_HOME": str(home),
        "PENSTOCK_API_URL": url,
        "PENSTOCK_API_TOKEN": token,
    }
    return subprocess.Popen([sys.executable, str(script), str(count), str(pause)], env=variables)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def events_of(home: Path) -> int:
    database = Database(f"sqlite:///{home / 'penstock.db'}")
    try:
        return count_events(database)
    finally:
        database.close()


def complete(home: Path) -> None:
    """Each writer's events are 1 to n, and the file is sound."""
    import sqlite3

    connection = sqlite3.connect(home / "penstock.db")
    try:
        rows = connection.execute(
            "SELECT writer, count(*), min(seq), max(seq) FROM events GROUP BY writer"
        ).fetchall()
        assert rows
        assert all(count == last and first == 1 for _, count, first, last in rows), rows
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        connection.close()


# ------------------------------------------------------------------------------------------------ its life


def test_start_status_stop(home: Path) -> None:
    assert command(home, "server", "status").returncode == 3
    begun = command(home, "server", "start", "--background", "--port", "0")
    assert begun.returncode == 0, begun.stderr
    note = read_note(home)
    assert note is not None
    try:
        assert f"export PENSTOCK_API_URL={note['url']}" in begun.stdout
        assert (home / "server.json").stat().st_mode & 0o777 == 0o600
        status = json.loads(command(home, "server", "status", "--json").stdout)
        assert (status["running"], status["pid"], status["health"]) == (
            True,
            note["pid"],
            "Events are taken.",
        )

        second = command(home, "server", "start", "--port", "0")
        assert second.returncode == 2
        assert f"with pid {note['pid']}" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
        assert str(note["pid"]) in command(home, "server", "start", "--background").stderr

        [link] = re.findall(r"http\S+/login\?key=\S+", begun.stdout)
        assert httpx.get(link).status_code == 200
        [another] = re.findall(r"http\S+/login\?key=\S+", command(home, "server", "login").stdout)
        assert another != link
    finally:
        stopped = command(home, "server", "stop")
    assert stopped.stdout.strip() == f"stopped the server with pid {note['pid']}"
    assert read_note(home) is None
    assert command(home, "server", "stop").stdout.strip() == f"no server serves {home}"


def test_a_port_that_is_taken_is_one_sentence(home: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for more in ([], ["--background"]):
            done = command(home, "server", "start", "--port", str(other.getsockname()[1]), *more)
            assert done.returncode != 0
            assert len(done.stderr.strip().splitlines()) == 1
            assert "--port" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_only_by_name(home: Path, host: str) -> None:
    done = command(home, "server", "start", "--host", host, "--port", "0")
    assert (done.returncode, "--allowed-host" in done.stderr) == (2, True)
    with served(home, ["--host", "0.0.0.0", "--allowed-host", "cluster.example"]) as server:
        for name, status in (("cluster.example", 200), ("other.example", 421)):
            assert httpx.get(f"{server.url}/api/v1/health", headers={"host": name}).status_code == status
        assert httpx.get(f"{server.url}/api/v1/flows").status_code == 401


@pytest.mark.parametrize("options", [(), ("--background",)])
def test_a_database_that_is_away_is_one_sentence(home: Path, options: tuple[str, ...]) -> None:
    url = f"postgresql://reader:secret@127.0.0.1:{free_port()}/none"
    done = command(home, "server", "start", "--port", "0", *options, PENSTOCK_DATABASE_URL=url)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("penstock: The PostgreSQL server of PENSTOCK_DATABASE_URL")
    assert "secret" not in line
    assert command(home, "server", "status").returncode == 3


def test_it_listens_on_loopback_only(home: Path) -> None:
    import psutil

    with served(home) as server:
        listening = [
            one.laddr.ip
            for one in psutil.Process(server.process.pid).net_connections()
            if one.status == "LISTEN"
        ]
        assert listening == ["127.0.0.1"]


def test_sigterm_commits_what_was_taken(home: Path) -> None:
    with served(home) as server:
        found = batch(story(2000).events)
        with server.client() as client:
            answers = [
                client.post(
                    "/api/v1/ingest",
                    content=packed(Batch(found.writer, first, [found.payloads[first - 1]])),
                    headers={"content-type": "application/msgpack"},
                )
                for first in range(1, found.last + 1)
            ]
        assert server.stop() == 0
    assert answers[-1].json()["acked_seq"] == found.last
    assert events_of(home) == found.last


def test_a_stream_does_not_keep_a_server_alive(home: Path) -> None:
    with served(home) as server, server.client() as client, client.stream("GET", "/api/v1/events") as answer:
        stream = lines_of(answer)
        next(stream)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert list(stream) == []
        assert server.process.wait(10) == 0
        assert time.monotonic() - begun < 5


# ------------------------------------------------------------------------------------------------ beside drivers


def test_it_serves_what_embedded_runs_wrote_and_sweeps_what_they_write(
    home: Path, script: Path, wait_until: Wait
) -> None:
    environment = {**os.environ, "PENSTOCK_HOME": str(home)}
    subprocess.run([sys.executable, str(script), "5", "0"], env=environment, check=True)
    with served(home) as server, server.client() as client:
        wait_until(lambda: client.get("/api/v1/flow-runs").json()["items"] != [])
        subprocess.run([sys.executable, str(script), "5", "0"], env=environment, check=True)
        wait_until(lambda: len(client.get("/api/v1/flow-runs").json()["items"]) == 2)
        wait_until(lambda: spools(home / "spool") == [])  # what is shown is committed, and then removed


def test_commands_see_everything_while_a_server_has_the_home(home: Path) -> None:
    with served(home):
        begun = time.monotonic()
        start_tracking()
        bus.publish(Event("flow_run", ROOT, ROOT, 1.0, {"flow": "f", "name": "fresh"}))
        with embedded.reading(home) as connection:
            assert [run["name"] for run in queries.list_runs(connection)] == ["fresh"]
        assert time.monotonic() - begun < 3


def test_a_driver_that_holds_the_lock_for_a_moment_hands_it_over(home: Path) -> None:
    store = embedded.EmbeddedStore(home)
    lock = take_lock(store._lock_path, 0.0)
    assert lock is not None
    release = threading.Timer(0.7, lock.release)
    release.start()
    try:
        with served(home) as server:
            assert server.url
    finally:
        release.join()
        store.close()


def test_runs_command_asks_the_server_that_is_set(home: Path, elsewhere: Path, script: Path) -> None:
    with served(home) as server:
        driver = drive(script, elsewhere, server.url, server.token, 5)
        assert driver.wait(30) == 0
        there = {"PENSTOCK_API_URL": server.url, "PENSTOCK_API_TOKEN": server.token}
        [run] = json.loads(command(elsewhere, "runs", "--json", **there).stdout)
        assert (run["flow"], run["tasks"]) == ("many", {"COMPLETED": 5})
        shown = command(elsewhere, "runs", "show", run["id"][-8:], **there)
        assert "flow run" in shown.stdout, shown.stderr
        assert command(elsewhere, "runs", "logs", run["name"], **there).returncode == 0
        refused = command(elsewhere, "runs", **{**there, "PENSTOCK_API_TOKEN": "wrong"})
        assert refused.returncode != 0
        assert "token" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    gone = command(elsewhere, "runs", **there)
    assert "does not answer" in gone.stderr
    assert not (elsewhere / "penstock.db").exists()


# ------------------------------------------------------------------------------------------------ drivers


def test_a_short_driver_is_delivered_when_it_ends(home: Path, elsewhere: Path, script: Path) -> None:
    with served(home) as server:
        assert drive(script, elsewhere, server.url, server.token).wait(30) == 0
        with server.client() as client:
            [run] = client.get("/api/v1/flow-runs").json()["items"]
        assert (run["state"]["type"], run["tasks"]) == ("COMPLETED", {"COMPLETED": 20})
        assert spools(elsewhere / "spool") == []


def test_a_driver_without_its_server_runs_to_its_end_and_delivers_later(
    home: Path, elsewhere: Path, script: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    begun = time.monotonic()
    driver = drive(script, elsewhere, url, "")
    assert driver.wait(30) == 0
    assert time.monotonic() - begun < 5
    assert len(spools(elsewhere / "spool")) == 1
    with served(home, port=port) as server:
        assert drive(script, elsewhere, url, server.token).wait(30) == 0  # brings the other's along
        store = remote.HttpStore(elsewhere, server.url, server.token)
        assert store.sweep()
        store.close()
        with server.client() as client:
            runs = client.get("/api/v1/flow-runs").json()["items"]
    assert [run["tasks"] for run in runs] == [{"COMPLETED": 20}] * 2
    assert spools(elsewhere / "spool") == []
    complete(home)


def test_a_server_that_is_killed_again_and_again_loses_nothing(
    home: Path, elsewhere: Path, script: Path
) -> None:
    port = free_port()
    server = start(home, port=port)
    driver = drive(script, elsewhere, server.url, server.token, 60, 0.1)
    try:
        for _ in range(4):
            time.sleep(0.5)  # work: the driver has something to say
            server.kill()
            server = start(home, port=port)
        assert driver.wait(60) == 0
        store = remote.HttpStore(elsewhere, server.url, server.token)
        assert store.sweep()
        store.close()
        with server.client() as client:
            [run] = client.get("/api/v1/flow-runs").json()["items"]
        assert (run["state"]["type"], run["tasks"]) == ("COMPLETED", {"COMPLETED": 60})
    finally:
        server.kill()
        driver.kill()
        driver.wait()
    complete(home)


def test_a_driver_that_is_killed_is_delivered_by_the_next_one(
    home: Path, elsewhere: Path, script: Path, wait_until: Wait
) -> None:
    port = free_port()
    driver = drive(script, elsewhere, f"http://127.0.0.1:{port}", "", 200, 0.05)
    wait_until(lambda: sum(path.stat().st_size for path in spools(elsewhere / "spool")) > 2000, 20)
    driver.kill()
    driver.wait()
    with served(home, port=port) as server:
        assert drive(script, elsewhere, server.url, server.token).wait(30) == 0
        store = remote.HttpStore(elsewhere, server.url, server.token)
        assert store.sweep()
        store.close()
        with server.client() as client:
            assert len(client.get("/api/v1/flow-runs").json()["items"]) == 2
    complete(home)


# ------------------------------------------------------------------------------------------------ faults on the way

FAULTY = """
import asyncio, random, sys
from starlette.responses import Response
import penstock.api.app, penstock.api.server
from penstock.cli import main

chance = random.Random(5)
made = penstock.api.app.create_app
tries = []

class Faults:
    def __init__(self, app):
        self.app, self.state, self.routes = app, app.state, app.routes

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].endswith("/ingest"):
            return await self.app(scope, receive, send)
        tries.append(1)
        kind = ("before", "after", "garbage", "redirect", "other", "cut", "slow", "well")[len(tries) % 8]
        if kind == "before":
            return await Response("no", 500)(scope, receive, send)
        if kind == "garbage":
            return await Response("<html>Welcome to the hotel's network</html>", 200)(scope, receive, send)
        if kind == "redirect":
            return await Response("", 302, {"location": "http://127.0.0.1:1/"})(scope, receive, send)
        if kind == "other":
            body = b'{"writer": "' + b"0" * 32 + b'", "last": 1, "acked_seq": 99999999}'
            return await Response(body, 200, media_type="application/json")(scope, receive, send)
        if kind == "slow":
            await asyncio.sleep(0.3)
        async def failing(message):
            if kind == "after":
                if message["type"] == "http.response.start":
                    message = {**message, "status": 502}
            if kind == "cut" and message["type"] == "http.response.body":
                await send({"type": "http.response.body", "body": message["body"][:5], "more_body": True})
                raise RuntimeError("cut")
            await send(message)
        await self.app(scope, receive, failing)

penstock.api.server.create_app = lambda *args, **details: Faults(made(*args, **details))
main()
"""


def test_no_fault_on_the_way_loses_or_doubles_an_event(
    home: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Flow()
    flow.add("flow_run", ROOT, flow="f", name="x")
    for number in range(60):
        flow.add("task_run", f"{0x1000 + number:032x}", flow_run=ROOT, task="t", name=f"t{number}")
    found = batch(flow.events)
    with served(home, code=FAULTY) as server:
        store = remote.HttpStore(elsewhere, server.url, server.token)
        done = failures = 0
        while done < found.last:
            try:
                done = store.send(Batch(found.writer, done + 1, found.payloads[done : done + 3]))
            except ServerError:
                failures += 1
                assert failures < 500
        store.close()
        assert failures > 20
    assert events_of(home) == found.last == 61
    complete(home)
    assert store.rejected == 0


# ------------------------------------------------------------------------------------------------ the driver's store


def test_large_batches_are_cut_and_large_events_compressed(home: Path, elsewhere: Path) -> None:
    noise = os.urandom(300_000).hex()
    flow = Flow()
    flow.add("flow_run", ROOT, flow="f", name="x")
    for _ in range(8):
        flow.add("log", ROOT, lines=[[1.0, "INFO", noise]])
    flow.add("log", ROOT, lines=[[1.0, "INFO", "x" * (3 << 20)]])
    found = batch(flow.events)
    with served(home) as server:
        store = remote.HttpStore(elsewhere, server.url, server.token)
        assert store.send(found) == found.last
        assert store.rejected == 0
        store.close()


def test_what_can_never_be_taken_is_set_aside_and_the_rest_delivered(home: Path, elsewhere: Path) -> None:
    flow = Flow()
    flow.add("flow_run", ROOT, flow="f", name="x")
    flow.add("log", ROOT, lines=[[1.0, "INFO", os.urandom(2 << 20).hex()]])
    flow.state(ROOT, "COMPLETED", of="flow")
    found = batch(flow.events)
    with served(home) as server:
        store = remote.HttpStore(elsewhere, server.url, server.token)
        assert store.send(found) == 3
        assert store.send(found) == 3
        store.close()
        with server.client() as client:
            assert client.get(f"/api/v1/flow-runs/{ROOT}").json()["state"]["type"] == "COMPLETED"
    assert store.rejected == 1
    kept = (elsewhere / "spool" / f"{found.writer}.rejected").read_bytes()
    assert found.payloads[1] in kept
    complete(home)


def test_without_a_valid_token_everything_is_kept_until_there_is_one(
    home: Path,
    elsewhere: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Wait,
) -> None:
    with served(home) as server:
        monkeypatch.setenv("PENSTOCK_HOME", str(elsewhere))
        monkeypatch.setenv("PENSTOCK_API_URL", server.url)
        settings.refresh()
        tracker = start_tracking()
        for event in story().events:
            bus.publish(event)
        assert not tracker.flush(1.0)
        assert [record.getMessage() for record in caplog.records if "token" in record.getMessage()] != []
        assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 1
        (elsewhere / "token").write_text(server.token)
        assert tracker.flush(10.0)
        assert stop_tracking()
    assert events_of(home) == 18


def test_an_address_that_is_none_is_one_sentence(elsewhere: Path) -> None:
    for url in ("ftp://x", "http://", "http://x:port", "http://user:secret@x"):
        with pytest.raises(StoreUnusable, match="PENSTOCK_API_URL"):
            remote.HttpStore(elsewhere, url)


# ------------------------------------------------------------------------------------------------ streams


@pytest.fixture
def server(home: Path) -> Iterator[Served]:
    with served(home) as found:
        yield found


def test_streams_need_a_token_and_are_limited(server: Served) -> None:
    for path in ("/api/v1/events", f"/api/v1/runs/{ROOT}/logs/stream"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
        assert httpx.get(f"{server.url}{path}", headers={"authorization": "Bearer x"}).status_code == 401
    limits = httpx.Limits(max_connections=100)
    headers = {"authorization": f"Bearer {server.token}"}
    with httpx.Client(base_url=server.url, headers=headers, limits=limits, timeout=30) as client:
        opened = []
        for _ in range(64):
            answer = client.send(client.build_request("GET", "/api/v1/events"), stream=True)
            assert answer.status_code == 200
            lines = answer.iter_lines()
            next(lines)
            opened.append((answer, lines))
        assert client.get("/api/v1/events").status_code == 503
        for answer, lines in opened:
            lines.close()  # type: ignore[attr-defined]
            answer.close()


def test_a_stream_goes_on_where_it_was_cut_on_another_server(home: Path, server: Served) -> None:
    found = batch(story().events)
    kind = {"content-type": "application/msgpack"}
    seen: list[int] = []

    def read(client: httpx.Client, last: str | None, until: int) -> str:
        headers = {"last-event-id": last} if last else {}
        with client.stream("GET", "/api/v1/events?logs=true", headers=headers) as answer:
            for name, event, position in lines_of(answer):
                if name != "position":
                    seen.append(event["seq"])
                elif len(seen) >= until:
                    assert position is not None
                    return position
                elif last is None and not seen:
                    client2.post(
                        "/api/v1/ingest",
                        content=packed(Batch(found.writer, 1, found.payloads[:9])),
                        headers=kind,
                    )
        raise AssertionError("the stream ended")

    with server.client() as client, server.client() as client2:
        position = read(client, None, 9)
        client2.post("/api/v1/ingest", content=packed(found), headers=kind)
    server.kill()
    with served(home) as another, another.client() as client:
        client2 = client
        read(client, position, 18)
        assert client.get("/api/v1/events", headers={"last-event-id": "junk"}).status_code == 400
    assert seen == list(range(1, 19))


def test_the_client_follows_over_a_restart(home: Path, elsewhere: Path) -> None:
    port = free_port()
    server = start(home, port=port)
    found = batch(story().events)
    seen: list[int] = []
    begun = threading.Event()

    def watch() -> None:
        with Client(server.url, server.token) as client:
            for event in client.events(logs=True):
                seen.append(event["seq"])
                begun.set()
                if event["seq"] == found.last:
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    store = remote.HttpStore(elsewhere, server.url, server.token)
    try:
        first = 0
        while not begun.wait(0.2) and first < 10:  # whatever comes before the stream is open is not in it
            first += 1
            store.send(Batch(found.writer, first, found.payloads[first - 1 : first]))
        server.kill()
        server = start(home, port=port)
        store.send(Batch(found.writer, first + 1, found.payloads[first:]))
        watcher.join(20)
        assert not watcher.is_alive()
        assert seen == list(range(seen[0], 19))
    finally:
        store.close()
        server.kill()


def test_logs_are_followed(server: Served, elsewhere: Path) -> None:
    store = remote.HttpStore(elsewhere, server.url, server.token)
    store.send(batch(story().events))
    with Client(server.url, server.token) as client:
        lines = client.follow_logs(ROOT)
        assert [next(lines).text for _ in range(3)] == ["before", "loading", "from the flow"]
        flow = Flow()
        flow.add("log", LOAD, lines=[[5000.0, "INFO", "later"], [5000.0, "INFO", "even later"]])
        store.send(batch(flow.events, "e" * 32))
        assert [next(lines).text for _ in range(2)] == ["later", "even later"]
        lines.close()  # type: ignore[attr-defined]
    store.close()


# ------------------------------------------------------------------------------------------------ the client


def test_the_client_lists_into_frames(
    server: Served, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    store = remote.HttpStore(elsewhere, server.url, server.token)
    store.send(batch(story(1500).events))
    store.close()
    client = get_client(server.url, server.token)
    frame = pd.DataFrame(client.task_runs(root=ROOT, limit=None))
    assert len(frame) == 1502
    assert set(frame["state"]) == {"COMPLETED", "PENDING"}
    assert frame.set_index("id").loc[LOAD, "seconds"] == 1.5
    assert len(client.task_runs(root=ROOT, limit=1200)) == 1200
    assert client.task_run(LOAD).to_dict()["worker"] == "w1"
    assert [run.id for run in client.flow_runs(state="completed", nested=False)] == [ROOT]
    assert {one.name for one in client.flows()} == {"hello", "child"}
    assert client.map_runs(ROOT)[0].ranges == {"COMPLETED": [[0, 1499]]}
    assert client.map_run(client.map_runs()[0].id).count == 1500
    assert client.flow_run(ROOT).tasks["COMPLETED"] == 1501
    assert client.graph(ROOT)["nodes"]
    assert client.tree(ROOT)["nodes"]
    assert client.find("brave-otter")[0].id == ROOT
    assert [line.level for line in client.logs(ROOT, level="error")] == ["ERROR"]
    assert client.history(LOAD)[-1]["type"] == "COMPLETED"
    assert sum(client.activity(root=ROOT)["started"]) > 1000
    assert client.durations(root=ROOT)[0]["count"] == 1500
    assert client.states()["flow"] == {"COMPLETED": 2}
    assert client.version()["api"] == 1
    assert client.ask("runs")[0]["id"] == ROOT
    with pytest.raises(ServerError) as caught:
        client.set_state(ROOT, "pause")
    assert caught.value.status == 501
    with pytest.raises(ServerError, match=f"penstock resume {ROOT}") as caught:
        client.set_state(ROOT, "resume")
    assert caught.value.status == 403
    with pytest.raises(ServerError) as caught:
        client.flow_run("f" * 32)
    assert caught.value.status == 404
    with pytest.raises(ConfigurationError, match="no id"):
        client.flow_run("x/../y")
    client.close()


def test_the_client_finds_the_server_of_this_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="penstock server start"):
        get_client()
    with served(home) as server:
        with get_client() as client:
            assert client.url == server.url
            assert client.ready()["status"] == "ok"
    with Client(server.url) as client, pytest.raises(Unreachable, match="does not answer"):
        client.version()
    monkeypatch.setenv("PENSTOCK_API_URL", "http://127.0.0.1:1")
    settings.refresh()
    assert get_client().url == "http://127.0.0.1:1"
