"""Alembic's entry: `penstock.api.db.upgrade` hands over the connection."""

from __future__ import annotations

from alembic import context

from penstock.api.models import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
