"""ParquetStore: collections as folders of Parquet files, readable by any Parquet reader.

Address: `parquet:./backup` is one collection; `parquet:./root#backup` is the same folder named in its parent;
`parquet:s3://bucket/prefix#backup` is one in an object store. How a folder is laid out, and why no crash
shows a half of it, is told in `parquet/collection.py` and `parquet/remote_collection.py`. Folders of plain
Parquet files, by other tools, are read (`parquet/plain.py`) and never changed.
"""

from __future__ import annotations

import errno
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import PrivateAttr, field_validator, model_validator

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
from migration_pipelines.stores.parquet import part as parts
from migration_pipelines.stores.parquet.collection import (
    LOADING,
    CollectionFolder,
    Contents,
    LocalCollection,
    Located,
    PartFile,
    State,
    part_name,
)
from migration_pipelines.stores.parquet.folder import LocalFolder
from migration_pipelines.stores.parquet.reader import Reader
from migration_pipelines.stores.parquet.remote import RemoteFiles, RemoteFolder
from migration_pipelines.stores.parquet.remote_collection import RemoteCollection

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_T = TypeVar("_T")


def _usable_url(url: str) -> str:
    """Return a URL without a slash at its end.

    Raises
    ------
    ConfigurationError
        There is a login in it, which isn't repeated.
    """
    scheme, _, place = url.partition("://")
    first = place.partition("/")[0]
    if "@" in first or (":" in first and "@" in place and not first.startswith("arn:")):
        raise ConfigurationError(
            f"parquet: a {scheme}:// address holds no login: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(or what that store's own tools use) in the environment"
        )
    if not set("#?\0").isdisjoint(place) or not scheme or not place.strip("/"):
        raise ConfigurationError(
            f"parquet: {scheme}:// must be followed by a bucket and a prefix without #, ? or NUL"
        )
    return f"{scheme}://{place.rstrip('/')}"


