"""LegacyChromaStore: a copy of a folder of Chroma 0.3, two Parquet files that no later client opens.

`chroma-collections.parquet` lists the collections, `chroma-embeddings.parquet` holds the records of all of
them. Vectors are doubles there; Chroma itself searched them as float32, and that is what they come out as.

What `fingerprint` misses: nothing, but it also changes with a write to another collection of the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import PrivateAttr

from migration_pipelines import batch as batches
from migration_pipelines.envelope import matching
from migration_pipelines.errors import CollectionNotFoundError, StoreRefusedError
from migration_pipelines.filters import Filter
from migration_pipelines.model import CollectionSchema, Span
from migration_pipelines.stores.chroma.client import absolute
from migration_pipelines.stores.chroma.facts import index_of
from migration_pipelines.stores.chroma.legacy_files import (
    COLLECTIONS_FILE,
    RECORDS_FILE,
    convert,
    dimensions_of_first,
    legacy_collections,
)
from migration_pipelines.stores.chroma.records import collection_schema, held_ids
from migration_pipelines.stores.chroma.store import ChromaStore

_BATCH_RECORDS = 1_000
_BLOCK_BYTES = 2**20
_SHOWN_IDS = 5
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Opened:
    """A collection in the project's layout, mapped into memory; records without a usable vector come last."""

    schema: CollectionSchema
    table: pa.Table
    readable: int


class LegacyChromaStore(ChromaStore):
    """The copy of a folder of Chroma 0.3 that `ChromaStore.for_reading` makes."""

    _opening: Any = PrivateAttr(default_factory=threading.RLock)
    _open: dict[str, _Opened] = PrivateAttr(default_factory=dict)

    def list_collections(self) -> list[str]:
        """Return the names of all collections, sorted."""
        with self.translating():
            return sorted(legacy_collections(self._folder()))

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of; before its first record it has no dimensions."""
        return self._collection_of(collection).schema

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records."""
        table = self._collection_of(collection).table
        if where is None:
            return int(table.num_rows)
        pages = table.drop_columns(batches.VECTOR).to_batches(max_chunksize=_BATCH_RECORDS)
        return sum(matching(where, page).true_count for page in pages)

    def split(
        self,
        collection: str,
        *,
        span_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans of rows; records without a usable vector come last, in spans of their own."""
        opened = self._collection_of(collection)
        ends = sorted({opened.readable, opened.table.num_rows})
        for start, end in zip([0, *ends], ends, strict=False):
            for first in range(start, end, span_records):
                yield Span(bounds={"first": first}, records=min(span_records, end - first)), None

    def scan(
        self,
        collection: str,
        span: Span,
        *,
        ids: pa.RecordBatch | None = None,  # noqa: ARG002 - spans have bounds
        batch_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of a span.

        Raises
        ------
        StoreRefusedError
            A record has no usable vector.
        """
        opened = self._collection_of(collection)
        first = int(span.bounds["first"])
        if vectors and first >= opened.readable:
            raise self._not_usable(collection, opened)
        rows = opened.table.slice(first, span.records)
        rows = rows if vectors else rows.drop_columns(batches.VECTOR)
        for start in range(0, rows.num_rows, batch_records):
            yield pa.concat_batches(rows.slice(start, batch_records).to_batches())

    def scans_at_once(self) -> int | None:
        """Return None: many scans at a time lose nothing."""
        return None

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        opened = self._collection_of(collection)
        wanted = pa.array(held_ids(ids), pa.string())
        found = opened.table.filter(pc.is_in(opened.table.column(batches.ID), value_set=wanted))
        if vectors and found.column(batches.VECTOR).null_count:
            raise self._not_usable(collection, opened)
        found = found if vectors else found.drop_columns(batches.VECTOR)
        parts = found.to_batches()
        return pa.concat_batches(parts) if parts else pa.RecordBatch.from_pylist([], schema=found.schema)

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with any write to the folder."""
        digest = xxhash.xxh3_128()
        with self.translating(collection):
            for name in (COLLECTIONS_FILE, RECORDS_FILE):
                with (self._original() / name).open("rb") as file:
                    while block := file.read(_BLOCK_BYTES):
                        digest.update(block)
        return f"{collection}:{digest.hexdigest()}"

    def close(self) -> None:
        """Let go of the files."""
        with self._opening:
            self._open.clear()
        super().close()

    def _folder(self) -> Path:
        return absolute(self.path or "")

    def _collection_of(self, name: str) -> _Opened:
        with self._opening, self.translating(name):
            if name not in self._open:
                rows = legacy_collections(self._folder())
                if name not in rows:
                    raise CollectionNotFoundError(
                        f"{self.address(name)}: there is no such collection; there are: "
                        f"{', '.join(sorted(rows)) or 'none'}",
                        store=self.kind,
                        collection=name,
                    )
                self._open[name] = self._converted(rows[name])
                self._warn(name, self._open[name])
            return self._open[name]

    def _converted(self, row: Mapping[str, Any]) -> _Opened:
        """Return the collection, mapped from a file beside the copy that is made when it is first wanted."""
        folder, own_id = self._folder(), row["uuid"]
        dimensions = dimensions_of_first(folder / RECORDS_FILE, own_id)
        # By a hash: what stands in a file from elsewhere is no name for a file of ours.
        path = folder / f"{hashlib.sha256(own_id.encode()).hexdigest()[:32]}.arrow"
        if not path.is_file():
            partial = path.with_suffix(f".{threading.get_ident()}")
            rounded = convert(folder / RECORDS_FILE, own_id, partial, dimensions=dimensions or 0)
            if rounded:
                _logger.warning(
                    "%s: %d records hold doubles that aren't float32; they are rounded, as they were for "
                    "Chroma's own search",
                    self.address(row["name"]),
                    rounded,
                )
            partial.rename(path)
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        metadata = json.loads(row["metadata"] or "null") or {}
        schema = collection_schema(
            row["name"], dimensions=dimensions, index=index_of({}, metadata), embedder=None, metadata=metadata
        )
        return _Opened(schema, table, table.num_rows - table.column(batches.VECTOR).null_count)

    def _warn(self, name: str, opened: _Opened) -> None:
        if opened.readable < opened.table.num_rows:
            _logger.warning("%s", self._not_usable(name, opened))

    def _not_usable(self, name: str, opened: _Opened) -> StoreRefusedError:
        lost = opened.table.slice(opened.readable).column(batches.ID).to_pylist()
        shown = ", ".join(map(repr, lost[:_SHOWN_IDS]))
        return StoreRefusedError(
            f"{self.address(name)}: {len(lost)} of {opened.table.num_rows} records have no vector of "
            f"{opened.schema.vectors[0].dimensions} dimensions, among them {shown}; delete them with the "
            "version of Chroma that wrote them, and plan again",
            expected=opened.table.num_rows,
            found=opened.readable,
            records=lost,
        )
