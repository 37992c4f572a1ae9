"""ElasticsearchStore: the indices of a cluster.

How it reads: the ids of one moment by a point in time, which the ledger keeps because a point in time ends
with the process; then records by their ids, which Elasticsearch answers as they are now, refreshed or not.
Vectors are asked for, since from 9.2 on the server leaves them out of `_source` by default; a record whose
vector was held back is an error. A search sees only what was refreshed: the index is refreshed before its
records are listed or counted, which writes no data.

How it writes: bulk requests of lines that are put together from texts, every item's answer looked at. A
record keeps exactly its text: vectors, documents, metadata, nulls and numbers of any size.

An index that it finds: documents and metadata where LangChain and LlamaIndex put them, else all fields as
metadata; say `?document_field=`, `?metadata_field=`, `?vector_field=` where they are others.

What `fingerprint` misses: nothing, since every write of a shard has a number.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Self
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from pydantic import PositiveFloat, PrivateAttr, SecretStr

from migration_pipelines import batch as batches
from migration_pipelines.ahead import answers
from migration_pipelines.credentials import secret as find_secret
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    AuthenticationError,
    CollectionNotFoundError,
    ConfigurationError,
    DimensionMismatchError,
    LedgerError,
    MigrationError,
    StoreRefusedError,
    TransientError,
)
from migration_pipelines.filters import Filter
from migration_pipelines.metadata import TYPED
from migration_pipelines.model import (
    Capabilities,
    CollectionSchema,
    DType,
    IdKind,
    Metric,
    Span,
    ValueKind,
    VectorField,
    VectorKind,
)
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.elasticsearch import client as driver
from migration_pipelines.stores.elasticsearch import queries, reading, writing
from migration_pipelines.stores.elasticsearch.index import Index, request
from migration_pipelines.stores.elasticsearch.schema import (
    HIDES,
    KIND,
    MAX_DIMENSIONS,
    METADATA,
    RESCORES_FROM,
    Layout,
    creation_body,
    field_types,
    layout_of,
)

_PORT = 9200
_PAGE_BYTES = 8_000_000  # of one answer, about
_PAGE_RECORDS = 1000
# The server looks up one page's records, of scattered places, while another page is parsed here.
_PAGES_AHEAD = 2
# What would name several indices, another host's, or a part of the API, in the path of a request.
_NO_NAME = re.compile(r"[_\-+.]*$|[_\-+]|.*[*?,<>|\"\\/# :]", re.DOTALL)
_OPTIONS = {
    "https": False,
    "ca_certs": None,
    "vector_field": "vector",
    "document_field": None,
    "metadata_field": None,
}


class ElasticsearchStore(Store):
    """A cluster of Elasticsearch, 8.11 or later.

    A read needs the index privileges `read`, `view_index_metadata`, `monitor` and `maintenance` (to refresh);
    a write `manage` and `write`.

    Parameters
    ----------
    host, port, https
        One node of the cluster, or what balances the load before it.
    ca_certs
        File of the certificate authority that the server's certificate is checked by.
    user, password, api_key
        The login: a user with `ELASTICSEARCH_PASSWORD`, or `ELASTICSEARCH_API_KEY`.
    vector_field
        The field of the default vector.
    document_field
        The field of the document in an index that this tool didn't make; "" for none, None to find it out.
    metadata_field
        There, the field of the object that holds the metadata; "" where all other fields are it, None to find
        it out.
    timeout_seconds
        How long a request may take.
    """

    kind: ClassVar[str] = "elasticsearch"
    # Its HNSW graphs bound it: some 5,000 records of 2 kB a second and node.
    typical_write_bytes_per_second: ClassVar[float] = 10e6
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset({IdKind.STR}),
        mixed_ids=False,
        max_id_bytes=writing.MAX_ID_BYTES,
        empty_ids=False,
        id_text_refuses="",
        vector_kinds=frozenset(VectorKind),
        dtypes=frozenset({DType.FLOAT32, DType.INT8, DType.BIT}),
        max_dimensions=MAX_DIMENSIONS,
        named_vectors=True,
        missing_vectors=True,
        non_finite_vectors=False,
        metrics=frozenset({Metric.COSINE, Metric.DOT, Metric.EUCLIDEAN, Metric.HAMMING}),
        documents=True,
        document_refuses="",
        value_kinds=frozenset(ValueKind),
        no_metadata=True,
        namespaces=False,
        deletes=True,
        aliases=True,
        stable_scan=True,
        conditional_write=False,
        filter_operators=queries.OPERATORS,
        max_batch_records=None,
        max_batch_bytes=None,
        round_trip={
            "vector": "exact in indices that this tool makes; in others as the server keeps it: from 9.2 on "
            "normalised and multiplied again under cosine (1e-6), sparse weights within 0.4 %",
        },
    )

    host: str
    port: int = _PORT
    https: bool = False
    ca_certs: str | None = None
    user: str | None = None
    password: SecretStr | None = None
    api_key: SecretStr | None = None
    vector_field: str = "vector"
    document_field: str | None = None
    metadata_field: str | None = None
    timeout_seconds: PositiveFloat = 60.0

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _client: Any = PrivateAttr(default=None)
    _version: tuple[int, ...] | None = PrivateAttr(default=None)

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the index of `elasticsearch://[user@]host:9200/index`.

        Raises
        ------
        ConfigurationError
            It has no host, or an option that there isn't.
        """
        unknown = sorted(set(address.query) - set(_OPTIONS))
        if address.host is None or unknown or address.query.get("https", "false") not in ("true", "false"):
            found = (
                f"the option {unknown[0]!r}"
                if unknown
                else "no host, or ?https= that is neither true nor false"
            )
            raise ConfigurationError(
                f"{address}: expected elasticsearch://[user@]host:9200/index with "
                f"?{'= ?'.join(_OPTIONS)}=, found {found}",
                found=unknown,
            )
        options: dict[str, Any] = {**address.query, "https": address.query.get("https") == "true"}
        password = address.password or find_secret("ELASTICSEARCH_PASSWORD")
        api_key = None if address.password else find_secret("ELASTICSEARCH_API_KEY")
        store = cls(
            host=address.host,
            port=address.port or _PORT,
            user=address.user,
            password=SecretStr(password) if password else None,
            api_key=SecretStr(api_key) if api_key else None,
            **options,
        )
        return store, address.path or address.collection

    def address(self, collection: str | None = None) -> str:
        """Return the address of the store or of an index, without secrets."""
        values = {name: getattr(self, name) for name in _OPTIONS}
        query = {
            name: str(value).lower() if isinstance(value, bool) else value
            for name, value in values.items()
            if value != _OPTIONS[name]
        }
        found = Address(
            kind=self.kind, user=self.user, host=self.host, port=self.port, path=collection or "", query=query
        )
        return str(found)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of all open indices that aren't hidden, sorted."""
        with self.translating():
            found = self._ask("GET", "/_resolve/index/*", expand_wildcards="open")
            return sorted(item["name"] for item in found["indices"])

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the index is made of; before its first record it may have no dimensions."""
        with self.translating(collection):
            return self._layout(collection).schema

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records; with a filter, by reading what the server can't tell apart."""
        if where is None:
            with self.translating(collection):
                self._refresh(collection)
                return self._index(collection).count()
        return sum(
            matching(where, part).true_count
            for span, ids in self.split(collection, span_records=50_000, where=where)
            for part in self.scan(collection, span, ids=ids, batch_records=_PAGE_RECORDS, vectors=False)
        )

    def split(
        self, collection: str, *, span_records: int, where: Filter | None = None
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are lists of ids of one moment; fewer where the filter's fields are indexed.

        Bounds of ids would do as well if Elasticsearch could sort by them: `_id` takes no sorting by default.
        """
        with self.translating(collection):
            layout = self._refresh(collection)
            asked = queries.query_for(where, layout.fields, prefix=f"{layout.metadata}.")
            texts = (text for page in self._index(collection).ids(asked) for text in page)
            while part := list(islice(texts, span_records)):
                kinds = batches.constant(IdKind.STR.value, len(part))
                columns = [pa.array(part, pa.string()), kinds]
                ids = pa.RecordBatch.from_arrays(columns, names=[batches.ID, batches.ID_TYPE])
                yield Span(records=len(part)), ids

    def scan(
        self,
        collection: str,
        span: Span,
        *,
        ids: pa.RecordBatch | None = None,
        batch_records: int,
        where: Filter | None = None,  # noqa: ARG002 - the list of ids answers it
        vectors: bool = True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of a span's list of ids that are still there, in the list's order.

        Raises
        ------
        LedgerError
            `ids` is missing.
        StoreRefusedError
            The server holds back a vector.
        """
        if ids is None:
            raise LedgerError(
                f"{self.address(collection)}: the list of ids of {span} is missing; plan it afresh"
            )
        with self.translating(collection):
            layout = self._refresh(collection)
            texts = ids.column(batches.ID).to_pylist()
            size = min(batch_records, _page_records(layout.schema, vectors=vectors))
            pages = (texts[start : start + size] for start in range(0, len(texts), size))
            read = partial(self._read, collection, layout, vectors=vectors, scans=True)
            for found in answers(read, pages, ahead=_PAGES_AHEAD):
                if found.num_rows:
                    yield found

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        with self.translating(collection):
            layout = self._layout(collection)
            texts = [text for text in ids.column(batches.ID).to_pylist() if 0 < len(text.encode()) <= 512]
            size = _page_records(layout.schema, vectors=vectors)
            parts = [
                self._read(collection, layout, texts[start : start + size], vectors=vectors)
                for start in range(0, len(texts), size)
            ]
            empty = reading.to_batch([], layout, vectors=vectors, where=self.address(collection))
            return pa.concat_batches([empty, *parts])

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with every write: the last number of each shard's writes."""
        with self.translating(collection):
            self._layout(collection)
            found = self._index(collection).ask("GET", "/_stats", level="shards")
            numbers = []
            for name, index in sorted(found["indices"].items()):
                for shard, copies in sorted(index["shards"].items()):
                    last = [c["seq_no"]["max_seq_no"] for c in copies if c["routing"]["primary"]]
                    numbers.append(f"{name}:{index['uuid']}:{shard}:{max(last)}")
            if found["_shards"]["failed"] or not numbers:
                raise TransientError(f"{self.address(collection)}: a shard doesn't answer: try again")
            return " ".join(numbers)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Create an empty index whose records keep their vectors in `_source`.

        Raises
        ------
        ConfigurationError
            The name is none for an index, or a vector can't be as it is asked for.
        """
        where = self.address(schema.name)
        if _NO_NAME.match(schema.name):
            raise ConfigurationError(f"{where}: an index can't have this name; choose another")
        with self.translating(schema.name):
            version = self._server_version()
            body = creation_body(schema, where=where, vector_field=self.vector_field, version=version)
            self._acknowledged(self._index(schema.name).ask("PUT", "", body), schema.name)

    def drop(self, collection: str) -> None:
        """Remove an index and all its records; an alias is refused."""
        with self.translating(collection):
            self._layout(collection)
            self._acknowledged(self._index(collection).ask("DELETE"), collection)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write a batch, each record replacing what was under its id.

        What is known to be refused is refused before anything is written; of a batch in which the server
        itself refuses a record, the others may be there already.
        """
        if not batch.num_rows:
            return
        with self.translating(collection):
            layout = self._layout(collection)  # a bulk request would make an index that isn't there
            lines = writing.lines_of(batch, layout, where=self.address(collection))
            self._index(collection).bulk(lines)

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self.translating(collection):
            self._layout(collection)
            texts = [text for text in ids.column(batches.ID).to_pylist() if 0 < len(text.encode()) <= 512]
            self._index(collection).bulk(writing.deletions_of(texts))

    def finish_load(self, collection: str) -> None:
        """Let searches see what was written; Elasticsearch builds its graphs as it writes."""
        with self.translating(collection):
            self._refresh(collection)

    # ── search, aliases ──────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)`: 1 - cosine, Euclidean, negative dot product, unlike bits."""
        if where is not None:
            raise self._unsupported("search with a filter", collection)
        with self.translating(collection):
            layout = self._layout(collection)
            field = next((field for field in layout.schema.vectors if field.name == name), None)
            if field is None or field.kind is not VectorKind.DENSE or field.metric is None:
                raise self._unsupported(f"search by vector {name or '(default)'}", collection)
            asked = {
                "field": layout.vectors[name],
                "query_vector": self._query_vector(vector, field, collection),
                "k": limit,
                "num_candidates": min(10_000, max(100, limit * 10)),
            }
            if self._server_version() >= RESCORES_FROM:
                # What the rounded vectors of the index find, as for every search; at true distances.
                asked["rescore_vector"] = {"oversample": 1.0}
            body = {"knn": asked, "size": limit, "_source": False}
            index = self._index(collection)
            found = index.ask("POST", "/_search", body)
            index.check_whole(found)
            return [(hit["_id"], _distance(float(hit["_score"]), field)) for hit in found["hits"]["hits"]]

    def _query_vector(self, vector: Any, field: VectorField, collection: str) -> list[Any]:
        query = np.asarray(vector, np.float32).reshape(-1)
        if len(query) != field.dimensions:
            raise DimensionMismatchError(
                f"{self.address(collection)}: the query has {len(query)} dimensions, not {field.dimensions}",
                expected=field.dimensions,
                found=len(query),
            )
        if field.dtype is DType.BIT:
            return np.packbits(query != 0).view(np.int8).tolist()
        return query.astype(np.int8).tolist() if field.dtype is DType.INT8 else query.tolist()

    def aliases(self, collection: str) -> list[str]:
        """Return the aliases that point at an index."""
        with self.translating(collection):
            found = self._index(collection).ask("GET", "/_alias")
            return sorted(alias for index in found.values() for alias in index["aliases"])

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at an index, and away from all others, at once.

        Raises
        ------
        ConfigurationError
            There is an index of that name, or none can have it.
        """
        with self.translating(collection):
            self._layout(collection)
            if _NO_NAME.match(alias):
                raise ConfigurationError(
                    f"{self.address(alias)}: an alias can't have this name; choose another"
                )
            old = [name for name in self._pointed_at(alias) if name != collection]
            actions = [{"remove": {"index": name, "alias": alias}} for name in old]
            actions.append({"add": {"index": collection, "alias": alias}})
            self._acknowledged(self._ask("POST", "/_aliases", {"actions": actions}), collection)

    def _pointed_at(self, alias: str) -> list[str]:
        try:
            return sorted(self._ask("GET", f"/_alias/{quote(alias, safe='')}"))
        except Exception as error:
            if driver.status_of(error) == 404:
                return []
            raise

    # ── fit ──────────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, schema: CollectionSchema, kinds: Mapping[str, Mapping[str, int]]) -> CollectionSchema:
        """Return the schema with the type of each metadata field to index; another index's mapping stays."""
        own = dict(schema.options.get(KIND) or {})
        own.pop(HIDES, None)  # what is made here keeps its vectors in `_source`
        if "mappings" not in own:
            own["fields"] = field_types(kinds, accepts=self.accepts_key)
        return schema.model_copy(update={"options": {**schema.options, KIND: own}})

    def accepts_key(self, key: str) -> bool:
        """Whether a metadata field may have this name: any but a blank one, and the mark of typed values."""
        return bool(key.strip()) and key != TYPED

    def exact_kinds(self, schema: CollectionSchema) -> frozenset[str]:
        """Return the kinds that come back exactly; with its fields at the top, metadata has at least one."""
        kinds = set(self.capabilities.value_kinds)
        if ((schema.options.get(KIND) or {}).get("layout") or {}).get(METADATA) == "":
            kinds.discard(ValueKind.NO_FIELDS)
        return frozenset(kind.value for kind in kinds)

    def vector_tolerance(self, schema: CollectionSchema) -> float:
        """Return 0; in an index that keeps vectors apart, 1e-6 under cosine and 4e-3 of sparse weights."""
        if not (schema.options.get(KIND) or {}).get(HIDES):
            return 0.0
        if any(field.kind is VectorKind.SPARSE for field in schema.vectors):
            return 4e-3
        return 1e-6 if any(field.metric is Metric.COSINE for field in schema.vectors) else 0.0

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error of `errors.py` for what the client raised."""
        kind, advice = driver.classify(error)
        found = driver.reason(error)[:500]
        if kind is CollectionNotFoundError and collection is not None:
            return self._not_found(collection)
        for secret in (self.password, self.api_key):
            if secret is not None:
                found = found.replace(secret.get_secret_value(), "***")
        wait = driver.retry_after(error)
        facts = {} if wait is None else {"retry_after_seconds": wait}
        where = self.address(collection)
        return kind(f"{where}: {found}; {advice}", store=self.kind, collection=collection, **facts)

    def _not_found(self, collection: str) -> CollectionNotFoundError:
        advice = "check the name"
        try:
            advice = f"there are: {', '.join(self.list_collections()) or 'none'}"
        except ConfigurationError:
            raise  # it isn't Elasticsearch that answers
        except MigrationError:
            pass
        return CollectionNotFoundError(
            f"{self.address(collection)} isn't there; {advice}", store=self.kind, collection=collection
        )

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _connect(self) -> Any:
        with self._lock:
            if self._client is None:
                host = f"[{self.host}]" if ":" in self.host else self.host
                self._client = driver.open_client(
                    f"{'https' if self.https else 'http'}://{host}:{self.port}",
                    login=(self.user or "elastic", self.password.get_secret_value())
                    if self.password
                    else None,
                    api_key=self.api_key.get_secret_value() if self.api_key else None,
                    ca_certs=self.ca_certs,
                    timeout=self.timeout_seconds,
                )
            return self._client

    def _ask(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        return request(self._connect(), method, path, body, pace=self.pace, **query)

    def _index(self, collection: str) -> Index:
        return Index(self._connect(), collection, where=self.address(collection), pace=self.pace)

    def _server_version(self) -> tuple[int, ...]:
        """Return the server's version; a serverless project has that of the day."""
        if self._version is None:
            found = self._ask("GET", "/")["version"]
            numbers = tuple(int(part) for part in re.findall(r"\d+", found["number"])[:2])
            self._version = (99, 0) if found.get("build_flavor") == "serverless" else numbers
        return self._version

    def _layout(self, collection: str) -> Layout:
        if _NO_NAME.match(collection):
            raise self._not_found(collection)
        found = self._index(collection).ask("GET", "", include_defaults=True, flat_settings=True)
        if len(found) != 1:
            raise ConfigurationError(
                f"{self.address(collection)} stands for {len(found)} indices: name one of {sorted(found)}"
            )
        (index,) = found.values()
        return layout_of(
            collection,
            index,
            where=self.address(collection),
            vector_field=self.vector_field,
            document_field=self.document_field,
            metadata_field=self.metadata_field,
        )

    def _refresh(self, collection: str) -> Layout:
        """Let a search see every record.

        A login that may only read can't; then the index refreshes by itself, unless that is switched off.

        Raises
        ------
        AuthenticationError
        """
        layout = self._layout(collection)
        try:
            found = self._index(collection).ask("POST", "/_refresh")
        except Exception as error:
            translated = self.translate(error, collection)
            if not isinstance(translated, AuthenticationError | StoreRefusedError) or not layout.refreshes:
                raise
            return layout
        if found["_shards"]["failed"]:
            raise TransientError(f"{self.address(collection)}: a shard wasn't refreshed: try again")
        return layout

    def _read(
        self, collection: str, layout: Layout, texts: list[str], *, vectors: bool, scans: bool = False
    ) -> pa.RecordBatch:
        query: dict[str, Any] = {}
        paths = list(layout.vectors.values())
        if not vectors and paths and not re.search(r"[*,]", "".join(paths)):
            query["_source_excludes"] = ",".join(paths)
        if layout.hides_vectors:
            query["_source_exclude_vectors"] = False
        where = self.address(collection)
        index = self._index(collection)
        rows = index.search(texts, **query) if scans else index.get(texts, **query)
        if vectors:
            self._check_vectors(collection, layout, rows)
        return reading.to_batch(rows, layout, vectors=vectors, where=where)

    def _check_vectors(self, collection: str, layout: Layout, rows: list[reading.Row]) -> None:
        """Raise where the server held back a vector that a record has."""
        for path, ids in reading.lacks_vectors(rows, layout):
            query = {"bool": {"filter": [{"ids": {"values": ids}}, {"exists": {"field": path}}]}}
            hidden = self._index(collection).count(query)
            if hidden:
                raise StoreRefusedError(
                    f"{self.address(collection)}: {hidden} of {len(rows)} records came without the vector in "
                    f"{path!r} that they have: _source leaves it out; index them anew with it",
                    expected=0,
                    found=hidden,
                )

    def _acknowledged(self, found: Mapping[str, Any], collection: str) -> None:
        if found.get("acknowledged") is not True:
            raise TransientError(f"{self.address(collection)}: not acknowledged by the cluster: try again")


def _page_records(schema: CollectionSchema, *, vectors: bool) -> int:
    """Return how many records to ask for at once: about 12 bytes a number, and 2 kB beside them."""
    numbers = sum(field.dimensions or 0 for field in schema.vectors) if vectors else 0
    return max(10, min(_PAGE_RECORDS, _PAGE_BYTES // (12 * numbers + 2000)))


def _distance(score: float, field: VectorField) -> float:
    """Return the distance that a score stands for (dense_vector's `similarity` in the manual)."""
    if field.metric is Metric.HAMMING:
        return (1 - score) * (field.dimensions or 0)
    if field.metric is Metric.EUCLIDEAN:
        return float(np.sqrt(max(0.0, 1 / score - 1)))
    if field.metric is Metric.COSINE:
        return 2 - 2 * score
    if (field.index.get(KIND) or {}).get("similarity") == "dot_product":
        scale = 32768.0 * (field.dimensions or 1) if field.dtype is DType.INT8 else 2.0
        return -(score - 0.5) * scale
    return 1 - score if score >= 1 else 1 / score - 1
