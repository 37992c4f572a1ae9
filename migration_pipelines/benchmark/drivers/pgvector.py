"""psycopg: COPY BINARY both ways, nothing parsed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from migration_pipelines.benchmark.data import Page
from migration_pipelines.benchmark.measures import COPY_RECORDS, packed

_COLUMNS = "id, vector, document, metadata"


def bare_read(store: Any, collection: str) -> int:
    """Drain a COPY BINARY of the whole table."""
    with _connection(store) as connection, connection.cursor() as cursor:
        with cursor.copy(f'COPY "{collection}" ({_COLUMNS}) TO STDOUT (FORMAT BINARY)') as copy:
            for _ in copy:
                pass
        cursor.execute(f'SELECT count(*) FROM "{collection}"')  # noqa: S608 - a name of our own
        return int(cursor.fetchone()[0])


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Pack rows of COPY BINARY by hand and send 2,000 at a time."""
    written = 0
    with _connection(store) as connection:
        for page in pages:
            for start in range(0, len(page.ids), COPY_RECORDS):
                statement = f'COPY "{collection}" ({_COLUMNS}) FROM STDIN (FORMAT BINARY)'
                with connection.cursor().copy(statement) as copy:
                    copy.write(packed(page, start))
            written += len(page.ids)
    return written


def _connection(store: Any) -> AbstractContextManager[Any]:
    connection: AbstractContextManager[Any] = store._pool.transaction()  # noqa: SLF001 - the store's own login
    return connection
