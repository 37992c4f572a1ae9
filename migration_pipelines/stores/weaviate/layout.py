"""What a Weaviate class is made of, here and there: properties, vectors, tenants.

Weaviate has typed properties. A new class gets one for each metadata field that can have one, of the type
that most of its values are of, and two of ours: the document, and `_more_fields`, the JSON text of an object
that holds whatever fields of a record have no property of their name and type. So no value is changed for
lack of a place, and the server's guessing of types (auto-schema) never has anything to guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
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

METRICS = {
    "cosine": Metric.COSINE,
    "dot": Metric.DOT,
    "l2-squared": Metric.EUCLIDEAN,
    "manhattan": Metric.MANHATTAN,
    "hamming": Metric.HAMMING,
}
_DISTANCES = {metric: distance for distance, metric in METRICS.items()}
MORE_FIELDS = "_more_fields"
# What tells our two properties from a user's of the same name.
_DOCUMENT_NOTE = "The record's document."
_MORE_NOTE = "The record's other fields, as the JSON text of an object; null where it has no fields at all."
# Where LangChain and LlamaIndex keep the document, by default.
_DOCUMENTS_OF_OTHERS = ("page_content", "text")
# The two fields of the engine's envelope, which is above the stores.
_ENVELOPE = ("_source_id", "_source_extra")
# Each property is several folders of files on the server, for each shard or tenant.
_MOST_PROPERTIES = 200
# What Weaviate itself calls the vector without a name, in classes that could have named ones as well.
UNNAMED = "default"
OPTIONS = "weaviate"  # under which a schema keeps what only Weaviate understands

# entities/schema/validation.go of the server; the first letter it would lower-case without a word.
_PROPERTY = re.compile(r"(?!__)[_a-z][_0-9A-Za-z]{0,230}")
_CLASS = re.compile(r"[A-Z][_0-9A-Za-z]{0,254}")
_VECTOR = re.compile(r"[_A-Za-z][_0-9A-Za-z]{0,229}")
_TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FORBIDDEN = frozenset({"id", "_id", "_additional", "vector", "vectors", MORE_FIELDS})
_FORBIDDEN_ENDS = ("_searchable", "_rangeable", "_temp", "__meta_count", "_propertyLength", "_nullState")

_SCALARS = {
    "text": (ValueKind.TEXT, ValueKind.EMPTY_TEXT),
    "boolean": (ValueKind.BOOL,),
    "int": (ValueKind.INT53,),
    "number": (
        ValueKind.SHORT_FLOAT,
        ValueKind.FLOAT,
        ValueKind.INTEGRAL_FLOAT,
        ValueKind.NEGATIVE_ZERO,
    ),
}
_LISTS = {
    "text": ValueKind.LIST_OF_TEXT,
    "boolean": ValueKind.LIST_OF_BOOLS,
    "int": ValueKind.LIST_OF_NUMBERS,
    "number": ValueKind.LIST_OF_NUMBERS,
}
# Kinds that a property gives back exactly. An integer is a double in the server: exact up to 2**53.
HELD = frozenset({kind for kinds in _SCALARS.values() for kind in kinds} | {*_LISTS.values()})

# Our words for the parameters of HNSW, and Weaviate's.
_HNSW = {"m": "maxConnections", "ef_construction": "efConstruction", "ef_search": "ef"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A class as it is on the server.

    Parameters
    ----------
    properties
        The class's properties by name, without our two, each as the server describes it.
    document
        The property that holds the document; None where there is none.
    has_more
        Whether there is a place for fields without a property.
    wire_names
        The server's name for each vector field; None for the one that a class has without a name.
    """

    name: str
    properties: Mapping[str, Mapping[str, Any]]
    document: str | None
    has_more: bool
    wire_names: Mapping[str, str | None]
    has_tenants: bool
    vectors: tuple[VectorField, ...]
    description: str
    settings: Mapping[str, Any]

    def schema(self, dimensions: Mapping[str, int | None], *, has_namespaces: bool) -> CollectionSchema:
        """Return the collection's schema, its vectors of the `dimensions` that its records have."""
        return CollectionSchema(
            name=self.name,
            vectors=tuple(
                field.model_copy(update={"dimensions": dimensions.get(field.name)}) for field in self.vectors
            ),
            id_kinds=frozenset({IdKind.UUID}),
            has_documents=self.document is not None,
            has_namespaces=has_namespaces,
            properties=_properties_of(self.description),
            options={
                OPTIONS: {
                    "properties": {name: data_type(item) for name, item in self.properties.items()},
                    "class": dict(self.settings),
                }
            },
        )


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


