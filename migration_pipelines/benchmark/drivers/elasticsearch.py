"""elasticsearch's client with its orjson serializer: pages of a point in time, and bulk requests of 500."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson

from migration_pipelines.benchmark.data import Page

_PAGE, _BULK = 1_000, 500


def bare_read(store: Any, collection: str) -> int:
    """Read every record in pages of a point in time."""
    read = 0
    with _client(store) as client:
        view = client.open_point_in_time(index=collection, keep_alive="5m")["id"]
        after = None
        while True:
            hits = client.search(
                pit={"id": view}, size=_PAGE, sort=[{"_shard_doc": "asc"}], search_after=after
            )["hits"]["hits"]
            if not hits:
                return read
            np.array([hit["_source"]["vector"] for hit in hits], np.float32)
            read, after = read + len(hits), hits[-1]["sort"]


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Index the records by bulk requests."""
    written = 0
    numbers = orjson.OPT_SERIALIZE_NUMPY  # the client writes what is bytes already as it is
    with _client(store) as client:
        for page in pages:
            rows = list(zip(page.ids, page.vectors, page.documents, page.metadatas, strict=True))
            for at in range(0, len(rows), _BULK):
                operations: list[bytes] = []
                for key, vector, text, fields in rows[at : at + _BULK]:
                    operations.append(orjson.dumps({"index": {"_id": key}}))
                    source = {"vector": vector, "document": text, "metadata": fields}
                    operations.append(orjson.dumps(source, option=numbers))
                written += len(client.bulk(index=collection, operations=operations)["items"])
    return written


@contextmanager
def _client(store: Any) -> Iterator[Any]:
    from elasticsearch import Elasticsearch, OrjsonSerializer

    client = Elasticsearch(
        f"{'https' if store.https else 'http'}://{store.host}:{store.port}",
        api_key=store.api_key.get_secret_value() if store.api_key else None,
        basic_auth=(store.user or "elastic", store.password.get_secret_value()) if store.password else None,
        ca_certs=store.ca_certs,
        serializer=OrjsonSerializer(),
    )
    yield client
    client.close()
