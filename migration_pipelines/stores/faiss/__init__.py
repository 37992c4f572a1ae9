"""FAISS: index files with what stands beside them. The driver is `faiss`, imported where it is used."""

from __future__ import annotations

from migration_pipelines.stores.faiss.store import FaissStore

STORE = FaissStore
