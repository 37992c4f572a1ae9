"""An HTTP server on the loopback address that a stand-in answers for, with faults on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asked: `query` holds lists, `body` the raw bytes, `raw_query` what stood in the URL."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    raw_query: str = ""

    def json(self) -> Any:
        """The body as JSON; None where there is none."""
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True)
class Reply:
    """What the server answers; `body` is JSON unless it is bytes."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """The body as it goes over the wire."""
        if isinstance(self.body, bytes):
            return self.body
        return b"" if self.body is None else json.dumps(self.body, ensure_ascii=False).encode()


@dataclass
class Fault:
    """What goes wrong instead of an answer, `times` times, on requests whose path holds `path`.

    With `cut` the connection closes in the middle of the true answer; with `after` the request is carried out
    and only its reply is lost.
    """

    path: str = ""
    times: int = 1
    reply: Reply | None = None
    cut: bool = False
    after: bool = False


class Standin:
    """The base of every stand-in: a subclass answers requests, tests queue faults and look at `requests`."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.port = 0

    def answer(self, request: Request) -> Reply:
        """Carry a request out; called under the lock."""
        raise NotImplementedError

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve on a free port of the loopback address, `self.port`."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def handle(self, request: Request) -> tuple[Reply, bool]:
        """The reply to a request, and whether it is cut in the middle."""
        with self.lock:
            self.requests.append(request)
            fault = self._fault(request)
            if fault is None:
                return self.answer(request), False
            if fault.cut or fault.after:
                reply = self.answer(request)
                return fault.reply or reply, fault.cut
            return fault.reply or Reply(503), False

    def _fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.path in request.path:
                fault.times -= 1
                return fault
        return None


def _handler(standin: Standin) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def respond(self) -> None:
            parts = urlsplit(self.path)
            request = Request(
                method=self.command,
                path=parts.path,
                query=parse_qs(parts.query, keep_blank_values=True),
                headers={name.lower(): value for name, value in self.headers.items()},
                body=self.rfile.read(int(self.headers.get("Content-Length") or 0)),
                raw_query=parts.query,
            )
            reply, is_cut = standin.handle(request)
            body = reply.encoded()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if is_cut else body)
            if is_cut:
                self.close_connection = True

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = respond  # noqa: N815 - named by the base

    return Handler
