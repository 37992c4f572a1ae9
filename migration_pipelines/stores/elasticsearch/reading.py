"""Records as Elasticsearch gives them back, as batches: every vector that is there, or an error."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.metadata import TYPED, canonical, dump_all
from migration_pipelines.model import CollectionSchema, DType, IdKind, VectorField, VectorKind
from migration_pipelines.stores.elasticsearch.schema import Layout

_MARK = TYPED.encode()
_DTYPES: Mapping[DType, npt.DTypeLike] = {DType.FLOAT32: "f4", DType.INT8: "i1", DType.BIT: "i1"}
Row = tuple[str, dict[str, Any]]  # the id and its `_source`


def to_batch(rows: Sequence[Row], layout: Layout, *, vectors: bool, where: str) -> pa.RecordBatch:
    """Return the records of a page.

    Raises
    ------
    StoreRefusedError
        A record isn't as the index's layout has it.
    """
    ids = pa.array([record_id for record_id, _ in rows], pa.string())
    taken = [_take_vectors(source, layout) for _, source in rows]
    columns = [ids, batches.constant(IdKind.STR.value, len(rows))]
    if vectors:
        for number, field in enumerate(layout.schema.vectors):
            values = [found[number] for found in taken]
            columns.append(_column(values, field, rows, where))
    documents = _documents([source for _, source in rows], layout, where)
    columns += [documents, _metadata(rows, layout, where)]
    expected = batches.arrow_schema(known(layout.schema), vectors=vectors)
    return pa.RecordBatch.from_arrays(columns, schema=expected)


def known(schema: CollectionSchema) -> CollectionSchema:
    """Return the schema with dimensions of 0 where an index without vectors doesn't know them yet."""
    fields = [
        field.model_copy(update={"dimensions": 0})
        if field.dimensions is None and field.kind is not VectorKind.SPARSE
        else field
        for field in schema.vectors
    ]
    return schema.model_copy(update={"vectors": tuple(fields)})


def lacks_vectors(rows: Sequence[Row], layout: Layout) -> list[tuple[str, list[str]]]:
    """Return path and ids of the records without a vector, for each vector field that some lack."""
    found = []
    for path in layout.vectors.values():
        ids = [record_id for record_id, source in rows if _at(source, path) is None]
        if ids:
            found.append((path, ids))
    return found


def _at(source: Mapping[str, Any], path: str) -> Any:
    """Return the value of a field, whether its dots stand in a name or between objects."""
    if path in source:
        return source[path]
    head, _, rest = path.partition(".")
    inner = source.get(head)
    return _at(inner, rest) if rest and isinstance(inner, Mapping) else None


def _take_vectors(source: dict[str, Any], layout: Layout) -> list[Any]:
    """Return the values of the vector fields and take them out of the record."""
    return [_pop(source, layout.vectors[field.name]) for field in layout.schema.vectors]


def _pop(source: dict[str, Any], path: str) -> Any:
    if path in source:
        return source.pop(path)
    head, _, rest = path.partition(".")
    inner = source.get(head)
    if not rest or not isinstance(inner, dict):
        return None
    found = _pop(inner, rest)
    if found is not None and not inner:
        del source[head]
    return found


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────


def _column(values: list[Any], field: VectorField, rows: Sequence[Row], where: str) -> pa.Array:
    kind = batches.vector_type(known_field(field))
    try:
        if field.kind is VectorKind.SPARSE:
            return pa.array([_sparse(value) for value in values], kind)
        if field.kind is VectorKind.MULTI:
            matrices = [
                None if value is None else [_numbers(v, field).tolist() for v in value] for value in values
            ]
            return pa.array(matrices, kind)
        return _dense(values, field, kind.list_size)
    except (ValueError, TypeError, AttributeError, binascii.Error, pa.ArrowInvalid) as error:
        near = next((record_id for (record_id, _), value in zip(rows, values, strict=True) if value), None)
        raise StoreRefusedError(
            f"{where}: vector {field.name or '(default)'} of a record near {near!r} isn't one of "
            f"{field.dimensions} {field.dtype} numbers: {error}; mend the source"
        ) from error


