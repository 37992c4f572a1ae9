"""A Qdrant server's HTTP interface over the real engine (qdrant-edge-py): what it stores, changes and
answers, and in which order, is Qdrant's own; only the routes, the limits and the settings are imitated.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import orjson
import qdrant_edge as edge

from migration_pipelines_tests.standins.http import Reply, Request, Standin

LARGEST_REQUEST = 32 * 2**20  # config.yaml: `max_request_size_mb: 32`
_POINT_OPERATIONS = {"", "/scroll", "/count", "/query", "/delete"}
_HNSW = {
    "m": 16,
    "ef_construct": 100,
    "full_scan_threshold": 10000,
    "max_indexing_threads": 0,
    "on_disk": False,
}
_OPTIMIZER = {
    "deleted_threshold": 0.2,
    "vacuum_min_vector_number": 1000,
    "default_segment_number": 0,
    "max_segment_size": None,
    "memmap_threshold": None,
    "indexing_threshold": 20000,
    "flush_interval_sec": 5,
    "max_optimization_threads": None,
}
_WAL = {"wal_capacity_mb": 32, "wal_segments_ahead": 0}
_DATATYPES = {
    None: None,
    "float32": edge.VectorStorageDatatype.Float32,
    "float16": edge.VectorStorageDatatype.Float16,
    "uint8": edge.VectorStorageDatatype.Uint8,
}
_DISTANCES = {name: getattr(edge.Distance, name) for name in ("Cosine", "Dot", "Euclid", "Manhattan")}


class RefusedError(Exception):
    """A request that the server answers with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Collection:
    def __init__(self, body: Mapping[str, Any], folder: Path) -> None:
        self.body = dict(body)
        self.folder = folder
        vectors = body.get("vectors") or {}
        self.vectors = {"": vectors} if isinstance(vectors.get("size"), int) else dict(vectors)
        self.sparse = dict(body.get("sparse_vectors") or {})
        self.payload_schema: dict[str, Any] = {}
        self.optimizer = {**_OPTIMIZER, **(body.get("optimizers_config") or {})}
        self.metadata = body.get("metadata")
        self.is_sharded_by_key = body.get("sharding_method") == "custom"
        self.shards: dict[Any, Any] = {} if self.is_sharded_by_key else {None: self.new_shard()}

    def new_shard(self) -> Any:
        """A shard of the real engine."""
        path = self.folder / uuid.uuid4().hex
        path.mkdir()
        dense = {
            name: edge.EdgeVectorParams(
                size=params["size"],
                distance=_DISTANCES[params["distance"]],
                datatype=_DATATYPES[params.get("datatype")],
                multivector_config=(
                    edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
                    if params.get("multivector_config")
                    else None
                ),
            )
            for name, params in self.vectors.items()
        }
        sparse = {name: edge.EdgeSparseVectorParams() for name in self.sparse}
        config = edge.EdgeConfig(vectors=dense, sparse_vectors=sparse or None, wal_enabled=False)
        return edge.EdgeShard.create(str(path), config)

    def info(self) -> dict[str, Any]:
        """What `GET /collections/{name}` says."""
        body = self.body
        params = {
            "vectors": body.get("vectors") or {},
            "shard_number": body.get("shard_number") or 1,
            "replication_factor": body.get("replication_factor") or 1,
            "write_consistency_factor": body.get("write_consistency_factor") or 1,
            "on_disk_payload": body.get("on_disk_payload", True),
        }
        params |= {key: body[key] for key in ("sharding_method", "sparse_vectors") if body.get(key)}
        config = {
            "params": params,
            "hnsw_config": {**_HNSW, **(body.get("hnsw_config") or {})},
            "optimizer_config": self.optimizer,
            "wal_config": {**_WAL, **(body.get("wal_config") or {})},
            "quantization_config": body.get("quantization_config"),
        }
        config |= {"metadata": self.metadata} if self.metadata else {}
        config |= {key: body[key] for key in ("strict_mode_config",) if body.get(key)}
        return {
            "status": "green",
            "optimizer_status": "ok",
            "indexed_vectors_count": 0,
            "points_count": sum(shard.info().points_count for shard in self.shards.values()),
            "segments_count": len(self.shards),
            "config": config,
            "payload_schema": self.payload_schema,
        }


