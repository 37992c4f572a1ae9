"""Batches as the lines of a bulk request, checked so that Elasticsearch refuses or changes none of them.

A line is put together from texts: the metadata is canonical JSON already, and the vectors are written
from their arrays. Python objects for every number would take several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError
from migration_pipelines.metadata import TYPED, load_json
from migration_pipelines.model import DType, Metric, VectorField, VectorKind
from migration_pipelines.stores.elasticsearch.schema import KIND, Layout

MAX_ID_BYTES = 512
_UNIT_WITHIN = 1e-4  # DenseVectorFieldMapper: how far from 1 a squared length may be under dot_product
_LEAST_WEIGHT = np.finfo(np.float32).tiny  # Lucene's FeatureField takes normal numbers above zero only

_WRAPPED = f'{{"{TYPED}":'.encode()


def lines_of(batch: pa.RecordBatch, layout: Layout, *, where: str) -> list[bytes]:
    """Return two lines a record, which make or replace it.

    Raises
    ------
    RecordRejectedError
        A record holds what the index can't.
    DimensionMismatchError
    """
    batch = _conform(batch, layout, where)
    ids = batch.column(batches.ID).to_pylist()
    check_ids(ids, where=where)
    columns = [_vector_texts(batch, field, layout, where) for field in layout.schema.vectors]
    documents: list[Any] = [None] * len(ids)
    if layout.document is not None:
        key = orjson.dumps(layout.document) + b":"
        found = batch.column(batches.DOCUMENT).to_pylist()
        documents = [None if text is None else key + orjson.dumps(text) for text in found]
    elif batch.column(batches.DOCUMENT).null_count < len(ids):
        raise RecordRejectedError(f"{where}: the index has no field for documents; say ?document_field=")
    metadata = _metadata_texts(batch, layout, where)
    return [
        b'{"index":{"_id":%b}}\n{%b}\n' % (orjson.dumps(record_id), b",".join(filter(None, parts)))
        for record_id, parts in zip(ids, zip(*columns, documents, metadata, strict=True), strict=True)
    ]


def deletions_of(ids: list[str]) -> list[bytes]:
    """Return one line an id, which deletes its record."""
    return [b'{"delete":{"_id":%b}}\n' % orjson.dumps(text) for text in ids]


def check_ids(ids: list[str], *, where: str) -> None:
    """Raise where an id can't be one of Elasticsearch's.

    Raises
    ------
    RecordRejectedError
    """
    bad = [text for text in ids if not 0 < len(text.encode()) <= MAX_ID_BYTES]
    if bad:
        raise RecordRejectedError(
            f"{where}: an id has 1 to {MAX_ID_BYTES} bytes, not {len(bad[0].encode())}: {bad[0][:80]!r}"
        )


def _conform(batch: pa.RecordBatch, layout: Layout, where: str) -> pa.RecordBatch:
    """Return the batch in the index's own columns; an index without records may not know its dimensions."""
    fields = []
    for field in layout.schema.vectors:
        name = batches.vector_column(field.name)
        if field.dimensions is None and field.kind is not VectorKind.SPARSE and name in batch.schema.names:
            kind = batch.schema.field(name).type
            width = (kind.value_type if field.kind is VectorKind.MULTI else kind).list_size
            field = field.model_copy(update={"dimensions": width * 8 if field.dtype is DType.BIT else width})
        fields.append(field)
    return batches.conform(batch, layout.schema.model_copy(update={"vectors": tuple(fields)}), where=where)


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────


def _metadata_texts(batch: pa.RecordBatch, layout: Layout, where: str) -> list[bytes | None]:
    texts = batch.column(batches.METADATA).cast(pa.binary()).to_pylist()
    if any(text is not None and text.startswith(_WRAPPED) for text in texts):
        # Its canonical text is wrapped, so that its fields would stand elsewhere than those of other records.
        raise RecordRejectedError(f"{where}: a metadata field can't be called {TYPED!r}; rename it")
    if layout.metadata:
        key = orjson.dumps(layout.metadata) + b":"
        return [None if text is None else key + text for text in texts]
    own = {path.partition(".")[0] for path in layout.vectors.values()} | {layout.document}
    return [None if text is None else _fields_text(text, own, where) for text in texts]


