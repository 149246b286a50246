"""The schema's numbered steps, applied by Alembic; ``store.schema`` runs them."""
