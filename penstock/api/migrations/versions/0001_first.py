"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

RUN_ID = sa.String(length=32).with_variant(sa.String(length=32, collation="C"), "postgresql")
WORD = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("writer", sa.Integer(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("run", RUN_ID, nullable=False),
        sa.Column("root", RUN_ID, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.SmallInteger(), nullable=False),
        sa.Column("rseq", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.SmallInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("writer", "seq"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_events_logs",
        "events",
        ["root"],
        unique=False,
        sqlite_where=sa.text("kind = 'log'"),
        postgresql_where=sa.text("kind = 'log'"),
    )
    op.create_index(op.f("ix_events_run"), "events", ["run"], unique=False)
    op.create_table(
        "flow_runs",
        sa.Column("id", RUN_ID, nullable=False),
        sa.Column("root", RUN_ID, nullable=False),
        sa.Column("parent_flow_run", RUN_ID, nullable=True),
        sa.Column("parent_task_run", RUN_ID, nullable=True),
        sa.Column("flow", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=True),
        sa.Column("parameters", sa.Text(), nullable=True),
        sa.Column("runner", sa.Text(), nullable=True),
        sa.Column("host", sa.Text(), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("python", sa.Text(), nullable=True),
        sa.Column("penstock", sa.Text(), nullable=True),
        sa.Column("created", sa.Float(), nullable=True),
        sa.Column("made", sa.BigInteger(), nullable=True),
        sa.Column("backend", sa.Text(), nullable=True),
        sa.Column("backend_order", sa.BigInteger(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.SmallInteger(), nullable=False),
        sa.Column("rseq", sa.BigInteger(), nullable=False),
        sa.Column("state_name", WORD, nullable=False),
        sa.Column("state_type", sa.String(length=16), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("cause", sa.Text(), nullable=True),
        sa.Column("state_time", sa.Float(), nullable=True),
        sa.Column("started", sa.Float(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("error_type", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_text", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_flow_runs_root"), "flow_runs", ["root"], unique=False)
    op.create_table(
        "leases",
        sa.Column("root", RUN_ID, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("holder", RUN_ID, nullable=False),
        sa.Column("renewed", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("root"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "maps",
        sa.Column("id", RUN_ID, nullable=False),
        sa.Column("start", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("root", RUN_ID, nullable=False),
        sa.Column("flow_run", RUN_ID, nullable=True),
        sa.Column("parent", RUN_ID, nullable=True),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=True),
        sa.Column("parameters", sa.Text(), nullable=True),
        sa.Column("upstream", sa.Text(), nullable=True),
        sa.Column("upstream_maps", sa.Text(), nullable=True),
        sa.Column("created", sa.Float(), nullable=True),
        sa.Column("made", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", "start"),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_maps_flow_run"), "maps", ["flow_run"], unique=False)
    op.create_table(
        "task_runs",
        sa.Column("id", RUN_ID, nullable=False),
        sa.Column("root", RUN_ID, nullable=False),
        sa.Column("flow_run", RUN_ID, nullable=True),
        sa.Column("parent", RUN_ID, nullable=True),
        sa.Column("map", RUN_ID, nullable=True),
        sa.Column("element", sa.Integer(), nullable=True),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=True),
        sa.Column("parameters", sa.Text(), nullable=True),
        sa.Column("upstream", sa.Text(), nullable=True),
        sa.Column("child_flow_run", RUN_ID, nullable=True),
        sa.Column("created", sa.Float(), nullable=True),
        sa.Column("made", sa.BigInteger(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.SmallInteger(), nullable=False),
        sa.Column("rseq", sa.BigInteger(), nullable=False),
        sa.Column("state_name", WORD, nullable=False),
        sa.Column("state_type", sa.String(length=16), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("cause", sa.Text(), nullable=True),
        sa.Column("state_time", sa.Float(), nullable=True),
        sa.Column("started", sa.Float(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("error_type", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_text", sa.Text(), nullable=True),
        sa.Column("nbytes", sa.BigInteger(), nullable=True),
        sa.Column("peak", sa.BigInteger(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        op.f("ix_task_runs_flow_run_state_type"), "task_runs", ["flow_run", "state_type"], unique=False
    )
    op.create_table(
        "writers",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("writer", RUN_ID, nullable=False),
        sa.Column("acknowledged", sa.BigInteger(), nullable=False),
        sa.Column("seen", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("writer", name=op.f("uq_writers_writer")),
    )
