"""FaissStore: collections in index files of FAISS, with their records beside them.

Addresses: `faiss:./folder#docs` is a collection of this tool's own in a folder (`collection.py` tells how it
is laid out), or the index `docs.faiss` of another tool in it; `faiss:./docs.faiss#docs` is an index file
itself. Beside an index of another tool stand its records: LangChain's `docs.pkl`, Haystack's `docs.json` with
a SQLite database, `docs.jsonl` or `docs.parquet`; without any, a record is FAISS's id and the vector. Such
files are read and never changed. `?sidecar=` names the file of the records, or `none`.

Which index a collection gets, and how the vectors of cosine similarity are kept, is told in `build.py`;
`?index=flat`, `hnsw` or `ivf` chooses. A flat index is written as its records come. Graphs and inverted lists
are built by FAISS in memory: to write such a collection, or to change one that is finished, takes 4 bytes a
number of all vectors, and more. A merge changes it once, at the end. Of all three reading holds a batch at a
time. The other kinds are loaded whole. They hold codes in place of vectors: they are read decoded, and
`describe().options["approximate_vectors"]` says so.
"""

from __future__ import annotations

import errno
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import PrivateAttr, field_validator

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.distances import nearest
from migration_pipelines.envelope import matching
from migration_pipelines.errors import (
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    DiskFullError,
    IncompleteError,
    MigrationError,
    StoreRefusedError,
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
from migration_pipelines.store import Address, Store
from migration_pipelines.stores.faiss.build import KINDS, by_size
from migration_pipelines.stores.faiss.checks import check_holdable, checked
from migration_pipelines.stores.faiss.collection import (
    LOADING,
    MANIFEST,
    CollectionFolder,
    Manifest,
    part_name,
)
from migration_pipelines.stores.faiss.foreign import SUFFIXES, ForeignIndex, find_indexes
from migration_pipelines.stores.faiss.generations import fetch_staged, merged, open_published, remaining
from migration_pipelines.stores.faiss.opened import Opened, unsearchable
from migration_pipelines.stores.faiss.parts import Part, PartWriter, last_of_each_id
from migration_pipelines.stores.faiss.table import ParquetTable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCANNED_RECORDS = 8192
_KEPT_OPEN = 8
_T = TypeVar("_T")


class FaissStore(Store):
    """Index files in a folder, or one index file.

    `fingerprint` misses a change only where size and time of change of every file stay the same.

    Parameters
    ----------
    path
        The folder of the collections, or one index file of another tool.
    index
        The kind of index that new collections get, in place of the one chosen by their size.
    sidecar
        The file beside an index of another tool that holds its records; `none` to read the vectors alone.
    """

    kind: ClassVar[str] = "faiss"
    merges_at_the_end: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(
        id_kinds=frozenset(IdKind),
        mixed_ids=True,
        max_id_bytes=None,
        empty_ids=True,
        id_text_refuses="",
        vector_kinds=frozenset({VectorKind.DENSE}),
        dtypes=frozenset({DType.FLOAT32, DType.BIT}),
        max_dimensions=None,
        named_vectors=False,
        missing_vectors=False,
        non_finite_vectors=False,
        metrics=frozenset({Metric.EUCLIDEAN, Metric.DOT, Metric.COSINE, Metric.MANHATTAN, Metric.HAMMING}),
        documents=True,
        document_refuses="",
        value_kinds=frozenset(ValueKind),
        no_metadata=True,
        namespaces=False,
        deletes=True,
        aliases=False,
        stable_scan=True,
        conditional_write=False,
        filter_operators=filters.OPERATORS,
        max_batch_records=None,
        max_batch_bytes=None,
        round_trip={},
    )

    path: Path = Path()
    index: Literal["flat", "hnsw", "ivf"] | None = None
    sidecar: str | None = None

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _open: OrderedDict[str, tuple[Any, Any]] = PrivateAttr(default_factory=OrderedDict)

    @field_validator("path")
    @classmethod
    def _usable_path(cls, path: Path) -> Path:
        if "://" in str(path) or ":/" in str(path) or not set("#?\0").isdisjoint(str(path)):
            raise ConfigurationError(
                f"faiss: {str(path)!r} isn't a local folder or file, or has a #, ? or NUL in it, which no "
                "address can hold"
            )
        return path

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection.

        `faiss:./docs` is the collection in that folder, or the only index file in it; with a slash at the end
        it is the folder of collections, unless it is a collection itself.
        """
        options: dict[str, Any] = dict(address.query)
        if options.keys() - {"index", "sidecar"} or options.get("index", "flat") not in KINDS:
            raise ConfigurationError(
                f"{address}: expected only the options index={'|'.join(KINDS)} and sidecar=… after the ?"
            )
        path = Path(address.path).expanduser()
        store = cls(path=path, **options)
        if address.collection or path.is_file():
            return store, address.collection or path.stem
        if path.suffix in SUFFIXES and not path.is_dir():
            return store, path.stem
        if not path.is_dir() or CollectionFolder(path).manifest() is not None:
            if address.path.endswith("/") and not path.is_dir():
                return store, None
            whole_path = path if path.name else path.resolve()
            return cls(path=whole_path.parent, **options), whole_path.name or None
        names = store.list_collections() if not address.path.endswith("/") else []
        return store, names[0] if len(names) == 1 else None

    def address(self, collection: str | None = None) -> str:
        """Return the address of the folder or of a collection in it."""
        asked = {"index": self.index, "sidecar": self.sidecar}
        query = {name: value for name, value in asked.items() if value is not None}
        path = f"{self.path}/" if collection is None and not self._is_file else str(self.path)
        return str(Address(kind=self.kind, path=path, collection=collection, query=query))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of the collections and index files, sorted, those being loaded included."""
        with self.translating():
            if self._is_file:
                return [self.path.stem] if self.path.is_file() else []
            try:
                folders = [path.name for path in self.path.iterdir() if path.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                return []
            own = {name for name in folders if name != LOADING and self._folder(name).manifest()}
            return sorted(own | find_indexes(self.path).keys())

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of; `options` has `finished: False` while it is being loaded.

        Of another tool's index `options` has `layout`, what stands beside it; `approximate_vectors`, why its
        vectors aren't those that were put in; `faiss_metric`, FAISS's number of a metric without a name here.
        """
        found = self._manifest(collection)
        if found is None:
            return self._opened(collection).schema
        schema = found.description.model_copy(update={"name": collection})
        if found.index is None:
            return schema.model_copy(update={"options": {**schema.options, "finished": False}})
        return schema

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records."""
        manifest = self._manifest(collection)
        if manifest is not None and manifest.index is None:
            with self.translating(collection):
                parts = self._staged(self._folder(collection).parts(), manifest.description)
                return int(last_of_each_id(part.records for part in parts).sum())
        opened = self._opened(collection)
        if where is None:
            return opened.count
        with self.translating(collection):
            found = opened.scan(0, opened.count, _SCANNED_RECORDS, vectors=False)
            return sum(matching(where, batch).true_count for batch in found)

    def split(
        self, collection: str, *, span_records: int, where: Filter | None = None
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are ranges of the records' lasting numbers."""
        del where  # to count by it would be to read everything
        opened = self._opened(collection)
        for start in range(0, opened.count, span_records):
            stop = min(opened.count, start + span_records)
            bounds = {"first": opened.number_of(start), "last": opened.number_of(stop - 1)}
            yield Span(bounds=bounds, records=stop - start), None

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
        del ids  # the bounds say everything
        opened = self._opened(collection)
        with self.translating(collection):
            start, stop = opened.rows_between(int(span.bounds["first"]), int(span.bounds["last"]) + 1)
            for batch in opened.scan(start, stop, batch_records, vectors=vectors):
                kept = batch if where is None else batch.filter(matching(where, batch))
                if kept.num_rows:
                    yield kept

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        manifest = self._manifest(collection)
        if manifest is None or manifest.index is not None:
            opened = self._opened(collection)
            with self.translating(collection):
                return opened.fetch(ids, vectors=vectors)
        with self.translating(collection):
            parts = self._staged(reversed(self._folder(collection).parts()), manifest.description)
            return fetch_staged(parts, manifest.description, ids, vectors=vectors)

    def read_part(self, collection: str, part: str, ids: pa.RecordBatch) -> pa.RecordBatch:
        """Return what a load wrote for these ids: from the part's own file, or where they went since."""
        manifest = self._manifest(collection)
        if manifest is None:
            return self.fetch(collection, ids)
        with self.translating(collection):
            name = part_name("part", part)
            newest = reversed(self._folder(collection).parts())
            parts = sorted(newest, key=lambda staged: staged.name != name)
            staged = self._staged(parts, manifest.description)
            found = fetch_staged(staged, manifest.description, ids, vectors=True)
        others = batches.without(ids, found)
        if manifest.index is None or not others.num_rows:
            return found
        return pa.concat_batches([found, self.fetch(collection, others)])

    def fingerprint(self, collection: str) -> str:
        """Return a digest of the files' names, sizes and times of change."""
        self._opened(collection)
        with self.translating(collection):
            return xxhash.xxh3_128_hexdigest(json.dumps(self._version(collection)).encode())

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Begin a collection; until `finish_load` it is a target and no source."""
        where = self.address(schema.name)
        check_holdable(schema, where)
        there = CollectionExistsError(
            f"{where} is there already; choose another name or drop it",
            store=self.kind,
            collection=schema.name,
        )
        with self.translating(schema.name):
            folder = self._folder(schema.name)
            if schema.name in find_indexes(self.path):
                raise there
            folder.path.mkdir(parents=True, exist_ok=True)
            with folder.changing():
                if folder.manifest() is not None:
                    raise there
                folder.create(schema)

    def drop(self, collection: str) -> None:
        """Remove a collection's files, and the folder where nothing else is in it."""
        with self._changing(collection) as (folder, _):
            folder.drop()

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write whole records, each replacing what was under its id, all or none of them.

        Of a finished collection both files are written again and the index is built anew: for many records
        `load_part` and `finish_load` are the way.
        """
        with self._changing(collection) as (folder, manifest):
            batch = checked(batch, manifest.description, self.address(collection))
            with folder.new_part() as part:
                with folder.writing(part, manifest.description) as writer:
                    writer.write(batch)
                folder.stage(part, part_name("more", secrets.token_hex(8)))
            if manifest.index is not None:
                self._put_in(folder, manifest)

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        with self._changing(collection) as (folder, manifest):
            if manifest.index is not None:
                manifest = self._put_in(folder, manifest)
                kept = remaining(folder, manifest, ids)
                if kept is not None:
                    folder.publish(manifest, kept, override=self.index)
                return
            for part in folder.parts():
                opened = part.open(manifest.description)
                if len(opened.records.find(ids)):
                    with folder.new_part() as written:
                        with folder.writing(written, manifest.description) as writer:
                            for batch in opened.scan(0, opened.count, _SCANNED_RECORDS, vectors=True):
                                writer.write(batch.filter(pc.invert(batches.is_among(batch, ids))))
                        folder.replace(part, written)

    @contextmanager
    def load_part(self, collection: str, part: str) -> Iterator[Callable[[pa.RecordBatch], None]]:
        """Write one partition's files, as a whole in the place of those before.

        They become part of the collection, of a finished one too, by `finish_load`.
        """
        with ExitStack() as stack:
            with self._changing(collection) as (folder, manifest):
                schema = manifest.description
                written = stack.enter_context(folder.new_part())
                writing = stack.enter_context(ExitStack())
                writer = writing.enter_context(folder.writing(written, schema))
            yield self._part_writer(collection, schema, writer)
            with self.translating(collection):
                writing.close()
            with self._changing(collection) as (folder, _):
                folder.stage(written, part_name("part", part))

    def _part_writer(
        self, collection: str, schema: CollectionSchema, writer: PartWriter
    ) -> Callable[[pa.RecordBatch], None]:
        def write(batch: pa.RecordBatch) -> None:
            with self.translating(collection):
                writer.write(checked(batch, schema, self.address(collection)))

        return write

    def begin_load(self, collection: str) -> None:
        """Check that the collection is there; it is ready to be loaded from `create` on."""
        with self._changing(collection):
            pass

    def finish_load(self, collection: str) -> None:
        """Build the index from what was loaded, and publish the collection in one step."""
        with self._changing(collection) as (folder, manifest):
            if manifest.index is None:
                folder.finish(manifest, override=self.index)
            else:
                self._put_in(folder, manifest)

    def _put_in(self, folder: CollectionFolder, manifest: Manifest) -> Manifest:
        """Put what is staged into a finished collection; return what that is now."""
        parts = folder.parts()
        if any(ParquetTable(part.records).count for part in parts):
            folder.publish(manifest, merged(folder, manifest, parts), override=self.index)
        else:
            folder.remove_strays(manifest)
        return folder.manifest() or manifest

    # ── search ───────────────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)` through the index; with a filter by reading every record."""
        opened = self._opened(collection)
        address = self.address(collection)
        if name:
            raise unsearchable(address, name)
        with self.translating(collection):
            if where is None:
                return opened.search(vector, limit, address)
            found = opened.scan(0, opened.count, _SCANNED_RECORDS, vectors=True)
            kept = (batch.filter(matching(where, batch)) for batch in found)
            return nearest(kept, vector, opened.schema, name=name, limit=limit, where=address)

    def as_for(self, records: int) -> FaissStore:
        """Return the store that builds, of a sample, the index of a collection of so many records."""
        return self.model_copy(update={"index": self.index or by_size(records)})

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Let go of the files that are kept open."""
        with self._lock:
            self._open.clear()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error for what the file system, pyarrow or FAISS raised."""
        where = self.address(collection)
        if isinstance(error, OSError) and error.errno in _FULL:
            return DiskFullError(
                f"{where}: no room is left to write ({error.strerror}); what was written before is whole: "
                "make room and run again",
                store=self.kind,
                collection=collection,
            )
        return StoreRefusedError(f"{where}: {type(error).__name__}: {error}", store=self.kind)

    # ── inside: which collection ─────────────────────────────────────────────────────────────────────

    @property
    def _is_file(self) -> bool:
        return self.path.is_file() or (self.path.suffix in SUFFIXES and not self.path.is_dir())

    def _folder(self, collection: str) -> CollectionFolder:
        if self._is_file:
            raise UnsupportedOperationError(
                f"{self.address(collection)} is one index file, which is only read; name a folder and a "
                "collection to write to, such as faiss:./folder#docs",
                store=self.kind,
            )
        if collection in ("", ".", "..", LOADING) or not set("/\\\0").isdisjoint(collection):
            raise ConfigurationError(
                f"faiss: {collection!r} can't be the name of a collection here: expected a folder's name "
                "without / \\ or NUL",
                collection=collection,
            )
        return CollectionFolder(self.path / collection)

    def _foreign(self, collection: str) -> ForeignIndex | None:
        if self._is_file:
            return ForeignIndex(self.path, self.sidecar, is_named=True) if self.path.is_file() else None
        path = find_indexes(self.path).get(collection)
        if path is None and "/" not in collection and (self.path / collection).is_file():
            path = self.path / collection
        return None if path is None else ForeignIndex(path, self.sidecar)

    def _manifest(self, collection: str) -> Manifest | None:
        """Return what a collection of our own is now, None of another tool's.

        Raises
        ------
        CollectionNotFoundError
        """
        with self.translating(collection):
            found = None if self._is_file else self._folder(collection).manifest()
            if found is None and self._foreign(collection) is None:
                raise CollectionNotFoundError(
                    f"{self.address(collection)} isn't there: a collection or an index file was expected; "
                    f"there are: {', '.join(self.list_collections()) or 'none'}",
                    store=self.kind,
                    collection=collection,
                )
            return found

    def _version(self, collection: str) -> list[Any]:
        """Return what changes when the collection does: its files' names, sizes and times of change."""
        manifest = self._manifest(collection)
        if manifest is None:
            foreign = self._foreign(collection)
            files = [] if foreign is None else foreign.files()
        else:
            folder = self._folder(collection).path
            infos = [info for info in (manifest.index, manifest.records) if info is not None]
            files = [folder / MANIFEST, *(folder / info.name for info in infos)]
        status = [(path.name, path.stat()) for path in files]
        return [[name, found.st_size, found.st_mtime_ns, found.st_ino] for name, found in status]

    def _opened(self, collection: str) -> Opened:
        """Return the collection opened, again where it changed; a writer's replacing files does no harm."""
        while True:
            manifest = self._manifest(collection)
            if manifest is not None and manifest.index is None:
                raise IncompleteError(
                    f"{self.address(collection)}: the load into it was never finished, so it can't be read "
                    "as a source; finish that migration, or drop the collection",
                    store=self.kind,
                    collection=collection,
                )
            with self.translating(collection):
                try:
                    version = self._version(collection)
                    return self._kept_open(collection, version, lambda: self._open_now(collection))
                except FileNotFoundError as error:
                    if self._manifest(collection) == manifest:
                        raise StoreRefusedError(
                            f"{self.address(collection)}: the file {error.filename} is gone; restore it, for "
                            "nothing of a collection is skipped",
                            store=self.kind,
                            collection=collection,
                        ) from error

    def _kept_open(self, key: str, version: Any, make: Callable[[], _T]) -> _T:
        with self._lock:
            known = self._open.get(key)
            if known is None or known[0] != version:
                known = self._open[key] = (version, make())
            self._open.move_to_end(key)
            while len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)
            found: _T = known[1]
            return found

    def _open_now(self, collection: str) -> Opened:
        manifest = self._manifest(collection)
        if manifest is not None:
            return open_published(self._folder(collection), manifest, name=collection)
        foreign = self._foreign(collection)
        assert foreign is not None
        return foreign.open(collection)

    def _staged(self, parts: Iterable[Part], schema: CollectionSchema) -> Iterator[Opened]:
        """Yield staged parts opened, one at a time: there may be more than a process may have open."""
        for part in parts:
            status = part.records.stat()
            version = (status.st_size, status.st_mtime_ns, status.st_ino)
            yield self._kept_open(str(part.records), version, partial(part.open, schema))

    # ── inside: changing ─────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _changing(self, collection: str) -> Iterator[tuple[CollectionFolder, Manifest]]:
        """Give the collection to the one writer that may change it now."""
        if self._manifest(collection) is None:
            raise UnsupportedOperationError(
                f"{self.address(collection)} was written by another tool, and such files are never changed; "
                "choose another target",
                store=self.kind,
                collection=collection,
            )
        folder = self._folder(collection)
        with self.translating(collection), folder.changing():
            manifest = self._manifest(collection)
            assert manifest is not None
            yield folder, manifest
