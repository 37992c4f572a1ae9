"""What FAISS can hold: checks before anything is written."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError, UnsupportedOperationError
from migration_pipelines.model import CollectionSchema, DType, Metric, VectorKind


def check_holdable(schema: CollectionSchema, where: str) -> None:
    """Raise where no index can hold such a collection.

    Raises
    ------
    UnsupportedOperationError
    """
    field = schema.vectors[0] if len(schema.vectors) == 1 else None
    if field is None or field.name or field.kind is not VectorKind.DENSE or schema.has_namespaces:
        raise UnsupportedOperationError(
            f"{where}: FAISS holds one dense vector a record, without a name, and no namespaces",
            found=[vector.name for vector in schema.vectors],
        )
    is_bits = field.dtype is DType.BIT
    if is_bits != (field.metric is Metric.HAMMING) or (is_bits and (field.dimensions or 0) % 8):
        raise UnsupportedOperationError(
            f"{where}: FAISS compares bits, a multiple of 8 of them, by hamming distance, and numbers by any "
            f"other metric; found {field.dimensions} dimensions of {field.dtype} by {field.metric}",
            found=(field.dimensions, field.dtype, field.metric),
        )


def checked(batch: pa.RecordBatch, schema: CollectionSchema, where: str) -> pa.RecordBatch:
    """Return a batch with the columns of the schema, every record of which can be indexed.

    Raises
    ------
    DimensionMismatchError
    RecordRejectedError
        A record has no vector, or one that holds NaN or an infinity.
    """
    batch = batches.conform(batch, schema, where=where)
    column = batch.column(batches.VECTOR)
    bad = np.asarray(column.is_null()) | batches.non_finite_rows(column)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise RecordRejectedError(
            f"{where}: {int(bad.sum())} of {batch.num_rows} records have no vector, or one that holds NaN or "
            f"an infinity, which no index can be searched by; the first is {batch.column(batches.ID)[row]}",
            found=int(bad.sum()),
        )
    return batch
