"""PineconeStore: the indexes of a Pinecone project, one collection each.

How it reads: the ids of every namespace once (100 a request, the service's limit), then records by id in
pages. The service has no way to read without ids, and always sends vectors along.

How it writes: requests as large as the service takes, counted by their real bytes. Reads are eventually
consistent: after a write the store waits until a search shows its log position, and where the service tells
none until the ids can be fetched; `read_part` waits for records that aren't there yet, within a limit.

Beside a record's own metadata it writes `_floats`, the names of fields whose numbers are floats without a
fraction, since the service makes 1 and 1.0 the same; and the document, under `document_field`.

What `fingerprint` misses: an update in place. It takes the ids of all records.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field, NonNegativeFloat, PositiveFloat, PrivateAttr, SecretStr
from pydantic import ValidationError as SchemaError

from migration_pipelines import batch as batches
from migration_pipelines.credentials import secret as find_secret
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    DimensionMismatchError,
    LedgerError,
    MigrationError,
    StoreUnavailableError,
    TransientError,
)
from migration_pipelines.filters import Filter
from migration_pipelines.model import (
    Capabilities,
    CollectionSchema,
    DType,
    IdKind,
    Metric,
    Span,
    VectorField,
    VectorKind,
)
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.pinecone.client import (
    check_host,
    classify,
    retry_after_seconds,
)
from migration_pipelines.stores.pinecone.plane import (
    DEFAULT_NAMESPACE,
    MAX_BYTES,
    MAX_RECORDS,
    Plane,
)
from migration_pipelines.stores.pinecone.project import Project
from migration_pipelines.stores.pinecone.records import (
    HELD,
    MAX_ID_BYTES,
    accepts_id,
    accepts_key,
    decode,
    encode,
    held_ids,
)
from migration_pipelines.stores.pinecone.schema import (
    METRICS,
    as_tags,
    creation_options,
)
from migration_pipelines.stores.pinecone.visibility import (
    later,
    wait_for_ids,
    wait_for_positions,
    wait_until_gone,
)

_MAX_NAMESPACE_BYTES = 512
_DOCUMENT, _CLOUD, _REGION = "document", "aws", "us-east-1"
_NAME = re.compile(r"[a-z0-9-]+")


class PineconeStore(Store):
    """The indexes of a Pinecone project.

    Parameters
    ----------
    api_key
        From `PINECONE_API_KEY`; not needed for a simulator on this machine.
    host
        Another control plane than the public one, from `PINECONE_CONTROLLER_HOST`; http only on loopback.
    namespace
        The one namespace to work in; "" is the default one, which the service shows as `__default__`. All of
        them if None.
    cloud, region
        Where new indexes are made.
    document_field
        The metadata field that holds a record's document; `text` in those that LangChain wrote.
    sparse
        Whether records hold sparse vectors that the index doesn't declare, as those of older APIs may.
    timeout_seconds
        Of one request.
    freshness_seconds
        How long to wait until what was written can be read.
    """

    kind: ClassVar[str] = "pinecone"
    # A guess: of requests one after another, half a second each. The service's limit is 50 MB a second.
    typical_write_bytes_per_second: ClassVar[float] = 4e6
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset({IdKind.STR}),
        mixed_ids=False,
        max_id_bytes=MAX_ID_BYTES,
        empty_ids=False,
        id_text_refuses="\0",
        vector_kinds=frozenset({VectorKind.DENSE, VectorKind.SPARSE}),
        dtypes=frozenset({DType.FLOAT32}),
        max_dimensions=20_000,
        named_vectors=False,
        missing_vectors=False,
        non_finite_vectors=False,
        metrics=frozenset(METRICS.values()),
        documents=True,
        document_refuses="\0",
        value_kinds=HELD,
        no_metadata=True,
        namespaces=True,
        deletes=True,
        aliases=False,
        stable_scan=True,
        conditional_write=False,
        filter_operators=frozenset(),
        max_batch_records=MAX_RECORDS,
        max_batch_bytes=MAX_BYTES,
        round_trip={
            "ids": "ASCII of 1 to 512 characters as they are; others as a UUID, the original kept",
            "vectors": "float32, bit for bit; one dense and one sparse a record; all zeros refused",
            "numbers": "up to 15 digits exact; longer ones kept in the envelope",
            "integers": "exact to 2**53; larger ones kept in the envelope",
            "lists": "of text exact; others kept in the envelope",
            "null, {}, objects": "kept in the envelope",
            "documents": "in the metadata, with which they share 40 KB a record",
        },
    )

    api_key: SecretStr | None = Field(default=None, repr=False)
    host: str | None = None
    namespace: str | None = None
    cloud: str = _CLOUD
    region: str = _REGION
    document_field: str = Field(default=_DOCUMENT, min_length=1)
    sparse: bool = False
    timeout_seconds: PositiveFloat = 60.0
    freshness_seconds: NonNegativeFloat = 120.0

    _opened: Project | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def model_post_init(self, context: Any, /) -> None:
        """Check where the key would be sent to, and what the namespace is called."""
        super().model_post_init(context)
        if self.host is not None:
            check_host(self.host)
        if self.namespace == DEFAULT_NAMESPACE:
            object.__setattr__(self, "namespace", "")

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection of `pinecone://index-name`.

        In its query: `namespace`, `cloud`, `region`, `host`, `document_field`, `sparse`, `timeout_seconds`,
        `freshness_seconds`.
        """
        known = set(cls.model_fields) - {"api_key", "requests_per_second", "bytes_per_second"}
        if strange := sorted(address.query.keys() - known):
            raise ConfigurationError(f"{address}: {strange} mean nothing to Pinecone; it has {sorted(known)}")
        if address.user or address.password or address.port:
            raise ConfigurationError(
                f"{address}: a Pinecone address is pinecone://index-name; the key comes from PINECONE_API_KEY"
            )
        secret = find_secret("PINECONE_API_KEY")
        options: dict[str, Any] = {
            "host": os.environ.get("PINECONE_CONTROLLER_HOST") or None,
            **address.query,
        }
        try:
            store = cls(api_key=SecretStr(secret) if secret else None, **options)
        except SchemaError as error:
            wrong = ", ".join(str(item["loc"][0]) for item in error.errors())
            raise ConfigurationError(f"{address}: these settings can't be used: {wrong}") from None
        return store, address.host or address.path.strip("/") or address.collection

    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of a collection in it."""
        shown = {
            "host": (self.host, None),
            "namespace": (self.namespace, None),
            "cloud": (self.cloud, _CLOUD),
            "region": (self.region, _REGION),
            "document_field": (self.document_field, _DOCUMENT),
            "sparse": (str(self.sparse).lower(), "false"),
        }
        query = {key: value for key, (value, usual) in shown.items() if value is not None and value != usual}
        if collection is None or not _NAME.fullmatch(collection):
            return str(Address(kind=self.kind, path=collection or "", query=query))
        text = str(Address(kind=self.kind, host=collection, query=query))
        return text.replace(f"//{collection}/", f"//{collection}", 1)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of all indexes, sorted."""
        with self.translating():
            return self._project.names()

    def describe(self, collection: str) -> CollectionSchema:
        """Return what an index is made of; it has namespaces where one but the default is in use."""
        with self.translating(collection):
            plane = self._project.open_afresh(collection)
            return plane.schema.model_copy(update={"has_namespaces": self._has_namespaces(plane)})

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records, by listing their ids: the service's own count may lag."""
        with self.translating(collection):
            plane = self._project.open(collection)
            if where is None:
                return sum(1 for space in self._spaces(plane) for _ in plane.ids(space))
        pages = self.scan_all(collection, span_records=MAX_RECORDS, batch_records=MAX_RECORDS, vectors=False)
        return sum(matching(where, page).true_count for page in pages)

    def split(
        self,
        collection: str,
        *,
        span_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are lists of ids, namespace by namespace, in the order of their characters."""
        with self.translating(collection):
            plane = self._project.open_afresh(collection)
            named = ((space, text) for space in self._spaces(plane) for text in plane.checked_ids(space))
            while part := list(islice(named, span_records)):
                columns = [
                    pa.array([text for _, text in part], pa.string()),
                    batches.constant(IdKind.STR.value, len(part)),
                ]
                names = [batches.ID, batches.ID_TYPE]
                if self._has_namespaces(plane):
                    columns.append(pa.array([space for space, _ in part], pa.string()))
                    names.append(batches.NAMESPACE)
                yield Span(records=len(part)), pa.RecordBatch.from_arrays(columns, names=names)

    def scan(
        self,
        collection: str,
        span: Span,
        *,
        ids: pa.RecordBatch | None = None,
        batch_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of a span's list of ids that are still there, in the list's order.

        Raises
        ------
        LedgerError
            `ids` is missing.
        """
        if ids is None:
            raise LedgerError(
                f"{self.address(collection)}: the list of ids of {span} is missing; plan it afresh"
            )
        with self.translating(collection):
            plane = self._project.open(collection)
            for page in self._pages(plane, ids, vectors=vectors):
                yield from batches.split(page, max_records=batch_records, max_bytes=None)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        with self.translating(collection):
            plane = self._project.open(collection)
            found = list(self._pages(plane, ids, vectors=vectors))
            if found:
                return pa.concat_batches(found)
            has_namespaces = batches.NAMESPACE in ids.schema.names
            schema = plane.schema.model_copy(update={"has_namespaces": has_namespaces})
            return pa.RecordBatch.from_pylist([], schema=batches.arrow_schema(schema, vectors=vectors))

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with the set of ids; an update in place is missed."""
        with self.translating(collection):
            plane = self._project.open_afresh(collection)
            total = digest = 0
            for space in self._spaces(plane):
                for text in plane.ids(space):
                    digest += xxhash.xxh3_128_intdigest(f"{len(space)}:{space}{text}".encode())
                    total += 1
            return f"{plane.index.host}:{total}:{digest % 2**128:032x}"

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:  # noqa: ARG002
        """Return the schema with those properties that an index's tags can hold."""
        return schema.model_copy(update={"properties": as_tags(schema.properties)})

    def create(self, schema: CollectionSchema) -> None:
        """Create an empty index and wait until it is ready.

        Raises
        ------
        TransientError
            It isn't within five minutes.
        """
        options = creation_options(schema, where=self.address(schema.name))
        deployment = {"deployment_type": "managed", "cloud": self.cloud, "region": self.region}
        with self.translating(schema.name):
            indexes = self._project.indexes()
            indexes.create(name=schema.name, deployment=deployment, timeout=-1, **options)
            self._project.wait_until_ready(schema.name)

    def drop(self, collection: str) -> None:
        """Remove an index and all its records, and wait until it is gone.

        Raises
        ------
        TransientError
            It isn't within five minutes.
        """
        with self.translating(collection):
            self._project.indexes().delete(collection, timeout=-1)
            self._project.wait_until_gone(collection)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch, each record replacing what was under its id, and wait until it can be read.

        What Pinecone would refuse or change by the rules that it states is refused before anything is
        written. What it refuses by itself, such as more than 40 KB of metadata, may leave other requests of
        the batch written: they are idempotent, and the caller writes the rest of the batch again.
        """
        with self.translating(collection):
            plane = self._project.open(collection)
            positions = self._write(plane, batch)
            unknown = wait_for_positions(plane, positions, seconds=self.freshness_seconds)
            for space, texts in self._by_namespace(batches.ids_of(batch)) if unknown else ():
                missing = wait_for_ids(plane, space, texts, seconds=self.freshness_seconds)
                if missing:
                    raise TransientError(
                        f"{plane.where}: {len(missing)} of {len(texts)} records just written can't be read "
                        f"within {self.freshness_seconds:g} seconds; write them again",
                        expected=len(texts),
                        found=len(texts) - len(missing),
                    )

    @contextmanager
    def load_part(self, collection: str, part: str) -> Iterator[Callable[[pa.RecordBatch], None]]:  # noqa: ARG002
        """Return a context to write a partition in, at whose end what was written can be searched."""
        positions: dict[str, int | None] = {}

        def write(batch: pa.RecordBatch) -> None:
            with self.translating(collection):
                positions.update(later(positions, self._write(self._project.open(collection), batch)))

        yield write
        with self.translating(collection):
            wait_for_positions(self._project.open(collection), positions, seconds=self.freshness_seconds)

    def read_part(self, collection: str, part: str, ids: pa.RecordBatch) -> pa.RecordBatch:  # noqa: ARG002
        """Return what a load wrote for these ids; those that aren't there yet are waited for."""
        found = self.fetch(collection, ids)
        if found.num_rows == ids.num_rows:
            return found
        with self.translating(collection):
            plane = self._project.open(collection)
            for space, texts in self._by_namespace(ids):
                wait_for_ids(plane, space, texts, seconds=self.freshness_seconds)
        return self.fetch(collection, ids)

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self.translating(collection):
            plane = self._project.open(collection)
            for space, texts in self._by_namespace(ids):
                positions = {space: plane.delete(space, texts)}
                if wait_for_positions(plane, positions, seconds=self.freshness_seconds):
                    wait_until_gone(plane, space, texts, seconds=self.freshness_seconds)

    def begin_load(self, collection: str) -> None:
        """Wait until the index is ready: a run that was killed may have left it half made."""
        with self.translating(collection):
            self._project.wait_until_ready(collection)

    # ── search ───────────────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)`: squared Euclidean, 1 - cosine or minus the dot product."""
        if name or where is not None:
            raise self._unsupported("search by a named vector or with a filter", collection)
        with self.translating(collection):
            plane = self._project.open(collection)
            field = plane.schema.vectors[0]
            if field.kind is VectorKind.SPARSE:
                raise self._unsupported("search by a sparse vector", collection)
            if field.dimensions != len(vector):
                raise DimensionMismatchError(
                    f"{self.address(collection)}: the vector has {len(vector)} dimensions, the index "
                    f"{field.dimensions}",
                    expected=field.dimensions,
                    found=len(vector),
                )
            query = np.asarray(vector, np.float32).tolist()
            found = [
                (match.id, _distance(match.score, field.metric))
                for space in self._spaces(plane)
                for match in plane.query(space, query, limit=limit, sparse=False).matches
            ]
            return sorted(found, key=lambda pair: pair[1])[:limit]

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def accepts_id(self, text: str) -> bool:
        """Whether a record can have this id: ASCII without NUL."""
        return accepts_id(text)

    def accepts_key(self, key: str) -> bool:
        """Whether a metadata field may have this name."""
        return accepts_key(key, document_field=self.document_field)

    def accepts_namespace(self, name: str) -> bool:
        """Whether a namespace may have this name; "" is the default one."""
        fits = accepts_id(name) and len(name) <= _MAX_NAMESPACE_BYTES
        return fits and name != DEFAULT_NAMESPACE

    def select_vectors(self, fields: Sequence[VectorField]) -> tuple[VectorField, ...]:
        """Return one dense field, which becomes the default one, and one sparse field."""
        ordered = sorted(fields, key=lambda field: field.name != "")
        dense = [field.model_copy(update={"name": ""}) for field in ordered if field.kind is VectorKind.DENSE]
        sparse = [field for field in ordered if field.kind is VectorKind.SPARSE]
        return (*dense[:1], *sparse[:1])

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close all connections; they are opened again on use."""
        if self._opened is not None:
            self._opened.close()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error of `errors.py` for what pinecone raised."""
        kind, advice = classify(error)
        if collection is not None and kind in (CollectionNotFoundError, StoreUnavailableError):
            kind, advice = self._project.look_again(collection, kind, advice)
        found = str(error)[:500] or type(error).__name__
        if self.api_key is not None and (secret := self.api_key.get_secret_value()):
            found = found.replace(secret, "***")
        wait = retry_after_seconds(error) if issubclass(kind, TransientError) else None
        facts = {} if wait is None else {"retry_after_seconds": wait}
        where = self.address(collection)
        return kind(f"{where}: {found}; {advice}", store=self.kind, collection=collection, **facts)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def _project(self) -> Project:
        with self._lock:
            if self._opened is None:
                self._opened = Project(
                    self,
                    api_key=self.api_key.get_secret_value() if self.api_key else "",
                    host=self.host,
                    timeout_seconds=self.timeout_seconds,
                    undeclared_sparse=self.sparse,
                )
            return self._opened

    def _has_namespaces(self, plane: Plane) -> bool:
        return self.namespace is None and plane.schema.has_namespaces

    def _spaces(self, plane: Plane) -> list[str]:
        return plane.namespaces() if self.namespace is None else [self.namespace]

    def _by_namespace(self, ids: pa.RecordBatch) -> list[tuple[str, list[str]]]:
        """Return the ids that an index can hold, by namespace."""
        if self.namespace is not None or batches.NAMESPACE not in ids.schema.names:
            return [(self.namespace or "", held_ids(ids))]
        spaces = ids.column(batches.NAMESPACE).fill_null("")
        found = spaces.unique().to_pylist()
        return [(space, held_ids(ids.filter(pc.equal(spaces, space)))) for space in found]

    def _pages(self, plane: Plane, ids: pa.RecordBatch, *, vectors: bool) -> Iterator[pa.RecordBatch]:
        """Yield the records of ids, a request's worth at a time; with namespaces where the ids have them."""
        for space, texts in self._by_namespace(ids):
            for part in plane.pages(texts):
                page = decode(
                    plane.fetch(space, part),
                    part,
                    plane.schema,
                    document_field=self.document_field,
                    vectors=vectors,
                    where=plane.where,
                )
                if batches.NAMESPACE in ids.schema.names:
                    column = batches.constant(space, page.num_rows)
                    page = page.append_column(batches.NAMESPACE, column)
                if page.num_rows:
                    yield page

    def _write(self, plane: Plane, batch: pa.RecordBatch) -> dict[str, int | None]:
        if not batch.num_rows:
            return {}
        has_namespaces = self.namespace is None and batches.NAMESPACE in batch.schema.names
        schema = plane.schema.model_copy(update={"has_namespaces": has_namespaces})
        batch = batches.conform(batch, schema, where=plane.where)
        records = encode(batch, schema.vectors, document_field=self.document_field, where=plane.where)
        if self.namespace:
            records = [record._replace(namespace=self.namespace) for record in records]
        return plane.upsert(records)


def _distance(score: float, metric: Metric | None) -> float:
    if metric is Metric.EUCLIDEAN:
        return score
    return 1 - score if metric is Metric.COSINE else -score
