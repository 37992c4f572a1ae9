"""A project's control plane, and the data planes of its indexes that were opened so far."""

from __future__ import annotations

import threading
from typing import Any

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionNotFoundError,
    MigrationError,
    StoreRefusedError,
    TransientError,
)
from migration_pipelines.store import Store
from migration_pipelines.stores.pinecone.client import data_host, is_loopback, open_control, open_index
from migration_pipelines.stores.pinecone.plane import Plane, normal
from migration_pipelines.stores.pinecone.schema import (
    check_deployment,
    is_made_for_namespaces,
    schema_of,
    vector_fields,
)
from migration_pipelines.stores.pinecone.visibility import waits

_FOR_LOCAL = "local"  # a simulator on this machine takes any key, but the client insists on one
_READY_SECONDS = 300.0
_FAILED_STATES = frozenset({"InitializationFailed", "Terminating", "Disabled"})


class Project:
    """One connection to a project, opened on first use; safe to use from several threads.

    Parameters
    ----------
    store
        Whose address and limits count.
    api_key
        Empty for a simulator on this machine.
    host
        The control plane's URL, of the public one if None.
    timeout_seconds
        Of one request.
    undeclared_sparse
        Whether records hold sparse vectors that their index doesn't declare.
    """

    def __init__(
        self,
        store: Store,
        *,
        api_key: str,
        host: str | None,
        timeout_seconds: float,
        undeclared_sparse: bool,
    ) -> None:
        self._store, self._api_key, self._host, self._timeout = store, api_key, host, timeout_seconds
        self._undeclared_sparse = undeclared_sparse
        self._client: Any = None
        self._planes: dict[str, Plane] = {}
        self._lock = threading.Lock()

    def indexes(self) -> Any:
        """Return the control plane's operations on indexes, paced as one request.

        Raises
        ------
        AuthenticationError
            There is no key.
        """
        self._store.pace()
        return self._connect().indexes

    def names(self) -> list[str]:
        """Return the names of all indexes, sorted."""
        return sorted(model.name for model in self.indexes().list())

    def open(self, collection: str) -> Plane:
        """Return the data plane of an index, asked of the control plane once."""
        with self._lock:
            plane = self._planes.get(collection)
        return plane or self.open_afresh(collection)

    def open_afresh(self, collection: str) -> Plane:
        """Return the data plane of an index as it is now.

        Raises
        ------
        UnsupportedOperationError
            It is of a type whose records can't be moved.
        """
        model = self.indexes().describe(collection)
        where, host = self._store.address(collection), data_host(model, self._host)
        check_deployment(model, where=where)
        with self._lock:
            known = self._planes.get(collection)
        index = known.index if known and known.index.host == host else open_index(self._connect(), host)
        self._store.pace()
        stats = index.describe_index_stats()
        fields = vector_fields(
            model, dimensions=stats.dimension, undeclared_sparse=self._undeclared_sparse, where=where
        )
        in_use = is_made_for_namespaces(model) or any(map(normal, stats.namespaces))
        schema = schema_of(model, fields, has_namespaces=in_use)
        plane = Plane(index=index, schema=schema, pace=self._store.pace, where=where)
        with self._lock:
            self._planes[collection] = plane
        return plane

    def forget(self, collection: str) -> None:
        """Ask the control plane for an index again before it is used the next time."""
        with self._lock:
            self._planes.pop(collection, None)

    def wait_until_ready(self, collection: str) -> None:
        """Wait until an index takes requests.

        Raises
        ------
        StoreRefusedError
            It never will.
        TransientError
            It doesn't within five minutes.
        """
        where, state = self._store.address(collection), ""
        for _ in waits(_READY_SECONDS):
            status = self.indexes().describe(collection).status
            if status.ready:
                return
            state = status.state
            if state in _FAILED_STATES:
                raise StoreRefusedError(f"{where}: the index is in the state {state}; look at it, or drop it")
        raise TransientError(f"{where}: the index isn't ready yet, but {state}; try again")

    def wait_until_gone(self, collection: str) -> None:
        """Wait until an index that is being removed isn't listed any more.

        Raises
        ------
        TransientError
            It still is after five minutes.
        """
        self.forget(collection)
        for _ in waits(_READY_SECONDS):
            if collection not in self.names():
                return
        raise TransientError(f"{self._store.address(collection)} is still being removed; try again")

    def look_again(
        self, collection: str, kind: type[MigrationError], advice: str
    ) -> tuple[type[MigrationError], str]:
        """Tell an index that is gone, or was made anew, from a service that can't be reached."""
        self.forget(collection)
        try:
            names = self.names()
        except Exception:  # noqa: BLE001 - then the control plane is no wiser
            return kind, advice
        if collection not in names:
            return CollectionNotFoundError, f"there are: {', '.join(names) or 'none'}"
        if kind is CollectionNotFoundError:
            return TransientError, "the index was made anew meanwhile: try again"
        return kind, advice

    def close(self) -> None:
        """Close all connections; they are opened again on use."""
        with self._lock:
            planes, self._planes = self._planes, {}
            client, self._client = self._client, None
        for plane in planes.values():
            plane.close()
        if client is not None:
            client.close()

    def _connect(self) -> Any:
        with self._lock:
            if self._client is None:
                if not self._api_key and not (self._host and is_loopback(self._host)):
                    raise AuthenticationError(
                        f"{self._store.address()}: there is no key: set PINECONE_API_KEY",
                        store=self._store.kind,
                    )
                key = self._api_key or _FOR_LOCAL
                self._client = open_control(api_key=key, host=self._host, timeout_seconds=self._timeout)
            return self._client
