"""Milvus Lite as a folder and as a server, or a server by MILVUS_URI; written by pymilvus's own client.

Read by a query of its own: pymilvus gives floats for the integers above 64 bits in JSON.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
from milvus_lite.server_manager import server_manager_instance
from pymilvus import DataType, MilvusClient
from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

from migration_pipelines.metadata import load_metadata
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorKind
from migration_pipelines.stores.milvus import MilvusStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record

METRICS = {Metric.EUCLIDEAN: "L2", Metric.COSINE: "COSINE", Metric.DOT: "IP", None: "L2"}
_RUN = """
import sys
from milvus_lite.adapter.grpc.server import run_server
run_server(sys.argv[1], "127.0.0.1", int(sys.argv[2]))
"""
_STARTS_WITHIN_SECONDS = 60
_PAGE = 1000


class _Milvus(Harness):
    store: MilvusStore

    @contextmanager
    def uri(self) -> Iterator[str]:
        """Where the engine listens, `http://host:port`."""
        raise NotImplementedError

    @contextmanager
    def client(self) -> Iterator[MilvusClient]:
        """pymilvus's own client."""
        with self.uri() as uri:
            client = MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""))
            yield client
            client.close()

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Create the collection as people do, and insert the records as rows."""
        with self.client() as client:
            client.create_collection(
                schema.name,
                schema=_native_schema(client, schema),
                index_params=_native_indexes(client, schema),
                consistency_level="Strong",
            )
            for start in range(0, len(records), _PAGE):
                client.insert(
                    schema.name, [_row(record, schema) for record in records[start : start + _PAGE]]
                )
            client.flush(schema.name)

    def read(self, collection: str) -> list[Record]:
        """Query everything, partition by partition."""
        with (
            self.uri() as uri,
            grpc.insecure_channel(
                urlsplit(uri).netloc, options=[("grpc.max_receive_message_length", -1)]
            ) as channel,
        ):
            stub = milvus_pb2_grpc.MilvusServiceStub(channel)
            asked = milvus_pb2.ShowPartitionsRequest(collection_name=collection)
            partitions = list(stub.ShowPartitions(asked).partition_names)
            return [
                record
                for partition in partitions
                for record in _query(stub, collection, partition, has_many=len(partitions) > 1)
            ]

    def known_gaps(self) -> Mapping[str, str]:
        """What Milvus can't do."""
        return {
            "test_vectors_of_other_kinds_come_back_exactly": "sparse entries at or below 0 are refused",
        }


def _native_schema(client: MilvusClient, schema: CollectionSchema) -> Any:
    made = client.create_schema(auto_id=False, enable_dynamic_field=False)
    if schema.id_kinds == {IdKind.INT}:
        made.add_field("id", DataType.INT64, is_primary=True)
    else:
        made.add_field("id", DataType.VARCHAR, is_primary=True, max_length=65_535)
    for field in schema.vectors:
        if field.kind is VectorKind.SPARSE:
            made.add_field(field.name or "vector", DataType.SPARSE_FLOAT_VECTOR)
        else:
            made.add_field(field.name or "vector", DataType.FLOAT_VECTOR, dim=field.dimensions)
    made.add_field("document", DataType.VARCHAR, max_length=65_535, nullable=True)
    made.add_field("metadata", DataType.JSON, nullable=True)
    return made


def _native_indexes(client: MilvusClient, schema: CollectionSchema) -> Any:
    params = client.prepare_index_params()
    for field in schema.vectors:
        params.add_index(field.name or "vector", index_type="AUTOINDEX", metric_type=METRICS[field.metric])
    return params


def _row(record: Record, schema: CollectionSchema) -> dict[str, Any]:
    vectors = {field.name or "vector": record.vectors[field.name] for field in schema.vectors}
    metadata = None if record.metadata is None else dict(record.metadata)
    return {"id": record.id, **vectors, "document": record.document, "metadata": metadata}


