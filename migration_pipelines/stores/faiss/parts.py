"""The parts of a load, before they are a collection: of each its records and a flat index of its vectors.

    .loading/part-7~00000003~1.parquet    id, id_type, document, metadata
    .loading/part-7~00000003~1.faiss      the vectors, as they are
    .loading/.4f0c….lock                  held while the part of that hidden name is being written

Behind the `~` are the part's place in the order in which parts were staged, and its version. Both files are
as a finished collection has them: where one part is the whole of it, they become its files as they are.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores.faiss.build import Shape
from migration_pipelines.stores.faiss.in_place import FlatWriter
from migration_pipelines.stores.faiss.index import open_index
from migration_pipelines.stores.faiss.opened import Opened
from migration_pipelines.stores.faiss.table import GROUP_RECORDS, ParquetTable, Table, TableWriter, whole

TEXTS = (batches.ID, batches.ID_TYPE, batches.DOCUMENT, batches.METADATA)
_RECORDS, _VECTORS, _LOCK = ".parquet", ".faiss", ".lock"


@dataclass(frozen=True)
class Part:
    """The files of one part, by the name of that with the records."""

    records: Path

    @classmethod
    def new(cls, folder: Path, name: str, place: int = 0, version: int = 0) -> Self:
        """Return the part of that name; a hidden one where it has no place yet."""
        text = f"{name}~{place:08d}~{version}" if place else f".{name}"
        return cls(folder / f"{text}{_RECORDS}")

    @classmethod
    def all_in(cls, folder: Path) -> list[Self]:
        """Return the parts in a folder, in the order of their places, of each name the newest."""
        found = sorted(map(cls, folder.glob(f"[!.]*~*{_RECORDS}")), key=lambda part: part.place)
        newest = {part.name: part for part in found}
        return sorted(newest.values(), key=lambda part: part.place)

    @property
    def vectors(self) -> Path:
        """The file with the vectors."""
        return self.records.with_suffix(_VECTORS)

    @property
    def name(self) -> str:
        """What the part is called."""
        return self.records.name.split("~")[0]

    @property
    def place(self) -> tuple[int, int]:
        """Its place in the order in which parts were staged, and its version."""
        _, place, version = self.records.name.removesuffix(_RECORDS).split("~")
        return int(place), int(version)

    def open(self, schema: CollectionSchema) -> Opened:
        """Return the part opened for reading."""
        table = ParquetTable(self.records)
        return Opened(schema=schema, records=table, index=open_index(self.vectors))

    def rename(self, new: Part) -> None:
        """Give the files other names; the part is there once its records are."""
        self.vectors.rename(new.vectors)
        self.records.rename(new.records)

    def remove(self) -> None:
        """Remove the files; those that aren't there are no error."""
        self.records.unlink(missing_ok=True)
        self.vectors.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have nobody take the hidden part for one that a killed writer left; afterwards it is gone."""
        lock = self.records.with_suffix(_LOCK)
        with lock.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                self.remove()
                lock.unlink(missing_ok=True)

    @classmethod
    def left_behind(cls, folder: Path) -> list[Path]:
        """Return the files in a folder of neither a staged part nor one that is being written."""
        staged = {path for part in cls.all_in(folder) for path in (part.records, part.vectors)}
        return [path for path in folder.iterdir() if path not in staged and not _is_held(path)]


def _is_held(path: Path) -> bool:
    try:
        with path.with_suffix(_LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


class PartWriter:
    """Writes the two files of a part, and notes the shape of its vectors."""

    def __init__(self, part: Part, schema: CollectionSchema) -> None:
        (self._field,) = schema.vectors
        self._shape = Shape()
        self._table = TableWriter(part.records, pa.schema([(name, pa.string()) for name in TEXTS]))
        self._vectors = FlatWriter(part.vectors, self._field)

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a batch, each record of which has a vector."""
        matrix = batches.dense_matrix(batch.column(batches.VECTOR))
        self._shape.add(matrix, self._field.metric)
        self._vectors.add(matrix)
        self._table.write(batch.select(list(TEXTS)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._vectors, self._table:
            if kind is None:
                self._table.note(json.dumps(asdict(self._shape)))


def shape_of(parts: Iterable[Part], keep: npt.NDArray[np.bool_]) -> Shape:
    """Return the shape of the vectors of some parts, of which `keep` tells how many count."""
    shape = Shape()
    for part in parts:
        shape.join(Shape(**json.loads(ParquetTable(part.records).note)))
    shape.count = int(keep.sum())
    return shape


def latest(
    parts: Sequence[Part], keep: npt.NDArray[np.bool_], schema: CollectionSchema
) -> Iterator[pa.RecordBatch]:
    """Yield the records of some parts that are kept, one part open at a time."""
    at = 0
    for part in parts:
        opened = part.open(schema)
        for batch in opened.scan(0, opened.count, GROUP_RECORDS, vectors=True):
            kept = keep[at : at + batch.num_rows]
            at += batch.num_rows
            found = batch if kept.all() else batch.filter(pa.array(kept))
            if found.num_rows:
                yield found


def last_of_each_id(tables: Iterable[Table]) -> npt.NDArray[np.bool_]:
    """Return bool[n_rows] over the rows of all tables: those after which their id doesn't come again."""
    return last_of_each(id_hashes(tables))


def id_hashes(tables: Iterable[Table]) -> npt.NDArray[np.void]:
    """Return the hash of each row's id, over the rows of all tables."""
    names = [batches.ID, batches.ID_TYPE]
    hashes = [batches.id_hashes(batch) for table in tables for batch in whole(table, names)]
    return np.concatenate(hashes) if hashes else np.empty(0, "V16")


def last_of_each(hashes: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Return bool[n]: the hashes that don't come again."""
    keep = np.zeros(len(hashes), np.bool_)
    keep[len(hashes) - 1 - np.unique(hashes[::-1], return_index=True)[1]] = True
    return keep
