"""Parquet folders in S3, a moto server on loopback, reached around the connector with boto3 and pyarrow."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores.parquet import ParquetStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, from_batches, to_batch

LOGIN = {
    "AWS_ACCESS_KEY_ID": "AKIATESTING",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_BUCKETS = itertools.count(1)


@cache
def s3_server() -> str:
    """The URL of a server; one for all the tests of a session, which ends with it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


class ParquetOnS3(Harness):
    """A prefix of a bucket that holds collections."""

    def __init__(self, client: Any, bucket: str) -> None:
        self.client, self.bucket = client, bucket
        self.store = ParquetStore(url=f"s3://{bucket}/some/prefix")

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[ParquetOnS3]:
        """Make a bucket of its own, with the login in the environment."""
        import boto3

        with mock.patch.dict(os.environ, {**LOGIN, "AWS_ENDPOINT_URL": s3_server()}):
            client = boto3.client("s3")
            bucket = f"bucket-{next(_BUCKETS)}"
            client.create_bucket(Bucket=bucket)
            harness = cls(client, bucket)
            yield harness
            harness.store.close()

    def keys(self, collection: str) -> list[str]:
        """The keys of a collection's objects, without the prefix."""
        prefix = f"some/prefix/{collection}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", ())]

    def get(self, collection: str, key: str) -> bytes:
        """What an object holds."""
        found = self.client.get_object(Bucket=self.bucket, Key=f"some/prefix/{collection}/{key}")
        data: bytes = found["Body"].read()
        return data

    def put(self, collection: str, key: str, data: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=self.bucket, Key=f"some/prefix/{collection}/{key}", Body=data)

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Write two objects, of small row groups, and the manifest that names them."""
        middle = len(records) // 2
        files = []
        for name, part in (("a.parquet", records[:middle]), ("b.parquet", records[middle:])):
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_batches([to_batch(part, schema)]), sink, row_group_size=16)
            data = sink.getvalue()
            self.put(schema.name, name, data)
            files.append({"name": name, "records": len(part), "bytes": len(data), "digest": f"{0:032x}"})
        manifest = {
            "format": 1,
            "schema": schema.model_dump(mode="json"),
            "metrics": {"vector": schema.vectors[0].metric},
            "records": len(records),
            "digest": f"{0:032x}",
            "files": files,
        }
        self.put(schema.name, "_collection.json", json.dumps(manifest).encode())

    def read(self, collection: str) -> list[Record]:
        """Read every Parquet object of the prefix, as who knows nothing of a manifest does."""
        keys = [key for key in self.keys(collection) if key.endswith(".parquet") and not key.startswith(".")]
        files = [pq.ParquetFile(io.BytesIO(self.get(collection, key))) for key in sorted(keys)]
        return from_batches(batch for file in files for batch in file.iter_batches())


HARNESSES: list[type[Harness]] = [ParquetOnS3]
