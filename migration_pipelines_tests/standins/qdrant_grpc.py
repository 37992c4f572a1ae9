"""The gRPC side of the stand-in for Qdrant: its points, over the same engine as the HTTP side, and faults.

Payloads are converted as the server does it: an integer of 64 bits with its sign stays one, a larger one is
answered as a double. The server writes messages of any depth, which no client of protobuf's can read beyond
a hundred levels; this side can't write them, and answers with another message that can't be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, EncodeError
from qdrant_client import grpc as wire

from migration_pipelines_tests.standins import qdrant as rest
from migration_pipelines_tests.standins.qdrant import QdrantStandin, RefusedError

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    422: grpc.StatusCode.INVALID_ARGUMENT,
}
_UNREADABLE = b"\xff"


@dataclass
class GrpcFault:
    """What goes wrong instead of an answer, `times` times, on a method; any if "".

    With `after` the request is carried out and only its reply is lost; a `status` is that of a write that
    succeeds otherwise.
    """

    method: str = ""
    code: Any = grpc.StatusCode.UNAVAILABLE
    details: str = "the stand-in was told to fail"
    times: int = 1
    after: bool = False
    retry_after: str | None = None
    status: Any = None


class QdrantGrpcStandin(QdrantStandin):
    """One server with both its ports; tests queue `grpc_faults` and look at `grpc_requests`.

    `is_old`: answers with vectors in the fields that are deprecated since.
    """

    def __init__(self, key: str | None = None) -> None:
        super().__init__(key)
        self.grpc_port = 0
        self.grpc_faults: list[GrpcFault] = []
        self.grpc_requests: list[tuple[str, Any]] = []
        self.is_old = False

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve on two free ports of the loopback address, `port` and `grpc_port`."""
        server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
        server.add_generic_rpc_handlers([_Points(self).handler()])
        self.grpc_port = server.add_insecure_port("127.0.0.1:0")
        with super().serving():
            server.start()
            try:
                yield
            finally:
                server.stop(None).wait()


class _Points:
    def __init__(self, standin: QdrantGrpcStandin) -> None:
        self._standin = standin

    def handler(self) -> Any:
        """What answers the calls of the service `qdrant.Points`."""
        calls = {
            "Upsert": (wire.UpsertPoints, self._upsert),
            "Scroll": (wire.ScrollPoints, self._scroll),
            "Get": (wire.GetPoints, self._get),
            "Delete": (wire.DeletePoints, self._delete),
            "Count": (wire.CountPoints, self._count),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                partial(self._answer, name, carry_out),
                request_deserializer=request.FromString,
                response_serializer=_serialized,
            )
            for name, (request, carry_out) in calls.items()
        }
        return grpc.method_handlers_generic_handler("qdrant.Points", methods)

    def _answer(self, method: str, carry_out: Callable[[Any, Any], Any], request: Any, context: Any) -> Any:
        standin = self._standin
        with standin.lock:
            standin.grpc_requests.append((method, request))
            said = dict(context.invocation_metadata())
            if standin.key is not None and said.get("api-key") != standin.key:
                words = "Must provide an API key or an Authorization bearer token"
                context.abort(grpc.StatusCode.UNAUTHENTICATED, words)
            fault = self._fault(method)
            if fault is not None and fault.status is None and not fault.after:
                _fail(context, fault)
            try:
                reply = carry_out(standin._found(request.collection_name), request)
            except RefusedError as error:
                context.abort(_CODES[error.status], str(error))
            except DecodeError:
                return None
            if fault is not None and fault.after:
                _fail(context, fault)
            if fault is not None:
                reply.result.status = fault.status
            return reply

    def _fault(self, method: str) -> GrpcFault | None:
        for fault in self._standin.grpc_faults:
            if fault.times > 0 and fault.method in ("", method):
                fault.times -= 1
                return fault
        return None

    def _upsert(self, found: Any, request: Any) -> Any:
        keys = [_plain(key) for key in request.shard_key_selector.shard_keys]
        body = {"points": list(map(_given, request.points)), "shard_key": keys[0] if keys else None}
        rest._upsert(found, body)
        return _written(request)

    def _scroll(self, found: Any, request: Any) -> Any:
        if request.HasField("filter"):
            raise NotImplementedError
        body = {
            "offset": _plain(request.offset) if request.HasField("offset") else None,
            "limit": request.limit if request.HasField("limit") else None,
            **_options(request),
        }
        answer = rest._scroll(found, body)
        following = answer["next_page_offset"]
        return wire.ScrollResponse(
            result=[self._shown(point) for point in answer["points"]],
            next_page_offset=None if following is None else _point_id(following),
            time=1e-5,
        )

    def _get(self, found: Any, request: Any) -> Any:
        body = {"ids": [_plain(point_id) for point_id in request.ids], **_options(request)}
        points = rest._retrieve(found, body)
        return wire.GetResponse(result=[self._shown(point) for point in points], time=1e-5)

    def _delete(self, found: Any, request: Any) -> Any:
        rest._delete(found, {"points": [_plain(point_id) for point_id in request.points.points.ids]})
        return _written(request)

    def _count(self, found: Any, request: Any) -> Any:
        assert request.exact
        return wire.CountResponse(result=wire.CountResult(**rest._count(found, {})), time=1e-5)

    def _shown(self, point: Any) -> Any:
        message = wire.RetrievedPoint(
            id=_point_id(point["id"]),
            payload={key: _to_value(value) for key, value in (point.get("payload") or {}).items()},
        )
        output = _old_output if self._standin.is_old else _output
        if isinstance(point.get("vector"), dict):
            vectors = {name: output(vector) for name, vector in point["vector"].items()}
            message.vectors.vectors.CopyFrom(wire.NamedVectorsOutput(vectors=vectors))
        elif point.get("vector") is not None:
            message.vectors.vector.CopyFrom(output(point["vector"]))
        key = point.get("shard_key")
        if key is not None:
            shown = wire.ShardKey(number=key) if isinstance(key, int) else wire.ShardKey(keyword=key)
            message.shard_key.CopyFrom(shown)
        return message


