"""A Qdrant server, spoken to in JSON over HTTP.

Without the client's own models, which cost several times what the server needs to write or read a point. Its
numbers are read as doubles and rounded by `numbers`, and each answer is looked at: `wait=true` with the
status "completed" is the only proof that a write is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import orjson

from migration_pipelines.errors import RecordRejectedError
from migration_pipelines.stores.qdrant.failures import AnswerError, CutAnswerError

# Qdrant's documented limit on a request is 32 MB (`service.max_request_size_mb`); large ones gain nothing.
LARGEST_REQUEST = 32 * 2**20
_GOOD_REQUEST = 8 * 2**20
_WAIT = {"wait": "true"}
_Point = TypeVar("_Point")


class Server:
    """One server; safe to use from several threads.

    Parameters
    ----------
    url
        Scheme, host and port.
    key
        The API key.
    timeout
        Seconds that a call may take.
    pace
        Called with the size of each request before it is sent.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float, pace: Callable[[int], None]) -> None:
        import httpx

        headers = {"content-type": "application/json"} | ({"api-key": key} if key else {})
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._pace = pace

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # ── collections ──────────────────────────────────────────────────────────────────────────────────

    def names(self) -> list[str]:
        """Return the names of all collections."""
        found = self._asked("GET", "/collections")["collections"]
        return [item["name"] for item in found]

    def info(self, collection: str) -> Mapping[str, Any]:
        """Return the collection's settings and state."""
        return self._asked("GET", _path(collection))  # type: ignore[no-any-return]

    def shard_keys(self, collection: str) -> list[Any]:
        """Return the keys of a collection whose user chose the shards."""
        found = self._asked("GET", _path(collection, "/cluster"))
        shards = [*found.get("local_shards", []), *found.get("remote_shards", [])]
        keys = {shard["shard_key"] for shard in shards if shard.get("shard_key") is not None}
        return sorted(keys, key=lambda key: (isinstance(key, str), key))

    def create(self, collection: str, body: Mapping[str, Any]) -> None:
        """Create a collection."""
        self._told("PUT", _path(collection), body)

    def create_shard_key(self, collection: str, key: int | str) -> None:
        """Create the shard of a key."""
        self._told("PUT", _path(collection, "/shards"), {"shard_key": key})

    def create_index(self, collection: str, field: str, schema: Any) -> None:
        """Create an index on a field of the payload."""
        body = {"field_name": field, "field_schema": schema}
        self._completed("PUT", _path(collection, "/index"), orjson.dumps(body))

    def change(self, collection: str, body: Mapping[str, Any]) -> None:
        """Change a collection's settings."""
        self._told("PATCH", _path(collection), body)

    def drop(self, collection: str) -> None:
        """Remove a collection."""
        self._told("DELETE", _path(collection))

    # ── points ───────────────────────────────────────────────────────────────────────────────────────

    def count(self, collection: str) -> int:
        """Return the exact number of points."""
        return int(self._asked("POST", _path(collection, "/points/count"), {"exact": True})["count"])

    def scroll(
        self, collection: str, body: Mapping[str, Any]
    ) -> tuple[list[Mapping[str, Any]], int | str | None]:
        """Return the points from `offset` on, and the id that the next page begins with; None at the end."""
        found = self._asked("POST", _path(collection, "/points/scroll"), body)
        return found["points"], found["next_page_offset"]

    def retrieve(
        self, collection: str, ids: Sequence[int | str], *, vectors: bool
    ) -> list[Mapping[str, Any]]:
        """Return the points of these ids that are there, in any order."""
        body = {"ids": list(ids), "with_payload": True, "with_vector": vectors}
        return list(self._asked("POST", _path(collection, "/points"), body))

    def upsert(self, collection: str, points: Sequence[bytes], shard_key: int | str | None = None) -> None:
        """Write points, each replacing what was under its id, in requests that keep to Qdrant's limit.

        Raises
        ------
        RecordRejectedError
            A single point is larger than a request may be; nothing is written.
        """
        requests = list(_requests(points, shard_key))
        for body in requests:
            self._completed("PUT", _path(collection, "/points"), body, writes_points=True)

    def delete(self, collection: str, ids: Sequence[int | str]) -> None:
        """Remove points."""
        self._completed("POST", _path(collection, "/points/delete"), orjson.dumps({"points": list(ids)}))

    def search(self, collection: str, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the nearest points."""
        return list(self._asked("POST", _path(collection, "/points/query"), body)["points"])

    # ── aliases ──────────────────────────────────────────────────────────────────────────────────────

    def aliases(self) -> dict[str, str]:
        """Return the collection of each alias."""
        found = self._asked("GET", "/aliases")["aliases"]
        return {item["alias_name"]: item["collection_name"] for item in found}

    def set_alias(self, alias: str, collection: str) -> None:
        """Point an alias at a collection, in one step with taking it from another."""
        actions: list[Mapping[str, Any]] = []
        if alias in self.aliases():
            actions.append({"delete_alias": {"alias_name": alias}})
        actions.append({"create_alias": {"alias_name": alias, "collection_name": collection}})
        self._told("POST", "/collections/aliases", {"actions": actions})

    # ── calls ────────────────────────────────────────────────────────────────────────────────────────

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._result(method, path, None if body is None else orjson.dumps(body))

    def _told(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        if self._asked(method, path, body) is not True:
            raise CutAnswerError(f"{method} {path}: the answer doesn't say that it was done")

    def _completed(self, method: str, path: str, body: bytes, *, writes_points: bool = False) -> None:
        found = self._result(method, path, body, _WAIT, writes_points=writes_points)
        if not isinstance(found, Mapping) or found.get("status") != "completed":
            raise CutAnswerError(f"{method} {path}: the answer doesn't say that the write is completed")

    def _result(
        self,
        method: str,
        path: str,
        body: bytes | None,
        params: Mapping[str, str] | None = None,
        *,
        writes_points: bool = False,
    ) -> Any:
        self._pace(len(body or b""))
        reply = self._http.request(method, path, content=body, params=params)
        if reply.status_code >= 300:
            raise AnswerError(
                reply.status_code,
                _words(reply.content),
                retry_after=_seconds(reply.headers.get("retry-after")),
                writes_points=writes_points,
            )
        found = orjson.loads(reply.content)
        if not isinstance(found, Mapping) or found.get("result") is None:
            raise CutAnswerError(f"{method} {path}: the answer has no result")
        return found["result"]


def _path(collection: str, rest: str = "") -> str:
    return f"/collections/{quote(collection, safe='')}{rest}"


def _requests(points: Sequence[bytes], shard_key: int | str | None) -> Iterator[bytes]:
    tail = b"]}" if shard_key is None else b'],"shard_key":%b}' % orjson.dumps(shard_key)
    for group in grouped(points, len):
        yield b'{"points":[' + b",".join(group) + tail


def grouped(points: Sequence[_Point], size_of: Callable[[_Point], int]) -> Iterator[list[_Point]]:
    """Yield the points that go out in one request, of a good size.

    Raises
    ------
    RecordRejectedError
        A single point is larger than a request may be.
    """
    waiting: list[_Point] = []
    total = 0
    for point in points:
        size = size_of(point)
        if size > LARGEST_REQUEST - 1024:
            raise RecordRejectedError(
                f"a record of {size:,} bytes; Qdrant takes {LARGEST_REQUEST:,} in a request",
                found=size,
                expected=LARGEST_REQUEST,
            )
        if waiting and total + size > _GOOD_REQUEST:
            yield waiting
            waiting, total = [], 0
        waiting.append(point)
        total += size + 1
    if waiting:
        yield waiting


def _words(content: bytes) -> str:
    """Return the server's own words of an answer that is no success."""
    try:
        return str(orjson.loads(content)["status"]["error"])[:500]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isdecimal() else None