class QdrantStandin(Standin):
    """One server; with a `key` it asks for it."""

    def __init__(self, key: str | None = None) -> None:
        super().__init__()
        self.key = key
        self.collections: dict[str, _Collection] = {}
        self.aliases: dict[str, str] = {}
        self.folder = Path()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve, and keep the engine's files in a folder that is removed after."""
        self.folder = Path(tempfile.mkdtemp(prefix="qdrant-standin-"))
        try:
            with super().serving():
                yield
        finally:
            self.collections.clear()
            shutil.rmtree(self.folder, ignore_errors=True)

    def answer(self, request: Request) -> Reply:
        """Carry a request out."""
        try:
            self._admit(request)
            return _ok(self._routed(request))
        except RefusedError as error:
            return _reply({"status": {"error": str(error)}, "time": 0.0}, error.status)

    def _admit(self, request: Request) -> None:
        if self.key is not None and request.headers.get("api-key") != self.key:
            raise RefusedError(401, "Must provide an API key or an Authorization bearer token")
        if len(request.body) > LARGEST_REQUEST:
            raise RefusedError(413, f"Payload error: JSON payload ({len(request.body)} bytes) is larger")

    def _routed(self, request: Request) -> Any:
        method, path = request.method, request.path
        body = _json(request)
        if path == "/":
            return {"title": "qdrant", "version": "1.16.0"}
        if path == "/collections":
            return {"collections": [{"name": name} for name in self.collections]}
        if path == "/collections/aliases":
            return self._change_aliases(body)
        if path == "/aliases":
            pairs = self.aliases.items()
            return {"aliases": [{"alias_name": a, "collection_name": c} for a, c in pairs]}
        match = re.fullmatch(r"/collections/([^/]+)(/.*)?", path)
        if match is None:
            raise RefusedError(404, "no such route")
        name, rest = unquote(match[1]), match[2] or ""
        if not rest:
            return self._on_collection(method, name, body)
        found = self._found(name)
        if rest.startswith("/points") and rest.removeprefix("/points") in _POINT_OPERATIONS:
            return self._on_points(method, rest, found, body)
        routes: Mapping[str, Callable[..., Any]] = {
            "/index": _create_index,
            "/shards": _create_shard_key,
            "/cluster": _cluster,
            "/exists": lambda *_: {"exists": True},
        }
        if rest == "/aliases":
            names = [alias for alias, target in self.aliases.items() if target == name]
            return {"aliases": [{"alias_name": alias, "collection_name": name} for alias in names]}
        if rest not in routes:
            raise RefusedError(404, f"no such route: {rest}")
        return routes[rest](found, body)

    def _found(self, name: str) -> _Collection:
        found = self.collections.get(self.aliases.get(name, name))
        if found is None:
            raise RefusedError(404, f"Not found: Collection `{name}` doesn't exist!")
        return found

    def _on_collection(self, method: str, name: str, body: Any) -> Any:
        if method == "PUT":
            if name in self.collections or name in self.aliases:
                raise RefusedError(409, f"Wrong input: Collection `{name}` already exists!")
            self.collections[name] = _Collection(body, self.folder)
            return True
        if method == "DELETE":
            gone = self.collections.pop(name, None)
            self.aliases = {alias: target for alias, target in self.aliases.items() if target != name}
            return gone is not None
        found = self._found(name)
        if method == "PATCH":
            # What is null or absent stays as it is.
            changes = (body.get("optimizers_config") or {}).items()
            found.optimizer |= {key: value for key, value in changes if value is not None}
            found.metadata = {**(found.metadata or {}), **(body.get("metadata") or {})} or None
            return True
        return found.info()

    def _change_aliases(self, body: Any) -> bool:
        aliases = dict(self.aliases)
        for action in body["actions"]:
            if "delete_alias" in action:
                if aliases.pop(action["delete_alias"]["alias_name"], None) is None:
                    raise RefusedError(404, "Not found: Alias doesn't exist!")
            else:
                create = action["create_alias"]
                self._found(create["collection_name"])
                if create["alias_name"] in self.collections:
                    raise RefusedError(
                        409, f"Wrong input: Collection `{create['alias_name']}` already exists!"
                    )
                aliases[create["alias_name"]] = create["collection_name"]
        self.aliases = aliases
        return True

    def _on_points(self, method: str, rest: str, found: _Collection, body: Any) -> Any:
        if rest == "/points" and method == "PUT":
            return _upsert(found, body)
        routes = {
            "/points": _retrieve,
            "/points/scroll": _scroll,
            "/points/count": _count,
            "/points/query": _query,
            "/points/delete": _delete,
        }
        return routes[rest](found, body)


# ── points ───────────────────────────────────────────────────────────────────────────────────────────


def _upsert(found: _Collection, body: Any) -> Any:
    asked = _rows(body["batch"]) if "batch" in body else body.get("points")
    if not asked:
        raise RefusedError(400, "Bad request: Empty update request")
    points = [_point(found, point) for point in asked]
    try:
        _shard(found, body.get("shard_key")).update(edge.UpdateOperation.upsert_points(points))
    except Exception as error:  # the engine raises nothing finer
        raise RefusedError(400, f"Wrong input: {error}") from error
    return {"operation_id": 1, "status": "completed"}


