"""A collection of our own: what its folder holds, and how that changes without a half state to be seen.

    docs/_collection.json      schema, counts, the names and sizes of the two files that are the collection
    docs/index.faiss           an index as FAISS writes it; the id of a vector is the row of its record
    docs/records.parquet       id, id_type, document, metadata; `number` where that isn't the row; `vector`
                               where the index is normalised
    docs/.loading/             what is being written

- **Loading**: there is no `_collection.json` but the hidden one. Each part of a load becomes two files of the
  hidden folder (`parts.py`); where two parts hold one id, the later one counts.
- **Merging**: so it is with parts that are loaded into a collection that is there: readers have it as it was,
  until all parts are put in at once. Whoever changes it otherwise puts them in first.
- **Publishing**: index and records are written under new names (`index~2.faiss`), synced, and become the
  collection by one rename, that of `_collection.json`. A load of one part into a flat index has both files
  already: they get their names by hard links. The old files are removed after. What a killed writer left is
  removed by the next one.

A record keeps its `number` for good, be it replaced or others removed: ranges of numbers are the spans that
hold while others write.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.model import CollectionSchema, Value, VectorField
from migration_pipelines.stores.faiss import build
from migration_pipelines.stores.faiss.parts import (
    TEXTS,
    Part,
    PartWriter,
    last_of_each_id,
    latest,
    shape_of,
)
from migration_pipelines.stores.faiss.table import NUMBER, ParquetTable, TableWriter

MANIFEST = "_collection.json"
LOADING = ".loading"
_FORMAT = 1
_RECORDS = ".parquet"
_TEMPORARY = ".tmp"

# Gives all records each time that it is called.
Batches = Callable[[], Iterable[pa.RecordBatch]]


class FileInfo(Value):
    """One file of a collection."""

    name: str
    bytes: int


class Manifest(Value):
    """What `_collection.json` says; `index` and `records` are None as long as a first load is under way.

    `normalised` is set where the index holds vectors of length one and `records` the originals.
    `next_number` is the number that the next new record gets.
    """

    format: int = _FORMAT
    description: CollectionSchema = Field(alias="schema")
    count: int = 0
    next_number: int = 0
    normalised: bool = False
    index: FileInfo | None = None
    records: FileInfo | None = None

    def text(self) -> str:
        """Return the file's text."""
        data = self.model_dump(mode="json", by_alias=True)
        data["schema"]["id_kinds"].sort()
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @property
    def generation(self) -> int:
        """How many times the collection was published."""
        if self.index is None:
            return 0
        return int(self.index.name.removesuffix(".faiss").partition("~")[2] or 1)


