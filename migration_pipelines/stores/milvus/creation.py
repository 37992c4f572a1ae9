"""What a new collection is made of: the fields of the Milvus that it comes from, or ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from migration_pipelines.errors import ConfigurationError
from migration_pipelines.model import CollectionSchema, DType, IdKind, Metric, VectorField, VectorKind
from migration_pipelines.stores.milvus.client import pairs
from migration_pipelines.stores.milvus.schema import (
    DOCUMENT,
    KEY,
    METADATA,
    METRIC_NAMES,
    METRICS,
    NAME,
    OURS,
    REST,
    REST_PARTS,
    TEXT_BYTES,
    VECTOR,
    Described,
    Kind,
    VectorColumn,
    layout_of,
)

_VECTOR_KINDS = {DType.FLOAT32: Kind.FLOAT_VECTOR, DType.INT8: Kind.INT8_VECTOR, DType.BIT: Kind.BINARY}
# Of each index's parameters ours, Milvus's, and its default.
_INDEXES = {
    "hnsw": ("HNSW", (("m", "M", 16), ("ef_construction", "efConstruction", 200))),
    "ivf": ("IVF_FLAT", (("lists", "nlist", 128),)),
}


@dataclass(frozen=True)
class NewCollection:
    """What `create` is asked for; `indexes` are by field."""

    proto: Any
    indexes: Mapping[str, Mapping[str, str]]
    properties: Mapping[str, str]
    n_shards: int


def new_collection(
    schema: CollectionSchema, *, is_lite: bool, document_field: str | None, where: str
) -> NewCollection:
    """Return what to ask Milvus for.

    A collection that comes from a Milvus gets the same fields, with their lengths, defaults and partition
    key, as long as what is to be written fits them.

    Raises
    ------
    ConfigurationError
        A vector has no dimensions, or a name that Milvus refuses.
    """
    own = schema.options.get("milvus", {})
    columns = _carried(schema, own, document_field, where) if own else None
    if columns is None:
        columns, own = {field.name or VECTOR: field for field in schema.vectors}, {}
    indexes = {name: _index(field, is_lite=is_lite) for name, field in columns.items()}
    if not is_lite:
        for name, index in own.get("indexes", {}).items():
            kept = columns.get(name)
            # Of a field that is no vector that is all there is; a vector may have got another metric.
            if kept is None or METRICS.get(index.get("metric_type", "")) is kept.metric:
                indexes[name] = dict(index)
    return NewCollection(
        proto=_same_fields(schema, own) if own else _our_fields(schema, where=where),
        indexes=indexes,
        properties=own.get("properties", {}),
        n_shards=own.get("shards", 0),
    )


def _carried(
    schema: CollectionSchema, own: Mapping[str, Any], document_field: str | None, where: str
) -> dict[str, VectorField] | None:
    """Return the vectors by Milvus's names for them; None where the fields don't fit."""
    proto = _same_fields(schema, own)
    found = Described(name=schema.name, number=0, proto=proto, indexes={}, partitions=(), properties={})
    layout = layout_of(found, document_field=document_field, where=where)
    kind = IdKind.STR if layout.key_is_text else IdKind.INT
    wanted = {field.name: field for field in schema.vectors}
    if schema.has_documents and layout.document is None:
        return None
    if schema.id_kinds != {kind} or {column.field.name for column in layout.vectors} != wanted.keys():
        return None
    if not all(_is_alike(column, wanted[column.field.name]) for column in layout.vectors):
        return None
    return {column.name: wanted[column.field.name] for column in layout.vectors}


def _is_alike(column: VectorColumn, field: VectorField) -> bool:
    found = column.field
    return (found.kind, found.dtype, found.dimensions) == (field.kind, field.dtype, field.dimensions)


def _same_fields(schema: CollectionSchema, own: Mapping[str, Any]) -> Any:
    from google.protobuf.json_format import ParseDict
    from pymilvus.grpc_gen import schema_pb2

    proto = ParseDict(own["schema"], schema_pb2.CollectionSchema(), ignore_unknown_fields=True)
    proto.name = schema.name
    proto.autoID = False  # the keys come with the records
    for field in proto.fields:
        field.autoID = False
    return proto


def _our_fields(schema: CollectionSchema, *, where: str) -> Any:
    from pymilvus.grpc_gen import schema_pb2

    text = pairs({"max_length": TEXT_BYTES})
    key = {"name": KEY, "is_primary_key": True}
    is_text = schema.id_kinds != {IdKind.INT}
    key |= {"data_type": Kind.VARCHAR, "type_params": text} if is_text else {"data_type": Kind.INT64}
    parts = pairs({"max_length": TEXT_BYTES, "max_capacity": REST_PARTS})
    fields = [
        key,
        *(_vector(field, where=where) for field in schema.vectors),
        {"name": DOCUMENT, "data_type": Kind.VARCHAR, "nullable": True, "type_params": text},
        {"name": REST, "data_type": Kind.ARRAY, "nullable": True, "type_params": parts}
        | {"element_type": Kind.VARCHAR},
        {"name": METADATA, "data_type": Kind.JSON, "nullable": True},
    ]
    return schema_pb2.CollectionSchema(
        name=schema.name, fields=[schema_pb2.FieldSchema(**field) for field in fields]
    )


def _vector(field: VectorField, *, where: str) -> dict[str, Any]:
    name = field.name or VECTOR
    if not NAME.fullmatch(name) or name in OURS or field.name == VECTOR:
        raise ConfigurationError(
            f"{where}: a vector field can't be called {field.name!r} in Milvus: letters, digits and _, and "
            f"none of {sorted(OURS | {VECTOR})}; rename it"
        )
    if field.kind is VectorKind.SPARSE:
        return {"name": name, "data_type": Kind.SPARSE}
    if field.dimensions is None:
        raise ConfigurationError(
            f"{where}: Milvus has to know the dimensions of vector {name!r}, and the source doesn't tell"
        )
    dimensions = pairs({"dim": field.dimensions})
    return {"name": name, "data_type": _VECTOR_KINDS[field.dtype], "type_params": dimensions}


def _index(field: VectorField, *, is_lite: bool) -> dict[str, str]:
    """Return the parameters of a vector field's search index.

    Milvus reads no collection into memory, and so answers nothing, before each vector has one. Milvus Lite
    has HNSW and IVF only where faiss is installed; its AUTOINDEX takes what there is.
    """
    if field.kind is VectorKind.SPARSE:
        return {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "IP"}
    is_bits = field.dtype is DType.BIT
    metric = METRIC_NAMES[field.metric or (Metric.HAMMING if is_bits else Metric.EUCLIDEAN)]
    kind, words = _INDEXES.get(field.index.get("type", ""), ("", ()))
    if is_bits or is_lite or not kind:
        return {"index_type": "BIN_FLAT" if is_bits else "AUTOINDEX", "metric_type": metric}
    params = {theirs: field.index.get(ours, usual) for ours, theirs, usual in words}
    return {"index_type": kind, "metric_type": metric, "params": json.dumps(params)}
