"""A server of each store behind something that breaks it as it is told to, and mends it again.

Elasticsearch, Pinecone, Qdrant and Weaviate are stand-ins, Milvus is Lite's engine behind gRPC, S3 is moto,
and Chroma and PostgreSQL are themselves, behind a proxy.
"""

from __future__ import annotations

import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import grpc
from psycopg.conninfo import conninfo_to_dict

from migration_pipelines_tests import milvus_server
from migration_pipelines_tests.harnesses.chroma import ChromaServer
from migration_pipelines_tests.harnesses.parquet_s3 import ParquetOnS3, s3_server
from migration_pipelines_tests.harnesses.pgvector import fresh_database
from migration_pipelines_tests.standins.elasticsearch import ElasticsearchStandin
from migration_pipelines_tests.standins.http import Fault, Reply, Standin
from migration_pipelines_tests.standins.pinecone import KEY, PineconeStandin
from migration_pipelines_tests.standins.proxy import Gate, Proxy
from migration_pipelines_tests.standins.qdrant import QdrantStandin
from migration_pipelines_tests.standins.weaviate import WeaviateStandin
from migration_pipelines_tests.standins.weaviate_grpc import GrpcFault

FAILURES = ("gone", "login", "429", "503", "cut")
ALWAYS = 10**9
_GRPC_METHODS = ("Search", "Aggregate", "BatchObjects", "BatchDelete", "TenantsGet")
_CODES = {
    "login": grpc.StatusCode.UNAUTHENTICATED,
    "429": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "503": grpc.StatusCode.UNAVAILABLE,
    "cut": grpc.StatusCode.INTERNAL,
}
_SQLSTATES = {"login": "28P01", "429": "53300", "503": "57P03"}


class FailingServer(ABC):
    """A server that can be broken in each of `FAILURES`, until it is mended."""

    collection: ClassVar[str] = "docs"

    @classmethod
    @abstractmethod
    def start(cls, folder: Path) -> Any:
        """Serve, with data in `folder`; a context manager."""

    @abstractmethod
    def address(self, collection: str) -> str:
        """The address of a collection."""

    @abstractmethod
    def break_(self, failure: str) -> None:
        """Let every call fail."""

    @abstractmethod
    def mend(self) -> None:
        """Let every call succeed."""


def gate_to(port: int) -> Gate:
    """A gate before a port of the loopback address."""
    return Gate(lambda: socket.create_connection(("127.0.0.1", port)))


class _Http(FailingServer):
    """Whatever speaks HTTP: a gate before it can be closed, and its replies are those of a `Standin`."""

    def __init__(self, standin: Standin, gate: Gate) -> None:
        self.standin, self.gate = standin, gate

    def replies(self) -> dict[str, Reply]:
        """The refusals of this server."""
        return {
            "login": Reply(401, {"message": "who are you?"}),
            "429": Reply(429, {"message": "too many requests"}, {"Retry-After": "0"}),
            "503": Reply(503, {"message": "unavailable"}),
        }

    def break_(self, failure: str) -> None:
        if failure == "gone":
            self.gate.close()
        elif failure == "cut":
            self.standin.faults.append(Fault(times=ALWAYS, cut=True))
        else:
            self.standin.faults.append(Fault(times=ALWAYS, reply=self.replies()[failure]))

    def mend(self) -> None:
        self.standin.faults.clear()
        self.gate.open()


class FailingChroma(_Http):
    """A Chroma server."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingChroma]:
        with ChromaServer.start(folder) as server:
            proxy = Proxy(f"http://127.0.0.1:{server.store.port}")
            with proxy.serving(), gate_to(proxy.port).serving() as gate:
                yield cls(proxy, gate)

    def address(self, collection: str) -> str:
        return f"chroma://127.0.0.1:{self.gate.port}/{collection}"


class FailingQdrant(_Http):
    """Qdrant's stand-in."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingQdrant]:
        standin = QdrantStandin()
        with standin.serving(), gate_to(standin.port).serving() as gate:
            yield cls(standin, gate)

    def address(self, collection: str) -> str:
        return f"qdrant://127.0.0.1:{self.gate.port}/{collection}"


class FailingElasticsearch(_Http):
    """Elasticsearch's stand-in."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingElasticsearch]:
        standin = ElasticsearchStandin()
        with standin.serving(), gate_to(standin.port).serving() as gate:
            yield cls(standin, gate)

    def address(self, collection: str) -> str:
        return f"elasticsearch://127.0.0.1:{self.gate.port}/{collection}"


class FailingPinecone(_Http):
    """Pinecone's stand-in; the gate stands before its control plane."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingPinecone]:
        standin = PineconeStandin()
        with standin.serving(), gate_to(standin.port).serving() as gate:
            host = f"http://127.0.0.1:{gate.port}"
            with mock.patch.dict("os.environ", PINECONE_API_KEY=KEY, PINECONE_CONTROLLER_HOST=host):
                yield cls(standin, gate)

    def address(self, collection: str) -> str:
        return f"pinecone://{collection}"