def _fields_text(text: bytes, own: set[str | None], where: str) -> bytes:
    """Return the fields of a record in an index where they stand beside vectors and document."""
    taken = own & load_json(text.decode()).keys()
    if taken or text == b"{}":
        found = f"a metadata field {min(map(str, taken))!r}" if taken else "metadata without a field"
        raise RecordRejectedError(f"{where}: {found} has no place beside the record's vectors and document")
    return text[1:-1]


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────


def _vector_texts(
    batch: pa.RecordBatch, field: VectorField, layout: Layout, where: str
) -> list[bytes | None]:
    """Return `"field":value` by record, None where it has no such vector."""
    column = batch.column(batches.vector_column(field.name))
    key = orjson.dumps(layout.vectors[field.name]) + b":"

    def refuse(row: int, why: str) -> RecordRejectedError:
        record_id = batch.column(batches.ID)[row].as_py()
        return RecordRejectedError(
            f"{where}: record {record_id!r}: vector {field.name or '(default)'}: {why}"
        )

    bad = np.flatnonzero(batches.non_finite_rows(column))
    if bad.size:
        raise refuse(int(bad[0]), "it holds NaN or an infinity, which JSON has no number for")
    write = {
        VectorKind.DENSE: _dense_texts,
        VectorKind.SPARSE: _sparse_texts,
        VectorKind.MULTI: _multi_texts,
    }[field.kind]
    return [None if text is None else key + text for text in write(column, field, refuse)]


_Refuse = Callable[[int, str], RecordRejectedError]


def _dense_texts(column: pa.Array, field: VectorField, refuse: _Refuse) -> list[bytes | None]:
    matrix = batches.dense_matrix(column)
    missing = np.asarray(column.is_null()) if column.null_count else np.zeros(len(column), bool)
    _check_lengths(matrix, missing, field, refuse)
    texts: list[bytes | None] = list(_rows_text(matrix, field))
    for row in np.flatnonzero(missing):
        texts[row] = None
    return texts


def _check_lengths(
    matrix: npt.NDArray[Any], missing: npt.NDArray[np.bool_], field: VectorField, refuse: _Refuse
) -> None:
    """Raise for a vector of a length that the similarity isn't defined for, computed as the server does."""
    is_unit = (field.index.get(KIND) or {}).get("similarity") == "dot_product"
    if field.metric is not Metric.COSINE and not (is_unit and field.dtype is DType.FLOAT32):
        return
    wide = matrix.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        squares = np.einsum("ij,ij->i", wide, wide)
    zero = field.metric is Metric.COSINE
    bad = np.flatnonzero(((squares == 0) if zero else (np.abs(squares - 1) > _UNIT_WITHIN)) & ~missing)
    if bad.size:
        why = (
            "cosine takes no vector of length zero"
            if zero
            else "dot_product takes vectors of length one only"
        )
        raise refuse(int(bad[0]), why)


def _rows_text(matrix: npt.NDArray[Any], field: VectorField) -> Iterator[bytes]:
    """Yield the JSON of each row, float32 in the fewest digits that give it back."""
    values = matrix.view(np.int8) if field.dtype is DType.BIT else matrix
    for row in np.ascontiguousarray(values):
        yield orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def _multi_texts(column: pa.Array, field: VectorField, refuse: _Refuse) -> list[bytes | None]:
    texts: list[bytes | None] = []
    for row in range(len(column)):
        if not column[row].is_valid:
            texts.append(None)
            continue
        matrix = batches.dense_matrix(column[row].values)
        if not len(matrix):
            raise refuse(row, "a multivector holds at least one vector")
        texts.append(b"[%b]" % b",".join(_rows_text(matrix, field)))
    return texts


def _sparse_texts(column: pa.Array, field: VectorField, refuse: _Refuse) -> list[bytes | None]:  # noqa: ARG001
    texts: list[bytes | None] = []
    for row, item in enumerate(column.to_pylist()):
        if item is None:
            texts.append(None)
            continue
        values = np.asarray(item["values"], np.float32)
        if not (values >= _LEAST_WEIGHT).all() or len(set(item["indices"])) < len(item["indices"]):
            raise refuse(row, "a sparse vector has weights above zero only, each index once")
        numbers = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
        pairs = zip(item["indices"], numbers, strict=False)
        texts.append(b"{%b}" % b",".join(b'"%d":%b' % pair for pair in pairs))
    return texts
