"""One Parquet file of a collection: writing it, opening it, finding ids in it, changing its row groups.

Layout: zstd level 1, float vectors split by byte (BYTE_STREAM_SPLIT): the fastest that is also small. Row
groups are bounded in records and bytes, so that reading is bounded too. Page checksums are written, and
checked on reading. The footer carries the digest of the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.stores.parquet.folder import Folder

ROW_GROUP_RECORDS = 8192
ROW_GROUP_BYTES = 8 * 2**20
SUFFIX = ".parquet"

_DIGEST_KEY = "migration_pipelines.digest"
_READ_BUFFER_BYTES = 2**20
_PLAIN_TEXTS = (batches.ID_TYPE, batches.NAMESPACE)


def split(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield slices of a batch that keep to the bounds of a row group."""
    return batches.split(batch, max_records=ROW_GROUP_RECORDS, max_bytes=ROW_GROUP_BYTES)


class PartWriter:
    """Writes batches into row groups, and counts and digests them on the way.

    Parameters
    ----------
    sink
        Where the file goes; the caller closes it.
    schema
        The columns, as `batch.arrow_schema` gives them.
    """

    def __init__(self, sink: pa.NativeFile, schema: pa.Schema) -> None:
        self.records = self.digest = 0
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_records = self._waiting_bytes = 0
        self._writer = pq.ParquetWriter(
            sink,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in _PLAIN_TEXTS if name in schema.names],
            use_byte_stream_split=[path for field in schema for path in _float_paths(field.name, field.type)],
            write_statistics=[batches.ID],
            write_page_checksum=True,
        )

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a batch, into a row group with its neighbours."""
        batch = pa.RecordBatch.from_arrays([batch.column(n) for n in self._schema.names], schema=self._schema)
        for part in split(batch):
            records = self._waiting_records + part.num_rows
            if records > ROW_GROUP_RECORDS or self._waiting_bytes + part.nbytes > ROW_GROUP_BYTES:
                self._flush()
            self._waiting.append(part)
            self._waiting_records += part.num_rows
            self._waiting_bytes += part.nbytes

    def write_group(self, group: pa.RecordBatch) -> None:
        """Write a row group of its own, be it empty."""
        self._flush()
        self._write([pa.RecordBatch.from_arrays(group.columns, schema=self._schema)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what waits, and the footer; of a file that failed nothing more."""
        try:
            if kind is None:
                self._flush()
                self._writer.add_key_value_metadata({_DIGEST_KEY: f"{self.digest:032x}"})
                self._writer.close()
        finally:
            self._writer.is_open = False  # or pyarrow would try again when it is collected

    def _flush(self) -> None:
        waiting, self._waiting, self._waiting_records, self._waiting_bytes = self._waiting, [], 0, 0
        if waiting:
            self._write(waiting)

    def _write(self, group: list[pa.RecordBatch]) -> None:
        """Write batches as one row group."""
        table = pa.Table.from_batches(group, self._schema)
        self.records += table.num_rows
        self.digest = batches.add_digests([self.digest, batches.digest(group)])
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))


