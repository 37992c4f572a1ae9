"""Indices as Elasticsearch describes them, and as this tool makes them.

An index that the tool makes holds each record as `{"vector": […], "document": "…", "metadata": {…}}`.
Nothing is mapped dynamically there: Elasticsearch would let the first record fix a field's type, guess
dates and stop at 1,000 fields. Metadata fields of one simple kind throughout are indexed, dots in their names
mean nothing (`subobjects: false`), and `_source` keeps the record's own text with its vectors.

An index that it finds is read as it is: with one text field and an object `metadata` (LangChain, LlamaIndex)
in the same way, any other with all its fields as metadata.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from migration_pipelines.errors import ConfigurationError, StoreRefusedError
from migration_pipelines.model import (
    CollectionSchema,
    DType,
    IdKind,
    Metric,
    ValueKind,
    VectorField,
    VectorKind,
)

DOCUMENT, METADATA = "document", "metadata"
KIND = "elasticsearch"  # what only Elasticsearch understands stands under it in options and index
MAX_DIMENSIONS = 4096
_OURS = "migration_pipelines"  # our key in a mapping's `_meta`; all others are the user's
HIDES = "exclude_source_vectors"
# Where other tools keep the text, beside an object `metadata`: LangChain, LlamaIndex, Haystack, ourselves.
_TEXT_FIELDS = ("text", "content", DOCUMENT, "page_content")
_KINDS = {
    "dense_vector": VectorKind.DENSE,
    "sparse_vector": VectorKind.SPARSE,
    "rank_vectors": VectorKind.MULTI,
}
_TYPES = {kind: name for name, kind in _KINDS.items()}
_DTYPES = {"float": DType.FLOAT32, "bfloat16": DType.FLOAT32, "byte": DType.INT8, "bit": DType.BIT}
_ELEMENT_TYPES = {DType.FLOAT32: "float", DType.INT8: "byte", DType.BIT: "bit"}
_METRICS = {
    "cosine": Metric.COSINE,
    "dot_product": Metric.DOT,
    "max_inner_product": Metric.DOT,
    "l2_norm": Metric.EUCLIDEAN,
}
# `dot_product` takes vectors of length one only, and would refuse all others.
_SIMILARITIES = {
    Metric.COSINE: "cosine",
    Metric.DOT: "max_inner_product",
    Metric.EUCLIDEAN: "l2_norm",
    Metric.HAMMING: "l2_norm",
}
# From which version a server knows a way to index vectors, and to look at the true ones after a search (the
# manual's pages "dense_vector" and "knn query"; tried on 8.11.4, 8.17.0 and 9.2.0).
_OPTIONS_FROM = {
    "int8_hnsw": (8, 12),
    "int8_flat": (8, 13),
    "flat": (8, 13),
    "int4_hnsw": (8, 15),
    "int4_flat": (8, 15),
    "bbq_hnsw": (8, 16),
    "bbq_flat": (8, 16),
    "bbq_disk": (9, 2),
}
RESCORES_FROM = (8, 18)
_HIDES_VECTORS_FROM = (9, 2)
# Lucene's own bounds (Lucene99HnswVectorsFormat).
_MOST = {"m": 512, "ef_construction": 3200}
# Settings that travel to another index; a pipeline would change records, a synthetic source reorder them.
_SETTINGS = (
    *("number_of_shards", "number_of_replicas", "auto_expand_replicas", "analysis.", "similarity."),
    *("refresh_interval", "codec", "max_result_window", "mapping.total_fields.", "mapping.ignore_malformed"),
)
_MOST_FIELDS = 500  # indexed by us; an index takes 1,000 in all
_INTEGERS = {ValueKind.INT53, ValueKind.INT64}
_REALS = {ValueKind.SHORT_FLOAT, ValueKind.FLOAT, ValueKind.INTEGRAL_FLOAT, ValueKind.NEGATIVE_ZERO}
_TEXTS = {ValueKind.TEXT, ValueKind.EMPTY_TEXT, ValueKind.NUL_TEXT}
# A value that isn't of the field's type is left out of its index and stays in the record, where the type can.
_FIELD_TYPES: Mapping[str, Mapping[str, Any]] = {
    # The longest text whose UTF-8 surely fits a Lucene term (32,766 bytes), which would be refused.
    "keyword": {"type": "keyword", "ignore_above": 8191},
    "long": {"type": "long", "ignore_malformed": True},
    "double": {"type": "double", "ignore_malformed": True},
    "boolean": {"type": "boolean"},
}


@dataclass(frozen=True)
class Layout:
    """Where an index keeps the parts of a record.

    `vectors` maps a vector's name to the path of its field; `metadata` is the field of the object that holds
    the metadata, "" where all other fields are it. `hides_vectors`: they are left out of `_source` unless
    they are asked for. `refreshes`: by itself. `fields` maps each metadata field that we index to its type.
    """

    schema: CollectionSchema
    vectors: Mapping[str, str]
    document: str | None
    metadata: str
    hides_vectors: bool
    refreshes: bool
    fields: Mapping[str, str]


# ── as it is ─────────────────────────────────────────────────────────────────────────────────────────


def layout_of(
    name: str,
    found: Mapping[str, Any],
    *,
    where: str,
    vector_field: str,
    document_field: str | None,
    metadata_field: str | None,
) -> Layout:
    """Return the layout of an index.

    Parameters
    ----------
    found
        The server's description, with flat settings and their defaults.
    where
        The collection's address, for messages.
    vector_field, document_field, metadata_field
        What the user said of an index that this tool didn't make; None where it is to be found out.

    Raises
    ------
    StoreRefusedError
        The index keeps no `_source`: there is nothing to read.
    """
    mappings = found.get("mappings") or {}
    if (mappings.get("_source") or {}).get("enabled") is False:
        raise StoreRefusedError(
            f"{where}: the index keeps no _source, so that no record can be read back; index it anew with it"
        )
    meta = dict(mappings.get("_meta") or {})
    ours = meta.pop(_OURS, None)
    properties = mappings.get("properties") or {}
    paths = {path: mapping for path, mapping in _leaves(properties) if mapping.get("type") in _KINDS}
    if ours is not None:
        names = {path: vector for vector, path in ours["vectors"].items()}
        document, metadata = ours[DOCUMENT], ours[METADATA]
    else:
        names = {path: "" if path == vector_field else path for path in paths}
        document, metadata = _guess(properties, paths, document_field, metadata_field)
    settings = {**(found.get("defaults") or {}), **(found.get("settings") or {})}
    hides = str(settings.get(f"index.mapping.{HIDES}", "false")).lower() == "true"
    fields = ((properties.get(METADATA) or {}).get("properties") or {}) if ours is not None else {}
    schema = CollectionSchema(
        name=name,
        vectors=tuple(_field(names[path], paths[path]) for path in paths if path in names),
        id_kinds=frozenset({IdKind.STR}),
        has_documents=document is not None,
        properties=meta,
        options={
            KIND: {
                "settings": _travelling(found.get("settings") or {}),
                "mappings": {key: value for key, value in mappings.items() if key != "_meta"},
                "layout": {DOCUMENT: document, METADATA: metadata, "made": ours is not None},
                HIDES: hides,
            }
        },
    )
    return Layout(
        schema=schema,
        vectors={names[path]: path for path in paths if path in names},
        document=document,
        metadata=metadata,
        hides_vectors=hides,
        refreshes=str(settings.get("index.refresh_interval", "1s")) != "-1",
        fields={key: str(mapping.get("type")) for key, mapping in fields.items()},
    )


def _leaves(properties: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield path and mapping of every field; those inside a `nested` object are none of the record's own."""
    for name, mapping in properties.items():
        inner = mapping.get("properties")
        if inner is None:
            yield prefix + name, mapping
        elif mapping.get("type", "object") == "object":
            yield from _leaves(inner, f"{prefix}{name}.")


