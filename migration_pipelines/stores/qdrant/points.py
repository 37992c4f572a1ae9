"""Records as Qdrant's points: JSON on the way in, plain Python on the way out.

A point's payload is the record's metadata, with the document under a key of its own. Under cosine Qdrant
keeps only a vector's direction, and turns a vector of a length beyond float32's square into zeros: what is
written is of length one, and the payload keeps the lengths as `_source_norm`, by name of the vector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError
from migration_pipelines.metadata import dump_all, load_metadata, value_kinds
from migration_pipelines.model import (
    CollectionSchema,
    DType,
    IdKind,
    Metric,
    ValueKind,
    VectorField,
    VectorKind,
)
from migration_pipelines.stores.qdrant.numbers import from_unit, json_rows, parsed, to_unit

SOURCE_NORM = "_source_norm"
SHARD_KEY = "_source_shard_key"  # in which shard a point lies, where the user chose that himself
LARGEST_ID = 2**64 - 1
HELD = frozenset(
    {
        *(ValueKind.TEXT, ValueKind.EMPTY_TEXT, ValueKind.NUL_TEXT, ValueKind.BOOL, ValueKind.NULL),
        *(ValueKind.INT53, ValueKind.INT64, ValueKind.UINT64, ValueKind.SHORT_FLOAT, ValueKind.NEGATIVE_ZERO),
        *(ValueKind.OBJECT, ValueKind.NO_FIELDS, ValueKind.EMPTY_LIST, ValueKind.MIXED_LIST),
        *(ValueKind.LIST_OF_TEXT, ValueKind.LIST_OF_NUMBERS, ValueKind.LIST_OF_BOOLS),
    }
)
# Texts without any of these hold nothing but such values; the others are looked at one by one.
_TO_LOOK_AT = re.compile(rb"\d[\d.]{15}|\de|\$typed|_source_norm")
_Rows = list[bytes | None]


class PointParts(NamedTuple):
    """A point before it is written down: vectors are rows of numpy, matrices, or indices and values."""

    id: int | str
    vectors: dict[str, Any]
    payload: bytes


def is_scaled(field: VectorField) -> bool:
    """Whether Qdrant keeps only the direction of such vectors; bytes it keeps as they are."""
    return (
        field.metric is Metric.COSINE
        and field.kind is not VectorKind.SPARSE
        and field.dtype is not DType.UINT8
    )


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────


def to_points(
    batch: pa.RecordBatch, schema: CollectionSchema, *, document_field: str, where: str
) -> list[bytes]:
    """Return each record as the JSON text of a point.

    Raises
    ------
    RecordRejectedError
        Qdrant can't hold a record, or would change it.
    """
    names, columns = [], []
    norms: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
    for field in schema.vectors:
        column = batch.column(batches.vector_column(field.name))
        names.append(orjson.dumps(field.name))
        columns.append(_vector_texts(column, field, norms, where=where))
    is_plain = [field.name for field in schema.vectors] == [""]
    return [
        b'{"id":%b,"vector":%b,"payload":%b}'
        % (record_id, _vectors(names, vectors, is_plain=is_plain), payload)
        for record_id, vectors, payload in zip(
            _ids(batch, where=where),
            zip(*columns, strict=True) if columns else [()] * batch.num_rows,
            _payloads(batch, norms, document_field=document_field, where=where),
            strict=True,
        )
    ]


def point_parts(
    batch: pa.RecordBatch, schema: CollectionSchema, *, document_field: str, where: str
) -> Iterator[PointParts]:
    """Yield each record as a point's id, its vectors by name and the JSON text of its payload.

    Raises
    ------
    RecordRejectedError
        Qdrant can't hold a record, or would change it.
    """
    norms: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
    columns = {
        field.name: _vector_rows(batch.column(batches.vector_column(field.name)), field, norms, where=where)
        for field in schema.vectors
    }
    payloads = _payloads(batch, norms, document_field=document_field, where=where)
    for row, (record_id, payload) in enumerate(zip(_ids(batch, where=where), payloads, strict=True)):
        found = {name: column[row] for name, column in columns.items() if column[row] is not None}
        yield PointParts(orjson.loads(record_id), found, payload)


def _vectors(names: Sequence[bytes], texts: Sequence[bytes | None], *, is_plain: bool) -> bytes:
    if is_plain and texts[0] is not None:
        return texts[0]
    pairs = zip(names, texts, strict=True)
    return b"{%b}" % b",".join(b"%b:%b" % (name, text) for name, text in pairs if text is not None)


def _ids(batch: pa.RecordBatch, *, where: str) -> Iterator[bytes]:
    texts, kinds = batch.column(batches.ID).to_pylist(), batch.column(batches.ID_TYPE).to_pylist()
    for text, kind in zip(texts, kinds, strict=True):
        if kind == IdKind.UUID.value:
            yield b'"%b"' % text.encode()
        elif kind == IdKind.INT.value and 0 <= int(text) <= LARGEST_ID:
            yield text.encode()
        else:
            _reject(where, f"{kind} id {text!r:.80}", f"an integer from 0 to {LARGEST_ID} or a UUID")


def wire_ids(ids: pa.RecordBatch) -> list[int | str]:
    """Return ids as Qdrant names them; those that it can't have are left out."""
    texts, kinds = ids.column(batches.ID).to_pylist(), ids.column(batches.ID_TYPE).to_pylist()
    pairs = list(zip(texts, kinds, strict=True))
    return [
        int(text) if kind == IdKind.INT.value else text
        for text, kind in pairs
        if kind == IdKind.UUID.value or (kind == IdKind.INT.value and 0 <= int(text) <= LARGEST_ID)
    ]


