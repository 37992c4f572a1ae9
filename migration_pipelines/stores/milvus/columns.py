"""Milvus's columns (`FieldData` messages) and Arrow's, one from the other.

Dense vectors pass as they lie in the message, without a Python object for any number. Of a field with
nulls Milvus sends either a place for each record or only those that are there; it is given the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import TransientError
from migration_pipelines.stores.milvus.schema import Kind, VectorColumn

_SLOTS = {
    Kind.BOOL: "bool_data",
    Kind.INT8: "int_data",
    Kind.INT16: "int_data",
    Kind.INT32: "int_data",
    Kind.INT64: "long_data",
    Kind.FLOAT: "float_data",
    Kind.DOUBLE: "double_data",
    Kind.VARCHAR: "string_data",
    Kind.TEXT: "string_data",
    Kind.JSON: "json_data",
    Kind.GEOMETRY: "geometry_wkt_data",
    Kind.TIMESTAMPTZ: "string_data",
}
_BYTES_SLOTS = {
    Kind.BINARY: ("binary_vector", "u1"),
    Kind.FLOAT16: ("float16_vector", "<f2"),
    Kind.BFLOAT16: ("bfloat16_vector", "<u2"),
    Kind.INT8_VECTOR: ("int8_vector", "i1"),
}
_PAIR = np.dtype([("index", "<u4"), ("value", "<f4")])
# Tag of field 1, length-delimited: packed floats, the only field of `FloatArray`.
_PACKED = b"\x0a"


# ── from Milvus ──────────────────────────────────────────────────────────────────────────────────────


def validity(data: Any) -> npt.NDArray[np.bool_] | None:
    """Return bool[n_records]: which records have a value; None where all have."""
    if not data.valid_data:
        return None
    found = np.fromiter(data.valid_data, bool, len(data.valid_data))
    return None if found.all() else found


def scalars(data: Any) -> list[Any]:
    """Return the values of a scalar column, None for null; JSON as bytes, arrays as lists."""
    if data.type == Kind.ARRAY:
        values = [_array(row) for row in data.scalars.array_data.data]
    else:
        slot = data.scalars.WhichOneof("data") or _SLOTS[data.type]
        values = list(getattr(data.scalars, slot).data)
    valid = validity(data)
    if valid is None:
        return values
    if len(values) == len(valid):
        return [value if there else None for value, there in zip(values, valid, strict=True)]
    rest = iter(values)
    return [next(rest) if there else None for there in valid]


def _array(row: Any) -> list[Any]:
    slot = row.WhichOneof("data")
    return list(getattr(row, slot).data) if slot else []


def vectors(data: Any, column: VectorColumn) -> pa.Array:
    """Return a vector column.

    Raises
    ------
    TransientError
        It was cut: it holds another number of bytes than its dimensions and records ask for.
    """
    valid = validity(data)
    if column.kind == Kind.SPARSE:
        return _sparse(list(data.vectors.sparse_float_vector.contents), valid)
    matrix = _matrix(data, column)
    if valid is None:
        return batches.dense_vectors(matrix)
    if len(matrix) != len(valid):
        whole = np.zeros((len(valid), matrix.shape[1]), matrix.dtype)
        whole[valid] = matrix
        matrix = whole
    return batches.dense_vectors(matrix, missing=~valid)


def _matrix(data: Any, column: VectorColumn) -> npt.NDArray[Any]:
    dimensions = column.field.dimensions or 0
    if column.kind == Kind.FLOAT_VECTOR:
        floats = data.vectors.float_vector
        count = len(floats.data)
        packed = floats.SerializeToString()
        flat = np.frombuffer(packed, "<f4", count, offset=len(packed) - 4 * count)
    else:
        slot, dtype = _BYTES_SLOTS[column.kind]
        flat = np.frombuffer(getattr(data.vectors, slot), dtype)
    width = -(-dimensions // 8) if column.kind == Kind.BINARY else dimensions
    if width == 0 or len(flat) % width:
        raise TransientError(
            f"milvus: vector {column.name!r} came as {len(flat)} numbers, expected a multiple of {width}; "
            "the answer was cut: try again",
            expected=width,
            found=len(flat),
        )
    matrix = flat.reshape(-1, width)
    if column.kind == Kind.BFLOAT16:  # the upper half of a float32
        return (matrix.astype("<u4") << 16).view("<f4")
    return matrix.astype("<f4") if column.kind == Kind.FLOAT16 else matrix


def _sparse(contents: Sequence[bytes], valid: npt.NDArray[np.bool_] | None) -> pa.Array:
    if valid is not None and len(contents) != len(valid):
        rest = iter(contents)
        contents = [next(rest) if there else b"" for there in valid]
    flat = np.frombuffer(b"".join(contents), _PAIR)
    offsets = pa.array(np.cumsum([0, *(len(item) // _PAIR.itemsize for item in contents)]), pa.int32())
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(flat[name])))
        for name in ("index", "value")
    ]
    mask = None if valid is None else pa.array(~valid)
    return pa.StructArray.from_arrays(lists, names=["indices", "values"], mask=mask)


# ── to Milvus ────────────────────────────────────────────────────────────────────────────────────────


def scalar_data(name: str, kind: int, values: Sequence[Any], *, nullable: bool, element: int = 0) -> Any:
    """Return the column of a scalar field; JSON as bytes or text, arrays as lists."""
    from pymilvus.grpc_gen import schema_pb2

    there = [value for value in values if value is not None]
    data = schema_pb2.FieldData(type=kind, field_name=name)
    if kind == Kind.ARRAY:
        data.scalars.array_data.element_type = element
        slot = _SLOTS[element]
        for value in there:
            getattr(data.scalars.array_data.data.add(), slot).data.extend(value)
        if not there:
            data.scalars.array_data.SetInParent()
    else:
        part = getattr(data.scalars, _SLOTS[kind])
        part.SetInParent()
        part.data.extend(there)
    if nullable:
        data.valid_data.extend([value is not None for value in values])
    return data


def vector_data(column: pa.Array, target: VectorColumn) -> Any:
    """Return the column of a vector field; `column` is as `check` of `writing` has found it fit."""
    from pymilvus.grpc_gen import schema_pb2

    data = schema_pb2.FieldData(type=target.kind, field_name=target.name)
    if target.nullable:
        data.valid_data.extend(column.is_valid().to_pylist())
        column = column.drop_null()
    if target.kind == Kind.SPARSE:
        _put_sparse(data, column)
        return data
    data.vectors.dim = target.field.dimensions
    matrix = np.ascontiguousarray(batches.dense_matrix(column))
    if target.kind == Kind.FLOAT_VECTOR:
        raw = matrix.astype("<f4", copy=False).tobytes()
        data.vectors.float_vector.MergeFromString(_PACKED + _varint(len(raw)) + raw)
        return data
    slot, dtype = _BYTES_SLOTS[target.kind]
    if target.kind == Kind.BFLOAT16:
        matrix = matrix.view("<u4") >> 16
    setattr(data.vectors, slot, matrix.astype(dtype).tobytes())
    return data


def _put_sparse(data: Any, column: pa.Array) -> None:
    sparse, greatest = data.vectors.sparse_float_vector, 0
    for item in column.to_pylist():
        pairs = np.empty(len(item["indices"]), _PAIR)
        pairs["index"], pairs["value"] = item["indices"], item["values"]
        pairs.sort(order="index")
        sparse.contents.append(pairs.tobytes())
        greatest = max(greatest, int(pairs["index"][-1]) + 1)
    sparse.dim = data.vectors.dim = greatest


def _varint(number: int) -> bytes:
    """Return a number as protobuf writes it: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