def _guess(
    properties: Mapping[str, Any], paths: Mapping[str, Any], document: str | None, metadata: str | None
) -> tuple[str | None, str]:
    """Return the fields of document and metadata in an index of somebody else's."""
    others = [name for name in properties if name not in paths]
    texts = [name for name in _TEXT_FIELDS if properties.get(name, {}).get("type") == "text"]
    is_object = METADATA in properties and properties[METADATA].get("type", "object") in (
        "object",
        "flattened",
    )
    nested = is_object and set(others) <= {METADATA, *texts[:1]} and not set(texts[1:])
    chosen = (METADATA if nested else "") if metadata is None else metadata
    if document is not None:
        return document or None, chosen
    return (texts[0] if texts and (nested or texts[0] == DOCUMENT) else None), chosen


def _field(name: str, mapping: Mapping[str, Any]) -> VectorField:
    kind = _KINDS[mapping["type"]]
    dtype = _DTYPES.get(mapping.get("element_type", "float"), DType.FLOAT32)
    if kind is not VectorKind.DENSE:
        dimensions = mapping.get("dims") if kind is VectorKind.MULTI else None
        return VectorField(name=name, kind=kind, dtype=dtype, dimensions=dimensions, metric=Metric.DOT)
    metric: Metric | None = None
    if mapping.get("index", False):  # said from 8.11 on; until then it was False where nothing was said
        metric = Metric.HAMMING if dtype is DType.BIT else _METRICS[mapping.get("similarity", "cosine")]
    return VectorField(
        name=name, dtype=dtype, dimensions=mapping.get("dims"), metric=metric, index=_index(mapping)
    )