def _payloads(
    batch: pa.RecordBatch, norms: Sequence[Mapping[str, Any]], *, document_field: str, where: str
) -> Iterator[bytes]:
    key = orjson.dumps(document_field)
    texts = batch.column(batches.METADATA).cast(pa.binary()).to_pylist()
    documents = batch.column(batches.DOCUMENT).to_pylist()
    suspicious = re.compile(_TO_LOOK_AT.pattern + b"|" + re.escape(key))
    look = suspicious.search(b"\0".join(text for text in texts if text)) is not None
    for text, document, norm in zip(texts, documents, norms, strict=True):
        fields = text or b"{}"
        if look and suspicious.search(fields):
            fields = _checked(fields.decode(), document_field, where=where)
        own = [b"%b:%b" % (key, orjson.dumps(document))] if document is not None else []
        if norm:
            own.append(b'"%b":%b' % (SOURCE_NORM.encode(), orjson.dumps(norm)))
        yield b"{%b}" % b",".join([fields[1:-1], *own] if fields != b"{}" else own)


def _checked(text: str, document_field: str, *, where: str) -> bytes:
    """Return the JSON text of metadata that may hold what Qdrant would change."""
    fields = load_metadata(text)
    for key, value in fields.items():
        if key in (document_field, SOURCE_NORM):
            _reject(where, f"a metadata field {key!r}", "another name: that key is the store's own")
        changed = {kind.value for kind in value_kinds(value)} - HELD
        if changed:
            _reject(
                where,
                f"metadata field {key!r:.80} with {', '.join(sorted(changed))}",
                "a value that it holds",
            )
    return orjson.dumps(fields)


def _vector_texts(column: pa.Array, field: VectorField, norms: list[dict[str, Any]], *, where: str) -> _Rows:
    _check_vectors(column, field, where=where)
    if field.kind is VectorKind.SPARSE:
        return [None if item is None else orjson.dumps(item) for item in column.to_pylist()]
    if field.kind is VectorKind.MULTI:
        matrix, slices = _multi_slices(column, field, norms)
        rows = json_rows(matrix)
        return [None if at is None else b"[%b]" % b",".join(rows[at]) for at in slices]
    matrix, missing = _dense_rows(column, field, norms)
    texts: _Rows = list(json_rows(matrix))
    for row in missing:
        texts[row] = None
    return texts


