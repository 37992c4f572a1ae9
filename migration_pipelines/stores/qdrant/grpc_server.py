"""A Qdrant server whose points go by gRPC; all else, collections, settings, aliases and search, by HTTP.

What is read and written is the same by either way. gRPC's payloads have no integers above 2**63 - 1 and
end some thirty levels deep: points with such go by HTTP, and a point whose answer may hide one is read
again by HTTP. A scroll with a filter goes by HTTP as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores._channels import OPTIONS
from migration_pipelines.stores.qdrant.failures import CutAnswerError, RpcStatusError
from migration_pipelines.stores.qdrant.grpc_values import (
    UnholdableError,
    fill_payload,
    fill_vector,
    payload_of,
    vector_of,
)
from migration_pipelines.stores.qdrant.points import PointParts, point_parts, to_points
from migration_pipelines.stores.qdrant.server import Server, grouped


class GrpcServer(Server):
    """One server; safe to use from several threads.

    Parameters
    ----------
    url
        Scheme, host and port for HTTP.
    target
        Host and port for gRPC; with TLS where the URL's scheme is https.
    key, timeout, pace
        As of `Server`, for both ways.
    """

    def __init__(
        self, url: str, target: str, *, key: str | None, timeout: float, pace: Callable[[int], None]
    ) -> None:
        import grpc
        from qdrant_client.grpc import PointsStub

        super().__init__(url, key=key, timeout=timeout, pace=pace)
        self._channel = (
            grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=OPTIONS)
            if url.startswith("https:")
            else grpc.insecure_channel(target, options=OPTIONS)
        )
        stub: Any = PointsStub  # generated without types
        self._stub = stub(self._channel)
        self._metadata = (("api-key", key),) if key else ()
        self._timeout = timeout

    def close(self) -> None:
        """Close the channel and the connections."""
        self._channel.close()
        super().close()

    # ── points ───────────────────────────────────────────────────────────────────────────────────────

    def count(self, collection: str) -> int:
        """Return the exact number of points."""
        from qdrant_client.grpc import CountPoints

        reply = self._call("Count", CountPoints(collection_name=collection, exact=True))
        if not reply.HasField("result"):
            raise CutAnswerError("Count: the answer has no result")
        return int(reply.result.count)

    def scroll(
        self, collection: str, body: Mapping[str, Any]
    ) -> tuple[list[Mapping[str, Any]], int | str | None]:
        """Return the points from `offset` on, and the id that the next page begins with; None at the end."""
        from qdrant_client import grpc

        if "filter" in body:
            return super().scroll(collection, body)
        request = grpc.ScrollPoints(
            collection_name=collection,
            limit=body["limit"],
            offset=_point_id(body["offset"]) if "offset" in body else None,
            with_payload=grpc.WithPayloadSelector(enable=body["with_payload"]),
            with_vectors=grpc.WithVectorsSelector(enable=body["with_vector"]),
        )
        try:
            reply = self._call("Scroll", request)
        except RpcStatusError as error:
            if error.is_unreadable:
                return super().scroll(collection, body)
            raise
        following = _id_of(reply.next_page_offset) if reply.HasField("next_page_offset") else None
        return self._points(collection, reply.result, vectors=body["with_vector"]), following

    def retrieve(
        self, collection: str, ids: Sequence[int | str], *, vectors: bool
    ) -> list[Mapping[str, Any]]:
        """Return the points of these ids that are there, in any order."""
        from qdrant_client import grpc

        request = grpc.GetPoints(
            collection_name=collection,
            ids=map(_point_id, ids),
            with_payload=grpc.WithPayloadSelector(enable=True),
            with_vectors=grpc.WithVectorsSelector(enable=vectors),
        )
        try:
            reply = self._call("Get", request)
        except RpcStatusError as error:
            if error.is_unreadable:
                return super().retrieve(collection, ids, vectors=vectors)
            raise
        return self._points(collection, reply.result, vectors=vectors)

    def encoded(
        self, batch: pa.RecordBatch, schema: CollectionSchema, *, document_field: str, where: str
    ) -> list[Any]:
        """Return each record as a message, or all of them as JSON where gRPC would change one.

        Raises
        ------
        RecordRejectedError
            Qdrant can't hold a record, or would change it.
        """
        try:
            parts = point_parts(batch, schema, document_field=document_field, where=where)
            return [_message(point) for point in parts]
        except UnholdableError:
            return to_points(batch, schema, document_field=document_field, where=where)

    def upsert(self, collection: str, points: Sequence[Any], shard_key: int | str | None = None) -> None:
        """Write points, as messages or JSON, each replacing what was under its id.

        Raises
        ------
        RecordRejectedError
            A single point is larger than a request by HTTP may be; nothing is written.
        """
        from qdrant_client import grpc

        if points and isinstance(points[0], bytes):
            super().upsert(collection, points, shard_key)
            return
        keys = None if shard_key is None else grpc.ShardKeySelector(shard_keys=[_shard_key(shard_key)])
        for group in list(grouped(points, lambda point: point.ByteSize())):
            request = grpc.UpsertPoints(
                collection_name=collection, wait=True, points=group, shard_key_selector=keys
            )
            self._done("Upsert", request, writes_points=True)

    def delete(self, collection: str, ids: Sequence[int | str]) -> None:
        """Remove points."""
        from qdrant_client import grpc

        selector = grpc.PointsSelector(points=grpc.PointsIdsList(ids=map(_point_id, ids)))
        self._done("Delete", grpc.DeletePoints(collection_name=collection, wait=True, points=selector))

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _points(self, collection: str, found: Any, *, vectors: bool) -> list[Mapping[str, Any]]:
        """Return points as an answer by HTTP has them; those in doubt are read again by HTTP."""
        points: dict[int | str, Mapping[str, Any]] = {}
        doubtful = []
        for item in found:
            payload, is_doubtful = payload_of(item.payload)
            point_id = _id_of(item.id)
            if is_doubtful:
                doubtful.append(point_id)
            points[point_id] = {
                "id": point_id,
                "payload": payload,
                "vector": _vectors_of(item.vectors) if vectors else None,
                "shard_key": _shard_key_of(item.shard_key) if item.HasField("shard_key") else None,
            }
        if doubtful:
            exact = {point["id"]: point for point in super().retrieve(collection, doubtful, vectors=vectors)}
            for point_id in doubtful:
                # One that is gone by now was deleted meanwhile.
                points.pop(point_id) if point_id not in exact else points.update({point_id: exact[point_id]})
        return list(points.values())

    def _done(self, method: str, request: Any, *, writes_points: bool = False) -> None:
        from qdrant_client.grpc import UpdateStatus

        reply = self._call(method, request, writes_points=writes_points)
        if reply.result.status != UpdateStatus.Completed:
            raise CutAnswerError(f"{method}: the answer doesn't say that the write is completed")

    def _call(self, method: str, request: Any, *, writes_points: bool = False) -> Any:
        import grpc

        self._pace(request.ByteSize())
        try:
            return getattr(self._stub, method)(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise RpcStatusError(
                error.code().name,
                str(error.details())[:500],
                retry_after=_retry_after(error.trailing_metadata()),
                writes_points=writes_points,
            ) from error


def _message(point: PointParts) -> Any:
    from qdrant_client.grpc import PointStruct

    message = PointStruct(id=_point_id(point.id))
    fill_payload(message.payload, orjson.loads(point.payload))
    if list(point.vectors) == [""]:
        fill_vector(message.vectors.vector, point.vectors[""])
    else:
        message.vectors.vectors.SetInParent()
        for name, vector in point.vectors.items():
            fill_vector(message.vectors.vectors.vectors[name], vector)
    return message


def _vectors_of(found: Any) -> Any:
    if found.WhichOneof("vectors_options") == "vector":
        return vector_of(found.vector)
    return {name: vector_of(vector) for name, vector in found.vectors.vectors.items()}


def _point_id(point_id: int | str) -> Any:
    from qdrant_client.grpc import PointId

    return PointId(num=point_id) if isinstance(point_id, int) else PointId(uuid=point_id)


def _id_of(found: Any) -> int | str:
    return getattr(found, found.WhichOneof("point_id_options"))  # type: ignore[no-any-return]


def _shard_key(key: int | str) -> Any:
    from qdrant_client.grpc import ShardKey

    return ShardKey(number=key) if isinstance(key, int) else ShardKey(keyword=key)


def _shard_key_of(found: Any) -> int | str:
    return getattr(found, found.WhichOneof("key"))  # type: ignore[no-any-return]


def _retry_after(metadata: Any) -> float | None:
    said = {str(key).lower(): value for key, value in metadata or ()}.get("retry-after")
    return float(said) if isinstance(said, str) and said.isdecimal() else None
