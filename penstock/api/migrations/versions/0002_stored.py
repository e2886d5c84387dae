"""Task runs know where their result was stored."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("task_runs", sa.Column("stored", sa.Text(), nullable=True))