class CollectionFolder:
    """One collection's folder. Reading changes nothing; what changes something says `Under changing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hidden = path / LOADING

    def manifest(self) -> Manifest | None:
        """Return what the collection is now, None where there is none."""
        return self._manifest(self.path) or self._manifest(self.hidden)

    def parts(self) -> list[Part]:
        """Return the staged parts, oldest first; of each the newest file."""
        return Part.all_in(self.hidden)

    def _manifest(self, folder: Path) -> Manifest | None:
        path = folder / MANIFEST
        try:
            manifest = Manifest.model_validate_json(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValidationError, UnicodeDecodeError) as error:
            raise StoreRefusedError(
                f"{path} is damaged, of a later version, or of something else than this tool: restore it",
                file=str(path),
            ) from error
        for info in (manifest.index, manifest.records):
            if info is not None and (
                info.name[:1] in ("", ".") or not {"/", "\\", "\0"}.isdisjoint(info.name)
            ):
                raise StoreRefusedError(f"{path}: {info.name!r} isn't a file of this folder", file=info.name)
        if manifest.format != _FORMAT:
            raise StoreRefusedError(
                f"{path}: expected format {_FORMAT}, found {manifest.format}; read it with a later version"
            )
        return manifest

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other writers out; the folder must be there."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def create(self, schema: CollectionSchema) -> None:
        """Begin a collection: it is loading, and holds nothing. Under `changing`."""
        self.remove_strays(None)
        self.hidden.mkdir(exist_ok=True)
        _sync(self.path)
        _write_text(self.hidden / MANIFEST, Manifest(schema=schema).text())

    def drop(self) -> None:
        """Remove the collection, and of the folder nothing that isn't of it. Under `changing`."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        self.remove_strays(None)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    @contextmanager
    def new_part(self) -> Iterator[Part]:
        """Give a hidden part to write, gone afterwards unless it is staged. Begins under `changing`."""
        self.hidden.mkdir(exist_ok=True)
        part = Part.new(self.hidden, secrets.token_hex(8))
        with part.held():
            yield part

    @contextmanager
    def writing(self, part: Part, schema: CollectionSchema) -> Iterator[PartWriter]:
        """Give the writer of a part, whose files are durable afterwards."""
        with PartWriter(part, schema) as writer:
            yield writer
        _sync(part.vectors)
        _sync(part.records)

    def stage(self, written: Part, name: str) -> None:
        """Make a hidden part the newest of its name, and the last of all. Under `changing`."""
        parts = self.parts()
        older = [part for part in parts if part.name == name]
        place = max((part.place[0] for part in parts), default=0) + 1
        written.rename(Part.new(self.hidden, name, place))
        _sync(self.hidden)
        for part in older:
            part.remove()

    def replace(self, part: Part, written: Part) -> None:
        """Put a hidden part in the place of another. Under `changing`."""
        place, version = part.place
        written.rename(Part.new(self.hidden, part.name, place, version + 1))
        _sync(self.hidden)
        part.remove()

    def finish(self, manifest: Manifest, *, override: str | None) -> None:
        """Publish what a first load brought. Under `changing`."""
        parts, schema = self.parts(), manifest.description
        keep = last_of_each_id(ParquetTable(part.records) for part in parts)
        shape = shape_of(parts, keep)
        if len(parts) == 1 and keep.all() and build.is_plain(schema.vectors[0], shape, override):
            made = _described(manifest, {"type": "flat"}, shape.count, shape.count)
            self._publish(manifest, partial(_link, parts[0], made))
        else:
            self._write(manifest, partial(latest, parts, keep, schema), shape, override)

    def publish(self, manifest: Manifest, records: Batches, *, override: str | None) -> None:
        """Write index and records anew, and make them the collection in one step. Under `changing`.

        Staged parts are removed: `records` has theirs.

        Parameters
        ----------
        records
            In the order of their numbers; batches that have no column `number` are new ones.
        """
        shape = build.Shape()
        for batch in records():
            shape.add(_matrix(batch), manifest.description.vectors[0].metric)
        self._write(manifest, records, shape, override)

    def _write(self, manifest: Manifest, records: Batches, shape: build.Shape, override: str | None) -> None:
        self._publish(manifest, partial(_write, manifest, records, shape, override))

    def _publish(self, manifest: Manifest, write: Callable[[Path, Path], Manifest]) -> None:
        """Make two files that `write` makes durable the collection; it returns the manifest without them."""
        suffix = f"~{manifest.generation + 1}" if manifest.generation else ""
        names = f"index{suffix}.faiss", f"records{suffix}{_RECORDS}"
        temporary = [self.path / f".{name}{_TEMPORARY}" for name in names]
        try:
            for hidden in temporary:
                hidden.unlink(missing_ok=True)
            made = write(*temporary)
            for hidden, name in zip(temporary, names, strict=True):
                hidden.rename(self.path / name)
        finally:
            for hidden in temporary:
                hidden.unlink(missing_ok=True)
        infos = [FileInfo(name=name, bytes=(self.path / name).stat().st_size) for name in names]
        published = made.model_copy(update={"index": infos[0], "records": infos[1]})
        _sync(self.path)
        _write_text(self.path / MANIFEST, published.text())
        self.remove_strays(published)

    def remove_strays(self, kept: Manifest | None) -> None:
        """Remove what writers left that were killed, and what a newer generation replaced."""
        names = {info.name for info in (kept.index, kept.records) if info} if kept else set()
        for pattern in (f".*{_TEMPORARY}", "index*.faiss", f"records*{_RECORDS}"):
            for path in self.path.glob(pattern):
                if path.name not in names:
                    path.unlink()
        self._clear(everything=kept is None)

    def _clear(self, *, everything: bool) -> None:
        """Remove what is staged, and what killed writers left; what is being written now only where asked.

        Under `changing`.
        """
        if everything:
            shutil.rmtree(self.hidden, ignore_errors=True)
        elif self.hidden.is_dir():
            for part in self.parts():
                part.remove()
            for path in Part.left_behind(self.hidden):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # somebody writes a part
                self.hidden.rmdir()


