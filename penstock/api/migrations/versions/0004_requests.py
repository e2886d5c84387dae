"""Requests to running drivers; runs that are not over are found at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

RUN_ID = sa.String(length=32).with_variant(sa.String(length=32, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("id", RUN_ID, nullable=False),
        sa.Column("root", RUN_ID, nullable=False),
        sa.Column("run", RUN_ID, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("by", sa.Text(), nullable=True),
        sa.Column("made", sa.Float(), nullable=True),
        sa.Column("settled", sa.Float(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    unsettled = sa.text("settled IS NULL")
    op.create_index(
        "ix_requests_open", "requests", ["root"], sqlite_where=unsettled, postgresql_where=unsettled
    )
    not_over = sa.text("rank < 2")
    op.create_index("ix_flow_runs_rank", "flow_runs", ["rank"], sqlite_where=not_over, postgresql_where=not_over)
