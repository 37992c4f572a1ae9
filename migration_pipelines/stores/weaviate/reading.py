"""From the server's replies to batches."""

from __future__ import annotations

import base64
import datetime as dt
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import DimensionMismatchError, StoreRefusedError
from migration_pipelines.metadata import dump_all, load_metadata
from migration_pipelines.model import CollectionSchema, IdKind, VectorField, VectorKind
from migration_pipelines.stores.weaviate.layout import MORE_FIELDS, Layout, data_type

_NESTED = ("object", "object[]")
# Weaviate keeps nanoseconds; Python would cut them off without a word.
_TOO_FINE = re.compile(r"\.\d{7,}")


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────


def search_request(
    layout: Layout,
    *,
    tenant: str,
    vectors: bool,
    fields: bool,
    limit: int,
    updated: bool = False,
    **rest: Any,
) -> Any:
    """Return a request for objects.

    Every property is asked for by name: asked for all of them, the server leaves out blobs without a word.
    """
    from weaviate.proto.v1 import base_pb2, search_get_pb2

    named = [wire for wire in layout.wire_names.values() if wire is not None]
    return search_get_pb2.SearchRequest(
        collection=layout.name,
        tenant=tenant,
        limit=limit,
        consistency_level=base_pb2.CONSISTENCY_LEVEL_QUORUM,
        metadata=search_get_pb2.MetadataRequest(
            uuid=True,
            vector=vectors and not named,
            vectors=named if vectors else [],
            last_update_time_unix=updated,
        ),
        properties=_properties_request(layout if fields else None),
        uses_123_api=True,
        uses_125_api=True,
        uses_127_api=True,
        **rest,
    )


def _properties_request(layout: Layout | None) -> Any:
    from weaviate.proto.v1 import search_get_pb2

    if layout is None:
        return search_get_pb2.PropertiesRequest()
    plain = [layout.document] if layout.document else []
    plain += [MORE_FIELDS] if layout.has_more else []
    plain += [name for name, item in layout.properties.items() if data_type(item) not in _NESTED]
    nested = [item for item in layout.properties.values() if data_type(item) in _NESTED]
    return search_get_pb2.PropertiesRequest(
        non_ref_properties=plain, object_properties=list(map(_object_request, nested))
    )


def _object_request(item: Mapping[str, Any]) -> Any:
    from weaviate.proto.v1 import search_get_pb2

    inside = item.get("nestedProperties") or ()
    return search_get_pb2.ObjectPropertiesRequest(
        prop_name=item["name"],
        primitive_properties=[part["name"] for part in inside if data_type(part) not in _NESTED],
        object_properties=[_object_request(part) for part in inside if data_type(part) in _NESTED],
    )


def by_ids(texts: Sequence[str]) -> Any:
    """Return the filter that finds the objects of these ids."""
    from weaviate.proto.v1 import base_pb2

    return base_pb2.Filters(
        operator=base_pb2.Filters.OPERATOR_CONTAINS_ANY,
        target=base_pb2.FilterTarget(property="_id"),
        value_text_array=base_pb2.TextArray(values=texts),
    )


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────


def to_batch(
    results: Sequence[Any],
    layout: Layout,
    schema: CollectionSchema,
    *,
    tenant: str,
    vectors: bool,
    where: str,
) -> pa.RecordBatch:
    """Return the batch of some found objects.

    Raises
    ------
    DimensionMismatchError
        A vector has other dimensions than those that were read before.
    """
    rows = len(results)
    ids = pa.array([result.metadata.id for result in results], pa.string())
    columns: dict[str, pa.Array] = {
        batches.ID: ids,
        batches.ID_TYPE: batches.constant(IdKind.UUID.value, rows),
    }
    if vectors:
        for field in schema.vectors:
            found = [_vector_bytes(result.metadata, layout.wire_names[field.name]) for result in results]
            columns[batches.vector_column(field.name)] = _vector_column(found, field, where=where)
    documents, fields = _fields(results, layout)
    columns[batches.DOCUMENT] = pa.array(documents, pa.string())
    columns[batches.METADATA] = pa.array(dump_all(fields), pa.binary()).view(pa.string())
    if schema.has_namespaces:
        columns[batches.NAMESPACE] = batches.constant(tenant, rows)
    target = batches.arrow_schema(schema, vectors=vectors)
    return pa.RecordBatch.from_arrays([columns[name] for name in target.names], schema=target)


def _vector_bytes(metadata: Any, wire_name: str | None) -> bytes:
    if wire_name is None:
        return bytes(metadata.vector_bytes)
    return next((bytes(item.vector_bytes) for item in metadata.vectors if item.name == wire_name), b"")


