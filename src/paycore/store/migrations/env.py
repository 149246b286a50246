"""Alembic's entry: runs the steps on the connection that ``store.schema`` hands over, in its transaction."""

from alembic import context

from paycore.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # A step that dies half-way leaves nothing behind: SQLite can roll DDL back, which Alembic does not assume.
    transactional_ddl=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
