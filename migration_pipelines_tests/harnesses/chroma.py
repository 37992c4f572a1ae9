"""Chroma as a folder and as a server, reached around the connector through chromadb's own client."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pyarrow as pa
from chromadb.config import Settings

from migration_pipelines.filters import Filter
from migration_pipelines.model import CollectionSchema, Metric, Span
from migration_pipelines.stores.chroma import ChromaStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record

_SPACES = {Metric.EUCLIDEAN: "l2", Metric.COSINE: "cosine", Metric.DOT: "ip", None: "l2"}
_PAGE = 1000
_STARTS_WITHIN_SECONDS = 60


class _Chroma(Harness):
    store: ChromaStore

    def __init__(self, store: ChromaStore, client: Any) -> None:
        self.store = store
        self.client = client

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Create the collection natively and put the records into it."""
        collection = self.client.create_collection(
            schema.name,
            configuration={"hnsw": {"space": _SPACES[schema.vectors[0].metric]}},
            metadata=dict(schema.properties) or None,
            embedding_function=None,
        )
        for start in range(0, len(records), _PAGE):
            part = records[start : start + _PAGE]
            fields = [None if record.metadata is None else dict(record.metadata) for record in part]
            collection.add(
                ids=[record.id for record in part],
                embeddings=np.stack([record.vectors[""] for record in part]),
                documents=[record.document for record in part],
                uris=[None if item is None else item.pop("chroma:uri", None) for item in fields],
                metadatas=[item or None for item in fields],
            )

    def read(self, collection: str) -> list[Record]:
        """Read every record natively."""
        found = self.client.get_collection(collection, embedding_function=None)
        records: list[Record] = []
        ids = found.get(include=[])["ids"]
        for start in range(0, len(ids), _PAGE):
            page = found.get(
                ids=ids[start : start + _PAGE], include=["embeddings", "documents", "metadatas", "uris"]
            )
            columns = (page["ids"], page["embeddings"], page["documents"], page["metadatas"], page["uris"])
            records += [_record(*row) for row in zip(*columns, strict=True)]
        return records


def _record(
    record_id: str, vector: Any, document: str | None, metadata: dict[str, Any] | None, uri: str | None
) -> Record:
    if uri is not None:
        metadata = {**(metadata or {}), "chroma:uri": uri}
    vectors = {"": np.asarray(vector).astype(np.float32)}
    return Record(id=record_id, vectors=vectors, document=document, metadata=metadata)


class EmbeddedChroma(_Chroma):
    """A folder, opened in this process."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[EmbeddedChroma]:
        """Open a Chroma folder in `folder`."""
        path = folder / "chroma"
        client: Any = chromadb.PersistentClient(path, Settings(anonymized_telemetry=False))
        store = ChromaStore(path=str(path))
        yield cls(store, client)
        store.close()
        client.close()


class _ReadByCopy(ChromaStore):
    """A folder that is written by Chroma's client and read as a source is: directly, from a copy."""

    scratch: str

    def list_collections(self) -> list[str]:
        return self._source().list_collections() if self._is_there() else []

    def describe(self, collection: str) -> CollectionSchema:
        return self._source().describe(collection)

    def count(self, collection: str, where: Filter | None = None) -> int:
        return self._source().count(collection, where)

    def split(self, collection: str, **options: Any) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        return self._source().split(collection, **options)

    def scan(self, collection: str, span: Span, **options: Any) -> Iterator[pa.RecordBatch]:
        return self._source().scan(collection, span, **options)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        return self._source().fetch(collection, ids, vectors=vectors)

    def _source(self) -> ChromaStore:
        # A new object each time: one that is open answers of the folder as it was when it was copied.
        return self.for_reading(Path(self.scratch))


class CopiedChroma(EmbeddedChroma):
    """A folder that is read as a migration's source is."""

    def known_gaps(self) -> Mapping[str, str]:
        """No address stands for a store of two, of which one writes and the other reads."""
        reason = "this store is a ChromaStore and its copy in one, made for these tests"
        names = ("test_the_address_opens_the_same_store", "test_the_store_is_found_by_its_kind")
        return dict.fromkeys(names, reason)

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[CopiedChroma]:
        """Open a Chroma folder in `folder`."""
        path = folder / "chroma"
        client: Any = chromadb.PersistentClient(path, Settings(anonymized_telemetry=False))
        store = _ReadByCopy(path=str(path), scratch=str(folder / "scratch"))
        yield cls(store, client)
        store.close()
        client.close()


class ChromaServer(_Chroma):
    """A server of its own on a free port of the loopback."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[ChromaServer]:
        """Run a server that keeps its data in `folder`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        program = shutil.which("chroma", path=sysconfig.get_path("scripts")) or "chroma"
        arguments = ["run", "--path", str(folder / "server"), "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, "ANONYMIZED_TELEMETRY": "False"}
        with (folder / "server.log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, program, *arguments], stdout=log, stderr=log, env=environment, cwd=folder
            )
        try:
            client = _wait_for(server, port, folder / "server.log")
            store = ChromaStore(host="127.0.0.1", port=port)
            yield cls(store, client)
            store.close()
            client.close()
        finally:
            server.kill()  # a signal to terminate is ignored where this process ignores it
            server.wait(timeout=30)


def _wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> Any:
    until = time.monotonic() + _STARTS_WITHIN_SECONDS
    while True:
        try:
            return chromadb.HttpClient("127.0.0.1", port, settings=Settings(anonymized_telemetry=False))
        except ValueError:  # chromadb's way to say that nobody listens yet
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"chroma run did not start: {log.read_text()}") from None
            time.sleep(0.1)


HARNESSES: list[type[Harness]] = [EmbeddedChroma, CopiedChroma, ChromaServer]
