"""MilvusStore: collections of a Milvus server, or of Milvus Lite's folder or (only read) single file.

How it reads: all keys once, in their order, each page after the last key of the one before; then records by
key in pages, which is the fastest that Milvus Lite has. Every read is consistent with all writes before it. A
collection that isn't in the server's memory is loaded, since nothing can be read otherwise.

How it writes: whole records, each in place of what was under its key. Milvus takes a key once a collection:
an id that stands in another partition already is refused, because Milvus Lite would move it without a word.

What `fingerprint` misses: an update in place. Of the copy of a folder it tells of the original's files, and
of a single file of its bytes, and misses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa
import xxhash
from pydantic import PositiveFloat, PrivateAttr, SecretStr, model_validator

from migration_pipelines import batch as batches
from migration_pipelines.credentials import secret as find_secret
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    LedgerError,
    MigrationError,
    StoreUnavailableError,
    UnsupportedOperationError,
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
from migration_pipelines.stores.milvus.collection import Collection
from migration_pipelines.stores.milvus.creation import new_collection
from migration_pipelines.stores.milvus.errors import meaning, what_was_said
from migration_pipelines.stores.milvus.legacy import LegacyFile
from migration_pipelines.stores.milvus.schema import (
    NAMESPACES_MARK,
    TEXT_BYTES,
    accepts_namespace,
    holds_all_metadata,
    layout_of,
)
from migration_pipelines.stores.milvus.server import Server

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
        Field, or key of the dynamic ones, that holds the document. By default a text field `document`, `text`
        or `page_content`; of a single file also a dynamic one that is a text in all records.
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
            "vectors": "bit for bit; float16 and bfloat16 are read as float32; NaN, infinities and sparse "
            "entries at or below 0 are refused",
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
        token = find_secret("MILVUS_TOKEN")
        password = address.password or find_secret("MILVUS_PASSWORD")
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
            return self._collection(collection, indexes=True).schema

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records; with a filter, by reading all but their vectors."""
        with self.translating(collection):
            found = self._collection(collection)
            if where is None:
                return found.count()
            keys = ((space, part) for space in found.namespaces() for part in found.keys(space))
            pages = (page for space, part in keys for page in found.pages(part, space, vectors=False))
            return sum(matching(where, page).true_count for page in pages)

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
            found = self._collection(collection)
            for space, keys in found.spans(span_records):
                yield Span(records=len(keys)), found.id_batch(keys, space)

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
            yield from self._collection(collection).by_ids(ids, size=batch_records, vectors=vectors)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        with self.translating(collection):
            found = self._collection(collection)
            pages = list(found.by_ids(ids, vectors=vectors))
            columns = batches.arrow_schema(found.schema, vectors=vectors)
            return pa.concat_batches(pages) if pages else pa.RecordBatch.from_pylist([], schema=columns)

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with the collection's files, or on a server with its set of ids."""
        with self.translating(collection):
            found = self._collection(collection)
            name = found.found.name
            if self.path is not None and isinstance(found.engine, LegacyFile):
                return hashlib.sha256(lite.absolute(self.path).read_bytes()).hexdigest()
            if self.snapshot_of is not None:
                original = lite.absolute(self.snapshot_of)
                return folder_fingerprint(lite.collection_folder(original, database=self.db, collection=name))
            digest = total = 0
            for space in found.namespaces():
                for keys in found.keys(space):
                    total += len(keys)
                    names = (f"{len(space)}:{space}{key}".encode() for key in keys)
                    digest += sum(map(xxhash.xxh3_128_intdigest, names))
            return f"{found.found.number}:{total}:{digest % 2**128:032x}"

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
        """Create an empty collection with its search indexes; the folder of Milvus Lite where there is none.

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
            made = new_collection(
                schema, is_lite=server.client.is_lite, document_field=self.document_field, where=where
            )
            server.create(made)
            if schema.has_namespaces:
                server.create_partition(schema.name, NAMESPACES_MARK)

    def drop(self, collection: str) -> None:
        """Remove a collection, all its records and its aliases."""
        with self.translating(collection):
            server = self._writable()
            server.drop(self._collection(collection).found.name)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch, each record replacing what was under its id.

        What Milvus would refuse or change is refused before anything is written.
        """
        if not batch.num_rows:
            return
        with self.translating(collection):
            server = self._writable()
            self._collection(collection).write(batch, server)

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self.translating(collection):
            server = self._writable()
            self._collection(collection).delete(ids, server)

    def finish_load(self, collection: str) -> None:
        """Seal what was written, so that Milvus builds its search indexes."""
        with self.translating(collection):
            server = self._writable()
            server.flush(self._collection(collection).found.name)

    # ── search, aliases ──────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)`: squared Euclidean, 1 - cosine or the negative dot product."""
        with self.translating(collection):
            found = self._collection(collection, indexes=True)
            if where is not None or not found.is_searched_by(name):
                raise self._unsupported(
                    f"search by vector {name or '(default)'}, or with a filter", collection
                )
            return found.search(vector, name=name, limit=limit)

    def aliases(self, collection: str) -> list[str]:
        """Return the aliases that point at a collection."""
        with self.translating(collection):
            server = self._writable()
            return server.aliases(self._collection(collection).found.name)

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection, atomically; every method takes it in place of the name."""
        with self.translating(collection):
            server = self._writable()
            server.set_alias(alias, self._collection(collection).found.name)

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:  # noqa: ARG002
        """Return the schema, marked where its fields come from a Milvus: then all of its values fit them.

        Raises
        ------
        UnsupportedOperationError
            The store is a single file, which is only read.
        """
        self._check_writable()
        if "milvus" not in schema.options:
            return schema
        own = {**schema.options["milvus"], "holds_its_values": True}
        return schema.model_copy(update={"options": {**schema.options, "milvus": own}})

    @property
    def shares_ids(self) -> bool:
        """Return False: Milvus takes a key once a collection, whatever its partition."""
        return False

    def accepts_namespace(self, name: str) -> bool:
        """Whether a partition may have this name; "" is the default one."""
        return accepts_namespace(name)

    def exact_kinds(self, schema: CollectionSchema) -> frozenset[str]:
        """Return all kinds of value; where the fields are made for others, without null and {}.

        A field of a type of its own takes only what it holds exactly: other values are refused.
        """
        kinds = {kind.value for kind in ValueKind}
        if holds_all_metadata(schema):
            return frozenset(kinds)
        return frozenset(kinds - {ValueKind.NULL.value, ValueKind.NO_FIELDS.value})

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
        if kind is CollectionNotFoundError:
            with contextlib.suppress(MigrationError):
                advice = f"there are: {', '.join(self.list_collections()) or 'none'}"
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
        UnsupportedOperationError
            It is a single file.
        """
        with self._lock:
            if self._server is None:
                self._server = Server(self._client(), load_seconds=self.load_seconds)
            return self._server

    def _client(self) -> Client:
        token, target = None, f"{self.host}:{self.port}"
        if self.path is not None:
            self._check_writable()
            where = lite.absolute(self.path)
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

    def _check_writable(self) -> None:
        if self.path is not None and lite.is_legacy_file(lite.absolute(self.path)):
            raise UnsupportedOperationError(
                f"{self.address()} is a single file, as Milvus Lite 2 made them: it is only read; write to a "
                "folder or a server",
                store=self.kind,
            )

    def _collection(self, name: str, *, indexes: bool = False) -> Collection:
        where = self.address(name)
        if not self._is_there():
            raise CollectionNotFoundError(
                f"{where} isn't there: no folder or file of Milvus Lite's at its path; there are: none",
                store=self.kind,
                collection=name,
            )
        engine, document = self._engine(), self.document_field
        found = engine.describe(name, indexes=indexes)
        if document is None and isinstance(engine, LegacyFile):
            document = engine.document_key(found)
        layout = layout_of(found, document_field=document, where=where)
        return Collection(engine, found, layout, namespace=self.namespace, where=where)
