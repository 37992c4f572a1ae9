"""Exact nearest neighbours, for stores that have no search of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import DimensionMismatchError, UnsupportedOperationError
from migration_pipelines.model import CollectionSchema, DType, Metric, VectorField

_Floats = npt.NDArray[np.float64]


def _cosine(matrix: _Floats, query: _Floats) -> Any:
    norms = np.linalg.norm(matrix, axis=1) * np.linalg.norm(query)
    # A vector without a direction is like nothing and unlike nothing.
    return 1 - np.divide(matrix @ query, norms, out=np.zeros_like(norms), where=norms > 0)


def _dot(matrix: _Floats, query: _Floats) -> Any:
    return -(matrix @ query)


def _euclidean(matrix: _Floats, query: _Floats) -> Any:
    return np.linalg.norm(matrix - query, axis=1)


def _manhattan(matrix: _Floats, query: _Floats) -> Any:
    return np.abs(matrix - query).sum(axis=1)


def _hamming(matrix: _Floats, query: _Floats) -> Any:
    return (matrix != query).sum(axis=1).astype(np.float64)


def _jaccard(matrix: _Floats, query: _Floats) -> Any:
    either = ((matrix != 0) | (query != 0)).sum(axis=1)
    both = ((matrix != 0) & (query != 0)).sum(axis=1)
    return 1 - np.divide(both, either, out=np.ones(len(matrix)), where=either > 0)


_METRICS: Mapping[Metric, Callable[[_Floats, _Floats], Any]] = {
    Metric.COSINE: _cosine,
    Metric.DOT: _dot,
    Metric.EUCLIDEAN: _euclidean,
    Metric.MANHATTAN: _manhattan,
    Metric.HAMMING: _hamming,
    Metric.JACCARD: _jaccard,
}


def nearest(
    parts: Iterable[pa.RecordBatch],
    vector: Any,
    schema: CollectionSchema,
    *,
    name: str,
    limit: int,
    where: str,
) -> list[tuple[batches.RecordId, float]]:
    """Return the nearest `(id, distance)` of all records, nearest first; smaller is nearer.

    Parameters
    ----------
    parts
        Batches with the columns `id`, `id_type` and that of the vector field; one at a time is held.
    vector
        float32[dimensions]; of a `bit` field its bits, as zeros and ones.
    schema, name
        The vector field to search by. Without a metric of its own it is searched by cosine; a dot
        product counts as its negative.
    where
        The collection's address, for messages.

    Raises
    ------
    UnsupportedOperationError
        There is no such field, or it holds no dense vectors.
    DimensionMismatchError
    """
    field = next((field for field in schema.vectors if field.name == name), None)
    if field is None or not batches.is_dense(pa.nulls(0, batches.vector_type(field))):
        raise UnsupportedOperationError(
            f"{where}: no dense vector {name or '(default)'} to search by; choose one of "
            f"{[field.name for field in schema.vectors]}"
        )
    query = np.asarray(vector, np.float64).reshape(-1)
    if len(query) != field.dimensions:
        raise DimensionMismatchError(
            f"{where}: the query has {len(query)} dimensions, vector {name or '(default)'} "
            f"has {field.dimensions}",
            expected=field.dimensions,
            found=len(query),
        )
    best: list[tuple[batches.RecordId, float]] = []
    for part in parts:
        best = sorted([*best, *_nearest_of(part, query, field, limit)], key=lambda pair: pair[1])[:limit]
    return best


def _nearest_of(
    part: pa.RecordBatch, query: _Floats, field: VectorField, limit: int
) -> list[tuple[batches.RecordId, float]]:
    part = part.filter(part.column(batches.vector_column(field.name)).is_valid())
    matrix = batches.dense_matrix(part.column(batches.vector_column(field.name)))
    if field.dtype is DType.BIT:
        matrix = np.unpackbits(matrix, axis=1, count=field.dimensions)
    with np.errstate(invalid="ignore", over="ignore"):
        found = _METRICS[field.metric or Metric.COSINE](matrix.astype(np.float64), query)
    rows = [row for row in np.argsort(found, kind="stable")[:limit] if not np.isnan(found[row])]
    ids = batches.typed_ids(part.select([batches.ID, batches.ID_TYPE]).take(pa.array(rows, pa.int64())))
    return list(zip(ids, found[rows].tolist(), strict=True))
