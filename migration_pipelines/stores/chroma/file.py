"""What Chroma's own SQLite file says of a collection, read without opening the folder as Chroma would.

The tables are those of every version since 0.4. Chroma gives each write of a record a new number, which
stands beside the id; what a crash left unapplied waits, numbered too, in a queue.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import xxhash

from migration_pipelines.errors import CollectionNotFoundError
from migration_pipelines.stores.chroma.queue import number_of

DATABASE_FILE = "chroma.sqlite3"
_IN_DATABASE = (
    "FROM collections JOIN databases ON databases.id = collections.database_id "
    "WHERE databases.tenant_id = ? AND databases.name = ?"
)
_NAMES = f"SELECT collections.name {_IN_DATABASE} ORDER BY collections.name"
_COLLECTION = f"SELECT collections.id {_IN_DATABASE} AND collections.name = ?"
_SEGMENT = "SELECT id FROM segments WHERE collection = ? AND scope = 'METADATA'"
_APPLIED = "SELECT seq_id FROM max_seq_id WHERE segment_id = ?"
_VERSIONS = "SELECT embedding_id, seq_id FROM embeddings WHERE segment_id = ?"
_QUEUED = "SELECT id, seq_id FROM embeddings_queue WHERE topic LIKE '%/' || ?"


def read_names(folder: Path, *, tenant: str, database: str) -> list[str]:
    """Return the names of a folder's collections."""
    with _reading(folder) as file:
        return [name for (name,) in file.execute(_NAMES, (tenant, database))]


def versions_digest(folder: Path, name: str, *, tenant: str, database: str) -> str:
    """Return a text that changes with any write to a collection, and with no write to another.

    Raises
    ------
    CollectionNotFoundError
    """
    with _reading(folder) as file:
        found = file.execute(_COLLECTION, (tenant, database, name)).fetchone()
        if found is None:
            raise CollectionNotFoundError(f"{folder} has no collection {name!r}", collection=name)
        count = total = 0
        for record_id, version in _versions(file, found[0]):
            count += 1
            total += xxhash.xxh3_128_intdigest(f"{version}:{record_id}".encode())
    return f"{found[0]}:{count}:{total % 2**128:032x}"


def _versions(file: sqlite3.Connection, collection_id: str) -> Iterator[tuple[str, int]]:
    for (segment,) in file.execute(_SEGMENT, (collection_id,)).fetchall():
        applied = max((number_of(seq) for (seq,) in file.execute(_APPLIED, (segment,))), default=0)
        for record_id, seq in file.execute(_VERSIONS, (segment,)):
            yield record_id, number_of(seq)
        for record_id, seq in file.execute(_QUEUED, (collection_id,)):
            if number_of(seq) > applied:
                yield record_id, number_of(seq)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    uri = f"{(folder / DATABASE_FILE).as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as file:
        yield file