class FailingWeaviate(_Http):
    """Weaviate's stand-in, which fails over HTTP and gRPC alike."""

    collection: ClassVar[str] = "Docs"
    standin: WeaviateStandin

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingWeaviate]:
        standin = WeaviateStandin(auto_schema=False)
        with standin.serving(), gate_to(standin.port).serving() as gate:
            yield cls(standin, gate)

    def address(self, collection: str) -> str:
        return f"weaviate://127.0.0.1:{self.gate.port}/{collection}?grpc_port={self.standin.grpc_port}"

    def break_(self, failure: str) -> None:
        if failure in ("gone", "login"):
            super().break_(failure)
        else:  # what has been opened fails; connections are opened by HTTP
            faults = [GrpcFault(method, _CODES[failure], times=ALWAYS) for method in _GRPC_METHODS]
            self.standin.grpc_faults += faults

    def mend(self) -> None:
        self.standin.grpc_faults.clear()
        super().mend()


class FailingS3(_Http):
    """Parquet in a bucket of moto's."""

    def __init__(self, standin: Standin, gate: Gate, bucket: str) -> None:
        super().__init__(standin, gate)
        self.bucket = bucket

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingS3]:
        with ParquetOnS3.start(folder) as harness:
            proxy = Proxy(s3_server())
            with proxy.serving(), gate_to(proxy.port).serving() as gate:
                url = f"http://127.0.0.1:{gate.port}"
                with mock.patch.dict("os.environ", AWS_ENDPOINT_URL=url):
                    yield cls(proxy, gate, harness.bucket)

    def address(self, collection: str) -> str:
        return f"parquet:s3://{self.bucket}/failing#{collection}"

    def replies(self) -> dict[str, Reply]:
        def reply(status: int, code: str) -> Reply:
            text = f"<Error><Code>{code}</Code><Message>as it was told</Message></Error>"
            return Reply(status, text.encode(), {"Content-Type": "application/xml"})

        refusals = {"login": (403, "AccessDenied"), "429": (429, "TooManyRequests"), "503": (503, "SlowDown")}
        return {failure: reply(*refusal) for failure, refusal in refusals.items()}


class FailingMilvus(FailingServer):
    """Milvus's protocol before the engine of Milvus Lite."""

    def __init__(self, server: milvus_server.Milvus, gate: Gate) -> None:
        self.server, self.gate = server, gate

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingMilvus]:
        with milvus_server.serving(folder) as server, gate_to(server.port).serving() as gate:
            yield cls(server, gate)

    def address(self, collection: str) -> str:
        return f"milvus://127.0.0.1:{self.gate.port}/{collection}"

    def break_(self, failure: str) -> None:
        if failure == "gone":
            self.gate.close()
            return
        for method in ("DescribeCollection", "Query", "Insert", "Upsert", "CreateCollection"):
            self.server.always[method] = milvus_server.abort(_CODES[failure])

    def mend(self) -> None:
        self.server.always.clear()
        self.gate.open()


class FailingPgVector(FailingServer):
    """PostgreSQL behind a gate: for a refusal its porter answers, and a cut is one of the connection."""

    def __init__(self, gate: Gate, database: str, user: str) -> None:
        self.gate, self.database, self.user = gate, database, user

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[FailingPgVector]:
        with fresh_database() as url:
            login: dict[str, Any] = conninfo_to_dict(url)
            with Gate(lambda: _postgres(login)).serving() as gate:
                yield cls(gate, login["dbname"], login.get("user", "postgres"))

    def address(self, collection: str) -> str:
        return f"pgvector://{self.user}@127.0.0.1:{self.gate.port}/{self.database}/{collection}"

    def break_(self, failure: str) -> None:
        if failure == "gone":
            self.gate.close()
        elif failure == "cut":
            self.gate.cut_after = 1000  # a connection has been made by then
        else:
            self.gate.porter = lambda client: _turn_away(client, _SQLSTATES[failure])

    def mend(self) -> None:
        self.gate.cut_after = self.gate.porter = None
        self.gate.open()


def _postgres(login: dict[str, Any]) -> socket.socket:
    host, port = login.get("host", "127.0.0.1"), int(login.get("port", 5432))
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{host}/.s.PGSQL.{port}")
    return connection


def _turn_away(client: socket.socket, sqlstate: str) -> None:
    """Speak PostgreSQL's protocol as far as refusing the connection."""
    while True:
        (length,) = struct.unpack(">i", client.recv(4))
        (code,) = struct.unpack(">i", client.recv(length - 4)[:4])
        if code == 196608:  # version 3.0; anything else asks for TLS or GSS
            break
        client.sendall(b"N")
    if sqlstate == "28P01":
        client.sendall(b"R" + struct.pack(">ii", 8, 3))  # a password, please
        client.recv(1000)
    words = {
        "28P01": "password authentication failed for user",
        "53300": "sorry, too many clients already",
        "57P03": "the database system is starting up",
    }[sqlstate]
    fields = f"SFATAL\0VFATAL\0C{sqlstate}\0M{words}\0\0".encode()
    client.sendall(b"E" + struct.pack(">i", 4 + len(fields)) + fields)


SERVERS: dict[str, type[FailingServer]] = {
    "chroma": FailingChroma,
    "qdrant": FailingQdrant,
    "milvus": FailingMilvus,
    "pinecone": FailingPinecone,
    "pgvector": FailingPgVector,
    "weaviate": FailingWeaviate,
    "elasticsearch": FailingElasticsearch,
    "parquet-s3": FailingS3,
}
