"""A stand-in for Pinecone: its control plane, and the data plane of every index, with the documented limits.

It answers as the 2026-07 API does to pinecone 10: all numbers become doubles and vectors float32, numbers
without a fraction are written without one, writes can be made visible late, and in a URL only %20 is a space.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
import orjson

from migration_pipelines_tests.standins.http import Reply, Request, Standin

KEY, KEY_WITHOUT_RIGHTS = "pcsk-test-key", "pcsk-key-without-rights"
MAX_BODY_BYTES = 2 * 1024 * 1024
MAX_URL_BYTES = 16 * 1024  # no limit is documented; a usual one of proxies
MAX_RECORDS = 1_000
MAX_METADATA_BYTES = 40_960
MAX_SPARSE = 2_048
_PAGE = 100
_DEFAULT = "__default__"
_METRICS = ("cosine", "euclidean", "dotproduct")


class RefusedError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: int = 3) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Stored:
    """A record: `json` as it is answered, the rest to search by."""

    id: str
    json: bytes
    values: np.ndarray | None
    sparse: dict[int, float]
    metadata: dict[str, Any]


@dataclass
class Write:
    """A write that is acknowledged, and visible after `reads` more reads."""

    lsn: int
    reads: int
    apply: Callable[[dict[str, Stored]], None]


@dataclass
class Namespace:
    """Records as reads see them, and the writes that they don't see yet."""

    records: dict[str, Stored] = field(default_factory=dict)
    pending: list[Write] = field(default_factory=list)
    lsn: int = 0
    indexed: int = 0

    def see(self) -> None:
        """Let what has waited for enough reads become visible."""
        while self.pending and self.pending[0].reads <= 0:
            write = self.pending.pop(0)
            write.apply(self.records)
            self.indexed = write.lsn
        for write in self.pending:
            write.reads -= 1


@dataclass
class Index:
    """One index and what is in it."""

    name: str
    serial: int
    fields: dict[str, Any]
    deployment: dict[str, Any]
    tags: dict[str, str] | None
    describes_until_ready: int
    accepts_sparse: bool
    namespaces: dict[str, Namespace] = field(default_factory=dict)

    @property
    def dimension(self) -> int | None:
        found: int | None = self.fields.get("_values", {}).get("dimension")
        return found

    @property
    def metric(self) -> str:
        return str(self.fields.get("_values", {}).get("metric", "dotproduct"))