def class_name(name: str) -> str:
    """Return a collection's name as Weaviate spells it: with a capital."""
    return name[:1].upper() + name[1:]


def accepts_key(key: str, *, document: str) -> bool:
    """Whether a property may have this name and keeps it."""
    taken = key in _FORBIDDEN or key == document or key.endswith(_FORBIDDEN_ENDS)
    return _PROPERTY.fullmatch(key) is not None and not taken


def accepts_tenant(name: str) -> bool:
    """Whether a tenant may have this name; there is no default one."""
    return _TENANT.fullmatch(name) is not None


def check_names(schema: CollectionSchema, *, where: str) -> None:
    """Raise where Weaviate can't have a class or vectors of these names.

    Raises
    ------
    ConfigurationError
    """
    if not _CLASS.fullmatch(class_name(schema.name)):
        raise ConfigurationError(
            f"{where}: Weaviate's collections have names of letters, digits and _, of at most 255; choose one"
        )
    for field in schema.vectors:
        if field.name == UNNAMED or (field.name and not _VECTOR.fullmatch(field.name)):
            raise ConfigurationError(
                f"{where}: Weaviate can't call a vector {field.name!r}: it takes letters, digits and _, "
                f"and {UNNAMED!r} is the one without a name; rename it in the source"
            )


# ── from the server ──────────────────────────────────────────────────────────────────────────────────


def data_type(item: Mapping[str, Any]) -> str:
    """Return a property's type; of a reference the classes that it points to."""
    return "|".join(item["dataType"])


def layout_of(found: Mapping[str, Any], *, document_field: str, where: str) -> Layout:
    """Return what a class is made of.

    Raises
    ------
    StoreRefusedError
        A property is a reference to other objects, which nothing else can hold.
    """
    properties = {item["name"]: item for item in found.get("properties") or ()}
    for name, item in properties.items():
        if item["dataType"][0][:1].isupper():
            raise StoreRefusedError(
                f"{where}: property {name!r} is a reference to {data_type(item)}, which can't be moved: copy "
                "the collection without it",
                property=name,
            )
    more = properties.get(MORE_FIELDS, {}).get("description") == _MORE_NOTE
    document = _document(properties, document_field, is_ours=more)
    config = found.get("vectorConfig") or {}
    vectors, wire = _vectors(found, config)
    kept = ("invertedIndexConfig", "replicationConfig", "shardingConfig", "multiTenancyConfig")
    ours = {MORE_FIELDS} if more else set()
    return Layout(
        name=found["class"],
        properties={n: item for n, item in properties.items() if n not in {document} | ours},
        document=document,
        has_more=more,
        wire_names=wire,
        has_tenants=bool((found.get("multiTenancyConfig") or {}).get("enabled")),
        vectors=vectors,
        description=found.get("description") or "",
        settings={key: found[key] for key in kept if found.get(key)},
    )


def _document(properties: Mapping[str, Mapping[str, Any]], field: str, *, is_ours: bool) -> str | None:
    """Return the property that is the document: the one marked so, the one asked for, a framework's."""
    texts = [name for name, item in properties.items() if data_type(item) == "text"]
    marked = [name for name in texts if properties[name].get("description") == _DOCUMENT_NOTE]
    if marked:
        return marked[0]
    # In a class of ours without a mark, a field that happens to be called `text` is metadata.
    wanted = (field,) if is_ours else (field, *_DOCUMENTS_OF_OTHERS)
    return next((name for name in wanted if name in texts), None)


