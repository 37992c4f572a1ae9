"""Weaviate: collections of a server, read and written over gRPC."""

from migration_pipelines.stores.weaviate.store import WeaviateStore

__all__ = ["STORE", "WeaviateStore"]

STORE = WeaviateStore
