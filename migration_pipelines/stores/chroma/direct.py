"""A collection of a Chroma folder, read from its files: several times as fast as through Chroma's client.

What comes out is what Chroma's client answers, with two exceptions where its answer is the worse one: a
vector that still stands in the queue of writes comes as it was written, while under cosine the client has
already divided and multiplied it by its length; and so does a double in metadata that only stands in there.

Nothing is written, whatever the folder is in the midst of. Safe to use from several threads.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.metadata import dump_metadata, load_metadata
from migration_pipelines.model import CollectionSchema, IdKind
from migration_pipelines.stores.chroma.facts import CollectionFacts
from migration_pipelines.stores.chroma.file import DATABASE_FILE
from migration_pipelines.stores.chroma.hnsw import NOWHERE, VectorFiles
from migration_pipelines.stores.chroma.queue import (
    Late,
    late_ids,
    read_vectors,
    replay_records,
    replay_vectors,
)
from migration_pipelines.stores.chroma.records import collection_schema, plain_schema
from migration_pipelines.stores.chroma.rows import Texts, find_rows, read_texts

_PAGE = 1_000  # records a statement: measured, fewer and more are slower
_IDS_PAGE = 20_000
_SHOWN_IDS = 5
_NONE = np.empty(0, np.int64)
_ROW_NUMBERS = """SELECT json_group_array(json_array(id, embedding_id)) FROM (
    SELECT id, embedding_id FROM embeddings NOT INDEXED
    WHERE id > ? AND segment_id = ? ORDER BY id LIMIT ?)"""


class Database:
    """Connections to the SQLite file of a copied folder, of which each thread gets one of its own.

    They may not write. They are opened as if they might, because only then SQLite rolls back what a writer
    that was killed left half done, in the copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []

    def connect(self) -> sqlite3.Connection:
        """Return a new connection, to be closed by the caller."""
        uri = f"{(self.folder / DATABASE_FILE).as_uri()}?mode=rw"
        file = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
        file.execute("PRAGMA query_only = ON")
        return file

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that nobody else has; its texts are bytes."""
        with self._lock:
            file = self._idle.pop() if self._idle else None
        if file is None:
            file = self.connect()
            file.text_factory = bytes
        try:
            yield file
        finally:
            with self._lock:
                self._idle.append(file)

    def close(self) -> None:
        """Close those connections that nobody has."""
        with self._lock:
            idle, self._idle = self._idle, []
        for file in idle:
            file.close()


class DirectCollection:
    """One collection, found and brought up to date with the queue.

    Parameters
    ----------
    where
        The collection's address, for messages.
    """

    def __init__(self, database: Database, facts: CollectionFacts, *, name: str, where: str) -> None:
        self.facts, self._database, self._where, self.name = facts, database, where, name
        self._late: dict[str, int] = {}
        self._late_texts: dict[int, tuple[str | None, bytes | None]] = {}
        self._gone: frozenset[str] = frozenset()
        with database.connection() as file:
            self._files = VectorFiles(
                database.folder / facts.vector_segment,
                dimensions=facts.dimensions or 0,
                is_cosine=facts.is_cosine,
            )
            self._replay_texts(file)
            self._rows, self._places = self._find_places(file)

    # ── opening ──────────────────────────────────────────────────────────────────────────────────────

    def _find_places(self, file: sqlite3.Connection) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return int64[n_records] twice: row numbers, ascending, and where the vectors stand."""
        facts, by_id = self.facts, self._files.take_places()
        if facts.dimensions:
            after = 0
            if self._files.is_there:
                after = facts.vectors_applied or self._files.applied or 0
            replay_vectors(file, facts.id, by_id, after=after, dimensions=facts.dimensions)
        # In arrays page by page: as Python's numbers they take several times the room.
        rows, places = [_NONE], [_NONE]
        stored = self._stored(file)
        while page := list(islice(stored, _IDS_PAGE)):
            rows.append(np.array([row for row, _ in page], np.int64))
            places.append(np.array([by_id.get(text, NOWHERE) for _, text in page], np.int64))
        return np.concatenate(rows), np.concatenate(places)

    def _stored(self, file: sqlite3.Connection) -> Iterator[tuple[int, str]]:
        """Yield row number and id of every record, in the order in which Chroma answers."""
        last = -1
        while found := self._row_page(file, last):
            yield from (pair for pair in found if pair[1] not in self._gone)
            last = found[-1][0]
        yield from ((row, text) for text, row in self._late.items() if row > last)

    def _row_page(self, file: sqlite3.Connection, last: int) -> list[tuple[int, str]]:
        (found,) = file.execute(_ROW_NUMBERS, (last, self.facts.text_segment, _IDS_PAGE)).fetchone()
        return orjson.loads(found)  # type: ignore[no-any-return]

    def _replay_texts(self, file: sqlite3.Connection) -> None:
        """Note the records that a crash kept from reaching the tables."""
        facts = self.facts
        texts = late_ids(file, facts.id, after=facts.texts_applied)
        if not texts:
            return
        before: dict[str, Late] = {}
        rows: dict[str, int] = {}
        for start in range(0, len(texts), _PAGE):
            part = texts[start : start + _PAGE]
            found = find_rows(file, facts.text_segment, part)
            known = _by_row(self._read_texts(file, sorted(found.values())))
            rows |= found
            for text in part:
                before[text] = _late(known.get(found.get(text, -1)), is_there=text in found)
        records = replay_records(file, facts.id, before, after=facts.texts_applied)
        (highest,) = file.execute("SELECT coalesce(max(id), 0) FROM embeddings").fetchone()
        for text, record in records.items():
            if not record.is_there:
                continue
            highest += text not in rows
            row = rows.get(text, highest)
            self._late[text] = row
            self._late_texts[row] = (
                record.document,
                (dump_metadata(record.fields).encode() if record.fields else None),
            )
        self._gone = frozenset(text for text, record in records.items() if not record.is_there)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def count(self) -> int:
        """Return how many records there are."""
        return len(self._rows)

    def schema(self) -> CollectionSchema:
        """Return what the collection is made of."""
        facts = self.facts
        return collection_schema(
            self.name,
            dimensions=facts.dimensions,
            index=facts.index,
            embedder=facts.embedder,
            metadata=facts.metadata,
        )

    def lost(self) -> StoreRefusedError | None:
        """Return the error that reading them will be, where the vectors of some records stand nowhere."""
        if (self._places != NOWHERE).all():
            return None
        texts: list[str] = []
        with self._database.connection() as file:
            for _ in self._readable(file, texts):
                if len(texts) >= _SHOWN_IDS:
                    break
        return self._not_found(texts)

    def id_lists(self, size: int) -> Iterator[list[str]]:
        """Yield all ids in lists of `size`; those without a vector that can be read come last, in others."""
        lost: list[str] = []
        with self._database.connection() as file:
            readable = self._readable(file, lost)
            while part := list(islice(readable, size)):
                yield part
        for start in range(0, len(lost), size):
            yield lost[start : start + size]

    def _readable(self, file: sqlite3.Connection, lost: list[str]) -> Iterator[str]:
        for (_, text), place in zip(self._stored(file), self._places.tolist(), strict=True):
            if place == NOWHERE:
                lost.append(text)
            else:
                yield text

    def read(self, texts: Sequence[str], *, vectors: bool) -> pa.RecordBatch | None:
        """Return the records of those ids that are there, in the order of `texts`; None where there are none.

        Raises
        ------
        StoreRefusedError
            A record's vector is asked for and stands nowhere.
        """
        with self._database.connection() as file:
            pages = [
                self._read_page(file, texts[start : start + _PAGE], vectors=vectors)
                for start in range(0, len(texts), _PAGE)
            ]
        found = [page for page in pages if page is not None]
        return pa.concat_batches(found) if found else None

    def _read_page(
        self, file: sqlite3.Connection, texts: Sequence[str], *, vectors: bool
    ) -> pa.RecordBatch | None:
        known = find_rows(file, self.facts.text_segment, texts)
        if self._late or self._gone:
            known = {text: row for text, row in known.items() if text not in self._gone}
            known |= {text: self._late[text] for text in texts if text in self._late}
        found = [text for text in texts if text in known]
        if not found:
            return None
        rows = np.array([known[text] for text in found], np.int64)
        columns = [pa.array(found, pa.string()), batches.constant(IdKind.STR.value, len(found))]
        if vectors:
            columns.append(batches.dense_vectors(self._read_vectors(file, found, rows)))
        columns += self._text_columns(file, rows)
        layout = batches.arrow_schema(plain_schema(self.facts.dimensions or 0), vectors=vectors)
        return pa.RecordBatch.from_arrays(columns, schema=layout)

    def _text_columns(self, file: sqlite3.Connection, rows: npt.NDArray[np.int64]) -> list[pa.Array]:
        """Return the columns of documents and metadata."""
        texts = self._read_texts(file, sorted(rows.tolist()))
        documents = pa.array(texts.documents, pa.string())
        metadata = pa.array(texts.metadata, pa.binary()).view(pa.string())
        if np.array_equal(texts.rows, rows):
            return [documents, metadata]
        at = np.searchsorted(texts.rows, rows)
        missing = at >= len(texts.rows)
        at[missing] = 0
        if len(texts.rows):
            missing |= texts.rows[at] != rows
        chosen = pa.array(at, pa.int64(), mask=missing)
        return [documents.take(chosen), metadata.take(chosen)]

    def _read_texts(self, file: sqlite3.Connection, rows: list[int]) -> Texts:
        texts = read_texts(file, rows, has_bools=self.facts.has_bools, has_arrays=self.facts.has_arrays)
        late = [row for row in rows if row in self._late_texts] if self._late_texts else []
        if not late:
            return texts
        known = _by_row(texts) | {row: self._late_texts[row] for row in late}
        ordered = sorted(known)
        return Texts(
            np.array(ordered, np.int64),
            [known[row][0] for row in ordered],
            [known[row][1] for row in ordered],
        )

    def _read_vectors(
        self, file: sqlite3.Connection, texts: Sequence[str], rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return float32[n, dimensions]."""
        places = self._places[np.searchsorted(self._rows, rows)]
        if (places >= 0).all():
            return self._files.read(places)
        if (places == NOWHERE).any():
            raise self._not_found([texts[at] for at in np.flatnonzero(places == NOWHERE).tolist()])
        matrix = np.empty((len(places), self.facts.dimensions or 0), np.float32)
        in_files = places >= 0
        matrix[in_files] = self._files.read(places[in_files])
        queued = np.flatnonzero(~in_files)
        queued = queued[np.argsort(-places[queued])]
        raw = read_vectors(file, places[queued].tolist())
        matrix[queued] = np.frombuffer(raw, "<f4").reshape(len(queued), -1)
        return matrix

    def _not_found(self, texts: Sequence[str]) -> StoreRefusedError:
        lost = int((self._places == NOWHERE).sum())
        shown = ", ".join(map(repr, texts[:_SHOWN_IDS]))
        return StoreRefusedError(
            f"{self._where}: the vectors of {lost} of {self.count()} records stand neither in the folder's "
            f"index files nor in its queue, among them those of {shown}. Restore the folder from where it is "
            "whole, or delete these records with Chroma, and plan again",
            expected=self.count(),
            found=self.count() - lost,
            records=list(texts),
        )


def _by_row(texts: Texts) -> dict[int, tuple[str | None, bytes | None]]:
    return dict(zip(texts.rows.tolist(), zip(texts.documents, texts.metadata, strict=True), strict=True))


def _late(known: tuple[str | None, bytes | None] | None, *, is_there: bool) -> Late:
    document, metadata = known or (None, None)
    return Late(
        is_there=is_there,
        document=document,
        fields=load_metadata(metadata.decode()) if metadata else {},
    )
