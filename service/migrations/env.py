"""What Alembic runs to migrate: on the connection that `service.schema` hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from service.tables import metadata

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite's too: our transactions are begun by ourselves, not by its driver
    render_as_batch=attributes.get("render_as_batch", True),
)
with context.begin_transaction():
    context.run_migrations()
