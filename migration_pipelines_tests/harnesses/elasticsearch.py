"""Elasticsearch, reached around the connector through the vendor's own client and its helpers.

It is the stand-in, unless `ELASTICSEARCH_URL` (with ELASTICSEARCH_PASSWORD or ELASTICSEARCH_API_KEY) names a
server: then the indices that the tests made are removed afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
from elasticsearch import Elasticsearch, helpers

from migration_pipelines.metadata import load_metadata
from migration_pipelines.model import CollectionSchema, DType, Metric, VectorField, VectorKind
from migration_pipelines.store import open_address
from migration_pipelines.stores.elasticsearch import ElasticsearchStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record
from migration_pipelines_tests.standins.elasticsearch import ElasticsearchStandin

_SIMILARITIES = {
    Metric.EUCLIDEAN: "l2_norm",
    Metric.COSINE: "cosine",
    Metric.DOT: "max_inner_product",
    Metric.HAMMING: "l2_norm",
}
_ELEMENTS = {DType.FLOAT32: "float", DType.INT8: "byte", DType.BIT: "bit"}


class ElasticsearchHarness(Harness):
    """A server or its stand-in."""

    store: ElasticsearchStore
    one_type_a_field: ClassVar[bool] = True
    sparse_is_positive: ClassVar[bool] = True

    def __init__(
        self, store: ElasticsearchStore, client: Elasticsearch, standin: ElasticsearchStandin | None
    ) -> None:
        self.store, self.client, self.standin = store, client, standin

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[ElasticsearchHarness]:
        """Start a stand-in, or find the server."""
        url = os.environ.get("ELASTICSEARCH_URL")
        if url:
            yield from _real(cls, url)
            return
        standin = ElasticsearchStandin()
        with standin.serving():
            store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
            client = Elasticsearch(f"http://127.0.0.1:{standin.port}", max_retries=0)
            yield cls(store, client, standin)
            client.close()
            store.close()

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Create the index as LangChain's users do, its metadata an object that nobody searches."""
        properties: dict[str, Any] = {"metadata": {"type": "object", "enabled": False}}
        properties |= {"document": {"type": "text"}} if schema.has_documents else {}
        properties |= {field.name or "vector": _mapping(field) for field in schema.vectors}
        self.client.indices.create(
            index=schema.name,
            mappings={"properties": properties},
            settings={"index.mapping.exclude_source_vectors": False},
        )
        actions = (
            {"_index": schema.name, "_id": record.id, "_source": _source(record)} for record in records
        )
        helpers.bulk(self.client, actions, refresh=True)

    def read(self, collection: str) -> list[Record]:
        """Read every record by a scroll of the vendor's helper, refreshed before."""
        self.client.indices.refresh(index=collection)
        mapping = self.client.indices.get_mapping(index=collection)[collection]["mappings"]["properties"]
        view = self.client.open_point_in_time(index=collection, keep_alive="1m")["id"]
        records: list[Record] = []
        after: Any = None
        while True:
            page = self.client.search(
                pit={"id": view},
                size=500,
                sort=[{"_shard_doc": "asc"}],
                search_after=after,
                source={"exclude_vectors": False},
            )["hits"]["hits"]
            if not page:
                return records
            records += [_record(hit["_id"], hit["_source"], mapping) for hit in page]
            after = page[-1]["sort"]


def _real(cls: type[ElasticsearchHarness], url: str) -> Iterator[ElasticsearchHarness]:
    parts = urlsplit(url)
    query = "?https=true" if parts.scheme == "https" else ""
    user = f"{parts.username}@" if parts.username else ""
    store, _ = open_address(f"elasticsearch://{user}{parts.hostname}:{parts.port or 9200}/x{query}")
    assert isinstance(store, ElasticsearchStore)
    client = _vendors_client(f"{parts.scheme}://{parts.hostname}:{parts.port or 9200}", parts.username)
    before = set(store.list_collections())
    yield cls(store, client, None)
    for name in set(store.list_collections()) - before:
        store.drop(name)
    store.close()
    client.close()


def _vendors_client(url: str, user: str | None) -> Elasticsearch:
    key, password = os.environ.get("ELASTICSEARCH_API_KEY"), os.environ.get("ELASTICSEARCH_PASSWORD")
    login = (user or "elastic", password) if password and not key else None
    return Elasticsearch(url, api_key=key, basic_auth=login, max_retries=0)


def _mapping(field: VectorField) -> dict[str, Any]:
    if field.kind is VectorKind.SPARSE:
        return {"type": "sparse_vector"}
    kind = {"dims": field.dimensions, "element_type": _ELEMENTS[field.dtype]}
    if field.kind is VectorKind.MULTI:
        return {"type": "rank_vectors", **kind}
    similarity = _SIMILARITIES[field.metric or Metric.COSINE]
    # Without a graph's approximation; the exact one takes any number of records.
    return {"type": "dense_vector", **kind, "similarity": similarity, "index_options": {"type": "flat"}}


def _source(record: Record) -> dict[str, Any]:
    source: dict[str, Any] = {
        name or "vector": np.asarray(vector).tolist() for name, vector in record.vectors.items()
    }
    source |= {} if record.document is None else {"document": record.document}
    return source | ({} if record.metadata is None else {"metadata": dict(record.metadata)})


def _record(record_id: str, source: Mapping[str, Any], mapping: Mapping[str, Any]) -> Record:
    metadata = source.get("metadata")
    return Record(
        id=record_id,
        vectors={
            "" if name == "vector" else name: _vector(source.get(name), kind)
            for name, kind in mapping.items()
            if kind.get("type") == "dense_vector"
        },
        document=source.get("document"),
        metadata=None if metadata is None else _metadata(metadata),
    )


def _vector(numbers: list[float] | None, mapping: Mapping[str, Any]) -> Any:
    if numbers is None:
        return None
    if mapping.get("element_type", "float") == "float":
        return np.array(numbers, np.float32)
    found = np.array(numbers, np.int8)
    return found.view(np.uint8) if mapping["element_type"] == "bit" else found


def _metadata(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON in the record says: a `$typed` pair stands for what JSON has no form for."""
    return load_metadata(json.dumps(found))


HARNESSES: list[type[Harness]] = [ElasticsearchHarness]
