"""Search by a vector."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from migration_pipelines.errors import DimensionMismatchError, UnsupportedOperationError
from migration_pipelines.model import CollectionSchema, VectorKind
from migration_pipelines.stores.weaviate.access import Access
from migration_pipelines.stores.weaviate.reading import search_request


def check_query(schema: CollectionSchema, query: Any, name: str, *, where: str) -> None:
    """Raise where the collection can't be searched by this vector.

    Raises
    ------
    UnsupportedOperationError, DimensionMismatchError
    """
    fields = {field.name: field for field in schema.vectors}
    field = fields.get(name)
    if field is None or field.kind is not VectorKind.DENSE:
        raise UnsupportedOperationError(
            f"{where}: no dense vector {name or '(default)'} to search by; it has {sorted(fields)}"
        )
    if field.dimensions not in (None, 0, len(query)):
        raise DimensionMismatchError(
            f"{where}: the query has {len(query)} dimensions, vector {name or '(default)'} has "
            f"{field.dimensions}",
            expected=field.dimensions,
            found=len(query),
        )


def nearest(
    access: Access, tenant: str, query: Any, name: str, limit: int
) -> Iterator[tuple[uuid.UUID, float]]:
    """Yield the nearest `(id, distance)` of one tenant, by the vector field called `name`."""
    from weaviate.proto.v1 import base_search_pb2

    wire = access.layout.wire_names[name]
    near = base_search_pb2.NearVector(
        vector_bytes=query.tobytes(),
        targets=None if wire is None else base_search_pb2.Targets(target_vectors=[wire]),
    )
    request = search_request(
        access.layout, tenant=tenant, vectors=False, fields=False, limit=limit, near_vector=near
    )
    request.metadata.distance = True
    for item in access.call("Search", request).results:
        yield uuid.UUID(item.metadata.id), float(item.metadata.distance)
