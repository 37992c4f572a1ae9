"""COPY over a connection: its statement, and the rows that it sends, taken as libpq has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from migration_pipelines.stores.pgvector.wire import TRAILER


def copy(connection: Any, statement: str, values: Sequence[Any] = ()) -> Any:
    """Return the context of a COPY. Percent signs are doubled in the statement, as in all others."""
    if not values:
        # Unlike `execute`, the driver's `copy` looks for percent signs only where there are parameters.
        return connection.cursor().copy(statement.replace("%%", "%").encode())
    return connection.cursor().copy(statement.encode(), values)


def received(stream: Any) -> Iterator[Any]:
    """Yield the rows of a binary COPY, its signature before the first, its trailer as the last.

    The driver goes through several generators for each row. So what has come is taken from libpq; where
    nothing has, and at the end, the driver is asked, which waits, and raises what the server says.
    """
    connection = stream.connection.pgconn
    while True:
        size, row = connection.get_copy_data(1)
        if size == 0:
            row = stream.read()
        elif size < 0:
            _raise_error(connection)
        if not row:
            return
        yield row
        if row == TRAILER:
            stream.read()
            return


def _raise_error(connection: Any) -> None:
    """Raise what the server sent in place of a row, if that is an error."""
    from psycopg import pq
    from psycopg.errors import error_from_result

    for result in list(iter(connection.get_result, None)):
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise error_from_result(result)
