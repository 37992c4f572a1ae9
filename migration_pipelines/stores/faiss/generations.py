"""The generations of a collection of our own: opening the one that is there, and the records of the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
from migration_pipelines.stores.faiss.parts import Part, id_hashes, last_of_each, latest
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


def merged(folder: CollectionFolder, manifest: Manifest, parts: Sequence[Part]) -> Batches:
    """Return the records of a collection with those of parts put in; those that are there keep their places.

    Of the parts 24 bytes a record are held in memory.
    """
    opened, staged = open_published(folder, manifest), _Staged(parts, manifest.description)

    def records() -> Iterator[pa.RecordBatch]:
        fresh = staged.keep.copy()
        for batch in _numbered(opened):
            rows = staged.find(batch)
            fresh[rows[rows >= 0]] = False
            yield staged.put_in(batch, rows) if (rows >= 0).any() else batch
        yield from latest(parts, fresh, manifest.description)

    return records


class _Staged:
    """The records of staged parts by their ids, of each id the last; `keep` says which those are."""

    def __init__(self, parts: Sequence[Part], schema: CollectionSchema) -> None:
        self._parts, self._schema = parts, schema
        hashes = [id_hashes([ParquetTable(part.records)]) for part in parts]
        self._starts = np.cumsum([0, *map(len, hashes)])
        everything = np.concatenate(hashes)
        self.keep = last_of_each(everything)
        rows = np.flatnonzero(self.keep)
        self._rows = rows[np.argsort(everything[rows])]
        self._hashes = everything[self._rows]

    def find(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Return int64[n_records]: the row, over all parts, that has a record's id; -1 where none has."""
        hashes = batches.id_hashes(batch)
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        return np.where(self._hashes[at] == hashes, self._rows[at], -1)

    def put_in(self, batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        """Return a batch with the records of some rows in the place of its own, whose numbers stay."""
        numbers, plain = batch.column(NUMBER), batch.drop_columns([NUMBER])
        wanted = np.sort(rows[rows >= 0])
        found = [plain]
        for part, start, stop in zip(self._parts, self._starts[:-1], self._starts[1:], strict=True):
            inside = wanted[slice(*np.searchsorted(wanted, [start, stop]))] - start
            if len(inside):
                found.append(part.open(self._schema).take(inside).select(plain.schema.names))
        places = np.where(rows < 0, np.arange(len(rows)), len(rows) + np.searchsorted(wanted, rows))
        return pa.concat_batches(found).take(pa.array(places)).append_column(NUMBER, numbers)


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
