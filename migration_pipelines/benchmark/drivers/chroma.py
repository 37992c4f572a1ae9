"""chromadb's client: all ids first, then pages by id; pages of 5,000 added."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from migration_pipelines.benchmark.data import Page

_PAGE = 250  # the fastest that was found: smaller and larger ones are slower


def bare_read(store: Any, collection: str) -> int:
    """Read every record in pages by id, its vectors as float32."""
    handle = _client(store).get_collection(collection, embedding_function=None)
    ids = handle.get(include=[])["ids"]
    for at in range(0, len(ids), _PAGE):
        page = handle.get(ids=ids[at : at + _PAGE], include=["documents", "metadatas", "embeddings"])
        np.asarray(page["embeddings"]).astype(np.float32)
    return len(ids)


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Add the records in pages of 5,000."""
    handle = _client(store).get_collection(collection, embedding_function=None)
    written = 0
    for page in pages:
        handle.add(ids=page.ids, embeddings=page.vectors, documents=page.documents, metadatas=page.metadatas)
        written += len(page.ids)
    return written


def _client(store: Any) -> Any:
    import chromadb
    from chromadb.config import Settings

    if store.path is not None:
        # A process may open a folder with one set of settings only: these are the store's.
        return chromadb.PersistentClient(str(Path(store.path)), Settings(anonymized_telemetry=False))
    return chromadb.HttpClient(host=store.host, port=store.port)
