"""The store remembers its upkeep, and how many log lines of a run were not kept."""

from __future__ import annotations

import msgpack
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

RUN_ID = sa.String(length=32).with_variant(sa.String(length=32, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "upkeep",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("done", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "dropped_lines",
        sa.Column("root", RUN_ID, nullable=False),
        sa.Column("lines", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("root"),
        sqlite_with_rowid=False,
    )
    op.drop_index("ix_events_logs", "events")
    op.create_index(op.f("ix_events_root_kind"), "events", ["root", "kind"], unique=False)
    _sum_up()


def _sum_up() -> None:
    """Count what the logs of earlier runs lack, as they would be counted today."""
    connection = op.get_bind()
    columns: list[sa.ColumnClause[object]] = [sa.column(name) for name in ("root", "data", "kind", "verdict")]
    logs = sa.select(*columns[:2]).select_from(sa.table("events", *columns))
    found: dict[str, int] = {}
    for row in connection.execute(logs.where(columns[2] == "log", columns[3] == 0)):
        root = str(row[0])
        dropped = int(msgpack.unpackb(row[1], raw=False, strict_map_key=False)[4].get("dropped") or 0)
        if dropped > 0:
            found[root] = found.get(root, 0) + dropped
    if found:
        table = sa.table("dropped_lines", sa.column("root"), sa.column("lines"))
        connection.execute(table.insert(), [{"root": root, "lines": lines} for root, lines in found.items()])