def _rows(batch: Any) -> list[Any]:
    """The points of a request that has them in columns."""
    payloads = batch.get("payloads") or [None] * len(batch["ids"])
    vectors = batch["vectors"]
    if isinstance(vectors, dict):
        vectors = [dict(zip(vectors, row, strict=True)) for row in zip(*vectors.values(), strict=True)]
    rows = zip(batch["ids"], vectors, payloads, strict=True)
    return [{"id": record_id, "vector": vector, "payload": payload} for record_id, vector, payload in rows]


def _shard(found: _Collection, key: Any) -> Any:
    if found.is_sharded_by_key and key is None:
        raise RefusedError(400, "Wrong input: Shard key not specified")
    if key not in found.shards:
        raise RefusedError(404, f"Not found: Shard key {key} not found")
    return found.shards[key]


def _point(found: _Collection, point: Any) -> Any:
    record_id = point["id"]
    if isinstance(record_id, str):
        try:
            uuid.UUID(record_id)
        except ValueError:
            raise RefusedError(400, f"value {record_id} is not a valid point ID") from None
    elif isinstance(record_id, bool) or not isinstance(record_id, int) or not 0 <= record_id < 2**64:
        raise RefusedError(400, f"value {record_id} is not a valid point ID")
    vector = point["vector"]
    named = vector if isinstance(vector, dict) else {"": vector}
    for name in named:
        if name not in found.vectors and name not in found.sparse:
            raise RefusedError(400, f"Wrong input: Not existing vector name error: {name}")
    return edge.Point(record_id, {n: _vector(v) for n, v in named.items()}, _stored(point.get("payload")))


def _vector(vector: Any) -> Any:
    if isinstance(vector, dict):
        if len(set(vector["indices"])) < len(vector["indices"]):
            raise RefusedError(422, "Validation error in JSON body: [indices: must be unique]")
        return edge.SparseVector(vector["indices"], [float(value) for value in vector["values"]])
    if not vector:
        raise RefusedError(422, "Validation error in JSON body: [vector: empty]")
    rows = vector if isinstance(vector[0], list) else [vector]
    if any(not isinstance(number, (int, float)) for row in rows for number in row):
        raise RefusedError(400, "Format error in JSON body: invalid type: null, expected f32")
    return [[float(n) for n in row] for row in rows] if rows is vector else [float(n) for n in vector]


def _stored(value: Any) -> Any:
    """A payload as the server's JSON parser has it: integers beyond 64 bits become doubles."""
    if isinstance(value, dict):
        return {key: _stored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_stored(item) for item in value]
    is_too_large = isinstance(value, int) and not -(2**63) <= value < 2**64
    return float(value) if is_too_large else value


def _retrieve(found: _Collection, body: Any) -> Any:
    options = (bool(body.get("with_payload", True)), bool(body.get("with_vector")))
    records = [
        _record(record, key, *options)
        for key, shard in found.shards.items()
        for record in shard.retrieve(body["ids"], with_payload=options[0], with_vector=options[1])
    ]
    return records[::-1]  # in no promised order


def _scroll(found: _Collection, body: Any) -> Any:
    limit = 10 if body.get("limit") is None else body["limit"]
    strict = found.body.get("strict_mode_config") or {}
    most = strict.get("max_query_limit") if strict.get("enabled") else None
    if most is not None and limit > most:
        raise RefusedError(
            400,
            f'Bad request: Limit exceeded {limit} > {most} for "limit". Help: Reduce the "limit" parameter '
            f"to or below {most}.",
        )
    options = (bool(body.get("with_payload", True)), bool(body.get("with_vector")))
    records = []
    for key, shard in found.shards.items():
        request = edge.ScrollRequest(
            offset=body.get("offset"),
            limit=limit + 1,
            filter=_filter(body.get("filter"), shard),
            with_payload=options[0],
            with_vector=options[1],
        )
        records += [_record(record, key, *options) for record in shard.scroll(request)[0]]
    records.sort(key=lambda record: (isinstance(record["id"], str), record["id"]))
    following = records[limit]["id"] if len(records) > limit else None
    return {"points": records[:limit], "next_page_offset": following}


def _record(record: Any, key: Any, with_payload: bool, with_vector: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"id": record.id if isinstance(record.id, int) else str(record.id)}
    if with_payload:
        found["payload"] = record.payload
    if with_vector:
        vector = record.vector
        found["vector"] = (
            {name: _shown(item) for name, item in vector.items()}
            if isinstance(vector, dict)
            else _shown(vector)
        )
    return found | ({"shard_key": key} if key is not None else {})


