"""The Arrow layout of a batch: columns, checks, splitting, digests.

A batch is a `pyarrow.RecordBatch` with these columns:

=================  ====================================================================================
`id`, `id_type`    text of the id and its kind (`int`, `uuid`, `str`); both never null
`vector`           the default vector; others are `vector:<name>`; null where a record has none
`document`         text, null where a record has none
`metadata`         canonical JSON text of an object; null where a record has none
`namespace`        text, "" for the default one; only in collections with namespaces
=================  ====================================================================================

A dense vector is a fixed-size list of its dtype (`bit`: of bytes), a multivector a list of those, a
sparse one a struct of `indices` (uint32) and `values` (float32).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from migration_pipelines.errors import DimensionMismatchError, UsageError
from migration_pipelines.model import CollectionSchema, DType, IdKind, VectorField, VectorKind

ID = "id"
ID_TYPE = "id_type"
VECTOR = "vector"
DOCUMENT = "document"
METADATA = "metadata"
NAMESPACE = "namespace"

RecordId = int | uuid.UUID | str

_ARROW_TYPES = {
    DType.FLOAT32: pa.float32(),
    DType.FLOAT16: pa.float16(),
    DType.INT8: pa.int8(),
    DType.UINT8: pa.uint8(),
    DType.BIT: pa.uint8(),
}
_SPARSE = pa.struct([("indices", pa.list_(pa.uint32())), ("values", pa.list_(pa.float32()))])
_DIGEST_MODULUS = 2**128


# ── layout ───────────────────────────────────────────────────────────────────────────────────────────


def vector_column(name: str) -> str:
    """Return the column of the vector called `name`; the default vector is called ""."""
    return f"{VECTOR}:{name}" if name else VECTOR


def vector_columns(schema: pa.Schema) -> list[str]:
    """Return the vector columns of a batch, sorted."""
    return sorted(name for name in schema.names if name == VECTOR or name.startswith(f"{VECTOR}:"))


def vector_type(field: VectorField) -> pa.DataType:
    """Return the Arrow type of a vector field's column."""
    if field.kind is VectorKind.SPARSE:
        return _SPARSE
    assert field.dimensions is not None
    width = -(-field.dimensions // 8) if field.dtype is DType.BIT else field.dimensions
    dense = pa.list_(_ARROW_TYPES[field.dtype], width)
    return pa.list_(dense) if field.kind is VectorKind.MULTI else dense


def arrow_schema(schema: CollectionSchema, *, vectors: bool = True) -> pa.Schema:
    """Return the columns of a collection's batches; without vectors, those of its ids and texts."""
    fields = [pa.field(ID, pa.string()), pa.field(ID_TYPE, pa.string())]
    if vectors:
        fields += [pa.field(vector_column(field.name), vector_type(field)) for field in schema.vectors]
    fields += [pa.field(DOCUMENT, pa.string()), pa.field(METADATA, pa.string())]
    if schema.has_namespaces:
        fields.append(pa.field(NAMESPACE, pa.string()))
    return pa.schema(fields)


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────


def id_columns(ids: Sequence[RecordId]) -> tuple[pa.Array, pa.Array]:
    """Return the columns `id` and `id_type` of Python ids."""
    kinds = [id_kind(value).value for value in ids]
    return pa.array(list(map(str, ids)), pa.string()), pa.array(kinds, pa.string())


def id_batch(ids: Sequence[RecordId]) -> pa.RecordBatch:
    """Return a batch that holds ids alone."""
    columns = id_columns(ids)
    return pa.RecordBatch.from_arrays(list(columns), names=[ID, ID_TYPE])


def id_kind(value: RecordId) -> IdKind:
    """Return the kind of a Python id."""
    if isinstance(value, str):
        return IdKind.STR
    return IdKind.UUID if isinstance(value, uuid.UUID) else IdKind.INT


def typed_id(text: str, kind: str) -> RecordId:
    """Return the Python id of its text and kind."""
    if kind == IdKind.STR.value:
        return text
    return uuid.UUID(text) if kind == IdKind.UUID.value else int(text)


def typed_ids(batch: pa.RecordBatch) -> list[RecordId]:
    """Return the ids of a batch as Python values."""
    texts, kinds = batch.column(ID).to_pylist(), batch.column(ID_TYPE).to_pylist()
    return list(map(typed_id, texts, kinds))


def id_names(columns: pa.Schema) -> list[str]:
    """Return those of the columns that name a record: id, its kind and, where there is one, its namespace."""
    return [name for name in (ID, ID_TYPE, NAMESPACE) if name in columns.names]


def ids_of(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the columns that name each record: id, its kind and, where there is one, its namespace."""
    return batch.select(id_names(batch.schema))


def id_hashes(batch: pa.RecordBatch) -> npt.NDArray[np.void]:
    """Return a 128-bit hash of what names each record, to count distinct ones in 16 bytes a record."""
    hashes = [xxhash.xxh3_128_digest(key.encode()) for key in id_keys(batch).to_pylist()]
    return np.frombuffer(b"".join(hashes), "V16")


def constant(value: str, length: int) -> pa.Array:
    """Return a column that holds one text throughout, such as the kind of ids that are all alike."""
    return pa.repeat(pa.scalar(value, pa.string()), length)


# ── namespaces ───────────────────────────────────────────────────────────────────────────────────────


def put_in_namespace(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    """Return records without namespaces as those of one."""
    return batch.append_column(NAMESPACE, constant(name, batch.num_rows))


def of_namespace(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    """Return the records of one namespace, without the column that says so."""
    found = pc.equal(pc.fill_null(batch.column(NAMESPACE), ""), name)
    return batch.filter(found).drop_columns([NAMESPACE])


def fit_namespaces(batch: pa.RecordBatch, *, wanted: bool) -> pa.RecordBatch:
    """Return a batch with the column `namespace`, or without it, whichever is wanted.

    A record that names no namespace is in the default one.
    """
    if NAMESPACE not in batch.schema.names:
        return put_in_namespace(batch, "") if wanted else batch
    if not wanted:
        return batch.drop_columns([NAMESPACE])
    column = batch.column(NAMESPACE)
    if not column.null_count:
        return batch
    return batch.set_column(batch.schema.names.index(NAMESPACE), NAMESPACE, pc.fill_null(column, ""))


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────


def dense_vectors(matrix: npt.NDArray[Any], *, missing: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Return the column of dense vectors.

    Parameters
    ----------
    matrix
        dtype[n_records, width], C-contiguous; not copied.
    missing
        bool[n_records]: records that have no vector.
    """
    mask = None if missing is None else pa.array(missing)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1], mask=mask)


