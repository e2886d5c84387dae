"""The database of the store: connections, schema, upgrades."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import NullPool

from penstock.api import postgres
from penstock.api.models import metadata
from penstock.errors import ConfigurationError

REVISIONS = ("0001", "0002", "0003", "0004")
"""Revisions of the schema, oldest first; the last one is what `models` describes."""

BUSY_TIMEOUT = 10.0
TIDY_SHARE = 0.1  # of the time at most
OUTDATED = 5000  # rows that were updated, after which PostgreSQL gives their old versions' room away
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
        self.url = _address(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = sa.create_engine(
            self.url, **(_sqlite_options() if self.is_sqlite else postgres.options())
        )
        self.path = Path(self.url.database) if self.url.database and self.is_sqlite else None
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_immediate)
        else:
            sa.event.listen(self.engine, "connect", postgres.configure)
        self._writer: sa.Connection | None = None
        self._inode = 0
        self._statements: dict[str, tuple[str, bool]] = {}
        self._copies: dict[str, tuple[postgres.Copy, Any]] = {}
        self._copied: set[str] = set()  # in this transaction
        self._outdated: dict[str, int] = {}  # rows by table that have been updated since `tidy`
        self._tidy_at = 0.0

    @property
    def name(self) -> str:
        """What a person calls it: the path of the file, or the URL without its password."""
        return str(self.path) if self.path is not None else shown(self.url)

    # -- connections ------------------------------------------------------------------------
    def prepare(self) -> None:
        """Make the tables, or upgrade them; for the holder of the writer's lock."""
        self._writing()

    @contextlib.contextmanager
    def write(self, *, alone: bool = False) -> Iterator[sa.Connection]:
        """Run a transaction on the one connection that writes.

        Parameters
        ----------
        alone : bool
            Keep every other writer out until the end. On SQLite that is always so: there the
            caller holds the lock of the writer. On PostgreSQL several write side by side.
        """
        connection = self._writing()
        self._copied.clear()
        try:
            with connection.begin():
                if not self.is_sqlite:
                    postgres.lock_schema(connection, alone=alone)
                yield connection
        except sa.exc.DBAPIError:
            self.close_writer()  # whatever is wrong with it, the next transaction gets a fresh one
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a connection that sees one state of the database and cannot change it."""
        with self.engine.connect() as connection:
            if self.is_sqlite:
                connection = connection.execution_options(penstock_reads=True)
                connection.exec_driver_sql("PRAGMA query_only = ON")
            else:
                connection = connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            yield connection

    def _writing(self) -> sa.Connection:
        if self._writer is not None and self._inode != self._present_inode():
            self.close_writer()  # the file was removed or replaced; writing to the old one helps nobody
        if self._writer is None:
            self._writer = self.engine.connect()
            try:
                if self.is_sqlite and self._is_new():  # before the first transaction, or never
                    self._raw(self._writer).execute("PRAGMA auto_vacuum = INCREMENTAL")
                prepare(self._writer)
            except BaseException:
                self.close_writer()  # nobody writes to what was not made ready
                raise
            self._inode = self._present_inode()
        return self._writer

    def _is_new(self) -> bool:
        try:
            return self.path is None or os.stat(self.path).st_size == 0
        except OSError:
            return True

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

    def raw_writer(self) -> Any:
        """Return the driver's own connection that writes, outside of any transaction."""
        writer = self._writing()
        writer.rollback()
        return self._raw(writer)

    @staticmethod
    def _raw(connection: sa.Connection) -> Any:
        return connection.connection.driver_connection

    def lock_roots(self, connection: sa.Connection, roots: Iterable[str]) -> None:
        """Let nobody else commit something about these root runs until the transaction ends."""
        if not self.is_sqlite:
            postgres.lock_roots(connection, roots)

    def tidy(self) -> None:
        """Make room for what comes next, between two transactions, if many rows have been updated."""
        for table, count in self._outdated.items():
            begin = time.monotonic()
            if count >= OUTDATED and begin >= self._tidy_at:
                self._outdated[table] = 0
                with contextlib.suppress(Exception):  # it would have been of use, and no more than that
                    postgres.reclaim(self.raw_writer(), table)
                end = time.monotonic()
                self._tidy_at = end + (end - begin) / TIDY_SHARE

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
        if not self.is_sqlite:
            if len(statement.order) > 1:  # states, which come to rows that are there
                self._outdated[statement.table.name] = self._outdated.get(statement.table.name, 0) + len(rows)
            keys = [statement.columns.index(key) for key in statement.keys]
            if len(rows) >= postgres.COPY_FROM:
                self._copy(connection, name, statement, rows)
                return
            rows = sorted(rows, key=itemgetter(*keys))  # everybody locks rows in one order
        if name not in self._statements:
            compiled = statement.build(self.engine.dialect.name).compile(dialect=self.engine.dialect)
            assert not compiled.positional or list(compiled.positiontup or ()) == statement.columns
            self._statements[name] = (str(compiled), compiled.positional)
        text, positional = self._statements[name]
        if positional:
            connection.exec_driver_sql(text, list(rows))
        else:
            connection.exec_driver_sql(text, [dict(zip(statement.columns, row, strict=True)) for row in rows])

    def _copy(
        self, connection: sa.Connection, name: str, statement: Upsert, rows: Sequence[tuple[Any, ...]]
    ) -> None:
        if name not in self._copies:
            copy = postgres.Copy(name, statement.table, statement.columns, REVISIONS[-1])
            self._copies[name] = (
                copy,
                statement.build(self.engine.dialect.name, copy.source(statement.keys)),
            )
        copy, insert = self._copies[name]
        copy.send(connection, rows, afresh=name in self._copied)
        self._copied.add(name)
        connection.execute(insert)


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
    conflict : sequence of str
        Instead of the primary key, the columns that make a row unique.
    add, replace : str, optional
        A column whose values are added up, or which the new row replaces in any case.
    also : sequence of Upsert
        Others of the same table, whose columns are replaced by an order of their own.
    """

    def __init__(
        self,
        table: sa.Table,
        columns: Sequence[str],
        update: Sequence[str] = (),
        order: Sequence[str] = (),
        conflict: Sequence[str] = (),
        add: str | None = None,
        replace: str | None = None,
        also: Sequence[Upsert] = (),
    ) -> None:
        self.table = table
        self.keys = list(conflict) or [column.name for column in table.primary_key.columns]
        self.columns = list(columns)
        self.update = list(update)
        self.order = list(order)
        self.add = add
        self.replace = replace
        self.also = list(also)

    def build(self, dialect: str, source: sa.Select[Any] | None = None) -> Any:
        """Return the statement for a dialect: for one row, or for all rows of a source."""
        table, keys = self.table, self.keys
        insert = importlib.import_module(f"sqlalchemy.dialects.{dialect}").insert  # only the one that is used
        statement: Any = (
            insert(table).values({name: sa.bindparam(name) for name in self.columns})
            if source is None
            else insert(table).from_select(self.columns, source)
        )
        if self.add is not None:
            total = sa.func.coalesce(table.c[self.add], sa.literal_column("0")) + statement.excluded[self.add]
            return statement.on_conflict_do_update(index_elements=keys, set_={self.add: total})
        if self.replace is not None:
            changed = {self.replace: statement.excluded[self.replace]}
            return statement.on_conflict_do_update(index_elements=keys, set_=changed)
        if not self.update:
            return statement.on_conflict_do_nothing(index_elements=keys)
        new = statement.excluded
        if self.also:
            several = {
                name: sa.case((part._later(new), new[name]), else_=table.c[name])
                for part in (self, *self.also)
                for name in part.update
            }
            return statement.on_conflict_do_update(index_elements=keys, set_=several)
        changes = {name: new[name] for name in self.update}
        return statement.on_conflict_do_update(index_elements=keys, set_=changes, where=self._later(new))

    def _later(self, new: Any) -> Any:
        """Return the condition that a new row comes after the one that is there."""
        old = self.table.c
        if len(self.order) == 1:
            return sa.or_(old[self.order[0]].is_(None), new[self.order[0]] > old[self.order[0]])
        return sa.tuple_(*(new[name] for name in self.order)) > sa.tuple_(*(old[name] for name in self.order))


def _address(url: str) -> sa.URL:
    try:
        found = sa.make_url(url.replace("postgres://", "postgresql://", 1))
    except (sa.exc.ArgumentError, ValueError):
        found = None
    kind = found.get_backend_name() if found is not None else ""
    if found is None or kind not in {"sqlite", "postgresql"}:
        raise ConfigurationError(
            "PENSTOCK_DATABASE_URL is no URL of a database that penstock knows; write "
            "postgresql://USER:PASSWORD@HOST/DATABASE (signs such as @ or / in a password as %40, %2F) "
            "or sqlite:///PATH."
        )
    return postgres.address(found) if kind == "postgresql" else found


def shown(url: sa.URL) -> str:
    """Return a URL as it may be printed."""
    return url.set(query={}).render_as_string(hide_password=True)


def _sqlite_options() -> dict[str, Any]:
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

    A SQLite file belongs to one person, and whoever opens it to write holds its lock: it is
    upgraded at once. A database on a server may be shared by others with an older penstock: it is
    upgraded by ``penstock db upgrade`` alone.

    Raises
    ------
    ConfigurationError
        If the schema is newer, or older and not ours to upgrade.
    """
    version = schema_version(connection)
    if version == REVISIONS[-1]:
        return
    if version is None and not has_tables(connection):
        create(connection)
        return
    _refuse_newer(connection, version)
    if connection.dialect.name != "sqlite":
        raise ConfigurationError(
            f"The store {shown(connection.engine.url)} has the older schema {version}, and this penstock writes "
            f"{REVISIONS[-1]}; run `penstock db upgrade` once, after every penstock that uses it is up to date."
        )
    upgrade(connection)


