"""PostgreSQL with the extension pgvector: a collection is a table.

Tables that this tool makes and tables that it finds are read and written alike; which column is what is in
`tables.py`. Everything that is moved goes by COPY BINARY, which keeps vectors bit for bit.

What `fingerprint` misses: nothing that a transaction changes; but a restored dump, a table rewritten by
VACUUM FULL with old transaction ids frozen, or 2**32 transactions between two looks read as a change or, the
last, could hide one. A view has no transaction ids: there every column is hashed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import PrivateAttr, SecretStr

from migration_pipelines.credentials import secret as find_secret
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    MigrationError,
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
    ValueKind,
    VectorKind,
)
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.pgvector import errors, queries, wire
from migration_pipelines.stores.pgvector import index as indexes
from migration_pipelines.stores.pgvector import table as tables
from migration_pipelines.stores.pgvector.copying import copy, received
from migration_pipelines.stores.pgvector.pool import Pool
from migration_pipelines.stores.pgvector.rows import Rows, find_rows, id_literal
from migration_pipelines.stores.pgvector.schema import create_table, extension_schema
from migration_pipelines.stores.pgvector.search import nearest
from migration_pipelines.stores.pgvector.table import Mapped
from migration_pipelines.stores.pgvector.values import CHANGED_BY_JSONB

_NOT_IN_JSONB = CHANGED_BY_JSONB | {ValueKind.NUL_TEXT}
_PACK_RECORDS = 1000
_FETCH_IDS = 4000
_ROLES = ("id", "vector", "document", "metadata")
# A server that is gone without a word is noticed after a minute and a half, and not waited for.
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 6}
_TLS = ("sslmode", "sslrootcert", "sslcert", "sslkey")


class PgVectorStore(Store):
    """A database of PostgreSQL.

    Parameters
    ----------
    host
        Host, or the folder of a Unix socket. Where host, user or database are None, libpq's own defaults
        and environment variables hold.
    id_column, vector_column, document_column, metadata_column
        Columns of a table with other names; None finds them, "" says that there is none. With
        `metadata_column="*"` every other column is a metadata field.
    index_memory_mb
        Most that an index build may ask of the server, as `maintenance_work_mem`.
    index_workers
        Most parallel workers of an index build.
    """

    kind: ClassVar[str] = "pgvector"
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset(IdKind),
        mixed_ids=False,
        # A third of a page less heads: a B-tree takes no longer key.
        max_id_bytes=2690,
        empty_ids=True,
        id_text_refuses="\0",
        vector_kinds=frozenset({VectorKind.DENSE, VectorKind.SPARSE}),
        dtypes=frozenset({DType.FLOAT32, DType.FLOAT16, DType.BIT}),
        max_dimensions=16_000,
        named_vectors=True,
        missing_vectors=True,
        non_finite_vectors=False,
        metrics=frozenset(Metric),
        documents=True,
        document_refuses="\0",
        value_kinds=frozenset(ValueKind),
        no_metadata=True,
        namespaces=False,
        deletes=True,
        aliases=False,
        stable_scan=True,
        conditional_write=False,
        filter_operators=frozenset(),
        max_batch_records=None,
        max_batch_bytes=None,
        round_trip={
            "metadata": "exact; jsonb turns -0.0 into 0.0 and floats from 1e16 into integers, and refuses "
            "NUL: where the source has these, the column is json",
            "vectors": "bit for bit; NaN, infinities and entries of 0 in sparse vectors are refused",
        },
    )

    host: str | None = None
    port: int | None = None
    user: str | None = None
    database: str | None = None
    password: SecretStr | None = None
    sslmode: str | None = None
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    connect_timeout_seconds: int = 10
    id_column: str | None = None
    vector_column: str | None = None
    document_column: str | None = None
    metadata_column: str | None = None
    index_memory_mb: int = 2048
    index_workers: int = 2

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _opened: Pool | None = PrivateAttr(default=None)
    _known: dict[str, Rows] = PrivateAttr(default_factory=dict)
    _conflicting: set[str] = PrivateAttr(default_factory=set)

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the table that `pgvector://user@host:5432/db/table` names."""
        query = dict(address.query)
        unknown = set(query) - {"host", *_ROLES, *_TLS}
        if unknown:
            raise ConfigurationError(
                f"pgvector: unknown option {', '.join(sorted(unknown))} in the address; there are: host, "
                f"{', '.join((*_ROLES, *_TLS))}"
            )
        database, _, table = address.path.partition("/")
        password = address.password or find_secret("PGVECTOR_PASSWORD", "PGPASSWORD")
        store = cls(
            host=query.pop("host", None) or address.host,
            port=address.port,
            user=address.user,
            database=database or None,
            password=SecretStr(password) if password else None,
            **{f"{role}_column": query[role] for role in _ROLES if role in query},
            **{name: query[name] for name in _TLS if name in query},
        )
        return store, table or address.collection

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Return the store of a `postgresql://` URL, such as an environment variable holds.

        Raises
        ------
        ConfigurationError
        """
        scheme, separator, rest = url.partition("://")
        if scheme not in ("postgresql", "postgres") or not separator:
            raise ConfigurationError(
                "the URL of PostgreSQL isn't of the form postgresql://user@host:5432/database"
            )
        return cls.from_address(Address.parse(f"pgvector://{rest}"))[0]

    def address(self, collection: str | None = None) -> str:
        """Return the address, with the columns that it names and without the password."""
        socket = self.host if self.host and self.host.startswith("/") else None
        named = {role: getattr(self, f"{role}_column") for role in _ROLES}
        options = {"host": socket, **named, **{name: getattr(self, name) for name in _TLS}}
        address = Address(
            kind=self.kind,
            user=self.user,
            host=None if socket else self.host or ("localhost" if self.user is None else None),
            port=self.port,
            path="/".join((self.database or "", collection) if collection else (self.database or "",)),
            query={name: value for name, value in options.items() if value is not None},
        )
        return str(address)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the tables with a vector column; those of another schema as `schema.table`."""
        with self.translating(), self._pool.transaction(read_only=True) as connection:
            return tables.list_tables(connection)

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the table is made of; its search indexes are among the options."""
        with self.translating(collection), self._pool.transaction(read_only=True) as connection:
            rows = self._look_up(connection, collection)
        table = rows.table
        options: dict[str, Any] = {"metadata_type": table.metadata.type if table.metadata else None}
        if rows.indexes:
            options["indexes"] = {name: index.definition for name, index in rows.indexes.items()}
        if table.fields:
            options["fields"] = [column.name for column in table.fields]
        return rows.schema.model_copy(update={"options": options})

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records, of a filter by reading all of them without their vectors."""
        if where is not None:
            parts = self.scan(collection, Span(records=0), batch_records=_PACK_RECORDS, vectors=False)
            return sum(matching(where, part).true_count for part in parts)
        with self._reading(collection) as (connection, rows):
            return queries.count(connection, rows.table)

    def split(
        self,
        collection: str,
        *,
        span_records: int,
        where: Filter | None = None,  # noqa: ARG002 - counted by the caller
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield ranges of the id, in the column's own order; the first and the last are open.

        So every id is in one of them, whatever is written later. They hold as long as the column's order
        does: for text in a collation of the operating system, until that is upgraded.
        """
        with self._reading(collection, snapshot=True) as (connection, rows):
            bounds, records = queries.bounds(connection, rows.table, every=span_records, where=rows.where)
        edges = [None, *bounds, None]
        for lowest, below in pairwise(edges):
            held = min(records, span_records)
            records -= held
            yield Span(bounds={"from": lowest, "below": below}, records=held), None

    def scan(
        self,
        collection: str,
        span: Span,
        *,
        ids: pa.RecordBatch | None = None,  # noqa: ARG002 - bounds say which
        batch_records: int,
        where: Filter | None = None,  # noqa: ARG002 - not pushed down
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of a range of ids in no order, as one statement sees them."""
        with self._reading(collection) as (connection, rows):
            column, values = rows.table.id, []
            conditions = []
            for key, comparison in (("from", ">="), ("below", "<")):
                if span.bounds.get(key) is not None:
                    conditions.append(f"{column.quoted} {comparison} %s::{column.type}")
                    values.append(span.bounds[key])
            statement = rows.copy_out(
                f"WHERE {' AND '.join(conditions)}" if conditions else "", vectors=vectors
            )
            with copy(connection, statement, values) as stream:
                for group in wire.row_groups(received(stream), max_records=batch_records):
                    yield rows.unpack(group, vectors=vectors)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids."""
        found = []
        with self._reading(collection) as (connection, rows):
            statement = rows.copy_out(queries.with_ids(rows.table), vectors=vectors)
            for start in range(0, ids.num_rows, _FETCH_IDS):
                wanted = id_literal(ids.slice(start, _FETCH_IDS), rows.table)
                with copy(connection, statement, [wanted]) as stream:
                    groups = wire.row_groups(received(stream), max_records=_FETCH_IDS)
                    found += [rows.unpack(group, vectors=vectors) for group in groups]
        return pa.concat_batches(found) if found else rows.empty(vectors=vectors)

    def fingerprint(self, collection: str) -> str:
        """Return the count and a sum over hashes of each id with the transaction that wrote it."""
        with self._reading(collection) as (connection, rows):
            return queries.fingerprint(connection, rows.table)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Create a table with the columns of a batch, and the extension if it isn't there."""
        metadata_type = schema.options.get("metadata_type") or "jsonb"
        if metadata_type not in ("json", "jsonb"):
            raise ConfigurationError(
                f"{self.address(schema.name)}: metadata_type is json or jsonb, not {metadata_type!r}"
            )
        with self.translating(schema.name), self._pool.transaction() as connection:
            create_table(connection, schema, metadata_type=metadata_type, where=self.address(schema.name))
        self._forget(schema.name)

    def drop(self, collection: str) -> None:
        """Drop the table."""
        with self.translating(collection), self._pool.transaction() as connection:
            table = self._rows(connection, collection).table
            connection.execute(f"DROP TABLE {table.quoted}".encode(), [])
        self._forget(collection)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch in one COPY and one commit; rows that are there are deleted in the same transaction.

        Most batches of a migration replace nothing: the delete is left out until an id is found taken.
        """
        import psycopg

        with self.translating(collection):
            if collection not in self._conflicting:
                try:
                    return self._copy_in(collection, batch, replace=False)
                except psycopg.errors.UniqueViolation as error:
                    if not self._is_about_id(collection, error):
                        raise
                    self._conflicting.add(collection)
            try:
                return self._copy_in(collection, batch, replace=True)
            except psycopg.errors.UniqueViolation as error:
                if not self._is_about_id(collection, error):
                    raise
                raise TransientError(
                    f"{self.address(collection)}: another session wrote the same ids meanwhile"
                ) from error

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Delete the rows of these ids."""
        with self.translating(collection), self._pool.transaction() as connection:
            queries.delete(connection, self._rows(connection, collection).table, ids)

    def begin_load(self, collection: str) -> None:
        """Check that the table is there; a table of this tool has no search index before `finish_load`."""
        with self._reading(collection):
            return

    def finish_load(self, collection: str) -> None:
        """Build the search indexes of a table of this tool, and its statistics; leave other tables alone."""
        with self._reading(collection) as (connection, rows):
            table = rows.table
            if table.made is None:
                return
            extension = extension_schema(connection, where=rows.where)
            there = indexes.find_indexes(connection, table)
            records = queries.count(connection, table)
        limits = {"max_memory_mb": self.index_memory_mb, "workers": self.index_workers}
        for field in rows.schema.vectors:
            planned = indexes.plan_index(table, field, rows=records, extension=extension)
            if planned is not None and field.name not in there:
                with self.translating(collection):
                    indexes.build(self._pool, table, planned, **limits)
        with self.translating(collection), self._pool.transaction() as connection:
            connection.execute(f"ANALYZE {table.quoted}".encode(), [])

    # ── search ───────────────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest ids; with a filter by reading in order of distance until enough match."""
        with self._reading(collection) as (connection, rows):
            if name not in rows.table.vectors:
                raise ConfigurationError(
                    f"{self.address(collection)}: no vector {name!r}; there are {sorted(rows.table.vectors)}"
                )
            return nearest(connection, rows, rows.vector(name), vector, limit=limit, where=where)

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:
        """Return the schema with metadata as `jsonb`, or as `json` where `jsonb` would change a value."""
        found = {ValueKind(kind) for counts in kinds.values() for kind, count in counts.items() if count}
        verbatim = bool(found & _NOT_IN_JSONB) or any("\0" in key for key in kinds)
        return schema.model_copy(update={"options": {"metadata_type": "json" if verbatim else "jsonb"}})

    def exact_kinds(self, schema: CollectionSchema) -> frozenset[str]:
        """Return the kinds that the metadata column keeps; an SQL NULL in a field's own column is no null."""
        kinds = set(self.capabilities.value_kinds)
        if schema.options.get("metadata_type", "jsonb") != "json":
            kinds -= _NOT_IN_JSONB
        if schema.options.get("fields"):
            kinds.discard(ValueKind.NULL)
        return frozenset(kind.value for kind in kinds)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close the connections that nobody uses, and forget the tables."""
        with self._lock:
            pool, self._opened = self._opened, None
            self._known.clear()
        if pool is not None:
            pool.close()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the project's error for PostgreSQL's."""
        if collection is not None:
            # The table may be another by now.
            self._known.pop(collection, None)
        where = self.address(collection)
        found = errors.translate(error, where=where, secret=self._secret)
        if isinstance(found, CollectionNotFoundError):
            return tables.not_found(where, self.list_collections())
        return found

    @property
    def _secret(self) -> str | None:
        return self.password.get_secret_value() if self.password else None

    @property
    def _pool(self) -> Pool:
        with self._lock:
            if self._opened is None:
                options = {
                    "host": self.host,
                    "port": self.port,
                    "user": self.user,
                    "dbname": self.database,
                    "password": self._secret,
                    **{name: getattr(self, name) for name in _TLS},
                }
                self._opened = Pool(
                    {
                        **{name: value for name, value in options.items() if value is not None},
                        "connect_timeout": self.connect_timeout_seconds,
                        **_KEEPALIVES,
                        "application_name": "migration_pipelines",
                        "client_encoding": "UTF8",
                    }
                )
            return self._opened

    @contextmanager
    def _reading(self, collection: str, *, snapshot: bool = False) -> Iterator[tuple[Any, Rows]]:
        self.pace()
        with (
            self.translating(collection),
            self._pool.transaction(read_only=True, snapshot=snapshot) as connection,
        ):
            yield connection, self._rows(connection, collection)

    def _rows(self, connection: Any, collection: str) -> Rows:
        known = self._known.get(collection)
        return known or self._look_up(connection, collection)

    def _look_up(self, connection: Any, collection: str) -> Rows:
        mapped = Mapped(**{role: getattr(self, f"{role}_column") for role in _ROLES})
        rows = find_rows(connection, collection, mapped, where=self.address(collection))
        if rows.is_sized:
            self._known[collection] = rows
        return rows

    def _forget(self, collection: str) -> None:
        self._known.pop(collection, None)
        self._conflicting.discard(collection)

    def _copy_in(self, collection: str, batch: pa.RecordBatch, *, replace: bool) -> None:
        self.pace(batch.nbytes)
        with self._pool.transaction() as connection:
            rows = self._rows(connection, collection)
            rows.check(batch)
            if replace:
                queries.delete(connection, rows.table, batch)
            statement = f"COPY {rows.table.quoted} ({rows.written()}) FROM STDIN (FORMAT BINARY)"
            with copy(connection, statement) as stream:
                stream.write(wire.HEADER)
                for start in range(0, batch.num_rows, _PACK_RECORDS):
                    stream.write(memoryview(rows.pack(batch.slice(start, _PACK_RECORDS))))
                stream.write(wire.TRAILER)

    def _is_about_id(self, collection: str, error: Any) -> bool:
        """Whether an id was taken, and not a value of some other unique column."""
        known = self._known.get(collection)
        name = error.diag.constraint_name
        return known is None or any(name == index for index in known.table.id.unique_indexes)
