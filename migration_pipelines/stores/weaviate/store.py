"""WeaviateStore: the classes ("collections") of a Weaviate server, their tenants as namespaces.

How it reads: by Weaviate's cursor, which goes through the ids in order and misses nothing that stays. Spans
are ranges of ids, which hold for good. Weaviate's `offset` is never used: it skips records while others are
deleted. A page that the server won't give, for its size or for QUERY_MAXIMUM_RESULTS, is read in parts.

How it writes: objects whole, each replacing the one under its id, in batches whose reply says of every object
whether it was taken. Vectors are given, never made by a module of the server's (`vectorizer: none`). All of
this was tried on a server, Weaviate 1.39.0.

The document is the property `document_field`; in classes that LangChain or LlamaIndex made `page_content` or
`text`. `fingerprint` takes every id and the time of its last update: it misses an object that is updated
twice within a millisecond.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import PositiveFloat, PrivateAttr, SecretStr, model_validator

from migration_pipelines import batch as batches
from migration_pipelines.credentials import secret as find_secret
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    MigrationError,
    StoreRefusedError,
    TransientError,
)
from migration_pipelines.filters import Filter
from migration_pipelines.model import (
    Capabilities,
    CollectionSchema,
    DType,
    IdKind,
    Span,
    ValueKind,
    VectorKind,
)
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.weaviate.access import Access
from migration_pipelines.stores.weaviate.connection import WITH_ALIASES, Connection, Endpoint, RestError
from migration_pipelines.stores.weaviate.errors import classify
from migration_pipelines.stores.weaviate.layout import (
    HELD,
    METRICS,
    OPTIONS,
    UNNAMED,
    accepts_key,
    accepts_tenant,
    check_names,
    class_body,
    class_name,
    layout_of,
    property_types,
)
from migration_pipelines.stores.weaviate.reading import to_batch
from migration_pipelines.stores.weaviate.search import check_query, nearest
from migration_pipelines.stores.weaviate.writing import Writer, check_reply, requests, with_dimensions

_PORT, _GRPC_PORT, _TLS_PORT = 8080, 50051, 443
_DOCUMENT = "document"
_PAGE = 1000  # records a reply
_TOO_FEW_NODES = re.compile(r"not find enough weaviate nodes for replication: (\d+) available")
_OPTIONS = frozenset({"grpc_host", "grpc_port", "https", "namespace", "document_field"})


class WeaviateStore(Store):
    """A Weaviate server, 1.27 or later.

    Parameters
    ----------
    host, port
        Where its REST interface is.
    grpc_host, grpc_port
        Where its gRPC interface is, by default on the same host.
    https
        Whether both are reached through TLS.
    namespace
        The one tenant to work in; a class of tenants is then seen as that tenant's objects alone.
    document_field
        The property that holds the document.
    timeout_seconds
        How long a call may take.
    api_key
        Sent with every request as `Authorization: Bearer`; from `WEAVIATE_API_KEY`.
    """

    kind: ClassVar[str] = "weaviate"
    typical_write_bytes_per_second: ClassVar[float] = 4e6  # bound by the server's index: not measured
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset({IdKind.UUID}),
        mixed_ids=False,
        max_id_bytes=None,
        empty_ids=False,
        id_text_refuses="",
        vector_kinds=frozenset({VectorKind.DENSE, VectorKind.MULTI}),
        dtypes=frozenset({DType.FLOAT32}),
        max_dimensions=65_535,  # docs.weaviate.io, "vector dimensions"
        named_vectors=True,
        missing_vectors=True,
        non_finite_vectors=False,
        metrics=frozenset(METRICS.values()),
        documents=True,
        document_refuses="",
        value_kinds=HELD | {ValueKind.NO_FIELDS},
        no_metadata=True,
        namespaces=True,
        deletes=True,
        aliases=True,
        stable_scan=True,
        conditional_write=False,
        filter_operators=frozenset(),  # the cursor can't be combined with a filter
        max_batch_records=None,
        max_batch_bytes=64 * 2**20,
        round_trip={
            "int": "exact up to 2**53: the server holds integers as doubles",
            "null": "a field that is null is one that isn't there",
            "names": "of fields: letters, digits and _, the first one lower-case; of collections: a capital",
        },
    )

    host: str
    port: int = _PORT
    grpc_host: str | None = None
    grpc_port: int = _GRPC_PORT
    https: bool = False
    namespace: str | None = None
    document_field: str = _DOCUMENT
    timeout_seconds: PositiveFloat = 60.0
    api_key: SecretStr | None = None

    _connection: Connection | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.api_key and not re.fullmatch(r"[!-~]+", self.api_key.get_secret_value()):
            raise ConfigurationError("WEAVIATE_API_KEY holds blanks or characters that a header can't carry")
        if self.namespace is not None and not accepts_tenant(self.namespace):
            raise ConfigurationError(
                f"namespace={self.namespace!r} is no name of a tenant: 1 to 64 letters, digits, _ and -"
            )
        if not accepts_key(self.document_field, document=""):
            raise ConfigurationError(f"document_field={self.document_field!r} is no name of a property")
        return self

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection of `weaviate://host:8080/Collection?grpc_port=50051`."""
        query = dict(address.query)
        https = query.get("https", "false")
        port = query.get("grpc_port", str(_TLS_PORT if https == "true" else _GRPC_PORT))
        if (
            query.keys() - _OPTIONS
            or https not in {"true", "false"}
            or not port.isdigit()
            or not address.host
        ):
            raise ConfigurationError(
                f"{address}: expected weaviate://host:port/Collection, and none but the options "
                f"{', '.join(sorted(_OPTIONS))} after the ?"
            )
        secret = address.password or find_secret("WEAVIATE_API_KEY").strip()
        named = {key: query[key] for key in ("grpc_host", "namespace", "document_field") if key in query}
        store = cls(
            host=address.host,
            port=address.port or (_TLS_PORT if https == "true" else _PORT),
            grpc_port=int(port),
            https=https == "true",
            api_key=SecretStr(secret) if secret else None,
            **named,
        )
        collection = address.path or address.collection
        return store, class_name(collection) if collection else None

    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of a collection in it, its name as Weaviate spells it."""
        usual_port = _TLS_PORT if self.https else _GRPC_PORT
        query = {
            key: value
            for key, value, usual in (
                ("https", str(self.https).lower(), "false"),
                ("grpc_host", self.grpc_host, None),
                ("grpc_port", str(self.grpc_port), str(usual_port)),
                ("namespace", self.namespace, None),
                ("document_field", self.document_field, _DOCUMENT),
            )
            if value is not None and value != usual
        }
        path = class_name(collection) if collection else ""
        return str(Address(kind=self.kind, host=self.host, port=self.port, path=path, query=query))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of all classes, sorted."""
        with self.translating():
            found = self._rest("GET", "/schema")
            return sorted(item["class"] for item in found.get("classes") or ())

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of; before its first record it has no dimensions."""
        with self.translating(collection):
            access = self._access(collection)
            return self._schema(access, access.readable(self.namespace))

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records; with a filter, by reading all but their vectors."""
        with self.translating(collection):
            access = self._access(collection)
            tenants = access.readable(self.namespace)
            if where is None:
                return sum(map(access.count, tenants))
            schema = self._schema(access, tenants)
            return sum(
                matching(where, self._batch(access, schema, page, tenant, vectors=False)).true_count
                for tenant in tenants
                for page in access.pages(tenant, fields=True, size=_PAGE)
            )

    def split(
        self,
        collection: str,
        *,
        span_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are ranges of ids within one tenant, in the order of the ids."""
        with self.translating(collection):
            access = self._access(collection)
            for tenant in access.readable(self.namespace):
                after: str | None = None
                ids: list[str] = []
                for page in access.pages(tenant):
                    ids += [item.metadata.id for item in page]
                    while len(ids) >= span_records:
                        part, ids = ids[:span_records], ids[span_records:]
                        yield _span(tenant, after, part), None
                        after = part[-1]
                if ids:
                    yield _span(tenant, after, ids), None

    def scan(
        self,
        collection: str,
        span: Span,
        *,
        ids: pa.RecordBatch | None = None,  # noqa: ARG002 - spans are ranges
        batch_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of a span in the order of their ids."""
        with self.translating(collection):
            access = self._access(collection)
            tenant = str(span.bounds["tenant"])
            schema = self._schema(access, [tenant])
            bounds = {"after": span.bounds["after"], "last": span.bounds["last"]}
            size = min(batch_records, _PAGE)
            for page in access.pages(tenant, **bounds, size=size, vectors=vectors, fields=True):
                yield self._batch(access, schema, page, tenant, vectors=vectors)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids in any order; ids that aren't there are left out."""
        with self.translating(collection):
            access = self._access(collection)
            wanted = self._by_tenant(access, ids)
            schema = self._schema(access, list(wanted) or access.readable(self.namespace))
            found = [
                self._batch(access, schema, page, tenant, vectors=vectors)
                for tenant, texts in wanted.items()
                for page in access.by_ids(tenant, texts, vectors=vectors)
            ]
            if found:
                return pa.concat_batches(found)
            sized = [f.model_copy(update={"dimensions": f.dimensions or 0}) for f in schema.vectors]
            layout = schema.model_copy(update={"vectors": tuple(sized)})  # a class without objects has none
            return self._batch(access, layout, [], "", vectors=vectors)

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with any record that comes, goes or is written again."""
        with self.translating(collection):
            access = self._access(collection)
            count = total = 0
            for tenant in access.readable(self.namespace):
                for page in access.pages(tenant, updated=True):
                    count += len(page)
                    total += sum(
                        xxhash.xxh3_128_intdigest(
                            f"{tenant}:{item.metadata.id}:{item.metadata.last_update_time_unix}".encode()
                        )
                        for item in page
                    )
            return f"{count}:{total % 2**128:032x}"

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:
        """Return the schema with the types of the properties that its metadata gets."""
        if [field.name for field in schema.vectors] == [UNNAMED]:
            only = schema.vectors[0].model_copy(update={"name": ""})
            schema = schema.model_copy(update={"vectors": (only,)})
        check_names(schema, where=self.address(schema.name))
        types = property_types(kinds, document=self.document_field)
        own = {**schema.options.get(OPTIONS, {}), "properties": types}
        return schema.model_copy(update={"options": {**schema.options, OPTIONS: own}})

    def create(self, schema: CollectionSchema) -> None:
        """Create an empty collection; bound to a tenant, that tenant, in a class that may be there."""
        where = self.address(schema.name)
        has_tenants = schema.has_namespaces or self.namespace is not None
        wanted = schema.model_copy(update={"has_namespaces": has_tenants})
        body = class_body(wanted, document_field=self.document_field, where=where)
        with self.translating(schema.name):
            found = self._found_class(schema.name)
            if found is None:
                self._create_class(body)
            access = self._access(schema.name, check_tenant=False)
            is_taken = self.namespace is None or self.namespace in access.tenants()
            if found is not None and is_taken:
                raise CollectionExistsError(
                    f"{where} is there already; choose another name or drop it",
                    store=self.kind,
                    collection=schema.name,
                )
            if self.namespace is not None:
                access.add_tenants([self.namespace])

    def _create_class(self, body: dict[str, Any]) -> None:
        """Create a class, with as many copies of each object as there are nodes if it asks for more."""
        try:
            self._rest("POST", "/schema", body=body)
        except RestError as error:
            nodes = _TOO_FEW_NODES.search(str(error))
            if nodes is None or int(nodes[1]) < 1:
                raise
            copies = {**body["replicationConfig"], "factor": int(nodes[1])}
            self._rest("POST", "/schema", body=body | {"replicationConfig": copies})

    def drop(self, collection: str) -> None:
        """Remove a collection and all its records; bound to a tenant, that tenant alone."""
        with self.translating(collection):
            access = self._access(collection)
            if self.namespace is not None:
                access.remove_tenant(self.namespace)
            else:
                self._rest("DELETE", f"/schema/{access.layout.name}")

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch, each record replacing what was under its id.

        What Weaviate would refuse or change is refused before anything is written.
        """
        with self._loading(collection) as write:
            write(batch)

    def load_part(
        self,
        collection: str,
        part: str,  # noqa: ARG002 - objects have no parts
    ) -> AbstractContextManager[Callable[[pa.RecordBatch], None]]:
        """Return a context that gives the function to write batches with; it asks for the class once."""
        return self._loading(collection)

    @contextmanager
    def _loading(self, collection: str) -> Iterator[Callable[[pa.RecordBatch], None]]:
        with self.translating(collection):
            access = self._access(collection)
            # One that is asleep or not there yet is no hindrance: it tells so itself when it is written to.
            spaces = (
                access.readable(self.namespace) if self.namespace or not access.layout.has_tenants else []
            )
            schema = self._schema(access, spaces)
            tenant = self._only_tenant(access)
            writer = Writer(access.layout, tenant=tenant, where=access.where)
        known: set[str] = set()

        def write(batch: pa.RecordBatch) -> None:
            nonlocal schema
            with self.translating(collection):
                schema = with_dimensions(schema, batch)
                batch = batches.conform(batch, schema, where=access.where)
                new = set() if tenant is not None else {*writer.tenants(batch)} - known
                objects = writer.objects(batch)
                if new:
                    access.add_tenants(sorted(new))
                    known.update(new)
                for request in requests(objects, max_bytes=access.connection.max_message_bytes):
                    reply = access.call("BatchObjects", request)
                    check_reply(reply.errors, request.objects, where=access.where)

        yield write

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self.translating(collection):
            access = self._access(collection)
            for tenant, texts in self._by_tenant(access, ids).items():
                if left := access.delete(tenant, texts):
                    raise TransientError(
                        f"{access.where}: {left} of {len(texts)} records were not deleted: try again",
                        failed=left,
                    )

    # ── search, aliases ──────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)` of all tenants: 1 - cosine, minus dot, squared Euclidean, …"""
        if where is not None:
            raise self._unsupported("search with a filter", collection)
        with self.translating(collection):
            access = self._access(collection)
            tenants = access.readable(self.namespace)
            query = np.asarray(vector, "<f4")
            check_query(self._schema(access, tenants), query, name, where=access.where)
            found = [hit for tenant in tenants for hit in nearest(access, tenant, query, name, limit)]
            return sorted(found, key=lambda hit: hit[1])[:limit]

    def aliases(self, collection: str) -> list[str]:
        """Return the aliases that point at a collection."""
        with self.translating(collection):
            access = self._access(collection)
            self._check_aliases(collection)
            found = self._rest("GET", "/aliases", query={"class": access.layout.name})
            return sorted(item["alias"] for item in found.get("aliases") or ())

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection, atomically; Weaviate spells it with a capital too."""
        with self.translating(collection):
            name = self._access(collection).layout.name
            self._check_aliases(collection)
            path = f"/aliases/{class_name(alias)}"
            try:
                self._rest("GET", path)
            except RestError as error:
                if error.status != 404:
                    raise
                self._rest("POST", "/aliases", body={"alias": class_name(alias), "class": name})
            else:
                self._rest("PUT", path, body={"class": name})

    def _check_aliases(self, collection: str) -> None:
        if self._connect().version < WITH_ALIASES:
            raise self._unsupported("aliases before its version 1.32", collection)

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def accepts_key(self, key: str) -> bool:
        """Whether a metadata field may have this name; others stay in the envelope."""
        return accepts_key(key, document=self.document_field)

    def accepts_namespace(self, name: str) -> bool:
        """Whether a tenant may have this name; Weaviate has no default one."""
        return accepts_tenant(name)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error of `errors.py` for what the server, gRPC or the network said."""
        kind, found, advice, facts = classify(error)
        if kind is CollectionNotFoundError and collection is not None and "tenant" not in found:
            with contextlib.suppress(MigrationError):
                advice = f"there are: {', '.join(self.list_collections()) or 'none'}"
        if self.api_key is not None:
            found = found.replace(self.api_key.get_secret_value(), "***")
        return kind(
            f"{self.address(collection)}: {found}; {advice}", store=self.kind, collection=collection, **facts
        )

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _connect(self) -> Connection:
        with self._lock:
            if self._connection is None:
                self._connection = Connection(
                    Endpoint(
                        host=self.host,
                        port=self.port,
                        grpc_host=self.grpc_host or self.host,
                        grpc_port=self.grpc_port,
                        https=self.https,
                        key=self.api_key.get_secret_value() if self.api_key else None,
                        timeout_seconds=self.timeout_seconds,
                    )
                )
            return self._connection

    def _rest(self, method: str, path: str, **options: Any) -> Any:
        self.pace()
        return self._connect().rest(method, path, **options)

    def _found_class(self, collection: str) -> Any:
        try:
            return self._rest("GET", f"/schema/{class_name(collection)}")
        except RestError as error:
            if error.status != 404:
                raise
            return None

    def _access(self, collection: str, *, check_tenant: bool = True) -> Access:
        """Return a class that is there, and whose tenant is there where the store is bound to one."""
        where = self.address(collection)
        found = self._found_class(collection)
        if found is None:
            there = ", ".join(self.list_collections()) or "none"
            raise CollectionNotFoundError(
                f"{where} isn't there; there are: {there}", store=self.kind, collection=collection
            )
        if found["class"] != class_name(collection):
            # Else a migration could be told to replace its source, under another name.
            raise ConfigurationError(f"{where} is an alias of {found['class']}: name that instead")
        layout = layout_of(found, document_field=self.document_field, where=where)
        access = Access(connection=self._connect(), layout=layout, pace=self.pace, where=where)
        if self.namespace is not None and not layout.has_tenants:
            raise StoreRefusedError(f"{where}: the collection has no tenants; leave ?namespace= out")
        if check_tenant and self.namespace is not None and self.namespace not in (found := access.tenants()):
            raise CollectionNotFoundError(
                f"{where}: the tenant isn't there; there are: {', '.join([*found][:20]) or 'none'}",
                store=self.kind,
                collection=collection,
            )
        return access

    def _schema(self, access: Access, tenants: Sequence[str]) -> CollectionSchema:
        has_namespaces = access.layout.has_tenants and self.namespace is None
        return access.layout.schema(access.dimensions(tenants), has_namespaces=has_namespaces)

    def _only_tenant(self, access: Access) -> str | None:
        """Return the tenant of every record; None where each record has one of its own."""
        if access.layout.has_tenants and self.namespace is None:
            return None
        return self.namespace or ""

    def _batch(
        self, access: Access, schema: CollectionSchema, page: Sequence[Any], tenant: str, *, vectors: bool
    ) -> pa.RecordBatch:
        return to_batch(page, access.layout, schema, tenant=tenant, vectors=vectors, where=access.where)

    def _by_tenant(self, access: Access, ids: pa.RecordBatch) -> dict[str, list[str]]:
        """Return the distinct ids that Weaviate can hold, by the tenant that they are in, if it is there."""
        ids = ids.filter(pc.equal(ids.column(batches.ID_TYPE), IdKind.UUID.value))
        texts = [text.lower() for text in ids.column(batches.ID).to_pylist()]
        tenant = self._only_tenant(access)
        if tenant is not None:
            return {tenant: [*dict.fromkeys(texts)]} if texts else {}
        spaces = ids.column(batches.NAMESPACE).to_pylist()
        there = access.tenants()
        wanted: dict[str, dict[str, None]] = {}
        for text, space in zip(texts, spaces, strict=True):
            if space in there:
                wanted.setdefault(space, {})[text] = None
        return {space: [*found] for space, found in wanted.items()}


def _span(tenant: str, after: str | None, ids: Sequence[str]) -> Span:
    return Span(bounds={"tenant": tenant, "after": after, "last": ids[-1]}, records=len(ids))
