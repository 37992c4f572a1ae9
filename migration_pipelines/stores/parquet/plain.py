"""Parquet files of other tools, read as a collection.

They need a column `id` (texts, integers or UUIDs) and at least one column of vectors: `vector` and
`vector:<name>`, or else every column whose values are lists of floats of one length; a single one is the
default vector. `document`, `metadata` (JSON text or a struct), `namespace` and `id_type` mean what they
mean in a batch. Any other column becomes a metadata field of its name, so that nothing is left behind.
Doubles are taken where each is exactly a float32.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.metadata import dump_metadata, load_metadata
from migration_pipelines.model import CollectionSchema, DType, IdKind, VectorField
from migration_pipelines.stores.parquet import part as parts
from migration_pipelines.stores.parquet.folder import Folder

_KNOWN = (batches.ID, batches.ID_TYPE, batches.DOCUMENT, batches.METADATA, batches.NAMESPACE)
_DTYPES = {
    pa.float64(): DType.FLOAT32,
    pa.float32(): DType.FLOAT32,
    pa.float16(): DType.FLOAT16,
    pa.int8(): DType.INT8,
    pa.uint8(): DType.UINT8,
}


def infer_schema(name: str, folder: Folder, files: Sequence[str]) -> CollectionSchema:
    """Return the schema of a folder of plain Parquet files; no metric is known.

    Raises
    ------
    StoreRefusedError
        The files don't hold a collection, or not all the same; it says why.
    """
    with parts.opened(folder, files[0]) as file:
        columns = file.schema_arrow
    if batches.ID not in columns.names:
        raise _refused(folder, files[0], f"a column `id`, found the columns {columns.names}")
    vectors = tuple(
        VectorField(
            name=_vector_name(column, columns),
            dtype=_DTYPES[columns.field(column).type.value_type],
            dimensions=_dimensions(folder, files, column, columns.field(column).type),
        )
        for column in _vector_columns(columns)
    )
    if not vectors:
        raise _refused(folder, files[0], f"a column of lists of floats, found {_types(columns)}")
    return CollectionSchema(
        name=name,
        vectors=vectors,
        id_kinds=_id_kinds(folder, files, columns),
        has_documents=batches.DOCUMENT in columns.names,
        has_namespaces=any(batches.NAMESPACE in _columns(folder, name) for name in files),
    )


def _columns(folder: Folder, name: str) -> list[str]:
    with parts.opened(folder, name) as file:
        return list(file.schema_arrow.names)


def columns_needed(columns: pa.Schema, *, vectors: bool) -> list[str]:
    """Return the columns of a file to read for whole records, or for all but their vectors."""
    left_out = () if vectors else _vector_columns(columns)
    return [name for name in columns.names if name not in left_out]


def to_batch(found: pa.RecordBatch, schema: CollectionSchema, *, vectors: bool, where: str) -> pa.RecordBatch:
    """Return the records of a plain file as a batch.

    Raises
    ------
    StoreRefusedError
        They can't be given exactly, or aren't what the first file has; `where` names the file.
    """
    wanted = batches.arrow_schema(schema, vectors=vectors)
    try:
        columns = dict(zip((batches.ID, batches.ID_TYPE), _ids(found), strict=True))
        names = {
            batches.vector_column(_vector_name(n, found.schema)): n for n in _vector_columns(found.schema)
        }
        for field in schema.vectors if vectors else ():
            column = batches.vector_column(field.name)
            columns[column] = _vectors(found.column(names[column]), field)
        for name in (batches.DOCUMENT, batches.NAMESPACE):
            if name in found.schema.names:
                columns[name] = found.column(name).cast(pa.string())
        columns.setdefault(batches.DOCUMENT, pa.nulls(found.num_rows, pa.string()))
        spaces = columns.get(batches.NAMESPACE)
        columns[batches.NAMESPACE] = (
            batches.constant("", found.num_rows) if spaces is None else pc.fill_null(spaces, "")
        )
        columns[batches.METADATA] = _metadata(found)
        return pa.RecordBatch.from_pydict({name: columns[name] for name in wanted.names}, schema=wanted)
    except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise StoreRefusedError(f"{where} can't be read as records: {error}", file=where) from error


# ── what the columns are ─────────────────────────────────────────────────────────────────────────────


def _is_vectors(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and kind.value_type in _DTYPES


def _vector_columns(columns: pa.Schema) -> list[str]:
    found = [field.name for field in columns if field.name not in _KNOWN and _is_vectors(field.type)]
    named = [name for name in found if name in batches.vector_columns(columns)]
    return sorted(named) or [n for n in found if pa.types.is_floating(columns.field(n).type.value_type)]


def _vector_name(column: str, columns: pa.Schema) -> str:
    if column in batches.vector_columns(columns):
        return column.partition(":")[2]
    return "" if len(_vector_columns(columns)) == 1 else column


def _dimensions(folder: Folder, files: Sequence[str], column: str, kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    for name in files:
        with parts.opened(folder, name) as file:
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                length = pc.max(pc.list_value_length(batch.column(column))).as_py()
                if length:
                    return int(length)
    raise _refused(folder, files[0], f"a vector in column {column!r}, found none in {len(files)} files")


def _id_kinds(folder: Folder, files: Sequence[str], columns: pa.Schema) -> frozenset[IdKind]:
    if batches.ID_TYPE not in columns.names:
        kind = columns.field(batches.ID).type
        if pa.types.is_integer(kind):
            return frozenset({IdKind.INT})
        return frozenset({IdKind.UUID if _is_uuid(kind) else IdKind.STR})
    kinds: set[str] = set()
    for name in files:
        with parts.opened(folder, name) as file:
            for batch in file.iter_batches(columns=[batches.ID_TYPE]):
                kinds.update(pc.unique(batch.column(0)).to_pylist())
    if not kinds <= {kind.value for kind in IdKind}:
        raise _refused(
            folder, files[0], f"int, uuid or str in column `id_type`, found {sorted(map(str, kinds))}"
        )
    return frozenset(map(IdKind, kinds))


def _is_uuid(kind: pa.DataType) -> bool:
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return bool(pa.types.is_fixed_size_binary(storage) and storage.byte_width == 16)


# ── what they hold ───────────────────────────────────────────────────────────────────────────────────


def _ids(found: pa.RecordBatch) -> tuple[pa.Array, pa.Array]:
    column, rows = found.column(batches.ID), found.num_rows
    if column.null_count:
        raise ValueError(f"{column.null_count} records have no id")
    if batches.ID_TYPE in found.schema.names:
        return column.cast(pa.string()), found.column(batches.ID_TYPE).cast(pa.string())
    if _is_uuid(column.type):
        storage = column.storage if isinstance(column, pa.ExtensionArray) else column
        texts = [str(uuid.UUID(bytes=item)) for item in storage.to_pylist()]
        return pa.array(texts, pa.string()), batches.constant(IdKind.UUID.value, rows)
    kind = IdKind.INT if pa.types.is_integer(column.type) else IdKind.STR
    return column.cast(pa.string()), batches.constant(kind.value, rows)


def _vectors(column: pa.Array, field: VectorField) -> pa.Array:
    wanted = batches.vector_type(field)
    if column.type == wanted:
        return column
    missing = np.asarray(column.is_null())
    flat = column.drop_null().flatten()
    lengths = pc.list_value_length(column).drop_null()
    if flat.null_count or set(pc.unique(lengths).to_pylist()) - {field.dimensions}:
        raise ValueError(
            f"vector {field.name or '(default)'}: expected {field.dimensions} numbers in each, found "
            f"{sorted(pc.unique(lengths).to_pylist())[:5]} with {flat.null_count} nulls"
        )
    dtype = wanted.value_type.to_pandas_dtype()
    exact = flat.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        values = exact.astype(dtype)
    if not np.array_equal(values, exact, equal_nan=values.dtype.kind == "f"):
        raise ValueError(
            f"vector {field.name or '(default)'} holds doubles that are no float32: write it as float32, "
            "which says that the loss of digits is meant"
        )
    matrix = np.zeros((len(column), field.dimensions or 0), dtype)
    matrix[~missing] = values.reshape(-1, matrix.shape[1])
    return batches.dense_vectors(matrix, missing=missing)


def _metadata(found: pa.RecordBatch) -> pa.Array:
    fields = set(_KNOWN) | set(_vector_columns(found.schema))
    others = [name for name in found.schema.names if name not in fields]
    whole = found.column(batches.METADATA).to_pylist() if batches.METADATA in found.schema.names else None
    rows = _rows(found, others) if others else [{}] * found.num_rows
    if whole is None and not others:
        return pa.nulls(found.num_rows, pa.string())
    texts = [_joined(item, row) for item, row in zip(whole or [None] * len(rows), rows, strict=True)]
    return pa.array(texts, pa.string())


def _rows(found: pa.RecordBatch, names: Sequence[str]) -> list[dict[str, Any]]:
    # Python's datetimes end at microseconds: a cast that would lose some refuses.
    columns = [
        column.cast(pa.timestamp("us", column.type.tz)) if pa.types.is_timestamp(column.type) else column
        for column in map(found.column, names)
    ]
    return list(pa.RecordBatch.from_arrays(columns, names=list(names)).to_pylist())


def _joined(whole: Any, row: Mapping[str, Any]) -> str | None:
    if whole is None:
        return dump_metadata(row) if row else None
    metadata = load_metadata(whole) if isinstance(whole, str) else dict(whole)
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata: expected a JSON object, found {whole[:60]!r}")
    both = metadata.keys() & row.keys()
    if both:
        raise ValueError(f"{sorted(both)} are both in `metadata` and columns of their own")
    return dump_metadata({**metadata, **row})


def _types(columns: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in columns)


def _refused(folder: Folder, name: str, expected: str) -> StoreRefusedError:
    return StoreRefusedError(
        f"{folder.where(name)} isn't a file of records: expected {expected}",
        file=name,
    )
