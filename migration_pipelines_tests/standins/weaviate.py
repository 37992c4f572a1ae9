"""A stand-in for a Weaviate server 1.32: REST for schemas, tenants, aliases; gRPC for objects.

After the server's source, and beside a server 1.39.0, on which the same tests pass. What is checked, refused,
changed and left out is so there too; not here is all that makes vectors, ranks texts or answers GraphQL.
"""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from migration_pipelines_tests.standins.http import Reply, Request, Standin
from migration_pipelines_tests.standins.weaviate_values import InvalidValueError, kept, now_ms, property_of

VERSION = "1.32.4"
MAX_MESSAGE_BYTES = 104_858_000

_CLASS = re.compile(r"[A-Z][_0-9A-Za-z]{0,254}")
_PROPERTY = re.compile(r"[_A-Za-z][_0-9A-Za-z]{0,230}")
_VECTOR = re.compile(r"[_A-Za-z][_0-9A-Za-z]{0,229}")
_TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ENDS = ("_searchable", "_rangeable", "_temp", "__meta_count", "_propertyLength", "_nullState")
_STATUSES = {"": "HOT", "ACTIVE": "HOT", "INACTIVE": "COLD", "OFFLOADED": "FROZEN"}
# What a class is made with unless it says otherwise.
_INDEX: dict[str, Any] = {
    "distance": "cosine",
    "ef": -1,
    "efConstruction": 128,
    "maxConnections": 32,
    "cleanupIntervalSeconds": 300,
    "dynamicEfFactor": 8,
    "dynamicEfMax": 500,
    "dynamicEfMin": 100,
    "filterStrategy": "sweeping",
    "flatSearchCutoff": 40_000,
    "skip": False,
    "vectorCacheMaxObjects": 1_000_000_000_000,
    "pq": {"enabled": False},
    "bq": {"enabled": False},
    "sq": {"enabled": False},
}
_MULTIVECTOR = {"enabled": False, "aggregation": "maxSim", "muvera": {"enabled": False}}
_INVERTED = {
    "bm25": {"b": 0.75, "k1": 1.2},
    "cleanupIntervalSeconds": 60,
    "stopwords": {"preset": "en", "additions": None, "removals": None},
}
_SHARDING = {
    "virtualPerPhysical": 128,
    "desiredCount": 1,
    "actualCount": 1,
    "desiredVirtualCount": 128,
    "actualVirtualCount": 128,
    "key": "_id",
    "strategy": "hash",
    "function": "murmur3",
}
_DISTANCES = ("cosine", "dot", "l2-squared", "manhattan", "hamming")


class ServerError(Exception):
    """What a call is answered with, as the message and, over REST, the status."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class StoredObject:
    """One object: `vectors` by name, float32 as bytes with the name "" for the class's own."""

    id: str
    properties: dict[str, Any]
    vectors: dict[str, bytes]
    updated_ms: int


@dataclass
class StoredClass:
    """One class; its objects by tenant, "" where it has none."""

    body: dict[str, Any]
    tenants: dict[str, str] = field(default_factory=dict)
    objects: dict[str, dict[str, StoredObject]] = field(default_factory=dict)

    @property
    def has_tenants(self) -> bool:
        """Whether multi-tenancy is on."""
        return bool(self.body["multiTenancyConfig"]["enabled"])

    @property
    def properties(self) -> dict[str, dict[str, Any]]:
        """The properties by name."""
        return {item["name"]: item for item in self.body["properties"]}

    def vector_configs(self) -> Mapping[str, Any]:
        """The configuration of each vector; the class's own is called ""."""
        return self.body.get("vectorConfig") or {"": self.body}

    def of(self, tenant: str) -> dict[str, StoredObject]:
        """The objects of a tenant, which must be there and active."""
        name = self.body["class"]
        if not self.has_tenants:
            if tenant:
                raise ServerError(f"class {name} has multi-tenancy disabled, but request was with tenant")
        elif not tenant:
            raise ServerError(f"class {name} has multi-tenancy enabled, but request was without tenant")
        elif tenant not in self.tenants:
            raise ServerError(f'tenant not found: "{tenant}"')
        elif self.tenants[tenant] != "HOT":
            raise ServerError(f"tenant not active: '{tenant}'")
        return self.objects.setdefault(tenant, {})


