"""A stand-in for an Elasticsearch cluster, to the protocol: what it documents to refuse, it refuses.

Writes are invisible to searches until a refresh and visible to a get at once; a point in time is a view of
one moment; vectors are left out of `_source` from 9.2 on; a bulk request answers for each item; a query
parameter that the version doesn't know is refused; an index that isn't there is made by a bulk request.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np

from migration_pipelines_tests.standins.elasticsearch_documents import (
    VECTOR_TYPES,
    Document,
    Mapper,
    RefusedError,
    pop_path,
    put_path,
    refuse,
)
from migration_pipelines_tests.standins.elasticsearch_search import matches, rounded, score
from migration_pipelines_tests.standins.http import Reply, Request, Standin

_HEADERS = {
    "X-elastic-product": "Elasticsearch",
    "Content-Type": "application/vnd.elasticsearch+json;compatible-with=9",
}
_COMMON = {"pretty", "human", "error_trace", "filter_path", "format"}
_SOURCE = {"_source", "_source_includes", "_source_excludes"}
_BAD_NAME = re.compile(r"[-_+]|.*[A-Z\\/*?\"<>| ,#:]|\.{1,2}$", re.DOTALL)
_STATIC = "mapping.exclude_source_vectors"
_WINDOW = 10_000
_ROUNDING = ("int8", "int4", "bbq")


@dataclass
class Index:
    """One index: `live` is what a get sees, `seen` what a search sees."""

    name: str
    settings: dict[str, Any]
    meta: dict[str, Any]
    mapper: Mapper
    hides_vectors: bool
    live: dict[str, Document] = field(default_factory=dict)
    seen: dict[str, Document] = field(default_factory=dict)
    aliases: dict[str, Any] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    uuid: str = field(default_factory=lambda: uuid.uuid4().hex[:22])

    @property
    def shards(self) -> int:
        return int(self.settings.get("number_of_shards", 1))

    def shard_of(self, routing: str) -> int:
        return zlib.crc32(routing.encode()) % self.shards

    def number(self, shard: int) -> int:
        self.numbers[shard] = self.numbers.get(shard, -1) + 1
        return self.numbers[shard]


@dataclass
class _Raw:
    """JSON text that goes into a reply as it is."""

    text: bytes


class ElasticsearchStandin(Standin):
    """A cluster of one node.

    Parameters
    ----------
    version
        Of the server.
    login
        The header `Authorization` that it asks for; None for a cluster without security.
    max_content_bytes
        `http.max_content_length`.
    """

    def __init__(
        self, version: str = "9.5.1", *, login: str | None = None, max_content_bytes: int = 100 * 2**20
    ) -> None:
        super().__init__()
        self.version, self.login, self.max_content_bytes = version, login, max_content_bytes
        self.indices: dict[str, Index] = {}
        self.views: dict[str, tuple[Index, list[Document]]] = {}
        self.forbidden: set[str] = set()  # ends of paths that the login may not ask for
        self.busy_items = 0  # items of bulk requests that are still to be refused for want of room
        self.withholds = False  # leaves vectors out whatever is asked
        self.failing_shards = 0  # answers of searches that are still to lack a shard
        self.product = True

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")[:2]))

    @property
    def hides(self) -> bool:
        return self.number >= (9, 2)

    def answer(self, request: Request) -> Reply:
        """Carry a request out."""
        headers = _HEADERS if self.product else {"Content-Type": "application/json"}
        try:
            if self.login is not None and request.headers.get("authorization") != self.login:
                refuse(401, "security_exception", "unable to authenticate user for REST request")
            self._check_media(request)
            if any(request.path.endswith(end) for end in self.forbidden):
                refuse(403, "security_exception", f"action is unauthorized for {request.path}")
            if len(request.body) > self.max_content_bytes:
                return Reply(413, b"", headers={"X-elastic-product": "Elasticsearch"})
            return Reply(200, _dumps(self._route(request)), headers)
        except RefusedError as error:
            body = {"error": {"root_cause": [error.error()], **error.error()}, "status": error.status}
            return Reply(error.status, body, headers)

    def _check_media(self, request: Request) -> None:
        """Refuse another API than that of this version and the one before."""
        ours = int(self.version.split(".")[0])
        for name in ("accept", "content-type"):
            asked = re.search(r"compatible-with=(\d+)", request.headers.get(name, ""))
            if asked and int(asked[1]) not in (ours, ours - 1):
                reason = f"{name} version must be either version {ours} or {ours - 1}, but found {asked[1]}"
                refuse(400, "media_type_header_exception", reason)

    # ── routes ───────────────────────────────────────────────────────────────────────────────────────

    def _route(self, request: Request) -> Any:
        parts = [unquote(part) for part in request.path.strip("/").split("/") if part]
        if not parts:
            number = {"number": self.version, "build_flavor": "default", "lucene_version": "10.3.0"}
            return {"name": "node", "cluster_name": "c", "version": number, "tagline": "You Know, for Search"}
        if parts[0].startswith("_"):
            return self._cluster_route(request, parts)
        action = parts[1] if len(parts) > 1 else ""
        found: Callable[..., Any] | None = {
            ("PUT", ""): self._create,
            ("GET", ""): self._describe,
            ("HEAD", ""): self._describe,
            ("DELETE", ""): self._delete_index,
            ("GET", "_mapping"): lambda r, n: {n: {"mappings": self._index(n).mapper.shown()}},
            ("GET", "_alias"): lambda r, n: self._aliases_of(n),
            ("GET", "_stats"): self._stats,
            ("POST", "_refresh"): self._refresh,
            ("POST", "_count"): self._count,
            ("POST", "_search"): lambda r, n: self._search(r, self._index(n)),
            ("POST", "_pit"): self._open_view,
            ("POST", "_mget"): self._mget,
            ("POST", "_bulk"): lambda r, n: self._bulk(r, n),
            ("PUT", "_bulk"): lambda r, n: self._bulk(r, n),
        }.get((request.method, action))
        if found is None:
            refuse(400, "illegal_argument_exception", f"no handler found for {request.method} {parts}")
        return found(request, parts[0])

    def _cluster_route(self, request: Request, parts: list[str]) -> Any:
        what = request.method, parts[0]
        if what == ("POST", "_search"):
            return self._search(request, None)
        if what == ("DELETE", "_pit"):
            return {"succeeded": self.views.pop(request.json()["id"], None) is not None, "num_freed": 1}
        if what in (("POST", "_bulk"), ("PUT", "_bulk")):
            return self._bulk(request, None)
        if what == ("POST", "_aliases"):
            return self._change_aliases(request.json()["actions"])
        if what == ("GET", "_alias"):
            found = {name: i for name, i in self.indices.items() if parts[1] in i.aliases}
            if not found:
                refuse(404, "aliases_not_found_exception", f"alias [{parts[1]}] missing")
            return {name: {"aliases": {parts[1]: {}}} for name in found}
        if what == ("GET", "_resolve"):
            shown = [
                {"name": name, "aliases": sorted(i.aliases), "attributes": ["open"]}
                for name, i in sorted(self.indices.items())
                if not name.startswith(".")
            ]
            return {"indices": shown, "aliases": [], "data_streams": []}
        return refuse(400, "illegal_argument_exception", f"no handler found for {what}")

    def _known(self, request: Request, *names: str) -> None:
        known = _COMMON.union(names, {"_source_exclude_vectors"} if self.hides and "_source" in names else ())
        odd = sorted(set(request.query) - known)
        if odd:
            refuse(
                400,
                "illegal_argument_exception",
                f"request [{request.path}] contains unrecognized parameter: [{odd[0]}]",
            )

    def _index(self, name: str) -> Index:
        found = [i for i in self.indices.values() if name in (i.name, *i.aliases)]
        if not found:
            refuse(404, "index_not_found_exception", f"no such index [{name}]")
        return found[0]

    # ── indices ──────────────────────────────────────────────────────────────────────────────────────

    def _create(self, request: Request, name: str) -> Any:
        body = request.json() or {}
        self.make(name, body.get("settings") or {}, body.get("mappings") or {})
        return {"acknowledged": True, "shards_acknowledged": True, "index": name}

    def make(self, name: str, settings: Mapping[str, Any], mappings: Mapping[str, Any]) -> Index:
        if name in self.indices or any(name in i.aliases for i in self.indices.values()):
            refuse(400, "resource_already_exists_exception", f"index [{name}] already exists")
        if _BAD_NAME.match(name) or len(name.encode()) > 255:
            refuse(400, "invalid_index_name_exception", f"Invalid index name [{name}]")
        flat = dict(_flatten(settings))
        flat = {key.removeprefix("index."): value for key, value in flat.items()}
        if _STATIC in flat and not self.hides:
            refuse(400, "illegal_argument_exception", f"unknown setting [index.{_STATIC}]")
        hides = self.hides and str(flat.get(_STATIC, True)).lower() == "true"
        if {"mapping", "mappings"} & set(mappings):
            refuse(400, "mapper_parsing_exception", "unknown key")
        mapper = Mapper.of(mappings, int(flat.get("mapping.total_fields.limit", 1000)), self.number)
        index = Index(name, flat, dict(mappings), mapper, hides)
        self.indices[name] = index
        return index

    def _describe(self, request: Request, name: str) -> Any:
        self._known(request, "include_defaults", "flat_settings", "features")
        index = self._index(name)
        own = {**index.settings, "uuid": index.uuid, "number_of_shards": index.shards}
        settings = {
            f"index.{key}": str(v).lower() if isinstance(v, bool) else str(v) for key, v in own.items()
        }
        defaults = {"index.refresh_interval": "1s", "index.max_result_window": str(_WINDOW)}
        if self.hides:
            defaults[f"index.{_STATIC}"] = str(index.hides_vectors).lower()
        found = {"aliases": index.aliases, "mappings": index.mapper.shown(), "settings": settings}
        found["defaults"] = {key: value for key, value in defaults.items() if key not in settings}
        if request.query.get("flat_settings") != ["true"]:
            found |= {part: _nested(found[part]) for part in ("settings", "defaults")}
        return {index.name: found}

    def _delete_index(self, request: Request, name: str) -> Any:
        if name not in self.indices and any(name in i.aliases for i in self.indices.values()):
            refuse(
                400,
                "illegal_argument_exception",
                f"The provided expression [{name}] matches an alias, specify the "
                "corresponding concrete indices instead.",
            )
        del self.indices[self._index(name).name]
        return {"acknowledged": True}

    def _aliases_of(self, name: str) -> Any:
        index = self._index(name)
        return {index.name: {"aliases": index.aliases}}

    def _change_aliases(self, actions: list[dict[str, Any]]) -> Any:
        """All of the actions or none."""
        before = {name: dict(index.aliases) for name, index in self.indices.items()}
        try:
            for action in actions:
                ((kind, body),) = action.items()
                if body["alias"] in self.indices:
                    refuse(
                        400,
                        "invalid_alias_name_exception",
                        f"an index exists with the name [{body['alias']}]",
                    )
                index = self._index(body["index"])
                if kind == "remove" and index.aliases.pop(body["alias"], None) is None:
                    refuse(404, "aliases_not_found_exception", f"aliases [{body['alias']}] missing")
                if kind == "add":
                    index.aliases[body["alias"]] = {}
        except RefusedError:
            for name, aliases in before.items():
                self.indices[name].aliases = aliases
            raise
        return {"acknowledged": True, "errors": False}

    def _stats(self, request: Request, name: str) -> Any:
        self._known(request, "level")
        index = self._index(name)
        shards = {
            str(shard): [
                {"routing": {"primary": True}, "seq_no": {"max_seq_no": index.numbers.get(shard, -1)}},
            ]
            for shard in range(index.shards)
        }
        return {
            "_shards": self._shards(index),
            "indices": {index.name: {"uuid": index.uuid, "shards": shards}},
        }

    def _shards(self, index: Index) -> dict[str, Any]:
        if self.failing_shards > 0:
            self.failing_shards -= 1
            why = {"type": "es_rejected_execution_exception", "reason": "queue full"}
            return {"total": 2, "successful": 1, "failed": 1, "failures": [{"shard": 1, "reason": why}]}
        return {"total": index.shards, "successful": index.shards, "skipped": 0, "failed": 0}

    def _refresh(self, request: Request, name: str) -> Any:
        index = self._index(name)
        index.seen = dict(index.live)
        return {"_shards": self._shards(index)}

    # ── searches ─────────────────────────────────────────────────────────────────────────────────────

    def _count(self, request: Request, name: str) -> Any:
        index, body = self._index(name), request.json() or {}
        found = [d for d in index.seen.values() if matches(body.get("query"), d, index.mapper)]
        return {"count": len(found), "_shards": self._shards(index)}

    def _open_view(self, request: Request, name: str) -> Any:
        self._known(request, "keep_alive", "allow_partial_search_results")
        if "keep_alive" not in request.query:
            refuse(400, "action_request_validation_exception", "[keep_alive] is not specified")
        index, key = self._index(name), base64.b64encode(uuid.uuid4().bytes).decode()
        # Shards number their documents in an order of their own, which isn't that of arrival.
        documents = sorted(index.seen.values(), key=lambda d: (d.shard, zlib.crc32(d.id.encode()), d.id))
        self.views[key] = (index, documents)
        return {"id": key, **({"_shards": self._shards(index)} if self.number >= (8, 16) else {})}

    def _search(self, request: Request, index: Index | None) -> Any:
        self._known(request, *_SOURCE, "allow_partial_search_results")
        body = request.json() or {}
        if "pit" in body:
            if index is not None:
                refuse(
                    400, "action_request_validation_exception", "[indices] cannot be used with point in time"
                )
            if body["pit"]["id"] not in self.views:
                refuse(404, "search_context_missing_exception", "No search context found")
            index, documents = self.views[body["pit"]["id"]]
        elif index is None:
            refuse(400, "illegal_argument_exception", "the stand-in searches one index")
        else:
            documents = list(index.seen.values())
        if body.get("size", 10) > _WINDOW:
            refuse(400, "illegal_argument_exception", f"Result window is too large, must be <= [{_WINDOW}]")
        hits = list(self._hits(body, index, documents))
        total: dict[str, Any] = {"value": len(hits), "relation": "eq"}
        if body.get("track_total_hits") is not True and len(hits) > _WINDOW:
            total = {"value": _WINDOW, "relation": "gte"}
        if "search_after" in body:
            hits = [hit for hit in hits if hit["sort"] > body["search_after"]]
        shown = hits[: body.get("size", 10)]
        for hit in shown:
            found = self._source_of(index, hit.pop("_document"), request, body.get("_source", True))
            hit |= {} if found is None else {"_source": found}
        hits_body = {"hits": shown} | ({"total": total} if body.get("track_total_hits") is not False else {})
        found = {"took": 1, "timed_out": False, "_shards": self._shards(index), "hits": hits_body}
        return found | ({"pit_id": body["pit"]["id"]} if "pit" in body else {})

    def _hits(
        self, body: Mapping[str, Any], index: Index, documents: list[Document]
    ) -> Iterator[dict[str, Any]]:
        if "knn" in body:
            yield from self._nearest(body["knn"], index, documents)
            return
        by_place = any(
            "_shard_doc" in (item if isinstance(item, dict) else [item]) for item in body.get("sort", ())
        )
        if by_place and "pit" not in body:
            refuse(
                400, "query_shard_exception", "[_shard_doc] sort field cannot be used without [point in time]"
            )
        part = body.get("slice")
        for place, document in enumerate(documents):
            if part is not None and zlib.crc32(document.id.encode()) % part["max"] != part["id"]:
                continue
            if matches(body.get("query"), document, index.mapper):
                hit = {"_index": index.name, "_id": document.id, "_score": None, "_document": document}
                hit |= {"_routing": document.routing} if document.routing else {}
                yield hit | {"sort": [document.shard << 32 | place]}

    def _nearest(
        self, asked: Mapping[str, Any], index: Index, documents: list[Document]
    ) -> Iterator[dict[str, Any]]:
        mapping = index.mapper.fields.get(asked["field"])
        if mapping is None or mapping["type"] != "dense_vector" or not mapping.get("index"):
            refuse(400, "query_shard_exception", f"failed to create query: [{asked['field']}] isn't indexed")
        query = np.asarray(asked["query_vector"], np.float32)
        width = mapping.get("dims", 0) // (8 if mapping["element_type"] == "bit" else 1)
        if len(query) != width:
            refuse(
                400,
                "query_shard_exception",
                f"the query vector has a different number of dimensions [{len(query)}] than the document "
                f"vectors [{width}]",
            )
        if asked["num_candidates"] > 10_000 or asked["k"] > asked["num_candidates"]:
            refuse(
                400, "illegal_argument_exception", "[num_candidates] cannot exceed [10000] or be below [k]"
            )
        if mapping["similarity"] == "cosine" and not query.any():
            refuse(400, "query_shard_exception", "[cosine] does not support vectors with zero magnitude")
        if "rescore_vector" in asked and self.number < (8, 18):
            refuse(400, "parsing_exception", "[knn] unknown field [rescore_vector]")
        options = mapping.get("index_options") or {"type": "hnsw"}
        rounds = options["type"].startswith(_ROUNDING) and "rescore_vector" not in {*asked, *options}
        scored = [
            (score(rounded(vector) if rounds else vector, query, mapping), d)
            for d in documents
            if (vector := d.knn.get(asked["field"])) is not None
        ]
        for found, document in sorted(scored, key=lambda pair: -pair[0])[: asked["k"]]:
            yield {
                "_index": index.name,
                "_id": document.id,
                "_score": found,
                "_document": document,
                "sort": [0],
            }

    def _source_of(self, index: Index, document: Document, request: Request, asked: Any) -> _Raw | None:
        """What is given back of a document: its own text, unless something is to be put in or left out."""
        query = request.query
        if asked is False or query.get("_source") == ["false"]:
            return None
        leaves_out = index.hides_vectors
        if isinstance(asked, dict) and "exclude_vectors" in asked:
            leaves_out = asked["exclude_vectors"]
        if "_source_exclude_vectors" in query:
            leaves_out = query["_source_exclude_vectors"] == ["true"]
        excluded = [p for text in query.get("_source_excludes", []) for p in text.split(",")]
        leaves_out = leaves_out or self.withholds
        if (
            not excluded
            and leaves_out == index.hides_vectors
            and not (index.hides_vectors and not leaves_out)
        ):
            return _Raw(document.source)
        source = json.loads(document.source)
        if not leaves_out:
            for path, value in document.vectors.items():
                put_path(source, path, value)
        else:
            excluded += [p for p, mapping in index.mapper.fields.items() if mapping["type"] in VECTOR_TYPES]
        for path in excluded:
            pop_path(source, path)
        return _Raw(json.dumps(source, ensure_ascii=False).encode())

    def _mget(self, request: Request, name: str) -> Any:
        self._known(request, *_SOURCE, "realtime", "refresh", "routing", "preference", "stored_fields")
        index, body = self._index(name), request.json()
        asked = [{"_id": record_id} for record_id in body.get("ids") or ()] or body.get("docs")
        if not asked:
            refuse(400, "action_request_validation_exception", "Validation Failed: 1: no documents to get;")
        docs: list[dict[str, Any]] = []
        for item in asked:
            record_id = item["_id"]
            document = index.live.get(record_id)
            # By its id alone, a document with a routing of its own is looked for in the wrong shard.
            if document is None or document.shard != index.shard_of(item.get("routing") or record_id):
                docs.append({"_index": index.name, "_id": record_id, "found": False})
                continue
            found = {
                "_index": index.name,
                "_id": record_id,
                "_version": 1,
                "_seq_no": document.seq_no,
                "found": True,
            }
            source = self._source_of(index, document, request, True)
            docs.append(found | ({"_source": source} if source else {}))
        return {"docs": docs}

    # ── bulk ─────────────────────────────────────────────────────────────────────────────────────────

    def _bulk(self, request: Request, name: str | None) -> Any:
        self._known(
            request, "refresh", "pipeline", "routing", "require_alias", "timeout", "wait_for_active_shards"
        )
        kind = request.headers.get("content-type", "")
        if "ndjson" not in kind and "json" not in kind:
            refuse(406, "media_type_header_exception", f"Content-Type header [{kind}] is not supported")
        if not request.body.endswith(b"\n"):
            refuse(
                400, "illegal_argument_exception", "The bulk request must be terminated by a newline [\\n]"
            )
        lines = iter(request.body[:-1].split(b"\n"))
        items, touched = [], set()
        for line in lines:
            if not line:
                continue
            ((action, meta),) = json.loads(line).items()
            text = next(lines) if action != "delete" else b""
            items.append({action: self._item(action, meta, text, name, touched)})
        if request.query.get("refresh", ["false"]) != ["false"]:
            for index in touched:
                self.indices[index].seen = dict(self.indices[index].live)
        return {"took": 1, "errors": any("error" in next(iter(i.values())) for i in items), "items": items}

    def _item(
        self, action: str, meta: Mapping[str, Any], text: bytes, name: str | None, touched: set[str]
    ) -> Any:
        target, record_id = meta.get("_index") or name, meta.get("_id") or uuid.uuid4().hex[:20]
        found = {"_index": target, "_id": record_id}
        try:
            if self.busy_items > 0:
                self.busy_items -= 1
                refuse(429, "es_rejected_execution_exception", "rejected execution of coordinating operation")
            if len(record_id.encode()) > 512:
                refuse(
                    400,
                    "action_request_validation_exception",
                    "id is too long, must be no longer than 512 bytes",
                )
            try:
                index = self._index(target or "")
            except RefusedError:
                if action == "delete":
                    raise
                index = self.make(target or "", {}, {})
            routing = meta.get("routing")
            shard = index.shard_of(routing or record_id)
            if action == "delete":
                there = index.live.pop(record_id, None)
                index.number(shard)
                touched.add(index.name)
                return found | {
                    "status": 200 if there else 404,
                    "result": "deleted" if there else "not_found",
                }
            document = index.mapper.take(record_id, text, hides_vectors=index.hides_vectors)
        except RefusedError as error:
            return found | {"status": error.status, "error": error.error()}
        document.routing, document.shard, document.seq_no = routing, shard, index.number(shard)
        is_new = record_id not in index.live
        index.live[record_id] = document
        touched.add(index.name)
        return found | {"status": 201 if is_new else 200, "result": "created" if is_new else "updated"}


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *above, name = path.split(".")
        inner = tree
        for part in above:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return tree


def _dumps(value: Any) -> bytes:
    """JSON with the texts of `_Raw` in it as they are."""
    texts: list[bytes] = []

    def default(item: Any) -> Any:
        texts.append(item.text)
        return f"\0{len(texts) - 1}\0"

    text = json.dumps(value, default=default, ensure_ascii=False).encode()
    return re.sub(rb'"\\u0000(\d+)\\u0000"', lambda match: texts[int(match[1])], text) if texts else text
