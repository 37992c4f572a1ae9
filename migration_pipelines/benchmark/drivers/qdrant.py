"""qdrant-client: scroll in pages of 1,000; columns (`Batch`) of 1,000 upserted."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import Any

import numpy as np

from migration_pipelines.benchmark.data import Page

_PAGE = 1_000


def bare_read(store: Any, collection: str) -> int:
    """Scroll through every point, its vector as float32."""
    read, offset = 0, None
    with closing(_client(store)) as client:
        while True:
            points, offset = client.scroll(
                collection, limit=_PAGE, offset=offset, with_payload=True, with_vectors=True
            )
            np.array([point.vector for point in points], np.float32)
            read += len(points)
            if offset is None:
                return read


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Upsert the records under integer ids, each 1,000 waited for."""
    from qdrant_client.models import Batch

    written = 0
    with closing(_client(store)) as client:
        for page in pages:
            for start in range(0, len(page.ids), _PAGE):
                at = slice(start, start + _PAGE)
                payloads = [
                    {**fields, "document": text}
                    for fields, text in zip(page.metadatas[at], page.documents[at], strict=True)
                ]
                ids = list(range(written, written + len(payloads)))
                columns = Batch(ids=ids, vectors=page.vectors[at].tolist(), payloads=payloads)
                client.upsert(collection, columns, wait=True)
                written += len(payloads)
    return written


def _client(store: Any) -> Any:
    from qdrant_client import QdrantClient

    if store.path is not None:
        store.close()  # only one client may have a folder open
        return QdrantClient(path=store.path)
    key = store.api_key.get_secret_value() if store.api_key else None
    return QdrantClient(host=store.host, port=store.port, https=store.https, api_key=key, timeout=60)
