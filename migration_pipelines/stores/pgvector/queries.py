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


def bounds(connection: Any, table: Table, *, every: int, where: str) -> list[str]:
    """Return the ids that begin a new range of so many rows, in the column's own order, without the first.

    With an index on the id that is a walk through the index alone; only the bounds leave the server.

    Raises
    ------
    ConfigurationError
        The ids of a view aren't distinct: it has no index that would see to that.
    """
    if table.is_view:
        _check_ids_of_view(connection, table, where)
    key = table.id.quoted
    numbered = f"SELECT {key} AS id, row_number() OVER (ORDER BY {key}) AS n FROM {table.quoted}"  # noqa: S608
    statement = f"SELECT id::text FROM ({numbered}) AS numbered WHERE n > 1 AND (n - 1) %% %s = 0 ORDER BY n"  # noqa: S608
    return [bound for (bound,) in connection.execute(statement.encode(), [every]).fetchall()]


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
