"""Where a spool is to go, as it is written beside it."""

from pathlib import Path

import pytest

from penstock.engine import destination
from penstock.engine.spool import Spool, spools
from penstock.settings import refresh


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:4270", "http://127.0.0.1:4270"),
        ("HTTP://LocalHost:4270/", "http://127.0.0.1:4270"),
        ("localhost:4270", "http://127.0.0.1:4270"),
        ("https://ada:secret@Flows.example/penstock/", "https://flows.example/penstock"),
        ("http://[::1]:4270", "http://[::1]:4270"),
    ],
)
def test_an_address_is_written_in_one_way(url: str, found: str) -> None:
    assert destination.server(url) == found
    assert destination.is_server(found)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("", ""),
        ("postgres://ada:s3cret%2F@db.example:5432/flows", "postgresql://db.example:5432/flows"),
        ("postgresql+psycopg://db.example/flows", "postgresql://db.example/flows"),
        ("sqlite:////data/runs.db", "sqlite:////data/runs.db"),
    ],
)
def test_a_database_is_written_without_its_password(
    monkeypatch: pytest.MonkeyPatch, url: str, found: str
) -> None:
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", url)
    refresh()
    assert destination.present() == destination.store() == found
    assert not destination.is_server(found)


def test_the_database_of_the_home_is_local_by_whatever_name(
    monkeypatch: pytest.MonkeyPatch, clean_environment: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", f"sqlite:///{clean_environment / 'penstock.db'}")
    refresh()
    assert destination.store() == destination.LOCAL


def test_a_spool_says_where_it_is_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = Spool(tmp_path)
    monkeypatch.setenv("PENSTOCK_API_URL", "http://127.0.0.1:1")
    refresh()
    there = Spool(tmp_path)
    assert destination.read(here.path) == ""
    assert destination.read(there.path) == "http://127.0.0.1:1"
    assert spools(tmp_path, "") == [here.path]
    assert spools(tmp_path, "http://127.0.0.1:1") == [there.path]
    assert spools(tmp_path, "http://127.0.0.1:1", "") == spools(tmp_path) == sorted([here.path, there.path])
    assert (there.path.with_suffix(".to").stat().st_mode & 0o777) == 0o600
    here.close()
    there.close()
    assert list(tmp_path.iterdir()) == []