def _float_paths(path: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_floating(kind):
        return [path]
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _float_paths(f"{path}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for item in kind for leaf in _float_paths(f"{path}.{item.name}", item.type)]
    return []


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def opened(folder: Folder, name: str) -> Iterator[pq.ParquetFile]:
    """Open a file for reading; what can't be read is told by its name.

    Raises
    ------
    FileNotFoundError
    StoreRefusedError
        The file is truncated, corrupt, or no Parquet at all.
    """
    try:
        with (
            folder.open(name) as source,
            pq.ParquetFile(
                source,
                buffer_size=0 if folder.prefetch else _READ_BUFFER_BYTES,
                pre_buffer=folder.prefetch,
                page_checksum_verification=True,
            ) as file,
        ):
            yield file
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StoreRefusedError(
            f"{folder.where(name)} can't be read: {error}; the file is damaged or no Parquet: restore it or "
            "write the collection again, for nothing of it is skipped",
            file=folder.where(name),
        ) from error


def digest_of(file: pq.ParquetFile) -> int | None:
    """Return the digest of the records that the footer carries, None in a file of another tool."""
    found = (file.metadata.metadata or {}).get(_DIGEST_KEY.encode())
    return None if found is None else int(found, 16)


def group_records(file: pq.ParquetFile, namespace: str | None = None) -> list[int]:
    """Return the number of records of each row group, those of one namespace or all."""
    groups = range(file.num_row_groups)
    if namespace is None:
        return [file.metadata.row_group(group).num_rows for group in groups]
    if batches.NAMESPACE not in file.schema_arrow.names:
        return [0 if namespace else file.metadata.row_group(group).num_rows for group in groups]
    columns = (read_group(file, group, [batches.NAMESPACE]).column(0) for group in groups)
    return [pc.equal(pc.fill_null(column, ""), namespace).true_count for column in columns]


def read_group(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.RecordBatch:
    """Return one row group's columns, in the order asked for."""
    table = file.read_row_group(group, columns=list(columns)).select(list(columns)).combine_chunks()
    found = table.to_batches()
    batch = found[0] if found else pa.RecordBatch.from_pylist([], schema=table.schema)
    return batch.replace_schema_metadata(None)


def read_ids(folder: Folder, name: str) -> pa.RecordBatch:
    """Return all ids of a file, with their namespaces where it has them."""
    with opened(folder, name) as file:
        names = batches.id_names(file.schema_arrow)
        groups = [read_group(file, group, names) for group in range(file.num_row_groups)]
    columns = pa.schema([(name, pa.string()) for name in names])
    return pa.concat_batches([pa.RecordBatch.from_pylist([], columns), *(g.cast(columns) for g in groups)])


def groups_that_may_hold(file: pq.ParquetFile, ids: pa.RecordBatch) -> list[int]:
    """Return the row groups whose statistics don't rule out that they hold one of the ids.

    In a file of this project: the ids are its first column.
    """
    asked = ids.column(batches.ID).unique().sort()
    return [group for group in range(file.num_row_groups) if _may_hold(file.metadata.row_group(group), asked)]


def _may_hold(group: Any, asked: pa.Array) -> bool:
    statistics = group.column(0).statistics
    if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, str):
        return True
    # Both orders are those of the UTF-8 bytes.
    within = pc.and_(pc.greater_equal(asked, statistics.min), pc.less_equal(asked, statistics.max))
    return bool(pc.any(within).as_py())


def row_groups(folder: Folder, name: str) -> Iterator[pa.RecordBatch]:
    """Yield every row group of a file whole, empty ones too."""
    with opened(folder, name) as file:
        for group in range(file.num_row_groups):
            yield read_group(file, group, file.schema_arrow.names)


# ── changing ────────────────────────────────────────────────────────────────────────────────────


Change = Callable[[pa.RecordBatch], pa.RecordBatch]


def replacing(batch: pa.RecordBatch) -> Change:
    """Return what puts the records of `batch` in the place of those in a row group that have their ids."""

    def change(group: pa.RecordBatch) -> pa.RecordBatch:
        rows = np.arange(group.num_rows)
        found = batches.positions(group, batch)
        rows = np.where(found < 0, rows, group.num_rows + found)
        return pa.concat_batches([group, batch]).take(pa.array(rows))

    return change


def outside(group: pa.RecordBatch, namespace: str) -> pa.RecordBatch:
    """Return the records of a row group that are in any other namespace."""
    return group.filter(pc.not_equal(group.column(batches.NAMESPACE), namespace))


def removing(ids: pa.RecordBatch) -> Change:
    """Return what takes the records with these ids out of a row group."""
    return lambda group: group.filter(pc.invert(batches.is_among(group, ids)))
