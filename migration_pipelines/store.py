"""Store, the contract that every vector store is written to, and the addresses that name one.

A store is one class, a frozen pydantic model of its connection, in a module or package of its own under
`stores/`. Its drivers are imported inside its methods. Whatever a driver raises leaves a store as an error of
`errors.py`: `TransientError` (retried), `RecordRejectedError` (bisected) or any other (final): the class says
what the caller does next, so a store never retries by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, PositiveFloat

from migration_pipelines import batch as batches
from migration_pipelines.errors import ConfigurationError, MigrationError, UnsupportedOperationError
from migration_pipelines.filters import Filter
from migration_pipelines.model import Capabilities, CollectionSchema, Span, Value, VectorField
from migration_pipelines.throttle import shared_throttle

_SECRET = re.compile(r"pass|secret|token|api_?key", re.IGNORECASE)
_LIMITS = ("requests_per_second", "bytes_per_second")
_SCHEME = re.compile(r"([a-z][a-z0-9_]*):(.*)", re.DOTALL)


class Address(Value):
    """A parsed address.

    `<kind>://[user@]host[:port]/path` for servers, `<kind>:path#collection` for embedded stores and files.
    A password in it is kept apart in `password`, and `str()` never shows it, nor a secret in the query.
    """

    kind: str
    user: str | None = None
    password: str | None = None
    host: str | None = None
    port: int | None = None
    path: str = ""
    collection: str | None = None
    query: Mapping[str, str] = {}

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse an address.

        Raises
        ------
        ConfigurationError
            The text isn't an address.
        """
        match = _SCHEME.fullmatch(text.strip())
        if match is None:
            raise ConfigurationError(
                f"{_without_login(text)!r} is not an address: expected <store>://host:port/collection for a "
                "server or <store>:path#collection for files, such as chroma:./chroma_db#docs"
            )
        kind, rest = match.groups()
        return cls._server(text, kind) if rest.startswith("//") else cls._files(kind, rest)

    @classmethod
    def _server(cls, text: str, kind: str) -> Address:
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError:
            raise ConfigurationError(
                f"the {kind} address can't be read: its host or port is malformed"
            ) from None
        if "@" in text and "@" not in parts.netloc:
            raise ConfigurationError(
                f"the {kind} address can't be read: its @ comes after a / ? or #; "
                "write those as %2F %3F %23 in a password, or else the @ as %40"
            )
        path = unquote(parts.path.lstrip("/"))
        return cls(
            kind=kind,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            host=unquote(parts.hostname) if parts.hostname else None,
            port=port,
            path=path,
            collection=unquote(parts.fragment) or None,
            query=dict(parse_qsl(parts.query, keep_blank_values=True)),
        )

    @classmethod
    def _files(cls, kind: str, rest: str) -> Address:
        rest, _, fragment = rest.partition("#")
        rest, _, query = rest.partition("?")
        fragment, _, late_query = fragment.partition("?")
        return cls(
            kind=kind,
            path=rest,
            collection=unquote(fragment) or None,
            query=dict(parse_qsl(query or late_query, keep_blank_values=True)),
        )

    def __str__(self) -> str:
        shown = {key: "***" if _SECRET.search(key) else value for key, value in self.query.items()}
        query = f"?{urlencode(shown, safe='*/')}" if shown else ""
        fragment = f"#{quote(self.collection, safe='')}" if self.collection else ""
        if self.host is None and self.user is None and not (self.path and self.query.get("host")):
            return f"{self.kind}:{_without_login(self.path)}{query}{fragment}"
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        host = f"[{self.host}]" if ":" in (self.host or "") else quote(self.host or "", safe="")
        port = f":{self.port}" if self.port is not None else ""
        return f"{self.kind}://{user}{host}{port}/{quote(self.path, safe='/')}{query}{fragment}"

    __repr__ = __str__


def _without_login(text: str) -> str:
    """Return the text of something like an address without a `user:password@` in it."""
    return re.sub(r"(?<=//)[^/@:]*:.*@", "***@", text, flags=re.DOTALL)


