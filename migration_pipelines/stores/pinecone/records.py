"""Records as Pinecone gives and takes them, checked so that it changes none of them.

A record's document is a text among its metadata, under the name that the store's `document_field` says. Every
number of the service is a double: one without a fraction is read as an integer, unless the record's field
`_floats`, a list of names, says that it was written as a float.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError, StoreRefusedError, TransientError
from migration_pipelines.metadata import dump_all, load_metadata, value_kinds
from migration_pipelines.model import CollectionSchema, IdKind, ValueKind, VectorField, VectorKind

FLOATS = "_floats"
MAX_ID_BYTES = 512
_LARGEST_INT = 2**53

# Doubles of more than 15 digits are left out: that the service's JSON parser gives back each of them to the
# last bit is documented nowhere.
HELD = frozenset(
    {
        ValueKind.TEXT,
        ValueKind.EMPTY_TEXT,
        ValueKind.BOOL,
        ValueKind.INT53,
        ValueKind.SHORT_FLOAT,
        ValueKind.LIST_OF_TEXT,
    }
)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


def accepts_id(text: str) -> bool:
    """Whether a record can have this id: ASCII without NUL."""
    return text.isascii() and "\0" not in text


def accepts_key(key: str, *, document_field: str) -> bool:
    """Whether a metadata field may have this name: `$` begins the operators of a filter."""
    return key not in ("", FLOATS, document_field) and key[0] != "$" and "\0" not in key


def held_ids(ids: pa.RecordBatch) -> list[str]:
    """Return the distinct ids that an index can hold."""
    texts = ids.column(batches.ID).filter(pc.equal(ids.column(batches.ID_TYPE), IdKind.STR.value))
    distinct = dict.fromkeys(texts.to_pylist())
    return [text for text in distinct if 0 < len(text) <= MAX_ID_BYTES and accepts_id(text)]


# ── records that are written ─────────────────────────────────────────────────────────────────────────


class Encoded(NamedTuple):
    """A record as the JSON object that `vectors/upsert` takes, and where it goes."""

    namespace: str
    id: str
    json: bytes


def encode(
    batch: pa.RecordBatch, fields: Sequence[VectorField], *, document_field: str, where: str
) -> list[Encoded]:
    """Return the records of a batch that has the columns of `fields`.

    Raises
    ------
    RecordRejectedError
        Pinecone would refuse a record, or change it.
    """
    rows = batch.num_rows
    ids = batch.column(batches.ID).to_pylist()
    _check_rows(batch, fields, ids, where=where)
    spaces = [""] * rows
    if batches.NAMESPACE in batch.schema.names:
        spaces = pc.fill_null(batch.column(batches.NAMESPACE), "").to_pylist()
    records: list[dict[str, Any]] = [{"id": record_id} for record_id in ids]
    for field in fields:
        column = batch.column(batches.vector_column(field.name))
        _add_sparse(records, column) if field.kind is VectorKind.SPARSE else _add_dense(records, column)
    documents = batch.column(batches.DOCUMENT).to_pylist()
    for record, text, document in zip(
        records, batch.column(batches.METADATA).to_pylist(), documents, strict=True
    ):
        metadata = None if text is None else load_metadata(text)
        if metadata is not None and (fault := _fault(metadata, document_field)):
            raise _rejected(record["id"], fault, where)
        if document is not None and "\0" in document:
            raise _rejected(record["id"], "its document holds U+0000", where)
        if metadata := _written_metadata(metadata or {}, document, document_field):
            record["metadata"] = metadata
    return [
        Encoded(space, record["id"], orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY))
        for space, record in zip(spaces, records, strict=True)
    ]


def _check_rows(
    batch: pa.RecordBatch, fields: Sequence[VectorField], ids: Sequence[str], *, where: str
) -> None:
    texts = batch.column(batches.ID)
    awkward = np.fromiter((not accepts_id(text) for text in ids), bool, len(ids))
    lengths = np.asarray(pc.binary_length(texts))
    problems: list[tuple[npt.NDArray[np.bool_], str]] = [
        (np.asarray(pc.not_equal(batch.column(batches.ID_TYPE), IdKind.STR.value)), "its id is not a text"),
        (awkward, "its id is not ASCII, or holds U+0000"),
        ((lengths == 0) | (lengths > MAX_ID_BYTES), f"its id has not 1 to {MAX_ID_BYTES} characters"),
    ]
    for field in fields:
        column = batch.column(batches.vector_column(field.name))
        problems.append((batches.non_finite_rows(column), "its vector holds NaN or an infinity"))
        if field.kind is VectorKind.DENSE:
            problems.append((np.asarray(column.is_null()), "it has no vector"))
            empty = np.asarray(~batches.dense_matrix(column).any(axis=1))
            problems.append((empty, "its vector is all zeros, which Pinecone refuses"))
        else:
            sizes = np.asarray(pc.list_value_length(pc.struct_field(column, "indices")).fill_null(1))
            problems.append((sizes == 0, "its sparse vector is empty, which Pinecone refuses"))
            if len(fields) == 1:
                problems.append((np.asarray(column.is_null()), "it has no vector"))
    for rows, problem in problems:
        for row in np.flatnonzero(rows)[:1]:
            raise _rejected(ids[row], problem, where)


def _rejected(record_id: str, problem: str, where: str) -> RecordRejectedError:
    return RecordRejectedError(f"{where}: record {record_id!r}: {problem}", record=record_id)


def _add_dense(records: Sequence[dict[str, Any]], column: pa.Array) -> None:
    # As float32, of which orjson writes the fewest digits: half the bytes of a list of Python's floats.
    for record, row in zip(records, batches.dense_matrix(column), strict=True):
        record["values"] = row


def _add_sparse(records: Sequence[dict[str, Any]], column: pa.Array) -> None:
    for record, item in zip(records, column.to_pylist(), strict=True):
        if item is not None:
            values = np.asarray(item["values"], np.float32)
            record["sparseValues"] = {"indices": item["indices"], "values": values}


def _fault(metadata: Mapping[str, Any], document_field: str) -> str | None:
    """Return why Pinecone wouldn't give this metadata back as it is, or None."""
    if not metadata:
        return "its metadata is {}, which Pinecone can't hold"
    for key, value in metadata.items():
        if not accepts_key(key, document_field=document_field):
            return f"a metadata field can't be called {key!r} here"
        if not HELD.issuperset(value_kinds(value)):
            return f"Pinecone would refuse or change the value of {key!r}"
    return None


