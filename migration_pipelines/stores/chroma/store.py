"""ChromaStore: collections of a Chroma folder, or of a Chroma server.

How it reads: a folder that is a source from the files of a copy (`CopiedChromaStore`, `LegacyChromaStore`).
Through Chroma's client, as servers and targets are: all ids once, then records by id in pages, since pages by
offset miss records when others are deleted meanwhile. Chroma answers in its own order; every page is put in
the order that was asked for.

How it writes: Chroma's `upsert` merges into an old record and its `add` silently leaves one as it is, so a
record that is there is deleted first. A crash between the two leaves it missing until the batch is written
again, which a migration does because the partition has no receipt.

What `fingerprint` misses: of a folder, nothing, since Chroma numbers its writes. Of a server it takes the
number of records and their ids, and misses an update in place.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
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
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    DiskFullError,
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
    VectorKind,
)
from migration_pipelines.snapshot import snapshot
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.chroma.client import (
    absolute,
    classify,
    open_folder,
    open_server,
    what_is_at,
)
from migration_pipelines.stores.chroma.file import (
    DATABASE_FILE,
    read_names,
    versions_digest,
)
from migration_pipelines.stores.chroma.legacy_files import is_legacy, legacy_collections
from migration_pipelines.stores.chroma.records import (
    HELD,
    METRICS,
    PAGE,
    accepts_key,
    all_ids,
    creation_options,
    dimensions_of,
    held_ids,
    is_property,
    metric_of,
    plain_schema,
    read_page,
    read_records,
    replace_records,
    schema_of,
    to_chroma,
)

_TENANT, _DATABASE, _PORT = "default_tenant", "default_database", 8000
_NAMES_PAGE = 1000
_ROOM_BYTES = 16 * 2**20  # a batch

# Below SQLite's limit on variables in one statement, which Chroma runs into (32,766).
_DELETE_RECORDS = 5_000


class ChromaStore(Store):
    """A Chroma folder, opened in this process, or a Chroma server.

    A folder belongs to one writing process at a time.

    Parameters
    ----------
    path
        Folder of an embedded store; it need not exist where a collection is to be created.
    host, port, ssl
        A server, in place of `path`.
    tenant, database
        Chroma's own divisions, each with collections of its own.
    token
        Sent to a server as `Authorization: Bearer` and as `x-chroma-token`; from `CHROMA_TOKEN`.
    timeout_seconds
        How long an answer of a server may take; what takes longer is a `TransientError`.
    snapshot_of
        The folder that `path` is a copy of, set by `for_reading`.
    """

    kind: ClassVar[str] = "chroma"
    # Its indexes of texts and metadata bound it: 1,100 records of 2 kB a second, whatever the batch size.
    typical_write_bytes_per_second: ClassVar[float] = 2.2e6
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset({IdKind.STR}),
        mixed_ids=False,
        max_id_bytes=None,
        empty_ids=False,
        id_text_refuses="",
        vector_kinds=frozenset({VectorKind.DENSE}),
        dtypes=frozenset({DType.FLOAT32}),
        max_dimensions=None,
        named_vectors=False,
        missing_vectors=False,
        non_finite_vectors=False,
        metrics=frozenset(METRICS.values()),
        documents=True,
        document_refuses="",
        value_kinds=HELD,
        no_metadata=True,
        namespaces=False,
        deletes=True,
        aliases=False,
        stable_scan=True,
        conditional_write=False,
        filter_operators=frozenset(),  # the walk by ids gains little from a filter
        max_batch_records=5461,  # `get_max_batch_size()` of chromadb 1.x; asked again before each write
        max_batch_bytes=16 * 2**20,  # a server takes 40 MiB of JSON (its `max_payload_size_bytes`)
        round_trip={
            "vector": "cosine: within 1e-6, as Chroma keeps direction and length apart; else bit for bit",
            "float": "about one in ten of more than 15 digits comes back one unit in the last place off",
            "-0.0": "0.0",
        },
    )

    path: str | None = None
    host: str | None = None
    port: int = _PORT
    ssl: bool = False
    tenant: str = _TENANT
    database: str = _DATABASE
    token: SecretStr | None = None
    timeout_seconds: PositiveFloat = 120.0
    snapshot_of: str | None = None

    _client: Any = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.path) == bool(self.host):
            raise ConfigurationError("a Chroma store is either a folder (`path`) or a server (`host`)")
        # A header that can't be sent would be quoted in the error.
        if self.token and not re.fullmatch(r"[!-~]+", self.token.get_secret_value()):
            raise ConfigurationError(
                "CHROMA_TOKEN holds blanks or other characters that a header can't carry"
            )
        return self

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection of `chroma:folder#name` or `chroma://host:port/name`."""
        options: dict[str, Any] = dict(address.query)
        unknown = sorted(options.keys() - {"tenant", "database", "ssl"})
        if unknown or options.get("ssl", "true") not in {"true", "false"}:
            raise ConfigurationError(
                f"{address}: expected none but the options tenant=…, database=… and ssl=true after the ?"
            )
        if address.host is None:
            if not address.path:
                raise ConfigurationError(f"{address} names no folder: expected chroma:./folder#collection")
            return cls(path=address.path, **options), address.collection
        secret = address.password or find_secret("CHROMA_TOKEN").strip()
        store = cls(
            host=address.host,
            port=address.port or _PORT,
            token=SecretStr(secret) if secret else None,
            **options,
        )
        return store, address.path or address.collection

    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of a collection in it; a copy has its original's."""
        query = {
            key: value
            for key, value, usual in (
                ("tenant", self.tenant, _TENANT),
                ("database", self.database, _DATABASE),
                ("ssl", str(self.ssl).lower(), "false"),
            )
            if value != usual
        }
        if self.path is None:
            where = Address(
                kind=self.kind, host=self.host, port=self.port, path=collection or "", query=query
            )
        else:
            folder = self.snapshot_of or self.path
            where = Address(kind=self.kind, path=folder, collection=collection, query=query)
        return str(where)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of all collections, sorted; none where there is no folder yet.

        A folder isn't opened for it: it may be somebody's source, and only be asked what is in it.
        """
        folder = absolute(self.path or "")
        if self.path is not None and is_legacy(folder):
            return sorted(legacy_collections(folder))
        if not self._is_there():
            return []
        with self.translating():
            if self.path is not None and self.snapshot_of is None and self._client is None:
                return sorted(read_names(folder, tenant=self.tenant, database=self.database))
            client, names = self._connect(), list[str]()
            while page := client.list_collections(limit=_NAMES_PAGE, offset=len(names)):
                names += [item.name for item in page]
            return sorted(names)

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of; before its first record it has no dimensions."""
        with self.translating(collection):
            return schema_of(self._collection(collection))

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records; with a filter, by reading all but their vectors."""
        with self.translating(collection):
            handle = self._collection(collection)
            if where is None:
                return int(handle.count())
            pages = (read_page(handle, texts, vectors=False) for texts in _lists(all_ids(handle), PAGE))
            return sum(matching(where, page).true_count for page in pages if page is not None)

    def split(
        self,
        collection: str,
        *,
        span_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are lists of ids, in Chroma's own order, which is the quickest to read."""
        with self.translating(collection):
            for texts in _lists(all_ids(self._collection(collection)), span_records):
                kinds = batches.constant(IdKind.STR.value, len(texts))
                columns = [pa.array(texts, pa.string()), kinds]
                ids = pa.RecordBatch.from_arrays(columns, names=[batches.ID, batches.ID_TYPE])
                yield Span(records=len(texts)), ids

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
            handle, texts = self._collection(collection), held_ids(ids)
            for start in range(0, len(texts), batch_records):
                part = texts[start : start + batch_records]
                self.pace()
                found = read_records(handle, part, vectors=vectors)
                if found is not None:
                    yield found

    def scans_at_once(self) -> int | None:
        """Return 1 for a folder: Chroma makes a Python object of every number, one thread at a time.

        A second reader gains a tenth, and takes it from the threads that write and compare.
        """
        return None if self.path is None else 1

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids, in their order; ids that aren't there are left out."""
        with self.translating(collection):
            handle = self._collection(collection)
            found = read_records(handle, held_ids(ids), vectors=vectors)
            if found is not None:
                return found
            layout = batches.arrow_schema(plain_schema(dimensions_of(handle) or 0), vectors=vectors)
            return pa.RecordBatch.from_pylist([], schema=layout)

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with any write to the collection, or with its set of ids on a server.

        On a server an update in place is missed.
        """
        with self.translating(collection):
            if self.path is not None:
                self._check_is_there(collection)
                where = {"tenant": self.tenant, "database": self.database}
                return versions_digest(self._original(), collection, **where)
            handle = self._collection(collection)
            texts = all_ids(handle)
            digest = sum(xxhash.xxh3_128_intdigest(text.encode()) for text in texts) % 2**128
            return f"{handle.id}:{len(texts)}:{digest:032x}"

    def for_reading(self, scratch: Path) -> ChromaStore:
        """Return a store on a copy of the folder under `scratch`: Chroma writes on being opened.

        Raises
        ------
        StoreUnavailableError
            There is no Chroma folder.
        TransientError, DiskFullError
            The folder changed while it was copied, or the copy doesn't fit.
        """
        if self.path is None or self.snapshot_of is not None:
            return self
        from migration_pipelines.stores.chroma.copied import CopiedChromaStore
        from migration_pipelines.stores.chroma.legacy import LegacyChromaStore

        with self.translating():
            copy = snapshot(self._original(), scratch)
        kind = CopiedChromaStore if (copy / DATABASE_FILE).is_file() else LegacyChromaStore
        division = {"tenant": self.tenant, "database": self.database}
        return kind(path=str(copy), snapshot_of=self.path, **division)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:  # noqa: ARG002
        """Return the schema with those properties as JSON text that Chroma can't hold."""
        properties = {
            key: value if is_property(value) else json.dumps(value, sort_keys=True)
            for key, value in schema.properties.items()
        }
        return schema.model_copy(update={"properties": properties})

    def create(self, schema: CollectionSchema) -> None:
        """Create an empty collection, and the folder of an embedded store where there is none."""
        where = self.address(schema.name)
        options = creation_options(schema, where=where)
        with self.translating(schema.name):
            self._connect().create_collection(schema.name, embedding_function=None, **options)

    def drop(self, collection: str) -> None:
        """Remove a collection and all its records.

        The records first: Chroma's own removal of a collection leaves their lists behind in its database,
        where later records of any collection take them over (seen in 1.5.9).
        """
        with self.translating(collection):
            handle = self._collection(collection)
            texts = all_ids(handle)
            for start in range(0, len(texts), _DELETE_RECORDS):
                handle.delete(ids=texts[start : start + _DELETE_RECORDS])
            self._connect().delete_collection(collection)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch, each record replacing what was under its id.

        What Chroma would refuse or change is refused before anything is written.
        """
        if not batch.num_rows:
            return
        with self.translating(collection):
            handle = self._collection(collection)
            where = self.address(collection)
            columns = to_chroma(batch, where=where, is_cosine=metric_of(handle) is Metric.COSINE)
            size = self._connect().get_max_batch_size()
            for start in range(0, batch.num_rows, size):
                self.pace(batch.nbytes)
                replace_records(
                    handle, {key: part[start : start + size] for key, part in columns.items()}, where=where
                )

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self.translating(collection):
            handle, texts = self._collection(collection), held_ids(ids)
            for start in range(0, len(texts), PAGE):
                handle.delete(ids=texts[start : start + PAGE])

    def begin_load(self, collection: str) -> None:
        """Check that the collection is there; Chroma has no other way to load, and indexes as it writes."""
        with self.translating(collection):
            self._collection(collection)

    def finish_load(self, collection: str) -> None:
        """Check that the collection is there."""
        self.begin_load(collection)

    # ── search ───────────────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)`: squared Euclidean, 1 - cosine or 1 - dot product."""
        if name or where is not None:
            raise self._unsupported("search by a named vector or with a filter", collection)
        with self.translating(collection):
            query = np.asarray(vector, np.float32)[np.newaxis]
            handle = self._collection(collection)
            reply = handle.query(query_embeddings=query, n_results=limit, include=["distances"])
            return list(zip(reply["ids"][0], map(float, reply["distances"][0]), strict=True))

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def accepts_key(self, key: str) -> bool:
        """Whether a metadata field may have this name; `chroma:uri` is the record's URI."""
        return accepts_key(key)

    def vector_tolerance(self, schema: CollectionSchema) -> float:
        """Return 0, but 1e-6 under cosine: Chroma divides by the length and multiplies again."""
        return 1e-6 if schema.vectors[0].metric is Metric.COSINE else 0.0

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close the client, so that the folder can be copied or removed."""
        with self._lock:
            client, self._client = self._client, None
            if client is not None:
                client.close()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error of `errors.py` for what chromadb, httpx or the file system raised."""
        kind, advice = classify(error)
        if kind is CollectionNotFoundError and collection is not None:
            with contextlib.suppress(MigrationError):
                advice = f"there are: {', '.join(self.list_collections()) or 'none'}"
        if kind is TransientError and self._has_no_room():
            kind, advice = DiskFullError, "its disk is full: make room and run again"
        found = str(error)[:500] or type(error).__name__
        if self.token is not None:
            found = found.replace(self.token.get_secret_value(), "***")
        return kind(f"{self.address(collection)}: {found}; {advice}", store=self.kind, collection=collection)

    def _is_there(self) -> bool:
        return self.path is None or (absolute(self.path) / DATABASE_FILE).is_file()

    def _has_no_room(self) -> bool:
        # Of a full disk Chroma only says that it "failed to apply logs".
        folder = None if self.path is None else absolute(self.path)
        return folder is not None and folder.is_dir() and shutil.disk_usage(folder).free < _ROOM_BYTES

    def _original(self) -> Path:
        """Return the folder that is spoken of, which is there; a copy's is its original."""
        path = self.snapshot_of or self.path
        assert path is not None
        if not (absolute(path) / DATABASE_FILE).is_file() and not is_legacy(absolute(path)):
            raise StoreUnavailableError(f"{self.address()}: {what_is_at(absolute(path))}", store=self.kind)
        return absolute(path)

    def _folder_of_client(self) -> Path:
        """Return the folder that Chroma's client may open, and write to."""
        return absolute(self.path or "")

    def _connect(self) -> Any:
        division = {"tenant": self.tenant, "database": self.database}
        with self._lock:
            if self._client is None and self.path is not None:
                self._client = open_folder(self._folder_of_client(), **division)
            elif self._client is None:
                assert self.host is not None
                token = self.token.get_secret_value() if self.token else None
                self._client = open_server(
                    self.host,
                    self.port,
                    ssl=self.ssl,
                    token=token,
                    timeout_seconds=self.timeout_seconds,
                    **division,
                )
            return self._client

    def _check_is_there(self, name: str) -> None:
        if not self._is_there():
            found = what_is_at(absolute(self.path or ""))
            raise CollectionNotFoundError(f"{self.address(name)}: {found}", store=self.kind, collection=name)

    def _collection(self, name: str) -> Any:
        # Asked to open a folder that isn't there, Chroma makes it; asked for no model, it downloads one.
        self._check_is_there(name)
        self.pace()
        return self._connect().get_collection(name, embedding_function=None)


def _lists(texts: list[str], size: int) -> Iterator[list[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
