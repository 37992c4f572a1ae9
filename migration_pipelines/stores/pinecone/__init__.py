"""Pinecone: the hosted service, or anything that speaks its protocol."""

from migration_pipelines.stores.pinecone.store import PineconeStore

__all__ = ["STORE", "PineconeStore"]

STORE = PineconeStore
