"""Drivers of one home that record in different places: nobody's events go to another's store."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from penstock.api.client import Client
from penstock.engine import destination
from penstock.engine.spool import spools
from tests.postgres import free_port
from tests.serving import COMMAND, Served, served

Wait = Callable[..., None]

SCRIPT = """
import sys
from penstock import flow

@flow(flow_run_name=sys.argv[1])
def named():
    return 1

named()
"""


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


def run(home: Path, *words: str, **environment: str) -> str:
    variables = {**os.environ, "PENSTOCK_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, *words], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(home: Path, *words: str, **environment: str) -> str:
    return run(home, "-c", COMMAND, *words, **environment)


def drive(home: Path, name: str, **environment: str) -> None:
    run(home, "-c", SCRIPT, name, **environment)


def names(text: str) -> set[str]:
    return {one["name"] for one in json.loads(text)}


def shown(server: Served) -> set[str]:
    with Client(server.url, server.token) as client:
        return {str(one.name) for one in client.flow_runs()}


def test_each_spool_goes_where_its_driver_would_have_sent_it(home: Path, tmp_path: Path) -> None:
    there, port = tmp_path / "there", free_port()
    there.mkdir()
    url = f"http://127.0.0.1:{port}"
    drive(home, "for-the-server", PENSTOCK_API_URL=url)
    drive(home, "for-this-home")
    assert {destination.read(path) for path in spools(home / "spool")} == {"", url}

    # A command without the address takes what is for this home, and nothing else.
    assert names(command(home, "runs", "--json")) == {"for-this-home"}
    [left] = spools(home / "spool")
    assert destination.read(left) == url
    [told] = json.loads(command(home, "spool", "status", "--json"))
    assert (told["destination"], told["alive"]) == (url, False)
    assert url in command(home, "spool", "status")

    drive(home, "for-this-home-too")
    with served(there, port=port) as server:
        token = {"PENSTOCK_API_TOKEN": server.token}
        # A driver with the address takes what is for the server, and nothing else.
        drive(home, "for-the-server-too", PENSTOCK_API_URL=url.replace("127.0.0.1", "localhost"), **token)
        left_now = spools(home / "spool")
        assert [destination.read(path) for path in left_now if destination.read(path) == ""] == [""]
        # The command for it needs no address.
        assert "sent what was unsent" in command(home, "spool", "drain", **token)
        assert spools(home / "spool") == []
        assert list((home / "spool").iterdir()) == []
        assert shown(server) == {"for-the-server", "for-the-server-too"}
    assert names(command(home, "runs", "--json")) == {"for-this-home", "for-this-home-too"}


def test_a_server_takes_what_drivers_of_its_home_left_for_it(home: Path, wait_until: Wait) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    drive(home, "for-the-server", PENSTOCK_API_URL=url)
    drive(home, "for-another", PENSTOCK_API_URL="http://127.0.0.1:9")
    drive(home, "for-this-home")
    with served(home, port=port) as server:
        wait_until(lambda: shown(server) == {"for-the-server", "for-this-home"}, 20)
        wait_until(lambda: len(spools(home / "spool")) == 1, 20)
        [left] = spools(home / "spool")
        assert destination.read(left) == "http://127.0.0.1:9"
        assert httpx.get(f"{server.url}/api/v1/ready").status_code == 200


@pytest.mark.postgres
def test_what_is_for_a_database_is_not_put_into_a_file(home: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgres_server").new_database()
    drive(home, "for-the-database", PENSTOCK_DATABASE_URL=url)
    drive(home, "for-this-home")
    [left] = [path for path in spools(home / "spool") if destination.read(path)]
    assert "penstock:" not in destination.read(left)  # no account in it
    assert names(command(home, "runs", "--json")) == {"for-this-home"}
    drained = command(home, "spool", "drain")
    assert f"what is for {destination.read(left)} stays" in drained
    assert left.exists()
    assert "sent what was unsent" in command(home, "spool", "drain", PENSTOCK_DATABASE_URL=url)
    assert names(command(home, "runs", "--json", PENSTOCK_DATABASE_URL=url)) == {"for-the-database"}
    assert spools(home / "spool") == []