class Store(BaseModel, ABC):
    """The contract.

    All methods may raise `StoreUnavailableError`, `AuthenticationError`, `TransientError` and
    `StoreRefusedError`; those that take a collection also `CollectionNotFoundError`. What the
    capabilities don't declare raises `UnsupportedOperationError`. Stores are safe to use from several
    threads; a connection is opened on first use and closed by `close`.

    A record is named by its id and, in a collection with namespaces, its namespace: there every batch of ids
    has the column `namespace` too. A store that is bound to one namespace by its address
    (`?namespace=`) shows a collection of that namespace's records alone, which has no namespaces.

    Parameters
    ----------
    requests_per_second, bytes_per_second
        What the store may be sent at most, over all workers of the process; without a limit if None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_second: PositiveFloat | None = None
    bytes_per_second: PositiveFloat | None = None

    kind: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    # Whether what failed within `load_part` is lost as a whole, and tried again from the part's first batch.
    writes_whole_parts: ClassVar[bool] = False
    # Whether parts that are loaded into a finished collection are a part of it only from `finish_load` on.
    merges_at_the_end: ClassVar[bool] = False
    # Measured once on two cores with records of 2 kB; only an estimate before the first write rests on it.
    typical_write_bytes_per_second: ClassVar[float] = 100e6

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    @abstractmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection that an address names, secrets from the environment."""

    @abstractmethod
    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of a collection in it, without secrets."""

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def list_collections(self) -> list[str]:
        """Return the names of all collections, sorted."""

    @abstractmethod
    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of, from its configuration and as little data as is enough."""

    @abstractmethod
    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records."""

    @abstractmethod
    def split(
        self, collection: str, *, span_records: int, where: Filter | None = None
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans of about `span_records` that cover each record exactly once, and stay valid for good.

        With a span whose bounds can't say which records it holds comes the list of its ids
        (`batch.ids_of`), which the ledger keeps; it is handed back to `scan`. `span.records` counts what
        the span holds, before the filter where the store can't count the filter natively.
        """

    @abstractmethod
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
        """Yield the records of a span in batches of at most `batch_records`, each record once.

        `where` may be pushed down where the store answers at least the right records: the caller checks
        every record again. Records that are gone since `split` are left out. Without `vectors` the
        batches have no vector columns, which is faster.
        """

    def scan_all(
        self,
        collection: str,
        *,
        batch_records: int,
        span_records: int = 50_000,
        where: Filter | None = None,
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of the whole collection, span after span, as `scan` does."""
        for span, ids in self.split(collection, span_records=span_records, where=where):
            yield from self.scan(
                collection, span, ids=ids, batch_records=batch_records, where=where, vectors=vectors
            )

    def scans_at_once(self) -> int | None:
        """Return how many scans at a time are fastest; None where nothing is lost by many."""
        return None

    @abstractmethod
    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids in any order; ids that aren't there are left out."""

    def fetch_all(
        self, collection: str, ids: pa.RecordBatch, *, batch_records: int, vectors: bool = True
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of any number of ids, `fetch` by `fetch` of at most `batch_records`."""
        for part in batches.split(ids, max_records=batch_records, max_bytes=None):
            yield self.fetch(collection, part, vectors=vectors)

    @abstractmethod
    def fingerprint(self, collection: str) -> str:
        """Return a text that changes when the collection changes, as surely as the store allows.

        What it misses (a store without a version of its records may miss an update in place) is in the
        connector's docstring and in docs/limits.md.
        """

    def for_reading(self, scratch: Path) -> Store:  # noqa: ARG002 - overridden by stores that open files
        """Return the store to read a source through, which never writes the original.

        An embedded store that would write on being opened copies itself under `scratch` (made by the
        caller; reused while the original is unchanged), and its `fingerprint` still tells of the original.
        """
        return self

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def create(self, schema: CollectionSchema) -> None:
        """Create an empty collection.

        Raises
        ------
        CollectionExistsError
        """

    @abstractmethod
    def drop(self, collection: str) -> None:
        """Remove a collection and all its records."""

    @abstractmethod
    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch: whole records, each replacing what was under its id, all or none of them.

        The batch keeps to `max_batch_records` and `max_batch_bytes`; its ids are distinct. Returns only
        when the store has acknowledged every record and a read sees it. Idempotent.

        Raises
        ------
        RecordRejectedError
            The store refuses what some record holds. The caller bisects.
        DimensionMismatchError
        """

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        raise self._unsupported("delete", collection, ids)

    def load_part(
        self, collection: str, part: str
    ) -> AbstractContextManager[Callable[[pa.RecordBatch], None]]:
        """Return a context that gives the function to write one partition's batches with.

        `part` names the partition: a store that keeps files uses it, so that writing a partition again
        replaces what it wrote before. Nothing of the part needs to be visible before the context ends; of one
        in a finished collection of a store that `merges_at_the_end`, nothing before `finish_load`.
        """
        return self._load_by_upsert(collection, part)

    @contextmanager
    def _load_by_upsert(self, collection: str, part: str) -> Iterator[Callable[[pa.RecordBatch], None]]:  # noqa: ARG002
        yield lambda batch: self.upsert(collection, batch)

    def read_part(self, collection: str, part: str, ids: pa.RecordBatch) -> pa.RecordBatch:  # noqa: ARG002
        """Return what a load wrote for these ids, read from the store itself; by default `fetch`."""
        return self.fetch(collection, ids)

    def begin_load(self, collection: str) -> None:
        """Get ready for a bulk load into a collection that this tool created; may be called again."""
        self.describe(collection)  # one that isn't there is told, even where there is nothing to do

    def finish_load(self, collection: str) -> None:
        """Finish a bulk load: build search indexes, publish files. May be called again."""
        self.describe(collection)

    # ── search, aliases ──────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)`, nearest first; smaller is nearer, in the store's own scale.

        `vector` is float32[dimensions]; `name` the vector field to search by.
        """

    def aliases(self, collection: str) -> list[str]:
        """Return the aliases that point at a collection."""
        raise self._unsupported("aliases", collection)

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection, atomically."""
        raise self._unsupported("set_alias", collection, alias)

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:  # noqa: ARG002
        """Return the schema as this store would create it, its own options chosen.

        `kinds` counts, by metadata field, the kinds of value (`ValueKind`) that the source holds.
        """
        return schema

    def as_for(self, records: int) -> Store:  # noqa: ARG002 - overridden where the index depends on the size
        """Return the store that builds, of a sample, the search index of a collection of so many records."""
        return self

    def accepts_key(self, key: str) -> bool:  # noqa: ARG002
        """Whether a metadata field may have this name."""
        return True

    def accepts_id(self, text: str) -> bool:  # noqa: ARG002
        """Whether a text id can be held, beside what the capabilities say of its length and characters."""
        return True

    def select_vectors(self, fields: Sequence[VectorField]) -> tuple[VectorField, ...]:
        """Return which of a source's vector fields a new collection can hold, under the names that it gives.

        Without named vectors it is the default one, else the first.
        """
        fitting = [field for field in fields if field.kind in self.capabilities.vector_kinds]
        if not self.capabilities.named_vectors:
            first = sorted(fitting, key=lambda field: field.name != "")[:1]
            return tuple(field.model_copy(update={"name": ""}) for field in first)
        return tuple(fitting)

    @property
    def shares_ids(self) -> bool:
        """Whether one id may stand in several namespaces of a collection, as several records."""
        return self.capabilities.namespaces

    @property
    def is_bound(self) -> bool:
        """Whether the store shows the records of one namespace alone."""
        return getattr(self, "namespace", None) is not None

    def accepts_namespace(self, name: str) -> bool:  # noqa: ARG002
        """Whether a namespace may have this name; "" is the default one."""
        return True

    def vector_tolerance(self, schema: CollectionSchema) -> float:  # noqa: ARG002
        """Return the relative tolerance of a vector read back from such a collection; 0 is bit for bit."""
        return 0.0

    def exact_kinds(self, schema: CollectionSchema) -> frozenset[str]:  # noqa: ARG002
        """Return the metadata kinds that come back exactly from a collection with this schema."""
        return frozenset(kind.value for kind in self.capabilities.value_kinds)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close connections; the store may be used again after."""

    @abstractmethod
    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error of `errors.py` for what a driver raised; the message holds no secret."""

    @contextmanager
    def translating(self, collection: str | None = None) -> Iterator[None]:
        """Turn whatever a driver raises inside into the project's errors."""
        try:
            yield
        except MigrationError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            # Without the driver's own exception behind it: that may repeat a login, and tracebacks are kept.
            raise self.translate(error, collection) from None

    def pace(self, sent_bytes: int = 0) -> None:
        """Wait until the limits allow one more request; connectors of servers call it before each."""
        if self.requests_per_second is not None:
            shared_throttle(self.address(), "requests", self.requests_per_second).wait()
        if self.bytes_per_second is not None:
            shared_throttle(self.address(), "bytes", self.bytes_per_second).wait(sent_bytes)

    def _unsupported(self, operation: str, collection: str, *_: Any) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            f"{self.address(collection)}: {self.kind} has no {operation}; see `vector-migrate stores`",
            store=self.kind,
            operation=operation,
        )


def store_kinds() -> list[str]:
    """Return the kinds of store that there are: one module or package each under `stores/`."""
    folder = Path(__file__).with_name("stores")
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if module.name[0] != "_")


