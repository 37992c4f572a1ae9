"""Reader: the records in a collection's files, by span, by id and in whole, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores.parquet import part as parts
from migration_pipelines.stores.parquet import plain
from migration_pipelines.stores.parquet.collection import Contents, Located

_RECENT_GROUPS = 4  # a part is verified in small steps, by a few workers at once


class Reader:
    """Reads files; remembers the row groups and the plain schemas that it read last. Thread-safe.

    What it remembers is known by the file's size, time of change and inode too: a file that was replaced is
    read again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: OrderedDict[tuple[Any, ...], pa.RecordBatch] = OrderedDict()
        self._schemas: dict[str, tuple[Any, CollectionSchema]] = {}

    # ── files ────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def group_records(located: Located, namespace: str | None = None) -> list[int]:
        """Return the number of records of each row group of a file, those of one namespace or all."""
        with _opened(located) as file:
            return parts.group_records(file, namespace)

    def plain_schema(self, name: str, contents: Contents) -> CollectionSchema:
        """Return the schema of a collection of plain files."""
        files = list(contents.files.values())
        folder = files[0].folder
        version = [(file.name, folder.version(file.name)) for file in files]
        with self._lock:
            known = self._schemas.get(folder.where())
        if known is not None and known[0] == version:
            return known[1]
        schema = plain.infer_schema(name, folder, [file.name for file in files])
        with self._lock:
            self._schemas[folder.where()] = (version, schema)
        return schema

    # ── whole files and spans ────────────────────────────────────────────────────────────────────────

    @staticmethod
    def spans(
        sizes: Sequence[int], span_records: int, *, static: bool
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the bounds of spans of one file, and the records of each.

        Parameters
        ----------
        sizes
            The records of each row group.
        static
            The file is never rewritten: a row group far above `span_records` is cut by row numbers.
        """
        first = records = 0
        for group, size in enumerate(sizes):
            large = static and size > 2 * span_records
            if records and (large or records + size > span_records):
                yield {"groups": [first, group]}, records
                records = 0
            if large:
                for row in range(0, size, span_records):
                    stop = min(size, row + span_records)
                    yield {"groups": [group, group + 1], "rows": [row, stop]}, stop - row
            elif size:
                first = first if records else group
                records += size
        if records:
            yield {"groups": [first, len(sizes)]}, records

    @staticmethod
    def scan(
        located: Located,
        schema: CollectionSchema,
        *,
        batch_records: int = parts.ROW_GROUP_RECORDS,
        vectors: bool = True,
        bounds: Mapping[str, Any] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of a file, or those within a span's bounds, in batches."""
        with _opened(located) as file:
            names = _columns(file, located, schema, vectors=vectors)
            first, stop = (bounds or {}).get("groups", (0, file.num_row_groups))
            start, end = (bounds or {}).get("rows", (0, None))
            row = 0
            for batch in _batches(file, located, range(first, stop), names, batch_records):
                kept = batch.slice(
                    max(0, start - row), None if end is None else max(0, end - max(row, start))
                )
                row += batch.num_rows
                if kept.num_rows:
                    yield _records(kept.select(names), located, schema, vectors=vectors)
                if end is not None and row >= end:
                    return

    # ── ids ──────────────────────────────────────────────────────────────────────────────────────────

    def fetch(
        self, files: Iterable[Located], schema: CollectionSchema, ids: pa.RecordBatch, *, vectors: bool = True
    ) -> pa.RecordBatch:
        """Return the records with these ids that are in the files."""
        found = [pa.RecordBatch.from_pylist([], schema=batches.arrow_schema(schema, vectors=vectors))]
        for located in files:
            for group in self._groups_with(located, schema, ids, vectors=vectors):
                found.append(group.filter(batches.is_among(group, ids)))
                ids = ids.filter(pc.invert(batches.is_among(ids, found[-1])))
            if not ids.num_rows:
                break
        return pa.concat_batches(found)

    def held(self, located: Located, ids: pa.RecordBatch) -> pa.RecordBatch:
        """Return those of the ids that are in a file of this project."""
        ids = batches.ids_of(ids)
        found = [ids.slice(0, 0)]
        with _opened(located) as file:
            for group in parts.groups_that_may_hold(file, ids):
                there = self._group(located, file, group, batches.id_names(file.schema_arrow))
                found.append(ids.filter(batches.is_among(ids, there)))
        return pa.concat_batches(found)

    def _groups_with(
        self, located: Located, schema: CollectionSchema, ids: pa.RecordBatch, *, vectors: bool
    ) -> Iterator[pa.RecordBatch]:
        """Yield the row groups of a file that hold any of the ids, until each was met."""
        if located.is_plain:
            yield from self.scan(located, schema, vectors=vectors)
            return
        with _opened(located) as file:
            names = _columns(file, located, schema, vectors=vectors)
            for group in self._recent_first(located, parts.groups_that_may_hold(file, ids), names):
                there = self._group(located, file, group, batches.id_names(file.schema_arrow))
                held = batches.is_among(ids, there)
                if held.true_count:
                    yield self._group(located, file, group, names)
                    ids = ids.filter(pc.invert(held))
                if not ids.num_rows:
                    return

    def _recent_first(self, located: Located, groups: list[int], names: Sequence[str]) -> list[int]:
        """Return the groups, beginning with the last read one: who reads by ids mostly goes in order."""
        file = _version(located)
        with self._lock:
            recent = [key[-2] for key in self._recent if key[:-2] == file and key[-1] == tuple(names)]
        start = recent[-1] if recent else 0
        return sorted(groups, key=lambda group: (group < start, group))

    def _group(
        self, located: Located, file: pq.ParquetFile, group: int, names: Sequence[str]
    ) -> pa.RecordBatch:
        key = (*_version(located), group, tuple(names))
        with self._lock:
            found = self._recent.get(key)
            if found is not None:
                self._recent.move_to_end(key)
                return found
        found = parts.read_group(file, group, names)
        if batches.METADATA in names:  # ids alone are quick to read, and would push the records out
            with self._lock:
                self._recent[key] = found
                while len(self._recent) > _RECENT_GROUPS:
                    self._recent.popitem(last=False)
        return found


def _batches(
    file: pq.ParquetFile, located: Located, groups: range, names: Sequence[str], records: int
) -> Iterator[pa.RecordBatch]:
    # What is prefetched is held until the iterator ends: of a remote file one row group at a time.
    for some in ([group] for group in groups) if located.folder.prefetch else (list(groups),):
        yield from file.iter_batches(records, row_groups=some, columns=names)


def _version(located: Located) -> tuple[Any, ...]:
    return located.folder.where(located.name), *located.folder.version(located.name)


@contextmanager
def _opened(located: Located) -> Iterator[pq.ParquetFile]:
    """Open a file that is what the manifest says.

    Raises
    ------
    FileNotFoundError
    StoreRefusedError
    """
    path, expected = located.folder.where(located.name), located.expected
    size = located.folder.version(located.name)[0]
    with parts.opened(located.folder, located.name) as file:
        found = (size, file.metadata.num_rows)
        if expected is not None and found != (expected.bytes, expected.records):
            raise StoreRefusedError(
                f"{path} has {size} bytes and {found[1]} records, its manifest says {expected.bytes} and "
                f"{expected.records}: something else changed it; restore it or write the collection again",
                expected=(expected.bytes, expected.records),
                found=found,
            )
        yield file


def _columns(file: pq.ParquetFile, located: Located, schema: CollectionSchema, *, vectors: bool) -> list[str]:
    if located.is_plain:
        return plain.columns_needed(file.schema_arrow, vectors=vectors)
    expected, found = batches.arrow_schema(schema), file.schema_arrow
    if not found.equals(expected):
        raise StoreRefusedError(
            f"{located.folder.where(located.name)} has the columns {found.names}, its manifest says "
            f"{expected.names} of certain types: something else changed it; restore it",
            expected=str(expected),
            found=str(found),
        )
    return list(batches.arrow_schema(schema, vectors=vectors).names)


def _records(
    found: pa.RecordBatch, located: Located, schema: CollectionSchema, *, vectors: bool
) -> pa.RecordBatch:
    if located.is_plain:
        where = located.folder.where(located.name)
        return plain.to_batch(found, schema, vectors=vectors, where=where)
    return found.replace_schema_metadata(None)