def _vector_rows(
    column: pa.Array, field: VectorField, norms: list[dict[str, Any]], *, where: str
) -> list[Any]:
    _check_vectors(column, field, where=where)
    if field.kind is VectorKind.SPARSE:
        return column.to_pylist()  # type: ignore[no-any-return]
    if field.kind is VectorKind.MULTI:
        matrix, slices = _multi_slices(column, field, norms)
        return [None if at is None else matrix[at] for at in slices]
    matrix, missing = _dense_rows(column, field, norms)
    rows: list[Any] = list(matrix)
    for row in missing:
        rows[row] = None
    return rows


def _check_vectors(column: pa.Array, field: VectorField, *, where: str) -> None:
    bad = batches.non_finite_rows(column)
    if bad.any():
        _reject(where, f"a vector with NaN or an infinity at row {int(bad.argmax())}", "finite numbers")
    if field.kind is VectorKind.SPARSE:
        indices = pc.struct_field(column, "indices").to_pylist()
        if any(len(set(found)) < len(found) for found in indices if found):
            _reject(where, "a sparse vector with an index that is there twice", "distinct indices")
    if field.kind is VectorKind.MULTI and pc.any(pc.equal(pc.list_value_length(column), 0)).as_py():
        _reject(where, "a multivector of no vectors", "at least one")


def _dense_rows(
    column: pa.Array, field: VectorField, norms: list[dict[str, Any]]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.intp]]:
    """Return the vectors as they are written, and the rows of those that aren't there."""
    matrix, present = batches.dense_matrix(column), np.asarray(column.is_valid())
    if is_scaled(field):
        matrix, lengths = to_unit(matrix)
        for row in np.flatnonzero((lengths != 1) & present):
            norms[row][field.name] = float(lengths[row])
    return matrix, np.flatnonzero(~present)


def _multi_slices(
    column: pa.Array, field: VectorField, norms: list[dict[str, Any]]
) -> tuple[npt.NDArray[Any], list[slice | None]]:
    """Return the vectors of all multivectors as they are written, and which are each one's."""
    matrix = batches.dense_matrix(column.flatten())
    scales = np.ones(len(matrix))
    if is_scaled(field):
        matrix, scales = to_unit(matrix)
    slices, start = list[slice | None](), 0
    for row, count in enumerate(pc.list_value_length(column).to_pylist()):
        at = slice(start, start + (count or 0))
        if (scales[at] != 1).any():
            norms[row][field.name] = scales[at].tolist()
        slices.append(None if count is None else at)
        start = at.stop
    return matrix, slices


def _reject(where: str, found: str, expected: str) -> NoReturn:
    raise RecordRejectedError(
        f"{where}: found {found}; Qdrant takes {expected}", found=found, expected=expected
    )


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def to_batch(
    points: Sequence[Mapping[str, Any]],
    schema: CollectionSchema,
    *,
    document_field: str,
    vectors: bool = True,
) -> pa.RecordBatch:
    """Return points as Qdrant answers with them as a batch; their payloads are taken apart."""
    ids = [point["id"] for point in points]
    payloads = [dict(point.get("payload") or {}) for point in points]
    scaled = {field.name for field in schema.vectors if is_scaled(field)}
    norms = [_taken_norm(payload, scaled) if SOURCE_NORM in payload else {} for payload in payloads]
    documents = [_taken_document(payload, document_field) for payload in payloads]
    for payload, point in zip(payloads, points, strict=True):
        if point.get("shard_key") is not None:
            payload[SHARD_KEY] = point["shard_key"]
    columns: dict[str, pa.Array] = {
        batches.ID: pa.array(list(map(str, ids)), pa.string()),
        batches.ID_TYPE: pa.array(["int" if type(value) is int else "uuid" for value in ids], pa.string()),
        batches.DOCUMENT: pa.array(documents, pa.string()),
        batches.METADATA: pa.array(dump_all(payloads), pa.binary()).cast(pa.string()),
    }
    for field in schema.vectors if vectors else ():
        found = [_vector_of(point.get("vector"), field.name) for point in points]
        columns[batches.vector_column(field.name)] = _vector_column(found, field, norms)
    layout = batches.arrow_schema(schema, vectors=vectors)
    return pa.RecordBatch.from_arrays([columns[name] for name in layout.names], schema=layout)


