"""weaviate-client: its iterator in pages of 1,000; `insert_many` of 1,000 objects."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np

from migration_pipelines.benchmark.data import Page

_PAGE = 1_000


def bare_read(store: Any, collection: str) -> int:
    """Go through every object with its properties and vector, as float32."""
    with _collection(store, collection) as found:
        read = 0
        for item in found.iterator(include_vector=True, cache_size=_PAGE):
            np.array(item.vector["default"], np.float32)
            read += 1
        return read


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Insert the records under UUIDs, 1,000 at a time."""
    from weaviate.classes.data import DataObject

    written = 0
    with _collection(store, collection) as found:
        for page in pages:
            for start in range(0, len(page.ids), _PAGE):
                at = slice(start, start + _PAGE)
                rows = zip(page.metadatas[at], page.documents[at], page.vectors[at].tolist(), strict=True)
                objects = [
                    DataObject(
                        uuid=uuid.UUID(int=written + n),
                        properties={**fields, "document": text},
                        vector={"default": vector},
                    )
                    for n, (fields, text, vector) in enumerate(rows)
                ]
                if found.data.insert_many(objects).has_errors:
                    raise RuntimeError(f"{collection}: not every object was inserted")
                written += len(objects)
    return written


@contextmanager
def _collection(store: Any, name: str) -> Any:
    import weaviate
    from weaviate.classes.init import Auth

    client = weaviate.connect_to_custom(
        store.host,
        store.port,
        store.https,
        store.grpc_host or store.host,
        store.grpc_port,
        store.https,
        auth_credentials=Auth.api_key(store.api_key.get_secret_value()) if store.api_key else None,
        skip_init_checks=True,
    )
    try:
        yield client.collections.get(name)
    finally:
        client.close()