def _refuse_newer(connection: sa.Connection, version: str | None) -> None:
    if version is not None and version not in REVISIONS:
        raise ConfigurationError(
            f"The store {shown(connection.engine.url)} was written by a newer penstock (schema {version}, "
            f"this one knows {REVISIONS[-1]}); install that version and run `penstock db upgrade` there, or set "
            "PENSTOCK_HOME to another directory."
        )


def has_tables(connection: sa.Connection) -> bool:
    """Whether tables of ours are there; a database of a server may hold those of others."""
    found = set(sa.inspect(connection).get_table_names())
    connection.rollback()
    return bool(
        found if connection.dialect.name == "sqlite" else found & {*metadata.tables, VERSION_TABLE.name}
    )


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
        if connection.dialect.name != "sqlite":
            postgres.lock_schema(connection, alone=True)
            if sa.inspect(connection).has_table(VERSION_TABLE.name):
                return  # somebody else was faster
        metadata.create_all(connection, checkfirst=False)
        VERSION_TABLE.create(connection)
        connection.execute(VERSION_TABLE.insert().values(version_num=REVISIONS[-1]))
    path = connection.engine.url.database
    if connection.dialect.name == "sqlite" and path:
        os.chmod(path, 0o600)


def recreate(database: Database) -> None:
    """Drop our tables in a database of a server, whatever their schema, and make them anew."""
    with database.engine.connect() as connection:
        with connection.begin():
            postgres.lock_schema(connection, alone=True)
            metadata.drop_all(connection)
            VERSION_TABLE.drop(connection, checkfirst=True)
        create(connection)


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
    """Bring the tables of an older penstock to the present schema, all in one transaction.

    Raises
    ------
    ConfigurationError
        If a newer penstock has written the database.
    """
    _refuse_newer(connection, schema_version(connection))
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    with connection.begin():
        if connection.dialect.name != "sqlite":
            postgres.lock_schema(connection, alone=True)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
