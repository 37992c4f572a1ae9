"""The calls of Milvus's protocol, each made once, within its time, and its status looked at.

pymilvus's messages and stubs, without its client: that repeats a failed call until its timeout is over, gives
floats for integers above 64 bits, and makes a Python object of every number of a vector.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from migration_pipelines.stores.milvus.errors import MilvusRefusal

# Milvus Lite's engine takes one writer a collection, and doesn't see to it.
_WRITERS: dict[str, threading.Lock] = {}
_LOCK = threading.Lock()
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 30_000),
)


class Client:
    """One channel to a server.

    Parameters
    ----------
    target
        `host:port`.
    token
        `user:password` or an API key.
    timeout
        Seconds that a call may take.
    before
        Called with the number of bytes that are about to be sent.
    """

    def __init__(
        self,
        target: str,
        *,
        secure: bool,
        token: str | None,
        database: str,
        timeout: float,
        before: Callable[[int], None],
    ) -> None:
        import grpc
        from pymilvus.grpc_gen import milvus_pb2_grpc

        self._channel = (
            grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=_OPTIONS)
            if secure
            else grpc.insecure_channel(target, options=_OPTIONS)
        )
        self._stub = milvus_pb2_grpc.MilvusServiceStub(self._channel)
        self._metadata = [("dbname", database)]
        if token:
            self._metadata.append(("authorization", base64.b64encode(token.encode()).decode()))
        self._timeout = timeout
        self._before = before
        with _LOCK:
            self.writing = _WRITERS.setdefault(target, threading.Lock())
        self._is_lite: bool | None = None

    def call(self, method: str, request: Any) -> Any:
        """Return the answer to a request.

        Raises
        ------
        MilvusRefusal
            Its status isn't success.
        grpc.RpcError
            There was no answer.
        """
        self._before(request.ByteSize())
        reply = getattr(self._stub, method)(request, timeout=self._timeout, metadata=self._metadata)
        status = getattr(reply, "status", reply)
        if status.code or status.error_code:
            raise MilvusRefusal(status)
        return reply

    @property
    def is_lite(self) -> bool:
        """Whether it is Milvus Lite, whose `upsert` merges and whose `insert` replaces."""
        from pymilvus.grpc_gen import milvus_pb2

        if self._is_lite is None:
            version = self.call("GetVersion", milvus_pb2.GetVersionRequest()).version
            self._is_lite = "lite" in version.lower()
        return self._is_lite

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def pairs(values: Mapping[str, Any]) -> list[Any]:
    """Return Milvus's form of a mapping."""
    from pymilvus.grpc_gen import common_pb2

    return [common_pb2.KeyValuePair(key=key, value=str(value)) for key, value in values.items()]


def mapping(found: Iterable[Any]) -> dict[str, str]:
    """Return the mapping of Milvus's form of one."""
    return {pair.key: pair.value for pair in found}
