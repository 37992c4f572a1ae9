"""MilvusStore: collections of a Milvus server, or of Milvus Lite's folder or (only read) single file.

How it reads: all keys once, in their order, each page after the last key of the one before; then records by key
in pages, which is the fastest that Milvus Lite has. Every read is consistent with all writes before it. A
collection that isn't in the server's memory is loaded, since nothing can be read otherwise.

How it writes: whole records, each in place of what was under its key. Milvus takes a key once a collection: an id
that stands in another partition already is refused, because Milvus Lite would move it without a word.

What `fingerprint` misses: an update in place. Of the copy of a folder it tells of the original's files, and of a
single file of its bytes, and misses nothing.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import PositiveFloat, PrivateAttr, SecretStr, model_validator

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.errors import (
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    DimensionMismatchError,
    LedgerError,
    MigrationError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
)
from migration_pipelines.filters import Filter
from migration_pipelines.model import (
    Capabilities,
    CollectionSchema,
    DType,
    IdKind,
    Metric,
    Span,
    ValueKind,
    VectorKind,
)
from migration_pipelines.snapshot import folder_fingerprint, snapshot
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.milvus import lite
from migration_pipelines.stores.milvus.client import Client
from migration_pipelines.stores.milvus.errors import meaning, what_was_said
from migration_pipelines.stores.milvus.expressions import Key, chunks
from migration_pipelines.stores.milvus.legacy import LegacyFile
from migration_pipelines.stores.milvus.reading import batch_of
from migration_pipelines.stores.milvus.schema import (
    METRICS,
    NAMESPACES_MARK,
    TEXT_BYTES,
    Described,
    Layout,
    VectorColumn,
    accepts_namespace,
    index_params,
    layout_of,
    namespaces_of,
    partition_of,
    proto_of,
    schema_of,
)
from migration_pipelines.stores.milvus.server import PAGE, Server
from migration_pipelines.stores.milvus.writing import data_of

_PORT, _TLS_PORT = 19530, 443
_OPTIONS = ("db", "https", "namespace", "document_field")


class MilvusStore(Store):
    """A Milvus server, or a folder of Milvus Lite opened in this process.

    One process at a time may open a folder. A single file, which Milvus Lite 2 made, is only read.

    Parameters
    ----------
    path
        Folder of Milvus Lite, or its file; a folder need not exist where a collection is to be created.
    host, port, https
        A server, in place of `path`.
    user, password
        A login; the password from `MILVUS_PASSWORD`.
    token
        An API key, in place of a login; from `MILVUS_TOKEN`.
    db
        Database; the default one if empty.
    namespace
        The one partition that is meant, "" for `_default`; all of them if None.
    document_field
        Field, or key of the dynamic ones, that holds the document. By default a text field `document`, `text` or
        `page_content`; of a single file also a dynamic one that is a text in all records.
    timeout_seconds, load_seconds
        How long a call may take, and reading a collection into the server's memory.
    snapshot_of
        The folder that `path` is a copy of, set by `for_reading`.
    """

    kind: ClassVar[str] = "milvus"
    # Milvus Lite's: 5,000 records of 2 kB a second, whatever the batch size.
    typical_write_bytes_per_second: ClassVar[float] = 10e6
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset({IdKind.INT, IdKind.STR}),
        mixed_ids=False,
        max_id_bytes=TEXT_BYTES,
        empty_ids=True,
        id_text_refuses="",
        vector_kinds=frozenset({VectorKind.DENSE, VectorKind.SPARSE}),
        dtypes=frozenset({DType.FLOAT32}),
        max_dimensions=32_768,
        named_vectors=True,
        missing_vectors=False,
        non_finite_vectors=False,
        metrics=frozenset({Metric.EUCLIDEAN, Metric.COSINE, Metric.DOT}),
        documents=True,
        document_refuses="",
        value_kinds=frozenset(ValueKind),
        no_metadata=True,
        namespaces=True,
        deletes=True,
        aliases=True,
        stable_scan=True,
        conditional_write=False,
        filter_operators=frozenset(),
        max_batch_records=None,
        # A request may have 64 MB; it is larger than the batch that it is made of, but never twice as large.
        max_batch_bytes=32 * 2**20,
        round_trip={
            "metadata": "exact, in one JSON field; in collections that were found null is absent and {} none",
            "vectors": "bit for bit; float16 and bfloat16 are read as float32; NaN, infinities, and sparse entries "
            "at or below 0 are refused",
            "namespaces": "partitions; an id stands in one of them only",
        },
    )

    path: str | None = None
    host: str | None = None
    port: int = _PORT
    https: bool = False
    user: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None
    db: str = ""
    namespace: str | None = None
    document_field: str | None = None
    timeout_seconds: PositiveFloat = 120.0
    load_seconds: PositiveFloat = 600.0
    snapshot_of: str | None = None

    _server: Server | None = PrivateAttr(default=None)
    _held: Path | None = PrivateAttr(default=None)  # the folder that is opened for this store
    _lock: threading.RLock = PrivateAttr(default_factory=threading.RLock)

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.path is None) == (self.host is None):
            raise ValueError("either a path or a host, not both")
        return self

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store of `milvus://host:port/collection` or `milvus:path#collection`.

        Options: `?db=`, `?https=true`, `?namespace=`, `?document_field=`.
        """
        if unknown := sorted(address.query.keys() - set(_OPTIONS)):
            raise ConfigurationError(f"{address}: unknown options {unknown}; there are {list(_OPTIONS)}")
        https = address.query.get("https", "false")
        if https not in ("true", "false"):
            raise ConfigurationError(f"{address}: https is true or false, not {https!r}")
        options: dict[str, Any] = {
            name: address.query[name]
            for name in ("db", "namespace", "document_field")
            if name in address.query
        }
        if address.host is None:
            if not address.path:
                raise ConfigurationError(
                    f"{address}: expected milvus:path#collection or milvus://host:port/…"
                )
            return cls(path=address.path, **options), address.collection
        token = os.environ.get("MILVUS_TOKEN")
        password = address.password or os.environ.get("MILVUS_PASSWORD")
        store = cls(
            host=address.host,
            port=address.port or (_TLS_PORT if https == "true" else _PORT),
            https=https == "true",
            user=address.user,
            password=SecretStr(password) if password and address.user else None,
            token=SecretStr(token) if token else None,
            **options,
        )
        return store, address.path or address.collection

    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of a collection in it; a copy has its original's."""
        query = {
            name: value
            for name, value in (
                ("db", self.db or None),
                ("https", "true" if self.https else None),
                ("namespace", self.namespace),
                ("document_field", self.document_field),
            )
            if value is not None
        }
        if self.path is None:
            return str(
                Address(
                    kind=self.kind,
                    user=self.user,
                    host=self.host,
                    port=self.port,
                    path=collection or "",
                    query=query,
                )
            )
        where = self.snapshot_of or self.path
        return str(Address(kind=self.kind, path=where, collection=collection, query=query))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of all collections, sorted; none where there is no folder yet."""
        with self.translating():
            return sorted(self._engine().names()) if self._is_there() else []

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of; `options["milvus"]` says what only Milvus understands."""
        with self.translating(collection):
            return self._schema(*self._found(collection))

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records; with a filter, by reading all but their vectors."""
        with self.translating(collection):
            found, layout = self._found(collection)
            partition = None if self.namespace is None else partition_of(self.namespace)
            if where is None:
                return self._engine().count(found, layout, partition)
            total = 0
            for space in self._namespaces(found):
                for keys in self._engine().keys(found, layout, self._partition(found, space)):
                    for part in chunks(keys, PAGE):
                        page = self._read(found, layout, part, space, vectors=False)
                        total += filters.mask(where, page).true_count
            return total

    def split(
        self,
        collection: str,
        *,
        span_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are lists of ids, in the order of the keys, namespace by namespace.

        Raises
        ------
        StoreRefusedError
            Keys are there more than once, of which Milvus answers one.
        """
        with self.translating(collection):
            found, layout = self._found(collection)
            engine, total = self._engine(), 0
            for space in self._namespaces(found):
                partition = self._partition(found, space)
                before, listed = engine.count(found, layout, partition), 0
                for keys in _resized(engine.keys(found, layout, partition), span_records):
                    listed += len(keys)
                    yield Span(records=len(keys)), self._id_batch(found, layout, keys, space)
                if listed != before and before == engine.count(found, layout, partition):
                    raise StoreRefusedError(
                        f"{self.address(collection)}: {before} records are counted under {listed} keys: some were "
                        "inserted twice, and Milvus answers any one of them; delete and write those again",
                        expected=before,
                        found=listed,
                    )
                total += listed

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
        """Yield the records of a span's list of ids that are still there.

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
            found, layout = self._found(collection)
            for space, keys in self._grouped(found, layout, ids):
                for part in chunks(keys, min(PAGE, batch_records)):
                    page = self._read(found, layout, part, space, vectors=vectors)
                    if page.num_rows:
                        yield page

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        with self.translating(collection):
            found, layout = self._found(collection)
            pages = [
                self._read(found, layout, part, space, vectors=vectors)
                for space, keys in self._grouped(found, layout, ids)
                for part in chunks(keys, PAGE)
            ]
            if pages:
                return pa.concat_batches(pages)
            columns = batches.arrow_schema(self._schema(found, layout), vectors=vectors)
            return pa.RecordBatch.from_pylist([], schema=columns)

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with the collection's files, or on a server with its set of ids."""
        with self.translating(collection):
            found, layout = self._found(collection)
            if self.path is not None and lite.is_legacy_file(lite.absolute(self.path)):
                return hashlib.sha256(lite.absolute(self.path).read_bytes()).hexdigest()
            if self.snapshot_of is not None:
                where = {"database": self.db, "collection": found.name}
                return folder_fingerprint(lite.collection_folder(lite.absolute(self.snapshot_of), **where))
            digest = total = 0
            for space in self._namespaces(found):
                for keys in self._engine().keys(found, layout, self._partition(found, space)):
                    total += len(keys)
                    names = (f"{len(space)}:{space}{key}" for key in keys)
                    digest += sum(xxhash.xxh3_128_intdigest(name.encode()) for name in names)
            return f"{found.number}:{total}:{digest % 2**128:032x}"

    def for_reading(self, scratch: Path) -> Self:
        """Return a store on a copy of the folder under `scratch`: Milvus Lite writes on being opened.

        A single file is read as it is.

        Raises
        ------
        StoreUnavailableError
            There is no such folder.
        TransientError, DiskFullError
            The folder changed while it was copied, or the copy doesn't fit.
        """
        if self.path is None or self.snapshot_of is not None or lite.is_legacy_file(lite.absolute(self.path)):
            return self
        with self.translating():
            folder = lite.absolute(self.path)
            if not lite.is_folder(folder):
                raise StoreUnavailableError(
                    f"{self.address()}: {folder} is no folder of Milvus Lite's; check the path",
                    store=self.kind,
                )
            # Milvus Lite puts each write into its log before it acknowledges it: a copy of an open folder is
            # as good as one that a crash left behind, and is recovered on being opened.
            copy = snapshot(folder, scratch)
        # Not `model_copy`, which would copy the connection too.
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, "path": str(copy), "snapshot_of": self.path})

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Create an empty collection with its search indexes, and the folder of Milvus Lite where there is none.

        Raises
        ------
        CollectionExistsError
        """
        where = self.address(schema.name)
        with self.translating(schema.name):
            server = self._writable()
            if schema.name in {*server.names(), *server.all_aliases()}:
                raise CollectionExistsError(
                    f"{where} is there already; choose another name or drop it",
                    store=self.kind,
                    collection=schema.name,
                )
            own = schema.options.get("milvus", {})
            proto = proto_of(schema, where=where)
            columns = self._columns(proto, schema, where)
            indexes = {
                column.name: index_params(column.field, is_lite=server.client.is_lite) for column in columns
            }
            if not server.client.is_lite:
                indexes |= {name: dict(index) for name, index in own.get("indexes", {}).items()}
            server.create(
                proto, indexes, n_shards=own.get("shards", 0), properties=own.get("properties") or None
            )
            if schema.has_namespaces:
                server.create_partition(schema.name, NAMESPACES_MARK)

    def drop(self, collection: str) -> None:
        """Remove a collection, all its records and its aliases."""
        with self.translating(collection):
            found, _ = self._found(collection)
            self._writable().drop(found.name)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch, each record replacing what was under its id.

        What Milvus would refuse or change is refused before anything is written.
        """
        if not batch.num_rows:
            return
        where = self.address(collection)
        with self.translating(collection):
            server = self._writable()
            found, layout = self._found(collection)
            if layout.makes_keys:
                raise StoreRefusedError(f"{where}: Milvus makes its keys itself; choose another collection")
            spaced = batches.NAMESPACE in batch.schema.names and self.namespace is None
            schema = self._schema(found, layout).model_copy(update={"has_namespaces": spaced})
            batch = batches.conform(batch, schema, where=where)
            parts = [
                (space, part, data_of(part, layout, where=where)) for space, part in _by_namespace(batch)
            ]
            for space, part, _ in parts:
                self._check_partition(found, layout, space, part, where)
            for space, part, data in parts:
                partition = partition_of(self.namespace if space is None else space)
                found = self._with_partition(found, partition)
                server.replace(found, self._written_to(found, partition), data, part.num_rows)

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self.translating(collection):
            found, layout = self._found(collection)
            for space, keys in self._grouped(found, layout, ids):
                self._writable().delete(found, layout, keys, self._partition(found, space))

    def finish_load(self, collection: str) -> None:
        """Seal what was written, so that Milvus builds its search indexes."""
        with self.translating(collection):
            found, _ = self._found(collection)
            self._writable().flush(found.name)

    # ── search, aliases ──────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)`: squared Euclidean, 1 - cosine or the negative dot product."""
        with self.translating(collection):
            found, layout = self._found(collection)
            column = next((item for item in layout.vectors if item.field.name == name), None)
            if where is not None or column is None or column.field.dtype is not DType.FLOAT32:
                raise self._unsupported(
                    f"search by vector {name or '(default)'}, or with a filter", collection
                )
            query = np.asarray(vector, "<f4").reshape(-1)
            if column.field.dimensions != len(query):
                raise DimensionMismatchError(
                    f"{self.address(collection)}: the query has {len(query)} dimensions, vector "
                    f"{column.name!r} has {column.field.dimensions}",
                    expected=column.field.dimensions,
                    found=len(query),
                )
            metric = next(text for text, known in METRICS.items() if known is column.field.metric)
            reply = self._writable().search(found, column.name, metric, query.tobytes(), limit)
            keys = reply.ids.str_id.data if layout.key_is_text else reply.ids.int_id.data
            turn = {"IP": lambda score: -score, "COSINE": lambda score: 1 - score}.get(metric, float)
            return [(key, turn(score)) for key, score in zip(keys, reply.scores, strict=True)]

    def aliases(self, collection: str) -> list[str]:
        """Return the aliases that point at a collection."""
        with self.translating(collection):
            found, _ = self._found(collection)
            return self._writable().aliases(found.name)

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection, atomically; every method takes it in place of the name."""
        with self.translating(collection):
            found, _ = self._found(collection)
            self._writable().set_alias(alias, found.name)

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def accepts_namespace(self, name: str) -> bool:
        """Whether a partition may have this name; "" is the default one."""
        return accepts_namespace(name)

    def exact_kinds(self, schema: CollectionSchema) -> frozenset[str]:
        """Return all kinds of value; where the fields are somebody else's, without null and {}.

        A field of a type of its own takes only what it holds exactly: other values are refused.
        """
        kinds = {kind.value for kind in ValueKind}
        own = schema.options.get("milvus", {}).get("schema", {}).get("fields", ())
        holds_all = not own or any(field["name"] == "metadata" for field in own)
        return frozenset(kinds if holds_all else kinds - {ValueKind.NULL.value, ValueKind.NO_FIELDS.value})

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close the connection, and the folder where no other store of this process has it open."""
        with self._lock:
            server, self._server = self._server, None
            held, self._held = self._held, None
            if server is not None:
                server.close()
            if held is not None:
                lite.release(held)

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error of `errors.py` for what gRPC, Milvus or the file system said."""
        kind, advice, facts = meaning(error)
        said = what_was_said(error)
        for secret in (self.token, self.password):
            if secret is not None and secret.get_secret_value():
                said = said.replace(secret.get_secret_value(), "***")
        return kind(
            f"{self.address(collection)}: {said}; {advice}", store=self.kind, collection=collection, **facts
        )

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _is_there(self) -> bool:
        if self.path is None:
            return True
        where = lite.absolute(self.path)
        return lite.is_legacy_file(where) or lite.is_folder(where)

    def _engine(self) -> Server | LegacyFile:
        if self.path is not None and lite.is_legacy_file(lite.absolute(self.path)):
            return LegacyFile(lite.absolute(self.path))
        return self._writable()

    def _writable(self) -> Server:
        """Return the server, which is started for a folder.

        Raises
        ------
        StoreRefusedError
            It is a single file.
        """
        with self._lock:
            if self._server is None:
                self._server = Server(self._client(), load_seconds=self.load_seconds)
            return self._server

    def _client(self) -> Client:
        token, target = None, f"{self.host}:{self.port}"
        if self.path is not None:
            where = lite.absolute(self.path)
            if where.is_file():
                raise StoreRefusedError(
                    f"{self.address()} is a file, as Milvus Lite 2 made: it is only read; write to a folder or a server"
                )
            target = lite.acquire(where)
            self._held = where
        elif self.token is not None:
            token = self.token.get_secret_value()
        elif self.user is not None and self.password is not None:
            token = f"{self.user}:{self.password.get_secret_value()}"
        return Client(
            target,
            secure=self.https,
            token=token,
            database=self.db,
            timeout=self.timeout_seconds,
            before=self.pace,
        )

    def _found(self, collection: str) -> tuple[Described, Layout]:
        where = self.address(collection)
        if not self._is_there():
            raise CollectionNotFoundError(
                f"{where} isn't there: no folder or file of Milvus Lite's at its path",
                store=self.kind,
                collection=collection,
            )
        engine, document = self._engine(), self.document_field
        found = engine.describe(collection)
        if document is None and isinstance(engine, LegacyFile):
            document = engine.document_key(collection)
        return found, layout_of(found, document_field=document, where=where)

    def _schema(self, found: Described, layout: Layout) -> CollectionSchema:
        return schema_of(found, layout, in_one_namespace=self.namespace is not None)

    def _columns(self, proto: Any, schema: CollectionSchema, where: str) -> Sequence[VectorColumn]:
        """Return the vector fields of a new collection, in the schema's own words."""
        made = Described(name=proto.name, number=0, proto=proto, indexes={}, partitions=(), properties={})
        wanted = {field.name: field for field in schema.vectors}
        columns = layout_of(made, document_field=self.document_field, where=where).vectors
        return [
            VectorColumn(
                name=column.name, kind=column.kind, nullable=column.nullable, field=wanted[column.field.name]
            )
            for column in columns
        ]

    def _namespaces(self, found: Described) -> list[str]:
        """Return the namespaces to read; "" alone where there are none, or it is the one that is meant."""
        if self.namespace is not None:
            return [self.namespace]
        spaces = namespaces_of(found)
        return [""] if spaces is None else spaces

    def _partition(self, found: Described, space: str) -> str | None:
        """Return the partition to ask; None for all of them."""
        if self.namespace is None and namespaces_of(found) is None:
            return None
        return partition_of(space)

    def _read(
        self, found: Described, layout: Layout, keys: Sequence[Key], space: str, *, vectors: bool
    ) -> pa.RecordBatch:
        partition = self._partition(found, space)
        columns = self._engine().records(found, layout, keys, partition, vectors=vectors)
        schema = self._schema(found, layout)
        where = self.address(found.name)
        return batch_of(columns, layout, schema, with_vectors=vectors, namespace=space, where=where)

    def _id_batch(self, found: Described, layout: Layout, keys: Sequence[Key], space: str) -> pa.RecordBatch:
        kind = IdKind.STR if layout.key_is_text else IdKind.INT
        columns = {
            batches.ID: pa.array(list(map(str, keys)), pa.string()),
            batches.ID_TYPE: batches.constant(kind.value, len(keys)),
        }
        if self._schema(found, layout).has_namespaces:
            columns[batches.NAMESPACE] = batches.constant(space, len(keys))
        return pa.RecordBatch.from_pydict(columns)

    def _grouped(
        self, found: Described, layout: Layout, ids: pa.RecordBatch
    ) -> Iterator[tuple[str, list[Key]]]:
        """Yield the distinct keys that Milvus can hold, by the namespace that they are asked for in."""
        there = set(found.partitions)
        kind = IdKind.STR if layout.key_is_text else IdKind.INT
        ids = ids.filter(pc.equal(ids.column(batches.ID_TYPE), kind.value))
        for space, part in _by_namespace(ids):
            if self.namespace is not None:
                space = self.namespace
            if self._partition(found, space or "") not in {None, *there}:
                continue
            texts = dict.fromkeys(part.column(batches.ID).to_pylist())
            keys: list[Key] = list(texts) if layout.key_is_text else _int64(texts)
            if keys:
                yield space or "", keys

    def _check_partition(
        self, found: Described, layout: Layout, space: str | None, part: pa.RecordBatch, where: str
    ) -> None:
        """Raise where an id stands in another partition than it is to be written to.

        Raises
        ------
        RecordRejectedError
        """
        space = self.namespace if space is None else space
        if namespaces_of(found) is None and not space:
            return
        server, partition = self._writable(), partition_of(space)
        texts = part.column(batches.ID).to_pylist()
        keys: list[Key] = list(texts) if layout.key_is_text else list(map(int, texts))
        server.load(found)
        elsewhere = server.held(found, layout, keys, None)
        if elsewhere and partition in found.partitions:
            elsewhere -= server.held(found, layout, sorted(elsewhere), partition)  # type: ignore[type-var]
        if elsewhere:
            record = next(key for key in keys if key in elsewhere)
            raise RecordRejectedError(
                f"{where}: record {record!r} stands in another partition than {partition!r}: Milvus takes an id once "
                "a collection; make the ids distinct over the namespaces, or move each to a collection of its own",
                record=record,
            )

    def _with_partition(self, found: Described, partition: str) -> Described:
        """Return the collection with a partition, which is made where it isn't there."""
        if partition in found.partitions or self._divides_by_itself(found):
            return found
        self._writable().create_partition(found.name, partition)
        return self._writable().describe(found.name)

    def _written_to(self, found: Described, partition: str) -> str:
        # A collection with a partition key takes no name of a partition.
        return "" if self._divides_by_itself(found) else partition

    def _divides_by_itself(self, found: Described) -> bool:
        return any(field.is_partition_key for field in found.proto.fields)


def _resized(pages: Iterator[list[Key]], size: int) -> Iterator[list[Key]]:
    waiting: list[Key] = []
    for page in pages:
        waiting += page
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def _by_namespace(batch: pa.RecordBatch) -> list[tuple[str | None, pa.RecordBatch]]:
    """Return the records by namespace; None where they have none."""
    if batches.NAMESPACE not in batch.schema.names:
        return [(None, batch)] if batch.num_rows else []
    spaces = pc.fill_null(batch.column(batches.NAMESPACE), "").to_pylist()
    order = sorted(range(len(spaces)), key=spaces.__getitem__)
    groups = groupby(order, key=spaces.__getitem__)
    return [(space, batch.take(pa.array(list(rows), pa.int64()))) for space, rows in groups]


def _int64(texts: Mapping[str, None]) -> list[Key]:
    numbers = map(int, texts)
    return [number for number in numbers if -(2**63) <= number < 2**63]


STORE = MilvusStore
