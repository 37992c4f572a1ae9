"""Chroma's queue of writes, of which some may not have reached its tables or its vector files yet.

Chroma writes every change here first. It applies a change to the tables of documents and metadata at once,
unless it is killed in between, and to the files of the vectors only now and then, a thousand at a time: what
is newer stands here alone. Reading it, Chroma's own rules hold: an `add` of an id that is there is ignored,
an `update` of one that isn't too, an `upsert` merges, and a key whose value is null is removed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from migration_pipelines.stores.chroma.rows import DOCUMENT_KEY, URI_KEY

_ADD, _UPDATE, _UPSERT, _DELETE = range(4)
_ENCODING = "FLOAT32"
_LIKE = "topic LIKE '%/' || ? AND seq_id > ? ORDER BY seq_id"
_OPERATIONS = f"""SELECT json_group_array(json_array(seq_id, operation, id, length(vector), encoding))
    FROM (SELECT * FROM embeddings_queue WHERE {_LIKE})"""  # noqa: S608 - constants
_CHANGES = f"SELECT seq_id, operation, id, metadata FROM embeddings_queue WHERE {_LIKE}"  # noqa: S608
_VECTORS = """SELECT group_concat(hex(vector), '') FROM (
    SELECT vector FROM embeddings_queue WHERE seq_id IN (SELECT value FROM json_each(?)) ORDER BY seq_id)"""


def number_of(seq: int | bytes | None) -> int:
    """Return a write's number; before 0.6 Chroma kept it as eight bytes."""
    if seq is None:
        return 0
    return seq if isinstance(seq, int) else int.from_bytes(seq, "big")


def replay_vectors(
    file: sqlite3.Connection,
    collection_id: str,
    places: dict[str, int],
    *,
    after: int,
    dimensions: int,
) -> None:
    """Bring the places of vectors up to date with the writes that are newer than `after`, in place.

    A vector that stands in the queue gets the place `queue_place` of its write's number.
    """
    (found,) = file.execute(_OPERATIONS, (collection_id, after)).fetchone()
    for seq, operation, text, size, encoding in orjson.loads(found):
        has_vector = size == 4 * dimensions and encoding == _ENCODING
        if operation == _DELETE:
            places.pop(text, None)
        elif not has_vector:
            continue
        elif operation == _UPSERT or (operation == _UPDATE) == (text in places):
            places[text] = queue_place(seq)


def queue_place(seq: int) -> int:
    """Return the place of a vector that stands in the queue: below those of the files, and -1."""
    return -seq - 1


def read_vectors(file: sqlite3.Connection, places: list[int]) -> bytes:
    """Return the float32 of the vectors at these places of the queue, which are descending."""
    (found,) = file.execute(_VECTORS, (orjson.dumps([-place - 1 for place in places]).decode(),)).fetchone()
    return bytes.fromhex(found.decode())


@dataclass
class Late:
    """A record as it will be when the queue has reached Chroma's tables.

    `is_there` is False where it will be gone.
    """

    is_there: bool
    document: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def late_ids(file: sqlite3.Connection, collection_id: str, *, after: int) -> list[str]:
    """Return the ids that writes newer than `after` are about, each once, in the writes' order."""
    found = file.execute(_CHANGES, (collection_id, after))
    return list(dict.fromkeys(text.decode() for _, _, text, _ in found))


def replay_records(
    file: sqlite3.Connection, collection_id: str, before: Mapping[str, Late], *, after: int
) -> dict[str, Late]:
    """Return the records that writes newer than `after` are about, as they will be.

    Parameters
    ----------
    before
        The same records as the tables have them.
    """
    records = {
        text: Late(is_there=late.is_there, document=late.document, fields=dict(late.fields))
        for text, late in before.items()
    }
    for operation, text, metadata in _changes(file, collection_id, after):
        record = records[text]
        if operation == _DELETE:
            records[text] = Late(is_there=False)
        elif operation == _UPSERT or (operation == _UPDATE) == record.is_there:
            record.is_there = True
            _apply(record, metadata)
    return records


def _changes(
    file: sqlite3.Connection, collection_id: str, after: int
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    for _, operation, text, metadata in file.execute(_CHANGES, (collection_id, after)):
        # By Python's own parser, because Python wrote these texts before 1.0, NaN and Infinity included.
        yield operation, text.decode(), json.loads(metadata) if metadata else {}


def _apply(record: Late, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if key == DOCUMENT_KEY:
            record.document = value
        elif key.startswith("chroma:") and key != URI_KEY:
            continue
        elif value is None or value != value:  # SQLite has no NaN, and keeps a null
            record.fields.pop(key, None)
        else:
            record.fields[key] = value
