"""Chroma as a folder and as a server, reached around the connector through chromadb's own client."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
from chromadb.config import Settings

from migration_pipelines.model import CollectionSchema, Metric
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
            server.terminate()
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


HARNESSES: list[type[Harness]] = [EmbeddedChroma, ChromaServer]
