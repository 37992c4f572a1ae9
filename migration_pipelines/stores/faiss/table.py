"""Tables of what stands beside the vectors, in a Parquet file or in memory, read by row and by id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError

NUMBER = "number"
GROUP_RECORDS, GROUP_BYTES = 8192, 8 * 2**20
_RECENT_GROUPS = 4
_NOTE = b"migration_pipelines.note"


class Table(Protocol):
    """Rows of records."""

    @property
    def count(self) -> int:
        """The number of rows."""

    def read(self, columns: Sequence[str], start: int, stop: int) -> pa.RecordBatch:
        """Return the rows from `start` to `stop`."""

    def find(self, ids: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Return the rows that have one of the ids, sorted."""

    def take(self, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        """Return these rows, which are sorted."""


class MemoryTable:
    """A table that is held as one batch."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self._batch.num_rows)

    def read(self, columns: Sequence[str], start: int, stop: int) -> pa.RecordBatch:
        """Return the rows from `start` to `stop`."""
        return self._batch.select(list(columns)).slice(start, stop - start)

    def find(self, ids: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Return the rows that have one of the ids, sorted."""
        return np.flatnonzero(np.asarray(batches.is_among(self._batch, ids)))

    def take(self, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        """Return these rows."""
        return self._batch.select(list(columns)).take(pa.array(rows))


class ParquetTable:
    """A table in a Parquet file of ours. Thread-safe; it remembers the row groups that it read last.

    Raises
    ------
    FileNotFoundError
    StoreRefusedError
        The file is cut, damaged or no Parquet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Held open: a newer generation may take the file's name away, and readers go on with this one.
        self._file = pa.OSFile(str(path))
        self._lock = threading.Lock()
        self._recent: OrderedDict[tuple[int, tuple[str, ...]], pa.RecordBatch] = OrderedDict()
        try:
            self._parquet = pq.ParquetFile(self._file, pre_buffer=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        groups = range(self._parquet.num_row_groups)
        sizes = [self._parquet.metadata.row_group(group).num_rows for group in groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def _damaged(self, error: Exception) -> StoreRefusedError:
        return StoreRefusedError(
            f"{self.path} can't be read: {error}; the file is cut or damaged: restore it or write the "
            "collection again, for nothing of it is skipped",
            file=str(self.path),
        )

    @property
    def schema(self) -> pa.Schema:
        """The columns of the file."""
        return self._parquet.schema_arrow

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self._starts[-1])

    @property
    def note(self) -> str:
        """What the writer noted beside the rows, "" for nothing."""
        notes: dict[bytes, bytes] = self._parquet.metadata.metadata or {}
        return notes.get(_NOTE, b"").decode()

    @cached_property
    def numbers(self) -> npt.NDArray[np.int64] | None:
        """int64[count], ascending: the lasting number of each row; None where that is the row itself."""
        if not self.count or NUMBER not in self.schema.names:
            return None
        last = self._group(self._parquet.num_row_groups - 1, [NUMBER]).column(NUMBER)
        if last[-1].as_py() == self.count - 1:
            return None
        parts = [self._group(group, [NUMBER]) for group in range(self._parquet.num_row_groups)]
        return np.concatenate([np.asarray(part.column(NUMBER)) for part in parts])

    def read(self, columns: Sequence[str], start: int, stop: int) -> pa.RecordBatch:
        """Return the rows from `start` to `stop`."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        found = []
        for group in range(first, self._parquet.num_row_groups):
            begin, end = self._starts[group : group + 2].tolist()
            if begin >= stop:
                break
            at = max(start, begin)
            found.append(self._group(group, columns).slice(at - begin, min(stop, end) - at))
        return self._joined(found, columns)

    def find(self, ids: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Return the rows that have one of the ids, sorted."""
        asked = ids.column(batches.ID).unique().sort()
        found = [np.empty(0, np.int64)]
        for group in range(self._parquet.num_row_groups) if len(asked) else ():
            if self._may_hold(group, asked):
                there = batches.is_among(self._group(group, [batches.ID, batches.ID_TYPE]), ids)
                found.append(np.flatnonzero(np.asarray(there)) + self._starts[group])
        return np.concatenate(found)

    def take(self, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        """Return these rows, which are sorted."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        found = [
            self._group(group, columns).take(pa.array(rows[groups == group] - self._starts[group]))
            for group in np.unique(groups).tolist()
        ]
        return self._joined(found, columns)

    def _joined(self, found: list[pa.RecordBatch], columns: Sequence[str]) -> pa.RecordBatch:
        if len(found) == 1:
            return found[0]
        if not found:
            fields = [self.schema.field(name) for name in columns]
            return pa.RecordBatch.from_pylist([], pa.schema(fields))
        return pa.concat_batches(found)

    def _may_hold(self, group: int, asked: pa.Array) -> bool:
        at = self.schema.get_field_index(batches.ID)
        statistics = self._parquet.metadata.row_group(group).column(at).statistics
        if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, str):
            return True
        # Both orders are those of the UTF-8 bytes.
        within = pc.and_(pc.greater_equal(asked, statistics.min), pc.less_equal(asked, statistics.max))
        return bool(pc.any(within).as_py())

    def _group(self, group: int, columns: Sequence[str]) -> pa.RecordBatch:
        key = (group, tuple(columns))
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
            try:
                table = self._parquet.read_row_group(group, columns=list(columns))
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(error) from error
            found = table.select(list(columns)).combine_chunks().to_batches()[0]
            found = found.replace_schema_metadata(None)
            self._recent[key] = found
            while len(self._recent) > _RECENT_GROUPS:
                self._recent.popitem(last=False)
        return found


class TableWriter:
    """Writes a Parquet file in row groups of bounded records and bytes, so that reading is bounded too."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.count = 0
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._records = self._bytes = 0
        self._writer = pq.ParquetWriter(
            str(path),
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[batches.ID_TYPE],
            write_statistics=[batches.ID],
            write_page_checksum=True,
        )

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a batch, into a row group with its neighbours."""
        for part in batches.split(batch, max_records=GROUP_RECORDS, max_bytes=GROUP_BYTES):
            if self._records + part.num_rows > GROUP_RECORDS or self._bytes + part.nbytes > GROUP_BYTES:
                self._flush()
            self._waiting.append(part)
            self._records += part.num_rows
            self._bytes += part.nbytes

    def note(self, text: str) -> None:
        """Note something beside the rows."""
        self._writer.add_key_value_metadata({_NOTE.decode(): text})

    def _flush(self) -> None:
        waiting, self._waiting, self._records, self._bytes = self._waiting, [], 0, 0
        rows = sum(part.num_rows for part in waiting)
        if rows:
            self._writer.write_table(pa.Table.from_batches(waiting, self._schema), row_group_size=rows)
            self.count += rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._flush()
            self._writer.close()
        else:
            with suppress(OSError):  # of a full disk, which is what failed already
                self._writer.close()


def whole(table: Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield all rows of a table, a bounded number at a time."""
    for start in range(0, table.count, GROUP_RECORDS):
        yield table.read(columns, start, min(table.count, start + GROUP_RECORDS))
