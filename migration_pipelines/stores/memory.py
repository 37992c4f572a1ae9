"""MemoryStore: collections of this process, for tests and for trying things out.

It holds whatever a batch can express, exactly, and forgets it when the process ends. Address:
`memory:name#collection`; two stores of one name see the same collections.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.distances import nearest
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    MigrationError,
    StoreRefusedError,
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


@dataclass
class _Collection:
    schema: CollectionSchema
    rows: dict[str, pa.RecordBatch] = field(default_factory=dict)  # one record each, in order of arrival
    version: int = 0


@dataclass
class _Database:
    collections: dict[str, _Collection] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    created: int = 0  # collections ever created: a name that is used again is another collection


_DATABASES: dict[str, _Database] = {}
_LOCK = threading.RLock()


class MemoryStore(Store):
    """A named set of collections in this process's memory.

    `fingerprint` misses nothing: every write counts.

    Parameters
    ----------
    name
        Which set of collections; it comes into being on first use.
    """

    kind: ClassVar[str] = "memory"
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset(IdKind),
        mixed_ids=True,
        max_id_bytes=None,
        empty_ids=True,
        id_text_refuses="",
        vector_kinds=frozenset(VectorKind),
        dtypes=frozenset(DType),
        max_dimensions=None,
        named_vectors=True,
        missing_vectors=True,
        non_finite_vectors=True,
        metrics=frozenset(Metric),
        documents=True,
        document_refuses="",
        value_kinds=frozenset(ValueKind),
        no_metadata=True,
        namespaces=True,
        deletes=True,
        aliases=True,
        stable_scan=True,
        conditional_write=False,
        filter_operators=filters.OPERATORS,
        max_batch_records=None,
        max_batch_bytes=None,
        round_trip={},
    )

    name: str = "default"

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection of `memory:name#collection`."""
        if address.query:
            raise ConfigurationError(f"{address}: expected no options after the ?: memory has none")
        return (cls(name=address.path) if address.path else cls()), address.collection

    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of a collection in it."""
        return str(Address(kind=self.kind, path=self.name, collection=collection))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of all collections, sorted."""
        with _LOCK:
            return sorted(self._database().collections)

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection was created as."""
        with _LOCK:
            return self._found(collection).schema

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records."""
        if where is None:
            with _LOCK:
                return len(self._found(collection).rows)
        return int(matching(where, self._rows(collection)).true_count)

    def split(
        self, collection: str, *, span_records: int, where: Filter | None = None
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are lists of ids, in the order in which the records arrived."""
        records = self._rows(collection)
        if where is not None:
            records = records.filter(matching(where, records))
        for part in batches.split(records, max_records=span_records, max_bytes=None):
            yield Span(records=part.num_rows), batches.ids_of(part)

    def scan(
        self,
        collection: str,
        span: Span,
        *,
        ids: pa.RecordBatch | None = None,
        batch_records: int,
        where: Filter | None = None,
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of a span that are still there."""
        if ids is None:
            raise StoreRefusedError(f"{self.address(collection)}: span {span} comes without its list of ids")
        found = self.fetch(collection, ids, vectors=vectors)
        if where is not None:
            found = found.filter(matching(where, found))
        yield from batches.split(found, max_records=batch_records, max_bytes=None)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        return self._rows(collection, _keys(ids), vectors=vectors)

    def fingerprint(self, collection: str) -> str:
        """Return a text that every write changes."""
        with _LOCK:
            return str(self._found(collection).version)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Create an empty collection."""
        with _LOCK:
            database = self._database()
            if schema.name in database.collections or schema.name in database.aliases:
                raise CollectionExistsError(
                    f"{self.address(schema.name)} is there already; choose another name or drop it",
                    store=self.kind,
                    collection=schema.name,
                )
            database.created += 1
            # No two collections of one name share a version, however often they are written to.
            database.collections[schema.name] = _Collection(schema, version=database.created << 64)

    def drop(self, collection: str) -> None:
        """Remove a collection, its records and the aliases that point at it."""
        with _LOCK:
            self._found(collection)
            database = self._database()
            database.collections.pop(database.aliases.get(collection, collection))
            gone = [alias for alias, name in database.aliases.items() if name not in database.collections]
            for alias in gone:
                del database.aliases[alias]

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write whole records, each replacing what was under its id, all or none of them."""
        with _LOCK:
            found = self._found(collection)
            batch = batches.conform(batch, found.schema, where=self.address(collection))
            # A copy: a batch may lie over an array that the caller goes on writing to.
            batch = batch.take(pa.array(range(batch.num_rows), pa.int64()))
            rows = {key: batch.slice(row, 1) for row, key in enumerate(_keys(batch))}
            found.rows.update(rows)
            found.version += 1

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with _LOCK:
            found = self._found(collection)
            for key in _keys(ids):
                found.rows.pop(key, None)
            found.version += 1

    # ── search, aliases ──────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)` by looking at every record."""
        records = self._rows(collection)
        if where is not None:
            records = records.filter(matching(where, records))
        schema, address = self.describe(collection), self.address(collection)
        return nearest([records], vector, schema, name=name, limit=limit, where=address)

    def aliases(self, collection: str) -> list[str]:
        """Return the aliases that point at a collection."""
        with _LOCK:
            self._found(collection)
            return sorted(alias for alias, name in self._database().aliases.items() if name == collection)

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection; every method takes it in place of the name."""
        with _LOCK:
            self._found(collection)
            if alias in self._database().collections:
                raise CollectionExistsError(f"{self.address(alias)} is a collection; choose another alias")
            self._database().aliases[alias] = collection

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error for what went wrong inside: there is no driver here."""
        return StoreRefusedError(f"{self.address(collection)}: {type(error).__name__}: {error}")

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _database(self) -> _Database:
        return _DATABASES.setdefault(self.name, _Database())

    def _found(self, collection: str) -> _Collection:
        database = self._database()
        found = database.collections.get(database.aliases.get(collection, collection))
        if found is None:
            there = ", ".join(sorted(database.collections)) or "none"
            raise CollectionNotFoundError(
                f"{self.address(collection)} isn't there; there are: {there}",
                store=self.kind,
                collection=collection,
            )
        return found

    def _rows(
        self, collection: str, keys: Sequence[str] | None = None, *, vectors: bool = True
    ) -> pa.RecordBatch:
        with _LOCK:
            found = self._found(collection)
            if keys is None:
                rows = list(found.rows.values())
            else:
                rows = [found.rows[key] for key in dict.fromkeys(keys) if key in found.rows]
        columns = batches.arrow_schema(found.schema, vectors=vectors)
        if not rows:
            return pa.RecordBatch.from_pylist([], schema=columns)
        return pa.concat_batches([row.select(columns.names) for row in rows])


def _keys(batch: pa.RecordBatch) -> list[str]:
    return batches.id_keys(batch).to_pylist()  # type: ignore[no-any-return]


STORE = MemoryStore
