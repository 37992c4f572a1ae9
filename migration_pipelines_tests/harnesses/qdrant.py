"""Qdrant's local mode (a folder, memory) and a server, reached around the connector by qdrant-client.

The server is that of QDRANT_URL (its key in QDRANT_API_KEY, its port for gRPC in QDRANT_GRPC_PORT), where
what was made is removed at the end, else a stand-in over the real engine.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr
from qdrant_client import QdrantClient, models

from migration_pipelines.model import CollectionSchema, DType, Metric
from migration_pipelines.store import Address
from migration_pipelines.stores.qdrant import QdrantStore
from migration_pipelines.stores.qdrant.local import _OPEN
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record
from migration_pipelines_tests.standins.qdrant import QdrantStandin
from migration_pipelines_tests.standins.qdrant_grpc import QdrantGrpcStandin

_DISTANCES = {
    Metric.COSINE: models.Distance.COSINE,
    Metric.DOT: models.Distance.DOT,
    Metric.EUCLIDEAN: models.Distance.EUCLID,
    Metric.MANHATTAN: models.Distance.MANHATTAN,
}
_PAGE = 500


class _Qdrant(Harness):
    store: QdrantStore

    def __init__(self, store: QdrantStore) -> None:
        self.store = store

    @contextmanager
    def client(self) -> Iterator[QdrantClient]:
        """A client of the engine, which the test may use for a while."""
        raise NotImplementedError
        yield

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Create the collection natively and put the records into it."""
        fields = {field.name: field for field in schema.vectors}
        vectors = {
            name: models.VectorParams(
                size=field.dimensions or 0,
                distance=_DISTANCES[field.metric or Metric.EUCLIDEAN],
                datatype=None if field.dtype is DType.FLOAT32 else models.Datatype(field.dtype.value),
            )
            for name, field in fields.items()
        }
        with self.client() as client:
            client.create_collection(schema.name, vectors[""] if list(vectors) == [""] else vectors)
            for start in range(0, len(records), _PAGE):
                part = records[start : start + _PAGE]
                client.upsert(schema.name, [_point(record) for record in part], wait=True)

    def read(self, collection: str) -> list[Record]:
        """Read every record natively."""
        with self.client() as client:
            config = client.get_collection(collection).config.params.vectors
            dtypes = {"": config} if isinstance(config, models.VectorParams) else dict(config or {})
            records: list[Record] = []
            offset = None
            while True:
                page, offset = client.scroll(
                    collection, limit=_PAGE, offset=offset, with_payload=True, with_vectors=True
                )
                records += [
                    _record(item, {n: p.datatype or "float32" for n, p in dtypes.items()}) for item in page
                ]
                if offset is None:
                    return records


def _point(record: Record) -> models.PointStruct:
    vectors = {name: v.tolist() for name, v in record.vectors.items() if v is not None}
    payload = {**(record.metadata or {})} | ({} if record.document is None else {"document": record.document})
    return models.PointStruct(
        id=record.id if isinstance(record.id, int) else str(record.id),
        vector=vectors[""] if list(vectors) == [""] else vectors,
        payload=payload,
    )


def _record(item: Any, dtypes: Mapping[str, str]) -> Record:
    vector = item.vector if isinstance(item.vector, dict) else {"": item.vector}
    payload = dict(item.payload or {})
    return Record(
        id=item.id if isinstance(item.id, int) else uuid.UUID(item.id),
        vectors={
            name: np.array(vector[name], np.dtype(str(getattr(kind, "value", kind))))
            if vector.get(name)
            else None
            for name, kind in dtypes.items()
        },
        document=payload.pop("document", None),
        metadata=payload,
    )


class QdrantFolder(_Qdrant):
    """A folder of the client's local mode; only one client may have it open, so the connector's is shared."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[QdrantFolder]:
        """Keep a folder of Qdrant's in `folder`."""
        store = QdrantStore(path=str(folder / "qdrant"))
        yield cls(store)
        store.close()

    @contextmanager
    def client(self) -> Iterator[QdrantClient]:
        """The client that is open in this process, or one for the moment."""
        shared = _OPEN.get(str(Path(self.store.path or "").resolve()))
        if shared is not None:
            yield shared.client
            return
        with closing(QdrantClient(path=self.store.path)) as client:
            yield client


class QdrantMemory(_Qdrant):
    """The memory of this process."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[QdrantMemory]:
        """Use what lasts as long as the process."""
        store = QdrantStore(path=":memory:")
        store.list_collections()
        yield cls(store)
        for name in store.list_collections():
            store.drop(name)

    @contextmanager
    def client(self) -> Iterator[QdrantClient]:
        """The client of this process's memory."""
        yield _OPEN[":memory:"].client


class QdrantServer(_Qdrant):
    """A server."""

    url: str
    key: str | None = None

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[QdrantServer]:
        """Find the server of QDRANT_URL, or serve."""
        if url := os.environ.get("QDRANT_URL"):
            with cls._at(url, os.environ.get("QDRANT_API_KEY")) as harness:
                yield harness
            return
        standin = QdrantStandin()
        with standin.serving(), cls._at(f"http://127.0.0.1:{standin.port}", None) as harness:
            yield harness

    @classmethod
    @contextmanager
    def _at(cls, url: str, key: str | None, *, grpc_port: int | None = None) -> Iterator[QdrantServer]:
        parts = Address.parse(url)
        store = QdrantStore(
            host=parts.host,
            port=parts.port or 6333,
            https=parts.kind == "https",
            grpc_port=grpc_port,
            api_key=SecretStr(key) if key else None,
        )
        harness = cls(store)
        harness.url, harness.key = url, key
        before = set(store.list_collections())
        yield harness
        for name in set(store.list_collections()) - before:
            store.drop(name)
        store.close()

    @contextmanager
    def client(self) -> Iterator[QdrantClient]:
        """A client of the server."""
        with closing(QdrantClient(url=self.url, api_key=self.key, check_compatibility=False)) as client:
            yield client


class QdrantGrpc(QdrantServer):
    """A server whose points the connector reads and writes by gRPC; natively it is gone to by HTTP."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[QdrantServer]:
        """Find the server of QDRANT_URL, or serve."""
        if url := os.environ.get("QDRANT_URL"):
            port = int(os.environ.get("QDRANT_GRPC_PORT", "6334"))
            with cls._at(url, os.environ.get("QDRANT_API_KEY"), grpc_port=port) as harness:
                yield harness
            return
        standin = QdrantGrpcStandin()
        with standin.serving():
            url = f"http://127.0.0.1:{standin.port}"
            with cls._at(url, None, grpc_port=standin.grpc_port) as harness:
                yield harness


HARNESSES: list[type[Harness]] = [QdrantFolder, QdrantMemory, QdrantServer, QdrantGrpc]
