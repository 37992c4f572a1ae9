"""The generations of a collection of our own: opening the one that is there, and the records of the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores.faiss.collection import (
    MANIFEST,
    Batches,
    CollectionFolder,
    FileInfo,
    Manifest,
)
from migration_pipelines.stores.faiss.index import open_index
from migration_pipelines.stores.faiss.opened import Opened
from migration_pipelines.stores.faiss.table import GROUP_RECORDS, NUMBER, ParquetTable


def open_published(folder: CollectionFolder, manifest: Manifest, *, name: str = "") -> Opened:
    """Return a published collection opened, under the name that its folder has now.

    Raises
    ------
    FileNotFoundError
    StoreRefusedError
        The files aren't those that the manifest tells of.
    """
    assert manifest.index is not None
    assert manifest.records is not None
    for info in (manifest.index, manifest.records):
        _check_size(folder.path / info.name, info)
    table = ParquetTable(folder.path / manifest.records.name)
    index = open_index(folder.path / manifest.index.name, by_label=True)
    if not table.count == index.count == manifest.count:
        raise StoreRefusedError(
            f"{folder.path}: {MANIFEST} counts {manifest.count:,} records, the index holds {index.count:,} "
            f"vectors, {manifest.records.name} {table.count:,} records: restore the folder whole",
            expected=manifest.count,
            found=(index.count, table.count),
        )
    schema = manifest.description
    return Opened(
        schema=schema.model_copy(update={"name": name or schema.name}),
        records=table,
        index=index,
        numbers=table.numbers,
        normalised=manifest.normalised,
    )


def _check_size(path: Path, info: FileInfo) -> None:
    size = path.stat().st_size
    if size != info.bytes:
        raise StoreRefusedError(
            f"{path} has {size:,} bytes, its manifest says {info.bytes:,}: something else changed it; "
            "restore it or write the collection again",
            expected=info.bytes,
            found=size,
        )


def merged(folder: CollectionFolder, manifest: Manifest, new: pa.RecordBatch) -> Batches:
    """Return the records of a collection with some put in; those that are there keep their places."""
    opened = open_published(folder, manifest)
    rows = opened.records.find(new)
    held = opened.records.read([batches.ID, batches.ID_TYPE], 0, 0)
    if len(rows):
        held = opened.records.take([batches.ID, batches.ID_TYPE], rows)
    fresh = new.filter(pc.invert(batches.is_among(new, held)))

    def records() -> Iterator[pa.RecordBatch]:
        for batch in _numbered(opened):
            numbers, plain = batch.column(NUMBER), batch.select(new.schema.names)
            yield _replacing(plain, new).append_column(NUMBER, numbers)
        if fresh.num_rows:
            yield fresh

    return records


def remaining(folder: CollectionFolder, manifest: Manifest, ids: pa.RecordBatch) -> Batches | None:
    """Return the records of a collection without some, None where none of those is there."""
    opened = open_published(folder, manifest)
    if not len(opened.records.find(ids)):
        return None

    def records() -> Iterator[pa.RecordBatch]:
        for batch in _numbered(opened):
            yield batch.filter(pc.invert(batches.is_among(batch, ids)))

    return records


def _numbered(opened: Opened) -> Iterator[pa.RecordBatch]:
    """Yield all records with their lasting numbers."""
    for start in range(0, opened.count, GROUP_RECORDS):
        stop = min(opened.count, start + GROUP_RECORDS)
        numbers = np.arange(start, stop) if opened.numbers is None else opened.numbers[start:stop]
        yield opened.read(start, stop).append_column(NUMBER, pa.array(numbers, pa.int64()))


def _replacing(batch: pa.RecordBatch, new: pa.RecordBatch) -> pa.RecordBatch:
    """Return the records of `batch`, those of `new` in the place of the ones with their ids."""
    found = batches.positions(batch, new)
    if (found < 0).all():
        return batch
    rows = np.where(found < 0, np.arange(batch.num_rows), batch.num_rows + found)
    return pa.concat_batches([batch, new]).take(pa.array(rows))


def fetch_staged(
    parts: Iterable[Opened], schema: CollectionSchema, ids: pa.RecordBatch, *, vectors: bool
) -> pa.RecordBatch:
    """Return the records with these ids from staged parts; of each the first that is met."""
    found = [pa.RecordBatch.from_pylist([], batches.arrow_schema(schema, vectors=vectors))]
    for opened in parts:
        found.append(opened.fetch(ids, vectors=vectors))
        ids = ids.filter(pc.invert(batches.is_among(ids, found[-1])))
        if not ids.num_rows:
            break
    return pa.concat_batches(found)
