"""Chroma: a folder that is opened in this process, or a server."""

from migration_pipelines.stores.chroma.store import ChromaStore

__all__ = ["STORE", "ChromaStore"]

STORE = ChromaStore
