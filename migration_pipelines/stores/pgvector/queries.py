"""Short statements on one table: count, bounds of ranges, fingerprint, delete."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from migration_pipelines.errors import ConfigurationError
from migration_pipelines.stores.pgvector.rows import id_literal
from migration_pipelines.stores.pgvector.table import Table


def with_ids(table: Table) -> str:
    """Return the condition of the rows with some ids: one parameter, as `id_literal` writes it."""
    return f"WHERE {table.id.quoted} = ANY(%s::{table.id.type}[])"


def count(connection: Any, table: Table) -> int:
    """Return the exact number of rows."""
    (records,) = _one(connection, f"SELECT count(*) FROM {table.quoted}")  # noqa: S608 - names are quoted
    return int(records)


def delete(connection: Any, table: Table, ids: pa.RecordBatch) -> None:
    """Delete the rows of these ids."""
    statement = f"DELETE FROM {table.quoted} {with_ids(table)}"  # noqa: S608
    connection.execute(statement.encode(), [id_literal(ids, table)])


def bounds(connection: Any, table: Table, *, every: int, where: str) -> tuple[list[str], int]:
    """Return the ids that begin a new range of so many rows, without the first, and the number of rows.

    In the column's own order: with an index on the id that is a walk through the index alone, of which only
    the bounds leave the server. Within a transaction.

    Raises
    ------
    ConfigurationError
        The ids of a view aren't distinct: it has no index that would see to that.
    """
    if table.is_view:
        _check_ids_of_view(connection, table, where)
    key, found, records, step = table.id.quoted, list[str](), 0, every
    # Ordered by the column, not by the text that is selected of it.
    statement = f"SELECT t.{key}::text FROM {table.quoted} AS t ORDER BY t.{key}"  # noqa: S608 - quoted
    connection.execute(f"DECLARE ids NO SCROLL CURSOR FOR {statement}".encode(), [])
    while True:
        if step:  # 0 would count the row where the cursor stands once more
            records += connection.execute(f"MOVE FORWARD {step} FROM ids".encode()).rowcount
        bound = connection.execute(b"FETCH NEXT FROM ids").fetchone()
        if bound is None:
            break
        found.append(bound[0])
        records, step = records + 1, every - 1
    connection.execute(b"CLOSE ids")
    return found, records


def fingerprint(connection: Any, table: Table) -> str:
    """Return the table's own number, the count, and a sum over hashes of each id with its row version."""
    row = "t::text" if table.is_view else f"t.{table.id.quoted}::text || ':' || t.xmin::text"
    total, records = _one(
        connection,
        f"SELECT coalesce(sum(hashtextextended({row}, 0)), 0)::text, count(*) FROM {table.quoted} t",  # noqa: S608
    )
    return f"{table.oid}:{records}:{total}"


def _check_ids_of_view(connection: Any, table: Table, where: str) -> None:
    statement = f"SELECT count(*), count(DISTINCT {table.id.quoted}) FROM {table.quoted}"  # noqa: S608
    records, ids = _one(connection, statement)
    if records != ids:
        raise ConfigurationError(
            f"{where}: the id column {table.id.name!r} isn't unique and not null: {records} records, "
            f"{ids} ids; name another by ?id=",
            expected=records,
            found=ids,
        )


def _one(connection: Any, statement: str) -> Any:
    return connection.execute(statement.encode(), []).fetchone()
