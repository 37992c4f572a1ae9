"""The two ways to a Weaviate server: REST for what collections are, gRPC for what they hold.

The vendor's client brings the messages and the stub; its own connection isn't used, because it retries by
itself, sleeps up to 31 seconds in doing so, and makes a Python float of every number of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from migration_pipelines.stores._channels import OPTIONS

# What server and client agree on unless GRPC_MAX_MESSAGE_SIZE says otherwise (`MAX_GRPC_MESSAGE_LENGTH`).
MAX_MESSAGE_BYTES = 104_858_000
# The first version that answers all requests as they are made here (`uses_127_api`).
OLDEST = (1, 27)
WITH_ALIASES = (1, 32)


class RestError(Exception):
    """A REST reply that says that the call failed.

    Parameters
    ----------
    status
        The HTTP status.
    retry_after
        The reply's `Retry-After`, in seconds.
    """

    def __init__(self, status: int, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class TooOldError(Exception):
    """The server's version is older than what is spoken here."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server is and how to log in; `key` is the API key."""

    host: str
    port: int
    grpc_host: str
    grpc_port: int
    https: bool
    key: str | None
    timeout_seconds: float


class Connection:
    """An open connection; safe to use from several threads.

    Raises
    ------
    TooOldError
        The server is older than `OLDEST`.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        import grpc
        import httpx
        from weaviate.proto.v1 import weaviate_pb2_grpc

        self._timeout = endpoint.timeout_seconds
        login = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._login = tuple(login.items())
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self._rest = httpx.Client(
            base_url=f"{'https' if endpoint.https else 'http'}://{host}:{endpoint.port}/v1",
            headers=login,
            timeout=endpoint.timeout_seconds,
        )
        try:
            meta = self.rest("GET", "/meta")
            self.version = _checked_version(str(meta.get("version", "")))
            self.max_message_bytes = int(meta.get("grpcMaxMessageSize") or MAX_MESSAGE_BYTES)
        except BaseException:
            self._rest.close()
            raise
        grpc_host = f"[{endpoint.grpc_host}]" if ":" in endpoint.grpc_host else endpoint.grpc_host
        target = f"{grpc_host}:{endpoint.grpc_port}"
        self._channel = (
            grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=OPTIONS)
            if endpoint.https
            else grpc.insecure_channel(target, options=OPTIONS)
        )
        stubs: Any = weaviate_pb2_grpc  # generated without types
        self._stub = stubs.WeaviateStub(self._channel)

    def rest(self, method: str, path: str, *, body: Any = None, query: dict[str, str] | None = None) -> Any:
        """Return the JSON of a reply; None where it has no body.

        Raises
        ------
        RestError
            The server answers with another status than 2xx.
        """
        reply = self._rest.request(method, quote(path), json=body, params=query)
        if not reply.is_success:
            wait = reply.headers.get("retry-after", "")
            seconds = float(wait) if wait.replace(".", "", 1).isdigit() else None
            raise RestError(reply.status_code, _message(reply), retry_after=seconds)
        return reply.json() if reply.content else None

    def call(self, method: str, request: Any) -> Any:
        """Return the reply of a gRPC method: `Search`, `BatchObjects`, `BatchDelete`, `Aggregate`, …"""
        return getattr(self._stub, method)(request, timeout=self._timeout, metadata=self._login)

    def close(self) -> None:
        """Close both ways."""
        self._rest.close()
        self._channel.close()


def _message(reply: Any) -> str:
    """Return what the server says went wrong, which has three forms; at worst the start of its reply."""
    try:
        body = reply.json()
    except ValueError:
        return str(reply.text[:300]) or f"HTTP {reply.status_code}"
    found = body.get("error", body.get("message")) if isinstance(body, dict) else body
    if isinstance(found, list):
        return "; ".join(str(item.get("message", item) if isinstance(item, dict) else item) for item in found)
    return str(found)


def _checked_version(text: str) -> tuple[int, ...]:
    """Return (1, 32) of `1.32.4`; of a build whose version isn't a number, one that is newer than any."""
    parts = text.split(".")[:2]
    known = len(parts) == 2 and all(part.isdigit() for part in parts)
    found = tuple(map(int, parts)) if known else (999,)
    if found < OLDEST:
        raise TooOldError(f"the server is Weaviate {text}, expected {OLDEST[0]}.{OLDEST[1]} or later")
    return found
