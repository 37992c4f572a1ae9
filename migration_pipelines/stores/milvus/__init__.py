"""Milvus: a server, or a folder of Milvus Lite that is opened in this process."""

from migration_pipelines.stores.milvus.store import MilvusStore

__all__ = ["STORE", "MilvusStore"]

STORE = MilvusStore
