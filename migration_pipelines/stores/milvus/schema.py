"""What a Milvus collection is made of, and how its fields make up a record.

A collection that this tool makes has the fields `id`, `document` (with `document_rest` for what is longer
than Milvus's 65,535 bytes of a text), `metadata` (one JSON field, which comes back as it was sent) and its
vectors: `vector`, and named ones under their names.

Of a collection that it finds, the primary key is the id. The only vector field (of several the one called
`vector`) is the default vector, others have their names. A text field called `document`, `text` or
`page_content` is the document, and a JSON field `metadata` with nothing beside it the metadata. Otherwise all
other fields and the dynamic ones are metadata fields; there a null is the same as a field that is absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migration_pipelines.errors import ConfigurationError, UnsupportedOperationError
from migration_pipelines.model import CollectionSchema, DType, IdKind, Metric, VectorField, VectorKind
from migration_pipelines.stores.milvus.client import mapping

KEY, VECTOR, DOCUMENT, REST, METADATA = "id", "vector", "document", "document_rest", "metadata"
# https://milvus.io/docs/limitations.md
TEXT_BYTES, REST_PARTS = 65_535, 4_096
DEFAULT_PARTITION = "_default"
# Partitions come into being with their first record; this one says from the start that there are any.
NAMESPACES_MARK = "_namespaces"
METRICS = {
    "L2": Metric.EUCLIDEAN,
    "IP": Metric.DOT,
    "COSINE": Metric.COSINE,
    "HAMMING": Metric.HAMMING,
    "JACCARD": Metric.JACCARD,
}
METRIC_NAMES = {metric: name for name, metric in METRICS.items()}
_DOCUMENT_NAMES = (DOCUMENT, "text", "page_content")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
OURS = frozenset({KEY, DOCUMENT, REST, METADATA})


class Kind:
    """Numbers of Milvus's types of field."""

    BOOL, INT8, INT16, INT32, INT64, FLOAT, DOUBLE = 1, 2, 3, 4, 5, 10, 11
    VARCHAR, ARRAY, JSON, GEOMETRY, TEXT, TIMESTAMPTZ = 21, 22, 23, 24, 25, 26
    BINARY, FLOAT_VECTOR, FLOAT16, BFLOAT16, SPARSE, INT8_VECTOR = 100, 101, 102, 103, 104, 105


_SCALARS = frozenset({1, 2, 3, 4, 5, 10, 11, 21, 22, 23, 24, 25, 26})
# Half precision is read as float32, which holds every value of it.
_DTYPES = {
    Kind.BINARY: DType.BIT,
    Kind.FLOAT_VECTOR: DType.FLOAT32,
    Kind.FLOAT16: DType.FLOAT32,
    Kind.BFLOAT16: DType.FLOAT32,
    Kind.SPARSE: DType.FLOAT32,
    Kind.INT8_VECTOR: DType.INT8,
}


@dataclass(frozen=True)
class Described:
    """What Milvus tells of a collection; `proto` is its `CollectionSchema`, `indexes` are by field."""

    name: str
    number: int
    proto: Any
    indexes: Mapping[str, Mapping[str, str]]
    partitions: Sequence[str]
    properties: Mapping[str, str]
    n_shards: int = 0


@dataclass(frozen=True)
class Field:
    """One scalar field. `limit` is its greatest length in bytes, or of an array its elements'."""

    name: str
    kind: int
    nullable: bool
    has_default: bool
    limit: int | None
    element: int
    capacity: int | None


@dataclass(frozen=True)
class VectorColumn:
    """One vector field: Milvus's name and type for it, and ours."""

    name: str
    kind: int
    nullable: bool
    field: VectorField