def _vectors(
    found: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[tuple[VectorField, ...], dict[str, str | None]]:
    if not config:
        return (_vector("", found),), {"": None}
    ours = {name: "" if name == UNNAMED else name for name in sorted(config)}
    fields = tuple(_vector(ours[name], config[name]) for name in ours)
    return fields, {name: wire for wire, name in ours.items()}


def _vector(name: str, config: Mapping[str, Any]) -> VectorField:
    index = dict(config.get("vectorIndexConfig") or {})
    metric = METRICS.get(index.pop("distance", index.pop("distanceMetric", "cosine")))
    is_multi = bool((index.get("multivector") or {}).get("enabled"))
    kind = config.get("vectorIndexType") or "hnsw"
    common = {ours: index.pop(theirs) for ours, theirs in _HNSW.items() if index.get(theirs, -1) != -1}
    return VectorField(
        name=name,
        kind=VectorKind.MULTI if is_multi else VectorKind.DENSE,
        dtype=DType.FLOAT32,
        dimensions=None,
        metric=metric,
        index={"type": kind, **common, **({"weaviate": index} if index else {})},
    )


def _properties_of(description: str) -> dict[str, Any]:
    try:
        found = json.loads(description)
    except ValueError:
        return {"description": description} if description else {}
    return found if isinstance(found, dict) else {"description": description}


# ── to the server ────────────────────────────────────────────────────────────────────────────────────


def property_types(kinds: Mapping[str, Mapping[str, int]], *, document: str) -> dict[str, str]:
    """Return the type of the property for each metadata field that is to have one.

    Parameters
    ----------
    kinds
        By field, how many records have a value of each kind (`ValueKind`).
    """
    chosen: dict[str, tuple[int, str]] = {}
    for key, counts in kinds.items():
        votes, best = max((votes, name) for name, votes in _votes(counts).items())
        if votes > 0 and accepts_key(key, document=document):
            chosen[key] = votes, best
    most = sorted(chosen, key=lambda key: (-chosen[key][0], key))[:_MOST_PROPERTIES]
    return {key: chosen[key][1] for key in sorted(most)}


def _votes(counts: Mapping[str, int]) -> dict[str, int]:
    """Return how many records have a value for a property of each type; a list's items count beside it."""
    scalars = {name: sum(counts.get(kind, 0) for kind in kinds) for name, kinds in _SCALARS.items()}
    numbers = "int" if scalars["int"] > scalars["number"] else "number"
    votes = dict(scalars)
    for item, kind in _LISTS.items():
        if item in ("int", "number") and item != numbers:
            continue
        votes[f"{item}[]"] = counts.get(kind, 0)
        votes[item] -= counts.get(kind, 0)
    return votes


def class_body(schema: CollectionSchema, *, document_field: str, where: str) -> dict[str, Any]:
    """Return the body of the request that creates a class.

    Raises
    ------
    ConfigurationError
        A name, a metric or a kind of vector is none that Weaviate has.
    """
    check_names(schema, where=where)
    body: dict[str, Any] = dict(schema.options.get(OPTIONS, {}).get("class", {}))
    body |= {"class": class_name(schema.name), "properties": list(_property_bodies(schema, document_field))}
    if schema.properties:
        only = schema.properties.get("description") if len(schema.properties) == 1 else None
        body["description"] = only if isinstance(only, str) else json.dumps(dict(schema.properties))
    body.pop("multiTenancyConfig", None)
    if schema.has_namespaces:
        body.pop("shardingConfig", None)  # a tenant is a shard
        body["multiTenancyConfig"] = {"enabled": True}
    body["vectorConfig"] = {
        field.name or UNNAMED: _vector_body(field, where=where) for field in schema.vectors
    }
    return body


def _property_bodies(schema: CollectionSchema, document_field: str) -> Iterable[dict[str, Any]]:
    if schema.has_documents:
        yield {"name": document_field, "dataType": ["text"], "description": _DOCUMENT_NOTE}
    unindexed = {"indexFilterable": False, "indexSearchable": False}
    yield {"name": MORE_FIELDS, "dataType": ["text"], "description": _MORE_NOTE, **unindexed}
    types = schema.options.get(OPTIONS, {}).get("properties", {})
    for name in sorted({*types, *_ENVELOPE}):
        body: dict[str, Any] = {"name": name, "dataType": [types.get(name, "text")]}
        if body["dataType"][0] in ("text", "text[]"):  # filtered by the whole value, not searched by word
            body |= {"tokenization": "field", "indexFilterable": True, "indexSearchable": False}
        yield body | (unindexed if name == _ENVELOPE[1] else {})


def _vector_body(field: VectorField, *, where: str) -> dict[str, Any]:
    distance = _DISTANCES.get(field.metric or Metric.COSINE)
    if distance is None or field.dtype is not DType.FLOAT32:
        raise ConfigurationError(
            f"{where}: Weaviate has no {field.metric} distance on {field.dtype}; it has "
            f"{', '.join(sorted(_DISTANCES))}"
        )
    kind = field.index.get("type")
    index = dict(field.index.get("weaviate", {}))
    if kind in ("hnsw", None):
        index |= {theirs: field.index[ours] for ours, theirs in _HNSW.items() if ours in field.index}
    if field.kind is VectorKind.MULTI:
        index["multivector"] = {"enabled": True} | dict(index.get("multivector", {}))
    is_known = kind in ("hnsw", "flat", "dynamic")
    return {
        "vectorizer": {"none": {}},
        "vectorIndexType": kind if is_known else "hnsw",
        "vectorIndexConfig": index | {"distance": distance},
    }