def _shown(vector: Any) -> Any:
    if isinstance(vector, edge.SparseVector):
        return {"indices": vector.indices, "values": np.array(vector.values, np.float32)}
    return np.array(vector, np.float32)


def _count(found: _Collection, body: Any) -> Any:
    total = 0
    for shard in found.shards.values():
        total += shard.count(edge.CountRequest(filter=_filter(body.get("filter"), shard), exact=True))
    return {"count": total}


def _delete(found: _Collection, body: Any) -> Any:
    for shard in found.shards.values():
        shard.update(edge.UpdateOperation.delete_points(body["points"]))
    return {"operation_id": 1, "status": "completed"}


def _query(found: _Collection, body: Any) -> Any:
    name = body.get("using") or ""
    if name not in found.vectors:
        raise RefusedError(400, f"Wrong input: Not existing vector name error: {name}")
    points = []
    for shard in found.shards.values():
        request = edge.SearchRequest(
            query=edge.Query.Nearest([float(number) for number in body["query"]], name or None),
            limit=body.get("limit", 10),
            filter=_filter(body.get("filter"), shard),
        )
        try:
            points += shard.search(request)
        except Exception as error:  # the engine raises nothing finer
            raise RefusedError(400, f"Wrong input: {error}") from error
    descending = found.vectors[name]["distance"] in ("Cosine", "Dot")
    points.sort(key=lambda point: point.score, reverse=descending)
    shown = [{"id": _record(p, None, False, False)["id"], "version": 0, "score": p.score} for p in points]
    return {"points": shown[: body.get("limit", 10)]}


def _filter(body: Any, shard: Any) -> Any:
    if body is None:
        return None
    unknown = body.keys() - {"must", "should", "must_not"}
    if unknown:
        raise RefusedError(400, f"Format error in JSON body: unknown field {unknown}")
    return edge.Filter(**{key: [_condition(item, shard) for item in value] for key, value in body.items()})


def _condition(body: Any, shard: Any) -> Any:
    if body.keys() & {"must", "should", "must_not"}:
        return _filter(body, shard)
    if "is_empty" in body:
        return edge.IsEmptyCondition(body["is_empty"]["key"])
    if "range" in body:
        return edge.FieldCondition(body["key"], range=edge.RangeFloat(**body["range"]))
    value = body["match"]["value"]
    if isinstance(value, bool):  # which the engine's Python side takes for an integer
        return edge.HasIdCondition(_ids_where(shard, body["key"].strip('"'), value))
    return edge.FieldCondition(body["key"], match=edge.MatchValue(value))


def _ids_where(shard: Any, key: str, value: bool) -> set[Any]:
    records, _ = shard.scroll(edge.ScrollRequest(limit=2**31, with_payload=True, with_vector=False))
    found = ((record.id, (record.payload or {}).get(key)) for record in records)
    return {i for i, v in found if any(item is value for item in (v if isinstance(v, list) else [v]))}


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def _create_index(found: _Collection, body: Any) -> Any:
    schema = body["field_schema"]
    kind = schema if isinstance(schema, str) else schema["type"]
    params = None if isinstance(schema, str) else schema
    entry = {"data_type": kind, "points": 0} | ({"params": params} if params else {})
    found.payload_schema[body["field_name"]] = entry
    return {"operation_id": 1, "status": "completed"}


def _create_shard_key(found: _Collection, body: Any) -> bool:
    if not found.is_sharded_by_key:
        raise RefusedError(400, "Bad request: Shard Key cannot be created with Auto sharding method")
    found.shards[body["shard_key"]] = found.new_shard()
    return True


def _cluster(found: _Collection, _: Any) -> Any:
    local = [
        {"shard_id": number, "points_count": 0, "state": "Active"}
        | ({"shard_key": key} if key is not None else {})
        for number, key in enumerate(found.shards)
    ]
    return {"peer_id": 1, "shard_count": len(local), "local_shards": local, "remote_shards": []}


# ── wire ─────────────────────────────────────────────────────────────────────────────────────────────


def _json(request: Request) -> Any:
    if not request.body:
        return {}
    try:
        # NaN and Infinity are no JSON, though Python reads and writes them.
        return orjson.loads(request.body) if b"NaN" in request.body else request.json()
    except ValueError as error:
        raise RefusedError(400, f"Format error in JSON body: {error}") from None


def _ok(result: Any) -> Reply:
    return _reply({"result": result, "status": "ok", "time": 0.001})


def _reply(body: Any, status: int = 200) -> Reply:
    # Vectors in the fewest digits that tell float32s apart, as the server writes them.
    return Reply(status, orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