def dense_matrix(column: pa.Array) -> npt.NDArray[Any]:
    """Return dtype[n_records, width] over a column of dense vectors, without a copy.

    The row of a record that has no vector is undefined.

    Raises
    ------
    DimensionMismatchError
        A vector holds a null.
    """
    width = column.type.list_size
    values = column.values.slice(column.offset * width, len(column) * width)
    dtype = np.dtype(values.type.to_pandas_dtype())
    if not len(values):
        return np.empty((len(column), width), dtype)
    if values.null_count:  # most writers put nulls under a missing vector as well
        holes = np.asarray(values.is_null()).reshape(len(column), width).any(axis=1)
        if (holes & np.asarray(column.is_valid())).any():
            raise DimensionMismatchError("a vector has a null among its numbers; mend the source")
    matrix = np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)
    return matrix.reshape(len(column), width)


def is_dense(column: pa.Array) -> bool:
    """Whether the column holds one dense vector a record."""
    return bool(pa.types.is_fixed_size_list(column.type))


def non_finite_rows(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Return bool[n_records]: records whose vector holds NaN or an infinity."""
    if is_dense(column):
        matrix = dense_matrix(column)
        if matrix.dtype.kind != "f":
            return np.zeros(len(column), bool)
        bad = ~np.isfinite(matrix).all(axis=1)
        return bad & ~np.asarray(column.is_null())  # type: ignore[no-any-return]
    rows = ([] if item is None else _numbers(item) for item in column.to_pylist())
    return np.fromiter((not np.isfinite(row).all() for row in rows), bool, len(column))


def _numbers(item: Any) -> Any:
    values = item["values"] if isinstance(item, Mapping) else item
    return np.asarray(values, np.float64).reshape(-1)


def conform(batch: pa.RecordBatch, schema: CollectionSchema, *, where: str) -> pa.RecordBatch:
    """Return the same records with the columns exactly as `arrow_schema` has them, no namespace null.

    Raises
    ------
    DimensionMismatchError
        A vector has another type.
    UsageError
        A column is missing, or the collection has no place for it.
    """
    expected = arrow_schema(schema).names
    if set(batch.schema.names) != set(expected):
        raise UsageError(
            f"{where}: the batch has the columns {sorted(batch.schema.names)}, the collection takes "
            f"{sorted(expected)}; map the fields or choose another target collection",
            expected=sorted(expected),
            found=sorted(batch.schema.names),
        )
    check_dimensions(batch, schema, where=where)
    batch = fit_namespaces(batch, wanted=schema.has_namespaces)
    return pa.RecordBatch.from_arrays(list(map(batch.column, expected)), schema=arrow_schema(schema))


def check_dimensions(batch: pa.RecordBatch, schema: CollectionSchema, *, where: str) -> None:
    """Raise where a batch's vectors don't have the schema's dimensions.

    Raises
    ------
    DimensionMismatchError
    """
    for field in schema.vectors:
        name = vector_column(field.name)
        found, expected = batch.schema.field(name).type, vector_type(field)
        if found != expected:
            raise DimensionMismatchError(
                f"{where}: vector {field.name or '(default)'} is {found}, the collection takes {expected}; "
                "choose another target collection or map the vector",
                expected=str(expected),
                found=str(found),
            )


# ── size ─────────────────────────────────────────────────────────────────────────────────────────────


def split(
    batch: pa.RecordBatch, *, max_records: int | None, max_bytes: int | None
) -> Iterator[pa.RecordBatch]:
    """Yield slices of a batch that keep to both limits; a single record may exceed `max_bytes`."""
    rows = batch.num_rows
    step = min(rows, max_records or rows)
    if max_bytes is not None and rows:
        step = min(step, max(1, max_bytes * rows // max(1, batch.nbytes)))
    for start in range(0, rows, max(1, step)):
        part = batch.slice(start, step)
        if max_bytes is not None and part.num_rows > 1 and part.nbytes > max_bytes:
            yield from split(part, max_records=-(-part.num_rows // 2), max_bytes=max_bytes)
        else:
            yield part


def rebatch(
    batches: Iterable[pa.RecordBatch], *, max_records: int, max_bytes: int
) -> Iterator[pa.RecordBatch]:
    """Yield the same records in batches as large as the limits allow, in order."""
    waiting: list[pa.RecordBatch] = []
    records = size = 0
    for batch in batches:
        for part in split(batch, max_records=max_records, max_bytes=max_bytes):
            if waiting and (records + part.num_rows > max_records or size + part.nbytes > max_bytes):
                yield pa.concat_batches(waiting)
                waiting, records, size = [], 0, 0
            waiting.append(part)
            records += part.num_rows
            size += part.nbytes
    if waiting:
        yield pa.concat_batches(waiting)


# ── digests ──────────────────────────────────────────────────────────────────────────────────────────


def record_digests(batch: pa.RecordBatch) -> list[int]:
    """Return a 128-bit digest of each record: id, vectors, document, metadata, namespace.

    xxh3: it tells accident, not malice. The lengths of the parts are hashed with them, -1 for null, so
    that no two different records give the same bytes. The namespace comes last, without a length: a
    record in the default one has the same digest as in a collection without namespaces.
    """
    rows = batch.num_rows
    if not rows:
        return []
    names = [ID, ID_TYPE, *vector_columns(batch.schema), DOCUMENT, METADATA]
    parts = [_bytes_of(batch.column(name)) for name in names]
    lengths = [pc.fill_null(pc.binary_length(part), -1) for part in parts]
    heads = _fixed_bytes(np.stack(list(map(np.asarray, lengths)), axis=1).astype("<i8"))
    if NAMESPACE in batch.schema.names:
        parts.append(_bytes_of(batch.column(NAMESPACE)))
    # Joined in one piece by Arrow, and hashed where they lie there: three times as fast as one by one.
    nothing = pa.scalar(b"", pa.large_binary())
    joined = pc.binary_join_element_wise(
        heads, *parts, nothing, null_handling="replace", null_replacement=b""
    )
    _, offsets, data = joined.buffers()
    ends = np.frombuffer(offsets, np.int64, rows + 1, joined.offset * 8).tolist()
    view, hashed = memoryview(data), xxhash.xxh3_128_intdigest
    return [hashed(view[start:end]) for start, end in pairwise(ends)]


def digest_column(digests: Iterable[int]) -> pa.Array:
    """Return binary(16)[n_records] of some records' digests."""
    return pa.array([digest.to_bytes(16, "big") for digest in digests], pa.binary(16))


def digest(batches: Iterable[pa.RecordBatch]) -> int:
    """Return the digest of a set of records, whatever their order: the sum of theirs modulo 2**128."""
    return sum(sum(record_digests(batch)) for batch in batches) % _DIGEST_MODULUS


def add_digests(digests: Iterable[int]) -> int:
    """Return the digest of the union of disjoint sets of records."""
    return sum(digests) % _DIGEST_MODULUS


def _bytes_of(column: pa.Array) -> pa.Array:
    """Return large_binary[n_records], the bytes of each value that are hashed."""
    if pa.types.is_string(column.type):
        return column.cast(pa.large_binary())
    if is_dense(column):
        found = _fixed_bytes(dense_matrix(column))
        return pc.if_else(column.is_valid(), found, None) if column.null_count else found
    items = column.to_pylist()
    return pa.array([None if item is None else _nested_bytes(item) for item in items], pa.large_binary())


def _fixed_bytes(matrix: npt.NDArray[Any]) -> pa.Array:
    """Return large_binary[n_records], the bytes of each row, without a copy."""
    rows, width = len(matrix), matrix.shape[1] * matrix.itemsize
    ends = np.arange(rows + 1, dtype=np.int64) * width
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(matrix))]
    return pa.Array.from_buffers(pa.large_binary(), rows, buffers)