class ParquetStore(Store):
    """A folder of collections, each a folder of Parquet files: local, or in an object store.

    `fingerprint` misses a change to a plain file only where its size and time of change (or its tag) stay the
    same.

    Parameters
    ----------
    path
        The local folder that holds the collections; None where `url` says it.
    url
        The same in an object store, such as `s3://bucket/prefix`. Credentials come from the environment.
    anonymous
        Sign no request, as for public buckets.
    namespace
        Show and write the records of this namespace alone; what is created then has namespaces.
    """

    kind: ClassVar[str] = "parquet"
    writes_whole_parts: ClassVar[bool] = True
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
        aliases=False,
        stable_scan=True,
        conditional_write=False,
        filter_operators=filters.OPERATORS,
        max_batch_records=None,
        max_batch_bytes=None,
        round_trip={},
    )

    path: Path | None = Path()
    url: str | None = None
    anonymous: bool = False
    namespace: str | None = None

    _reader: Reader = PrivateAttr(default_factory=Reader)
    _files: RemoteFiles | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _one_place(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Take a URL for a path too."""
        given = values.get("url") or values.get("path")
        if isinstance(given, str) and "://" in given:
            return {**values, "path": None, "url": _usable_url(given)}
        return values

    @field_validator("path")
    @classmethod
    def _usable_path(cls, path: Path | None) -> Path | None:
        if path is not None and not set("#?\0").isdisjoint(str(path)):
            raise ConfigurationError(
                f"parquet: {str(path)!r} has a #, ? or NUL in it, which no address can hold"
            )
        return path

    def model_post_init(self, _: Any) -> None:
        """Get ready to connect to an object store, on first use."""
        if self.url is not None:
            self._files = RemoteFiles(self.url, anonymous=self.anonymous, pace=self.pace)

    # ── identity ─────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_address(cls, address: Address) -> tuple[Self, str | None]:
        """Return the store and the collection.

        `parquet:./root/`, with the slash, is the folder of collections, unless it is a collection itself. In
        an object store it is, and a bucket always.
        """
        options: dict[str, Any] = dict(address.query)
        if unknown := options.keys() - {"namespace", "anonymous"}:
            raise ConfigurationError(f"parquet: an address has no option {', '.join(sorted(unknown))}")
        if options.get("anonymous", "true") not in ("true", "false"):
            raise ConfigurationError("parquet: ?anonymous= is true or false")
        if "://" in address.path:
            scheme, _, place = _usable_url(address.path).partition("://")
            folder, _, name = place.rpartition("/")
            if address.collection or not folder or address.path.endswith("/"):
                return cls(url=f"{scheme}://{place}", **options), address.collection
            return cls(url=f"{scheme}://{folder}", **options), name
        path = Path(address.path).expanduser()
        if address.collection:
            return cls(path=path, **options), address.collection
        if address.path.endswith("/") and LocalCollection(LocalFolder(path)).contents() is None:
            return cls(path=path, **options), None
        whole = path if path.name else path.resolve()
        return cls(path=whole.parent, **options), whole.name or None

    def address(self, collection: str | None = None) -> str:
        """Return the address of the folder or of a collection in it."""
        place = str(self.url or self.path)
        path = f"{place}/" if collection is None else place
        query = {} if self.namespace is None else {"namespace": self.namespace}
        query |= {"anonymous": "true"} if self.anonymous else {}
        return str(Address(kind=self.kind, path=path, collection=collection, query=query))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def list_collections(self) -> list[str]:
        """Return the names of the folders that hold a collection, sorted, those being loaded included."""
        with self.translating():
            names = self._root().folders()
            return [name for name in names if name != LOADING and self._folder(name).contents()]

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of; `options` has `finished: False` while it is being loaded."""
        contents, schema = self._contents(collection)
        schema = self._shown(schema)
        if contents.state is State.LOADING:
            return schema.model_copy(update={"options": {**schema.options, "finished": False}})
        return schema

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records: from the footers of all files, of a filter from the records."""

        def counted(contents: Contents, schema: CollectionSchema) -> int:
            files = contents.files.values()
            if where is None:
                return sum(sum(self._reader.group_records(file, self.namespace)) for file in files)
            found = (batch for file in files for batch in self._reader.scan(file, schema, vectors=False))
            return sum(matching(where, batch).true_count for batch in map(self._seen, found))

        return self._steadily(collection, counted)

    def split(
        self, collection: str, *, span_records: int, where: Filter | None = None
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are row groups of a file; of a plain file, rows of one where it is large.

        A part that is changed keeps the numbers of its row groups, so that spans stay valid.
        """
        del where  # to count by it would be to read everything
        self._check_finished(collection)
        sizes = self._steadily(collection, self._sizes)
        for part, (static, groups) in sizes.items():
            for bounds, records in self._reader.spans(groups, span_records, static=static):
                yield Span(bounds={"part": part, **bounds}, records=records), None

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

        def begun(contents: Contents, schema: CollectionSchema) -> Iterator[pa.RecordBatch]:
            found = self._reader.scan(
                self._part(collection, contents, str(span.bounds["part"])),
                schema,
                batch_records=batch_records,
                vectors=vectors,
                bounds=span.bounds,
            )
            # The file is open from the first batch on: from here its replacement does no harm.
            return chain([first] if (first := next(found, None)) else [], found)

        with self.translating(collection):
            for batch in map(self._seen, self._steadily(collection, begun)):
                kept = batch if where is None else batch.filter(matching(where, batch))
                if kept.num_rows:
                    yield kept

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids; ids that aren't there are left out."""
        ids = self._named(ids)
        found = self._steadily(
            collection,
            lambda contents, schema: self._reader.fetch(
                contents.files.values(), schema, ids, vectors=vectors
            ),
        )
        return self._seen(found)

    def fingerprint(self, collection: str) -> str:
        """Return a digest of the manifest and of the files' names, sizes and times of change."""
        self._check_finished(collection)
        with self.translating(collection):
            identity = self._folder(collection).identity()
            if self.namespace is not None:
                # Other namespaces may be written to meanwhile, such as the target of the same move.
                _, *files = identity
                held = self._steadily(collection, self._sizes)
                identity = [
                    file for file in files if sum(held.get(PartFile.part_of(file[0]), (False, [1]))[1])
                ]
            return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Begin a collection; until `finish_load` it is a target and no source."""
        with self.translating(schema.name):
            folder = self._folder(schema.name)
            folder.folder.make()
            with folder.changing():
                if folder.contents() is not None:
                    if self._is_free(schema):
                        return
                    raise CollectionExistsError(
                        f"{self.address(schema.name)} is there already; choose another name or drop it",
                        store=self.kind,
                        collection=schema.name,
                    )
                bound = self.namespace is not None
                folder.create(schema.model_copy(update={"has_namespaces": bound or schema.has_namespaces}))

    def drop(self, collection: str) -> None:
        """Remove a collection's files, and the folder where nothing else is in it.

        Of a store that is bound to a namespace: its records, and the collection where no others are left.
        """
        with self._changing(collection) as (folder, contents):
            if self.namespace is not None:
                whole = sum(sum(self._reader.group_records(file)) for file in contents.files.values())
                if whole > self.count(collection):
                    self._remove_namespace(folder, contents)
                    return
            folder.drop(contents)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        """Write whole records, each replacing what was under its id, all or none of them.

        Every file that holds one of the ids is written again: for many records `load_part` is the way.
        While a first load is under way the files follow one after the other.
        """
        with self._changing(collection) as (folder, contents), folder.staging() as new:
            schema = contents.known_schema
            batch = self._stored(batch, schema, collection)
            held = self._change(folder, contents, batch, parts.replacing(batch), new)
            fresh = batch.filter(pc.invert(batches.is_among(batch, held)))
            if fresh.num_rows:
                groups = parts.split(fresh)
                name = part_name("more", secrets.token_hex(8))
                new[name] = folder.stage(name, schema, groups)
            folder.put(contents, new)

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        """Remove these ids; those that aren't there are no error."""
        ids = self._named(ids)
        with self._changing(collection) as (folder, contents), folder.staging() as new:
            self._change(folder, contents, ids, parts.removing(ids), new)
            folder.put(contents, new)

    @contextmanager
    def load_part(self, collection: str, part: str) -> Iterator[Callable[[pa.RecordBatch], None]]:
        """Write one partition's file, as a whole in the place of the one before.

        In a finished collection it is published at once, beside the files that are there: what they hold
        under its ids goes, and nothing else does, for another migration's part may have the same name.
        """
        with ExitStack() as stack:
            with self._changing(collection) as (folder, contents):
                schema, begun = contents.known_schema, contents.state
                is_loading = begun is State.LOADING
                name = self._part_name(part) if is_loading else part_name("more", secrets.token_hex(8))
                new_file, sink = stack.enter_context(folder.new_file(name))
            with self.translating(collection):
                writer = stack.enter_context(parts.PartWriter(sink, batches.arrow_schema(schema)))

            def write(batch: pa.RecordBatch) -> None:
                with self.translating(collection):
                    writer.write(self._stored(batch, schema, collection))

            yield write
            with self.translating(collection):
                stack.close()
        with self._changing(collection) as (folder, contents), folder.staging() as new:
            new[name] = new_file
            if contents.state is not begun:
                raise StoreRefusedError(
                    f"{self.address(collection)}: the load was finished while part {part} was written",
                    store=self.kind,
                    collection=collection,
                )
            if contents.state is State.FINISHED:
                ids = parts.read_ids(folder.staged, new_file)
                self._change(folder, contents, ids, parts.removing(ids), new)
            folder.put(contents, new)

    def read_part(self, collection: str, part: str, ids: pa.RecordBatch) -> pa.RecordBatch:
        """Return what a load wrote for these ids: from the part's own file, or where they went since."""
        name, ids = self._part_name(part), self._named(ids)

        def read(contents: Contents, schema: CollectionSchema) -> pa.RecordBatch:
            others = contents.without(name).files.values()
            own = [contents.files[name]] if name in contents.files else []
            return self._reader.fetch([*own, *others], schema, ids)

        return self._seen(self._steadily(collection, read))

    def begin_load(self, collection: str) -> None:
        """Carry through what a writer was killed in; a collection is ready to be loaded from `create` on."""
        with self._changing(collection):
            pass

    def finish_load(self, collection: str) -> None:
        """Publish the files of a first load, and with them the collection."""
        with self._changing(collection) as (folder, contents):
            folder.finish(contents)

    # ── search ───────────────────────────────────────────────────────────────────────────────────────

    def search(
        self, collection: str, vector: Any, *, limit: int, name: str = "", where: Filter | None = None
    ) -> list[tuple[Any, float]]:
        """Return the nearest `(id, distance)` by reading every record."""

        def searched(contents: Contents, schema: CollectionSchema) -> list[tuple[Any, float]]:
            files = contents.files.values()
            found = (self._seen(batch) for file in files for batch in self._reader.scan(file, schema))
            if where is not None:
                found = (batch.filter(matching(where, batch)) for batch in found)
            address = self.address(collection)
            return nearest(found, vector, schema, name=name, limit=limit, where=address)

        return self._steadily(collection, searched)

    def close(self) -> None:
        """Close the connection to an object store; it may be used again after."""
        if self._files is not None:
            self._files.close()

    def translate(self, error: Exception, collection: str | None = None) -> MigrationError:
        """Return the error for what the file system or pyarrow raised."""
        where = self.address(collection)
        if isinstance(error, OSError) and error.errno in _FULL:
            return DiskFullError(
                f"{where}: no room is left to write ({error.strerror}); what was written before is whole: "
                "make room and run again",
                store=self.kind,
                collection=collection,
            )
        return StoreRefusedError(f"{where}: {type(error).__name__}: {error}", store=self.kind)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _root(self) -> LocalFolder | RemoteFolder:
        if self._files is not None:
            return RemoteFolder(self._files, str(self.url))
        return LocalFolder(self.path or Path())

    def _folder(self, collection: str) -> CollectionFolder[Any]:
        if collection in ("", ".", "..", LOADING) or not set("/\\\0").isdisjoint(collection):
            raise ConfigurationError(
                f"parquet: {collection!r} can't be the name of a collection here: expected a folder's name "
                "without / \\ or NUL",
                collection=collection,
            )
        root = self._root()
        if isinstance(root, RemoteFolder):
            return RemoteCollection(root.child(collection))
        return LocalCollection(root.child(collection))

    # Of the store that is bound to a namespace: what it shows of a collection, and what it stores there.

    def _shown(self, schema: CollectionSchema) -> CollectionSchema:
        if self.namespace is None:
            return schema
        return schema.model_copy(update={"has_namespaces": False})

    def _seen(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch if self.namespace is None else batches.of_namespace(batch, self.namespace)

    def _named(self, ids: pa.RecordBatch) -> pa.RecordBatch:
        return ids if self.namespace is None else batches.put_in_namespace(ids, self.namespace)

    def _stored(self, batch: pa.RecordBatch, schema: CollectionSchema, collection: str) -> pa.RecordBatch:
        batch = batches.conform(batch, self._shown(schema), where=self.address(collection))
        return batch if self.namespace is None else self._named(batch).cast(batches.arrow_schema(schema))

    def _part_name(self, part: str) -> str:
        return part_name("part", part if self.namespace is None else f"{part}/{self.namespace}")

    def _is_free(self, schema: CollectionSchema) -> bool:
        """Whether the collection is there for other namespaces' records, and has a place for these."""
        if self.namespace is None or self.count(schema.name):
            return False
        return bool(batches.arrow_schema(self.describe(schema.name)).equals(batches.arrow_schema(schema)))

    def _remove_namespace(self, folder: CollectionFolder[Any], contents: Contents) -> None:
        with folder.staging() as new:
            for part, located in contents.files.items():
                if sum(self._reader.group_records(located, self.namespace)):
                    groups = parts.row_groups(located.folder, located.name)
                    others = (parts.outside(group, self.namespace or "") for group in groups)
                    new[part] = folder.stage(part, contents.known_schema, others)
            folder.put(contents, new)

    def _contents(
        self, collection: str, folder: CollectionFolder[Any] | None = None
    ) -> tuple[Contents, CollectionSchema]:
        with self.translating(collection):
            contents = (folder or self._folder(collection)).contents()
            if contents is None:
                raise CollectionNotFoundError(
                    f"{self.address(collection)} isn't there: a folder with Parquet files was expected; "
                    f"there are: {', '.join(self.list_collections()) or 'none'}",
                    store=self.kind,
                    collection=collection,
                )
            schema = contents.schema or self._reader.plain_schema(collection, contents)
            if self.namespace is not None and not schema.has_namespaces:
                raise ConfigurationError(
                    f"{self.address(collection)}: the collection has no namespaces; leave ?namespace= out",
                    store=self.kind,
                    collection=collection,
                )
            # The folder may have been renamed since: its name now is the collection's.
            return contents, schema.model_copy(update={"name": collection})

    def _check_finished(self, collection: str) -> None:
        if self._contents(collection)[0].state is State.LOADING:
            raise IncompleteError(
                f"{self.address(collection)}: the load into it was never finished, so it can't be a source; "
                "finish that migration, or drop the collection",
                store=self.kind,
                collection=collection,
            )

    def _steadily(self, collection: str, work: Callable[[Contents, CollectionSchema], _T]) -> _T:
        """Return the work's result; it begins again where a writer replaced the files meanwhile."""
        while True:
            contents, schema = self._contents(collection)
            with self.translating(collection):
                try:
                    return work(contents, schema)
                except FileNotFoundError as error:
                    if contents == self._contents(collection)[0]:
                        raise StoreRefusedError(
                            f"{self.address(collection)}: the file {error.filename} is gone; restore it, for "
                            "nothing of a collection is skipped",
                            store=self.kind,
                            collection=collection,
                        ) from error

    def _sizes(self, contents: Contents, _: CollectionSchema) -> dict[str, tuple[bool, list[int]]]:
        files = sorted(contents.files.items())
        static = self.namespace is None  # the records of a namespace have no row numbers of their own
        return {
            part: (file.is_plain and static, self._reader.group_records(file, self.namespace))
            for part, file in files
        }

    def _part(self, collection: str, contents: Contents, part: str) -> Located:
        if part not in contents.files:
            raise StoreRefusedError(
                f"{self.address(collection)}: the file of part {part} is gone since the collection "
                "was split; restore it or plan afresh",
                store=self.kind,
                collection=collection,
            )
        return contents.files[part]

    @contextmanager
    def _changing(self, collection: str) -> Iterator[tuple[CollectionFolder[Any], Contents]]:
        """Give the collection to the one writer that may change it now."""
        folder = self._folder(collection)
        if self.path is not None:
            self._contents(collection)  # a local lock is one on the folder, which must be there
        with self.translating(collection), folder.changing():
            contents, _ = self._contents(collection, folder)
            if contents.state is State.PLAIN:
                raise UnsupportedOperationError(
                    f"{self.address(collection)} was written by another tool, and such files are never "
                    "changed; choose another target",
                    store=self.kind,
                    collection=collection,
                )
            yield folder, contents

    def _change(
        self,
        folder: CollectionFolder[Any],
        contents: Contents,
        ids: pa.RecordBatch,
        change: parts.Change,
        new: dict[str, str],
    ) -> pa.RecordBatch:
        """Stage again every file that holds one of the ids, into `new` by part; return the ids held."""
        found = [batches.ids_of(ids).slice(0, 0)]
        for part, located in contents.files.items():
            held = self._reader.held(located, ids)
            if held.num_rows:
                found.append(held)
                groups = map(change, parts.row_groups(located.folder, located.name))
                new[part] = folder.stage(part, contents.known_schema, groups)
        return pa.concat_batches(found)