class PineconeStandin(Standin):
    """Indexes in memory.

    `lag` is how many reads don't see a write; `lsn_headers` whether log positions are told;
    `describes_until_ready` how often a new index is described before it is ready; `acknowledges` changes the
    count that an upsert tells.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indexes: dict[str, Index] = {}
        self.lag = 0
        self.lsn_headers = True
        self.describes_until_ready = 1
        self.acknowledges: Callable[[int], int | None] = lambda count: count
        self._serials = itertools.count(1)

    @property
    def host(self) -> str:
        """The control plane's URL."""
        return f"http://127.0.0.1:{self.port}"

    def calls(self, path: str) -> list[Request]:
        """The requests so far whose path ends so."""
        return [request for request in self.requests if request.path.endswith(path)]

    def answer(self, request: Request) -> Reply:
        """Carry a request out; called under the lock."""
        key = request.headers.get("api-key")
        if key not in (KEY, KEY_WITHOUT_RIGHTS):
            return Reply(401, f"Invalid API Key: {key}".encode(), {"Content-Type": "text/plain"})
        if key == KEY_WITHOUT_RIGHTS:
            return Reply(403, _control_error("FORBIDDEN", "the key may not do this", 403))
        try:
            if request.path.startswith("/data/"):
                return self._data(request)
            return self._control(request)
        except RefusedError as refused:
            body = {"code": refused.code, "message": str(refused), "details": []}
            return Reply(refused.status, body)

    # ── control plane ────────────────────────────────────────────────────────────────────────────────

    def _control(self, request: Request) -> Reply:
        name = unquote(request.path.removeprefix("/indexes").lstrip("/"))
        if request.method == "GET" and not name:
            return Reply(body={"indexes": [self._shown(index) for index in self.indexes.values()]})
        if request.method == "POST" and not name:
            return self._create(orjson.loads(request.body))
        index = self.indexes.get(name)
        if index is None:
            return Reply(404, _control_error("NOT_FOUND", f"Resource {name} not found", 404))
        if request.method == "DELETE":
            del self.indexes[name]
            return Reply(202)
        index.describes_until_ready -= 1
        return Reply(body=self._shown(index))

    def _create(self, asked: Mapping[str, Any]) -> Reply:
        name, fields = asked["name"], asked["schema"]["fields"]
        if name in self.indexes:
            return Reply(409, _control_error("ALREADY_EXISTS", "Resource  already exists", 409))
        dense = fields.get("_values")
        if dense and not (1 <= dense["dimension"] <= 20_000 and dense["metric"] in _METRICS):
            return Reply(400, _control_error("INVALID_ARGUMENT", "Bad request: dimension or metric", 400))
        index = self.make(name, fields, deployment=asked.get("deployment"), tags=asked.get("tags"))
        index.describes_until_ready = self.describes_until_ready
        return Reply(201, self._shown(index))

    def make(
        self,
        name: str,
        fields: dict[str, Any],
        *,
        deployment: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        accepts_sparse: bool = False,
    ) -> Index:
        """Put an empty index there, ready, `accepts_sparse` as those of older APIs that don't declare it."""
        usual = {"deployment_type": "managed", "cloud": "aws", "region": "us-east-1"}
        index = Index(
            name=name,
            serial=next(self._serials),
            fields=fields,
            deployment=deployment or usual,
            tags=tags,
            describes_until_ready=0,
            accepts_sparse=accepts_sparse or "_sparse_values" in fields,
        )
        self.indexes[name] = index
        return index

    def put(self, name: str, *vectors: Mapping[str, Any]) -> None:
        """Put records into the default namespace of an index, as another client would."""
        index = self.indexes[name]
        records = [_stored(vector, index) for vector in vectors]
        self._write(index, "", lambda there: there.update({record.id: record for record in records}))

    def _shown(self, index: Index) -> dict[str, Any]:
        ready = index.describes_until_ready <= 0
        return {
            "name": index.name,
            "host": f"{self.host}/data/{index.name}-{index.serial}",
            "status": {"ready": ready, "state": "Ready" if ready else "Initializing"},
            "schema": {"fields": index.fields},
            "deployment": index.deployment,
            "deletion_protection": "disabled",
            "read_capacity": {"mode": "OnDemand", "status": {"state": "Ready"}},
            "tags": index.tags,
        }

    # ── data plane ───────────────────────────────────────────────────────────────────────────────────

    def _data(self, request: Request) -> Reply:
        _, _, served, path = request.path.split("/", 3)
        index = self.indexes.get(served.rpartition("-")[0])
        if index is None or f"{index.name}-{index.serial}" != served:
            raise RefusedError(404, "Not Found", 5)
        if len(request.path) + len(request.raw_query) > MAX_URL_BYTES:
            raise RefusedError(414, "URI Too Long")
        routes: Mapping[tuple[str, str], Callable[[Index, Request], Reply]] = {
            ("POST", "vectors/upsert"): self._upsert,
            ("GET", "vectors/fetch"): self._fetch,
            ("POST", "vectors/fetch_by_metadata"): self._fetch_by_metadata,
            ("GET", "vectors/list"): self._list,
            ("POST", "vectors/delete"): self._delete,
            ("POST", "vectors/update"): self._update,
            ("POST", "query"): self._query,
            ("POST", "describe_index_stats"): self._stats,
            ("GET", "namespaces"): self._namespaces,
        }
        route = routes.get((request.method, path))
        if route is None:
            raise RefusedError(404, f"no such path: {path}", 5)
        return route(index, request)

    def _write(self, index: Index, name: str, apply: Callable[[dict[str, Stored]], None]) -> dict[str, str]:
        """Take a write and return its headers."""
        space = index.namespaces.setdefault(name, Namespace())
        space.lsn += 1
        space.pending.append(Write(space.lsn, self.lag, apply))
        if not self.lag:
            space.see()
        return {"x-pinecone-request-lsn": str(space.lsn)} if self.lsn_headers else {}

    def _read(self, index: Index, name: str) -> Namespace:
        space = index.namespaces.get(name) or Namespace()
        space.see()
        return space

    def _upsert(self, index: Index, request: Request) -> Reply:
        if len(request.body) > MAX_BODY_BYTES:
            size = len(request.body)
            raise RefusedError(
                413, f"Request size {size} exceeds the maximum supported size of {MAX_BODY_BYTES} bytes"
            )
        asked = _loads(request.body)
        vectors = asked.get("vectors") or []
        if not 1 <= len(vectors) <= MAX_RECORDS:
            raise RefusedError(400, f"a request takes 1 to {MAX_RECORDS} vectors, found {len(vectors)}")
        records = [_stored(vector, index) for vector in vectors]
        headers = self._write(
            index, _space_of(asked), lambda there: there.update({record.id: record for record in records})
        )
        count = self.acknowledges(len(records))
        return Reply(body={} if count is None else {"upsertedCount": count}, headers=headers)

    def _fetch(self, index: Index, request: Request) -> Reply:
        query = _parameters(request)
        ids = query.get("ids", [])
        if not 1 <= len(ids) <= MAX_RECORDS:
            raise RefusedError(400, f"fetch takes 1 to {MAX_RECORDS} ids, found {len(ids)}")
        name = _normal(query.get("namespace", [""])[0])
        records = self._read(index, name).records
        return _records_reply([records[text] for text in dict.fromkeys(ids) if text in records], name)

    def _fetch_by_metadata(self, index: Index, request: Request) -> Reply:
        asked = _loads(request.body)
        if not asked.get("filter"):
            raise RefusedError(400, "a filter is needed")
        records = self._read(index, _space_of(asked)).records
        found = [
            records[text] for text in sorted(records) if _matches(records[text].metadata, asked["filter"])
        ]
        page, token = _paged(found, asked.get("paginationToken"), asked.get("limit", _PAGE), lambda r: r.id)
        return _records_reply(page, _space_of(asked), token)

    def _list(self, index: Index, request: Request) -> Reply:
        query = {name: values[0] for name, values in _parameters(request).items()}
        limit = int(query.get("limit", _PAGE))
        if not 1 <= limit <= _PAGE:
            raise RefusedError(400, f"limit must be 1 to {_PAGE}")
        name = _normal(query.get("namespace", ""))
        prefix = query.get("prefix", "")
        ids = sorted(text for text in self._read(index, name).records if text.startswith(prefix))
        page, token = _paged(ids, query.get("paginationToken"), limit, str)
        body = {"vectors": [{"id": text} for text in page], "namespace": name, "usage": {"readUnits": 1}}
        return Reply(body={**body, **({"pagination": {"next": token}} if token else {})})

    def _delete(self, index: Index, request: Request) -> Reply:
        asked = _loads(request.body)
        name, ids = _space_of(asked), asked.get("ids") or []
        if name not in index.namespaces:
            raise RefusedError(404, "Namespace not found", 5)
        if len(ids) > MAX_RECORDS:
            raise RefusedError(400, f"delete takes at most {MAX_RECORDS} ids")

        def remove(there: dict[str, Stored]) -> None:
            for text in list(there) if asked.get("deleteAll") else ids:
                there.pop(text, None)

        return Reply(body={}, headers=self._write(index, name, remove))

    def _update(self, index: Index, request: Request) -> Reply:
        asked = _loads(request.body)
        name = _space_of(asked)
        known = self._read(index, name).records.get(asked["id"])
        if known is None:
            return Reply(body={})
        vector = orjson.loads(known.json)
        vector["values"] = asked.get("values", vector["values"])
        vector["metadata"] = {**vector.get("metadata", {}), **asked.get("setMetadata", {})}
        record = _stored(vector, index)
        return Reply(
            body={}, headers=self._write(index, name, lambda there: there.update({record.id: record}))
        )

    def _query(self, index: Index, request: Request) -> Reply:
        asked = _loads(request.body)
        space = self._read(index, _space_of(asked))
        if not 1 <= asked["topK"] <= 10_000:
            raise RefusedError(400, "topK must be 1 to 10000")
        score = _scorer(index, space, asked)
        filter_ = asked.get("filter") or {}
        scored = [
            (score(record), record) for record in space.records.values() if _matches(record.metadata, filter_)
        ]
        scored.sort(key=lambda pair: pair[0], reverse=index.metric != "euclidean")
        matches = [_match(record, value, asked) for value, record in scored[: asked["topK"]]]
        headers = {"x-pinecone-max-indexed-lsn": str(space.indexed)} if self.lsn_headers else {}
        return Reply(body={"matches": matches, "namespace": _space_of(asked)}, headers=headers)

    def _stats(self, index: Index, request: Request) -> Reply:
        counts = {name: len(space.records) for name, space in index.namespaces.items() if space.records}
        shown = {name or _DEFAULT: {"vectorCount": count} for name, count in counts.items()}
        body = {
            "namespaces": shown,
            "indexFullness": 0.0,
            "totalVectorCount": sum(counts.values()),
            "metric": index.metric,
            "vectorType": "dense" if index.dimension else "sparse",
        }
        return Reply(body=body | ({"dimension": index.dimension} if index.dimension else {}))

    def _namespaces(self, index: Index, request: Request) -> Reply:
        query = {name: values[0] for name, values in _parameters(request).items()}
        counts = {name: len(space.records) for name, space in index.namespaces.items() if space.records}
        names = sorted(name or _DEFAULT for name in counts)
        page, token = _paged(names, query.get("paginationToken"), int(query.get("limit", _PAGE)), str)
        shown = [{"name": name, "record_count": str(counts[_normal(name)])} for name in page]
        body: dict[str, Any] = {"namespaces": shown, "total_count": len(names)}
        return Reply(body=body | ({"pagination": {"next": token}} if token else {}))


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────


