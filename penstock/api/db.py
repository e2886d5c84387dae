"""The database of the store: connections, schema, upgrades."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import NullPool

from penstock.api.models import metadata
from penstock.errors import ConfigurationError

REVISIONS = ("0001", "0002", "0003")
"""Revisions of the schema, oldest first; the last one is what `models` describes."""

BUSY_TIMEOUT = 10.0
VERSION_TABLE = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), primary_key=True, nullable=False),
)


class Database:
    """One database and the connections to it.

    Parameters
    ----------
    url : str
        As SQLAlchemy writes it.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url = sa.make_url(url)
            self.engine = sa.create_engine(self.url, **_options(self.url))
        except (sa.exc.ArgumentError, ImportError) as error:
            raise ConfigurationError(f"PENSTOCK_DATABASE_URL cannot be used: {error}.") from None
        self.path = Path(self.url.database) if self.url.database and self._is_sqlite else None
        if self._is_sqlite:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_immediate)
        self._writer: sa.Connection | None = None
        self._inode = 0
        self._statements: dict[str, tuple[str, bool]] = {}

    @property
    def _is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    # -- connections ------------------------------------------------------------------------
    def prepare(self) -> None:
        """Make the tables, or upgrade them; for the holder of the writer's lock."""
        self._writing()

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Run a transaction on the one connection that writes; for the holder of the writer's lock."""
        connection = self._writing()
        try:
            with connection.begin():
                yield connection
        except sa.exc.DBAPIError:
            self.close_writer()  # whatever is wrong with it, the next transaction gets a fresh one
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a connection that sees one state of the database and cannot change it."""
        with self.engine.connect() as connection:
            connection = connection.execution_options(penstock_reads=True)
            if self._is_sqlite:
                connection.exec_driver_sql("PRAGMA query_only = ON")
            yield connection

    def _writing(self) -> sa.Connection:
        if self._writer is not None and self._inode != self._present_inode():
            self.close_writer()  # the file was removed or replaced; writing to the old one helps nobody
        if self._writer is None:
            self._writer = self.engine.connect()
            prepare(self._writer)
            self._inode = self._present_inode()
        return self._writer

    def _present_inode(self) -> int:
        try:
            return os.stat(self.path).st_ino if self.path is not None else 0
        except OSError:
            return -1

    def close_writer(self) -> None:
        """Close the connection that writes; the next transaction opens another one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(sa.exc.SQLAlchemyError):
                writer.close()

    def close(self) -> None:
        """Close every connection."""
        self.close_writer()
        self.engine.dispose()

    # -- statements -------------------------------------------------------------------------
    def upsert(
        self, connection: sa.Connection, name: str, statement: Upsert, rows: Sequence[tuple[Any, ...]]
    ) -> None:
        """Execute an insert once per row; it is compiled once per database.

        Rows go to the driver as they are: SQLAlchemy's treatment of parameters would take as long
        as SQLite takes for the insert.
        """
        if not rows:
            return
        if name not in self._statements:
            compiled = statement.build(self.engine.dialect.name).compile(dialect=self.engine.dialect)
            assert not compiled.positional or list(compiled.positiontup or ()) == statement.columns
            self._statements[name] = (str(compiled), compiled.positional)
        text, positional = self._statements[name]
        if positional:
            connection.exec_driver_sql(text, list(rows))
        else:
            connection.exec_driver_sql(text, [dict(zip(statement.columns, row, strict=True)) for row in rows])


class Upsert:
    """An insert that changes an existing row only if the new one comes later in some order.

    Parameters
    ----------
    table : Table
        Where to insert; conflicts are those of its primary key.
    columns : sequence of str
        The columns of the rows, in their order.
    update : sequence of str
        Columns that a later row replaces; with none of them an existing row stays.
    order : sequence of str
        Columns that tell which of two rows is the later one; NULL comes first.
    """

    def __init__(
        self, table: sa.Table, columns: Sequence[str], update: Sequence[str] = (), order: Sequence[str] = ()
    ) -> None:
        self.table = table
        self.columns = list(columns)
        self.update = list(update)
        self.order = list(order)

    def build(self, dialect: str) -> Any:
        """Return the statement for a dialect."""
        table, keys = self.table, list(self.table.primary_key.columns)
        insert = importlib.import_module(f"sqlalchemy.dialects.{dialect}").insert  # only the one that is used
        statement: Any = insert(table).values({name: sa.bindparam(name) for name in self.columns})
        if not self.update:
            return statement.on_conflict_do_nothing(index_elements=keys)
        new = statement.excluded
        if len(self.order) == 1:
            old = table.c[self.order[0]]
            later: Any = sa.or_(old.is_(None), new[self.order[0]] > old)
        else:
            later = sa.tuple_(*(new[name] for name in self.order)) > sa.tuple_(
                *(table.c[name] for name in self.order)
            )
        changes = {name: new[name] for name in self.update}
        return statement.on_conflict_do_update(index_elements=keys, set_=changes, where=later)


def _options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() != "sqlite":
        return {}
    # Connections are few and long-lived, and their threads are ours: a pool would only hide them.
    return {"poolclass": NullPool, "connect_args": {"timeout": BUSY_TIMEOUT, "check_same_thread": False}}


def _configure_sqlite(connection: DBAPIConnection, record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA temp_store = MEMORY")
    cursor.close()


def _begin_immediate(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later could fail half-way; this one waits at its begin.
    reads = connection.get_execution_options().get("penstock_reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


# -- schema ---------------------------------------------------------------------------------


def prepare(connection: sa.Connection) -> None:
    """Make the tables of a new database, upgrade an old one, refuse one from the future.

    The caller holds the lock of the writer, so that nobody else does the same.

    Raises
    ------
    ConfigurationError
        If a newer penstock has written the database.
    """
    version = schema_version(connection)
    if version == REVISIONS[-1]:
        return
    if version is None and not sa.inspect(connection).get_table_names():
        create(connection)
        return
    connection.rollback()
    if version is not None and version not in REVISIONS:
        raise ConfigurationError(
            f"The store {connection.engine.url.render_as_string()} was written by a newer penstock (schema {version}, "
            f"this one knows {REVISIONS[-1]}); install that version, or set PENSTOCK_HOME to another directory."
        )
    upgrade(connection)


def schema_version(connection: sa.Connection) -> str | None:
    """Return the revision of the schema, None if the database has none."""
    present = sa.inspect(connection).has_table(VERSION_TABLE.name)
    version = connection.execute(sa.select(VERSION_TABLE)).scalar() if present else None
    connection.rollback()
    return version


def create(connection: sa.Connection) -> None:
    """Make all tables in an empty database; Alembic, which is slow to import, is not needed for it."""
    connection.rollback()
    if connection.dialect.name == "sqlite":
        _switch_to_wal(connection)
    with connection.begin():
        metadata.create_all(connection, checkfirst=False)
        VERSION_TABLE.create(connection)
        connection.execute(VERSION_TABLE.insert().values(version_num=REVISIONS[-1]))
    path = connection.engine.url.database
    if connection.dialect.name == "sqlite" and path:
        os.chmod(path, 0o600)


def _switch_to_wal(connection: sa.Connection) -> None:
    raw = connection.connection.driver_connection
    assert raw is not None
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            raw.execute("PRAGMA journal_mode = WAL")
        except Exception:  # the driver's OperationalError; its busy timeout does not cover this step
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def upgrade(connection: sa.Connection) -> None:
    """Bring the tables of an older penstock to the present schema, all in one transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    with connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
