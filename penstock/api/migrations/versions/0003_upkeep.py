"""The store remembers its upkeep, and how many log lines of a run were not kept."""

from __future__ import annotations

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
