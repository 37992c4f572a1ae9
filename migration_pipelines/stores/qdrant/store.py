"""QdrantStore: collections of a Qdrant server, or of a folder or memory of the client's local mode.

How it reads: by scroll from id to id, integers in ascending order, then UUIDs. A span is the ids that it
begins and ends with, which hold whatever is written or deleted meanwhile; what comes in between the spans
later is not in them. A folder's points are pickles: they are read as data, from a copy, and nothing of them
is run. A folder that another process has open is read as it stands; its lock is left alone.

How it writes: whole points, with `wait=true`. While a load runs the collection isn't indexed; after it the
optimizer builds its indexes by the settings that were declared, in its own time. A folder is written to by
the client, which runs what the pickles in it say: they are all looked at first, and a folder with anything
but points is refused. Local mode is for small data and knows nothing of indexes, quantisation, shards and
storage on disk.

The payload is the record's metadata, with the document under the key `document_field`: collections written
by LangChain are read with `?document_field=page_content`, and its `metadata` is a field as any other.
Without that, nothing is lost: the text stays in the metadata.

With a `grpc_port` a server's points go by gRPC, and all else by HTTP; what is read and written is the same.
Both were tried on a server, Qdrant 1.18.3. One without a cluster refuses to create shards by key.

What `fingerprint` misses: of a folder, nothing. Of a server and of memory it takes the ids, and misses an
update in place, as Qdrant tells no version.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import PositiveFloat, PrivateAttr, SecretStr, model_validator

from migration_pipelines import batch as batches
from migration_pipelines.credentials import secret as find_secret
from migration_pipelines.distances import nearest
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    DimensionMismatchError,
    MigrationError,
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
    VectorKind,
)
from migration_pipelines.snapshot import snapshot
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.qdrant import collection as settings
from migration_pipelines.stores.qdrant.conditions import OPERATORS, condition
from migration_pipelines.stores.qdrant.failures import classify
from migration_pipelines.stores.qdrant.folder import META_FILE, Folder
from migration_pipelines.stores.qdrant.grpc_server import GrpcServer
from migration_pipelines.stores.qdrant.local import MEMORY, Local
from migration_pipelines.stores.qdrant.points import (
    HELD,
    SOURCE_NORM,
    is_scaled,
    to_batch,
    to_points,
    wire_ids,
)
from migration_pipelines.stores.qdrant.scrolling import id_pages, point_pages, spans
from migration_pipelines.stores.qdrant.server import Server
from migration_pipelines.stores.qdrant.shards import by_shard, is_sharded_by_key

_PORT = 6333
_GRPC_PORT = 6334
_SERVER_OPTIONS = {"https": r"true|false", "grpc": r"true|false", "grpc_port": r"[1-9]\d{0,4}"}
_DOCUMENT = "document"
_DELETE_RECORDS = 10_000
_PAGE = 1_000  # records that are read where nobody says how many


class QdrantStore(Store):
    """A Qdrant server, or the client's local mode.

    Parameters
    ----------
    path
        Folder of the client's local mode, or `:memory:` for this process's memory; without a server's `host`.
    host, port, https
        Where a server listens for HTTP.
    grpc_port
        Where it listens for gRPC; None if its points are to go by HTTP as all else.
    api_key
        From QDRANT_API_KEY, where an address names the server.
    timeout
        Seconds that one call to a server may take.
    document_field
        Key of the payload that holds a record's document.
    snapshot_of
        The folder that `path` is a copy of; set by `for_reading`.
    """

    kind: ClassVar[str] = "qdrant"
    typical_write_bytes_per_second: ClassVar[float] = 35e6
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset({IdKind.INT, IdKind.UUID}),
        mixed_ids=True,
        max_id_bytes=None,
        empty_ids=False,
        id_text_refuses="",
        vector_kinds=frozenset(VectorKind),
        dtypes=frozenset({DType.FLOAT32, DType.FLOAT16, DType.UINT8}),
        max_dimensions=65_535,  # documented with `VectorParams.size`
        named_vectors=True,
        missing_vectors=True,
        non_finite_vectors=False,
        metrics=frozenset({Metric.COSINE, Metric.DOT, Metric.EUCLIDEAN, Metric.MANHATTAN}),
        documents=True,
        document_refuses="",
        value_kinds=HELD,
        no_metadata=False,
        namespaces=False,
        deletes=True,
        aliases=True,
        stable_scan=True,
        conditional_write=False,
        filter_operators=OPERATORS,
        max_batch_records=None,
        max_batch_bytes=None,  # a batch goes out in requests that keep to the server's 32 MB
        round_trip={
            "vector": "cosine: within 1e-6, as Qdrant keeps only the direction; else bit for bit",
            "float": "about one in ten of more than 15 digits comes back one unit in the last place off",
            "no metadata": "{}",
        },
    )

    path: str | None = None
    host: str | None = None
    port: int = _PORT
    https: bool = False
    grpc_port: int | None = None
    api_key: SecretStr | None = None
    timeout: PositiveFloat = 60.0
    document_field: str = _DOCUMENT
    snapshot_of: str | None = None

    _server: Server | None = PrivateAttr(default=None)
    _local: Local | None = PrivateAttr(default=None)
    _folder: Folder | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.path) == bool(self.host):
            raise ConfigurationError("a Qdrant store is either a folder (`path`) or a server (`host`)")
        if not self.document_field or self.document_field == SOURCE_NORM:
            raise ConfigurationError(f"the document can't lie under the key {self.document_field!r}")
        # A header that can't be sent would be quoted in the error.
        if self.api_key and not re.fullmatch(r"[!-~]+", self.api_key.get_secret_value()):
            raise ConfigurationError(
                "QDRANT_API_KEY holds blanks or other characters that a header can't carry"
            )
        return self

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection of `qdrant:folder#name` or `qdrant://host:port/name`."""
        options: dict[str, Any] = dict(address.query)
        patterns = _SERVER_OPTIONS if address.host else {}
        known = {name for name, pattern in patterns.items() if re.fullmatch(pattern, options.get(name, ""))}
        if options.keys() - known - {"document_field"}:
            raise ConfigurationError(
                f"{address}: expected none but the options document_field=… and, of a server, https=true, "
                "grpc=true and grpc_port=… after the ?"
            )
        if options.pop("grpc", "true" if "grpc_port" in options else "false") == "true":
            options.setdefault("grpc_port", _GRPC_PORT)
        if address.host is None:
            if not address.path:
                raise ConfigurationError(f"{address} names no folder: expected qdrant:./folder#collection")
            return cls(path=address.path, **options), address.collection
        secret = address.password or find_secret("QDRANT_API_KEY").strip()
        store = cls(
            host=address.host,
            port=address.port or _PORT,
            api_key=SecretStr(secret) if secret else None,
            **options,
        )
        return store, address.path or address.collection

    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of a collection in it; a copy has its original's."""
        query = {} if self.document_field == _DOCUMENT else {"document_field": self.document_field}
        if self.path is not None:
            folder = self.snapshot_of or self.path
            return str(Address(kind=self.kind, path=folder, collection=collection, query=query))
        query |= {"https": "true"} if self.https else {}
        if self.grpc_port is not None:
            query |= {"grpc": "true"} if self.grpc_port == _GRPC_PORT else {"grpc_port": str(self.grpc_port)}
        where = Address(kind=self.kind, host=self.host, port=self.port, path=collection or "", query=query)
        return str(where)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of all collections, sorted; none where there is no folder yet."""
        with self.translating():
            return sorted(self._reader().names())

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of, and in its options what else Qdrant was told of it."""
        with self.translating(collection):
            return self._schema(collection)

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records; with a filter, by reading all but their vectors."""
        with self.translating(collection):
            if where is None:
                return self._reader().count(collection)
            pages = self._pages(collection, {}, batch_records=_PAGE, where=where, vectors=False)
            return sum(matching(where, page).true_count for page in pages)

    def split(
        self,
        collection: str,
        *,
        span_records: int,
        where: Filter | None = None,  # noqa: ARG002 - the spans are of all records
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans from one id to another, both within, in Qdrant's order of ids."""
        with self.translating(collection):
            for span in spans(self._reader(), collection, span_records):
                yield span, None

    def scan(
        self,
        collection: str,
        span: Span,
        *,
        ids: pa.RecordBatch | None = None,  # noqa: ARG002 - the bounds say it all
        batch_records: int,
        where: Filter | None = None,
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records from a span's first id to its last, in Qdrant's order."""
        with self.translating(collection):
            yield from self._pages(
                collection, span.bounds, batch_records=batch_records, where=where, vectors=vectors
            )

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        with self.translating(collection):
            schema, wanted = self._schema(collection), wire_ids(ids)
            found: list[pa.RecordBatch] = []
            for start in range(0, len(wanted), _PAGE):
                points = self._reader().retrieve(collection, wanted[start : start + _PAGE], vectors=vectors)
                found.append(self._to_batch(points, schema, vectors=vectors))
            if found:
                return pa.concat_batches(found)
            return pa.RecordBatch.from_pylist([], schema=batches.arrow_schema(schema, vectors=vectors))

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with a folder's files, or with the set of ids elsewhere."""
        with self.translating(collection):
            if self._is_folder:
                return Folder(self._original(), shown=self.address()).fingerprint(collection)
            count = total = 0
            for page in id_pages(self._reader(), collection):
                count += len(page)
                total += sum(xxhash.xxh3_128_intdigest(repr(point_id).encode()) for point_id in page)
            return f"{count}:{total % 2**128:032x}"

    def for_reading(self, scratch: Path) -> Self:
        """Return a store on a copy of the folder under `scratch`.

        SQLite rolls back what a killed writer left in the middle, which it may do in a copy only.

        Raises
        ------
        StoreUnavailableError
            There is no folder of Qdrant's.
        TransientError, DiskFullError
            The folder changed while it was copied, or the copy doesn't fit.
        """
        if not self._is_folder or self.snapshot_of is not None:
            return self
        with self.translating():
            copy = snapshot(self._original(), scratch)
        return type(self)(path=str(copy), snapshot_of=self.path, document_field=self.document_field)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:  # noqa: ARG002
        """Return the schema with a metric for each vector, which Qdrant has no default of."""
        vectors = tuple(
            field.model_copy(update={"metric": field.metric or Metric.EUCLIDEAN}) for field in schema.vectors
        )
        return schema.model_copy(update={"vectors": vectors})

    def create(self, schema: CollectionSchema) -> None:
        """Create an empty collection with its shards and the indexes of its payload.

        Qdrant advises to make those before the first record: the vectors' index is built upon them.
        """
        body = settings.creation(schema, where=self.address(schema.name))
        own = schema.options.get(settings.OPTIONS, {})
        with self.translating(schema.name):
            writer = self._writer()
            writer.create(schema.name, body)
            if not isinstance(writer, Server):
                return
            try:
                for key in own.get(settings.SHARD_KEYS, ()):
                    writer.create_shard_key(schema.name, key)
                for field, index in own.get(settings.PAYLOAD_SCHEMA, {}).items():
                    writer.create_index(schema.name, field, index)
            except Exception:
                # Half a collection would stand in the way of the next attempt.
                with contextlib.suppress(Exception):
                    writer.drop(schema.name)
                raise

    def drop(self, collection: str) -> None:
        """Remove a collection, its records and the aliases that point at it."""
        with self.translating(collection):
            self._reader().info(collection)  # Qdrant doesn't say that one isn't there
            if target := self._reader().aliases().get(collection):
                raise ConfigurationError(
                    f"{self.address(collection)} is an alias of {target}: name that instead"
                )
            self._writer().drop(collection)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch, each record replacing what was under its id.

        What Qdrant would refuse or change is refused before anything is written.
        """
        if not batch.num_rows:
            return
        with self.translating(collection):
            schema, where = self._schema(collection), self.address(collection)
            batch = batches.conform(batch, schema, where=where)
            parts = [(None, batch)]
            if is_sharded_by_key(schema):
                parts = list(by_shard(batch, where=where))
            writer = self._writer()
            encoded = writer.encoded if isinstance(writer, GrpcServer) else to_points
            points = [
                (key, encoded(part, schema, document_field=self.document_field, where=where))
                for key, part in parts
            ]
            for key, found in points:
                writer.upsert(collection, found, key)

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self.translating(collection):
            self._reader().info(collection)
            wanted = wire_ids(ids)
            for start in range(0, len(wanted), _DELETE_RECORDS):
                self._writer().delete(collection, wanted[start : start + _DELETE_RECORDS])

    def begin_load(self, collection: str) -> None:
        """Keep a server from indexing the collection's vectors until `finish_load`."""
        self._set_threshold(collection, is_paused=True)

    def finish_load(self, collection: str) -> None:
        """Let a server index the collection's vectors as declared, which it does in its own time."""
        self._set_threshold(collection, is_paused=False)

    def _set_threshold(self, collection: str, *, is_paused: bool) -> None:
        with self.translating(collection):
            info = self._reader().info(collection)
            found = settings.paused_threshold(info) if is_paused else settings.resumed_threshold(info)
            writer = self._writer() if self.host else None
            if isinstance(writer, Server) and found is not None:
                writer.change(collection, {"optimizers_config": {"indexing_threshold": found}})

    # ── search, aliases ──────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)`: by a server's index, or by looking at every record.

        The latter in local mode, which has no index, and with a filter, which has to be right to the record.
        """
        with self.translating(collection):
            schema, query = self._schema(collection), np.asarray(vector, np.float32).reshape(-1)
            reader = self._reader()
            if where is not None or not isinstance(reader, Server):
                pages = self._pages(collection, {}, batch_records=_PAGE, where=where, vectors=True)
                right = pages if where is None else (page.filter(matching(where, page)) for page in pages)
                return nearest(right, query, schema, name=name, limit=limit, where=self.address(collection))
            field = next((field for field in schema.vectors if field.name == name), None)
            if field is not None and field.dimensions not in (None, len(query)):
                raise DimensionMismatchError(
                    f"{self.address(collection)}: the query has {len(query)} dimensions, vector "
                    f"{name or '(default)'} has {field.dimensions}",
                    expected=field.dimensions,
                    found=len(query),
                )
            body = {"query": query.tolist(), "limit": limit} | ({"using": name} if name else {})
            found = reader.search(collection, body)
        metric = field.metric if field is not None else None
        return [(_typed(point["id"]), _distance(point["score"], metric)) for point in found]

    def aliases(self, collection: str) -> list[str]:
        """Return the aliases that point at a collection."""
        with self.translating(collection):
            self._reader().info(collection)
            return sorted(alias for alias, name in self._reader().aliases().items() if name == collection)

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection, in one step with taking it from another."""
        with self.translating(collection):
            self._writer().set_alias(alias, collection)

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def accepts_key(self, key: str) -> bool:
        """Whether a metadata field may have this name: none of the two keys that are the store's own."""
        return key not in (self.document_field, SOURCE_NORM)

    def vector_tolerance(self, schema: CollectionSchema) -> float:
        """Return 0, but 1e-6 under cosine, where Qdrant keeps directions, and 2e-3 of a float16's."""
        scaled = {field.dtype for field in schema.vectors if is_scaled(field)}
        return 2e-3 if DType.FLOAT16 in scaled else 1e-6 if scaled else 0.0

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close the connections, or leave the folder's client, which its last user closes."""
        with self._lock:
            server, self._server = self._server, None
            local, self._local = self._local, None
            self._folder = None
        if server is not None:
            server.close()
        if local is not None:
            local.close()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error of `errors.py` for what the server, the client, httpx or SQLite said."""
        kind, advice = classify(error)
        if kind is CollectionNotFoundError and collection is not None:
            with contextlib.suppress(MigrationError):
                advice = f"there are: {', '.join(self.list_collections()) or 'none'}"
        found = str(error)[:500] or type(error).__name__
        if self.api_key is not None:
            found = found.replace(self.api_key.get_secret_value(), "***")
        facts: dict[str, Any] = {"store": self.kind, "collection": collection}
        retry_after = getattr(error, "retry_after", None)
        if retry_after is not None:
            facts["retry_after_seconds"] = retry_after
        return kind(f"{self.address(collection)}: {found}; {advice}", **facts)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def _is_folder(self) -> bool:
        return self.path is not None and self.path != MEMORY

    def _original(self) -> Path:
        """Return the folder that is spoken of, which is there; a copy's is its original."""
        path = _absolute(self.snapshot_of or self.path or "")
        if not (path / META_FILE).is_file():
            is_there = "holds none" if path.is_dir() else "is not there"
            raise StoreUnavailableError(
                f"{self.address()}: expected a folder with the {META_FILE} of Qdrant's local "
                f"mode; {path} {is_there}",
                store=self.kind,
            )
        return path

    def _reader(self) -> Server | Local | Folder:
        if not self._is_folder:
            return self._writer()
        with self._lock:
            if self._folder is None:
                is_copy = self.snapshot_of is not None
                self._folder = Folder(_absolute(self.path or ""), shown=self.address(), is_copy=is_copy)
            return self._folder

    def _writer(self) -> Server | Local:
        with self._lock:
            if self.host is not None:
                self._server = self._server or self._open_server()
                return self._server
            if self._local is None:
                folder = _absolute(self.path or "") if self._is_folder else None
                check = (lambda: None) if folder is None else Folder(folder, shown=self.address()).check
                self._local = Local(folder, check=check)
            return self._local

    def _open_server(self) -> Server:
        assert self.host is not None
        host = f"[{self.host}]" if ":" in self.host else self.host
        url = f"{'https' if self.https else 'http'}://{host}:{self.port}"
        key = self.api_key.get_secret_value() if self.api_key else None
        if self.grpc_port is None:
            return Server(url, key=key, timeout=self.timeout, pace=self.pace)
        target = f"{host}:{self.grpc_port}"
        return GrpcServer(url, target, key=key, timeout=self.timeout, pace=self.pace)

    def _schema(self, collection: str) -> CollectionSchema:
        reader = self._reader()
        schema = settings.schema_of(collection, reader.info(collection))
        if isinstance(reader, Server) and is_sharded_by_key(schema):
            return settings.schema_of(collection, reader.info(collection), reader.shard_keys(collection))
        return schema

    def _pages(
        self,
        collection: str,
        bounds: Mapping[str, Any],
        *,
        batch_records: int,
        where: Filter | None,
        vectors: bool,
    ) -> Iterator[pa.RecordBatch]:
        schema = self._schema(collection)
        body: dict[str, Any] = {"limit": batch_records, "with_payload": True, "with_vector": vectors}
        asked = condition(where, reserved=frozenset({self.document_field, SOURCE_NORM}))
        # In strict mode a filter on a field without an index may be refused.
        if asked is not None and "strict_mode_config" not in schema.options.get(settings.OPTIONS, {}):
            body["filter"] = asked
        for points in point_pages(self._reader(), collection, bounds, body):
            yield self._to_batch(points, schema, vectors=vectors)

    def _to_batch(self, points: Any, schema: CollectionSchema, *, vectors: bool) -> pa.RecordBatch:
        return to_batch(points, schema, document_field=self.document_field, vectors=vectors)


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _typed(point_id: int | str) -> batches.RecordId:
    return point_id if isinstance(point_id, int) else batches.typed_id(point_id, IdKind.UUID.value)


def _distance(score: float, metric: Metric | None) -> float:
    """Return a distance for Qdrant's score, of which more is nearer under cosine and dot product."""
    if metric is Metric.COSINE:
        return 1.0 - score
    return -score if metric is Metric.DOT else score