def _query(stub: Any, collection: str, partition: str, *, has_many: bool) -> list[Record]:
    described = stub.DescribeCollection(milvus_pb2.DescribeCollectionRequest(collection_name=collection))
    key = next(field for field in described.schema.fields if field.is_primary_key)
    everything = 'id >= ""' if key.data_type == DataType.VARCHAR else f"id >= {-(2**63)}"
    stub.LoadCollection(milvus_pb2.LoadCollectionRequest(collection_name=collection))
    reply = stub.Query(
        milvus_pb2.QueryRequest(
            collection_name=collection,
            expr=everything,
            output_fields=[field.name for field in described.schema.fields],
            partition_names=[partition],
        )
    )
    assert not reply.status.code, reply.status.reason
    columns = {data.field_name: _values(data) for data in reply.fields_data}
    names = [data.field_name for data in reply.fields_data if data.type >= DataType.BINARY_VECTOR]
    namespace = ("" if partition == "_default" else partition) if has_many else None
    records = []
    for row in range(len(columns["id"])):
        text = columns["document"][row]
        tail = columns["document_rest"][row] if "document_rest" in columns else None
        metadata = columns["metadata"][row]
        records.append(
            Record(
                id=columns["id"][row],
                vectors={"" if name == "vector" else name: columns[name][row] for name in names},
                document=text if tail is None else text + "".join(tail),
                metadata=None if metadata is None else load_metadata(metadata.decode()),
                namespace=namespace,
            )
        )
    return records


def _values(data: Any) -> list[Any]:
    if data.type == DataType.FLOAT_VECTOR:
        return list(np.array(data.vectors.float_vector.data, np.float32).reshape(-1, data.vectors.dim))
    if data.type == DataType.SPARSE_FLOAT_VECTOR:
        return [
            {
                "indices": list(np.frombuffer(item, "<u4")[::2]),
                "values": list(np.frombuffer(item, "<f4")[1::2]),
            }
            for item in data.vectors.sparse_float_vector.contents
        ]
    if data.type == DataType.ARRAY:
        values: list[Any] = [list(row.string_data.data) for row in data.scalars.array_data.data]
    else:
        values = list(getattr(data.scalars, data.scalars.WhichOneof("data")).data)
    valid = list(data.valid_data) or [True] * len(values)
    return [value if there else None for value, there in zip(values, valid, strict=True)]


class MilvusLite(_Milvus):
    """A folder, opened in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = MilvusStore(path=str(folder))

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[MilvusLite]:
        """Keep the data in `folder`."""
        harness = cls(folder / "lite.db")
        yield harness
        harness.store.close()

    @contextmanager
    def uri(self) -> Iterator[str]:
        """Open the folder where no store has it open, and close it again: nothing is left in memory."""
        path = str(self.folder)
        was_open = path in server_manager_instance._servers
        uri = server_manager_instance.start_and_get_uri(path)
        assert uri is not None
        yield uri
        if not was_open:
            server_manager_instance.release_server(path)


class MilvusServer(_Milvus):
    """A server: that of MILVUS_URI, else Milvus Lite's in a process of its own."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        parts = urlsplit(uri)
        assert parts.hostname is not None
        self.store = MilvusStore(host=parts.hostname, port=parts.port or 19530)

    @contextmanager
    def uri(self) -> Iterator[str]:
        """The server's address."""
        yield self._uri

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[MilvusServer]:
        """Run a server that keeps its data in `folder`."""
        if found := os.environ.get("MILVUS_URI"):
            harness = cls(found)
            yield harness
            harness.store.close()
            return
        with server(folder) as uri:
            harness = cls(uri)
            yield harness
            harness.store.close()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run Milvus Lite as a server of its own on a free port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(folder / "server.db"), str(port)], stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + _STARTS_WITHIN_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"Milvus Lite did not start: {(folder / 'server.log').read_text()}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()  # a signal to terminate is ignored where this process ignores it
        process.wait(timeout=30)


HARNESSES: list[type[Harness]] = [MilvusLite, MilvusServer]
