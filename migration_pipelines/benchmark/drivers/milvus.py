"""pymilvus: all keys by an iterator, then `get` in pages of 500; rows inserted in batches of 1,000."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from migration_pipelines.benchmark.data import Page

_READ, _WRITTEN, _KEYS = 500, 1_000, 16_384


def bare_read(store: Any, collection: str) -> int:
    """Get every record by its key, all of its fields made into Python's values."""
    with _client(store) as client:
        client.load_collection(collection)
        keys = client.query_iterator(collection, batch_size=_KEYS, output_fields=["id"])
        ids = [row["id"] for page in iter(keys.next, []) for row in page]
        keys.close()
        read = 0
        for start in range(0, len(ids), _READ):
            # Rows are decoded on being touched.
            rows = [dict(row) for row in client.get(collection, ids[start : start + _READ])]
            np.array([row["vector"] for row in rows], np.float32)
            read += len(rows)
        return read


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Insert the records as rows."""
    written = 0
    with _client(store) as client:
        for page in pages:
            columns = (page.ids, page.vectors, page.documents, page.metadatas)
            names = ("id", "vector", "document", "metadata")
            rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
            for start in range(0, len(rows), _WRITTEN):
                written += client.insert(collection, rows[start : start + _WRITTEN])["insert_count"]
    return written


@contextmanager
def _client(store: Any) -> Iterator[Any]:
    from milvus_lite.server_manager import server_manager_instance
    from pymilvus import MilvusClient

    if store.path is None:
        scheme, token = "https" if store.https else "http", store.token
        uri = f"{scheme}://{store.host}:{store.port}"
    else:
        uri, token = server_manager_instance.start_and_get_uri(store.path), None
    client = MilvusClient(uri, token=token.get_secret_value() if token else "", db_name=store.db)
    with closing(client):
        yield client