def _index(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a field's index in the common words, and what only Elasticsearch understands beside them."""
    options = mapping.get("index_options") or {}
    raw = {key: mapping[key] for key in ("similarity", "index_options", "element_type") if key in mapping}
    if not options:
        return {KIND: raw} if raw else {}
    quantization, _, kind = str(options.get("type")).rpartition("_")
    found = {"type": kind} | {key: options[key] for key in _MOST if key in options}
    return found | ({"quantization": quantization} if quantization else {}) | {KIND: raw}


def _travelling(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key.removeprefix("index."): value for key, value in settings.items()}
    return {key: value for key, value in sorted(flat.items()) if key.startswith(_SETTINGS)}


# ── as it is made ────────────────────────────────────────────────────────────────────────────────────


def field_types(kinds: Mapping[str, Mapping[str, int]], *, accepts: Any) -> dict[str, str]:
    """Return the type to index metadata fields by: the most frequent of those of one simple kind.

    Parameters
    ----------
    kinds
        Counts of `ValueKind` by field.
    accepts
        Whether a field may have this name.
    """
    found = {}
    most = sorted(kinds, key=lambda key: (-sum(kinds[key].values()), key))
    for key in most:
        kind = _type_for({ValueKind(kind) for kind, count in kinds[key].items() if count})
        if kind is not None and accepts(key):
            found[key] = kind
    return dict(sorted(list(found.items())[:_MOST_FIELDS]))


def _type_for(kinds: set[ValueKind]) -> str | None:
    """Return the type that indexes values of these kinds, lists of them and nulls included."""
    plain = kinds - {ValueKind.NULL, ValueKind.EMPTY_LIST}
    lists = {ValueKind.LIST_OF_TEXT, ValueKind.LIST_OF_NUMBERS, ValueKind.LIST_OF_BOOLS}
    scalars = plain - lists
    if not scalars:
        return None
    if scalars <= _TEXTS and plain - scalars <= {ValueKind.LIST_OF_TEXT}:
        return "keyword"
    if scalars <= {ValueKind.BOOL} and plain - scalars <= {ValueKind.LIST_OF_BOOLS}:
        return "boolean"
    if scalars <= _INTEGERS | _REALS and plain - scalars <= {ValueKind.LIST_OF_NUMBERS}:
        return "long" if scalars <= _INTEGERS else "double"
    return None


def creation_body(
    schema: CollectionSchema, *, where: str, vector_field: str, version: tuple[int, ...]
) -> dict[str, Any]:
    """Return the body that creates an index for a schema.

    Parameters
    ----------
    version
        The server's. From 9.2 on it must be told to leave vectors in `_source`.

    Raises
    ------
    ConfigurationError
        A vector field can't be as it is asked for.
    """
    options = schema.options.get(KIND) or {}
    settings = dict(options.get("settings") or {})
    if version >= _HIDES_VECTORS_FROM:
        settings[f"mapping.{HIDES}"] = False
    layout = options.get("layout") or {DOCUMENT: DOCUMENT, METADATA: METADATA, "made": True}
    paths = {field.name: field.name or vector_field for field in schema.vectors}
    _check_paths(paths, layout, where)
    mappings = (
        copy.deepcopy(dict(options["mappings"])) if "mappings" in options else _mappings(schema, options)
    )
    for field in schema.vectors:
        mapping = vector_mapping(field, where=where, version=version)
        _place(mappings.setdefault("properties", {}), paths[field.name], mapping)
    ours = {DOCUMENT: layout[DOCUMENT], METADATA: layout[METADATA], "vectors": paths}
    mappings["_meta"] = {**schema.properties, **({_OURS: ours} if layout["made"] else {})}
    return {"settings": {"index": settings}, "mappings": mappings}


def _check_paths(paths: Mapping[str, str], layout: Mapping[str, Any], where: str) -> None:
    taken = [layout[DOCUMENT], layout[METADATA]]
    for name, path in paths.items():
        if path in taken or not path.strip(". "):
            raise ConfigurationError(
                f"{where}: vector {name or '(default)'} can't be kept in a field {path!r}, whose name is "
                "taken; rename the vector, or say another ?vector_field="
            )
        taken.append(path)


def _mappings(schema: CollectionSchema, options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: _FIELD_TYPES[kind] for key, kind in (options.get("fields") or {}).items()}
    inner = {"properties": fields} if fields else {}
    metadata = {"type": "object", "dynamic": False, "subobjects": False, **inner}
    document = {DOCUMENT: {"type": "text"}} if schema.has_documents else {}
    return {"dynamic": False, "properties": {**document, METADATA: metadata}}


def _place(properties: dict[str, Any], path: str, mapping: dict[str, Any]) -> None:
    """Set the mapping of a field, where it stands or at the top under its dotted name."""
    head, _, rest = path.partition(".")
    if path in properties or not rest or "properties" not in properties.get(head, {}):
        properties[path] = mapping
    else:
        _place(properties[head]["properties"], rest, mapping)


def vector_mapping(field: VectorField, *, where: str, version: tuple[int, ...]) -> dict[str, Any]:
    """Return the mapping of a vector field.

    Raises
    ------
    ConfigurationError
        Elasticsearch has no such combination of dtype, dimensions and metric.
    """
    found: dict[str, Any] = {"type": _TYPES[field.kind]}
    if field.kind is VectorKind.SPARSE:
        return found
    if field.dtype is DType.BIT and field.dimensions is not None and field.dimensions % 8:
        raise ConfigurationError(
            f"{where}: bit vectors have a multiple of 8 dimensions, not {field.dimensions}: pad them"
        )
    raw = field.index.get(KIND) or {}
    kind = _ELEMENT_TYPES[field.dtype]
    found["element_type"] = "bfloat16" if raw.get("element_type") == "bfloat16" and kind == "float" else kind
    if field.dimensions is not None:
        found["dims"] = field.dimensions
    if field.kind is VectorKind.MULTI:
        return found
    if field.metric is None:
        return found | {"index": False}
    if (field.metric is Metric.HAMMING) is not (field.dtype is DType.BIT):
        raise ConfigurationError(
            f"{where}: {field.dtype} vectors can't be searched by {field.metric}: hamming goes with bit "
            "vectors alone; name another with --metric"
        )
    similarity = _SIMILARITIES[field.metric]
    if _METRICS.get(raw.get("similarity", "")) is field.metric:
        similarity = raw["similarity"]
    return found | {"index": True, "similarity": similarity} | _index_options(field, version)


def _index_options(field: VectorField, version: tuple[int, ...]) -> dict[str, Any]:
    """Return what says how to build the search index; nothing where the server's own default is meant.

    What the server is too old to know is left to it.
    """
    raw = field.index.get(KIND) or {}
    if "index_options" in raw:
        found = dict(raw["index_options"])
        if version < _OPTIONS_FROM.get(found.get("type", "hnsw"), (0,)):
            return {}
        if version < RESCORES_FROM:
            found.pop("rescore_vector", None)
        return {"index_options": found}
    if field.index.get("type") != "hnsw":
        return {}
    asked = {key: min(int(field.index[key]), most) for key, most in _MOST.items() if key in field.index}
    # Both, be they the defaults: until 8.11 neither goes without the other.
    return {"index_options": {"type": "hnsw", "m": 16, "ef_construction": 100, **asked}}
