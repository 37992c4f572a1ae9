"""The two Parquet files of a folder of Chroma 0.3, and their records in the project's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from migration_pipelines import batch as batches
from migration_pipelines.metadata import dump_metadata
from migration_pipelines.model import IdKind
from migration_pipelines.stores.chroma.records import plain_schema

COLLECTIONS_FILE, RECORDS_FILE = "chroma-collections.parquet", "chroma-embeddings.parquet"
_COLUMNS = ["collection_uuid", "id", "embedding", "document", "metadata"]
_BATCH_RECORDS = 1_000


def is_legacy(folder: Path) -> bool:
    """Whether a folder is one of Chroma 0.3."""
    return (folder / COLLECTIONS_FILE).is_file()


def legacy_collections(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the collections, by name."""
    rows: list[dict[str, Any]] = pq.read_table(folder / COLLECTIONS_FILE).to_pylist()
    return {row["name"]: row for row in rows}


def _rows(path: Path, own_id: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one collection, a few at a time."""
    if not path.is_file():  # a folder without any record
        return
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_RECORDS, columns=_COLUMNS):
            own = batch.filter(pc.equal(batch["collection_uuid"], own_id))
            if own.num_rows:
                yield own


def dimensions_of_first(path: Path, own_id: str) -> int | None:
    """Return the dimensions of the first vector; None where there is none."""
    for batch in _rows(path, own_id):
        lengths = pc.list_value_length(batch["embedding"]).drop_null()
        if len(lengths) and lengths[0].as_py():
            return int(lengths[0].as_py())
    return None


def convert(path: Path, own_id: str, target: Path, *, dimensions: int) -> int:
    """Write a collection in the project's layout, in bounded memory; what has no usable vector last.

    Returns
    -------
    The number of records whose vectors were rounded to float32.
    """
    schema = batches.arrow_schema(plain_schema(dimensions))
    kind = schema.field(batches.VECTOR).type
    last: list[pa.RecordBatch] = []
    rounded = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in _rows(path, own_id):
            lengths = np.asarray(pc.list_value_length(batch["embedding"]).fill_null(0))
            usable = (lengths == dimensions) & (lengths > 0)
            whole = batch.filter(pa.array(usable))
            matrix = np.asarray(whole["embedding"].flatten()).reshape(-1, dimensions)
            vectors = matrix.astype(np.float32)
            rounded += int((vectors != matrix).any(axis=1).sum())
            writer.write(_in_layout(whole, batches.dense_vectors(vectors), schema))
            last.append(batch.filter(pa.array(~usable)))
        for batch in last:
            writer.write(_in_layout(batch, pa.nulls(batch.num_rows, kind), schema))
    return rounded


def _in_layout(batch: pa.RecordBatch, vectors: pa.Array, schema: pa.Schema) -> pa.RecordBatch:
    """Return the same records with the columns of `schema`."""
    texts = batch["metadata"].cast(pa.binary()).to_pylist()
    columns = {
        batches.ID: batch["id"],
        batches.ID_TYPE: batches.constant(IdKind.STR.value, batch.num_rows),
        batches.VECTOR: vectors,
        batches.DOCUMENT: batch["document"],
        batches.METADATA: pa.array(map(_metadata, texts), pa.string()),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _metadata(text: bytes | None) -> str | None:
    """Return the canonical text of what Python's own writer of JSON wrote, NaN and Infinity included."""
    fields = None if text is None else json.loads(text)
    return None if fields is None else dump_metadata(fields)
