"""Requests to running drivers; runs that are not over are found at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("root", sa.String(32), nullable=False),
        sa.Column("run", sa.String(32), nullable=False),
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
