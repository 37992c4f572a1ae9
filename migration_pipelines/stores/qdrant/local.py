"""The client's local mode: the whole of Qdrant imitated in this process, over a folder or in memory.

It is for small data. One client may have a folder open, in all of this machine's processes, so that within
this one every store on a folder shares it; it isn't made for threads, so that they take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

MEMORY = ":memory:"


@dataclass
class _Shared:
    client: Any
    users: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


_OPEN: dict[str, _Shared] = {}
_OPENING = threading.Lock()


class Local:
    """A user of the one client of a folder, or of this process's memory.

    Parameters
    ----------
    path
        The folder; None for memory, which lasts as long as the process.
    check
        Called before a folder is opened: the client runs what its pickles say.
    """

    def __init__(self, path: Path | None, *, check: Callable[[], None] = lambda: None) -> None:
        from qdrant_client import QdrantClient

        self._key = MEMORY if path is None else str(path.resolve())
        with _OPENING:
            if self._key not in _OPEN:
                check()
                client = QdrantClient(
                    MEMORY if path is None else None,
                    path=None if path is None else str(path),
                    force_disable_check_same_thread=True,
                )
                _OPEN[self._key] = _Shared(client, users=1 if path is None else 0)
            _OPEN[self._key].users += 1

    def close(self) -> None:
        """Leave the client, which is closed by its last user."""
        with _OPENING:
            shared = _OPEN[self._key]
            shared.users -= 1
            if not shared.users:
                del _OPEN[self._key]
                shared.client.close()

    @contextmanager
    def _client(self) -> Iterator[Any]:
        shared = _OPEN[self._key]
        with shared.lock:
            yield shared.client

    # ── collections ──────────────────────────────────────────────────────────────────────────────────

    def names(self) -> list[str]:
        """Return the names of all collections."""
        with self._client() as client:
            return [item.name for item in client.get_collections().collections]

    def info(self, collection: str) -> Mapping[str, Any]:
        """Return the collection's settings in the form in which a server answers with them."""
        with self._client() as client:
            return client.get_collection(collection).model_dump(mode="json")  # type: ignore[no-any-return]

    def create(self, collection: str, body: Mapping[str, Any]) -> None:
        """Create a collection: its vectors and metadata, which is all that local mode knows of it."""
        from qdrant_client import models

        asked = models.CreateCollection.model_validate({"vectors": {}, **body})
        with self._client() as client:
            client.create_collection(
                collection,
                vectors_config=asked.vectors,
                sparse_vectors_config=asked.sparse_vectors,
                metadata=body.get("metadata"),
            )

    def drop(self, collection: str) -> None:
        """Remove a collection."""
        with self._client() as client:
            client.delete_collection(collection)

    # ── points ───────────────────────────────────────────────────────────────────────────────────────

    def count(self, collection: str) -> int:
        """Return the exact number of points."""
        with self._client() as client:
            return int(client.count(collection, exact=True).count)

    def scroll(
        self, collection: str, body: Mapping[str, Any]
    ) -> tuple[list[Mapping[str, Any]], int | str | None]:
        """Return the points from `offset` on, and the id that the next page begins with; None at the end."""
        with self._client() as client:
            found, following = client.scroll(
                collection,
                limit=body["limit"],
                offset=body.get("offset"),
                with_payload=body["with_payload"],
                with_vectors=body["with_vector"],
            )
        return list(map(_plain, found)), following

    def retrieve(
        self, collection: str, ids: Sequence[int | str], *, vectors: bool
    ) -> list[Mapping[str, Any]]:
        """Return the points of these ids that are there."""
        with self._client() as client:
            return list(map(_plain, client.retrieve(collection, list(ids), with_vectors=vectors)))

    def upsert(self, collection: str, points: Sequence[bytes], shard_key: int | str | None = None) -> None:  # noqa: ARG002
        """Write points, each replacing what was under its id; local mode has no shards."""
        from qdrant_client import models

        made = [
            models.PointStruct.model_validate(point)
            for point in orjson.loads(b"[" + b",".join(points) + b"]")
        ]
        with self._client() as client:
            client.upsert(collection, made, wait=True)

    def delete(self, collection: str, ids: Sequence[int | str]) -> None:
        """Remove points."""
        with self._client() as client:
            client.delete(collection, list(ids), wait=True)

    # ── aliases ──────────────────────────────────────────────────────────────────────────────────────

    def aliases(self) -> dict[str, str]:
        """Return the collection of each alias."""
        with self._client() as client:
            return {item.alias_name: item.collection_name for item in client.get_aliases().aliases}

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection, in one step with taking it from another."""
        from qdrant_client import models

        create = models.CreateAlias(alias_name=alias, collection_name=collection)
        with self._client() as client:
            client.update_collection_aliases([models.CreateAliasOperation(create_alias=create)])


def _plain(record: Any) -> Mapping[str, Any]:
    """Return one of the client's records as a server would answer with it."""
    vector = record.vector
    if isinstance(vector, dict):
        vector = {name: _plain_vector(item) for name, item in vector.items()}
    return {"id": record.id, "vector": vector, "payload": record.payload}


def _plain_vector(vector: Any) -> Any:
    is_sparse = hasattr(vector, "indices")
    return {"indices": list(vector.indices), "values": list(vector.values)} if is_sparse else vector
