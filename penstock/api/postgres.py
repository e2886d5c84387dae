"""What PostgreSQL needs that SQLite does not: a driver, rows in bulk, and locks between several writers.

Everybody who commits takes locks in one order, so that nobody can wait in a circle: the lock of
the schema (shared), the rows of the writers by name, then the locks of root runs by number. Two
batches about one run therefore come one after the other, whichever server or driver brings them;
batches about different runs are committed side by side.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection

from penstock.errors import ConfigurationError, MissingExtra

OLDEST = 140000  # as the server writes its version
CONNECT_TIMEOUT = 5  # seconds
RECLAIM_SECONDS = 5.0  # for one look at a table, which takes hundredths of a second
COPY_FROM = 100  # rows from which a copy is worth its two more statements

_SCHEMA_LOCK = 0x70656E73  # keys of advisory locks are shared with whatever else uses the database
_ROOT_LOCKS = 0x70656E74
_PARTITIONS = 64
_TYPES: tuple[tuple[type[Any], str], ...] = (
    (sa.LargeBinary, "bytea"),
    (sa.SmallInteger, "int2"),
    (sa.BigInteger, "int8"),
    (sa.Integer, "int4"),
    (sa.Float, "float8"),
    (sa.String, "text"),
)


def address(url: sa.URL) -> sa.URL:
    """Return the URL with the driver that penstock uses.

    Raises
    ------
    ConfigurationError
        If the driver is missing, or the URL asks for another one.
    """
    if url.drivername not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise ConfigurationError(
            f"PENSTOCK_DATABASE_URL asks for the driver {url.drivername!r}; penstock uses psycopg 3: "
            "write postgresql://…"
        )
    if importlib.util.find_spec("psycopg") is None:
        raise MissingExtra(
            "PENSTOCK_DATABASE_URL names a PostgreSQL database, and psycopg is not installed: "
            'pip install "penstock[postgres]"'
        )
    return url.set(drivername="postgresql+psycopg")


def options() -> dict[str, Any]:
    """Return the options of SQLAlchemy's engine."""
    return {
        "pool_pre_ping": True,  # a server that was restarted in between costs nobody a question
        "connect_args": {
            "connect_timeout": CONNECT_TIMEOUT,
            "application_name": "penstock",
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        },
    }


def configure(connection: DBAPIConnection, record: object) -> None:
    """Make sure of what an acknowledgement promises: the transaction survives a crash of the server."""
    cursor = connection.cursor()
    cursor.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    cursor.close()
    connection.commit()
    version = connection.info.server_version
    if version < OLDEST:
        raise ConfigurationError(
            f"The PostgreSQL server has version {version // 10000}; penstock needs 14 or newer."
        )


# -- locks ----------------------------------------------------------------------------------


def lock_schema(connection: sa.Connection, *, alone: bool) -> None:
    """Keep the tables as they are until the transaction ends; `alone`: keep everybody else out."""
    shared = "" if alone else "_shared"
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock{shared}({_SCHEMA_LOCK})")


def lock_roots(connection: sa.Connection, roots: Iterable[str]) -> None:
    """Wait for others that commit something about the same root runs, until the transaction ends."""
    places = sorted({_partition(root) for root in roots})
    if places:
        ordered = "(SELECT place FROM unnest(%(places)s::int[]) AS place ORDER BY place OFFSET 0) AS places"
        statement = f"SELECT pg_advisory_xact_lock({_ROOT_LOCKS}, place) FROM {ordered}"
        connection.exec_driver_sql(statement, {"places": places})


def _partition(root: str) -> int:
    # The last digits are random, the first are a time.
    return sum(root[-8:].encode("utf-8", "replace")) * 31 % _PARTITIONS


# -- room -----------------------------------------------------------------------------------


def reclaim(raw: Any, table: str) -> None:
    """Let later rows have the room of row versions that nobody can see any more.

    A task run is inserted when it is made and updated when it ends, and PostgreSQL keeps both versions.
    Its own vacuum comes once a minute at most: a map of a hundred thousand elements has ended by then,
    and has taken twice the room. This one looks only at pages that have changed, and not at indexes.

    Parameters
    ----------
    raw : psycopg.Connection
        Outside of any transaction.
    table : str
        One of ours.
    """
    raw.autocommit = True
    try:
        raw.execute(f"SET statement_timeout = {int(RECLAIM_SECONDS * 1000)}")
        raw.execute(f"VACUUM (SKIP_LOCKED, INDEX_CLEANUP OFF, TRUNCATE OFF) {_quoted(table)}")
    finally:
        raw.execute("RESET statement_timeout")
        raw.autocommit = False


# -- rows in bulk ---------------------------------------------------------------------------


class Copy:
    """Rows that travel in one stream to a table of the session, and from there in one statement.

    Parameters
    ----------
    name : str
        Of the rows; names the table of the session.
    table : Table
        Where they go.
    columns : sequence of str
        The columns of the rows, in their order.
    """

    def __init__(self, name: str, table: sa.Table, columns: Sequence[str], revision: str) -> None:
        self._temporary = sa.Table(
            f"penstock_{revision}_{name}",
            sa.MetaData(),
            *(sa.Column(column, table.c[column].type) for column in columns),
        )
        self._types = [_type(table.c[column].type) for column in columns]
        self._stream = f"COPY pg_temp.{self._temporary.name} ({', '.join(map(_quoted, columns))}) FROM STDIN (FORMAT binary)"
        defined = ", ".join(
            f"{_quoted(column)} {kind}" for column, kind in zip(columns, self._types, strict=True)
        )
        self._create = (
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {self._temporary.name} ({defined}) ON COMMIT DELETE ROWS"
        )

    def source(self, keys: Sequence[str]) -> sa.Select[Any]:
        """Return the query that reads the rows in the order of their keys."""
        columns = self._temporary.columns
        return sa.select(*columns).order_by(*(columns[key] for key in keys))

    def send(
        self, connection: sa.Connection, rows: Sequence[tuple[Any, ...]], *, afresh: bool = False
    ) -> None:
        """Stream rows into the table of the session, which is empty when a transaction begins.

        `afresh`: it has been used in this one.

        Raises
        ------
        sqlalchemy.exc.DBAPIError
            As SQLAlchemy would raise it.
        """
        import psycopg

        connection.exec_driver_sql(self._create)
        if afresh:
            connection.exec_driver_sql(f"TRUNCATE pg_temp.{self._temporary.name}")
        raw: Any = connection.connection.driver_connection
        try:
            with raw.cursor() as cursor, cursor.copy(self._stream) as stream:
                stream.set_types(self._types)
                for row in rows:
                    stream.write_row(row)
        except psycopg.OperationalError as error:
            raise sa.exc.OperationalError(self._stream, None, error) from error
        except Exception as error:  # some value does not fit its column; C code says it in many ways
            raise sa.exc.DataError(self._stream, None, error) from error


def _type(kind: Any) -> str:
    return next(name for known, name in _TYPES if isinstance(kind, known))


def _quoted(name: str) -> str:
    return f'"{name}"'
