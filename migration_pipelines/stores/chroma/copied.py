"""CopiedChromaStore: a copy of a Chroma folder, read from its files without Chroma's client."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import PrivateAttr

from migration_pipelines import batch as batches
from migration_pipelines.envelope import matching
from migration_pipelines.filters import Filter
from migration_pipelines.model import CollectionSchema, IdKind, Span
from migration_pipelines.stores.chroma.client import absolute
from migration_pipelines.stores.chroma.direct import Database, DirectCollection
from migration_pipelines.stores.chroma.facts import read_facts, unknown_level
from migration_pipelines.stores.chroma.file import read_names
from migration_pipelines.stores.chroma.records import held_ids, plain_schema
from migration_pipelines.stores.chroma.rows import writes_exact_digits
from migration_pipelines.stores.chroma.store import ChromaStore

_logger = logging.getLogger(__name__)
_COUNT_PAGE = 5_000


class CopiedChromaStore(ChromaStore):
    """The copy that `ChromaStore.for_reading` makes, which nobody writes.

    A folder of a version of Chroma that this reader wasn't tested with is read by Chroma's client, with a
    warning, as is everything but reading: a search.
    """

    _opening: Any = PrivateAttr(default_factory=threading.RLock)
    _files: Database | None = PrivateAttr(default=None)
    _is_known: bool | None = PrivateAttr(default=None)
    _open: dict[str, DirectCollection] = PrivateAttr(default_factory=dict)

    def list_collections(self) -> list[str]:
        """Return the names of all collections, sorted."""
        if self._database() is None:
            return super().list_collections()
        with self.translating():
            return sorted(read_names(absolute(self.path or ""), tenant=self.tenant, database=self.database))

    def describe(self, collection: str) -> CollectionSchema:
        """Return what the collection is made of; before its first record it has no dimensions."""
        direct = self._direct(collection)
        return super().describe(collection) if direct is None else direct.schema()

    def count(self, collection: str, where: Filter | None = None) -> int:
        """Return the exact number of records; with a filter, by reading all but their vectors."""
        direct = self._direct(collection)
        if direct is None:
            return super().count(collection, where)
        if where is None:
            return direct.count()
        with self.translating(collection):
            pages = (direct.read(texts, vectors=False) for texts in direct.id_lists(_COUNT_PAGE))
            return sum(matching(where, page).true_count for page in pages if page is not None)

    def split(
        self, collection: str, *, span_records: int, where: Filter | None = None
    ) -> Iterator[tuple[Span, pa.RecordBatch | None]]:
        """Yield spans that are lists of ids, in Chroma's own order.

        Records whose vectors can't be read come last, in spans of their own: the others arrive, and reading
        those fails by name.
        """
        direct = self._direct(collection)
        if direct is None:
            yield from super().split(collection, span_records=span_records, where=where)
            return
        if (lost := direct.lost()) is not None:
            _logger.warning("%s", lost)
        with self.translating(collection):
            for texts in direct.id_lists(span_records):
                columns = [pa.array(texts, pa.string()), batches.constant(IdKind.STR.value, len(texts))]
                ids = pa.RecordBatch.from_arrays(columns, names=[batches.ID, batches.ID_TYPE])
                yield Span(records=len(texts)), ids

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
        """Yield the records of a span's list of ids that are still there, in the list's order.

        Raises
        ------
        LedgerError
            `ids` is missing.
        StoreRefusedError
            A record's vector can't be read.
        """
        direct = self._direct(collection)
        if direct is None or ids is None:
            yield from super().scan(
                collection, span, ids=ids, batch_records=batch_records, where=where, vectors=vectors
            )
            return
        with self.translating(collection):
            texts = held_ids(ids)
            for start in range(0, len(texts), batch_records):
                found = direct.read(texts[start : start + batch_records], vectors=vectors)
                if found is not None:
                    yield found

    def scans_at_once(self) -> int | None:
        """Return None: readers leave the interpreter to others most of the time."""
        return super().scans_at_once() if self._database() is None else None

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        """Return the records of these ids, in their order; ids that aren't there are left out."""
        direct = self._direct(collection)
        if direct is None:
            return super().fetch(collection, ids, vectors=vectors)
        with self.translating(collection):
            found = direct.read(held_ids(ids), vectors=vectors)
        if found is not None:
            return found
        layout = batches.arrow_schema(plain_schema(direct.facts.dimensions or 0), vectors=vectors)
        return pa.RecordBatch.from_pylist([], schema=layout)

    def close(self) -> None:
        """Close the files and the client, so that the folder can be removed."""
        with self._opening:
            files, self._files, self._is_known = self._files, None, None
            self._open.clear()
        if files is not None:
            files.close()
        super().close()

    def _folder_of_client(self) -> Path:
        """Return the copy, where the client reads it; else another one: it writes into what it opens."""
        folder = absolute(self.path or "")
        if self._database() is None:
            return folder
        # The name matches the pattern of older copies, with which it is removed.
        own = folder.with_name(f"{folder.name}.client-{os.getpid()}")
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(folder, own)
        return own

    def _direct(self, collection: str) -> DirectCollection | None:
        """Return the collection, opened; None where Chroma's client has to read it."""
        database = self._database()
        if database is None:
            return None
        with self._opening:
            if collection not in self._open:
                where = self.address(collection)
                with self.translating(collection):
                    with contextlib.closing(database.connect()) as file:
                        facts = read_facts(
                            file, collection, tenant=self.tenant, division=self.database, where=where
                        )
                    self._open[collection] = DirectCollection(database, facts, name=collection, where=where)
            return self._open[collection]

    def _database(self) -> Database | None:
        """Return the folder's database; None where it isn't understood."""
        with self._opening:
            if self._is_known is None:
                with self.translating():
                    self._files = Database(absolute(self.path or ""))
                    self._is_known = self._understands(self._files)
            return self._files if self._is_known else None

    def _understands(self, database: Database) -> bool:
        with contextlib.closing(database.connect()) as file:
            level = unknown_level(file)
        if level is None and not writes_exact_digits():
            level = "a SQLite here that rounds doubles"
        if level is not None:
            _logger.warning(
                "%s: not of a version that is read directly (%s): Chroma's client reads it, several times "
                "slower",
                self.address(),
                level,
            )
        return level is None