def _serialized(reply: Any) -> bytes:
    try:
        return _UNREADABLE if reply is None else reply.SerializeToString()
    except EncodeError:
        return _UNREADABLE


def _fail(context: Any, fault: GrpcFault) -> None:
    if fault.retry_after is not None:
        context.set_trailing_metadata([("retry-after", fault.retry_after)])
    context.abort(fault.code, fault.details)


def _written(request: Any) -> Any:
    status = wire.UpdateStatus.Completed if request.wait else wire.UpdateStatus.Acknowledged
    return wire.PointsOperationResponse(result=wire.UpdateResult(operation_id=1, status=status), time=1e-5)


def _options(request: Any) -> dict[str, bool]:
    return {"with_payload": request.with_payload.enable, "with_vector": request.with_vectors.enable}


def _plain(message: Any) -> Any:
    """What the one field of a point's or shard's key holds."""
    (field,) = message.ListFields()
    return field[1]


def _point_id(point_id: Any) -> Any:
    return wire.PointId(num=point_id) if isinstance(point_id, int) else wire.PointId(uuid=point_id)


# ── payloads ─────────────────────────────────────────────────────────────────────────────────────────


def _from_value(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {key: _from_value(item) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_from_value(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def _to_value(value: Any) -> Any:
    if value is None:
        return wire.Value(null_value=0)
    if isinstance(value, bool):
        return wire.Value(bool_value=value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return wire.Value(integer_value=value)
    if isinstance(value, (int, float)):
        return wire.Value(double_value=float(value))
    if isinstance(value, str):
        return wire.Value(string_value=value)
    if isinstance(value, list):
        return wire.Value(list_value=wire.ListValue(values=map(_to_value, value)))
    fields = {key: _to_value(item) for key, item in value.items()}
    return wire.Value(struct_value=wire.Struct(fields=fields))


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────


def _given(point: Any) -> dict[str, Any]:
    if point.vectors.WhichOneof("vectors_options") == "vector":
        vector = _from_vector(point.vectors.vector)
    else:
        vector = {name: _from_vector(item) for name, item in point.vectors.vectors.vectors.items()}
    payload = {key: _from_value(value) for key, value in point.payload.items()}
    return {"id": _plain(point.id), "vector": vector, "payload": payload}


def _from_vector(vector: Any) -> Any:
    kind = vector.WhichOneof("vector")
    if kind == "sparse":
        return {"indices": list(vector.sparse.indices), "values": list(vector.sparse.values)}
    if kind == "multi_dense":
        return [list(row.data) for row in vector.multi_dense.vectors]
    return list(vector.dense.data if kind == "dense" else vector.data)


def _output(vector: Any) -> Any:
    if isinstance(vector, dict):
        sparse = wire.SparseVector(indices=vector["indices"], values=vector["values"].tolist())
        return wire.VectorOutput(sparse=sparse)
    if vector.ndim == 2:
        rows = [wire.DenseVector(data=row) for row in vector.tolist()]
        return wire.VectorOutput(multi_dense=wire.MultiDenseVector(vectors=rows))
    return wire.VectorOutput(dense=wire.DenseVector(data=vector.tolist()))


def _old_output(vector: Any) -> Any:
    if isinstance(vector, dict):
        indices = wire.SparseIndices(data=vector["indices"])
        return wire.VectorOutput(data=vector["values"].tolist(), indices=indices)
    count = len(vector) if vector.ndim == 2 else None
    return wire.VectorOutput(data=vector.ravel().tolist(), vectors_count=count)
