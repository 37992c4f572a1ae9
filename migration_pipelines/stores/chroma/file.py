"""What Chroma's own SQLite file says of a collection, read without opening the folder as Chroma would.

The tables are those of every version since 0.4. Chroma gives each write of a record a new number, which
stands beside the id; what a crash left unapplied waits, numbered too, in a queue.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from migration_pipelines.errors import CollectionNotFoundError
from migration_pipelines.stores.chroma.queue import number_of

DATABASE_FILE = "chroma.sqlite3"
# Before 0.4.15 there were neither tenants nor databases: all collections were of those by default.
DEFAULT_TENANT, DEFAULT_DATABASE = "default_tenant", "default_database"
_COLLECTIONS = """
    SELECT collections.* FROM collections JOIN databases ON databases.id = collections.database_id
    WHERE databases.tenant_id = ? AND databases.name = ? ORDER BY collections.name"""
_ALL_COLLECTIONS = "SELECT * FROM collections ORDER BY name"
_SEGMENT = "SELECT id FROM segments WHERE collection = ? AND scope = 'METADATA'"
_APPLIED = "SELECT seq_id FROM max_seq_id WHERE segment_id = ?"
_VERSIONS = "SELECT embedding_id, seq_id FROM embeddings WHERE segment_id = ?"
_QUEUED = "SELECT id, seq_id FROM embeddings_queue WHERE topic LIKE '%/' || ?"


def read_names(folder: Path, *, tenant: str, database: str) -> list[str]:
    """Return the names of a folder's collections."""
    with _reading(folder) as file:
        return [row["name"] for row in collection_rows(file, tenant=tenant, database=database)]


def versions_digest(folder: Path, name: str, *, tenant: str, database: str) -> str:
    """Return a text that changes with any write to a collection, and with no write to another.

    Raises
    ------
    CollectionNotFoundError
    """
    with _reading(folder) as file:
        found = collection_row(file, name, tenant=tenant, database=database, where=str(folder))["id"]
        count = total = 0
        for record_id, version in _versions(file, found):
            count += 1
            total += xxhash.xxh3_128_intdigest(f"{version}:{record_id}".encode())
    return f"{found}:{count}:{total % 2**128:032x}"


def collection_rows(file: sqlite3.Connection, *, tenant: str, database: str) -> list[dict[str, Any]]:
    """Return what the table of collections says of each, by column; which columns depends on the version."""
    if has_table(file, "databases"):
        return rows_of(file, _COLLECTIONS, tenant, database)
    is_default = (tenant, database) == (DEFAULT_TENANT, DEFAULT_DATABASE)
    return rows_of(file, _ALL_COLLECTIONS) if is_default else []


def collection_row(
    file: sqlite3.Connection, name: str, *, tenant: str, database: str, where: str
) -> dict[str, Any]:
    """Return what the table of collections says of one.

    Raises
    ------
    CollectionNotFoundError
    """
    rows = collection_rows(file, tenant=tenant, database=database)
    for row in rows:
        if row["name"] == name:
            return row
    there = ", ".join(row["name"] for row in rows) or "none"
    raise CollectionNotFoundError(f"{where} has no collection {name!r}; there are: {there}", collection=name)


def rows_of(file: sqlite3.Connection, statement: str, *values: str) -> list[dict[str, Any]]:
    """Return rows by column name."""
    cursor = file.execute(statement, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def has_table(file: sqlite3.Connection, table: str, *, column: str | None = None) -> bool:
    """Whether the table is there, and has the column."""
    names = [name for (name,) in file.execute("SELECT name FROM pragma_table_info(?)", (table,))]
    return bool(names) and (column is None or column in names)


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
    """Yield a connection that can't write; to a copy, where a killed writer left what SQLite would mend."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(contextlib.closing(_open(folder, "ro")))
        try:
            file.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for path in folder.glob(f"{DATABASE_FILE}*"):
                shutil.copyfile(path, copy / path.name)
            file = stack.enter_context(contextlib.closing(_open(copy, "rw")))
        yield file


def _open(folder: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{(folder / DATABASE_FILE).as_uri()}?mode={mode}", uri=True)