def store_class(kind: str) -> type[Store]:
    """Return the class of a kind of store.

    Raises
    ------
    ConfigurationError
        There is no store of that kind.
    """
    if kind not in store_kinds():
        raise ConfigurationError(
            f"no store of kind {kind!r}; there are: {', '.join(store_kinds())}", found=kind
        )
    module = importlib.import_module(f"migration_pipelines.stores.{kind}")
    found: type[Store] = module.STORE
    return found


def open_address(text: str) -> tuple[Store, str | None]:
    """Return the store, not yet connected, and the collection of an address."""
    address = Address.parse(text)
    limits = {name: address.query[name] for name in _LIMITS if name in address.query}
    query = {name: value for name, value in address.query.items() if name not in limits}
    store, collection = store_class(address.kind).from_address(address.model_copy(update={"query": query}))
    return _limited(store, limits), collection


def _limited(store: Store, limits: Mapping[str, str]) -> Store:
    try:
        numbers = {name: float(value) for name, value in limits.items()}
    except ValueError:
        numbers = {"": 0.0}
    if any(not number > 0 for number in numbers.values()):
        raise ConfigurationError(
            f"{store.address()}: {limits} must be numbers greater than 0", found=dict(limits)
        )
    return store.model_copy(update=numbers) if numbers else store