@dataclass(frozen=True)
class Layout:
    """How the fields of a collection make up a record.

    `document` is a field, or where there is no such field a key of the dynamic ones. `metadata` is the one
    JSON field that holds all metadata, `fields` are those that hold a metadata field each.
    """

    key: Field
    makes_keys: bool
    vectors: tuple[VectorColumn, ...]
    document: Field | str | None
    rest: Field | None
    metadata: Field | None
    fields: tuple[Field, ...]
    dynamic: bool

    @property
    def key_is_text(self) -> bool:
        """Whether ids are texts; integers otherwise."""
        return self.key.kind == Kind.VARCHAR

    def output_fields(self, *, vectors: bool) -> list[str]:
        """Return what to ask for, beside the key."""
        names = [column.name for column in self.vectors] if vectors else []
        names += [
            field.name for field in (self.document, self.rest, self.metadata) if isinstance(field, Field)
        ]
        names += [field.name for field in self.fields]
        return names + ["$meta"] * self.dynamic


# ── what was found ───────────────────────────────────────────────────────────────────────────────────


def layout_of(found: Described, *, document_field: str | None, where: str) -> Layout:
    """Return how a collection's fields make up a record.

    Raises
    ------
    UnsupportedOperationError
        A field is of a type that isn't carried.
    ConfigurationError
        There is no such document field.
    """
    if len(getattr(found.proto, "struct_array_fields", ())):
        raise UnsupportedOperationError(f"{where} has arrays of structs, which aren't carried")
    derived = {name for function in found.proto.functions for name in function.output_field_names}
    fields = [field for field in found.proto.fields if field.name not in derived and not field.is_dynamic]
    for field in fields:
        if field.data_type not in _SCALARS and field.data_type not in _DTYPES:
            raise UnsupportedOperationError(
                f"{where}: field {field.name!r} is of Milvus's type {field.data_type}, which isn't carried"
            )
    key = next(field for field in fields if field.is_primary_key)
    scalars = {f.name: _scalar(f) for f in fields if f.data_type in _SCALARS and not f.is_primary_key}
    document = _document(scalars, document_field, dynamic=found.proto.enable_dynamic_field, where=where)
    taken = {document.name} if isinstance(document, Field) else set()
    rest = scalars.get(REST) if taken == {DOCUMENT} else None
    rest = rest if rest is not None and rest.kind == Kind.ARRAY and rest.element == Kind.VARCHAR else None
    taken |= {rest.name} if rest else set()
    others = [field for name, field in scalars.items() if name not in taken]
    whole = len(others) == 1 and others[0].name == METADATA and others[0].kind == Kind.JSON
    metadata = others[0] if whole and not found.proto.enable_dynamic_field else None
    return Layout(
        key=_scalar(key),
        makes_keys=bool(key.autoID or found.proto.autoID),
        vectors=_vectors(
            [field for field in fields if field.data_type in _DTYPES], found.indexes, is_ours=rest is not None
        ),
        document=document,
        rest=rest,
        metadata=metadata,
        fields=() if metadata else tuple(others),
        dynamic=bool(found.proto.enable_dynamic_field),
    )


def _document(
    scalars: Mapping[str, Field], asked: str | None, *, dynamic: bool, where: str
) -> Field | str | None:
    if asked is not None:
        field = scalars.get(asked)
        if field is None and dynamic:
            return asked
        if field is None or field.kind not in (Kind.VARCHAR, Kind.TEXT):
            raise ConfigurationError(
                f"{where} has no text field {asked!r} for the document; it has {sorted(scalars)}",
                expected=asked,
                found=sorted(scalars),
            )
        return field
    texts = (scalars[name] for name in _DOCUMENT_NAMES if name in scalars)
    return next((field for field in texts if field.kind in (Kind.VARCHAR, Kind.TEXT)), None)


def _scalar(field: Any) -> Field:
    options = mapping(field.type_params)
    limit, capacity = options.get("max_length"), options.get("max_capacity")
    return Field(
        name=field.name,
        kind=field.data_type,
        nullable=field.nullable,
        has_default=field.default_value.WhichOneof("data") is not None,
        limit=int(limit) if limit else None,
        element=field.element_type,
        capacity=int(capacity) if capacity else None,
    )