class WeaviateStandin(Standin):
    """The server; `port` answers REST and `grpc_port` gRPC.

    Parameters
    ----------
    api_key
        The only key that is let in; anybody if None.
    auto_schema
        Whether unknown properties are added, of the type that their first value seems to be of.
    """

    def __init__(
        self, *, api_key: str | None = None, auto_schema: bool = True, version: str = VERSION
    ) -> None:
        super().__init__()
        self.api_key, self.auto_schema, self.version = api_key, auto_schema, version
        self.max_message_bytes = MAX_MESSAGE_BYTES
        self.maximum_results = 10_000  # QUERY_MAXIMUM_RESULTS
        self.nodes = 1
        self.classes: dict[str, StoredClass] = {}
        self.alias_of: dict[str, str] = {}
        self.grpc_port = 0
        self.grpc_faults: list[Any] = []
        self.grpc_requests: list[tuple[str, Any]] = []
        self._clock = itertools.count(now_ms())

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve REST and gRPC on free ports of the loopback address."""
        from migration_pipelines_tests.standins.weaviate_grpc import serving_grpc

        with super().serving(), serving_grpc(self):
            yield

    # ── shared by both ways in ───────────────────────────────────────────────────────────────────────

    def check_login(self, authorization: str | None) -> None:
        """Refuse a wrong key, and anonymous access where there is one."""
        if self.api_key is None:
            return
        if not authorization:
            raise ServerError("anonymous access not enabled. Please authenticate", 401)
        if authorization != f"Bearer {self.api_key}":
            raise ServerError("unauthorized: invalid api key, please provide a valid api key", 401)

    def found(self, name: str) -> StoredClass | None:
        """The class of a name or an alias, spelled with a capital or without."""
        name = upper(name)
        return self.classes.get(self.alias_of.get(name, name))

    def put(self, name: str, tenant: str, item: StoredObject) -> None:
        """Store an object whole in place of the one under its id.

        Raises
        ------
        InvalidValueError, ServerError
            The server refuses it.
        """
        found = self.found(name)
        if found is None:
            if not self.auto_schema:
                raise InvalidValueError(f"class '{name}' not present in schema")
            found = self._create({"class": name})
        self._check_vectors(found, item)
        item.properties = self._kept(found, item.properties)
        auto = found.body["multiTenancyConfig"].get("autoTenantCreation")
        if auto and tenant and tenant not in found.tenants:
            found.tenants[tenant] = "HOT"
        objects = found.of(tenant)
        self._check_dimensions(objects, item)
        item.updated_ms = next(self._clock)
        objects[item.id] = item

    def _kept(self, found: StoredClass, properties: Mapping[str, Any]) -> dict[str, Any]:
        stored = {}
        for name, value in properties.items():
            if value is None:
                continue  # nil values are removed and filtered out
            lower = name[:1].lower() + name[1:]
            if lower not in found.properties:
                if not self.auto_schema:
                    raise InvalidValueError(
                        f"no such prop with name '{name}' found in class '{found.body['class']}' in the "
                        "schema. Check your schema files for which properties in this class are available"
                    )
                self._add_property(found.body, property_of(name, value))
            stored[lower] = kept(lower, value, found.properties[lower], found.body["class"])
        return stored

    @staticmethod
    def _check_vectors(found: StoredClass, item: StoredObject) -> None:
        configs, name = found.vector_configs(), found.body["class"]
        own = item.vectors.pop("", b"")
        if own and "" not in configs and len(configs) > 1:
            raise InvalidValueError(f"collection {name} configuration does not have single vector index")
        if own:
            item.vectors[next(iter(configs))] = own
        for wire, raw in list(item.vectors.items()):
            if wire not in configs:
                raise InvalidValueError(f"collection {name} does not have configuration for vector {wire}")
            multi = configs[wire]["vectorIndexConfig"]["multivector"]["enabled"]
            if multi and len(raw) <= 2:
                raise InvalidValueError(
                    f'vector "{wire}" in collection "{name}": multi-vector cannot be empty'
                )
            if not raw:
                del item.vectors[wire]

    @staticmethod
    def _check_dimensions(objects: Mapping[str, StoredObject], item: StoredObject) -> None:
        for wire, raw in item.vectors.items():
            other = next((o.vectors[wire] for o in objects.values() if wire in o.vectors), None)
            if other is not None and len(other) != len(raw) and len(raw) % 4 == 0:
                raise InvalidValueError(
                    f"Validate vector index {wire} for target vector {item.id}: new node has a vector with "
                    f"length {len(raw) // 4}. Existing nodes have vectors with length {len(other) // 4}: "
                    "vector dimensions do not match the index dimensions"
                )

    # ── REST ─────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, request: Request) -> Reply:
        """Carry a request out."""
        parts = request.path.removeprefix("/v1/").split("/")
        if parts[0] == ".well-known":
            return Reply(404) if parts[1] == "openid-configuration" else Reply(200)
        try:
            self.check_login(request.headers.get("authorization"))
            handle = {
                "meta": self._meta,
                "schema": self._schema,
                "objects": self._objects,
                "aliases": self._aliases,
            }.get(parts[0])
            return Reply(404) if handle is None else handle(request, parts[1:])
        except ServerError as error:
            if error.status in (401, 403):
                return Reply(error.status, {"code": error.status, "message": str(error)})
            body = None if error.status == 404 else {"error": [{"message": str(error)}]}
            return Reply(error.status, body)

    def _meta(self, request: Request, rest: list[str]) -> Reply:
        return Reply(
            body={
                "hostname": "http://[::]:8080",
                "modules": {},
                "version": self.version,
                "grpcMaxMessageSize": self.max_message_bytes,
            }
        )

    def _schema(self, request: Request, rest: list[str]) -> Reply:
        if not rest:
            if request.method == "POST":
                return Reply(body=self._create(request.json()).body)
            return Reply(body={"classes": [found.body for found in self.classes.values()]})
        found = self.found(rest[0])
        if len(rest) == 1 and request.method == "DELETE":
            self.classes.pop(upper(rest[0]), None)
            return Reply()  # also where there is none, or an alias
        if found is None:
            raise ServerError("", 404)
        if rest[1:] == ["tenants"]:
            return self._tenants(request, found)
        if rest[1:] == ["properties"]:
            self._add_property(found.body, request.json())
        return Reply(body=found.body)

    def _create(self, asked: Mapping[str, Any]) -> StoredClass:
        name = upper(asked["class"])
        if not _CLASS.fullmatch(name):
            raise ServerError(f"'{name}' is not a valid class name")
        if name in self.classes:
            raise ServerError(f"class name {name} already exists")
        if name in self.alias_of:
            raise ServerError(f"alias name {name} already exists")
        if similar := [other for other in self.classes if other.lower() == name.lower()]:
            raise ServerError(f'class already exists: found similar class "{similar[0]}"')
        copies = (asked.get("replicationConfig") or {}).get("factor", 1)
        if copies > self.nodes:
            raise ServerError(
                "init sharding state: could not find enough weaviate nodes for replication: "
                f"{self.nodes} available, {copies} requested"
            )
        body: dict[str, Any] = {
            "invertedIndexConfig": _INVERTED,
            "replicationConfig": {"asyncEnabled": False, "factor": 1},
            **asked,
            "multiTenancyConfig": {
                "enabled": False,
                "autoTenantActivation": False,
                "autoTenantCreation": False,
                **(asked.get("multiTenancyConfig") or {}),
            },
            "class": name,
            "properties": [],
        }
        if not body["multiTenancyConfig"]["enabled"]:
            body["shardingConfig"] = {**_SHARDING, **(asked.get("shardingConfig") or {})}
        if asked.get("vectorConfig"):
            if asked.get("vectorIndexConfig"):
                raise ServerError(
                    "creating a class with both a class level vector index and named vectors is forbidden"
                )
            body["vectorConfig"] = {wire: _config(c, wire) for wire, c in asked["vectorConfig"].items()}
        else:
            body.pop("vectorConfig", None)
            body |= _config(asked, "") | {"vectorizer": asked.get("vectorizer", "none")}
        if body["multiTenancyConfig"]["enabled"] and asked.get("shardingConfig"):
            raise ServerError("cannot have both shardingConfig and multiTenancyConfig")
        for item in asked.get("properties") or ():
            self._add_property(body, item)
        self.classes[name] = StoredClass(body)
        return self.classes[name]

    def _add_property(self, body: dict[str, Any], item: Mapping[str, Any]) -> None:
        name = item["name"]
        if not _PROPERTY.fullmatch(name):
            raise ServerError(f"'{name}' is not a valid property name")
        if name in ("id", "_id", "_additional"):
            raise ServerError(f"'{name}' is a reserved property name")
        if name.endswith(_ENDS):
            raise ServerError(
                f"'{name}' is not a valid property name: suffix is reserved for internal indices"
            )
        lower = name[:1].lower() + name[1:]
        if any(other["name"].lower() == lower.lower() for other in body["properties"]):
            raise ServerError(f"conflict for property {name!r}: already in use or provided multiple times")
        kind = item["dataType"][0]
        if kind[0].isupper() and self.found(kind) is None:
            raise ServerError(f"property '{name}': invalid dataType: {kind}")
        if item.get("indexSearchable") and kind not in ("text", "text[]"):
            raise ServerError("`indexSearchable` is allowed only for text/text[] data types")
        defaults: dict[str, Any] = {
            "indexFilterable": kind != "blob",
            "indexRangeFilters": False,
            "indexSearchable": kind in ("text", "text[]"),
        }
        if kind in ("text", "text[]"):
            defaults["tokenization"] = "word"
        body["properties"].append({**defaults, **item, "name": lower})

    def _tenants(self, request: Request, found: StoredClass) -> Reply:
        if not found.has_tenants:
            raise ServerError(f"multi-tenancy is not enabled for class {found.body['class']!r}")
        asked = request.json() or []
        if request.method == "DELETE":
            for name in asked:
                found.tenants.pop(name, None)
                found.objects.pop(name, None)
        elif request.method in ("POST", "PUT"):
            for item in asked:
                if not _TENANT.fullmatch(item["name"]):
                    raise ServerError(f"'{item['name']}' is not a valid tenant name")
                status = item.get("activityStatus", "")
                if request.method == "PUT" or item["name"] not in found.tenants:
                    found.tenants[item["name"]] = _STATUSES.get(status, status)
        return Reply(body=[{"name": n, "activityStatus": status} for n, status in found.tenants.items()])

    def _objects(self, request: Request, rest: list[str]) -> Reply:
        if request.method == "POST":
            asked = request.json()
            named = {**({"": asked["vector"]} if asked.get("vector") else {}), **(asked.get("vectors") or {})}
            vectors = {wire: np.asarray(numbers, "<f4").tobytes() for wire, numbers in named.items()}
            item = StoredObject(parsed_id(asked["id"]), asked.get("properties") or {}, vectors, 0)
            try:
                self.put(asked["class"], asked.get("tenant", ""), item)
            except InvalidValueError as error:
                raise ServerError(str(error)) from None
            return Reply(body=asked)
        found = self.found(rest[0])
        objects = {} if found is None else found.of(request.query.get("tenant", [""])[0])
        if rest[1] not in objects:
            raise ServerError("", 404)
        if request.method == "DELETE":
            del objects[rest[1]]
            return Reply(204)
        return Reply(body={"class": rest[0], "id": rest[1], "properties": objects[rest[1]].properties})

    def _aliases(self, request: Request, rest: list[str]) -> Reply:
        if not rest and request.method == "GET":
            wanted = request.query.get("class", [None])[0]
            pairs = [pair for pair in self.alias_of.items() if wanted in (None, pair[1])]
            return Reply(body={"aliases": [{"alias": alias, "class": name} for alias, name in pairs]})
        asked = request.json() or {}
        alias = upper(rest[0] if rest else asked["alias"])
        if request.method == "POST" and (alias in self.alias_of or alias in self.classes):
            raise ServerError(
                f"updating schema: TYPE_CREATE_ALIAS: create alias: class {alias} already exists", 500
            )
        if request.method != "POST" and alias not in self.alias_of:
            raise ServerError("", 404)
        if request.method == "DELETE":
            del self.alias_of[alias]
            return Reply(204)
        if request.method in ("POST", "PUT"):
            if upper(asked["class"]) not in self.classes:
                raise ServerError(f'validation: target class "{asked["class"]}" does not exist')
            self.alias_of[alias] = upper(asked["class"])
        return Reply(body={"alias": alias, "class": self.alias_of[alias]})


def upper(name: str) -> str:
    """A class's name as the server spells it."""
    return name[:1].upper() + name[1:]


def _config(asked: Mapping[str, Any], wire: str) -> dict[str, Any]:
    if wire and not _VECTOR.fullmatch(wire):
        raise ServerError(f"'{wire}' is not a valid vector name")
    given = asked.get("vectorIndexConfig") or {}
    index = {**_INDEX, **given, "multivector": {**_MULTIVECTOR, **(given.get("multivector") or {})}}
    if index["distance"] not in _DISTANCES:
        raise ServerError(f"unrecognized or unsupported distance metric {index['distance']!r}")
    if not wire and index["multivector"]["enabled"]:
        raise ServerError(
            "class.VectorIndexConfig multi vector type index type is only configurable using named vectors"
        )
    made = {"vectorIndexType": asked.get("vectorIndexType") or "hnsw", "vectorIndexConfig": index}
    return made | ({"vectorizer": asked.get("vectorizer", {"none": {}})} if wire else {})


def parsed_id(text: str) -> str:
    """An id as the server keeps it.

    Raises
    ------
    InvalidValueError
        It is no UUID.
    """
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise InvalidValueError(f"invalid UUID length: {len(text)}") from None
