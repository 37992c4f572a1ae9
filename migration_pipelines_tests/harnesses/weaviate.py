"""Weaviate, reached around the connector by the vendor's own client.

The server is the one of WEAVIATE_URL (its gRPC port WEAVIATE_GRPC_PORT, its key WEAVIATE_API_KEY), from which
what was made there is removed at the end; without one, the stand-in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import weaviate
from weaviate.classes.config import Configure, DataType, Property, VectorDistances
from weaviate.classes.data import DataObject
from weaviate.classes.init import Auth

from migration_pipelines.metadata import load_metadata
from migration_pipelines.model import CollectionSchema, Metric, VectorField, VectorKind
from migration_pipelines.stores.weaviate import WeaviateStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record
from migration_pipelines_tests.standins.weaviate import WeaviateStandin

_DISTANCES = {
    Metric.COSINE: VectorDistances.COSINE,
    Metric.DOT: VectorDistances.DOT,
    Metric.EUCLIDEAN: VectorDistances.L2_SQUARED,
    Metric.MANHATTAN: VectorDistances.MANHATTAN,
    Metric.HAMMING: VectorDistances.HAMMING,
    None: VectorDistances.COSINE,
}
_TYPES = {str: DataType.TEXT, bool: DataType.BOOL, int: DataType.INT, float: DataType.NUMBER}


class Weaviate(Harness):
    """Collections as people make them: typed properties, vectors of their own."""

    mixes_kinds = False

    def __init__(self, store: WeaviateStore, client: Any, standin: WeaviateStandin | None) -> None:
        self.store: WeaviateStore = store
        self.client = client
        self.standin = standin

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[Weaviate]:
        """Find the server of WEAVIATE_URL, or run the stand-in."""
        if url := os.environ.get("WEAVIATE_URL"):
            parts = urlsplit(url)
            grpc_port = int(os.environ.get("WEAVIATE_GRPC_PORT", "50051"))
            with _opened(parts.hostname or "localhost", parts.port or 8080, grpc_port) as (store, client):
                before = set(store.list_collections())
                yield cls(store, client, None)
                for alias, found in client.alias.list_all().items():
                    if found.collection not in before:
                        client.alias.delete(alias_name=alias)
                client.collections.delete(sorted(set(store.list_collections()) - before))
            return
        standin = WeaviateStandin()
        with standin.serving(), _opened("127.0.0.1", standin.port, standin.grpc_port) as (store, client):
            yield cls(store, client, standin)

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Create the collection natively and put the records into it."""
        values = {key: value for record in records for key, value in (record.metadata or {}).items()}
        properties = [Property(name=key, data_type=_TYPES[type(value)]) for key, value in values.items()]
        collection = self.client.collections.create(
            schema.name,
            properties=[*properties, Property(name="document", data_type=DataType.TEXT)],
            vector_config=_vector(schema.vectors[0]),
        )
        if records:
            reply = collection.data.insert_many(
                DataObject(
                    uuid=record.id,
                    properties={**(record.metadata or {}), "document": record.document},
                    vector=record.vectors[""].tolist(),
                )
                for record in records
            )
            assert not reply.has_errors, reply.errors

    def read(self, collection: str) -> list[Record]:
        """Read every record natively."""
        found = self.client.collections.get(collection)
        config = found.config.get()
        names = sorted(config.vector_config) if config.vector_config else ["default"]
        if not config.multi_tenancy_config.enabled:
            return [_record(item, names, None) for item in found.iterator(include_vector=True)]
        return [
            _record(item, names, tenant)
            for tenant in found.tenants.get()
            for item in found.with_tenant(tenant).iterator(include_vector=True)
        ]


def _record(item: Any, names: Sequence[str], tenant: str | None) -> Record:
    fields = {key: value for key, value in item.properties.items() if value is not None}
    document = fields.pop("document", None)
    more = fields.pop("_more_fields", None)
    metadata: Mapping[str, Any] | None = fields
    if more == "null":
        metadata = None
    elif more is not None:
        metadata = {**fields, **load_metadata(more)}
    vectors = {
        "" if name == "default" else name: np.asarray(item.vector[name], np.float32)
        if item.vector.get(name)
        else None
        for name in names
    }
    return Record(id=item.uuid, vectors=vectors, document=document, metadata=metadata, namespace=tenant)


def _vector(field: VectorField) -> Any:
    assert field.kind is VectorKind.DENSE
    index = Configure.VectorIndex.hnsw(distance_metric=_DISTANCES[field.metric])
    return Configure.Vectors.self_provided(vector_index_config=index)


@contextmanager
def _opened(host: str, port: int, grpc_port: int) -> Iterator[tuple[WeaviateStore, Any]]:
    key = os.environ.get("WEAVIATE_API_KEY")
    client = weaviate.connect_to_local(
        host,
        port,
        grpc_port,
        auth_credentials=Auth.api_key(key) if key else None,
        skip_init_checks=True,  # one of them asks the package index for the client's latest version
    )
    store = WeaviateStore(host=host, port=port, grpc_port=grpc_port, api_key=key)
    try:
        yield store, client
    finally:
        store.close()
        client.close()


HARNESSES: list[type[Harness]] = [Weaviate]
