"""Milvus Lite's engine behind a server that fails as it is told to, call by call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from milvus_lite import MilvusLite
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

from migration_pipelines.stores.milvus import MilvusStore

_METHODS = milvus_pb2.DESCRIPTOR.services_by_name["MilvusService"].methods_by_name

Fault = Callable[[Any, grpc.ServicerContext], Any]


def abort(code: grpc.StatusCode, text: str = "as it was told", **trailers: str) -> Fault:
    """A call that ends without an answer; trailers' names have `_` for `-`."""

    def fault(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata([(name.replace("_", "-"), value) for name, value in trailers.items()])
        context.abort(code, text)

    return fault


def refuse(code: int, reason: str = "as it was told", **status: Any) -> Fault:
    """An answer whose status is this."""
    return lambda request, context: {"code": code, "reason": reason, **status}


class Milvus(grpc.ServerInterceptor):
    """The server: `faults` are used up one by one, by method; `calls` and `metadata` are what it saw."""

    def __init__(self) -> None:
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.calls: list[str] = []
        self.metadata: list[Mapping[str, str]] = []
        self.port = 0
        self._lock = threading.Lock()

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Count a call, and let it fail where one is told to."""
        method = details.method.rpartition("/")[2]
        with self._lock:
            self.calls.append(method)
            self.metadata.append(dict(details.invocation_metadata))
            waiting = self.faults.get(method)
            fault = waiting.pop(0) if waiting else self.always.get(method)
        handler = continuation(details)
        if fault is None:
            return handler

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            found = fault(request, context)
            if found is None:
                return handler.unary_unary(request, context)
            return found if not isinstance(found, dict) else _with_status(method, found)

        return grpc.unary_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    def store(self, **options: Any) -> MilvusStore:
        """A store on it."""
        return MilvusStore(host="127.0.0.1", port=self.port, **options)


def _with_status(method: str, status: Mapping[str, Any]) -> Any:
    kind = GetMessageClass(_METHODS[method].output_type)
    return kind(**status) if "code" in kind.DESCRIPTOR.fields_by_name else kind(status=status)


@contextmanager
def serving(folder: Path, *, max_request_bytes: int = -1) -> Iterator[Milvus]:
    """Run it on a free port of the loopback."""
    faults = Milvus()
    database = MilvusLite(str(folder / "engine"))
    server = grpc.server(
        ThreadPoolExecutor(8),
        interceptors=[faults],
        options=[("grpc.max_receive_message_length", max_request_bytes)],
    )
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
    faults.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield faults
    finally:
        server.stop(0).wait()
        database.close()
