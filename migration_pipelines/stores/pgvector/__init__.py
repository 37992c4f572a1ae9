"""PostgreSQL with the extension pgvector."""

from migration_pipelines.stores.pgvector.store import PgVectorStore

__all__ = ["STORE", "PgVectorStore"]

STORE = PgVectorStore
