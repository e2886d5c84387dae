"""The record is folded anew, pruned, reset and upgraded, by functions and by commands."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as examples

from penstock import settings
from penstock.api import db, embedded, queries, upkeep
from penstock.api.commands import COMMANDS
from penstock.api.db import Database
from penstock.api.ingest import ingest
from penstock.api.models import events, leases, metadata, requests, writers
from penstock.engine.events import Event, new_id
from penstock.engine.spool import Batch
from penstock.errors import ConfigurationError, StoreUnavailable
from tests.integration.test_ingest import histories
from tests.postgres import Server
from tests.story import Flow, batch, count_events, current, empty, hurry, story

DAY = upkeep.DAY


def command(*words: str, stdin: str = "") -> tuple[int, str, str]:
    program = [sys.executable, "-c", "from penstock.cli import main; main()", *words]
    done = subprocess.run(program, input=stdin, capture_output=True, text=True, check=False, timeout=100)
    return done.returncode, done.stdout, done.stderr


# -- rebuild --------------------------------------------------------------------------------


def test_what_is_folded_anew_is_what_was_there(database: Database) -> None:
    ingest(database, [batch(story().events)])
    with database.write() as connection:  # an owner that came too late stays too late
        connection.execute(leases.insert().values(root=story().root, epoch=2, holder="b" * 32, renewed=0.0))
    late = Flow()
    late.state(late.root, "FAILED", of="flow", message="late")
    ingest(database, [batch([*late.events], "c" * 32), Batch("d" * 32, 1, [b"\xc1"])])
    with database.write() as connection:
        connection.execute(leases.delete())
    before = current(database)
    assert before["dropped_lines"] == [(story().root, 2)]
    assert upkeep.rebuild(database) == len(story().events)
    assert current(database) == before


def test_what_was_asked_for_survives_folding_and_goes_with_its_run(database: Database) -> None:
    run = story().root
    told(database, "a" * 32, run, 5.0)
    made = [COMMANDS["ask"](database, run=run, kind="cancel", by=by) for by in ("me", "you")]
    heard = Flow(run)
    for request in (made[0], new_id()):  # of the other one the store knows from the driver only
        heard.add("request", run, id=request, what="cancel", outcome="asked to stop")
    ingest(database, [batch(heard.events, "b" * 32)])
    before, asked = current(database), rows_of(database, requests)
    assert [(row.by, row.outcome) for row in asked if row.id in made] == [
        ("me", "asked to stop"),
        ("you", None),
    ]
    upkeep.rebuild(database)
    assert (current(database), rows_of(database, requests)) == (before, asked)
    with database.write() as connection:
        connection.execute(writers.update().values(seen=0.0))
    assert upkeep.prune(database, 10.0).runs == 1
    assert rows_of(database, requests) == []


def rows_of(database: Database, table: sa.Table) -> list[sa.Row[tuple[object, ...]]]:
    with database.read() as connection:
        return list(connection.execute(sa.select(table).order_by(table.c.id)))


@given(found=histories())
@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_is_folded_anew_to_the_same(database: Database, found: list[Event]) -> None:
    hurry(database)
    empty(database)
    for place in range(0, len(found), 3):
        ingest(database, [batch(found[place : place + 3], first=place + 1)])
    before = current(database)
    upkeep.rebuild(database)
    assert current(database) == before


def test_large_pages_are_folded_one_after_the_other(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Flow()  # of each page so many rows that they travel in bulk
    runs = [new_id() for _ in range(300)]
    for run in runs:
        flow.add("task_run", run, flow_run=flow.root, task="t", name="t")
    for kind in ("RUNNING", "COMPLETED"):
        for run in runs:
            flow.state(run, kind)
    ingest(database, [batch(flow.events)])
    before = current(database)
    monkeypatch.setattr(upkeep, "PAGE", 300)
    assert upkeep.rebuild(database) == len(flow.events)
    assert current(database) == before


def test_folding_anew_goes_page_by_page(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "PAGE", 3)
    ingest(database, [batch(story().events), batch(story().events, "b" * 32)])
    before = current(database)
    with database.write() as connection:  # what somebody changed by hand
        connection.execute(metadata.tables["task_runs"].update().values(state_name="Broken"))
    assert upkeep.rebuild(database) == 2 * len(story().events)
    assert current(database) == before


# -- prune ----------------------------------------------------------------------------------


def told(database: Database, writer: str, root: str, ended: float | None, *, seen: float = 0.0) -> None:
    """A flow run with a task, a map and a log; it ended at some time, or not."""
    made = Flow(root)
    made.add("flow_run", root, flow="f", name=root[-4:])
    made.add("task_run", new_id(), flow_run=root, task="t", name="t")
    made.add("map_run", new_id(), flow_run=root, task="m", name="m", count=3)
    made.add("log", root, lines=[[1.0, "INFO", "said"]], dropped=1)
    if ended is not None:
        body = {"of": "flow", "type": "COMPLETED", "name": "Completed"}
        made.events.append(Event("state", root, root, ended, body, 1, 1, 2, len(made.events) + 1))
    ingest(database, [batch(made.events, writer)])
    with database.write() as connection:
        connection.execute(writers.update().where(writers.c.writer == writer).values(seen=seen))


def counted(database: Database) -> dict[str, int]:
    with database.read() as connection:
        count = sa.select(sa.func.count())
        return {
            name: connection.execute(count.select_from(table)).scalar() or 0
            for name, table in metadata.tables.items()
            if name != "upkeep"
        }


def test_runs_that_ended_long_ago_are_forgotten_whole(database: Database) -> None:
    now = time.time()
    old, recent, unfinished, odd = (f"{number:032x}" for number in range(1, 5))
    told(database, "a" * 32, recent, now - DAY, seen=now)
    kept = counted(database)
    told(database, "b" * 32, old, now - 40 * DAY, seen=now - 40 * DAY)
    assert upkeep.prune(database, now - 30 * DAY) == upkeep.Pruned(1, finished=True)
    assert counted(database) == kept
    told(database, "c" * 32, unfinished, None, seen=now - 40 * DAY)
    told(database, "d" * 32, odd, 5.0, seen=now)  # its clock was wrong, it came a moment ago
    assert upkeep.prune(database, now - 30 * DAY).runs == 0
    with database.read() as connection:
        assert [run["id"] for run in queries.list_runs(connection)] == [odd, unfinished, recent]
        assert queries.get_logs(connection, recent)["lines"] != []
    before = current(database)
    upkeep.rebuild(database)
    assert current(database) == before


def test_tasks_outside_of_flows_are_forgotten_when_all_elements_have_ended(database: Database) -> None:
    alone, map_id = new_id(), new_id()
    single, many = Flow(alone), Flow(map_id)
    single.add("task_run", alone, task="t", name="t")
    single.state(alone, "COMPLETED")
    many.add("map_run", map_id, task="m", name="m", count=2)
    many.states(map_id, "COMPLETED", [0], time=[5.0])
    ingest(database, [batch(single.events), batch(many.events, "b" * 32)])
    assert upkeep.prune(database, time.time() + 1).runs == 1
    many.states(map_id, "COMPLETED", [1], time=[5.0])
    ingest(database, [batch(many.events[2:], "b" * 32, first=3)])
    assert upkeep.prune(database, time.time() + 1).runs == 1
    assert set(counted(database).values()) == {0}


def test_what_is_forgotten_gives_its_room_back(home: Path, sqlite_database: Database) -> None:
    for number in range(40):
        told(sqlite_database, f"{number:032x}", f"{number:032x}", 5.0)
        with sqlite_database.write() as connection:
            connection.execute(events.update().values(data=os.urandom(20_000)))
    upkeep.give_back_space(sqlite_database)
    full = (home / "penstock.db").stat().st_size
    upkeep.prune(sqlite_database, time.time())
    upkeep.give_back_space(sqlite_database)
    assert (home / "penstock.db").stat().st_size < full / 4
    assert not upkeep.is_damaged(sqlite_database)


def test_the_retention_is_kept_once_a_day(
    database: Database, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten() -> bool:
        with embedded.reading(home) as connection:
            return not queries.list_runs(connection)

    told(database, "a" * 32, "1" * 32, 5.0)
    monkeypatch.setenv("PENSTOCK_RETENTION", "never")
    settings.refresh()
    assert not forgotten()
    monkeypatch.setenv("PENSTOCK_RETENTION", "30d")
    settings.refresh()
    assert forgotten()
    told(database, "b" * 32, "2" * 32, 5.0)
    assert not forgotten()  # not due again today
    with database.write() as connection:
        connection.execute(metadata.tables["upkeep"].update().values(done=time.time() - 2 * DAY))
    assert forgotten()


def test_a_long_retention_round_goes_on_later(database: Database) -> None:
    for number in range(5):
        told(database, f"{number:032x}", f"{number:032x}", 5.0)
    assert upkeep.retain(database, 30, seconds=0.0) == upkeep.Pruned(0, finished=False)
    done = upkeep.retain(database, 30, seconds=60.0)
    assert done == upkeep.Pruned(5, finished=True)
    assert upkeep.retain(database, 30, seconds=60.0) is None


# -- commands -------------------------------------------------------------------------------


def test_the_commands(database: Database, home: Path) -> None:
    told(database, "a" * 32, "1" * 32, 5.0)
    told(database, "b" * 32, "2" * 32, time.time(), seen=time.time())
    assert command("db", "upgrade") == (0, f"{database.name} has schema {db.REVISIONS[-1]} already\n", "")
    code, out, err = command("db", "rebuild")
    assert (code, err) == (0, "")
    assert out.startswith("folded ")
    assert command("db", "prune", "--older-than", "30d")[1] == "forgot 1 run that ended more than 30d ago\n"
    code, _, err = command("db", "prune", "--older-than", "soon")
    assert (code, err) == (2, "penstock: --older-than 'soon' is no length of time such as 30d, 36h or 2w.\n")
    assert count_events(database) == 5
    code, _, err = command("db", "reset")
    assert code == 1
    assert "--yes does it without a question" in err
    assert command("db", "reset", stdin="n\n")[0] == 1
    assert count_events(database) == 5
    assert command("db", "reset", stdin="y\n")[0] == 0
    assert count_events(database) == 0
    assert ingest(database, [batch(story().events)]) == {"a" * 32: len(story().events)}
    assert command("db", "reset", "--yes") == (0, f"{database.name} is empty\n", "")
    assert count_events(database) == 0


def test_another_process_that_writes_is_named(home: Path, sqlite_database: Database) -> None:
    with embedded.writing(home), pytest.raises(StoreUnavailable, match="Another process"):
        with embedded.writing(home, patience=0.1):
            pass


# -- schemas --------------------------------------------------------------------------------


def test_a_record_of_an_older_penstock_is_upgraded_with_all_that_is_in_it(database: Database) -> None:
    ingest(database, [batch(story().events)])
    expected = current(database)
    with database.write(alone=True) as connection:  # as the second revision left it
        connection.exec_driver_sql("DROP TABLE requests")
        connection.exec_driver_sql("DROP INDEX ix_flow_runs_rank")
        connection.exec_driver_sql("DROP TABLE upkeep")
        connection.exec_driver_sql("DROP TABLE dropped_lines")
        connection.exec_driver_sql("DROP INDEX ix_events_root_kind")
        connection.exec_driver_sql("CREATE INDEX ix_events_logs ON events (root) WHERE kind = 'log'")
        connection.execute(db.VERSION_TABLE.update().values(version_num="0002"))
    database.close_writer()
    assert upkeep.upgrade(database) == ("0002", db.REVISIONS[-1])
    assert current(database) == expected
    assert upkeep.upgrade(database) == (db.REVISIONS[-1], db.REVISIONS[-1])


def test_an_older_schema_on_a_server_is_for_db_upgrade(postgres_server: Server, home: Path) -> None:
    url = postgres_server.new_database()
    database = Database(url)
    with database.engine.connect() as connection:
        with connection.begin():
            db.VERSION_TABLE.create(connection)
            connection.exec_driver_sql("CREATE TABLE somebody_elses (x int)")
        with pytest.raises(ConfigurationError, match=r"older schema None.*`penstock db upgrade`"):
            db.prepare(connection)
    assert upkeep.upgrade(database) == (None, db.REVISIONS[-1])
    with database.read() as connection:
        assert db.schema_version(connection) == db.REVISIONS[-1]
        from alembic.autogenerate import compare_metadata
        from alembic.migration import MigrationContext

        (alone,) = compare_metadata(MigrationContext.configure(connection), metadata)
        assert alone[0] == "remove_table"
        assert alone[1].name == "somebody_elses"
    database.close()
    postgres_server.drop(url)


def test_a_database_of_others_gets_our_tables_beside_theirs(postgres_server: Server) -> None:
    url = postgres_server.new_database()
    database = Database(url)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE somebody_elses (x int)")
    database.prepare()
    assert ingest(database, [batch(story().events)])["a" * 32] == len(story().events)
    database.close()
    db.recreate(database)
    with database.engine.connect() as connection:
        assert sa.inspect(connection).has_table("somebody_elses")
    database.close()
    postgres_server.drop(url)


def test_the_urls_that_people_write() -> None:
    for text in ("postgres://u@h/d", "postgresql://u@h/d", "postgresql+psycopg://u@h/d"):
        assert Database(text).url.drivername == "postgresql+psycopg"
    for text in ("mysql://u:pw@h/d", "nonsense pw", "postgresql+asyncpg://u:pw@h/d"):
        with pytest.raises(ConfigurationError) as caught:
            Database(text)
        assert "pw" not in str(caught.value)


def test_a_missing_driver_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "penstock\[postgres\]"'):
        Database("postgresql://u@h/d")
