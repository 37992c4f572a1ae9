"""What names and sums up records, in files divided by the hash of the id: any one of them fits into memory.

What is to be joined by id is divided on both sides alike: a record's rows are in buckets of the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.batch import ID, ID_TYPE, NAMESPACE
from migration_pipelines.ledger import NAMES, SUMMED_UP, writing

N_BUCKETS = 64
_STORED = tuple(f"stored_{name}" for name in (ID, ID_TYPE, NAMESPACE))
# Beside the record's own id, what names it in the store: another where the record has an envelope.
SUMMARY = pa.schema([*SUMMED_UP, *((name, pa.string()) for name in _STORED)])

Put = Callable[[pa.RecordBatch], None]


def sum_up(batch: pa.RecordBatch, digests: pa.Array | None = None) -> pa.RecordBatch:
    """Return a row of `SUMMED_UP` for each record; `digests`, binary(16)[n_records], are null by default."""
    sums = pa.nulls(batch.num_rows, pa.binary(16)) if digests is None else digests
    return pa.RecordBatch.from_arrays([*names_of(batch).columns, sums], schema=SUMMED_UP)


def summary(batch: pa.RecordBatch, stored: pa.RecordBatch, digests: pa.Array | None = None) -> pa.RecordBatch:
    """Return a row of `SUMMARY` for each record: as it was before any envelope, and as its store names it."""
    columns = [*sum_up(batch, digests).columns, *names_of(stored).columns]
    return pa.RecordBatch.from_arrays(columns, schema=SUMMARY)


def names_of(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row of `NAMES` for each record, in the default namespace where it has none."""
    ids = batches.fit_namespaces(batches.ids_of(batch), wanted=True)
    return pa.RecordBatch.from_arrays(list(map(ids.column, NAMES.names)), schema=NAMES)


def one_batch(rows: pa.Table) -> pa.RecordBatch:
    """Return some rows, or none, as one batch."""
    columns = [column.combine_chunks() for column in rows.columns]
    return pa.RecordBatch.from_arrays(columns, schema=rows.schema)


def stored_ids(rows: pa.Table, *, has_namespaces: bool) -> pa.RecordBatch:
    """Return what names some summed up records in their store, as `batch.ids_of` does."""
    names = (ID, ID_TYPE, NAMESPACE) if has_namespaces else (ID, ID_TYPE)
    stored = rows.select([f"stored_{name}" for name in names])
    return one_batch(stored.rename_columns(list(names)))


def keys(rows: pa.Table) -> pa.Array:
    """Return one text for what names each record (see `batch.id_keys`)."""
    found = batches.id_keys(rows)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def without(rows: pa.Table, others: pa.Table) -> pa.Table:
    """Return the rows of records that aren't among others."""
    return rows.filter(pc.invert(pc.is_in(keys(rows), value_set=keys(others)))) if len(others) else rows


class Buckets:
    """A folder of files with rows of one schema, which has the columns of `NAMES`."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema

    @contextmanager
    def writing(self) -> Iterator[Put]:
        """Give the function to put rows in with; the files are whole when the context ends.

        Raises
        ------
        DiskFullError
        """
        with ExitStack() as stack, writing(self.folder):
            self.folder.mkdir(parents=True)
            paths = map(self._path, range(N_BUCKETS))
            writers = [stack.enter_context(pa.ipc.new_file(str(path), self.schema)) for path in paths]

            def put(rows: pa.RecordBatch) -> None:
                chosen = batches.id_hashes(rows).view("u8")[::2] % N_BUCKETS
                order = np.argsort(chosen, kind="stable")
                ordered, found = rows.take(pa.array(order)), chosen[order]
                starts = np.flatnonzero(np.diff(found, prepend=N_BUCKETS))
                for start, end in pairwise([*starts.tolist(), len(found)]):
                    writers[int(found[start])].write_batch(ordered.slice(start, end - start))

            yield put

    def read(self, bucket: int) -> pa.Table:
        """Return the rows of one bucket."""
        with pa.memory_map(str(self._path(bucket))) as source:
            return pa.ipc.open_file(source).read_all()

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:03d}.arrow"
