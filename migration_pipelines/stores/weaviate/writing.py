"""From batches to the objects that the server takes, checked so that it changes none of them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import MigrationError, RecordRejectedError
from migration_pipelines.metadata import dump_metadata, load_metadata
from migration_pipelines.model import CollectionSchema, IdKind, VectorField, VectorKind
from migration_pipelines.stores.weaviate.errors import of_a_record
from migration_pipelines.stores.weaviate.layout import MORE_FIELDS, Layout, accepts_tenant, data_type

_EXACT_INT = 2**53
_REQUEST_RECORDS, _REQUEST_BYTES = 1000, 16 * 2**20
_ENVELOPE_BYTES = 100  # of a message, and of each object in it: more than Protobuf takes


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_int(value: Any) -> bool:
    return type(value) is int and -_EXACT_INT <= value <= _EXACT_INT


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(is_item, value))


# Whether a property of this type gives a value back as it is.
_FITS: Mapping[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "int": _is_int,
    "number": _is_number,
    "boolean": _is_bool,
    "text[]": _list_of(_is_text),
    "int[]": _list_of(_is_int),
    "number[]": _list_of(_is_number),
    "boolean[]": _list_of(_is_bool),
}


class Writer:
    """Makes one class's objects of records.

    Parameters
    ----------
    tenant
        Of all records; None where each batch has a column of them, "" where the class has none.
    where
        The collection's address, for messages.
    """

    def __init__(self, layout: Layout, *, tenant: str | None, where: str) -> None:
        from google.protobuf import struct_pb2
        from weaviate.proto.v1 import base_pb2, batch_pb2

        self._batch, self._base, self._struct = batch_pb2, base_pb2, struct_pb2
        self._layout, self._tenant, self._where = layout, tenant, where
        self._types = {name: data_type(item) for name, item in layout.properties.items()}

    def objects(self, batch: pa.RecordBatch) -> list[Any]:
        """Return the objects of a batch that has the collection's columns.

        Raises
        ------
        RecordRejectedError
            Weaviate would refuse a record, or change it.
        """
        self._check(batch)
        ids = [text.lower() for text in batch.column(batches.ID).to_pylist()]
        tenants = self.tenants(batch)
        vectors = list(zip(*map(self._vectors, self._layout.vectors, self._columns(batch)), strict=True))
        documents = batch.column(batches.DOCUMENT).to_pylist()
        metadatas = batch.column(batches.METADATA).to_pylist()
        made = []
        for row, record_id in enumerate(ids):
            item = self._batch.BatchObject(
                collection=self._layout.name,
                uuid=record_id,
                tenant=tenants[row],
                properties=self._properties(record_id, documents[row], metadatas[row]),
            )
            self._add_vectors(item, vectors[row] if vectors else ())
            made.append(item)
        return made

    def tenants(self, batch: pa.RecordBatch) -> list[str]:
        """Return the tenant of each record."""
        if self._tenant is not None:
            return [self._tenant] * batch.num_rows
        found = [name or "" for name in batch.column(batches.NAMESPACE).to_pylist()]
        for row, name in enumerate(found):
            if not accepts_tenant(name):
                record = batch.column(batches.ID)[row].as_py()
                raise self._reject(record, f"Weaviate can't have a tenant called {name!r}")
        return found

    def _check(self, batch: pa.RecordBatch) -> None:
        ids = batch.column(batches.ID)
        problems: list[tuple[Any, str]] = [
            (pc.not_equal(batch.column(batches.ID_TYPE), IdKind.UUID.value), "its id is not a UUID")
        ]
        problems += [
            (batches.non_finite_rows(column), "its vector holds NaN or an infinity")
            for column in self._columns(batch)
        ]
        if self._layout.document is None:
            problems.append(
                (batch.column(batches.DOCUMENT).is_valid(), "the class has no place for a document")
            )
        for rows, problem in problems:
            for row in np.flatnonzero(np.asarray(rows))[:1]:
                raise self._reject(ids[int(row)].as_py(), problem)

    def _columns(self, batch: pa.RecordBatch) -> Iterator[pa.Array]:
        return (batch.column(batches.vector_column(field.name)) for field in self._layout.vectors)

    def _vectors(self, field: VectorField, column: pa.Array) -> Sequence[bytes]:
        """Return a field's vectors as they go over the wire; empty where a record has none."""
        if field.kind is VectorKind.MULTI:
            return [_multi(item, self._where) if item is not None else b"" for item in column.to_pylist()]
        matrix = batches.dense_matrix(column)
        width = matrix.shape[1] * matrix.itemsize
        raw, valid = matrix.tobytes(), column.is_valid().to_pylist()
        return [raw[row * width : (row + 1) * width] if valid[row] else b"" for row in range(len(column))]

    def _add_vectors(self, item: Any, vectors: Sequence[bytes]) -> None:
        for field, raw in zip(self._layout.vectors, vectors, strict=bool(vectors)):
            name = self._layout.wire_names[field.name]
            if name is None:
                item.vector_bytes = raw
            elif raw:
                multi = field.kind is VectorKind.MULTI
                kinds = self._base.Vectors
                kind = kinds.VECTOR_TYPE_MULTI_FP32 if multi else kinds.VECTOR_TYPE_SINGLE_FP32
                item.vectors.add(name=name, vector_bytes=raw, type=kind)

    def _properties(self, record_id: str, document: str | None, text: str | None) -> Any:
        made = self._batch.BatchObject.Properties()
        plain = made.non_ref_properties.fields
        if document is not None:
            plain[self._layout.document].string_value = document
        more: dict[str, Any] | None = {}
        if text is None:
            more = None
        else:
            for key, value in load_metadata(text).items():
                kind = self._types.get(key)
                if kind is None or kind not in _FITS or not _FITS[kind](value):
                    more[key] = value  # type: ignore[index]
                elif kind == "text":
                    plain[key].string_value = value
                elif kind == "boolean":
                    plain[key].bool_value = value
                elif kind in ("int", "number"):
                    plain[key].number_value = value
                else:
                    self._add_list(made, key, kind, value)
        if more or more is None:
            if not self._layout.has_more:
                raise self._reject(record_id, self._no_place(more))
            plain[MORE_FIELDS].string_value = "null" if more is None else dump_metadata(more)
        return made

    def _add_list(self, made: Any, key: str, kind: str, value: list[Any]) -> None:
        if kind == "number[]":
            packed = struct.pack(f"<{len(value)}d", *value)
            made.number_array_properties.add(prop_name=key, values_bytes=packed)
        else:
            kinds = {"text[]": "text", "int[]": "int", "boolean[]": "boolean"}
            getattr(made, f"{kinds[kind]}_array_properties").add(prop_name=key, values=value)

    def _no_place(self, more: Mapping[str, Any] | None) -> str:
        if more is None:
            return "it has no metadata at all, which this class can't tell from empty metadata"
        found = {key: self._types.get(key, "no property") for key in sorted(more)[:5]}
        return (
            f"the class has no property that holds these fields as they are: {found}; add properties to it "
            "in Weaviate, or choose a new collection as the target"
        )

    def _reject(self, record_id: str, problem: str) -> RecordRejectedError:
        return RecordRejectedError(f"{self._where}: record {record_id!r}: {problem}", record=record_id)