def _control_error(code: str, message: str, status: int) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}, "status": status}


def _loads(body: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = orjson.loads(body)
    except ValueError as error:
        raise RefusedError(400, f"invalid JSON: {error}") from None
    return found


def _parameters(request: Request) -> dict[str, list[str]]:
    """The query, in which only %20 is a space."""
    found: dict[str, list[str]] = {}
    for part in filter(None, request.raw_query.split("&")):
        name, _, value = part.partition("=")
        found.setdefault(unquote(name), []).append(unquote(value))
    return found


def _space_of(asked: Mapping[str, Any]) -> str:
    return _normal(asked.get("namespace") or "")


def _normal(name: str) -> str:
    if not name.isascii() or "\0" in name or len(name) > 512:
        raise RefusedError(400, "a namespace is ASCII of at most 512 characters")
    return "" if name == _DEFAULT else name


def _paged(
    items: list[Any], token: str | None, limit: int, key: Callable[[Any], str]
) -> tuple[list[Any], str | None]:
    """A page of sorted items, and the token of the next.

    It names the last item, so that pages hold while others write.
    """
    if token:
        last = base64.urlsafe_b64decode(token).decode()
        items = [item for item in items if key(item) > last]
    page = items[:limit]
    more = base64.urlsafe_b64encode(key(page[-1]).encode()).decode() if len(items) > limit else None
    return page, more


# ── records ──────────────────────────────────────────────────────────────────────────────────────────


def _stored(vector: Mapping[str, Any], index: Index) -> Stored:
    record_id = vector.get("id")
    if not isinstance(record_id, str) or not 1 <= len(record_id) <= 512:
        raise RefusedError(400, f"Vector ID must be a string of 1 to 512 characters, got {record_id!r}")
    if not record_id.isascii() or "\0" in record_id:
        raise RefusedError(400, f"Vector ID must be ASCII, but got {record_id!r}")
    values = _values(vector.get("values") or [], record_id, index)
    sparse = _sparse(vector.get("sparseValues"), record_id, index)
    if values is None and not sparse:
        raise RefusedError(400, f"Vector ID {record_id} has neither values nor sparse values")
    metadata = {key: _metadata_value(key, value) for key, value in (vector.get("metadata") or {}).items()}
    shown: dict[str, Any] = {"id": record_id, "values": orjson.Fragment(_floats(values))}
    if sparse:
        numbers = np.fromiter(sparse.values(), np.float32)
        shown["sparseValues"] = {"indices": list(sparse), "values": orjson.Fragment(_floats(numbers))}
    if metadata:
        rendered = {key: _rendered(value) for key, value in metadata.items()}
        shown["metadata"] = rendered
        size = len(orjson.dumps(rendered))
        if size > MAX_METADATA_BYTES:
            limit = f"exceeds the limit of {MAX_METADATA_BYTES} bytes per vector"
            raise RefusedError(400, f"Metadata size is {size} bytes, which {limit}")
    return Stored(record_id, orjson.dumps(shown), values, sparse, metadata)


def _values(values: list[Any], record_id: str, index: Index) -> np.ndarray | None:
    if not values:
        if index.dimension and not index.accepts_sparse:
            raise RefusedError(400, f"Vector ID {record_id} has no values")
        return None
    if len(values) != index.dimension:
        found, expected = len(values), index.dimension
        raise RefusedError(
            400, f"Vector dimension {found} does not match the dimension of the index {expected}"
        )
    if not all(type(value) in (int, float) for value in values):
        raise RefusedError(400, f"Vector ID {record_id} holds a value that is no number")
    array = np.array(values, np.float64).astype(np.float32)
    if not array.any():
        only = f"Vector ID {record_id} contains only zeros"
        raise RefusedError(400, f"Dense vectors must contain at least one non-zero value. {only}.")
    return array


def _sparse(found: Mapping[str, Any] | None, record_id: str, index: Index) -> dict[int, float]:
    if found is None:
        return {}
    indices, values = found.get("indices") or [], found.get("values") or []
    if not index.accepts_sparse:
        raise RefusedError(400, "Index configuration does not support sparse values")
    if not 1 <= len(indices) == len(values) <= MAX_SPARSE:
        raise RefusedError(
            400, f"Sparse vector of {record_id} must have 1 to {MAX_SPARSE} indices and as many values"
        )
    if len(set(indices)) != len(indices) or not all(0 <= number < 2**32 for number in indices):
        raise RefusedError(400, f"Sparse vector of {record_id} has indices that are no distinct uint32")
    return dict(zip(indices, values, strict=True))


def _metadata_value(key: str, value: Any) -> Any:
    if key.startswith("$") or not key:
        raise RefusedError(400, f"Metadata key {key!r} is not allowed")
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    text = orjson.dumps(value).decode()
    kinds = "a string, number, boolean or list of strings"
    raise RefusedError(400, f"Metadata value must be {kinds}, got '{text[:20]}' for field '{key}'")


def _floats(values: np.ndarray | None) -> bytes:
    if values is None:
        return b"[]"
    text = orjson.dumps(values.astype(np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    return text.replace(b".0,", b",").replace(b".0]", b"]")


def _rendered(value: Any) -> Any:
    """A double as protobuf's JSON has it: without a fraction where there is none."""
    if type(value) is not float:
        return value
    if value == 0 and math.copysign(1, value) < 0:
        return orjson.Fragment(b"-0")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _records_reply(records: list[Stored], namespace: str, token: str | None = None) -> Reply:
    items = b",".join([orjson.dumps(record.id) + b":" + record.json for record in records])
    tail = orjson.dumps({"namespace": namespace, "usage": {"readUnits": 1}})[1:]
    if token:
        tail = orjson.dumps({"pagination": {"next": token}})[1:-1] + b"," + tail
    return Reply(body=b'{"vectors":{' + items + b"}," + tail)


# ── search ───────────────────────────────────────────────────────────────────────────────────────────


def _scorer(index: Index, space: Namespace, asked: Mapping[str, Any]) -> Callable[[Stored], float]:
    if asked.get("sparseVector"):
        return _sparse_scorer(asked["sparseVector"])
    query = asked.get("vector") or []
    if asked.get("id") in space.records:
        query = space.records[asked["id"]].values
    if index.dimension is None or len(query) != index.dimension:
        found, expected = len(query), index.dimension
        raise RefusedError(
            400, f"Vector dimension {found} does not match the dimension of the index {expected}"
        )
    target = np.asarray(query, np.float64)

    def score(record: Stored) -> float:
        if record.values is None:
            return -math.inf
        found = record.values.astype(np.float64)
        if index.metric == "euclidean":
            return float(((found - target) ** 2).sum())
        product = float(found @ target)
        if index.metric == "dotproduct":
            return product
        return product / (float(np.linalg.norm(found) * np.linalg.norm(target)) or 1.0)

    return score


def _sparse_scorer(asked: Mapping[str, Any]) -> Callable[[Stored], float]:
    wanted = dict(zip(asked["indices"], asked["values"], strict=True))
    return lambda record: sum(value * record.sparse.get(number, 0.0) for number, value in wanted.items())


def _match(record: Stored, score: float, asked: Mapping[str, Any]) -> dict[str, Any]:
    found = orjson.loads(record.json)
    shown = {"id": record.id, "score": score}
    if asked.get("includeValues"):
        shown["values"] = found["values"]
    if asked.get("includeMetadata"):
        shown["metadata"] = found.get("metadata")
    return shown


_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda found, asked: asked in found if isinstance(found, list) else found == asked,
    "$ne": lambda found, asked: found != asked,
    "$in": lambda found, asked: found in asked,
    "$gt": lambda found, asked: type(found) is float and found > asked,
    "$gte": lambda found, asked: type(found) is float and found >= asked,
    "$lt": lambda found, asked: type(found) is float and found < asked,
    "$lte": lambda found, asked: type(found) is float and found <= asked,
}


def _matches(metadata: Mapping[str, Any], filter_: Mapping[str, Any]) -> bool:
    return all(_holds(metadata.get(key), condition) for key, condition in filter_.items())


def _holds(found: Any, condition: Any) -> bool:
    if not isinstance(condition, dict):
        return _COMPARE["$eq"](found, condition)
    return all(_COMPARE[word](found, asked) for word, asked in condition.items())


def each_stored(index: Index) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record that reads see, with its namespace, as JSON."""
    for name, space in sorted(index.namespaces.items()):
        for record in space.records.values():
            yield name, orjson.loads(record.json)