def part_name(prefix: str, name: str) -> str:
    """Return the part for a name of any characters."""
    return f"{prefix}-{quote(name, safe='').replace('~', '%7E')}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        temporary.write_text(text, "utf-8")
        _sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


# ── building ─────────────────────────────────────────────────────────────────────────────────────────


def _described(
    manifest: Manifest,
    settings: Mapping[str, Any],
    count: int,
    next_number: int,
    *,
    normalised: bool = False,
) -> Manifest:
    """Return the manifest of the next generation but for its files."""
    schema = manifest.description
    (field,) = schema.vectors
    described = schema.model_copy(update={"vectors": (field.model_copy(update={"index": settings}),)})
    return Manifest(schema=described, count=count, next_number=next_number, normalised=normalised)


def _link(part: Part, made: Manifest, index_path: Path, records_path: Path) -> Manifest:
    """Give the files of a part second names: they stay a part's until the collection is published."""
    for new, old in ((index_path, part.vectors), (records_path, part.records)):
        try:
            new.hardlink_to(old)
        except OSError:  # a file system without links
            shutil.copyfile(old, new)
            _sync(new)
    return made


def _write(
    manifest: Manifest,
    records: Batches,
    shape: build.Shape,
    override: str | None,
    index_path: Path,
    records_path: Path,
) -> Manifest:
    """Write both files and return the manifest but for their names."""
    (field,) = manifest.description.vectors
    settings = build.choose(field, shape, override)
    normalised = build.is_normalised(field, shape)
    sample = _sample(records, build.sample_rows(settings, shape.count), normalised=normalised)
    writer = _RecordsWriter(manifest.next_number, keeps_vectors=normalised)

    def vectors() -> Iterator[npt.NDArray[Any]]:
        for batch in records():
            writer.write(table, batch)
            matrix = _matrix(batch)
            yield build.normalised(matrix) if normalised else matrix

    with TableWriter(records_path, writer.columns(field)) as table:
        indexed = build.write_index(field, settings, vectors(), index_path, sample=sample)
    if not indexed == table.count == shape.count:
        raise StoreRefusedError(
            f"{index_path}: {shape.count:,} records were read, {table.count:,} written and {indexed:,} "
            "vectors indexed: the files changed meanwhile",
            expected=shape.count,
            found=indexed,
        )
    _sync(index_path)
    _sync(records_path)
    return _described(manifest, settings, table.count, writer.next_number, normalised=normalised)


class _RecordsWriter:
    """Numbers records, and takes from them the columns that are kept beside the index."""

    def __init__(self, next_number: int, *, keeps_vectors: bool) -> None:
        self.next_number = next_number
        self._keeps_vectors = keeps_vectors

    def columns(self, field: VectorField) -> pa.Schema:
        """Return the columns of the file."""
        fields = [pa.field(NUMBER, pa.int64()), *(pa.field(name, pa.string()) for name in TEXTS)]
        vector = [pa.field(batches.VECTOR, batches.vector_type(field))] if self._keeps_vectors else []
        return pa.schema([*fields, *vector])

    def write(self, table: TableWriter, batch: pa.RecordBatch) -> None:
        """Write a batch."""
        if NUMBER not in batch.schema.names:
            numbers = np.arange(self.next_number, self.next_number + batch.num_rows)
            self.next_number += batch.num_rows
            batch = batch.append_column(NUMBER, pa.array(numbers, pa.int64()))
        names = [NUMBER, *TEXTS, *([batches.VECTOR] if self._keeps_vectors else [])]
        table.write(batch.select(names))


def _matrix(batch: pa.RecordBatch) -> npt.NDArray[Any]:
    return batches.dense_matrix(batch.column(batches.VECTOR))


def _sample(records: Batches, rows: npt.NDArray[np.int64], *, normalised: bool) -> npt.NDArray[Any]:
    found, at = [np.empty((0, 0), np.float32)], 0
    for batch in records() if len(rows) else ():
        inside = rows[np.searchsorted(rows, at) : np.searchsorted(rows, at + batch.num_rows)] - at
        found.append(np.array(_matrix(batch)[inside]))
        at += batch.num_rows
    sample = np.concatenate(found[1:]) if len(found) > 1 else found[0]
    return build.normalised(sample) if normalised else sample
