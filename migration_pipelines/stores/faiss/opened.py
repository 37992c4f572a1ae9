"""A collection opened for reading: records and vectors, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import DimensionMismatchError, UnsupportedOperationError
from migration_pipelines.model import CollectionSchema, DType, Metric
from migration_pipelines.stores.faiss.build import normalised
from migration_pipelines.stores.faiss.index import IndexFile, driver
from migration_pipelines.stores.faiss.table import Table

# What a search looks through at least: the nearest of many are surer than the nearest of few.
_LEAST_EF_SEARCH, _LEAST_LISTS = 64, 16


@dataclass(frozen=True)
class Opened:
    """One generation of a collection; it stays readable when a newer one is published.

    Parameters
    ----------
    index
        Row by row what `records` has, or of another order by its `labels`.
    numbers
        int64[count], ascending: the lasting number of each row; None where that is the row itself.
    normalised
        The index has the vectors normalised, and `records` has them as they are.
    """

    schema: CollectionSchema
    records: Table
    index: IndexFile
    numbers: npt.NDArray[np.int64] | None = None
    normalised: bool = False

    @property
    def count(self) -> int:
        """The number of records."""
        return self.records.count

    def rows_between(self, first: int, end: int | None) -> tuple[int, int]:
        """Return the rows whose numbers are from `first` to below `end`; None for no end."""
        if self.numbers is None:
            return min(first, self.count), self.count if end is None else min(end, self.count)
        start, stop = np.searchsorted(self.numbers, [first, self.count if end is None else end]).tolist()
        return start, self.count if end is None else stop

    def number_of(self, row: int) -> int:
        """Return the lasting number of a row."""
        return row if self.numbers is None else int(self.numbers[row])

    def scan(self, start: int, stop: int, size: int, *, vectors: bool) -> Iterator[pa.RecordBatch]:
        """Yield the records of the rows from `start` to `stop`."""
        for at in range(start, stop, size):
            yield self.read(at, min(stop, at + size), vectors=vectors)

    def read(self, start: int, stop: int, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of the rows from `start` to `stop`."""
        found = self.records.read(self._columns(vectors=vectors), start, stop)
        if vectors and not self.normalised:
            return self._with_vectors(found, self.index.read(start, stop))
        return found

    def fetch(self, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records with these ids that are there."""
        rows = self.records.find(ids)
        if not len(rows):
            return pa.RecordBatch.from_pylist([], batches.arrow_schema(self.schema, vectors=vectors))
        return self.take(rows, vectors=vectors)

    def take(self, rows: npt.NDArray[np.int64], *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these rows, which are sorted."""
        found = self.records.take(self._columns(vectors=vectors), rows)
        return self._with_vectors(found, self.index.take(rows)) if vectors and not self.normalised else found

    def _columns(self, *, vectors: bool) -> list[str]:
        return list(batches.arrow_schema(self.schema, vectors=vectors and self.normalised).names)

    def _with_vectors(self, found: pa.RecordBatch, matrix: npt.NDArray[Any]) -> pa.RecordBatch:
        columns = {name: found.column(name) for name in found.schema.names}
        columns[batches.VECTOR] = batches.dense_vectors(np.ascontiguousarray(matrix))
        schema = batches.arrow_schema(self.schema)
        return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)

    # ── search ───────────────────────────────────────────────────────────────────────────────────────

    def search(self, vector: Any, limit: int, where: str) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)` by the index itself.

        Euclidean distances are FAISS's square roots; an inner product counts as its negative, a cosine
        similarity as its distance from 1.

        Raises
        ------
        DimensionMismatchError
        """
        (field,) = self.schema.vectors
        query: npt.NDArray[Any] = np.asarray(vector, np.float32).reshape(1, -1)
        if query.shape[1] != field.dimensions:
            raise DimensionMismatchError(
                f"{where}: the query has {query.shape[1]} dimensions, the collection's vectors have "
                f"{field.dimensions}",
                expected=field.dimensions,
                found=query.shape[1],
            )
        limit = min(limit, self.count)
        if not limit:
            return []
        if field.dtype is DType.BIT:
            query = np.packbits(query != 0, axis=1)
        elif field.metric is Metric.COSINE:
            query = normalised(query)
        index = self.index.searchable()
        _look_further(index, limit)
        scores, labels = (found[0] for found in index.search(np.ascontiguousarray(query), limit))
        there = labels >= 0 if self.index.labels is None else np.isin(labels, self.index.labels)
        rows = self._rows_of(labels[there])
        found = _distances(scores[there].astype(np.float64), index.metric_type, field.metric)
        order = np.argsort(found, kind="stable")
        return list(zip(self._ids(rows[order]), found[order].tolist(), strict=True))

    def _rows_of(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self.index.labels is None:
            return labels
        order = np.argsort(self.index.labels, kind="stable")
        return order[np.searchsorted(self.index.labels, labels, sorter=order)]

    def _ids(self, rows: npt.NDArray[np.int64]) -> list[batches.RecordId]:
        wanted = np.sort(rows)
        found = self.records.take([batches.ID, batches.ID_TYPE], wanted) if len(rows) else None
        ids = batches.typed_ids(found) if found is not None else []
        return [ids[at] for at in np.searchsorted(wanted, rows).tolist()]


def _distances(
    scores: npt.NDArray[np.float64], faiss_metric: int, metric: Metric | None
) -> npt.NDArray[np.float64]:
    if metric is Metric.COSINE:
        return 1 - scores
    if metric is Metric.HAMMING:
        return scores
    if faiss_metric == driver().METRIC_INNER_PRODUCT:
        return -scores
    is_squared = faiss_metric == driver().METRIC_L2
    return np.sqrt(scores.clip(min=0)) if is_squared else scores


def _look_further(index: Any, limit: int) -> None:
    """Let a search look through enough of an index that isn't exact; what is loaded changes, not the file."""
    faiss = driver()
    if isinstance(index, faiss.IndexBinary):
        return
    inner = faiss.downcast_index(index)
    while isinstance(inner, (faiss.IndexIDMap, faiss.IndexPreTransform)):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = max(inner.hnsw.efSearch, _LEAST_EF_SEARCH, 2 * limit)
    elif isinstance(inner, faiss.IndexIVF):
        inner.nprobe = min(inner.nlist, max(inner.nprobe, _LEAST_LISTS, inner.nlist // 16))


def unsearchable(where: str, name: str) -> UnsupportedOperationError:
    """Return the error for a search by a vector that there isn't."""
    return UnsupportedOperationError(f"{where}: no vector {name!r} to search by, only the default one")
