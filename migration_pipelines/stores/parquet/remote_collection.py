"""A collection in an object store, where nothing can be renamed: its manifest is the only switch.

    docs/_collection.json                          the manifest, as in a local folder
    docs/part-0001~1f0c3a9e.1.a1b2c3d4e5f6.parquet   records: the load, the version, and what makes it unique
    docs/.loading/_collection.json                 there until the first load is finished

- Each object of records has a name of its own for good, and is there only when its upload was completed.
- **Loading**: the newest version of each part of this load counts. A killed worker leaves an upload that was
  never completed, which nobody can see, and a worker of an earlier load writes parts of another load.
- **Publishing** is one PUT of the manifest, on the condition that it is still the one that was read (S3;
  elsewhere only this process's own writers are kept apart). What was there before and isn't named by it is
  removed afterwards. Only what was listed *before* the PUT is: another writer's objects that are younger
  stay, and his own PUT will fail where they are older.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from migration_pipelines.errors import MigrationError, TransientError
from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores.parquet import part as parts
from migration_pipelines.stores.parquet.collection import (
    MANIFEST,
    CollectionFolder,
    Contents,
    Located,
    Manifest,
    PartFile,
    State,
)
from migration_pipelines.stores.parquet.remote import RemoteFolder, unique_name

_NAME = re.compile(r"(?P<part>[^~]+)~(?P<load>[0-9a-f]{8})\.(?P<version>\d+)\.[0-9a-f]{12}\.parquet")
_LOCKS: dict[str, threading.RLock] = {}
_LOCKS_LOCK = threading.Lock()


class RemoteCollection(CollectionFolder[RemoteFolder]):
    """One collection's folder in an object store. Reading changes nothing; what changes something says so."""

    def __init__(self, folder: RemoteFolder) -> None:
        super().__init__(folder)
        self.staged = folder
        self._load = ""
        self._versions: dict[str, int] = {}
        self._tag: str | None = None
        self._names: list[str] | None = None  # of objects of records, listed when the change began

    def contents(self) -> Contents | None:
        """Return what the collection consists of now, None where there is none."""
        is_loading = self._names is not None and self._tag is None  # and one request is spared
        manifest = None if is_loading else self._manifest(self.folder)
        if manifest is not None:
            listed = {file.part: Located(self.folder, file.name, file) for file in manifest.files or ()}
            return self._noted(manifest, Contents(State.FINISHED, manifest.description, listed))
        manifest = self._manifest(self.hidden)
        names = self.folder.names(suffix=parts.SUFFIX) if self._names is None else self._names
        if manifest is not None:
            newest: dict[str, tuple[int, str]] = {}
            for name, made in _ours(names):
                if made["load"] == manifest.load:
                    newest[made["part"]] = max(
                        newest.get(made["part"], (0, "")), (int(made["version"]), name)
                    )
            files = {part: Located(self.folder, name) for part, (_, name) in newest.items()}
            return self._noted(manifest, Contents(State.LOADING, manifest.description, files))
        ours = {name for name, _ in _ours(names)}
        plain = {name: Located(self.folder, name, is_plain=True) for name in names if name not in ours}
        return Contents(State.PLAIN, None, plain) if plain else None

    def identity(self) -> list[Any]:
        """Return what changes when the collection does: its manifest, its objects' names, sizes and tags."""
        contents = self.contents()
        there = self.folder.listing()
        files = contents.files.values() if contents else ()
        return [self.folder.text(MANIFEST), *((file.name, *there.get(file.name, ())) for file in files)]

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────

    def create(self, schema: CollectionSchema) -> None:
        """Begin a collection: it is loading, and holds nothing. Under `changing`."""
        self._remove(name for name, _ in _ours(self._before()))
        manifest = Manifest.of(schema, load=secrets.token_hex(4))
        self.hidden.write_text(MANIFEST, manifest.text(), over=None)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep this process's other writers out, and note what there is before the change."""
        with _lock(self.folder.where()):
            listing = self.folder.listing()
            self._tag = listing[MANIFEST][1] if MANIFEST in listing else None
            self._names = sorted(name for name in listing if name.endswith(parts.SUFFIX))
            try:
                yield
            finally:
                self._names = None

    @contextmanager
    def staging(self) -> Iterator[dict[str, str]]:
        """Give the place to note new objects by part; they are removed when anything fails."""
        new: dict[str, str] = {}
        try:
            yield new
        except BaseException:
            with suppress(MigrationError):  # what stays is removed by whoever publishes next
                self._remove(new.values())
            raise

    @contextmanager
    def new_file(self, part: str) -> Iterator[tuple[str, pa.NativeFile]]:
        """Give the name of a new object and the file to write; it is there when the context ends."""
        version = self._versions.get(part, 0) + 1
        name = unique_name(f"{part}~{self._load}.{version}")
        with self.folder.upload(name) as sink:
            yield name, sink

    def put(self, contents: Contents, new: Mapping[str, str]) -> None:
        """Make new objects those of some parts, all or none of them. Under `changing`.

        During a first load they count from when they were written.
        """
        if contents.state is State.LOADING:
            for name, made in _ours(self._before()):
                is_older = made["load"] == self._load and name != new.get(made["part"])
                if is_older and made["part"] in new:
                    self.folder.remove(name)
        elif new:
            kept = [
                located.expected
                for part, located in contents.files.items()
                if located.expected is not None and part not in new
            ]
            fresh = [self._examined(name, contents.known_schema) for name in new.values()]
            self._switch(Manifest.of(contents.known_schema, [*kept, *fresh], load=self._load))

    def finish(self, contents: Contents) -> None:
        """Publish what was loaded; nothing where that is done. Under `changing`."""
        if contents.state is State.LOADING:
            schema = contents.known_schema
            made = [self._examined(located.name, schema) for located in contents.files.values()]
            self._switch(Manifest.of(schema, made, load=self._load))
        elif self.hidden.text(MANIFEST) is not None:  # whoever published was killed before it was tidy
            self._tidy({located.name for located in contents.files.values()})
        self.folder.abort_uploads()

    def drop(self, contents: Contents) -> None:
        """Remove the collection, and of the folder nothing that isn't of it. Under `changing`.

        The manifests go last: what a crash leaves isn't taken for another tool's files.
        """
        self.folder.abort_uploads()
        ours = [name for name, _ in _ours(self._before())]
        self._remove({*ours, *(located.name for located in contents.files.values())})
        self.hidden.remove(MANIFEST)
        self.folder.remove(MANIFEST)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _examined(self, name: str, schema: CollectionSchema) -> PartFile:
        try:
            return super()._examined(name, schema)
        except FileNotFoundError:
            raise TransientError(
                f"{self.folder.where(name)}: another writer published meanwhile and removed it"
            ) from None

    def _noted(self, manifest: Manifest, contents: Contents) -> Contents:
        """Keep what names of new objects are made from."""
        self._load = manifest.load or secrets.token_hex(4)
        made = ((part, _NAME.fullmatch(located.name)) for part, located in contents.files.items())
        self._versions = {part: int(found["version"]) for part, found in made if found}
        return contents

    def _switch(self, manifest: Manifest) -> None:
        self.folder.write_text(MANIFEST, manifest.text(), over=self._tag)
        self._tidy({file.name for file in manifest.files or ()})

    def _tidy(self, named: set[str]) -> None:
        self._remove(name for name, _ in _ours(self._before()) if name not in named)
        self.hidden.remove(MANIFEST)

    def _before(self) -> list[str]:
        assert self._names is not None, "only under `changing`"
        return self._names

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.folder.remove(name)


def _ours(names: Iterable[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the names that this project gave, with what they are made of."""
    for name in names:
        made = _NAME.fullmatch(name)
        if made:
            yield name, made


def _lock(where: str) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(where, threading.RLock())