def _written_metadata(metadata: dict[str, Any], document: str | None, document_field: str) -> dict[str, Any]:
    floats = [key for key, value in metadata.items() if type(value) is float and _reads_as_int(value)]
    if floats:
        metadata[FLOATS] = floats
    if document is not None:
        metadata[document_field] = document
    return metadata


# ── records that are read ────────────────────────────────────────────────────────────────────────────


def decode(
    content: bytes,
    texts: Sequence[str],
    schema: CollectionSchema,
    *,
    document_field: str,
    vectors: bool,
    where: str,
) -> pa.RecordBatch:
    """Return the records of an answer to `vectors/fetch`, in the order of `texts`, without a namespace.

    Protobuf's JSON writes -0.0 as -0, which any parser takes for the integer 0. Where there may be one, after
    a colon or where a vector came with a zero, a slower parser is told what it means.

    Raises
    ------
    TransientError
        It is no whole answer.
    StoreRefusedError
        A record holds what the index doesn't declare.
    """
    made = partial(_page, texts, schema, document_field=document_field, vectors=vectors, where=where)
    if not _has_signed_zero(content):
        page = made(orjson.loads(content))
        is_dense = vectors and schema.vectors[0].kind is VectorKind.DENSE
        has_zero = is_dense and not batches.dense_matrix(page.column(batches.VECTOR)).all()
        if not has_zero or not (b"-0," in content or b"-0]" in content):
            return page
    return made(json.loads(content, parse_int=lambda digits: -0.0 if digits == "-0" else int(digits)))


def _page(
    texts: Sequence[str],
    schema: CollectionSchema,
    answer: Any,
    *,
    document_field: str,
    vectors: bool,
    where: str,
) -> pa.RecordBatch:
    there = answer.get("vectors") if isinstance(answer, dict) else None
    if not isinstance(there, dict):
        raise TransientError(f"{where}: an answer came without records in it; try again")
    ids = [text for text in texts if text in there]
    records = [there[text] for text in ids]
    _check_sparse(records, schema, where=where)
    columns = [pa.array(ids, pa.string()), batches.constant(IdKind.STR.value, len(ids))]
    if vectors:
        columns += [_vector_column(records, field, where=where) for field in schema.vectors]
    read = [_read_metadata(record.get("metadata"), document_field) for record in records]
    columns.append(pa.array([document for document, _ in read], pa.string()))
    columns.append(pa.array(dump_all([fields for _, fields in read]), pa.binary()).view(pa.string()))
    plain = schema.model_copy(update={"has_namespaces": False})
    return pa.RecordBatch.from_arrays(columns, schema=batches.arrow_schema(plain, vectors=vectors))


