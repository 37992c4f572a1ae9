"""A collection in a folder: what it consists of, and how that changes without a half state to be seen.

    docs/_collection.json       the manifest: schema, counts, digest, and the files that are the collection
    docs/part-0001.parquet      its records
    docs/.loading/              what is being written; no reader of Parquet folders looks into hidden ones
    docs/.loading/_collection.json

- **Loading**: there is no manifest but the hidden one. Each part of a load becomes a file of the hidden
  folder by one rename.
- **Publishing**, the only way in which a finished collection comes to be or changes: the new files and,
  last, the new manifest that lists them are in the hidden folder; then the files are moved into place, then
  the manifest; then files that it replaces are removed. Once the hidden manifest lists files, whoever
  writes next carries this through, so that a crash anywhere leaves the old state or the new.
- **Plain**: Parquet files without any manifest, of another tool. They are read and never changed.

A part that is changed gets a new file, `part-0001~2.parquet`; what is before the `~` is the part's name.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import pyarrow as pa
from pydantic import Field, ValidationError

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.model import CollectionSchema, Metric, Value
from migration_pipelines.stores.parquet import part as parts
from migration_pipelines.stores.parquet.folder import Folder, LocalFolder

MANIFEST = "_collection.json"
LOADING = ".loading"
_FORMAT = 1
F = TypeVar("F", bound=Folder)


class PartFile(Value):
    """One file of a collection."""

    name: str
    records: int
    bytes: int
    digest: str  # of its records, as 32 hexadecimal digits

    @property
    def part(self) -> str:
        """The name of the part, whatever version of it the file is."""
        return self.part_of(self.name)

    @staticmethod
    def part_of(name: str) -> str:
        """Return the name of the part of which a file of this name is a version."""
        return name.removesuffix(parts.SUFFIX).partition("~")[0]

    def next_name(self) -> str:
        """Return the name of the file that will replace this one."""
        version = self.name.removesuffix(parts.SUFFIX).partition("~")[2]
        return f"{self.part}~{int(version or 1) + 1}{parts.SUFFIX}"


class Manifest(Value):
    """What `_collection.json` says. `files` is None as long as a first load is under way.

    `records`, `digest` (the sum of the files' digests modulo 2**128) and `metrics` (of each vector column)
    say again what follows from the rest, for people and other programs. `replaced` names files that the
    publishing of this manifest removes. `load` tells the first load from others of the same name, where
    files have their final names from the start.
    """

    format: int = _FORMAT
    description: CollectionSchema = Field(alias="schema")
    metrics: Mapping[str, Metric | None]
    records: int = 0
    digest: str = ""
    files: tuple[PartFile, ...] | None = None
    replaced: tuple[str, ...] = ()
    load: str = ""

    @classmethod
    def of(
        cls,
        schema: CollectionSchema,
        files: Iterable[PartFile] | None = None,
        *,
        replaced: Sequence[str] = (),
        load: str = "",
    ) -> Manifest:
        """Return the manifest of a collection of these files."""
        metrics = {batches.vector_column(field.name): field.metric for field in schema.vectors}
        if files is None:
            return cls(schema=schema, metrics=metrics, load=load)
        files = tuple(sorted(files, key=lambda file: file.name))
        return cls(
            schema=schema,
            metrics=metrics,
            records=sum(file.records for file in files),
            digest=f"{batches.add_digests(int(file.digest, 16) for file in files):032x}",
            files=files,
            replaced=tuple(replaced),
            load=load,
        )

    def text(self) -> str:
        """Return the file's text."""
        data = self.model_dump(mode="json", by_alias=True)
        data["schema"]["id_kinds"].sort()
        if not self.load:
            del data["load"]
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


class State(Enum):
    """What there is of a collection."""

    LOADING = auto()
    FINISHED = auto()
    PLAIN = auto()


@dataclass(frozen=True)
class Located:
    """A file of a collection and the folder where it lies now."""

    folder: Folder
    name: str
    expected: PartFile | None = None  # as the manifest has it, where it is published
    is_plain: bool = False


@dataclass(frozen=True)
class Contents:
    """What a collection consists of at one moment; `schema` is None where only the files can tell."""

    state: State
    schema: CollectionSchema | None
    files: Mapping[str, Located]  # by part

    @property
    def known_schema(self) -> CollectionSchema:
        """The schema of a collection that isn't plain."""
        assert self.schema is not None
        return self.schema

    def without(self, part: str) -> Contents:
        """Return the same without one part."""
        return replace(self, files={name: file for name, file in self.files.items() if name != part})


class CollectionFolder(ABC, Generic[F]):
    """One collection's folder, wherever it is. Reading changes nothing; what changes something says so."""

    staged: F  # where new files are until `put`

    def __init__(self, folder: F) -> None:
        self.folder = folder
        self.hidden = folder.child(LOADING)

    @abstractmethod
    def contents(self) -> Contents | None:
        """Return what the collection consists of now, None where there is none."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return what changes when the collection does: its manifest, then of each file its name and more."""

    @abstractmethod
    def create(self, schema: CollectionSchema) -> None:
        """Begin a collection: it is loading, and holds nothing. Under `changing`."""

    @abstractmethod
    def changing(self) -> AbstractContextManager[None]:
        """Keep other writers out."""

    @abstractmethod
    def staging(self) -> AbstractContextManager[dict[str, str]]:
        """Give the place to note new files by part; they are removed when anything fails."""

    @abstractmethod
    def new_file(self, part: str) -> AbstractContextManager[tuple[str, pa.NativeFile]]:
        """Give the name of a new file of a part and the file to write; gone if left by an exception."""

    def stage(self, part: str, schema: CollectionSchema, groups: Iterable[pa.RecordBatch]) -> str:
        """Write a new file of these row groups, empty ones too, and return its name. Under `changing`."""
        columns = batches.arrow_schema(schema)
        with self.new_file(part) as (name, sink), parts.PartWriter(sink, columns) as writer:
            for group in groups:
                writer.write_group(group)
        return name

    @abstractmethod
    def put(self, contents: Contents, new: Mapping[str, str]) -> None:
        """Make new files those of some parts, all or none of them. Under `changing`.

        During a first load it is one after the other: nobody takes what is loading for whole.

        Parameters
        ----------
        new
            The new file by part, as `stage` gives it.
        """

    @abstractmethod
    def finish(self, contents: Contents) -> None:
        """Publish what was loaded; nothing where that is done. Under `changing`."""

    @abstractmethod
    def drop(self, contents: Contents) -> None:
        """Remove the collection, and of the folder nothing that isn't of it. Under `changing`.

        The manifests go last: what a crash leaves isn't taken for another tool's files.
        """

    # ── for both kinds ───────────────────────────────────────────────────────────────────────────────

    def _examined(self, name: str, schema: CollectionSchema) -> PartFile:
        """Return what a manifest says of a new file."""
        records = batches.arrow_schema(schema)
        with parts.opened(self.staged, name) as file:
            digest = parts.digest_of(file)
            if digest is None or not file.schema_arrow.equals(records):
                raise StoreRefusedError(
                    f"{self.staged.where(name)} isn't what this load wrote: expected the columns "
                    f"{records.names} and a digest in the footer, found {file.schema_arrow.names}; "
                    "remove the file",
                    file=name,
                )
            size = self.staged.version(name)[0]
            return PartFile(name=name, records=file.metadata.num_rows, bytes=size, digest=f"{digest:032x}")

    def _manifest(self, folder: F) -> Manifest | None:
        text, where = folder.text(MANIFEST), folder.where(MANIFEST)
        if text is None:
            return None
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise StoreRefusedError(
                f"{where} is damaged or of a later version: {error.error_count()} of its "
                f"fields can't be read, the first: {error.errors(include_url=False)[0]['loc']}; restore it",
                file=where,
            ) from error
        if manifest.format != _FORMAT:
            raise StoreRefusedError(
                f"{where}: expected format {_FORMAT}, found {manifest.format}; "
                "read it with a later version of this project"
            )
        for name in (*(file.name for file in manifest.files or ()), *manifest.replaced):
            if name[:1] in ("", ".") or not set("/\\\0").isdisjoint(name):
                raise StoreRefusedError(f"{where}: {name!r} isn't a file of this folder", file=name)
        return manifest


class LocalCollection(CollectionFolder[LocalFolder]):
    """One collection's folder on a local file system."""

    def __init__(self, folder: LocalFolder) -> None:
        super().__init__(folder)
        self.staged = self.hidden

    def contents(self) -> Contents | None:
        """Return what the collection consists of now, None where there is none."""
        manifest = self._manifest(self.folder)
        if manifest is not None:
            listed = {file.part: Located(self.folder, file.name, file) for file in manifest.files or ()}
            return Contents(State.FINISHED, manifest.description, listed)
        manifest = self._manifest(self.hidden)
        if manifest is not None:
            moved = {file.part: Located(self.folder, file.name) for file in manifest.files or ()}
            names = self.hidden.names(suffix=parts.SUFFIX)
            waiting = {name.removesuffix(parts.SUFFIX): Located(self.hidden, name) for name in names}
            return Contents(State.LOADING, manifest.description, moved | waiting)
        names = self.folder.names(suffix=parts.SUFFIX)
        plain = {name: Located(self.folder, name, is_plain=True) for name in names}
        return Contents(State.PLAIN, None, plain) if names else None

    def identity(self) -> list[Any]:
        """Return what changes when the collection does: its manifest, its files' names, sizes and times."""
        contents = self.contents()
        files = contents.files.values() if contents else ()
        return [self.folder.text(MANIFEST), *((f.name, *f.folder.version(f.name)[:2]) for f in files)]

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Begin a collection: it is loading, and holds nothing. Under `changing`."""
        self.hidden.make()
        self._remove_strays()
        self.hidden.write_text(MANIFEST, Manifest.of(schema).text())

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other writers out, and carry through what one of them was killed in."""
        with self.folder.locked():
            self._carry_through()
            yield

    @contextmanager
    def staging(self) -> Iterator[dict[str, str]]:
        """Give the place to note hidden files by part; they are removed when anything fails."""
        new: dict[str, str] = {}
        try:
            yield new
        except BaseException:
            for hidden in new.values():
                self.hidden.remove(hidden)
            raise

    def new_file(self, part: str) -> AbstractContextManager[tuple[str, pa.NativeFile]]:  # noqa: ARG002
        """Give the name of a hidden file and the file to write; it gets its own name by `put`."""
        self.hidden.make()
        return self.hidden.temporary()

    def put(self, contents: Contents, new: Mapping[str, str]) -> None:
        """Make hidden files the new ones of some parts, all or none of them. Under `changing`.

        During a first load it is one after the other: nobody takes what is loading for whole.

        Parameters
        ----------
        new
            The hidden file by part, as `stage` gives it.
        """
        old = {part: located.expected for part, located in contents.files.items()}
        names: dict[str, str] = {}
        for part, hidden in new.items():
            before = old.get(part)
            names[part] = before.next_name() if before else part + parts.SUFFIX
            self.hidden.move(hidden, self.hidden, names[part])
        if contents.state is State.FINISHED and new:
            kept = [file for part, file in old.items() if file is not None and part not in new]
            replaced = [file.name for part, file in old.items() if file is not None and part in new]
            made = [self._examined(name, contents.known_schema) for name in names.values()]
            self._publish(Manifest.of(contents.known_schema, [*kept, *made], replaced=replaced))

    def finish(self, contents: Contents) -> None:
        """Publish what was loaded; nothing where that is done. Under `changing`."""
        if contents.state is State.LOADING:
            schema, located = contents.known_schema, contents.files.values()
            self._publish(Manifest.of(schema, [self._examined(file.name, schema) for file in located]))
        self.hidden.remove_temporary()
        self.hidden.remove_if_empty()

    def drop(self, contents: Contents) -> None:
        """Remove the collection, and of the folder nothing that isn't of it. Under `changing`.

        The manifests go last: what a crash leaves isn't taken for another tool's files.
        """
        for located in contents.files.values():
            self.hidden.remove(located.name)
            self.folder.remove(located.name)
        self.hidden.remove_temporary()
        self.hidden.remove(MANIFEST)
        self.hidden.remove_if_empty()
        self.folder.remove(MANIFEST)
        self.folder.remove_if_empty()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _publish(self, manifest: Manifest) -> None:
        self.hidden.write_text(MANIFEST, manifest.text())
        self._carry_through()

    def _carry_through(self) -> None:
        manifest = self._manifest(self.hidden)
        if manifest is not None and manifest.files is not None:
            waiting = self.hidden.names(suffix=parts.SUFFIX)
            for file in manifest.files:
                if file.name in waiting:
                    self.hidden.move(file.name, self.folder, file.name)
            self.hidden.move(MANIFEST, self.folder, MANIFEST)
        published = self._manifest(self.folder)
        if published is not None:
            self._remove_strays()
            for name in published.replaced:
                self.folder.remove(name)
            self.hidden.remove_if_empty()

    def _remove_strays(self) -> None:
        # Named, but never listed: whoever wrote them was killed before the manifest.
        for name in self.hidden.names(suffix=parts.SUFFIX):
            self.hidden.remove(name)


def part_name(prefix: str, name: str) -> str:
    """Return the part for a name of any characters."""
    return f"{prefix}-{quote(name, safe='').replace('~', '%7E')}"
