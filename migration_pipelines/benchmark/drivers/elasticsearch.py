"""elasticsearch's client with its orjson serializer: pages of a point in time, and bulk requests of 500.

Its methods of version 9 ask servers of version 8 for what those refuse: requests are given to it as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson

from migration_pipelines.benchmark.data import Page
from migration_pipelines.stores.elasticsearch.index import MEDIA

_PAGE, _BULK = 1_000, 500


def bare_read(store: Any, collection: str) -> int:
    """Read every record in pages of a point in time."""
    read = 0
    with _client(store) as client:
        view = _ask(client, f"/{collection}/_pit?keep_alive=5m")["id"]
        after = None
        while True:
            page = {"pit": {"id": view}, "size": _PAGE, "sort": [{"_shard_doc": "asc"}]}
            page |= {} if after is None else {"search_after": after}
            hits = _ask(client, "/_search", page)["hits"]["hits"]
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
                written += len(_ask(client, f"/{collection}/_bulk", operations, "x-ndjson")["items"])
    return written


def _ask(client: Any, path: str, body: Any = None, form: str = "json") -> Any:
    headers = {"accept": MEDIA.format("json"), "content-type": MEDIA.format(form)}
    return client.perform_request("POST", path, headers=headers, body=body)


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