def _has_signed_zero(content: bytes) -> bool:
    """Whether a metadata field's value in a JSON text may be `-0`, with or without a space before it."""
    text = np.frombuffer(content.ljust(len(content) + 4), np.uint8)
    start = np.flatnonzero(text == ord(":")) + 1
    start += text[start] == ord(" ")
    found = (text[start] == ord("-")) & (text[start + 1] == ord("0")) & (text[start + 2] != ord("."))
    return bool(found.any())


def _check_sparse(records: Sequence[Mapping[str, Any]], schema: CollectionSchema, *, where: str) -> None:
    """Raise where a record holds a sparse vector that would be left behind unseen."""
    if any(field.kind is VectorKind.SPARSE for field in schema.vectors):
        return
    for record in records:
        if (record.get("sparseValues") or {}).get("indices"):
            raise StoreRefusedError(
                f"{where}: record {record.get('id')!r} holds a sparse vector, which the index doesn't "
                "declare; add ?sparse=true to the address to move those too",
                record=record.get("id"),
            )


def _vector_column(records: Sequence[Mapping[str, Any]], field: VectorField, *, where: str) -> pa.Array:
    if field.kind is VectorKind.SPARSE:
        found = [record.get("sparseValues") or {} for record in records]
        rows = [item if item.get("indices") else None for item in found]
        return pa.array(rows, batches.vector_type(field))
    assert field.dimensions is not None
    pack, nothing = struct.Struct(f"{field.dimensions}f").pack, bytes(4 * field.dimensions)
    lists = [record.get("values") or [] for record in records]
    missing = np.fromiter((not values for values in lists), bool, len(lists))
    try:
        # In a third of the time that numpy takes for lists.
        packed = b"".join([pack(*values) if values else nothing for values in lists])
    except struct.error:
        raise TransientError(
            f"{where}: a vector came with other than {field.dimensions} numbers; try again"
        ) from None
    matrix = np.frombuffer(packed, np.float32).reshape(len(lists), field.dimensions)
    return batches.dense_vectors(matrix, missing=missing if missing.any() else None)


def _read_metadata(
    found: dict[str, Any] | None, document_field: str
) -> tuple[str | None, dict[str, Any] | None]:
    """Return a record's document and the rest of its metadata."""
    if not found:
        return None, None
    document = found.pop(document_field) if isinstance(found.get(document_field), str) else None
    floats = _marked_floats(found)
    for key, value in found.items():
        if type(value) in (int, float):
            found[key] = float(value) if key in floats or not _reads_as_int(value) else int(value)
    return document, found or None


def _marked_floats(found: dict[str, Any]) -> frozenset[str]:
    """Take the list of floats from a record's metadata; a field of that name that is none stays."""
    names = found.get(FLOATS)
    is_ours = isinstance(names, list) and all(
        isinstance(name, str) and type(found.get(name)) in (int, float) for name in names
    )
    if not is_ours:
        return frozenset()
    return frozenset(found.pop(FLOATS))


def _reads_as_int(value: float) -> bool:
    is_negative_zero = value == 0 and math.copysign(1, value) < 0
    return abs(value) <= _LARGEST_INT and float(value).is_integer() and not is_negative_zero


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────


def requests(records: Sequence[Encoded], *, max_records: int, max_bytes: int) -> Iterator[list[Encoded]]:
    """Yield the records in requests of one namespace each, by what their JSON really takes."""
    waiting: list[Encoded] = []
    size = 0
    for record in sorted(records, key=lambda item: item.namespace):
        over = len(waiting) >= max_records or size + len(record.json) + 1 > max_bytes
        if waiting and (over or record.namespace != waiting[0].namespace):
            yield waiting
            waiting, size = [], 0
        waiting.append(record)
        size += len(record.json) + 1
    if waiting:
        yield waiting


def body_of(records: Sequence[Encoded]) -> bytes:
    """Return the body of one request."""
    namespace = orjson.dumps(records[0].namespace) if records[0].namespace else None
    tail = b"" if namespace is None else b',"namespace":' + namespace
    return b'{"vectors":[' + b",".join([record.json for record in records]) + b"]" + tail + b"}"
