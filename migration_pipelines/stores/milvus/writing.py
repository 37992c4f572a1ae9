"""Records as Milvus's columns, checked so that it changes none of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError
from migration_pipelines.metadata import TYPED, dump_metadata, load_metadata
from migration_pipelines.model import IdKind, VectorKind
from migration_pipelines.stores.milvus.columns import scalar_data, vector_data
from migration_pipelines.stores.milvus.schema import (
    REST_PARTS,
    TEXT_BYTES,
    Field,
    Kind,
    Layout,
    VectorColumn,
)

_DYNAMIC = "$meta"
_BITS = {Kind.INT8: 8, Kind.INT16: 16, Kind.INT32: 32, Kind.INT64: 64}
_LARGEST_INDEX = 2**32 - 2  # https://milvus.io/docs/sparse_vector.md


def data_of(batch: pa.RecordBatch, layout: Layout, *, where: str) -> list[Any]:
    """Return what is sent of some records: Milvus's `FieldData` messages.

    Raises
    ------
    RecordRejectedError
        Milvus would refuse a record, or change it.
    """
    reasons = _reasons(batch, layout)
    for row, reason in reasons:
        record = batch.column(batches.ID)[row].as_py()
        raise RecordRejectedError(f"{where}: record {record!r}: {reason}", record=record)
    texts = batch.column(batches.ID).to_pylist()
    keys = texts if layout.key_is_text else list(map(int, texts))
    found = [scalar_data(layout.key.name, layout.key.kind, keys, nullable=False)]
    found += [
        vector_data(batch.column(batches.vector_column(column.field.name)), column)
        for column in layout.vectors
    ]
    documents = batch.column(batches.DOCUMENT).to_pylist()
    if isinstance(layout.document, Field):
        found += _document_data(layout.document, layout.rest, documents, texts, where)
    metadata = batch.column(batches.METADATA)
    if layout.metadata is not None:
        raw = metadata.cast(pa.binary()).to_pylist()
        found.append(scalar_data(layout.metadata.name, Kind.JSON, raw, nullable=layout.metadata.nullable))
        return found
    rows = [None if text is None else load_metadata(text) for text in metadata.to_pylist()]
    return found + _fields_data(layout, rows, documents, texts, where)


# ── what Milvus would refuse or change ───────────────────────────────────────────────────────────────


def _reasons(batch: pa.RecordBatch, layout: Layout) -> Iterator[tuple[int, str]]:
    ids, kinds = batch.column(batches.ID), batch.column(batches.ID_TYPE)
    expected = IdKind.STR if layout.key_is_text else IdKind.INT
    yield from _rows(pc.not_equal(kinds, expected.value), f"its id is no {expected.value}")
    if layout.key_is_text and layout.key.limit:
        yield from _rows(
            pc.greater(pc.binary_length(ids), layout.key.limit), f"its id is over {layout.key.limit} bytes"
        )
    if not layout.key_is_text:
        numbers = [not -(2**63) <= int(text) < 2**63 for text in ids.to_pylist()]
        yield from _rows(numbers, "its id is no 64-bit integer")
    for column in layout.vectors:
        yield from _vector_reasons(batch.column(batches.vector_column(column.field.name)), column)
    if layout.document is None:
        yield from _rows(batch.column(batches.DOCUMENT).is_valid(), "the collection has no document field")
    if layout.metadata is not None and not layout.metadata.nullable:
        yield from _rows(batch.column(batches.METADATA).is_null(), "its metadata may not be null")


def _rows(flags: Any, reason: str) -> Iterator[tuple[int, str]]:
    yield from ((int(row), reason) for row in np.flatnonzero(np.asarray(flags))[:1])


def _vector_reasons(column: pa.Array, target: VectorColumn) -> Iterator[tuple[int, str]]:
    if not target.nullable:
        yield from _rows(column.is_null(), f"it has no vector {target.name!r}")
    if target.field.kind is VectorKind.SPARSE:
        flags = [item is not None and not _is_sparse(item) for item in column.to_pylist()]
        reason = "Milvus takes no sparse vector that is empty or has an entry below or at 0, or twice"
        yield from _rows(flags, reason)
        return
    yield from _rows(batches.non_finite_rows(column), f"its vector {target.name!r} holds NaN or an infinity")
    if target.kind in (Kind.FLOAT16, Kind.BFLOAT16):
        matrix = batches.dense_matrix(column)
        yield from _rows(
            (_halved(matrix, target.kind) != matrix).any(axis=1), "half precision would round it"
        )


def _halved(matrix: npt.NDArray[Any], kind: int) -> npt.NDArray[Any]:
    if kind == Kind.FLOAT16:
        with np.errstate(over="ignore"):
            return matrix.astype("<f2").astype("<f4")
    return (np.ascontiguousarray(matrix).view("<u4") & np.uint32(0xFFFF0000)).view("<f4")


def _is_sparse(item: Mapping[str, Sequence[float]]) -> bool:
    indices, values = item["indices"], np.asarray(item["values"], np.float32)
    return (
        len(indices) > 0
        and len(set(indices)) == len(indices)
        and max(indices) <= _LARGEST_INDEX
        and bool((np.isfinite(values) & (values > 0)).all())
    )


# ── documents ────────────────────────────────────────────────────────────────────────────────────────


def _document_data(
    field: Field, rest: Field | None, documents: Sequence[str | None], ids: Sequence[str], where: str
) -> list[Any]:
    limit = min(field.limit or TEXT_BYTES, TEXT_BYTES)
    parts = [None if text is None else cut(text, limit) for text in documents]
    for record, found in zip(ids, parts, strict=True):
        if found is None and not field.nullable:
            raise _rejected(where, record, f"it has no document, which {field.name!r} asks for")
        if found is not None and len(found) > (1 if rest is None else 1 + REST_PARTS):
            raise _rejected(where, record, f"its document is over the {limit} bytes of {field.name!r}")
    heads = [None if found is None else found[0] for found in parts]
    data = [scalar_data(field.name, field.kind, heads, nullable=field.nullable)]
    if rest is not None:
        tails = [found[1:] or None if found else None for found in parts]
        data.append(scalar_data(rest.name, rest.kind, tails, nullable=True, element=rest.element))
    return data


def cut(text: str, limit: int) -> list[str]:
    """Return a text in parts of at most `limit` bytes of UTF-8, none of them within a character."""
    raw = text.encode()
    parts: list[str] = []
    start = 0
    while len(raw) - start > limit:
        end = start + limit
        while raw[end] & 0xC0 == 0x80:
            end -= 1
        parts.append(raw[start:end].decode())
        start = end
    return [*parts, raw[start:].decode()]


def _rejected(where: str, record: str, reason: str) -> RecordRejectedError:
    return RecordRejectedError(f"{where}: record {record!r}: {reason}", record=record)


# ── collections that were found ──────────────────────────────────────────────────────────────────────


def _fields_data(
    layout: Layout,
    rows: Sequence[dict[str, Any] | None],
    documents: Sequence[str | None],
    ids: Sequence[str],
    where: str,
) -> list[Any]:
    """Return the columns of fields that hold a metadata field each, and of the dynamic ones."""
    columns: dict[str, list[Any]] = {field.name: [] for field in layout.fields}
    dynamic: list[bytes] = []
    for record, fields, document in zip(ids, rows, documents, strict=True):
        if fields == {}:
            raise _rejected(where, record, "its metadata is {}, which here is the same as none")
        fields = fields or {}
        for field in layout.fields:
            if field.name in fields and fields[field.name] is None:
                raise _rejected(where, record, f"field {field.name!r} is null, which is the same as absent")
            value = fields.pop(field.name, None)
            if fault := _fault(value, field):
                raise _rejected(where, record, f"field {field.name!r} {fault}")
            columns[field.name].append(_stored(value, field))
        if isinstance(layout.document, str) and document is not None:
            if isinstance(fields.get(layout.document), str):
                raise _rejected(where, record, f"{layout.document!r} is both its document and a field")
            fields[layout.document] = document
        if fault := _dynamic_fault(fields, layout):
            raise _rejected(where, record, fault)
        dynamic.append(dump_metadata(fields).encode())
    data = [
        scalar_data(
            field.name, field.kind, columns[field.name], nullable=field.nullable, element=field.element
        )
        for field in layout.fields
    ]
    if layout.dynamic:
        meta = scalar_data(_DYNAMIC, Kind.JSON, dynamic, nullable=False)
        meta.is_dynamic = True
        data.append(meta)
    return data


def _dynamic_fault(fields: Mapping[str, Any], layout: Layout) -> str | None:
    if fields and not layout.dynamic:
        return f"the collection has no field {next(iter(fields))!r}, and no dynamic ones"
    names = {layout.key.name, *(column.name for column in layout.vectors), _DYNAMIC, TYPED}
    names |= {layout.document.name} if isinstance(layout.document, Field) else set()
    if taken := sorted(names & fields.keys()):
        return f"the collection can't have a metadata field {taken[0]!r}"
    return None


def _stored(value: Any, field: Field) -> Any:
    if field.kind != Kind.JSON or value is None:
        return value
    return dump_metadata({"": value}).encode()[len(b'{"":') : -1]


def _fault(value: Any, field: Field) -> str | None:
    """Return why a field wouldn't give a value back as it is, or None."""
    if value is None:
        if field.has_default:
            return "has a default, which Milvus puts in place of none"
        return None if field.nullable else "may not be null"
    if field.kind == Kind.ARRAY:
        fits = (
            isinstance(value, list)
            and (field.capacity is None or len(value) <= field.capacity)
            and all(_fits(item, field.element, field.limit) for item in value)
        )
    else:
        fits = _fits(value, field.kind, field.limit)
    return None if fits else "can't hold its value exactly"


def _fits(value: Any, kind: int, limit: int | None) -> bool:
    if kind == Kind.JSON:
        return True
    if kind == Kind.BOOL:
        return isinstance(value, bool)
    if kind in _BITS:
        bound = 1 << (_BITS[kind] - 1)
        return type(value) is int and -bound <= value < bound
    if kind in (Kind.FLOAT, Kind.DOUBLE):
        return (
            isinstance(value, float) and math.isfinite(value) and (kind == Kind.DOUBLE or _is_single(value))
        )
    return isinstance(value, str) and (limit is None or len(value.encode()) <= limit)


def _is_single(value: float) -> bool:
    with np.errstate(over="ignore"):
        return float(np.float32(value)) == value