def _taken_document(payload: dict[str, Any], document_field: str) -> str | None:
    found = payload.get(document_field)
    return payload.pop(document_field) if isinstance(found, str) else None


def _taken_norm(payload: dict[str, Any], scaled: set[str]) -> Mapping[str, Any]:
    """Return the lengths that we kept; a field of that name with anything else in it is the user's own."""
    found = payload[SOURCE_NORM]
    if not isinstance(found, dict) or not found or not found.keys() <= scaled:
        return {}
    numbers = [item for value in found.values() for item in (value if isinstance(value, list) else [value])]
    if not numbers or not all(isinstance(number, float) and number > 0 for number in numbers):
        return {}
    return payload.pop(SOURCE_NORM)  # type: ignore[no-any-return]


def _vector_of(vector: Any, name: str) -> Any:
    if isinstance(vector, Mapping):
        return vector.get(name)
    return vector if name == "" and vector is not None else None


def _vector_column(found: Sequence[Any], field: VectorField, norms: Sequence[Mapping[str, Any]]) -> pa.Array:
    if field.kind is VectorKind.SPARSE:
        return _sparse_column(found, batches.vector_type(field))
    lengths = [norm.get(field.name) for norm in norms]
    if field.kind is VectorKind.MULTI:
        return _multi_column(found, field, lengths)
    missing = np.fromiter((item is None for item in found), bool, len(found))
    assert field.dimensions is not None
    nothing = [0.0] * field.dimensions
    matrix = parsed([nothing if item is None else item for item in found], field.dtype.value)
    matrix = matrix.reshape(len(found), field.dimensions)
    if any(lengths):
        matrix = from_unit(matrix, np.array([length or 1.0 for length in lengths], np.float64))
    return batches.dense_vectors(matrix, missing=missing if missing.any() else None)


def _multi_column(found: Sequence[Any], field: VectorField, lengths: Sequence[Any]) -> pa.Array:
    assert field.dimensions is not None
    rows = [row for item in found if item is not None for row in item]
    matrix = parsed(rows, field.dtype.value).reshape(len(rows), field.dimensions)
    pairs = [pair for pair in zip(found, lengths, strict=True) if pair[0] is not None]
    scales = [scale for item, length in pairs for scale in (length or [1.0] * len(item))]
    if len(scales) == len(rows):
        matrix = from_unit(matrix, np.array(scales, np.float64))
    inner = batches.dense_vectors(matrix)
    return pa.ListArray.from_arrays(_offsets(found), inner, mask=_mask(found))


def _sparse_column(found: Sequence[Any], kind: pa.DataType) -> pa.Array:
    pairs = [None if item is None else (item["indices"], item["values"]) for item in found]
    present = [pair for pair in pairs if pair is not None]
    indices = np.array([index for pair in present for index in pair[0]], np.uint32)
    values = parsed([value for pair in present for value in pair[1]], np.float32)
    offsets = _offsets([None if pair is None else pair[0] for pair in pairs])
    lists = [pa.ListArray.from_arrays(offsets, pa.array(part)) for part in (indices, values)]
    return pa.StructArray.from_arrays(lists, fields=list(kind), mask=_mask(found))


def _offsets(items: Sequence[Any]) -> pa.Array:
    lengths: npt.NDArray[np.int32] = np.array(
        [0, *(0 if item is None else len(item) for item in items)], np.int32
    )
    return pa.array(np.cumsum(lengths, dtype=np.int32))


def _mask(items: Sequence[Any]) -> pa.Array | None:
    missing = [item is None for item in items]
    return pa.array(missing) if any(missing) else None