def _vector_column(found: Sequence[bytes], field: VectorField, *, where: str) -> pa.Array:
    width = field.dimensions or 0
    if field.kind is VectorKind.MULTI:
        return pa.array([_multi(raw) if raw else None for raw in found], batches.vector_type(field))
    if any(len(raw) not in (0, 4 * width) for raw in found):
        sizes = sorted({len(raw) // 4 for raw in found if raw})
        raise DimensionMismatchError(
            f"{where}: vector {field.name or '(default)'} has {sizes} dimensions in some records, {width} in "
            "others; mend the collection",
            expected=width,
            found=sizes,
        )
    missing = np.array([not raw for raw in found])
    if width == 0:
        return pa.nulls(len(found), batches.vector_type(field))
    blank = bytes(4 * width)
    matrix = np.frombuffer(b"".join([raw or blank for raw in found]), "<f4").reshape(len(found), width)
    return batches.dense_vectors(matrix, missing=missing if missing.any() else None)


def dimensions_in(raw: bytes, kind: VectorKind) -> int:
    """Return the dimensions of a vector as it comes from the server; 0 where there is none."""
    if kind is VectorKind.MULTI:
        return int(struct.unpack_from("<H", raw)[0]) if raw else 0
    return len(raw) // 4


def found_dimensions(result: Any, layout: Layout) -> dict[str, int]:
    """Return the dimensions of the vectors that one object has."""
    sizes = {
        field.name: dimensions_in(_vector_bytes(result.metadata, layout.wire_names[field.name]), field.kind)
        for field in layout.vectors
    }
    return {name: size for name, size in sizes.items() if size}


def _multi(raw: bytes) -> list[list[float]]:
    width = dimensions_in(raw, VectorKind.MULTI)
    return np.frombuffer(raw, "<f4", offset=2).reshape(-1, width).tolist()


def _fields(results: Sequence[Any], layout: Layout) -> tuple[list[str | None], list[dict[str, Any] | None]]:
    documents: list[str | None] = []
    metadatas: list[dict[str, Any] | None] = []
    document, has_more = layout.document, layout.has_more
    for result in results:
        found: dict[str, Any] = {}
        for name, value in result.properties.non_ref_props.fields.items():
            decode = _DECODERS[value.WhichOneof("kind")]
            if decode is not None:
                found[name] = decode(value)
        documents.append(found.pop(document, None) if document is not None else None)
        more = found.pop(MORE_FIELDS, None) if has_more else None
        if more == "null" and not found:
            metadatas.append(None)
        elif more is not None and more != "null":
            metadatas.append(found | load_metadata(more))
        else:
            metadatas.append(found)
    return documents, metadatas


# ── values ───────────────────────────────────────────────────────────────────────────────────────────


def _unknown(value: Any) -> Any:
    raise StoreRefusedError(
        f"the server sent a property value of a kind that this client doesn't know ({value!s:.100}): "
        "upgrade the package weaviate-client"
    )


def _date(text: str) -> Any:
    """Return the datetime; the text itself where Python's can't hold it exactly."""
    try:
        return text if _TOO_FINE.search(text) else dt.datetime.fromisoformat(text)
    except ValueError:
        return text


def _object(properties: Any) -> dict[str, Any]:
    found = {}
    for name, value in properties.fields.items():
        decode = _DECODERS[value.WhichOneof("kind")]
        if decode is not None:
            found[name] = decode(value)
    return found


def _phone(value: Any) -> dict[str, Any]:
    phone = value.phone_value
    return {
        "input": phone.input,
        "defaultCountry": phone.default_country,
        "internationalFormatted": phone.international_formatted,
        "countryCode": phone.country_code,
        "national": phone.national,
        "nationalFormatted": phone.national_formatted,
        "valid": phone.valid,
    }


def _list(value: Any) -> list[Any]:
    items = value.list_value
    kind = items.WhichOneof("kind")
    return [] if kind is None else _ITEMS[kind](getattr(items, kind).values)


_ITEMS: Mapping[str, Callable[[Any], list[Any]]] = {
    "number_values": lambda raw: np.frombuffer(raw, "<f8").tolist(),
    "int_values": lambda raw: np.frombuffer(raw, "<i8").tolist(),
    "text_values": list,
    "bool_values": list,
    "uuid_values": list,
    "date_values": lambda texts: list(map(_date, texts)),
    "object_values": lambda items: list(map(_object, items)),
}
_DECODERS: Mapping[str | None, Callable[[Any], Any] | None] = {
    None: _unknown,
    "null_value": None,
    "text_value": lambda value: value.text_value,
    "string_value": lambda value: value.string_value,
    "int_value": lambda value: value.int_value,
    "number_value": lambda value: value.number_value,
    "bool_value": lambda value: value.bool_value,
    "uuid_value": lambda value: value.uuid_value,
    "date_value": lambda value: _date(value.date_value),
    "blob_value": lambda value: base64.b64decode(value.blob_value),
    "geo_value": lambda value: {
        "latitude": value.geo_value.latitude,
        "longitude": value.geo_value.longitude,
    },
    "phone_value": _phone,
    "object_value": lambda value: _object(value.object_value),
    "list_value": _list,
}
