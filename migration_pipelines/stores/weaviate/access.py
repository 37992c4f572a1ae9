"""One class on an open connection: its tenants, its objects in the order of their ids, or by id."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import ge
from typing import Any

from migration_pipelines.errors import StoreRefusedError, TransientError
from migration_pipelines.stores.weaviate.connection import Connection
from migration_pipelines.stores.weaviate.errors import TOO_LARGE, TOO_MANY, classify
from migration_pipelines.stores.weaviate.layout import Layout
from migration_pipelines.stores.weaviate.reading import by_ids, found_dimensions, search_request

_IDS_PAGE = 5000  # below the usual 10,000 of the server's QUERY_MAXIMUM_RESULTS
_BY_ID_PAGE = 500


@dataclass(frozen=True, kw_only=True)
class Access:
    """A class of the server's.

    Parameters
    ----------
    pace
        Called with the bytes of each request before it is sent.
    where
        The collection's address, for messages.
    """

    connection: Connection
    layout: Layout
    pace: Callable[[int], None]
    where: str

    def call(self, method: str, request: Any) -> Any:
        """Return the reply of a gRPC method."""
        self.pace(request.ByteSize())
        return self.connection.call(method, request)

    # ── tenants ──────────────────────────────────────────────────────────────────────────────────────

    def tenants(self) -> dict[str, bool]:
        """Return the tenants by name, and whether each is active."""
        from weaviate.proto.v1 import tenants_pb2

        reply = self.call("TenantsGet", tenants_pb2.TenantsGetRequest(collection=self.layout.name))
        active = (tenants_pb2.TENANT_ACTIVITY_STATUS_HOT, tenants_pb2.TENANT_ACTIVITY_STATUS_ACTIVE)
        return {tenant.name: tenant.activity_status in active for tenant in sorted(reply.tenants, key=_name)}

    def readable(self, namespace: str | None) -> list[str]:
        """Return the tenants to read, sorted: one, all, or "" where the class has none.

        Raises
        ------
        StoreRefusedError
            One of them isn't active: its objects would be missed.
        """
        if not self.layout.has_tenants:
            return [""]
        found = self.tenants()
        wanted = list(found) if namespace is None else [namespace]
        asleep = [name for name in wanted if not found.get(name, True)]
        if asleep:
            raise StoreRefusedError(
                f"{self.where}: {len(asleep)} tenants are not active and can't be read: {asleep[:5]}; "
                "activate them, or name one that is with ?namespace=",
                tenants=asleep,
            )
        return wanted

    def add_tenants(self, names: Sequence[str]) -> None:
        """Add those tenants that aren't there."""
        missing = sorted(set(names) - set(self.tenants()))
        for start in range(0, len(missing), 100):  # the most that a server changes at a time
            body = [{"name": name} for name in missing[start : start + 100]]
            self.pace(0)
            self.connection.rest("POST", f"/schema/{self.layout.name}/tenants", body=body)

    def remove_tenant(self, name: str) -> None:
        """Remove a tenant and all its objects."""
        self.pace(0)
        self.connection.rest("DELETE", f"/schema/{self.layout.name}/tenants", body=[name])

    # ── objects ──────────────────────────────────────────────────────────────────────────────────────

    def pages(
        self,
        tenant: str,
        *,
        after: str | None = None,
        last: str | None = None,
        size: int = _IDS_PAGE,
        vectors: bool = False,
        fields: bool = False,
        updated: bool = False,
    ) -> Iterator[list[Any]]:
        """Yield the objects with ids above `after` up to and with `last`, in the order of their ids."""
        options = {"tenant": tenant, "vectors": vectors, "fields": fields, "updated": updated}
        while after is None or last is None or after < last:
            # Without an id to begin after, the walk begins at the first: also where that is all zeros.
            found = self._found(limit=size, after=after, **options)
            if not found:
                return
            ids = [item.metadata.id for item in found]
            if any(map(ge, [after or "", *ids], ids)):
                raise TransientError(f"{self.where}: the server lists ids out of order: try again")
            after = ids[-1]
            if last is not None and after > last:
                found = found[: bisect_right(ids, last)]
            if found:
                yield found
            # A page that the server wouldn't give is not asked for again and again.
            size = min(size, 2 * len(ids))

    def by_ids(self, tenant: str, texts: Sequence[str], *, vectors: bool) -> Iterator[list[Any]]:
        """Yield the objects of these ids, in any order."""
        for start in range(0, len(texts), _BY_ID_PAGE):
            page = texts[start : start + _BY_ID_PAGE]
            found = self._found(
                tenant=tenant, limit=len(page), filters=by_ids(page), vectors=vectors, fields=True
            )
            if found:
                yield found

    def _found(self, *, limit: int, **options: Any) -> list[Any]:
        """Return the objects that a request finds, at most `limit`, or fewer where the server gives no more.

        Raises
        ------
        StoreRefusedError
            A single object is larger than a message may be.
        """
        try:
            return list(self.call("Search", search_request(self.layout, limit=limit, **options)).results)
        except Exception as error:
            said = classify(error)[1]
            if TOO_LARGE not in said and TOO_MANY not in said:
                raise
        if limit > 1 and "filters" not in options:
            return self._found(limit=limit // 2, **options)
        if limit > 1:
            return self._halves(limit, **options)
        raise StoreRefusedError(
            f"{self.where}: an object is larger than the server lets a message be (GRPC_MAX_MESSAGE_SIZE)"
        )

    def _halves(self, limit: int, *, filters: Any, **options: Any) -> list[Any]:
        texts, middle = list(filters.value_text_array.values), limit // 2
        parts = [part for part in (texts[:middle], texts[middle:]) if part]
        return [
            item for part in parts for item in self._found(limit=len(part), filters=by_ids(part), **options)
        ]

    def count(self, tenant: str) -> int:
        """Return the exact number of objects."""
        from weaviate.proto.v1 import aggregate_pb2

        request = aggregate_pb2.AggregateRequest(
            collection=self.layout.name, tenant=tenant, objects_count=True
        )
        return int(self.call("Aggregate", request).single_result.objects_count)

    def delete(self, tenant: str, texts: Sequence[str]) -> int:
        """Remove the objects of these ids; returns how many of them are still there.

        Of more objects than QUERY_MAXIMUM_RESULTS the server removes that many and reports no failure, only
        that it found more.
        """
        from weaviate.proto.v1 import base_pb2, batch_delete_pb2

        left = 0
        for start in range(0, len(texts), _BY_ID_PAGE):
            request = batch_delete_pb2.BatchDeleteRequest(
                collection=self.layout.name,
                filters=by_ids(texts[start : start + _BY_ID_PAGE]),
                tenant=tenant or None,
                consistency_level=base_pb2.CONSISTENCY_LEVEL_QUORUM,
            )
            reply = self.call("BatchDelete", request)
            while reply.successful and reply.matches > reply.successful + reply.failed:
                reply = self.call("BatchDelete", request)
            left += max(reply.failed, reply.matches - reply.successful)
        return left

    def dimensions(self, tenants: Sequence[str]) -> dict[str, int | None]:
        """Return each vector field's dimensions, which only objects know.

        None for every field of a class without objects; 0 for a field that no object has.
        """
        found: dict[str, int | None] = {}
        seen = False
        wanted = {field.name for field in self.layout.vectors}
        for tenant in tenants:
            for page in self._growing(tenant):
                seen = True
                for item in page:
                    found = {**found_dimensions(item, self.layout), **found}
                if wanted <= found.keys():
                    return found
        return {name: found.get(name, 0 if seen else None) for name in wanted}

    def _growing(self, tenant: str) -> Iterator[list[Any]]:
        """Yield pages of vectors, a small one first: most often the first object has them all."""
        first = next(self.pages(tenant, size=1, vectors=True), None)
        if first:
            yield first
            yield from self.pages(tenant, size=_BY_ID_PAGE, vectors=True)


def _name(tenant: Any) -> str:
    return str(tenant.name)
