"""Connections to PostgreSQL: one for each piece of work at hand, kept for the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any


class Pool:
    """Connections, opened when all others are in use. Safe to use from several threads.

    Parameters
    ----------
    options
        The driver's keywords; never joined to a text that an error could repeat.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._idle: list[Any] = []

    @contextmanager
    def transaction(self, *, read_only: bool = False, snapshot: bool = False) -> Iterator[Any]:
        """Yield a connection in a transaction that ends with the context, by a rollback if it raises.

        Parameters
        ----------
        snapshot
            All statements see the same state.
        """
        from psycopg import IsolationLevel

        connection = self._take()
        try:
            connection.read_only = read_only
            connection.isolation_level = IsolationLevel.REPEATABLE_READ if snapshot else None
            yield connection
            connection.commit()
        finally:
            self._give_back(connection)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Any:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        import psycopg

        # Parameters are put into the text by the client: COPY and DDL take none from the server, and a
        # pooler between here and there may not keep prepared statements.
        return psycopg.connect(**self._options, cursor_factory=psycopg.ClientCursor, prepare_threshold=None)

    def _give_back(self, connection: Any) -> None:
        import psycopg

        with suppress(psycopg.Error):
            connection.rollback()
        if not connection.closed and connection.info.transaction_status == 0:
            with self._lock:
                self._idle.append(connection)
            return
        # Where one connection broke, the server was likely restarted: the idle ones are broken too.
        connection.close()
        self.close()
