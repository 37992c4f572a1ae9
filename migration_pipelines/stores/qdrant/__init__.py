"""Qdrant: a server, or the client's local mode over a folder or in this process's memory."""

from migration_pipelines.stores.qdrant.store import QdrantStore

__all__ = ["STORE", "QdrantStore"]

STORE = QdrantStore