def _vectors(
    fields: Sequence[Any], indexes: Mapping[str, Mapping[str, str]], *, is_ours: bool
) -> tuple[VectorColumn, ...]:
    columns = []
    for field in fields:
        is_default = field.name == VECTOR or (len(fields) == 1 and not is_ours)
        options, index = mapping(field.type_params), indexes.get(field.name, {})
        columns.append(
            VectorColumn(
                name=field.name,
                kind=field.data_type,
                nullable=field.nullable,
                field=VectorField(
                    name="" if is_default else field.name,
                    kind=VectorKind.SPARSE if field.data_type == Kind.SPARSE else VectorKind.DENSE,
                    dtype=_DTYPES[field.data_type],
                    dimensions=None if field.data_type == Kind.SPARSE else int(options["dim"]),
                    metric=METRICS.get(index.get("metric_type", "").upper()),
                    index=_common_index(index),
                ),
            )
        )
    return tuple(sorted(columns, key=lambda column: column.field.name))


def _common_index(index: Mapping[str, str]) -> dict[str, Any]:
    """Return a search index in the words that all stores share; empty where they have none for it."""
    params = {**json.loads(index.get("params") or "{}"), **index}
    kind = index.get("index_type", "").upper()
    if kind == "HNSW":
        words = {"m": "M", "ef_construction": "efConstruction"}
    elif kind == "IVF_FLAT":
        words = {"lists": "nlist"}
    else:
        return {}
    numbers = {ours: int(params[theirs]) for ours, theirs in words.items() if theirs in params}
    return {"type": "hnsw" if kind == "HNSW" else "ivf", **numbers}


def namespaces_of(found: Described) -> list[str] | None:
    """Return the namespaces, "" for the default one; None where there is no other."""
    if divides_by_itself(found) or set(found.partitions) <= {DEFAULT_PARTITION}:
        return None
    names = (name for name in found.partitions if name != NAMESPACES_MARK)
    return sorted("" if name == DEFAULT_PARTITION else name for name in names)


def divides_by_itself(found: Described) -> bool:
    """Whether Milvus chooses each record's partition, by a field that is the partition key."""
    return any(field.is_partition_key for field in found.proto.fields)


def partition_of(namespace: str | None) -> str:
    """Return the partition of a namespace."""
    return namespace or DEFAULT_PARTITION


def accepts_namespace(name: str) -> bool:
    """Whether a partition may have this name; "" is the default one."""
    return not name or (NAME.fullmatch(name) is not None and name not in (DEFAULT_PARTITION, NAMESPACES_MARK))


def schema_of(found: Described, layout: Layout, *, in_one_namespace: bool) -> CollectionSchema:
    """Return what a collection is made of.

    What only Milvus understands (its fields' types, indexes, properties) stands in `options["milvus"]`.
    """
    from google.protobuf.json_format import MessageToDict

    own = {
        "schema": MessageToDict(found.proto, preserving_proto_field_name=True),
        "indexes": {name: dict(index) for name, index in found.indexes.items()},
        "properties": dict(found.properties),
        "shards": found.n_shards,
        "one_metadata_field": layout.metadata is not None,
    }
    is_ours = layout.rest is not None
    return CollectionSchema(
        name=found.name,
        vectors=tuple(column.field for column in layout.vectors),
        id_kinds=frozenset({IdKind.STR if layout.key_is_text else IdKind.INT}),
        has_documents=layout.document is not None,
        has_namespaces=not in_one_namespace and namespaces_of(found) is not None,
        options={} if is_ours else {"milvus": own},
    )


def holds_all_metadata(schema: CollectionSchema) -> bool:
    """Whether all metadata comes back as it is, null and {} included.

    It does where one JSON field holds it, or where it comes from a Milvus with the same fields.
    """
    own = schema.options.get("milvus", {})
    return bool(own.get("one_metadata_field", True) or own.get("holds_its_values", False))