def _nested_bytes(item: Any) -> bytes:
    if isinstance(item, Mapping):
        order = np.argsort(np.asarray(item["indices"], "<u4"), kind="stable")
        indices = np.asarray(item["indices"], "<u4")[order]
        return indices.tobytes() + np.asarray(item["values"], "<f4")[order].tobytes()
    return np.asarray(item, "<f4").tobytes()


# ── order ────────────────────────────────────────────────────────────────────────────────────────────


def take_by_id(batch: pa.RecordBatch, wanted: pa.RecordBatch) -> tuple[pa.RecordBatch, npt.NDArray[np.bool_]]:
    """Return the records of `batch` in the order of `wanted`'s ids, and which of those are missing.

    Returns
    -------
    The records that are there, in the order wanted, and bool[len(wanted)], true where one is missing.
    """
    keys, asked = id_keys(batch), id_keys(wanted)
    positions = pc.index_in(asked, keys)
    missing = np.asarray(positions.is_null())
    return batch.take(positions.drop_null()), missing


def id_keys(batch: pa.RecordBatch) -> pa.Array:
    """Return one text for what names each record: `str:7`, in a namespace `str:1:a7` (its length first)."""
    kinds, ids = batch.column(ID_TYPE), batch.column(ID)
    if NAMESPACE not in batch.schema.names:
        return pc.binary_join_element_wise(kinds, ids, ":")
    spaces = pc.fill_null(batch.column(NAMESPACE), "")
    lengths = pc.binary_length(spaces).cast(pa.string())
    return pc.binary_join_element_wise(kinds, lengths, pc.binary_join_element_wise(spaces, ids, ""), ":")


def positions(batch: pa.RecordBatch, wanted: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return int64[n_records]: where in `wanted` each record's id stands, -1 where it doesn't."""
    found = pc.index_in(id_keys(batch), value_set=id_keys(wanted))
    return np.asarray(found.fill_null(-1), np.int64)


def without(batch: pa.RecordBatch, ids: pa.RecordBatch) -> pa.RecordBatch:
    """Return the records of a batch that aren't among these ids."""
    return batch.filter(pc.invert(is_among(batch, ids))) if ids.num_rows else batch


def is_among(batch: pa.RecordBatch, ids: pa.RecordBatch) -> pa.Array:
    """Return bool[n_records]: which records' ids are among `ids`."""
    return pc.is_in(id_keys(batch), value_set=id_keys(ids))