def _multi(vectors: Sequence[Sequence[float]], where: str) -> bytes:
    if not vectors:
        raise RecordRejectedError(f"{where}: a multivector without vectors, which Weaviate refuses")
    matrix = np.asarray(vectors, "<f4")
    return struct.pack("<H", matrix.shape[1]) + matrix.tobytes()


def with_dimensions(schema: CollectionSchema, batch: pa.RecordBatch) -> CollectionSchema:
    """Return the schema with dimensions from a batch where no record has any yet."""
    fields = []
    for field in schema.vectors:
        name = batches.vector_column(field.name)
        if not field.dimensions and name in batch.schema.names:
            kind = batch.schema.field(name).type
            dense = kind.value_type if field.kind is VectorKind.MULTI else kind
            field = field.model_copy(update={"dimensions": getattr(dense, "list_size", 0)})
        fields.append(field)
    return schema.model_copy(update={"vectors": tuple(fields)})


def requests(objects: Sequence[Any], *, max_bytes: int) -> Iterator[Any]:
    """Yield requests of 1,000 objects, or fewer of at most `max_bytes`; a single object may exceed that."""
    from weaviate.proto.v1 import base_pb2, batch_pb2

    part: list[Any] = []
    size = _ENVELOPE_BYTES
    for item in objects:
        more = item.ByteSize() + _ENVELOPE_BYTES
        if part and (len(part) == _REQUEST_RECORDS or size + more > min(max_bytes, _REQUEST_BYTES)):
            yield batch_pb2.BatchObjectsRequest(
                objects=part, consistency_level=base_pb2.CONSISTENCY_LEVEL_QUORUM
            )
            part, size = [], _ENVELOPE_BYTES
        part.append(item)
        size += more
    if part:
        yield batch_pb2.BatchObjectsRequest(objects=part, consistency_level=base_pb2.CONSISTENCY_LEVEL_QUORUM)


def check_reply(errors: Sequence[Any], objects: Sequence[Any], *, where: str) -> None:
    """Raise for what a batch's reply says of single objects; the call itself succeeds all the same.

    Raises
    ------
    MigrationError
        The worst of the errors: one that ends the migration, else one that is worth another try, else the
        rejection of a record.
    """
    if not errors:
        return
    found = [(of_a_record(item.error), item) for item in errors]
    rejected = [pair for pair in found if pair[0][0] is RecordRejectedError]
    others = [pair for pair in found if pair[0][0] is not RecordRejectedError]
    (kind, advice), item = (others or rejected)[0]
    record = objects[item.index].uuid if item.index < len(objects) else f"number {item.index}"
    more = f" (and {len(errors) - 1} more records)" if len(errors) > 1 else ""
    error: MigrationError = kind(
        f"{where}: record {record!r}: {item.error[:300]}{more}; {advice}", record=record, failed=len(errors)
    )
    raise error