def known_field(field: VectorField) -> VectorField:
    """Return a field with the dimensions that its columns have, 0 where they aren't known yet."""
    return field if field.dimensions is not None else field.model_copy(update={"dimensions": 0})


def _dense(values: list[Any], field: VectorField, width: int) -> pa.Array:
    missing = np.fromiter((value is None for value in values), bool, len(values))
    there = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in there):
        there = [_numbers(value, field) for value in there]
    if any(len(value) != width for value in there):
        raise ValueError(f"{ {len(value) for value in there} - {width} } of them, not {width}")
    matrix = np.zeros((len(values), width), _DTYPES[field.dtype])
    if there:
        # Twice as fast as an array of the lists; whole numbers by way of doubles, to see what they lose.
        wide = np.float32 if field.dtype is DType.FLOAT32 else np.float64
        flat = np.fromiter(chain.from_iterable(there), wide, len(there) * width)
        matrix[~missing] = _narrow(flat, field).reshape(len(there), width)
    matrix = matrix.view(np.uint8) if field.dtype is DType.BIT else matrix
    return batches.dense_vectors(matrix, missing=missing if missing.any() else None)


def _numbers(value: Any, field: VectorField) -> npt.NDArray[Any]:
    """Return one vector; a text is hexadecimal bytes, or the base64 of big-endian floats."""
    if not isinstance(value, str):
        numbers = _narrow(np.asarray(value, np.float64), field)
    elif field.dtype is DType.FLOAT32:
        numbers = np.frombuffer(base64.b64decode(value, validate=True), ">f4").astype(np.float32)
    else:
        numbers = np.frombuffer(bytes.fromhex(value), np.int8)
    return numbers.view(np.uint8) if field.dtype is DType.BIT else numbers


def _narrow(numbers: npt.NDArray[Any], field: VectorField) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        found: npt.NDArray[Any] = numbers.astype(_DTYPES[field.dtype], copy=False)
    if field.dtype is not DType.FLOAT32 and (found != numbers).any():
        raise ValueError("a number outside of -128 to 127")
    return found


def _sparse(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    pairs = sorted((int(key), weight) for key, weight in value.items())
    return {"indices": [key for key, _ in pairs], "values": [float(weight) for _, weight in pairs]}


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────


def _documents(sources: list[dict[str, Any]], layout: Layout, where: str) -> pa.Array:
    """Return the documents and take them out of the records; what is no text stays among the metadata."""
    key = layout.document
    if key is None:
        return pa.nulls(len(sources), pa.string())
    texts: list[str | None] = []
    for source in sources:
        value = source.get(key)
        if value is None or isinstance(value, str):
            source.pop(key, None)
        elif layout.metadata:
            raise StoreRefusedError(
                f"{where}: field {key!r} of a record is no text; say another ?document_field="
            )
        texts.append(value if isinstance(value, str) else None)
    return pa.array(texts, pa.string())


def _metadata(rows: Sequence[Row], layout: Layout, where: str) -> pa.Array:
    """Return the metadata of records whose vectors and document were taken out.

    Raises
    ------
    StoreRefusedError
        Something would be left over.
    """
    if not layout.metadata:
        values: list[Any] = [source or None for _, source in rows]
    else:
        values = []
        for record_id, source in rows:
            value = source.pop(layout.metadata, None)
            if source or not (value is None or isinstance(value, dict)):
                found = sorted(source) or f"a {type(value).__name__} in {layout.metadata!r}"
                raise StoreRefusedError(
                    f"{where}: record {record_id!r} holds {found} beside the object {layout.metadata!r}: say "
                    "?metadata_field= (empty) to have all fields as metadata"
                )
            values.append(value)
    texts = dump_all(values)
    for row, text in enumerate(texts):
        if (
            text is not None and _MARK in text
        ):  # typed values stand in the record as they are in canonical text
            texts[row] = canonical(json.dumps(values[row])).encode()
    return pa.array(texts, pa.binary()).cast(pa.string())
