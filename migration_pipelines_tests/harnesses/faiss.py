"""Collections in FAISS files, reached around the connector with faiss, pyarrow and json alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from migration_pipelines.model import CollectionSchema, DType, Metric
from migration_pipelines.stores.faiss import FaissStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, from_batches, to_batch


class Faiss(Harness):
    """A folder of collections."""

    def __init__(self, store: FaissStore) -> None:
        self.store: FaissStore = store

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[Faiss]:
        """Keep the collections in `folder`."""
        yield cls(FaissStore(path=folder))

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Write a graph index, the records in small row groups, and the manifest that names both."""
        folder = self.store.path / schema.name
        folder.mkdir()
        (field,) = schema.vectors
        vectors = np.array([record.vectors[""] for record in records], np.float32).reshape(
            -1, field.dimensions
        )
        is_cosine = field.metric is Metric.COSINE
        metric = faiss.METRIC_L2 if field.metric is Metric.EUCLIDEAN else faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexHNSWFlat(field.dimensions, 16, metric)
        index.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if is_cosine else vectors)
        faiss.write_index(index, str(folder / "index.faiss"))

        table = pa.Table.from_batches([to_batch(records, schema)])
        table = table if is_cosine else table.drop_columns(["vector"])
        table = table.append_column("number", pa.array(range(len(records)), pa.int64()))
        pq.write_table(table, folder / "records.parquet", row_group_size=16)
        files = {
            name: {"name": file, "bytes": (folder / file).stat().st_size}
            for name, file in (("index", "index.faiss"), ("records", "records.parquet"))
        }
        manifest = {
            "format": 1,
            "schema": schema.model_dump(mode="json"),
            "count": len(records),
            "next_number": len(records),
            "normalised": is_cosine,
            **files,
        }
        (folder / "_collection.json").write_text(json.dumps(manifest))

    def read(self, collection: str) -> list[Record]:
        """Read the index with FAISS's own calls, and the records in its order."""
        folder = self.store.path / collection
        manifest = json.loads((folder / "_collection.json").read_text())
        records = from_batches(pq.ParquetFile(folder / manifest["records"]["name"]).iter_batches())
        if manifest["normalised"]:
            return records
        path = str(folder / manifest["index"]["name"])
        if manifest["schema"]["vectors"][0]["dtype"] == DType.BIT:
            index = faiss.read_index_binary(path)
            vectors = [index.reconstruct(row) for row in range(index.ntotal)]
        else:
            index = faiss.read_index(path)
            vectors = list(index.reconstruct_n(0, index.ntotal)) if index.ntotal else []
        assert len(vectors) == len(records)
        return [replace(r, vectors={"": v}) for r, v in zip(records, vectors, strict=True)]


HARNESSES: list[type[Harness]] = [Faiss]
