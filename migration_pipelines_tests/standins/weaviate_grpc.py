"""The gRPC side of the stand-in for Weaviate: searches, batches, counts, tenants, and faults on demand."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from weaviate.proto.v1 import (
    aggregate_pb2,
    base_pb2,
    batch_delete_pb2,
    batch_pb2,
    search_get_pb2,
    tenants_pb2,
    weaviate_pb2_grpc,
)

from migration_pipelines_tests.standins.weaviate import (
    ServerError,
    StoredClass,
    StoredObject,
    WeaviateStandin,
    parsed_id,
)
from migration_pipelines_tests.standins.weaviate_values import NESTED, InvalidValueError, given, returned


@dataclass
class GrpcFault:
    """What goes wrong instead of an answer, `times` times, on a method.

    With `after` the request is carried out and only its reply is lost. With `record_error` the call succeeds
    and says this of the first record of a batch, which isn't stored.
    """

    method: str
    code: Any = grpc.StatusCode.UNAVAILABLE
    details: str = "the stand-in was told to fail"
    times: int = 1
    after: bool = False
    record_error: str | None = None
    retry_after: str | None = None


@contextmanager
def serving_grpc(standin: WeaviateStandin) -> Iterator[None]:
    """Serve on a free port of the loopback address, `standin.grpc_port`."""
    size = standin.max_message_bytes
    server = grpc.server(
        ThreadPoolExecutor(8),
        options=[("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", -1)],
    )
    weaviate_pb2_grpc.add_WeaviateServicer_to_server(_Servicer(standin), server)
    health_pb2_grpc.add_HealthServicer_to_server(_Health(), server)
    standin.grpc_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


class _Health(health_pb2_grpc.HealthServicer):
    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the protocol
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class _Servicer(weaviate_pb2_grpc.WeaviateServicer):
    def __init__(self, standin: WeaviateStandin) -> None:
        self._standin = standin

    def Search(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("Search", request, context, self._search)

    def BatchObjects(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("BatchObjects", request, context, self._batch)

    def BatchDelete(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("BatchDelete", request, context, self._delete)

    def TenantsGet(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("TenantsGet", request, context, self._tenants)

    def Aggregate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("Aggregate", request, context, self._count)

    def _answer(self, method: str, request: Any, context: Any, carry_out: Callable[[Any], Any]) -> Any:
        standin = self._standin
        with standin.lock:
            standin.grpc_requests.append((method, request))
            try:
                standin.check_login(dict(context.invocation_metadata()).get("authorization"))
            except ServerError as error:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            fault = self._fault(method)
            if fault is not None and fault.record_error is None and not fault.after:
                self._fail(context, fault)
            try:
                if fault is not None and fault.record_error is not None:
                    return self._batch(request, first_error=fault.record_error)
                reply = carry_out(request)
            except (ServerError, InvalidValueError) as error:
                context.abort(grpc.StatusCode.UNKNOWN, str(error))
            if fault is not None:
                self._fail(context, fault)
            if reply.ByteSize() > standin.max_message_bytes:
                context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"grpc: trying to send message larger than max ({reply.ByteSize()} vs. "
                    f"{standin.max_message_bytes})",
                )
            return reply

    def _fault(self, method: str) -> GrpcFault | None:
        for fault in self._standin.grpc_faults:
            if fault.times > 0 and fault.method in ("", method):
                fault.times -= 1
                found: GrpcFault = fault
                return found
        return None

    @staticmethod
    def _fail(context: Any, fault: GrpcFault) -> None:
        if fault.retry_after is not None:
            context.set_trailing_metadata((("retry-after", fault.retry_after),))
        context.abort(fault.code, fault.details)

    def _class(self, name: str) -> StoredClass:
        found = self._standin.found(name)
        if found is None:
            raise ServerError(f"could not find class {name} in schema")
        return found

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def _batch(self, request: Any, first_error: str | None = None) -> Any:
        errors = []
        if not request.objects:
            raise ServerError(
                "invalid param 'objects': cannot be empty, need at least one object for batching"
            )
        if first_error is not None:
            errors.append(batch_pb2.BatchObjectsReply.BatchError(index=0, error=first_error))
        for index, item in list(enumerate(request.objects))[len(errors) :]:
            try:
                self._put(item)
            except (ServerError, InvalidValueError) as error:
                errors.append(batch_pb2.BatchObjectsReply.BatchError(index=index, error=str(error)))
        return batch_pb2.BatchObjectsReply(errors=errors)

    def _put(self, item: Any) -> None:
        vectors = {"": item.vector_bytes or np.asarray(item.vector, "<f4").tobytes()}
        vectors |= {vector.name: vector.vector_bytes for vector in item.vectors}
        stored = StoredObject(parsed_id(item.uuid), given(item.properties), vectors, 0)
        self._standin.put(item.collection, item.tenant, stored)

    def _delete(self, request: Any) -> Any:
        found = self._class(request.collection)
        objects = found.of(request.tenant)
        matches = self._matching(request.filters, objects)
        deleted = matches[: self._standin.maximum_results]
        for key in deleted:
            del objects[key]
        return batch_delete_pb2.BatchDeleteReply(matches=len(matches), successful=len(deleted))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def _matching(filters: Any, objects: dict[str, StoredObject]) -> list[str]:
        """The ids that a filter by id finds; the stand-in knows no other."""
        on = filters.target.property or "".join(filters.on)
        if on not in ("_id", "id"):
            raise ServerError(f"the stand-in can't filter by {on!r}")
        if filters.operator == base_pb2.Filters.OPERATOR_EQUAL:
            wanted = {filters.value_text}
        elif filters.operator == base_pb2.Filters.OPERATOR_CONTAINS_ANY:
            wanted = set(filters.value_text_array.values)
        else:
            raise ServerError(f"the stand-in has no operator {filters.operator}")
        return [key for key in objects if key in wanted]

    def _search(self, request: Any) -> Any:
        found = self._class(request.collection)
        if request.limit + request.offset > self._standin.maximum_results:
            raise ServerError(
                "explorer: list class: search: invalid pagination params: query maximum results exceeded: "
                f"the total limit calculated from the provided offset '{request.offset}' and limit "
                f"'{request.limit}' exceeds the configured value for QUERY_MAXIMUM_RESULTS "
                f"'{self._standin.maximum_results}'"
            )
        objects = found.of(request.tenant)
        filtered = request.HasField("filters")
        if request.after and (filtered or request.offset or request.HasField("near_vector")):
            raise ServerError("where cannot be set with after and limit parameters")
        distances: dict[str, float] = {}
        if request.after:
            after = str(uuid.UUID(request.after))
            chosen = sorted(key for key in objects if key > after)
        elif request.HasField("near_vector"):
            distances = _distances(found, objects, request.near_vector)
            chosen = sorted(distances, key=lambda key: distances[key])
        else:
            chosen = self._matching(request.filters, objects) if filtered else sorted(objects)
        page = chosen[request.offset :][: request.limit or 10]
        results = [self._result(found, objects[key], request, distances.get(key)) for key in page]
        return search_get_pb2.SearchReply(results=results)

    def _result(self, found: StoredClass, item: StoredObject, request: Any, distance: float | None) -> Any:
        asked = request.metadata
        made = search_get_pb2.SearchResult()
        metadata = made.metadata
        if asked.uuid:
            metadata.id, metadata.id_as_bytes = item.id, uuid.UUID(item.id).bytes
        if asked.last_update_time_unix:
            metadata.last_update_time_unix = item.updated_ms
            metadata.last_update_time_unix_present = True
        if asked.creation_time_unix:
            metadata.creation_time_unix, metadata.creation_time_unix_present = item.updated_ms, True
        if asked.distance and distance is not None:
            metadata.distance, metadata.distance_present = distance, True
        configs = found.vector_configs()
        if asked.vector and "" in configs:
            metadata.vector_bytes = item.vectors.get("", b"")
        for wire in [*configs] if asked.vector else asked.vectors:
            if wire and item.vectors.get(wire):
                multi = configs[wire]["vectorIndexConfig"]["multivector"]["enabled"]
                kind = "MULTI" if multi else "SINGLE"
                metadata.vectors.add(
                    name=wire, vector_bytes=item.vectors[wire], type=f"VECTOR_TYPE_{kind}_FP32"
                )
        for name, wanted in self._wanted(found, request).items():
            value = returned(item.properties.get(name), found.properties[name], wanted)
            made.properties.non_ref_props.fields[name].CopyFrom(value)
        return made

    @staticmethod
    def _wanted(found: StoredClass, request: Any) -> dict[str, Any]:
        """The properties that are returned: asked for all of them, neither references nor blobs."""
        asked = request.properties
        wanted = {part.prop_name: part for part in asked.object_properties}
        if request.HasField("properties") and not asked.return_all_nonref_properties:
            names = list(asked.non_ref_properties)
        else:
            kinds = {name: item["dataType"][0] for name, item in found.properties.items()}
            names = [n for n, kind in kinds.items() if kind != "blob" and not kind[0].isupper()]
        for name in names:
            lower = name[:1].lower() + name[1:]
            if lower not in found.properties:
                raise ServerError(f"no such prop with name '{name}' found in class '{found.body['class']}'")
            item = found.properties[lower]
            wanted.setdefault(lower, _whole(item) if item["dataType"][0] in NESTED else None)
        return wanted

    def _tenants(self, request: Any) -> Any:
        found = self._class(request.collection)
        if not found.has_tenants:
            raise ServerError(f"multi-tenancy is not enabled for class '{request.collection}'")
        named = set(request.names.values) if request.HasField("names") else set(found.tenants)
        return tenants_pb2.TenantsGetReply(
            tenants=[
                tenants_pb2.Tenant(name=name, activity_status=f"TENANT_ACTIVITY_STATUS_{status}")
                for name, status in found.tenants.items()
                if name in named
            ]
        )

    def _count(self, request: Any) -> Any:
        objects = self._class(request.collection).of(request.tenant)
        single = aggregate_pb2.AggregateReply.Single(objects_count=len(objects))
        return aggregate_pb2.AggregateReply(single_result=single)


def _whole(item: dict[str, Any]) -> Any:
    """The request for everything inside an object but blobs."""
    inside = item.get("nestedProperties") or ()
    return search_get_pb2.ObjectPropertiesRequest(
        prop_name=item["name"],
        primitive_properties=[p["name"] for p in inside if p["dataType"][0] not in (*NESTED, "blob")],
        object_properties=[_whole(part) for part in inside if part["dataType"][0] in NESTED],
    )


def _distances(found: StoredClass, objects: dict[str, StoredObject], near: Any) -> dict[str, float]:
    configs = found.vector_configs()
    targets = list(near.targets.target_vectors or near.target_vectors)
    if not targets and len(configs) > 1:
        raise ServerError(
            f"class {found.body['class']} has multiple vectors, but no target vectors were provided"
        )
    wire = targets[0] if targets else next(iter(configs))
    if wire not in configs:
        raise ServerError(f"class {found.body['class']} does not have named vector {wire} configured")
    raw = near.vector_bytes or near.vectors[0].vector_bytes
    query = np.frombuffer(raw, "<f4").astype(np.float64)
    measure = _MEASURES[configs[wire]["vectorIndexConfig"]["distance"]]
    made = {}
    for key, item in objects.items():
        if wire in item.vectors:
            vector = np.frombuffer(item.vectors[wire], "<f4").astype(np.float64)
            if len(vector) != len(query):
                raise ServerError(f"vector lengths don't match: {len(vector)} vs {len(query)}")
            made[key] = float(np.float32(measure(vector, query)))
    return made


def _cosine(a: Any, b: Any) -> Any:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return 1 - a @ b / lengths if lengths else 1.0


_MEASURES: dict[str, Callable[[Any, Any], Any]] = {
    "cosine": _cosine,
    "dot": lambda a, b: -(a @ b),
    "l2-squared": lambda a, b: ((a - b) ** 2).sum(),
    "manhattan": lambda a, b: np.abs(a - b).sum(),
    "hamming": lambda a, b: (a != b).sum(),
}
